"""The decision: who decides, what the values say, and what may not be judged at all."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain import referral
from service.domain.bone import Reference, ReferenceOrigin, References, load_references, reference_words
from service.domain.criteria import PROFILES
from service.domain.eligibility import Verdict
from service.domain.errors import PolicyError
from service.domain.figures import figure_beside
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
    result_document,
    unmeasured,
)

PUBLISHED = tuple(one for one in load_references().entries if one.provenance is ReferenceOrigin.PUBLISHED)
DIGITAL_WOMEN = Reference(
    key="women",
    provenance=ReferenceOrigin.DIGITAL,
    device="Lunar",
    region="L1-L4",
    sex="F",
    ages="20-44",
    population="simulated",
    mean_g_cm2=1.2,
    sd_g_cm2=0.12,  # T -1 is 90 %, T -2.5 is 75 %, T -3 is 70 %
    source="test",
    version="7",
)
REFERENCES = References((*PUBLISHED, DIGITAL_WOMEN))
SITE_WOMEN = replace(
    DIGITAL_WOMEN,
    key="site-women",
    provenance=ReferenceOrigin.PUBLISHED,
    verified_by_site=True,
    verified_by="M. Physicist",
    verified_on=date(2026, 11, 23),
)


def site_policy(text: str = "", *chosen: Reference) -> Policy:
    """A site's policy with the references that it verified and chose."""
    names = {"F": "reference_female", "M": "reference_male"}
    lines = [f'{names[reference.sex]} = "{reference.key}"' for reference in chosen]
    return load_policy("\n".join(["[referral]", text, *lines]), References(chosen))


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


def test_a_model_of_bmd_alone_is_said_to_measure_no_tbs() -> None:
    for patient, percent in ((DIGITAL, 60.0), (DIGITAL, 95.0), (REAL, 60.0)):
        found = measured(percent=percent, model_measures_tbs=False)
        for name in list(found.levels):
            found = with_level(found, name, tbs=None, tbs_interval=None)
        outcome = judge(found, patient)
        assert (outcome.patient.tbs, outcome.patient.tbs_interval) == (None, None)
        told = {reason.code: reason.text for reason in outcome.decision.reasons}
        assert told[Code.TBS_NOT_MEASURED] == "TBS not measured by this model."
        assert Code.TBS_IMPAIRED_RANGE not in told
        assert "BMD and TBS" not in " ".join(told.values())
        same = judge(measured(percent=percent), patient)
        assert outcome.decision.category is same.decision.category
        assert Code.TBS_NOT_MEASURED not in codes(same)


def test_a_scanner_that_the_model_was_not_fitted_to_is_told() -> None:
    for patient in (DIGITAL, REAL):
        outcome = judge(measured(percent=60.0, model_knows_scanner=False), patient)
        assert codes(outcome).count(Code.SCANNER_NOT_PAIRED) == 1
        same = judge(measured(percent=60.0), patient)
        assert outcome.decision.category is same.decision.category
        assert Code.SCANNER_NOT_PAIRED not in codes(same)


def test_the_interval_is_that_of_the_mean_that_is_told() -> None:
    """The model's own holds for all levels; where one is beyond belief it is another mean's, and hides what is low."""
    found = replace(measured(percent=82.0), patient_bmd_interval=(1.338, 1.438))
    assert judge(found, DIGITAL).patient.bmd_interval == (1.338, 1.438)
    outcome = judge(with_level(found, "L1", bmd_g_cm2=2.6), DIGITAL)
    assert outcome.patient.levels_used == ("L2", "L3", "L4")
    assert outcome.patient.bmd_interval == pytest.approx(found.levels["L2"].bmd_interval)  # as that of L3 and L4
    assert outcome.decision.category is Category.INDETERMINATE  # by (1.338, 1.438) it had no flag


