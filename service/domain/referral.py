"""From measurements to a referral decision: plain words, every reason, and who decided.

The order of the questions:

1. May this CT be judged at all? An ineligible series, a refusal found in the pixels, uncertain numbering or
   a level of L1-L4 outside the field make it ineligible; fewer than two valid levels leave too little.
   Either way: **not-assessable**, and no patient value is given.
2. Who decides? The network, for the kind of patients it was validated on: digital ones. For a real patient
   the CT-attenuation rule on L1 does, until a model that learned from people has been promoted after passing its
   gate on this site's patients, *and* the site has verified a young-adult reference, *and* its policy lets the
   network decide; until then the network's values stand beside it, called investigational.
3. What does the driver say?

   | driver | refer | indeterminate | no-flag |
   |---|---|---|---|
   | network, YOSHIDA_2023 | < 80 % YAM | 80 to 85 % YAM, interval reaching below 80 | otherwise |
   | network, JSBMR_2012 | T < -1.0, or <= 70 % YAM | T from -1.0 and near it, interval reaching below | otherwise |
   | network, WHO | T < -1.0 | T from -1.0 and near it, interval reaching below | otherwise |
   | attenuation, L1 | <= 110 HU | > 110 to 160 HU, or L1 not measured | > 160 HU |

   The margin of 5 % YAM is the least significant change of the DXA itself: that near to the cut, a value
   whose interval reaches below it cannot be told from one below it (on the T scale the margin is the same
   density). An absent interval counts as one that does. TBS at or below 1.31 is a note: in the paper half of
   those so called are (PPV 52 %), too few to refer on TBS alone; a site may set `tbs_effect` otherwise. A CT
   whose tags could not be checked never gets a no-flag: unseen contrast medium raises attenuation.

The criteria are values of `service.domain.criteria`, the other numbers the defaults of `service.domain.policy`.
Nothing here says "normal", nothing is a diagnosis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from service.domain.bone import (
    DENSITOMETERS,
    DEVICE,
    REGION,
    REGION_LEVELS,
    SEXES,
    Reference,
    ReferenceOrigin,
    References,
    load_references,
    percent_yam,
    t_score,
)
from service.domain.criteria import CriteriaProfile, Cut, DensityRange, Scale
from service.domain.eligibility import Verdict
from service.domain.figures import figure_beside
from service.domain.policy import Policy, ReferralPolicy
from service.domain.reasons import Code, Reason
from service.domain.result import (
    LEVELS,
    Category,
    Decision,
    Driver,
    Interval,
    LevelMeasurement,
    Measurements,
    Numbering,
    PatientValues,
    ReferenceUsed,
)


@dataclass(frozen=True, slots=True)
class PatientFacts:
    """What a decision needs to know of the patient."""

    synthetic: bool
    sex: str | None  # F, M, or anything else that a header says
    age_years: float | None
    manufacturer: str | None
    tags_checked: bool = True  # False for a NIfTI: it has none


@dataclass(frozen=True, slots=True)
class Outcome:
    """The whole answer: is the CT eligible, with every reason; the patient's values; the decision."""

    eligible: bool
    verdict_reasons: tuple[Reason, ...]
    patient: PatientValues
    decision: Decision


@dataclass(frozen=True, slots=True)
class _Finding:
    """What one driver makes of the values."""

    category: Category
    reasons: tuple[Reason, ...]
    driver: Driver


def decide(
    measurements: Measurements,
    patient: PatientFacts,
    verdict: Verdict,
    policy: Policy,
    *,
    references: References | None = None,
) -> Outcome:
    """Judge one measured CT.

    A digital patient is compared with the cohorts in `references` (None: those that ship with Osteogate), a real one
    with the reference that the policy chose.
    """
    against = _against(measurements, verdict)
    noted = _distinct((*against, *verdict.cautions, *_unchecked(patient, verdict)))
    if against or not verdict.eligible:
        return _not_assessable(policy, patient, against, eligible=False, verdict_reasons=noted)
    too_few = _too_few(measurements, policy.referral)
    if too_few:
        return _not_assessable(policy, patient, too_few, eligible=True, verdict_reasons=noted)
    values, implausible = _patient_values(measurements, patient, policy.referral)
    device = DENSITOMETERS.get(measurements.model_densitometer, measurements.model_densitometer)
    reference = _reference_for(patient, policy, references or load_references(), device)
    values, reference = _related(values, measurements, reference, policy.referral)
    finding = _judge(measurements, values, patient, reference, policy.referral)
    reasons = _distinct((*finding.reasons, *implausible))
    decision = Decision(finding.category, reasons, finding.driver, policy.label, policy.referral.criteria)
    return Outcome(True, noted, values, decision)


