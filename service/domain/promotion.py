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
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Read back what `as_dict` wrote; `passed` is worked out anew."""
        checks = tuple(Check(Code(one["code"]), one["passed"] is True, one["text"]) for one in stored["checks"])
        return cls(stored["gate"], stored["candidate_sha256"], stored["champion_sha256"], checks)


def judge(candidate: Report, champion: Report | None, policy: GatePolicy, *, gate: str, finished: bool) -> Verdict:
    """Hold a candidate's report against the champion's, the attenuation's and the policy's limits.

    `gate` is the policy's label (`Policy.gate_label`), `finished` whether the candidate's training came to its end.
    """
    checks = [*_about_the_test(candidate, champion, policy), _is_finished(finished), *_without_tbs(candidate, policy)]
    checks += [*_detection(candidate, policy), _above_attenuation(candidate)]
    checks += [*_against_champion(candidate, champion or {}, policy)]
    checks += [*_calibration(candidate, policy), *_coverage(candidate, policy), *_bias(candidate, policy)]
    return Verdict(gate, _text(candidate, "model_sha256"), _text(champion or {}, "model_sha256"), tuple(checks))


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


def _detection(report: Report, policy: GatePolicy) -> Iterator[Check]:
    """Called by the definition itself, never at a cut that was chosen on the test set."""
    path = ("per_patient", policy.task)
    positives = _number(report, *path, "n_positive")
    if positives is None:
        yield _unknown(f"the detection of {policy.task} (is there a young-adult reference?)")
        return
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
    for one in _quantities(report, policy):
        share = _number(report, "intervals", f"patient_{one.name}_coverage")
        if level is None or share is None:
            yield _unknown(f"how often the intervals of {one.words} hold")
            continue
        least = level - policy.coverage_shortfall
        held = f"{figure_beside(100 * share, (100 * least,), 0)}%"
        text = f"The {level:.0%} interval of {one.words} holds {held} of the patients; {least:.0%} are required."
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
        if patients >= policy.subgroup_patients:
            yield _unbiased(report, ("subgroups", name, group, "bmd"), group, policy)
        else:
            yield Check(Code.GATE_BIAS, True, f"{group}: {patients:.0f} patients are too few to judge its bias alone.")


def _unbiased(report: Report, path: tuple[str, ...], where: str, policy: GatePolicy) -> Check:
    error = _number(report, *path, "mean_error")
    if error is None:
        return _unknown(f"the bias of BMD, {where}")
    most = policy.bias_g_cm2
    text = f"Mean error of BMD, {where}: {error:+.3f} g/cm2; {most:g} either way is allowed."
    return Check(Code.GATE_BIAS, abs(error) <= most, text)


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
