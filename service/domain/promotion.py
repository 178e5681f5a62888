"""The gate: may this model be put in front of patients? A pure function of two evaluation reports and the policy.

Both reports come from `osteogate evaluate` on the same locked test set: the candidate's, and that of the model in force
(the champion). The CT attenuation that both hold as a comparator is the third. Every question is answered, passed or
not, so that a person sees all of it; any answer of no shuts the gate. It opens nothing by itself: a person promotes.

A candidate is compared with the champion by the worse end of the interval of its own error (over resampled patients)
against the champion's figure on the same patients. That asks more than a paired test would, and needs no patient's
figures to leave the evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from service.domain.figures import digits_beside, figure_beside
from service.domain.policy import GatePolicy
from service.domain.reasons import Code, Reason

Report = Mapping[str, Any]

INTERVAL_LEVEL = 0.90  # of the prediction intervals
UNNAMED = "unknown"  # the group of those whose scanner is not told (`models.evaluation`)
SCANNER_PATIENTS = 5  # in the test set; our choice: as many as a scanner's own factor needs to be learned
SCANNERS = ("scanner", "vendor")  # the first of these subgroups that a report has tells the scanners apart


@dataclass(frozen=True, slots=True)
class Check:
    """One question, its answer, and the figures that gave it."""

    code: Code
    passed: bool
    text: str

    def as_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return {"code": self.code.value, "passed": self.passed, "text": self.text}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a candidate, held against one champion."""

    gate: str  # Policy.gate_label
    candidate_sha256: str | None
    champion_sha256: str | None
    checks: tuple[Check, ...]
    scanners: tuple[str, ...] | None = None  # those that it was judged on; None: the report told none apart

    def holds_on(self, scanner: str) -> bool:
        """Whether it says anything of this scanner (`models.package.scanner_name`)."""
        return self.scanners is None or scanner in self.scanners

    @property
    def where(self) -> str:
        """The scanners that it holds on, in words."""
        return "" if self.scanners is None else f" on {', '.join(self.scanners) or 'no scanner'}"

    @property
    def passed(self) -> bool:
        """Every question was answered with yes; without any there is no verdict."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Why not: every failing answer."""
        return tuple(Reason(check.code, check.text) for check in self.checks if not check.passed)

    def as_dict(self) -> dict[str, Any]:
        """The verdict document."""
        return {
            "passed": self.passed,
            "gate": self.gate,
            "candidate_sha256": self.candidate_sha256,
            "champion_sha256": self.champion_sha256,
            "checks": [check.as_dict() for check in self.checks],
            "scanners": None if self.scanners is None else list(self.scanners),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Read back what `as_dict` wrote; `passed` is worked out anew."""
        checks = tuple(Check(Code(one["code"]), one["passed"] is True, one["text"]) for one in stored["checks"])
        told = stored.get("scanners")  # not in verdicts of earlier releases
        scanners = None if told is None else tuple(told)
        return cls(stored["gate"], stored["candidate_sha256"], stored["champion_sha256"], checks, scanners)


def judge(
    candidate: Report,
    champion: Report | None,
    policy: GatePolicy,
    *,
    gate: str,
    finished: bool,
    definitions: Mapping[str, Mapping[str, Any]],
) -> Verdict:
    """Hold a candidate's report against the champion's, the attenuation's and the policy's limits.

    `gate` is the policy's label (`Policy.gate_label`), `finished` whether the candidate's training came to its end,
    `definitions` who counts as having what among the site's patients now (`Policy.definitions`).
    """
    checks = [*_about_the_test(candidate, champion, policy), _is_finished(finished), *_without_tbs(candidate, policy)]
    checks += [*_detection(candidate, policy, definitions), _above_attenuation(candidate)]
    checks += [*_against_champion(candidate, champion or {}, policy)]
    checks += [*_calibration(candidate, policy), *_coverage(candidate, policy), *_bias(candidate, policy)]
    shas = (_text(candidate, "model_sha256"), _text(champion or {}, "model_sha256"))
    return Verdict(gate, *shas, tuple(checks), _judged_on(candidate))


# --- 1. on whom it was tested --------------------------------------------------------------------------------------


def _about_the_test(candidate: Report, champion: Report | None, policy: GatePolicy) -> Iterator[Check]:
    same = champion is not None and _test_set(candidate) is not None and _test_set(candidate) == _test_set(champion)
    yield Check(
        Code.GATE_OTHER_TEST_SET,
        same,
        "Candidate and model in force were evaluated on the same patients."
        if same
        else "There is no evaluation of the model in force on exactly the candidate's test set.",
    )
    if _at(candidate, "cohort", "learned_from") is True:
        yield Check(Code.GATE_LEARNED_FROM, False, "The candidate has learned from the patients who judge it.")
    people, digital = _number(candidate, "n_patients_real"), _number(candidate, "n_patients_synthetic")
    if people is None or digital is None:
        yield _unknown("whether the test set's patients are people")
        return
    told = f"{people:.0f} people, {digital:.0f} digital patients in the test set"
    yield Check(Code.GATE_SYNTHETIC, digital == 0, f"{told}; the gate counts people alone.")
    least = policy.patients_minimum
    yield Check(Code.GATE_FEW_PATIENTS, people >= least, f"{people:.0f} people in the test set; {least} are required.")


def _test_set(report: Report) -> tuple[Any, ...] | None:
    """What tells two test sets apart: the cohort's content, which folds of it, and how many patients that is."""
    cohort = report.get("cohort")
    content = _text(cohort, "sha256") if isinstance(cohort, Mapping) else None
    if content is None or not isinstance(cohort, Mapping):
        return None
    folds = cohort.get("folds")
    told = tuple(folds) if isinstance(folds, list) else None
    return content, told, _number(report, "n_patients"), _number(report, "n_vertebrae")


def _is_finished(finished: bool) -> Check:
    text = "The training came to its end." if finished else "The training was stopped before its end."
    return Check(Code.GATE_UNFINISHED, finished, text)


# --- 2. does it find those who have it, and only those? ---------------------------------------------------------------


def _detection(report: Report, policy: GatePolicy, definitions: Mapping[str, Mapping[str, Any]]) -> Iterator[Check]:
    """Called by the definition itself, never at a cut that was chosen on the test set."""
    path = ("per_patient", policy.task)
    positives = _number(report, *path, "n_positive")
    judged, now = _at(report, "definitions", policy.task), definitions.get(policy.task)
    if positives is None:
        yield _unknown(f"the detection of {policy.task} (is there a young-adult reference?)")
        return
    if _number(report, "n_patients_synthetic") == 0 and (judged or now):  # digital patients have their own young adults
        yield _same_definition(judged, now, policy.task)
    least = policy.positives_minimum
    text = f"{positives:.0f} patients with {policy.task} by DXA in the test set; {least} are required."
    yield Check(Code.GATE_FEW_POSITIVES, positives >= least, text)
    rates = (
        ("sensitivity", Code.GATE_SENSITIVITY, policy.sensitivity_lower),
        ("specificity", Code.GATE_SPECIFICITY, policy.specificity_lower),
    )
    for name, code, limit in rates:
        rate, low = _number(report, *path, "defined", name), _end(report, 0, *path, "defined", f"{name}_ci")
        if rate is None or low is None:
            yield _unknown(f"the {name} for {policy.task}")
            continue
        bound = figure_beside(low, (limit,), 3)
        text = f"{name.capitalize()} for {policy.task} {rate:.2f}, lower bound {bound}; {limit:g} is required."
        yield Check(code, low >= limit, text)


def thresholds_of(definition: Mapping[str, Any]) -> dict[str, Any]:
    """What a definition counts by, however it is worded: each figure to nine digits."""
    by_sex = {
        f"{name} {sex}": round(float(value), 9)
        for name in ("young_adult_bmd", "cut_g_cm2")
        for sex, value in definition.get(name, {}).items()
    }
    return {**by_sex, "inclusive": bool(definition.get("inclusive"))}


def _same_definition(judged: Any, now: Mapping[str, Any] | None, task: str) -> Check:
    """Whether the report counted by the thresholds that refer this site's patients: others say nothing of these."""
    same = isinstance(judged, Mapping) and now is not None and thresholds_of(judged) == thresholds_of(now)
    told = judged.get("words") if isinstance(judged, Mapping) else None
    counted = f"{task.capitalize()} was counted by {told or 'thresholds that are not told'}"
    if same:
        return Check(Code.GATE_OTHER_DEFINITION, True, f"{counted}, as this site's policy has it.")
    asked = "no young adults" if now is None else f"{now['words']}, and young adults of its own"
    text = f"{counted}; this site's policy has {asked}. The model has to be judged again."
    return Check(Code.GATE_OTHER_DEFINITION, False, text)


def _above_attenuation(report: Report) -> Check:
    """A network that knows less of BMD than a disc of HU is not worth its weights."""
    own, disc = _number(report, "per_vertebra", "bmd", "r"), _number(report, "per_vertebra", "hu_bmd", "r")
    if own is None or disc is None:
        return _unknown("the correlation with BMD")
    text = f"Correlation with BMD {own:.2f}; that of CT attenuation on the same vertebrae is {disc:.2f}."
    return Check(Code.GATE_BELOW_ATTENUATION, own > 0 and own >= disc, text)  # below 0 neither knows anything


# --- 3. is it as good as what is in force, for everybody? -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Quantity:
    """One predicted quantity and the margins by which its error may be larger."""

    name: str  # in the report
    words: str
    unit: str
    margin: float
    subgroup_margin: float


def _measures_tbs(report: Report) -> bool:
    """Whether the model was made to measure TBS; a report from before there was a choice says nothing, and it was."""
    targets = report.get("targets")
    return not isinstance(targets, list) or "tbs" in targets


def _without_tbs(report: Report, policy: GatePolicy) -> Iterator[Check]:
    """Whether patients may lose their TBS is for the site to say, in its policy."""
    if not _measures_tbs(report):
        text = "TBS not measured by this model: in force, it would leave results without one. "
        text += (
            "This site's policy asks for TBS ([gate] tbs_judged)."
            if policy.tbs_judged
            else "This site's policy does not ask for TBS."
        )
        yield Check(Code.GATE_TBS_NOT_MEASURED, not policy.tbs_judged, text)


def _quantities(report: Report, policy: GatePolicy) -> tuple[_Quantity, ...]:
    """What is judged: TBS where the policy asks for it and the model measures it."""
    bmd = _Quantity("bmd", "BMD", " g/cm2", policy.inferior_bmd_g_cm2, policy.inferior_bmd_subgroup_g_cm2)
    tbs = _Quantity("tbs", "TBS", "", policy.inferior_tbs, policy.inferior_tbs_subgroup)
    return (bmd, tbs) if policy.tbs_judged and _measures_tbs(report) else (bmd,)


def _against_champion(candidate: Report, champion: Report, policy: GatePolicy) -> Iterator[Check]:
    quantities = _quantities(candidate, policy)
    if not _measures_tbs(champion):  # then there is nothing that patients could lose
        quantities = quantities[:1]
    for one in quantities:
        yield _not_inferior(candidate, champion, one, ("per_vertebra", one.name), one.margin, Code.GATE_INFERIOR, "")
    yield _area(candidate, champion, policy)
    for factor, group, patients in _subgroups(candidate):
        if patients < policy.subgroup_patients:
            continue
        for one in quantities:
            where, path = f" ({factor} {group})", ("subgroups", factor, group, one.name)
            code = Code.GATE_INFERIOR_SUBGROUP
            yield _not_inferior(candidate, champion, one, path, one.subgroup_margin, code, where)


def _not_inferior(
    candidate: Report, champion: Report, what: _Quantity, path: tuple[str, ...], margin: float, code: Code, where: str
) -> Check:
    own = _number(candidate, *path, "mean_absolute_error")
    worst = _end(candidate, 1, *path, "mean_absolute_error_ci_patient")
    other = _number(champion, *path, "mean_absolute_error")
    if own is None or worst is None or other is None:
        return _unknown(f"the error of {what.words}{where} beside that of the model in force")
    text = (
        f"Mean absolute error of {what.words}{where} {own:.3f}{what.unit}, at most {worst:.3f}; the model in force "
        f"{other:.3f}, and {margin:g} more is allowed."
    )
    return Check(code, worst <= other + margin, text)


def _area(candidate: Report, champion: Report, policy: GatePolicy) -> Check:
    path = ("per_patient", policy.task, "auc")
    own, other = _number(candidate, *path), _number(champion, *path)
    if own is None or other is None:
        return _unknown(f"the ROC area for {policy.task} beside that of the model in force")
    margin = policy.inferior_auc
    text = f"ROC area for {policy.task} {own:.3f}; the model in force {other:.3f}, and {margin:g} less is allowed."
    return Check(Code.GATE_INFERIOR, own >= other - margin, text)


def _subgroups(report: Report) -> Iterator[tuple[str, str, float]]:
    """(factor, group, patients) of every subgroup."""
    factors = report.get("subgroups")
    for factor, groups in factors.items() if isinstance(factors, Mapping) else ():
        for group in groups if isinstance(groups, Mapping) else ():
            yield factor, group, _number(report, "subgroups", factor, group, "n_patients") or 0


# --- 4. do its figures mean what they say? ----------------------------------------------------------------------------


def _calibration(report: Report, policy: GatePolicy) -> Iterator[Check]:
    slope, intercept = (
        _number(report, "calibration", "bmd", "slope"),
        _number(report, "calibration", "bmd", "intercept"),
    )
    if slope is None or intercept is None:
        yield _unknown("the calibration of BMD")
        return
    low, high = policy.slope_lowest, policy.slope_highest
    rise = figure_beside(slope, (low, high), 2)
    text = f"BMD by DXA rises by {rise} for each g/cm2 predicted; {low:g} to {high:g} is allowed."
    yield Check(Code.GATE_CALIBRATION, low <= slope <= high, text)
    most = policy.intercept_g_cm2
    digits = digits_beside(intercept, (most, -most), 2)
    text = f"The line of calibration starts at {intercept:+.{digits}f} g/cm2; {most:g} either way is allowed."
    yield Check(Code.GATE_CALIBRATION, abs(intercept) <= most, text)


def _coverage(report: Report, policy: GatePolicy) -> Iterator[Check]:
    level = _number(report, "intervals", "level")
    if level is not None and not abs(level - INTERVAL_LEVEL) < 1e-9:
        told = f"The intervals are made to hold {level:.0%}; {INTERVAL_LEVEL:.0%} is what pages and reports call them."
        yield Check(Code.GATE_COVERAGE, False, told)
        return
    for one in _quantities(report, policy):
        share = _number(report, "intervals", f"patient_{one.name}_coverage")
        if level is None or share is None:
            yield _unknown(f"how often the intervals of {one.words} hold")
            continue
        least = level - policy.coverage_shortfall
        held = f"{figure_beside(100 * share, (100 * least,), 0)}%"
        text = f"The {level:.0%} interval of {one.words} holds {held} of the patients; {100 * least:g}% are required."
        yield Check(Code.GATE_COVERAGE, share >= least - 1e-9, text)


def _bias(report: Report, policy: GatePolicy) -> Iterator[Check]:
    """Overall, and on every scanner with enough patients; one with fewer is named."""
    yield _unbiased(report, ("per_vertebra", "bmd"), "all scanners together", policy)
    factor = next((name for name in SCANNERS if isinstance(_at(report, "subgroups", name), Mapping)), None)
    if factor is None:
        yield _unknown("the bias on each scanner: the report does not tell scanners apart")
        return
    for name, group, patients in _subgroups(report):
        if name != factor:
            continue
        path = ("subgroups", name, group, "bmd")
        judge_alone = _unbiased if patients >= policy.subgroup_patients else _not_surely_biased
        yield judge_alone(report, path, group, policy)


def _judged_on(report: Report) -> tuple[str, ...] | None:
    """The named scanners with enough patients in the test set to say anything at all."""
    if "definitions" not in report and not isinstance(_at(report, "subgroups", "scanner"), Mapping):
        return None  # of an earlier release
    on = [(group, patients) for factor, group, patients in _subgroups(report) if factor == "scanner"]
    return tuple(sorted(group for group, patients in on if patients >= SCANNER_PATIENTS and group != UNNAMED))


def _unbiased(report: Report, path: tuple[str, ...], where: str, policy: GatePolicy) -> Check:
    error = _number(report, *path, "mean_error")
    if error is None:
        return _unknown(f"the bias of BMD, {where}")
    most = policy.bias_g_cm2
    text = f"Mean error of BMD, {where}: {error:+.3f} g/cm2; {most:g} either way is allowed."
    return Check(Code.GATE_BIAS, abs(error) <= most, text)


def _not_surely_biased(report: Report, path: tuple[str, ...], where: str, policy: GatePolicy) -> Check:
    """Of a scanner with few patients: shut where the whole interval of its mean error lies beyond what is allowed."""
    low, high = (_end(report, end, *path, "mean_error_t_patient") for end in (0, 1))
    patients = _number(report, *path[:-1], "n_patients") or 0
    few = f"{where}: {patients:.0f} patients are too few to judge its bias alone"
    if low is None or high is None or patients < SCANNER_PATIENTS:  # the verdict does not hold there anyway
        return Check(Code.GATE_BIAS, True, f"{few}.")
    most, surely = policy.bias_g_cm2, low > policy.bias_g_cm2 or high < -policy.bias_g_cm2
    if not surely:
        return Check(Code.GATE_BIAS, True, f"{few}; its mean error lies within {low:+.3f} to {high:+.3f} g/cm2.")
    text = f"Mean error of BMD, {where}: {low:+.3f} to {high:+.3f} g/cm2 (95 %, {patients:.0f} patients)"
    return Check(Code.GATE_BIAS, False, f"{text}; {most:g} either way is allowed.")


# --- reading reports --------------------------------------------------------------------------------------------------


def _unknown(what: str) -> Check:
    """What cannot be judged is not passed."""
    return Check(Code.GATE_NOT_JUDGED, False, f"The evaluation does not tell {what}.")


def _at(report: Report, *path: str) -> Any:
    found: Any = report
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _number(report: Report, *path: str) -> float | None:
    return _as_number(_at(report, *path))


def _end(report: Report, which: int, *path: str) -> float | None:
    """The lower (0) or upper (1) end of an interval."""
    found = _at(report, *path)
    return _as_number(found[which]) if isinstance(found, list | tuple) and len(found) == 2 else None


def _as_number(found: Any) -> float | None:
    """A finite number; anything else is not known."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return float(found) if float("-inf") < found < float("inf") else None


def _text(report: Report, name: str) -> str | None:
    found = report.get(name)
    return found if isinstance(found, str) else None