def reportable(measurements: Measurements, outcome: Outcome) -> Measurements:
    """The measurements with every level's values withheld where the CT is not eligible.

    Nobody must read a density under a doubtful level's name, or one that contrast medium has raised.
    """
    if outcome.eligible:
        return measurements
    blank = {
        name: LevelMeasurement(name, level.in_view, level.exclusions, heights=level.heights, quality=level.quality)
        for name, level in measurements.levels.items()
    }
    return replace(measurements, levels=blank, patient_bmd_interval=None, patient_tbs_interval=None)


# 1. May this CT be judged at all?


_TAGS_NOT_CHECKED = Reason(
    Code.TAGS_NOT_CHECKED,
    "There are no tags: tube voltage, contrast medium, age and kernel could not be checked.",
)


def _unchecked(patient: PatientFacts, verdict: Verdict) -> tuple[Reason, ...]:
    """The caution of a CT without tags, unless its verdict says so already."""
    said = any(reason.code is Code.TAGS_NOT_CHECKED for reason in verdict.cautions)
    return () if patient.tags_checked or said else (_TAGS_NOT_CHECKED,)


def _against(measurements: Measurements, verdict: Verdict) -> tuple[Reason, ...]:
    """Everything in the headers and in the pixels that forbids a judgement of this CT."""
    found = [*verdict.reasons, *measurements.refusals, *measurements.anatomy.refusals]
    codes = {reason.code for reason in found}
    if not verdict.eligible or Code.NO_SPINE_FOUND in codes:
        return _distinct(found)  # that no level is in view goes without saying
    out = [name for name in LEVELS if name not in measurements.levels or not measurements.levels[name].in_view]
    if out and Code.LEVEL_OUT_OF_VIEW not in codes:
        found.append(Reason(Code.LEVEL_OUT_OF_VIEW, f"Not wholly in view: {', '.join(out)}; L1 to L4 are required."))
    if measurements.anatomy.numbering is Numbering.UNCERTAIN and Code.LEVELS_UNCERTAIN not in codes:
        found.append(Reason(Code.LEVELS_UNCERTAIN, "The vertebral levels could not be named with certainty."))
    return _distinct(found)


def _too_few(measurements: Measurements, policy: ReferralPolicy) -> tuple[Reason, ...]:
    """Why fewer levels than the policy asks for are left; nothing where enough are."""
    valid = measurements.valid_levels()
    if len(valid) >= policy.levels_minimum:
        return ()
    excluded = [measurements.levels[name] for name in LEVELS if not measurements.levels[name].valid]
    causes = "; ".join(f"{level.level}: {', '.join(reason.code for reason in level.exclusions)}" for level in excluded)
    number = f"{len(valid)} valid {'level' if len(valid) == 1 else 'levels'}"
    return (Reason(Code.TOO_FEW_LEVELS, f"{number} of L1 to L4; {policy.levels_minimum} are required ({causes})."),)


def _not_assessable(
    policy: Policy,
    patient: PatientFacts,
    reasons: tuple[Reason, ...],
    *,
    eligible: bool,
    verdict_reasons: tuple[Reason, ...],
) -> Outcome:
    decision = Decision(Category.NOT_ASSESSABLE, reasons, Driver.NONE, policy.label, policy.referral.criteria)
    return Outcome(eligible, verdict_reasons, PatientValues(synthetic=patient.synthetic), decision)


# The patient's values: means over the valid levels