def test_why_the_scanner_is_not_known_is_told() -> None:
    told = {}
    for patient, digital_model in ((REAL, True), (REAL, False), (DIGITAL, True)):
        found = measured(percent=60.0, model_knows_scanner=False, model_synthetic_only=digital_model)
        reasons = {reason.code: reason.text for reason in judge(found, patient).decision.reasons}
        told[patient.synthetic, digital_model] = reasons[Code.SCANNER_NOT_PAIRED]
    assert "from digital patients alone" in told[False, True]
    assert "on other scanners of this site" in told[False, False]
    assert "on other scanners of this site" in told[True, True]


def test_the_network_drives_no_real_patient_on_a_scanner_that_its_gate_never_saw() -> None:
    policy = site_policy("network_gate_passed = true", SITE_WOMEN)
    found = measured(percent=60.0, model_synthetic_only=False, model_gate_passed=True)
    assert judge(found, REAL, policy=policy).decision.driver is Driver.NETWORK
    outcome = judge(replace(found, model_knows_scanner=False), REAL, policy=policy)
    assert outcome.decision.driver is Driver.CT_ATTENUATION
    told = {reason.code: reason.text for reason in outcome.decision.reasons}
    assert "not validated on this scanner" in told[Code.NETWORK_INVESTIGATIONAL]
    assert "intervals are wider" in told[Code.SCANNER_NOT_PAIRED]


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
    ("allowed", "verified", "synthetic_only", "promoted", "driver"),
    [
        (False, False, True, False, Driver.CT_ATTENUATION),
        (True, True, True, False, Driver.CT_ATTENUATION),  # the shipped model never drives for real patients
        (True, True, True, True, Driver.CT_ATTENUATION),  # nor any that knows digital patients alone
        (False, True, False, True, Driver.CT_ATTENUATION),
        (True, True, False, False, Driver.CT_ATTENUATION),  # the site's switch alone promotes nothing
        (True, False, False, True, Driver.CT_ATTENUATION),  # a gate without a reference: %YAM has no meaning
        (True, True, False, True, Driver.NETWORK),
    ],
)
def test_the_network_needs_switch_gate_reference_and_people(
    allowed: bool, verified: bool, synthetic_only: bool, promoted: bool, driver: Driver
) -> None:
    policy = site_policy(f"network_gate_passed = {str(allowed).lower()}", *([SITE_WOMEN] if verified else []))
    found = measured(percent=60.0, model_synthetic_only=synthetic_only)
    outcome = judge(replace(found, model_gate_passed=promoted), REAL, policy=policy)
    assert outcome.decision.driver is driver
    assert outcome.decision.category is (Category.REFER if driver is Driver.NETWORK else Category.NO_FLAG)
    assert (outcome.patient.percent_yam is not None) is verified
    validated = allowed and promoted and not synthetic_only
    assert (Code.NETWORK_INVESTIGATIONAL in codes(outcome)) is not validated
    told = " ".join(reason.text for reason in outcome.decision.reasons)
    assert ("policy lets it decide for nobody" in told) is (promoted and not synthetic_only and not allowed)


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


# Criteria and references

OWN_DRIVER = "network_gate_passed = true"


