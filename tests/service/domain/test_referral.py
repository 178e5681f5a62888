"""The decision: who decides, what the values say, and what may not be judged at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain import referral
from service.domain.bone import Reference, ReferenceOrigin, References, load_references
from service.domain.eligibility import Verdict
from service.domain.policy import DEFAULT_POLICY, Policy, load_policy
from service.domain.reasons import Code, Reason
from service.domain.referral import Outcome, PatientFacts, decide, reportable
from service.domain.result import (
    LEVELS,
    Anatomy,
    Category,
    Driver,
    LevelAnatomy,
    LevelMeasurement,
    Measurements,
    Numbering,
    Provenance,
    unmeasured,
)

PUBLISHED = tuple(one for one in load_references().entries if one.provenance is ReferenceOrigin.PUBLISHED)
DIGITAL_WOMEN = Reference(
    "women", ReferenceOrigin.DIGITAL, "Lunar", "L1-L4", "F", "simulated", mean_g_cm2=1.2, sd_g_cm2=0.12, source="test"
)
REFERENCES = References((*PUBLISHED, DIGITAL_WOMEN))

YES = Verdict(True, ())
DIGITAL = PatientFacts(synthetic=True, sex="F", age_years=63.0, manufacturer="SIEMENS")
REAL = replace(DIGITAL, synthetic=False)
FRACTURE = Reason(Code.FRACTURE, "height loss")


def measured(
    *,
    percent: float = 100.0,
    half_width: float | None = 3.0,
    tbs: float | None = 1.40,
    hu: float = 200.0,
    **changes: Any,
) -> Measurements:
    """Four equal levels, BMD in % of the digital women's mean; `changes` go to the Measurements."""
    bmd = percent / 100 * DIGITAL_WOMEN.mean_g_cm2
    reach = None if half_width is None else half_width / 100 * DIGITAL_WOMEN.mean_g_cm2
    level = LevelMeasurement(
        "L1",
        in_view=True,
        bmd_g_cm2=bmd,
        bmd_interval=None if reach is None else (bmd - reach, bmd + reach),
        tbs=tbs,
        tbs_interval=None if tbs is None else (tbs - 0.1, tbs + 0.1),
        hu_mean=hu,
        hu_roi_mm2=125.0,
    )
    plain = Measurements(
        levels={name: replace(level, level=name) for name in LEVELS},
        anatomy=Anatomy({name: LevelAnatomy(name, True) for name in LEVELS}, Numbering.CERTAIN, lumbar_count=5),
        provenance=Provenance("osteogate test", "model", "0" * 64, "segmenter", "0" * 64, "cpu"),
    )
    return replace(plain, **changes)


def with_level(found: Measurements, name: str, **changes: Any) -> Measurements:
    return replace(found, levels={**found.levels, name: replace(found.levels[name], **changes)})


def judge(
    found: Measurements, patient: PatientFacts = DIGITAL, verdict: Verdict = YES, policy: Policy = DEFAULT_POLICY
) -> Outcome:
    return decide(found, patient, verdict, policy, references=REFERENCES)


def codes(outcome: Outcome) -> list[Code]:
    return [reason.code for reason in outcome.decision.reasons]


# Digital patients: the network decides


@pytest.mark.parametrize(
    ("percent", "half_width", "category", "code"),
    [
        (55.0, 3.0, Category.REFER, Code.BMD_OSTEOPOROSIS_RANGE),
        (69.9, 30.0, Category.REFER, Code.BMD_OSTEOPOROSIS_RANGE),
        (70.1, 3.0, Category.REFER, Code.BMD_OSTEOPENIA_RANGE),
        (79.9, 0.5, Category.REFER, Code.BMD_OSTEOPENIA_RANGE),
        (80.1, 3.0, Category.INDETERMINATE, Code.BMD_NEAR_THRESHOLD),
        (84.9, 6.0, Category.INDETERMINATE, Code.BMD_NEAR_THRESHOLD),
        (84.9, 3.0, Category.NO_FLAG, Code.BMD_ABOVE_THRESHOLDS),  # near, but the interval stays above
        (85.1, 30.0, Category.NO_FLAG, Code.BMD_ABOVE_THRESHOLDS),  # a wide interval alone flags nobody
        (82.0, None, Category.INDETERMINATE, Code.BMD_NEAR_THRESHOLD),  # no interval: taken as wide
        (120.0, None, Category.NO_FLAG, Code.BMD_ABOVE_THRESHOLDS),
    ],
)
def test_density_decides_for_digital_patients(
    percent: float, half_width: float | None, category: Category, code: Code
) -> None:
    outcome = judge(measured(percent=percent, half_width=half_width))
    assert outcome.decision.category is category
    assert codes(outcome) == [code, Code.DIGITAL_PATIENT]
    assert outcome.decision.driver is Driver.NETWORK
    assert outcome.decision.policy == "YOSHIDA_2023 v1"
    assert outcome.eligible