@dataclass(frozen=True, slots=True)
class _Quantity:
    """One measured quantity: how to read it from a level, and what it can be in a vertebra."""

    name: str
    read: Callable[[LevelMeasurement], float | None]
    lowest: float
    highest: float

    def of(self, level: LevelMeasurement) -> float | None:
        """The level's value; None where it is absent or no vertebra can have it."""
        value = self.read(level)
        return value if value is not None and self.lowest <= value <= self.highest else None

    def implausible(self, levels: Iterable[LevelMeasurement]) -> tuple[Reason, ...]:
        """The values that were left out, each with its bounds."""
        found = [(level, self.read(level)) for level in levels if self.of(level) is None]
        return tuple(
            Reason(
                Code.LEVEL_NOT_MEASURABLE,
                f"{level.level}: {self.name} {value:.4g} is left out; "
                f"{self.lowest:g} to {self.highest:g} is plausible.",
            )
            for level, value in found
            if value is not None
        )

    def mean(self, levels: Sequence[LevelMeasurement], minimum: int) -> float | None:
        """Mean over the levels; None where fewer than `minimum` have a value."""
        values = [value for value in map(self.of, levels) if value is not None]
        return fmean(values) if len(values) >= minimum else None


def _quantities(policy: ReferralPolicy) -> tuple[_Quantity, _Quantity, _Quantity]:
    """BMD in g/cm2, TBS, attenuation in HU."""
    return (
        _Quantity("BMD", lambda level: level.bmd_g_cm2, policy.bmd_lowest_g_cm2, policy.bmd_highest_g_cm2),
        _Quantity("TBS", lambda level: level.tbs, policy.tbs_lowest, policy.tbs_highest),
        _Quantity("HU", lambda level: level.hu_mean, policy.hu_lowest, policy.hu_highest),
    )


def _patient_values(
    measurements: Measurements, patient: PatientFacts, policy: ReferralPolicy
) -> tuple[PatientValues, tuple[Reason, ...]]:
    """Means over the valid levels, and what had to be left out of them."""
    valid, minimum = measurements.valid_levels(), policy.levels_minimum
    bmd, tbs, hu = _quantities(policy)
    mean_bmd, mean_tbs = bmd.mean(valid, minimum), tbs.mean(valid, minimum)
    leading = hu if mean_bmd is None else bmd
    with_bmd = [level.bmd_interval for level in valid if bmd.of(level) is not None]
    with_tbs = [level.tbs_interval for level in valid if tbs.of(level) is not None]
    # the model's own intervals are those of means over all valid levels: of another mean where one was left out
    own_bmd = measurements.patient_bmd_interval if len(with_bmd) == len(valid) else None
    own_tbs = measurements.patient_tbs_interval if len(with_tbs) == len(valid) else None
    values = PatientValues(
        synthetic=patient.synthetic,
        bmd_g_cm2=mean_bmd,
        bmd_interval=None if mean_bmd is None else _interval(own_bmd, with_bmd),
        tbs=mean_tbs,
        tbs_interval=None if mean_tbs is None else _interval(own_tbs, with_tbs),
        hu_mean=hu.mean(valid, minimum),
        levels_used=tuple(level.level for level in valid if leading.of(level) is not None),
    )
    return values, tuple(reason for quantity in (bmd, tbs, hu) for reason in quantity.implausible(valid))


def _interval(patient: Interval | None, levels: Sequence[Interval | None]) -> Interval | None:
    """The patient's own interval where the model gives one, else the mean of its levels' bounds.

    The mean of bounds takes the levels' errors for one: wider than the interval of a mean, the safe side.
    """
    if patient is not None:
        return patient
    given = [interval for interval in levels if interval is not None]
    if not given or len(given) < len(levels):
        return None
    return fmean(low for low, _ in given), fmean(high for _, high in given)


# %YAM and T: the mean over the levels of the reference's region, never without the reference's authority