@pytest.mark.parametrize("patient", [DIGITAL, REAL], ids=["digital", "real"])
@pytest.mark.parametrize(
    ("criteria", "percent", "category", "code", "words"),
    [
        ("YOSHIDA_2023", 69.9, Category.REFER, Code.BMD_OSTEOPOROSIS_RANGE, "below 70 % YAM (YOSHIDA_2023)"),
        ("YOSHIDA_2023", 70.0, Category.REFER, Code.BMD_OSTEOPENIA_RANGE, "below 80 % YAM (YOSHIDA_2023)"),
        ("YOSHIDA_2023", 80.0, Category.INDETERMINATE, Code.BMD_NEAR_THRESHOLD, "80 % YAM (YOSHIDA_2023)"),
        ("YOSHIDA_2023", 88.0, Category.NO_FLAG, Code.BMD_ABOVE_THRESHOLDS, "80 % YAM (YOSHIDA_2023)"),
        ("JSBMR_2012", 70.0, Category.REFER, Code.BMD_OSTEOPOROSIS_RANGE, "at or below 70 % YAM (JSBMR_2012)"),
        ("JSBMR_2012", 75.0, Category.REFER, Code.BMD_OSTEOPOROSIS_RANGE, "T -2.50, at or below T -2.5 (JSBMR_2012)"),
        ("JSBMR_2012", 79.0, Category.REFER, Code.BMD_OSTEOPENIA_RANGE, "below T -1 (JSBMR_2012)"),
        ("JSBMR_2012", 89.9, Category.REFER, Code.BMD_OSTEOPENIA_RANGE, "T -1.01, below T -1 (JSBMR_2012)"),
        ("JSBMR_2012", 90.0, Category.INDETERMINATE, Code.BMD_NEAR_THRESHOLD, "the threshold of T -1 (JSBMR_2012)"),
        ("JSBMR_2012", 98.0, Category.NO_FLAG, Code.BMD_ABOVE_THRESHOLDS, "referral is T -1 (JSBMR_2012)"),
        ("WHO", 70.0, Category.REFER, Code.BMD_OSTEOPOROSIS_RANGE, "T -3.00, at or below T -2.5 (WHO)"),
        ("WHO", 75.1, Category.REFER, Code.BMD_OSTEOPENIA_RANGE, "T -2.49, below T -1 (WHO)"),
        ("WHO", 94.9, Category.NO_FLAG, Code.BMD_ABOVE_THRESHOLDS, "referral is T -1 (WHO)"),  # interval stays above
        ("WHO", 90.0, Category.INDETERMINATE, Code.BMD_NEAR_THRESHOLD, "the threshold of T -1 (WHO)"),
    ],
)
def test_the_same_density_under_each_criteria(
    criteria: str, percent: float, category: Category, code: Code, words: str, patient: PatientFacts
) -> None:
    """From the measurements to result.json, for a digital patient and, where the network may drive, a real one."""
    found = measured(percent=percent, hu=250.0, model_synthetic_only=False, model_gate_passed=True)
    policy = site_policy(f'criteria = "{criteria}"\n{OWN_DRIVER}', SITE_WOMEN)
    document = as_document(found, judge(found, patient, policy=policy))
    assert document["decision"]["category"] == category
    assert document["decision"]["driver"] == "network"
    assert document["decision"]["criteria"] == criteria
    assert document["decision"]["policy"].startswith(f"{criteria} v1")
    first = document["decision"]["reasons"][0]
    assert first["code"] == code
    assert words in first["text"]
    assert document["patient"]["percent_yam"] == pytest.approx(percent)
    assert document["patient"]["t_score"] == pytest.approx((percent - 100) / 10)


def as_document(found: Measurements, outcome: Outcome) -> dict[str, Any]:
    return result_document(
        study_uid="1.2",
        series_uid="1.2.3",
        revision=1,
        eligible=outcome.eligible,
        verdict_reasons=outcome.verdict_reasons,
        measurements=found,
        patient=outcome.patient,
        decision=outcome.decision,
    )


def test_a_figure_is_told_apart_from_its_threshold() -> None:
    text = judge(measured(percent=69.98)).decision.reasons[0].text
    assert text.startswith("BMD 69.98 % of the young adult mean, below 70 % YAM")


@pytest.mark.parametrize(
    ("hu", "told"),
    [
        (110.04, "L1 110.04 HU, between 110 and 160 HU."),
        (110.0, "L1 110.0 HU, at or below 110 HU: consider DXA."),
        (160.02, "L1 160.02 HU, above 160 HU."),
        (159.98, "L1 159.98 HU, between 110 and 160 HU."),
        (98.25, "L1 98.2 HU, at or below 110 HU: consider DXA."),
    ],
)
def test_an_attenuation_is_told_apart_from_its_cut(hu: float, told: str) -> None:
    assert judge(measured(hu=hu), REAL).decision.reasons[0].text == told


def test_a_tbs_is_told_apart_from_its_cut() -> None:
    reasons = {reason.code: reason.text for reason in judge(measured(tbs=1.3096)).decision.reasons}
    assert reasons[Code.TBS_IMPAIRED_RANGE].startswith("TBS 1.3096; 1.31 or less")


