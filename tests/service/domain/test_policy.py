"""The policy: complete in its sources, changed only by what it knows, and named by what it holds."""

from __future__ import annotations

import pytest

from service.domain.bone import load_references
from service.domain.criteria import PROFILES
from service.domain.errors import OsteogateError, PolicyError
from service.domain.policy import DEFAULT_POLICY, kernel_rank, load_policy, thresholds

LISTED = thresholds(DEFAULT_POLICY)


@pytest.mark.parametrize("threshold", LISTED, ids=lambda threshold: threshold.path)
def test_every_threshold_has_a_unit_and_a_source(threshold: object) -> None:
    _, value, unit, source = threshold  # type: ignore[misc]
    assert value is not None
    assert unit
    assert any(word in source for word in ("Yoshida", "[S", "[K]", "our choice", "the site", "measured"))


def test_the_list_names_every_section() -> None:
    paths = [threshold.path for threshold in LISTED]
    assert len(paths) == len(set(paths)) > 30
    assert {"eligibility.kvp_required", "eligibility.kernels.siemens", "referral.hu_refer"} <= set(paths)


def test_the_papers_numbers() -> None:
    values = {threshold.path: threshold.value for threshold in LISTED}
    assert values["referral.criteria"] == "YOSHIDA_2023"
    assert values["referral.tbs_impaired"] == 1.31
    assert values["eligibility.kvp_required"] == 120
    assert values["eligibility.age_minimum_years"] == 20
    assert values["eligibility.slice_best_mm"] == 1.0


def test_what_the_list_prints_can_be_loaded_again() -> None:
    """Setting a threshold to the value that it has changes nothing."""
    for path, value, _, _ in LISTED:
        section, _, name = path.rpartition(".")
        written = str(value).lower() if isinstance(value, bool) else _toml(value)
        assert load_policy(f"[{section}]\n{name} = {written}") == DEFAULT_POLICY


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{word}"' for word in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def test_an_empty_file_is_the_default() -> None:
    assert load_policy("") == DEFAULT_POLICY
    assert DEFAULT_POLICY.label == "YOSHIDA_2023 v1"


def test_a_site_changes_one_number_and_the_label_says_so() -> None:
    policy = load_policy("[referral]\nhu_refer = 100\n")
    assert policy.referral.hu_refer == 100.0
    assert policy.referral.hu_no_flag == DEFAULT_POLICY.referral.hu_no_flag
    assert policy.label.startswith("YOSHIDA_2023 v1, site ")
    assert policy.label == load_policy("[referral]\nhu_refer = 100.0\n").label
    assert policy.label != load_policy("[referral]\nhu_refer = 101\n").label


# Criteria and references


@pytest.mark.parametrize("name", list(PROFILES))
def test_a_site_chooses_published_criteria_and_the_label_names_them(name: str) -> None:
    policy = load_policy(f'[referral]\ncriteria = "{name}"')
    assert policy.referral.profile is PROFILES[name]
    assert policy.label == f"{name} v1"
    assert load_policy(f'[referral]\ncriteria = "{name}"\nhu_refer = 100').label.startswith(f"{name} v1, site ")


def _site(key: str, **changes: str) -> str:
    """A site's file: one verified entry."""
    entry = {"device": "Lunar", "model": "Prodigy", "region": "L1-L4", "sex": "F", "ages": "20-44"}
    entry |= {"population": "ours", "source": "our own DXA", "version": "1", "verified_by": "M. Physicist"} | changes
    texts = "\n".join(f'{name} = "{value}"' for name, value in entry.items())
    rest = "mean_g_cm2 = 1.15\nsd_g_cm2 = 0.11\nverified_by_site = true\nverified_on = 2026-11-23"
    return f"[published.{key}]\n{texts}\n{rest}\n"


AT_HAND = load_references(
    {
        "women.toml": _site("ours-f"),
        "men.toml": _site("ours-m", sex="M"),
        "hologic.toml": _site("ours-hologic", device="Hologic"),
        "l2l4.toml": _site("ours-l2l4", region="L2-L4"),
        "hip.toml": _site("ours-hip", region="Total Hip"),
    }
)


def test_a_verified_reference_that_fits_is_chosen_for_its_sex() -> None:
    policy = load_policy('[referral]\nreference_female = "ours-f"\nreference_male = "ours-m"', AT_HAND)
    assert [reference.key for reference in policy.references] == ["ours-f", "ours-m"]
    women, men = policy.reference_for("F"), policy.reference_for("M")
    assert women is not None
    assert men is not None
    assert (women.key, men.key) == ("ours-f", "ours-m")
    assert load_policy("", AT_HAND).reference_for("F") is None  # at hand is not chosen