def _reference_for(patient: PatientFacts, policy: Policy, references: References, device: str) -> Reference | Reason:
    """The reference for this patient and the `device` whose BMD was predicted, or the reason why there is none.

    Digital and real patients never share one.
    """
    if patient.sex not in SEXES:
        return _withheld("the patient's sex is not given as F or M")
    if patient.synthetic:
        wanted = f"{SEXES[patient.sex]}, {device}, {REGION}"
        cohort = references.digital(patient.sex) if device == DEVICE else None
        return cohort or _withheld(f"no digital young-adult cohort ({wanted}) has been made")
    chosen = policy.reference_for(patient.sex)
    if chosen and chosen.provenance is ReferenceOrigin.PUBLISHED and chosen.verified_by_site:
        return (
            chosen if chosen.device == device else _withheld(f"{chosen.key} is for {chosen.device}, BMD is {device}'s")
        )
    regions = policy.referral.profile.regions
    fitting = ", ".join(entry.key for entry in references.fitting(patient.sex, regions, device))
    if fitting:
        return _withheld(f"this site has verified and chosen no young-adult reference ({fitting} would fit)")
    return _withheld(f"no reference at hand fits ({SEXES[patient.sex]}, {device}, {' or '.join(regions)})")


def _withheld(why: str) -> Reason:
    return Reason(Code.REFERENCE_WITHHELD, f"% YAM and T-score are withheld: {why}.")


def _related(
    values: PatientValues, measurements: Measurements, reference: Reference | Reason, policy: ReferralPolicy
) -> tuple[PatientValues, Reference | Reason]:
    """The values with %YAM and T where a reference is in force and enough levels of its region were measured."""
    if isinstance(reference, Reason) or values.bmd_g_cm2 is None:
        return values, reference
    bmd, _, _ = _quantities(policy)
    in_region = REGION_LEVELS[reference.region]
    levels = [level for level in measurements.valid_levels() if level.level in in_region and bmd.of(level) is not None]
    mean = bmd.mean(levels, policy.levels_minimum)
    if mean is None:
        few = f"{len(levels)} valid {'level' if len(levels) == 1 else 'levels'} of {reference.region}"
        return values, _withheld(f"{reference.key} is for {reference.region}; {few}, {policy.levels_minimum} required")
    names = tuple(level.level for level in levels)
    # The model's own interval is of its patient mean; for other levels than those, the levels' bounds are taken.
    same = names == values.levels_used
    interval = values.bmd_interval if same else _interval(None, [level.bmd_interval for level in levels])
    used = ReferenceUsed(
        key=reference.key,
        version=reference.version,
        region=reference.region,
        levels=names,
        bmd_g_cm2=mean,
        bmd_interval=interval,
        mean_g_cm2=reference.mean_g_cm2,
        sd_g_cm2=reference.sd_g_cm2,
        text=reference.words,
    )
    percent, score = percent_yam(mean, reference), t_score(mean, reference)
    return replace(values, percent_yam=percent, t_score=score, reference=used), reference


# 2. Who decides?


def _judge(
    measurements: Measurements,
    values: PatientValues,
    patient: PatientFacts,
    reference: Reference | Reason,
    policy: ReferralPolicy,
) -> _Finding:
    """Let the driver of this kind of patient decide; what does not drive stands beside it as a note."""
    validated = patient.synthetic or _may_drive(measurements, policy)
    if patient.synthetic or (validated and isinstance(reference, Reference) and values.reference is not None):
        finding = _network_finding(values, reference, policy)
        notes = [_DIGITAL] if patient.synthetic else []
    else:
        finding = _attenuation_finding(measurements, policy)
        notes = [] if validated or values.bmd_g_cm2 is None else [_beside(measurements)]
        notes += [reference] if isinstance(reference, Reason) else []
    if values.bmd_g_cm2 is not None and not measurements.model_measures_tbs:
        notes.append(_NO_TBS)
    if values.bmd_g_cm2 is not None and not measurements.model_knows_scanner:
        notes.append(_unpaired(measurements, patient))
    finding = replace(finding, reasons=(*finding.reasons, *notes))
    return finding if patient.tags_checked else _without_no_flag(finding)


