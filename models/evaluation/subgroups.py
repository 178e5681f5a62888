"""The paper's Table 4: agreement, detection and coverage within each vendor, sex, and half by age, BMI, interval."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

from models.evaluation.detection import area, called_rates, wilson
from models.evaluation.statistics import agreement, association
from models.evaluation.table import Array, Bools, Ints, Table, told
from models.evaluation.tasks import Task
from models.package import Interval, Manifest

FEWEST_EXPECTED = 5  # Cochran 1954: the chi-squared approximation wants expected counts of at least 5


def by_group(table: Table, tasks: Mapping[str, Task | None], manifest: Manifest | None) -> dict[str, Any]:
    """For every factor and each of its groups."""
    return {
        factor: {str(name): _group(table, labels == name, tasks, manifest) for name in sorted(set(labels))}
        for factor, labels in table.groups.items()
    }


def _group(table: Table, rows: Bools, tasks: Mapping[str, Task | None], manifest: Manifest | None) -> dict[str, Any]:
    part = table.part(rows)
    members = rows[table.first_rows]
    return {
        "n_patients": int(members.sum()),
        "bmd": agreement(part.bmd_dl, part.bmd, part.patients),
        "tbs": told(agreement, part.tbs_dl, part.tbs, patients=part.patients),
        "hu_bmd": association(part.hu, part.bmd, part.patients),
        "hu_tbs": told(association, part.hu, part.tbs, patients=part.patients),
        "intervals": None if manifest is None else coverage(part, manifest),
        "detection": {
            name: None
            if task is None
            else {
                **area(task.truth[members], task.score[members]),
                "defined": called_rates(task.truth[members], task.called[members]),
            }
            for name, task in tasks.items()
        },
    }


def detection_tests(table: Table, tasks: Mapping[str, Task | None]) -> dict[str, Any]:
    """Is detection right equally often in all groups of a factor? Chi-squared, Bonferroni over the factors.

    Right means: called by the estimate exactly when the truth says so. Null where the expected counts are too
    small for the approximation.
    """
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        if task is None:
            found[name] = None
            continue
        right = task.truth == task.called
        tests = {factor: _chi_squared(labels[table.first_rows], right) for factor, labels in table.groups.items()}
        told = [factor for factor, one in tests.items() if one["p"] is not None]
        if told:
            corrected = multipletests([tests[factor]["p"] for factor in told], method="bonferroni")[1]
            for factor, p in zip(told, corrected, strict=True):
                tests[factor]["p_bonferroni"] = float(p)
        found[name] = tests
    return found


def _chi_squared(labels: Any, right: Bools) -> dict[str, Any]:
    """Groups x (right, wrong)."""
    names = sorted(set(labels))
    counts = np.array([[(right & (labels == one)).sum(), (~right & (labels == one)).sum()] for one in names])
    shares = {str(name): float(row[0] / row.sum()) for name, row in zip(names, counts, strict=True)}
    nothing: dict[str, Any] = {"accuracy": shares, "chi2": None, "p": None, "p_bonferroni": None}
    if len(names) < 2 or stats.contingency.expected_freq(counts).min() < FEWEST_EXPECTED:
        return nothing
    result = stats.chi2_contingency(counts)
    return {**nothing, "chi2": float(result.statistic), "p": float(result.pvalue)}


def coverage(table: Table, manifest: Manifest) -> dict[str, Any]:
    """Share of true values inside the package's prediction intervals, with patients' Wilson intervals."""
    elsewhere = np.zeros(len(table.bmd), np.bool_) if table.elsewhere is None else table.elsewhere
    found: dict[str, Any] = {"level": manifest.interval_level}
    tbs_error = told(np.subtract, table.tbs_dl, table.tbs)
    for name, error in (("bmd", table.bmd_dl - table.bmd), ("tbs", tbs_error)):
        alone = _halves(manifest, name, np.ones(len(table.bmd), np.int64), elsewhere)
        mean = _halves(manifest, name, np.bincount(table.codes), elsewhere[table.first_rows])
        found |= _held(name, table, error, alone, mean)
    return found


def _halves(manifest: Manifest, name: str, levels: Ints, elsewhere: Bools) -> Array:
    """The half-width of the mean over so many vertebrae, each on a known scanner or elsewhere; NaN: not known."""
    told = {
        (count, other): _half(manifest.interval(count, elsewhere=other), name)
        for count, other in set(zip(levels.tolist(), elsewhere.tolist(), strict=True))
    }
    return np.array([told[one] for one in zip(levels.tolist(), elsewhere.tolist(), strict=True)])


def _half(interval: Interval, name: str) -> float:
    half = interval.bmd_g_cm2 if name == "bmd" else interval.tbs
    return math.nan if half is None else half


def _held(name: str, table: Table, error: Array | None, alone: Array, mean: Array) -> dict[str, Any]:
    """How often the half-widths of each vertebra, and of each patient's mean, hold; null where one is not known."""
    names = (f"{name}_coverage", f"patient_{name}_coverage", f"patient_{name}_coverage_ci")
    if error is None or np.isnan(alone).any() or np.isnan(mean).any():
        return dict.fromkeys(names)
    inside = np.abs(table.by_patient(error)) <= mean
    return dict(
        zip(
            names,
            (
                float((np.abs(error) <= alone).mean()),
                float(inside.mean()),
                wilson(int(inside.sum()), len(inside)),
            ),
            strict=True,
        )
    )
