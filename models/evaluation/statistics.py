"""Association, agreement, normality, calibration, regression and power, with intervals.

Yoshida 2023 treats vertebrae as independent. Those of one patient are not, so beside the interval that the
paper's reader expects (Fisher's z, Student's t) stands one from resampling patients (`..._ci_patient`). A resample
is a number of copies of each patient; sums over patients then make all of them one matrix product.
"""

import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.weightstats import DescrStatsW

from models.evaluation.table import Array, Ints, Names, patient_codes

ALPHA = 0.05  # two-sided; Yoshida 2023: P < .05
BOOTSTRAP = 1000
SHAPIRO_MOST = 5000  # scipy's p is not reliable for more
CALIBRATION_BINS = 10
POWER = 0.8


@lru_cache(maxsize=4)
def resamples(patients: int) -> Array:
    """Copies of each patient [BOOTSTRAP, patients]; the same draws for every statistic of the same patients."""
    draw = np.random.default_rng(0)
    return draw.multinomial(patients, np.full(patients, 1 / patients), size=BOOTSTRAP).astype(float)


def percentiles(values: Array) -> list[float] | None:
    """The middle 95 % of the values that are defined; None without any."""
    defined = values[np.isfinite(values)]
    return None if len(defined) == 0 else [float(one) for one in np.percentile(defined, [2.5, 97.5])]


def varies(values: Array) -> bool:
    """Whether there is any spread beyond rounding."""
    return len(values) > 1 and bool(np.ptp(values) > 1e-9 * max(1.0, float(np.abs(values).max())))


def resampled_correlations(estimate: Array, truth: Array, codes: Ints, copies: Array) -> Array:
    """Pearson's r of the rows [resamples], each patient's rows taken `copies` [resamples, patients] times.

    NaN where a resample has no spread.
    """
    x, y = estimate - estimate.mean(), truth - truth.mean()
    rows = (np.ones_like(x), x, y, x * x, y * y, x * y)
    sums = np.stack([np.bincount(codes, weights=one, minlength=copies.shape[1]) for one in rows], axis=1)
    n, sx, sy, sxx, syy, sxy = (copies @ sums).T
    spread = (n * sxx - sx * sx) * (n * syy - sy * sy)
    found = np.full(len(copies), np.nan)
    np.divide(n * sxy - sx * sy, np.sqrt(np.maximum(spread, 0)), out=found, where=spread > 1e-12)
    return found


def resampled_means(values: Array, codes: Ints, copies: Array) -> Array:
    """The rows' mean [resamples], each patient's rows taken `copies` times."""
    sums = np.bincount(codes, weights=values, minlength=copies.shape[1])
    return (copies @ sums) / (copies @ np.bincount(codes, minlength=copies.shape[1]))


def association(estimate: Array, truth: Array, patients: Names | None = None) -> dict[str, Any]:
    """Pearson's r with its 95 % interval by Fisher's z and by resampled patients; null where undefined.

    Without `patients` every row counts as a patient of its own.
    """
    if len(truth) < 4 or not varies(estimate) or not varies(truth):
        return {"n": len(truth), "r": None, "r_ci": None, "r_ci_patient": None, "p": None}
    result = stats.pearsonr(estimate, truth)
    interval = result.confidence_interval(1 - ALPHA)
    codes = _codes(patients, len(truth))
    members = int(codes.max()) + 1
    resampled = None if members < 2 else resampled_correlations(estimate, truth, codes, resamples(members))
    return {
        "n": len(truth),
        "r": float(result.statistic),
        "r_ci": [float(interval.low), float(interval.high)],
        "r_ci_patient": None if resampled is None else percentiles(resampled),
        "p": float(result.pvalue),
    }


def agreement(estimate: Array, truth: Array, patients: Names | None = None) -> dict[str, Any]:
    """Association, and the error (estimate minus truth): mean, spread, limits of agreement, paired tests."""
    error = estimate - truth
    mean = float(error.mean())
    told = varies(error)
    sd = float(error.std(ddof=1)) if len(error) > 1 else None
    codes = _codes(patients, len(error))
    names = ("mean_error_ci", "mean_error_ci_patient", "mean_error_t_patient", "limits_of_agreement")
    spread: dict[str, Any] = dict.fromkeys(names)
    copies = resamples(int(codes.max()) + 1)
    if told and sd is not None:
        low, high = DescrStatsW(error).tconfint_mean(ALPHA)
        resampled = resampled_means(error, codes, copies)
        spread = {
            "mean_error_ci": [float(low), float(high)],
            "mean_error_ci_patient": percentiles(resampled) if codes.max() > 0 else None,
            "mean_error_t_patient": _students(np.bincount(codes, weights=error) / np.bincount(codes)),
            "limits_of_agreement": [mean - 1.96 * sd, mean + 1.96 * sd],  # Bland and Altman 1986
        }
    return {
        **association(estimate, truth, patients),
        "mean_error": mean,
        **spread,
        "sd_error": sd,
        "mean_absolute_error": float(np.abs(error).mean()),
        "mean_absolute_error_ci_patient": percentiles(resampled_means(np.abs(error), codes, copies))
        if codes.max() > 0
        else None,
        "t_test_p": float(stats.ttest_rel(estimate, truth).pvalue) if told else None,
        "wilcoxon_p": float(stats.wilcoxon(error, method="asymptotic").pvalue) if told else None,
        "error_shapiro_p": distribution(error)["shapiro_p"],
    }