def test_patient_values_are_means_over_the_levels() -> None:
    found = with_level(measured(percent=100.0), "L4", bmd_g_cm2=1.6, tbs=1.2, hu_mean=100.0)
    patient = judge(found).patient
    assert patient.bmd_g_cm2 == pytest.approx((3 * 1.2 + 1.6) / 4)
    assert patient.tbs == pytest.approx(1.35)
    assert patient.hu_mean == pytest.approx(175.0)
    assert patient.percent_yam == pytest.approx(100 * 1.3 / 1.2)
    assert patient.t_score == pytest.approx(0.1 / 0.12)
    assert patient.bmd_interval == pytest.approx((1.2 - 0.036, 1.2 + 0.036))
    assert patient.levels_used == LEVELS


def test_an_excluded_level_leaves_the_others() -> None:
    found = with_level(measured(percent=100.0), "L2", exclusions=(FRACTURE,), bmd_g_cm2=2.0)
    outcome = judge(found)
    assert outcome.eligible
    assert outcome.patient.levels_used == ("L1", "L3", "L4")
    assert outcome.patient.bmd_g_cm2 == pytest.approx(1.2)


def test_the_models_own_patient_interval_counts_where_it_gives_one() -> None:
    found = measured(percent=82.0, half_width=30.0, patient_bmd_interval=(0.97, 1.0))
    outcome = judge(found)
    assert outcome.patient.bmd_interval == (0.97, 1.0)
    assert outcome.decision.category is Category.NO_FLAG


@pytest.mark.parametrize(
    ("effect", "percent", "category"),
    [
        ("note", 100.0, Category.NO_FLAG),
        ("indeterminate", 100.0, Category.INDETERMINATE),
        ("refer", 100.0, Category.REFER),
        ("note", 60.0, Category.REFER),
        ("indeterminate", 60.0, Category.REFER),
    ],
)
def test_an_impaired_tbs_does_what_the_policy_says(effect: str, percent: float, category: Category) -> None:
    policy = load_policy(f'[referral]\ntbs_effect = "{effect}"')
    outcome = judge(measured(percent=percent, tbs=1.31), policy=policy)
    assert outcome.decision.category is category
    assert Code.TBS_IMPAIRED_RANGE in codes(outcome)
    assert Code.TBS_IMPAIRED_RANGE not in codes(judge(measured(percent=percent, tbs=1.32), policy=policy))


def test_a_digital_patient_without_a_cohort_is_not_assessable() -> None:
    for patient in (replace(DIGITAL, sex="M"), replace(DIGITAL, sex=None)):
        outcome = judge(measured(percent=50.0), patient)
        assert outcome.decision.category is Category.NOT_ASSESSABLE
        assert Code.REFERENCE_WITHHELD in codes(outcome)
        assert outcome.decision.driver is Driver.NONE
        assert outcome.patient.percent_yam is None


def test_implausible_values_are_left_out_and_named() -> None:
    found = with_level(measured(percent=100.0), "L3", bmd_g_cm2=9.0)
    outcome = judge(found)
    assert outcome.patient.levels_used == ("L1", "L2", "L4")
    text = {reason.code: reason.text for reason in outcome.decision.reasons}[Code.LEVEL_NOT_MEASURABLE]
    assert text == "L3: BMD 9 is left out; 0.2 to 2.5 is plausible."


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_no_bmd_at_all_is_not_assessable_for_a_digital_patient(value: float | None) -> None:
    found = measured()
    for name in LEVELS:
        found = with_level(found, name, bmd_g_cm2=value)
    outcome = judge(found)
    assert outcome.decision.category is Category.NOT_ASSESSABLE
    assert codes(outcome)[0] is Code.TOO_FEW_LEVELS
    assert outcome.patient.bmd_g_cm2 is None
    assert outcome.patient.bmd_interval is None


# Real patients: the attenuation of L1 decides


@pytest.mark.parametrize(
    ("hu", "category", "code"),
    [
        (60.0, Category.REFER, Code.HU_LOW),
        (110.0, Category.REFER, Code.HU_LOW),
        (110.1, Category.INDETERMINATE, Code.HU_BETWEEN),
        (160.0, Category.INDETERMINATE, Code.HU_BETWEEN),
        (160.1, Category.NO_FLAG, Code.HU_ABOVE),
    ],
)
def test_attenuation_of_l1_decides_for_real_patients(hu: float, category: Category, code: Code) -> None:
    others = measured(percent=55.0, hu=300.0)  # neither the network nor another level has a say
    outcome = judge(with_level(others, "L1", hu_mean=hu), REAL)
    assert outcome.decision.category is category
    assert codes(outcome) == [code, Code.NETWORK_INVESTIGATIONAL, Code.REFERENCE_WITHHELD]
    assert outcome.decision.driver is Driver.CT_ATTENUATION
    assert outcome.patient.bmd_g_cm2 is not None  # stands beside
    assert outcome.patient.percent_yam is None
    assert outcome.patient.t_score is None