def _may_drive(measurements: Measurements, policy: ReferralPolicy) -> bool:
    """Whether the network may decide for a real patient: all four, or the attenuation does.

    The site lets it; its model has learned from people; a person promoted it here after it passed the gate; and where
    it tells scanners apart, it was fitted to this one: the gate judged it on no other.
    """
    learned_from_people = not measurements.model_synthetic_only
    passed = measurements.model_gate_passed and measurements.model_knows_scanner
    return policy.network_gate_passed and learned_from_people and passed


def _beside(measurements: Measurements) -> Reason:
    """Why the network's values only stand beside the decision."""
    if not measurements.model_gate_passed or measurements.model_synthetic_only:
        why = "it was not validated on this site's patients of this scanner, and did not decide"
    elif not measurements.model_knows_scanner:
        why = "it was not validated on this scanner, and did not decide"
    else:
        why = "this site's policy lets it decide for nobody, and it did not"
    what = "BMD and TBS are" if measurements.model_measures_tbs else "BMD is"
    return Reason(Code.NETWORK_INVESTIGATIONAL, f"The network's {what} investigational: {why}.")


def _unpaired(measurements: Measurements, patient: PatientFacts) -> Reason:
    """Why the intervals are wider than the model's own."""
    never_saw_a_scanner = measurements.model_synthetic_only and not patient.synthetic
    learned = "from digital patients alone" if never_saw_a_scanner else "on other scanners of this site"
    return Reason(
        Code.SCANNER_NOT_PAIRED,
        f"The model learned {learned}. How this scanner reads is not known, so the intervals are wider.",
    )


_DIGITAL = Reason(Code.DIGITAL_PATIENT, "A digital patient, compared with a simulated cohort of 20 to 44 years.")
_NO_TBS = Reason(Code.TBS_NOT_MEASURED, "TBS not measured by this model.")


def _without_no_flag(finding: _Finding) -> _Finding:
    """Without tags, unseen contrast medium or another tube voltage may have raised the values."""
    unsure = finding.category is Category.NO_FLAG
    category = Category.INDETERMINATE if unsure else finding.category
    return replace(finding, category=category, reasons=(*finding.reasons, _TAGS_NOT_CHECKED))


# 3a. The network


def _network_finding(values: PatientValues, reference: Reference | Reason, policy: ReferralPolicy) -> _Finding:
    """Density against the thresholds of the criteria; TBS as the policy says."""
    if isinstance(reference, Reason):
        return _Finding(Category.NOT_ASSESSABLE, (reference,), Driver.NONE)
    if values.reference is None:
        too_few = f"BMD could be measured in fewer than {policy.levels_minimum} levels."
        return _Finding(Category.NOT_ASSESSABLE, (Reason(Code.TOO_FEW_LEVELS, too_few),), Driver.NONE)
    category, reason = _density(values.reference, reference, policy)
    reasons = [reason]
    if values.tbs is not None and values.tbs <= policy.tbs_impaired:
        category = _with_impaired_tbs(category, policy)
        measured = figure_beside(values.tbs, (policy.tbs_impaired,), 2)
        called = f"{policy.tbs_impaired:g} or less is called impaired microarchitecture"
        reasons.append(Reason(Code.TBS_IMPAIRED_RANGE, f"TBS {measured}; {called}."))
    return _Finding(category, tuple(reasons), Driver.NETWORK)


def _density(used: ReferenceUsed, reference: Reference, policy: ReferralPolicy) -> tuple[Category, Reason]:
    """What BMD alone says, in the terms of the criteria."""
    profile = policy.profile
    found, cut = profile.range_of(used.bmd_g_cm2, reference)
    measured = f"BMD {_told(cut.reading(used.bmd_g_cm2, reference), cut)}"
    lower = used.bmd_interval[0] if used.bmd_interval else -math.inf  # no interval: it counts as low as can be
    if found is not DensityRange.ABOVE:
        category, code = Category.REFER, _RANGE_CODES[found]
        text = f"{measured}, {cut.words} ({profile.name}): consider DXA."
    elif _near(used.bmd_g_cm2, cut, reference, policy) and cut.met(lower, reference):
        category, code = Category.INDETERMINATE, Code.BMD_NEAR_THRESHOLD
        reach = _told(cut.reading(lower, reference), cut) if math.isfinite(lower) else None
        interval = f"its interval reaches {reach}" if reach else "its interval is unknown"
        text = f"{measured}, near the threshold of {cut.limit} ({profile.name}), and {interval}."
    else:
        category, code = Category.NO_FLAG, Code.BMD_ABOVE_THRESHOLDS
        text = f"{measured}; the threshold for referral is {cut.limit} ({profile.name})."
    return category, Reason(code, " ".join((text, *_history(used, reference, profile))))