def test_jsbmr_allows_l2_l4_and_the_others_do_not() -> None:
    chosen = 'reference_female = "ours-l2l4"'
    assert load_policy(f'[referral]\ncriteria = "JSBMR_2012"\n{chosen}', AT_HAND).reference_for("F") is not None
    for name in ("YOSHIDA_2023", "WHO"):
        with pytest.raises(PolicyError, match=f"ours-l2l4 cannot be chosen under {name}: it is for L2-L4"):
            load_policy(f'[referral]\ncriteria = "{name}"\n{chosen}', AT_HAND)


def test_the_label_tells_other_numbers_under_the_same_key() -> None:
    """Two results with one label were judged by the same numbers."""
    text = '[referral]\nreference_female = "ours-f"'
    other = load_references({"women.toml": _site("ours-f").replace("1.15", "1.16")})
    labels = {load_policy(text, AT_HAND).label, load_policy(text, other).label, load_policy("").label}
    assert len(labels) == 3


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ('reference_female = "nobody"', "no reference 'nobody' is at hand; of this sex, for YOSHIDA_2023, there are: "),
        ('reference_male = "nobody"', "there are: ours-m"),
        ('reference_female = "ours-m"', "it is for men, not for women"),
        ('reference_male = "ours-f"', "it is for women, not for men"),
        ('reference_female = "ours-hologic"', "it is for Hologic, and this site's BMD is Lunar's"),
        ('reference_female = "ours-hip"', "it is for Total Hip, and the criteria allow L1-L4"),
        ('reference_female = "us-f-l1l4-lunar"', "this site has not verified it"),
        ('reference_female = "young-f-l1l4"', "digital patients, which says nothing about people"),
        ('reference_male = "us-f-hologic-nhanes"', "Hologic, and this site's BMD is Lunar's; it is for women"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused_at_start_and_why(choice: str, why: str) -> None:
    with pytest.raises(PolicyError) as caught:
        load_policy(f"[referral]\n{choice}", AT_HAND)
    assert caught.value.key == f"referral.{choice.split()[0]}"
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[referral]\nhu_reefer = 100", "referral.hu_reefer"),
        ("[refferal]\nhu_refer = 100", "refferal"),
        ("eligibility = 3", "eligibility"),
        ('[eligibility]\nkvp_required = "120"', "eligibility.kvp_required"),
        ("[eligibility]\nkvp_required = true", "eligibility.kvp_required"),
        ("[eligibility]\nkvp_required = nan", "eligibility.kvp_required"),
        ("[eligibility]\nslice_limit_mm = 12.0", "eligibility.slice_limit_mm"),
        ("[eligibility]\nslices_maximum = 100.5", "eligibility.slices_maximum"),
        (f"[eligibility]\nslices_maximum = 1{'0' * 400}", "eligibility.slices_maximum"),
        ("[eligibility]\nslice_best_mm = 3.5", "eligibility.slice_best_mm"),
        ("[referral]\nhu_refer = 200", "referral.hu_refer"),
        ("[referral]\npercent_yam_osteoporosis = 85", "referral.percent_yam_osteoporosis"),  # criteria are published
        ('[referral]\ncriteria = "JSBMR"', "referral.criteria"),
        ('[referral]\ncriteria = ""', "referral.criteria"),
        ("[referral]\ncriteria = 2012", "referral.criteria"),
        ('references = "ours"', "references"),
        ("[referral]\nprofile = 3", "referral.profile"),
        ("[referral]\nlevels_minimum = 1", "referral.levels_minimum"),
        ('[referral]\ntbs_effect = "ignore"', "referral.tbs_effect"),
        ("[referral]\nnetwork_gate_passed = 1", "referral.network_gate_passed"),
        ('[referral]\nreference_female = ["us-f-l1l4-lunar"]', "referral.reference_female"),
        ('[referral]\nreference_female = "us-f-l1l4-lunar"', "referral.reference_female"),
        ("[eligibility.kernels]\ncanon = [3]", "eligibility.kernels.canon"),
        ('[eligibility.kernels]\nsiemens = ["Br44-Br36"]', "eligibility.kernels.siemens"),
        ('[eligibility.kernels]\nsiemens = ["Br36-B44"]', "eligibility.kernels.siemens"),
        ('[eligibility.kernels]\nsiemens = ["Br*"]', "eligibility.kernels.siemens"),
        ('[eligibility.kernels]\nacme = ["X"]', "eligibility.kernels.acme"),
        ('name = "ours"', "name"),
        ("version = 2.5", "version"),
        ("this is no TOML", ""),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_key(text: str, key: str) -> None:
    with pytest.raises(PolicyError) as caught:
        load_policy(text)
    assert caught.value.key == key
    assert key in str(caught.value)
    assert isinstance(caught.value, OsteogateError)


@pytest.mark.parametrize(
    ("kernel", "rank"), [("br40", 0), ("Br36", 1), ("Br45", None), ("B30", 2), ("Br4０", None), ("", None)]
)
def test_the_first_matching_pattern_ranks_a_kernel(kernel: str, rank: int | None) -> None:
    assert kernel_rank(kernel, ("Br40", "Br36-Br44", "B30-B40")) == rank