@pytest.mark.parametrize("category", [Category.INDETERMINATE, Category.NOT_ASSESSABLE])
def test_without_l1_the_rule_says_nothing(category: Category) -> None:
    policy = load_policy(f'[referral]\nwithout_l1 = "{category}"')
    outcome = judge(with_level(measured(hu=60.0), "L1", exclusions=(FRACTURE,)), REAL, policy=policy)
    assert outcome.decision.category is category
    assert codes(outcome)[0] is Code.L1_NOT_MEASURED
    assert "FRACTURE" in outcome.decision.reasons[0].text


@pytest.mark.parametrize(
    ("gate", "verified", "synthetic_only", "driver"),
    [
        (False, False, True, Driver.CT_ATTENUATION),
        (True, True, True, Driver.CT_ATTENUATION),  # the shipped model never drives for real patients
        (False, True, False, Driver.CT_ATTENUATION),
        (True, False, False, Driver.CT_ATTENUATION),  # a gate without a reference: %YAM has no meaning
        (True, True, False, Driver.NETWORK),
    ],
)
def test_the_network_needs_gate_reference_and_real_validation(
    gate: bool, verified: bool, synthetic_only: bool, driver: Driver
) -> None:
    names = '"us-f-l1l4-lunar"' if verified else ""
    policy = load_policy(f"[referral]\nnetwork_gate_passed = {str(gate).lower()}\nverified_references = [{names}]")
    outcome = judge(measured(percent=60.0, model_synthetic_only=synthetic_only), REAL, policy=policy)
    assert outcome.decision.driver is driver
    assert outcome.decision.category is (Category.REFER if driver is Driver.NETWORK else Category.NO_FLAG)
    assert (outcome.patient.percent_yam is not None) is verified
    assert (Code.NETWORK_INVESTIGATIONAL in codes(outcome)) is (synthetic_only or not gate)


@pytest.mark.parametrize(
    ("hu", "category"),
    [(60.0, Category.REFER), (130.0, Category.INDETERMINATE), (250.0, Category.INDETERMINATE)],
)
def test_unchecked_tags_never_give_a_no_flag(hu: float, category: Category) -> None:
    outcome = judge(measured(hu=hu), replace(REAL, tags_checked=False))
    assert outcome.decision.category is category
    assert outcome.eligible
    assert Code.TAGS_NOT_CHECKED in codes(outcome)
    assert [reason.code for reason in outcome.verdict_reasons] == [Code.TAGS_NOT_CHECKED]


def test_unchecked_tags_are_said_once() -> None:
    own = Reason(Code.TAGS_NOT_CHECKED, "A NIfTI has no tags.")
    outcome = judge(measured(), replace(REAL, tags_checked=False), Verdict(True, (), (own,)))
    assert outcome.verdict_reasons == (own,)


def test_the_shipped_references_count_where_none_are_given() -> None:
    outcome = decide(measured(hu=90.0), REAL, YES, DEFAULT_POLICY)
    assert outcome.decision.category is Category.REFER
    assert Code.REFERENCE_WITHHELD in codes(outcome)


# What may not be judged


def anatomy(**changes: Any) -> dict[str, Any]:
    return {"anatomy": replace(measured().anatomy, **changes)}


METAL = Reason(Code.CONTRAST_IN_PIXELS, "aorta 250 HU")
NO_SPINE = Reason(Code.NO_SPINE_FOUND, "no vertebra")


@pytest.mark.parametrize("patient", [DIGITAL, REAL], ids=["digital", "real"])
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (measured(percent=50.0, refusals=(METAL,)), [Code.CONTRAST_IN_PIXELS]),
        (measured(percent=50.0, **anatomy(refusals=(METAL,)), refusals=(METAL,)), [Code.CONTRAST_IN_PIXELS]),
        (measured(percent=50.0, **anatomy(numbering=Numbering.UNCERTAIN)), [Code.LEVELS_UNCERTAIN]),
        (with_level(measured(percent=50.0), "L1", in_view=False), [Code.LEVEL_OUT_OF_VIEW]),
        (measured(percent=50.0, levels={}), [Code.LEVEL_OUT_OF_VIEW]),
        (replace(unmeasured("osteogate"), refusals=(NO_SPINE,)), [Code.NO_SPINE_FOUND]),
        (unmeasured("osteogate"), [Code.LEVEL_OUT_OF_VIEW, Code.LEVELS_UNCERTAIN]),
    ],
)
def test_what_the_pixels_refuse_is_not_assessable(
    found: Measurements, expected: list[Code], patient: PatientFacts
) -> None:
    outcome = judge(found, patient)
    assert not outcome.eligible
    assert outcome.decision.category is Category.NOT_ASSESSABLE
    assert outcome.decision.driver is Driver.NONE
    assert codes(outcome) == [reason.code for reason in outcome.verdict_reasons] == expected
    assert outcome.patient.bmd_g_cm2 is None
    assert outcome.patient.levels_used == ()


