"""The policy: complete in its sources, changed only by what it knows, and named by what it holds."""

from __future__ import annotations

import pytest

from service.domain.errors import OsteogateError, PolicyError
from service.domain.policy import DEFAULT_POLICY, kernel_rank, load_policy, thresholds

LISTED = thresholds(DEFAULT_POLICY)


@pytest.mark.parametrize("threshold", LISTED, ids=lambda threshold: threshold.path)
def test_every_threshold_has_a_unit_and_a_source(threshold: object) -> None:
    _, value, unit, source = threshold  # type: ignore[misc]
    assert value is not None
    assert unit
    assert any(word in source for word in ("Yoshida", "[S", "[K]", "our choice", "the site"))


def test_the_list_names_every_section() -> None:
    paths = [threshold.path for threshold in LISTED]
    assert len(paths) == len(set(paths)) > 30
    assert {"eligibility.kvp_required", "eligibility.kernels.siemens", "referral.hu_refer"} <= set(paths)


def test_the_papers_numbers() -> None:
    values = {threshold.path: threshold.value for threshold in LISTED}
    assert values["referral.percent_yam_osteoporosis"] == 70
    assert values["referral.percent_yam_osteopenia"] == 80
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
        ("[referral]\npercent_yam_osteoporosis = 85", "referral.percent_yam_osteoporosis"),
        ("[referral]\nlevels_minimum = 1", "referral.levels_minimum"),
        ('[referral]\ntbs_effect = "ignore"', "referral.tbs_effect"),
        ("[referral]\nnetwork_gate_passed = 1", "referral.network_gate_passed"),
        ('[referral]\nverified_references = "us-f-l1l4-lunar"', "referral.verified_references"),
        ('[referral]\nverified_references = ["nobody"]', "referral.verified_references"),
        ("[eligibility.kernels]\ncanon = [3]", "eligibility.kernels.canon"),
        ('[eligibility.kernels]\nsiemens = ["Br44-Br36"]', "eligibility.kernels.siemens"),
        ('[eligibility.kernels]\nsiemens = ["Br36-B44"]', "eligibility.kernels.siemens"),
        ('[eligibility.kernels]\nsiemens = ["Br*"]', "eligibility.kernels.siemens"),
        ('[eligibility.kernels]\nacme = ["X"]', "eligibility.kernels.acme"),
        ('name = ""', "name"),
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
