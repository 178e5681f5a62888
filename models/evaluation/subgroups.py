"""The paper's Table 4: agreement, detection and coverage within each vendor, sex, and half by age, BMI, interval."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

from models.evaluation.detection import area, called_rates, wilson
from models.evaluation.statistics import agreement, association
from models.evaluation.table import Array, Bools, Table, told
from models.evaluation.tasks import Task
from models.package import Interval, Manifest
from models.readout import widened

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
        "detection": {name: None if task is None else _detected(task.part(members)) for name, task in tasks.items()},
    }


def _detected(task: Task) -> dict[str, Any]:
    return {**area(task.truth, task.score), "defined": called_rates(task.truth, task.called)}


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
        whole = {factor: labels[table.first_rows][task.who] for factor, labels in table.groups.items()}
        tests = {factor: _chi_squared(labels, right) for factor, labels in whole.items()}
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
    widths = [manifest.interval(levels) for levels in range(1, int(np.bincount(table.codes).max()) + 1)]
    found: dict[str, Any] = {"level": manifest.interval_level}
    tbs_error = told(np.subtract, table.tbs_dl, table.tbs)
    for name, error in (("bmd", table.bmd_dl - table.bmd), ("tbs", tbs_error)):
        found |= _held(name, table, error, [_half(one, name) for one in widths])
    return found


def _half(interval: Interval, name: str) -> float | None:
    return interval.bmd_g_cm2 if name == "bmd" else interval.tbs


def _held(name: str, table: Table, error: Array | None, halves: list[float | None]) -> dict[str, Any]:
    """How often the half-widths of a mean over 1, 2... vertebrae hold; null without them, or without the error."""
    of_levels = np.array([np.nan if half is None else half for half in halves])
    names = (f"{name}_coverage", f"patient_{name}_coverage", f"patient_{name}_coverage_ci")
    if error is None or np.isnan(of_levels).any():
        return dict.fromkeys(names)
    spread = table.spread.get(name, np.zeros_like(error))
    alone = widened(of_levels[0], spread)
    inside = np.abs(table.by_patient(error)) <= widened(
        of_levels[np.bincount(table.codes) - 1], table.by_patient(spread)
    )
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