def test_the_level_outside_is_named() -> None:
    outcome = judge(with_level(measured(), "L1", in_view=False))
    assert outcome.decision.reasons[0].text == "Not wholly in view: L1; L1 to L4 are required."


def test_an_ineligible_series_keeps_its_own_reasons() -> None:
    no = Verdict(False, (Reason(Code.KVP_NOT_120, "140 kVp; 120 kVp is required."),))
    outcome = judge(unmeasured("osteogate"), verdict=no)
    assert codes(outcome) == [Code.KVP_NOT_120]
    assert not outcome.eligible
    assert judge(measured(percent=50.0), verdict=Verdict(False, ())).decision.category is Category.NOT_ASSESSABLE


def test_cautions_stand_in_the_verdict() -> None:
    thick = Reason(Code.SLICES_THICK, "Slices 3 mm thick")
    outcome = judge(measured(), verdict=Verdict(True, (), (thick,)))
    assert outcome.eligible
    assert outcome.verdict_reasons == (thick,)


@pytest.mark.parametrize("patient", [DIGITAL, REAL], ids=["digital", "real"])
def test_a_single_level_is_never_reported(patient: PatientFacts) -> None:
    found = measured(percent=50.0, hu=50.0)
    for name in ("L2", "L3", "L4"):
        found = with_level(found, name, exclusions=(FRACTURE,))
    outcome = judge(found, patient)
    assert outcome.eligible  # the levels are in the field: the CT met the paper's inclusion
    assert outcome.decision.category is Category.NOT_ASSESSABLE
    assert codes(outcome) == [Code.TOO_FEW_LEVELS]
    assert outcome.decision.reasons[0].text == (
        "1 valid level of L1 to L4; 2 are required (L2: FRACTURE; L3: FRACTURE; L4: FRACTURE)."
    )
    assert outcome.patient.bmd_g_cm2 is None


def test_two_levels_are_enough_also_apart() -> None:
    found = with_level(with_level(measured(), "L1", exclusions=(FRACTURE,)), "L3", exclusions=(FRACTURE,))
    assert judge(found).patient.levels_used == ("L2", "L4")


def test_values_of_an_ineligible_ct_are_withheld() -> None:
    found = measured(**anatomy(numbering=Numbering.UNCERTAIN))
    shown = reportable(found, judge(found))
    assert all(level.bmd_g_cm2 is None and level.hu_mean is None for level in shown.levels.values())
    assert reportable(measured(), judge(measured())) == measured()


# What holds for any measurements

_VALUES = st.none() | st.floats() | st.floats(0.3, 2.0)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.tuples(_VALUES, _VALUES, _VALUES, st.booleans()), min_size=4, max_size=4),
    synthetic=st.booleans(),
    sex=st.sampled_from(["F", "M", "O", None]),
    tags=st.booleans(),
)
def test_every_decision_has_words_and_none_is_reassuring(
    values: list[tuple[float | None, float | None, float | None, bool]], synthetic: bool, sex: str | None, tags: bool
) -> None:
    found = measured()
    for name, (bmd, tbs, hu, excluded) in zip(LEVELS, values, strict=True):
        exclusions = (FRACTURE,) if excluded else ()
        found = with_level(found, name, bmd_g_cm2=bmd, tbs=tbs, hu_mean=hu, exclusions=exclusions)
    outcome = judge(found, PatientFacts(synthetic, sex, 60.0, "SIEMENS", tags))
    assert outcome.decision.reasons
    text = " ".join(reason.text for reason in outcome.decision.reasons).lower()
    assert "normal" not in text
    assert "diagnos" not in text
    assert not text.count("osteopor")
    if sum(level.valid for level in found.levels.values()) < 2:
        assert outcome.decision.category is Category.NOT_ASSESSABLE


def test_every_code_of_the_decision_has_a_case() -> None:
    source = Path(referral.__file__).read_text(encoding="utf-8")
    tests = Path(__file__).read_text(encoding="utf-8")
    given_here = {code for code in Code if f"Code.{code}" in source}
    assert given_here
    assert not {code for code in given_here if f"Code.{code}" not in tests}