@given(st.floats(60, 200), st.floats(60, 200), st.integers(0, 2))
def test_no_rounding_crosses_a_cut(value: float, cut: float, fewest: int) -> None:
    cut = round(cut, 2)
    told = float(figure_beside(value, (cut,), fewest))
    exact = round(value, 9)
    assert (told > cut, told < cut) == (exact > cut, exact < cut)


def test_the_result_names_its_reference_its_levels_and_their_authority() -> None:
    policy = site_policy("", SITE_WOMEN)
    found = with_level(measured(percent=90.0), "L3", exclusions=(FRACTURE,))
    document = as_document(found, judge(found, REAL, policy=policy))
    used = document["patient"]["reference"]
    assert (used["key"], used["version"], used["region"]) == ("site-women", "7", "L1-L4")
    assert used["levels"] == document["patient"]["levels_used"] == ["L1", "L2", "L4"]
    assert used["bmd_g_cm2"] == document["patient"]["bmd_g_cm2"]
    assert used["bmd_interval"] == document["patient"]["bmd_interval"]
    assert reference_words(document) == SITE_WOMEN.words
    assert "verified by M. Physicist on 2026-11-23" in SITE_WOMEN.words


def test_where_values_are_withheld_no_reference_is_named() -> None:
    document = as_document(measured(), judge(measured(), REAL))
    assert document["patient"]["reference"] is None
    assert reference_words(document) is None
    assert document["decision"]["criteria"] == "YOSHIDA_2023"


L2_L4 = replace(SITE_WOMEN, key="site-l2l4", region="L2-L4")
JSBMR = f'criteria = "JSBMR_2012"\n{OWN_DRIVER}'


def test_a_reference_for_l2_l4_is_compared_with_those_levels() -> None:
    """L1 counts in the patient's BMD (the paper's mean), and not in %YAM and T."""
    found = with_level(measured(percent=95.0, model_synthetic_only=False, model_gate_passed=True), "L1", bmd_g_cm2=0.5)
    found = replace(found, patient_bmd_interval=(0.2, 0.3))  # the model's own, of L1-L4
    patient = judge(found, REAL, policy=site_policy(JSBMR, L2_L4)).patient
    assert patient.bmd_g_cm2 == pytest.approx((0.5 + 3 * 1.14) / 4)
    assert patient.levels_used == LEVELS
    assert patient.percent_yam == pytest.approx(95.0)
    assert patient.t_score == pytest.approx(-0.5)
    assert patient.reference is not None
    assert patient.reference.levels == ("L2", "L3", "L4")
    assert patient.reference.bmd_g_cm2 == pytest.approx(1.14)
    assert patient.reference.bmd_interval == pytest.approx((1.14 - 0.036, 1.14 + 0.036))


def test_never_from_a_single_vertebra_of_the_region() -> None:
    """ISCD 2023: two levels are valid, but one of them only lies in L2-L4."""
    found = measured(percent=60.0, hu=250.0, model_synthetic_only=False, model_gate_passed=True)
    for name in ("L2", "L3"):
        found = with_level(found, name, exclusions=(FRACTURE,))
    outcome = judge(found, REAL, policy=site_policy(JSBMR, L2_L4))
    assert outcome.patient.bmd_g_cm2 is not None
    assert outcome.patient.percent_yam is None
    assert outcome.patient.reference is None
    assert outcome.decision.driver is Driver.CT_ATTENUATION
    withheld = {reason.code: reason.text for reason in outcome.decision.reasons}[Code.REFERENCE_WITHHELD]
    assert "site-l2l4 is for L2-L4; 1 valid level of L2-L4, 2 required" in withheld


def test_jsbmr_says_which_history_would_count_and_assumes_none() -> None:
    policy = load_policy('[referral]\ncriteria = "JSBMR_2012"')
    assert "fragility fracture" in judge(measured(percent=78.0), policy=policy).decision.reasons[0].text
    assert "fragility fracture" not in judge(measured(percent=85.0), policy=policy).decision.reasons[0].text
    assert "fragility fracture" not in judge(measured(percent=78.0)).decision.reasons[0].text