_RANGE_CODES = {
    DensityRange.OSTEOPOROSIS: Code.BMD_OSTEOPOROSIS_RANGE,
    DensityRange.OSTEOPENIA: Code.BMD_OSTEOPENIA_RANGE,
}


def _near(bmd_g_cm2: float, cut: Cut, reference: Reference, policy: ReferralPolicy) -> bool:
    """Nearer to the threshold than the DXA itself can tell apart."""
    return cut.reading(bmd_g_cm2, reference) < cut.value + cut.margin(policy.percent_yam_margin, reference)


def _history(used: ReferenceUsed, reference: Reference, profile: CriteriaProfile) -> tuple[str, ...]:
    """What the criteria would count with a history that no CT tells: said, never assumed."""
    said = profile.unknown_history(used.bmd_g_cm2, reference)
    return () if said is None else (said,)


def _told(reading: float, cut: Cut) -> str:
    """The reading in words, with as many digits as it takes to tell it from the threshold."""
    figure = figure_beside(reading, (cut.value,), 1 if cut.scale is Scale.PERCENT_YAM else 2)
    return f"{figure} % of the young adult mean" if cut.scale is Scale.PERCENT_YAM else f"T {figure}"


def _with_impaired_tbs(category: Category, policy: ReferralPolicy) -> Category:
    """What a TBS in the impaired range adds under `tbs_effect`; it never lowers a category."""
    if policy.tbs_effect == "refer":
        return Category.REFER
    if policy.tbs_effect == "indeterminate" and category is Category.NO_FLAG:
        return Category.INDETERMINATE
    return category


# 3b. The published CT-attenuation rule


def _attenuation_finding(measurements: Measurements, policy: ReferralPolicy) -> _Finding:
    """Mean HU of L1 against the two published cuts (DOMAIN: Pickhardt), at 120 kVp and without contrast."""
    level, (_, _, attenuation) = measurements.levels["L1"], _quantities(policy)
    hu = attenuation.of(level) if level.valid else None
    if hu is None:
        return _without_l1(level, policy)
    measured = f"L1 {figure_beside(hu, (policy.hu_refer, policy.hu_no_flag), 1)} HU"
    if hu <= policy.hu_refer:
        text = f"{measured}, at or below {policy.hu_refer:g} HU: consider DXA."
        return _Finding(Category.REFER, (Reason(Code.HU_LOW, text),), Driver.CT_ATTENUATION)
    if hu <= policy.hu_no_flag:
        text = f"{measured}, between {policy.hu_refer:g} and {policy.hu_no_flag:g} HU."
        return _Finding(Category.INDETERMINATE, (Reason(Code.HU_BETWEEN, text),), Driver.CT_ATTENUATION)
    text = f"{measured}, above {policy.hu_no_flag:g} HU."
    return _Finding(Category.NO_FLAG, (Reason(Code.HU_ABOVE, text),), Driver.CT_ATTENUATION)


def _without_l1(level: LevelMeasurement, policy: ReferralPolicy) -> _Finding:
    """The thresholds hold for L1 only: no other level takes its place."""
    causes = ", ".join(reason.code for reason in level.exclusions) or "no plausible attenuation"
    category = Category(policy.without_l1)
    driver = Driver.NONE if category is Category.NOT_ASSESSABLE else Driver.CT_ATTENUATION
    text = f"L1 could not be measured ({causes}); the attenuation thresholds hold for L1 only."
    return _Finding(category, (Reason(Code.L1_NOT_MEASURED, text),), driver)


def _distinct(reasons: Iterable[Reason]) -> tuple[Reason, ...]:
    """The reasons in order, each once."""
    return tuple(dict.fromkeys(reasons))
