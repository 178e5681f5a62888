"""The criteria profiles: each threshold at, below and above itself, and what they ask for beside density."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain.bone import Reference, ReferenceOrigin
from service.domain.criteria import (
    JSBMR_2012,
    PROFILES,
    WHO,
    YOSHIDA_2023,
    CriteriaProfile,
    Cut,
    DensityRange,
    Scale,
    cuts_in_words,
)
from service.domain.policy import DEFAULT_POLICY
from tests.conftest import ROOT

YOUNG = Reference(
    "young", ReferenceOrigin.PUBLISHED, "Lunar", "L1-L4", "F", "20-44", "test", 1.2, 0.12, "test", version="1"
)  # 70 % is T -3, 80 % is T -2, T -2.5 is 75 %, T -1 is 90 %
WIDE = replace(YOUNG, sd_g_cm2=0.18)  # 70 % is T -2, T -2.5 is 62.5 %, T -1 is 85 %

OSTEOPOROSIS, OSTEOPENIA, ABOVE = DensityRange.OSTEOPOROSIS, DensityRange.OSTEOPENIA, DensityRange.ABOVE


def at_percent(percent: float, reference: Reference = YOUNG) -> float:
    return percent / 100 * reference.mean_g_cm2


def at_t(score: float, reference: Reference = YOUNG) -> float:
    return reference.mean_g_cm2 + score * reference.sd_g_cm2


@pytest.mark.parametrize(
    ("profile", "bmd", "reference", "found", "met"),
    [
        (YOSHIDA_2023, at_percent(69.99), YOUNG, OSTEOPOROSIS, "below 70 % YAM"),
        (YOSHIDA_2023, at_percent(70), YOUNG, OSTEOPENIA, "below 80 % YAM"),
        (YOSHIDA_2023, at_percent(79.99), YOUNG, OSTEOPENIA, "below 80 % YAM"),
        (YOSHIDA_2023, at_percent(80), YOUNG, ABOVE, "below 80 % YAM"),
        (JSBMR_2012, at_t(-2.5), YOUNG, OSTEOPOROSIS, "at or below T -2.5"),
        (JSBMR_2012, at_t(-2.499), YOUNG, OSTEOPENIA, "below T -1"),
        (JSBMR_2012, at_percent(70, WIDE), WIDE, OSTEOPOROSIS, "at or below 70 % YAM"),
        (JSBMR_2012, at_percent(70.01, WIDE), WIDE, OSTEOPENIA, "below T -1"),
        (JSBMR_2012, at_t(-1.001), YOUNG, OSTEOPENIA, "below T -1"),
        (JSBMR_2012, at_t(-1), YOUNG, ABOVE, "below T -1"),
        (WHO, at_t(-2.5), YOUNG, OSTEOPOROSIS, "at or below T -2.5"),
        (WHO, at_t(-2.499), YOUNG, OSTEOPENIA, "below T -1"),
        (WHO, at_percent(70, WIDE), WIDE, OSTEOPENIA, "below T -1"),  # T -2: WHO knows no % YAM
        (WHO, at_t(-1.001), YOUNG, OSTEOPENIA, "below T -1"),
        (WHO, at_t(-1), YOUNG, ABOVE, "below T -1"),
    ],
)
def test_each_threshold_at_and_around_itself(
    profile: CriteriaProfile, bmd: float, reference: Reference, found: DensityRange, met: str
) -> None:
    range_, cut = profile.range_of(bmd, reference)
    assert range_ is found
    assert cut.words == met


_CUTS = sorted(
    {cut for profile in PROFILES.values() for cut in (*profile.osteoporosis, *profile.osteopenia)},
    key=lambda cut: (cut.source, cut.value),
)
_REFERENCES = st.builds(
    lambda mean, share: replace(YOUNG, mean_g_cm2=mean, sd_g_cm2=share * mean),
    st.floats(0.8, 1.5),
    st.floats(0.05, 0.25),
)


@settings(deadline=None)
@given(cut=st.sampled_from(_CUTS), reference=_REFERENCES, off=st.floats(1e-6, 0.5))
def test_a_cut_is_met_below_it_and_at_it_only_where_inclusive(cut: Cut, reference: Reference, off: float) -> None:
    """Whatever the last bit of a division says: at the threshold is at the threshold."""
    at = cut.bmd_g_cm2(reference.mean_g_cm2, reference.sd_g_cm2)
    assert cut.reading(at, reference) == pytest.approx(cut.value, abs=1e-9)
    assert cut.met(at, reference) is cut.inclusive
    assert cut.met(at - off, reference)
    assert not cut.met(at + off, reference)
    assert cut.met(-math.inf, reference)


@settings(deadline=None)
@given(profile=st.sampled_from(list(PROFILES.values())), reference=_REFERENCES, bmd=st.floats(0.2, 2.5))
def test_more_bone_is_never_a_worse_range(profile: CriteriaProfile, reference: Reference, bmd: float) -> None:
    order = [OSTEOPOROSIS, OSTEOPENIA, ABOVE]
    ranges = [profile.range_of(value, reference)[0] for value in (bmd, bmd + 0.01)]
    assert order.index(ranges[0]) <= order.index(ranges[1])
    referring = profile.referring(reference).bmd_g_cm2(reference.mean_g_cm2, reference.sd_g_cm2)
    if abs(bmd - referring) > 1e-6:
        assert (ranges[0] is not ABOVE) is (bmd < referring)


def test_a_margin_is_the_same_density_on_either_scale() -> None:
    percent, score = YOSHIDA_2023.osteopenia[0], WHO.osteopenia[0]
    assert percent.margin(5.0, YOUNG) == 5.0
    assert score.margin(5.0, YOUNG) == pytest.approx(0.5)  # 0.06 of 0.12 g/cm2


# What density alone cannot tell


@pytest.mark.parametrize(
    ("percent", "asked"), [(69.0, False), (70.0, False), (75.1, True), (79.99, True), (80.0, False), (95.0, False)]
)
def test_jsbmr_says_which_history_would_count(percent: float, asked: bool) -> None:
    said = JSBMR_2012.unknown_history(at_percent(percent), YOUNG)
    assert (said is not None) is asked
    if said is not None:
        assert "none was assumed" in said
    assert WHO.unknown_history(at_percent(percent), YOUNG) is None
    assert YOSHIDA_2023.unknown_history(at_percent(percent), YOUNG) is None


def test_who_leaves_to_the_reader_for_whom_it_is_meant() -> None:
    assert any(note.startswith("[K]") and "menopause" in note for note in WHO.notes)


# The profiles as values


def test_the_default_is_the_papers() -> None:
    assert DEFAULT_POLICY.referral.profile is YOSHIDA_2023


@pytest.mark.parametrize("profile", list(PROFILES.values()), ids=list(PROFILES))
def test_every_threshold_has_its_source_and_its_line_in_readme(profile: CriteriaProfile) -> None:
    cuts = (*profile.osteoporosis, *profile.osteopenia)
    assert all("[S]" in cut.source or "[K]" in cut.source for cut in cuts)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    line = f"| `{profile.name}` | {cuts_in_words(profile.osteoporosis)} | {cuts_in_words(profile.osteopenia)} |"
    assert f"{line} {', '.join(profile.regions)} |" in readme


def test_thresholds_in_words() -> None:
    assert cuts_in_words(JSBMR_2012.osteoporosis) == "<= 70 % YAM or T <= -2.5"
    assert cuts_in_words(JSBMR_2012.osteopenia) == "T < -1"
    assert {cut.scale for cut in (*WHO.osteoporosis, *WHO.osteopenia)} == {Scale.T_SCORE}