def test_a_digital_cohort_is_never_used_for_a_real_patient_nor_the_other_way_round() -> None:
    """Even where a policy was put together by hand, past the refusals of its file."""
    forged = replace(DEFAULT_POLICY, references=(DIGITAL_WOMEN,))
    assert judge(measured(), REAL, policy=forged).patient.reference is None
    unverified = replace(DEFAULT_POLICY, references=(replace(SITE_WOMEN, verified_by_site=False),))
    assert judge(measured(), REAL, policy=unverified).patient.reference is None
    used = judge(measured(), DIGITAL, policy=site_policy("", SITE_WOMEN)).patient.reference
    assert used is not None
    assert used.key == DIGITAL_WOMEN.key


@pytest.mark.parametrize(
    ("sex", "criteria", "why"),
    [
        (None, "WHO", "sex is not given"),
        ("O", "WHO", "sex is not given"),
        ("F", "WHO", "verified and chosen no young-adult reference (us-f-l1l4-lunar would fit)"),
        ("F", "JSBMR_2012", "(japan-f-l2l4-lunar-dpx, us-f-l1l4-lunar would fit)"),
        ("M", "JSBMR_2012", "no reference at hand fits (men, Lunar, L1-L4 or L2-L4)"),
    ],
)
def test_a_withheld_reference_is_explained(sex: str | None, criteria: str, why: str) -> None:
    policy = load_policy(f'[referral]\ncriteria = "{criteria}"')
    outcome = judge(measured(), replace(REAL, sex=sex), policy=policy)
    text = {reason.code: reason.text for reason in outcome.decision.reasons}[Code.REFERENCE_WITHHELD]
    assert why in text


LAST_BIT = 1e-8  # g/cm2: nearer to a threshold than this, arithmetic decides; the exact cases stand above


@settings(max_examples=200, deadline=None)
@given(
    criteria=st.sampled_from(list(PROFILES)),
    sex=st.sampled_from(["F", "M"]),
    synthetic=st.booleans(),
    off=st.floats(-0.08, 0.08) | st.sampled_from([0.0, 1e-6, -1e-6]),
    half_width=st.none() | st.floats(0, 0.1),
    share=st.floats(0.08, 0.16),
)
def test_around_the_threshold_of_every_profile(
    criteria: str, sex: str, synthetic: bool, off: float, half_width: float | None, share: float
) -> None:
    """Below it a person is referred; above it, only nearness *and* an interval that reaches below keep the flag."""
    young = replace(DIGITAL_WOMEN, sex=sex, sd_g_cm2=share * DIGITAL_WOMEN.mean_g_cm2)
    theirs = replace(SITE_WOMEN, sex=sex, sd_g_cm2=young.sd_g_cm2)
    policy = site_policy(f'criteria = "{criteria}"\n{OWN_DRIVER}', theirs)
    cut = policy.referral.profile.referring(young)
    threshold = cut.bmd_g_cm2(young.mean_g_cm2, young.sd_g_cm2)
    bmd = threshold + off
    interval = None if half_width is None else (bmd - half_width, bmd + half_width)
    found = measured(model_synthetic_only=False, model_gate_passed=True, hu=250.0)
    for name in LEVELS:
        found = with_level(found, name, bmd_g_cm2=bmd, bmd_interval=interval)
    patient = PatientFacts(synthetic, sex, 60.0, "SIEMENS")
    outcome = decide(found, patient, YES, policy, references=References((young,)))
    assert outcome.decision.driver is Driver.NETWORK
    assert criteria in outcome.decision.reasons[0].text
    assert outcome.patient.reference is not None
    assert outcome.patient.reference.key == (young if synthetic else theirs).key
    reach = math.inf if half_width is None else half_width
    margin = policy.referral.percent_yam_margin / 100 * young.mean_g_cm2
    if off < -LAST_BIT:
        assert outcome.decision.category is Category.REFER
    elif off > min(margin, reach) + LAST_BIT:
        assert outcome.decision.category is Category.NO_FLAG
    elif LAST_BIT < off < min(margin, reach) - LAST_BIT:
        assert outcome.decision.category is Category.INDETERMINATE


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