def _students(means: Array) -> list[float] | None:
    """Student's interval of the mean over patients: of a handful of them resampling tells too little."""
    if len(means) < 2 or not varies(means):
        return None
    low, high = DescrStatsW(means).tconfint_mean(ALPHA)
    return [float(low), float(high)]


def distribution(values: Array) -> dict[str, Any]:
    """Mean, SD, median, quartiles, and Shapiro-Wilk's test of normality."""
    w = p = None
    if len(values) >= 3 and varies(values):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="scipy.stats.shapiro: For N > 5000")
            result = stats.shapiro(values)
        w = float(result.statistic)
        p = float(result.pvalue) if len(values) <= SHAPIRO_MOST else None
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {
        "n": len(values),
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        "median": float(middle),
        "quartiles": [float(low), float(high)],
        "shapiro_w": w,
        "shapiro_p": p,
    }


def calibration(estimate: Array, truth: Array) -> dict[str, Any]:
    """Truth regressed on the estimate (ideal: slope 1, intercept 0), and both means in bins of equal size."""
    line: dict[str, Any] = {"slope": None, "slope_ci": None, "intercept": None, "intercept_ci": None}
    if len(truth) > 3 and varies(estimate) and varies(truth - estimate):
        fit = OLS(truth, np.stack([np.ones_like(estimate), estimate], axis=1)).fit()
        (low0, high0), (low1, high1) = fit.conf_int(ALPHA)
        line = {
            "slope": float(fit.params[1]), "slope_ci": [float(low1), float(high1)],
            "intercept": float(fit.params[0]), "intercept_ci": [float(low0), float(high0)],
        }  # fmt: skip
    parts = np.array_split(np.argsort(estimate, kind="stable"), max(1, min(CALIBRATION_BINS, len(estimate) // 4)))
    bins = [
        {"n": len(part), "estimate": float(estimate[part].mean()), "truth": float(truth[part].mean())} for part in parts
    ]
    return {**line, "bins": bins}


def error_regression(
    error: Array, patients: Names, numbers: Mapping[str, Array], groups: Mapping[str, Names]
) -> dict[str, Any] | None:
    """The paper's Table 5: the error (estimate minus truth) on all `numbers` and `groups` at once, by least squares.

    A group of k names enters as k - 1 indicators beside its first name; `joint` tests them together. `p` takes the
    rows as independent, as the paper does; `p_clustered` lets those of a patient depend on each other. None where
    there are too few rows, nothing varies, or one variable tells another.
    """
    names, columns = ["intercept"], [np.ones_like(error)]
    for name, values in numbers.items():
        if varies(values):
            names.append(name)
            columns.append(values)
    sets: dict[str, list[int]] = {}
    for name, labels in groups.items():
        known = sorted(set(labels))
        sets[name] = list(range(len(names), len(names) + len(known) - 1))
        names += [f"{name}[{label}]" for label in known[1:]]
        columns += [(labels == label).astype(float) for label in known[1:]]
    design = np.stack(columns, axis=1)
    if len(names) == 1 or len(error) <= len(names) + 2 or not varies(error):
        return None
    if np.linalg.matrix_rank(design) < len(names):
        return None
    fit = OLS(error, design).fit()
    codes = patient_codes(patients)
    robust = None
    if codes.max() + 1 > 2 * len(names):
        robust = fit.get_robustcov_results(cov_type="cluster", groups=codes, use_t=True)
    intervals = fit.conf_int(ALPHA)
    terms = {
        name: {
            "coefficient": float(fit.params[index]),
            "ci": [float(one) for one in intervals[index]],
            "p": _finite(fit.pvalues[index]),
            "p_clustered": None if robust is None else _finite(robust.pvalues[index]),
        }
        for index, name in enumerate(names)
    }
    joint = {
        name: {
            "p": _finite(fit.f_test(np.eye(len(names))[rows]).pvalue),
            "p_clustered": None if robust is None else _finite(robust.f_test(np.eye(len(names))[rows]).pvalue),
        }
        for name, rows in sets.items()
        if rows
    }
    references = {name: str(sorted(set(labels))[0]) for name, labels in groups.items()}
    return {
        "n": len(error), "r_squared": _finite(fit.rsquared), "reference": references, "terms": terms, "joint": joint,
    }  # fmt: skip


def correlation_power(r: float | None, n: int) -> dict[str, Any] | None:
    """The power of n patients to tell this r from 0, and the smallest |r| that they tell with 80 % power.

    Fisher's z of r has the standard error 1 / sqrt(n - 3).
    """
    if r is None or n < 5:
        return None
    normal = NormalIndPower(ddof=3)
    power = normal.power(effect_size=np.arctanh(min(abs(r), 1 - 1e-9)), nobs1=n, alpha=ALPHA, ratio=0)
    least = normal.solve_power(nobs1=n, alpha=ALPHA, power=POWER, ratio=0)
    return {"n": n, "power": float(power), "smallest_r": float(np.tanh(least))}


def _codes(patients: Names | None, rows: int) -> Ints:
    return np.arange(rows) if patients is None else patient_codes(patients)


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