def test_a_site_may_ask_for_more_levels() -> None:
    found = measured(percent=50.0)
    for name in ("L2", "L3"):
        found = with_level(found, name, exclusions=(FRACTURE,))
    assert codes(judge(found, policy=load_policy("[referral]\nlevels_minimum = 3"))) == [Code.TOO_FEW_LEVELS]
    assert Code.TOO_FEW_LEVELS not in codes(judge(found))


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
    criteria=st.sampled_from(list(PROFILES)),
)
def test_every_decision_has_words_and_none_is_reassuring(
    values: list[tuple[float | None, float | None, float | None, bool]],
    synthetic: bool,
    sex: str | None,
    tags: bool,
    criteria: str,
) -> None:
    policy = site_policy(f'criteria = "{criteria}"\n{OWN_DRIVER}', SITE_WOMEN)
    found = measured(model_synthetic_only=False, model_gate_passed=True)
    for name, (bmd, tbs, hu, excluded) in zip(LEVELS, values, strict=True):
        exclusions = (FRACTURE,) if excluded else ()
        found = with_level(found, name, bmd_g_cm2=bmd, tbs=tbs, hu_mean=hu, exclusions=exclusions)
    outcome = judge(found, PatientFacts(synthetic, sex, 60.0, "SIEMENS", tags), policy=policy)
    assert outcome.decision.reasons
    related = (outcome.patient.percent_yam, outcome.patient.t_score, outcome.patient.reference)
    assert all(one is None for one in related) or all(one is not None for one in related)
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


def test_young_adults_of_another_densitometer_than_the_model_s_are_withheld() -> None:
    """A model that speaks Lunar beside young adults measured by Hologic would refer too few."""
    hologic = replace(SITE_WOMEN, device="Hologic")
    text = f'[pairing]\ndensitometer = "Hologic"\n[referral]\nreference_female = "{hologic.key}"'
    policy = load_policy(text, References((hologic,)))
    lunar = judge(measured(percent=60.0), REAL, policy=policy)
    assert lunar.patient.percent_yam is None
    assert Code.REFERENCE_WITHHELD in codes(lunar)
    own = judge(measured(percent=60.0, model_densitometer="Hologic"), REAL, policy=policy)
    assert own.patient.percent_yam == pytest.approx(60.0)
    digital = judge(measured(percent=60.0, model_densitometer="Hologic"), DIGITAL)
    assert digital.patient.percent_yam is None
    with pytest.raises(PolicyError, match="this site's BMD is Lunar's"):
        load_policy(f'[referral]\nreference_female = "{hologic.key}"', References((hologic,)))


LIMITS = DEFAULT_POLICY.referral


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        ("bmd_g_cm2", LIMITS.bmd_lowest_g_cm2, LIMITS.bmd_highest_g_cm2),
        ("tbs", LIMITS.tbs_lowest, LIMITS.tbs_highest),
        ("hu_mean", LIMITS.hu_lowest, LIMITS.hu_highest),
    ],
)
def test_a_value_on_a_plausible_bound_counts_and_one_beyond_does_not(name: str, lowest: float, highest: float) -> None:
    usual = getattr(measured().levels["L3"], name)
    for bound, beyond in ((lowest, -math.inf), (highest, math.inf)):
        within = judge(with_level(measured(), "L3", **{name: bound}))
        assert getattr(within.patient, name) == pytest.approx((3 * usual + bound) / 4)
        assert Code.LEVEL_NOT_MEASURABLE not in codes(within)
        without = judge(with_level(measured(), "L3", **{name: math.nextafter(bound, beyond)}))
        assert getattr(without.patient, name) == pytest.approx(usual)
        assert Code.LEVEL_NOT_MEASURABLE in codes(without)
