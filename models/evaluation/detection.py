"""Detection per patient: ROC area, optimal cuts, and the seven rates of a 2 x 2 table.

The area has two intervals: resampled patients, and DeLong's (1988). The latter's variance of an area is that of
Brunner and Munzel (2000), which statsmodels has. An optimal cut is chosen on the very patients it is judged on and
flatters; `defined` therefore gives the rates where the estimate itself is held against the definition.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve
from statsmodels.stats.nonparametric import rank_compare_2indep
from statsmodels.stats.power import normal_power_het
from statsmodels.stats.proportion import proportion_confint

from models.evaluation.statistics import ALPHA, percentiles, resamples
from models.evaluation.table import Array, Bools

RATES = ("sensitivity", "specificity", "ppv", "npv", "fpr", "fnr", "accuracy")


def fractions(tp: int, fn: int, fp: int, tn: int) -> dict[str, tuple[int, int]]:
    """The seven RATES as (part, whole)."""
    return {
        "sensitivity": (tp, tp + fn),
        "specificity": (tn, tn + fp),
        "ppv": (tp, tp + fp),
        "npv": (tn, tn + fn),
        "fpr": (fp, tn + fp),
        "fnr": (fn, tp + fn),
        "accuracy": (tp + tn, tp + fn + fp + tn),
    }


def rates(tp: int, fn: int, fp: int, tn: int) -> dict[str, Any]:
    """The counts and the paper's seven rates of them, each with its Wilson interval; null without a denominator."""
    found: dict[str, Any] = {"tp": tp, "fn": fn, "fp": fp, "tn": tn}
    for name, (part, whole) in fractions(tp, fn, fp, tn).items():
        found[name] = part / whole if whole else None
        found[f"{name}_ci"] = wilson(part, whole)
    return found


def wilson(part: int, whole: int) -> list[float] | None:
    """Wilson's 95 % interval of a share."""
    if whole == 0:
        return None
    low, high = proportion_confint(part, whole, alpha=ALPHA, method="wilson")
    return [float(low), float(high)]


def called_rates(truth: Bools, called: Bools) -> dict[str, Any]:
    """`rates` of those called positive against those who are."""
    return rates(
        int((called & truth).sum()),
        int((~called & truth).sum()),
        int((called & ~truth).sum()),
        int((~called & ~truth).sum()),
    )


def area(truth: Bools, score: Array) -> dict[str, Any]:
    """The ROC area with both intervals; null with one class only."""
    positives = int(truth.sum())
    counts = {"n": len(truth), "n_positive": positives}
    if positives in (0, len(truth)):
        return {**counts, "auc": None, "auc_ci": None, "auc_ci_delong": None, "power": None}
    auc = float(roc_auc_score(truth, score))
    resampled = percentiles(resampled_areas(truth, score, resamples(len(truth))))
    delong = power = None
    if 1 < positives < len(truth) - 1:
        compared = rank_compare_2indep(score[truth], score[~truth], use_t=False) if 0 < auc < 1 else None
        if compared is not None and compared.var_prob > 0:
            low, high = compared.conf_int(alpha=ALPHA)
            delong = [max(0.0, float(low)), min(1.0, float(high))]
            power = _area_power(auc, float(np.sqrt(compared.var_prob)), positives, len(truth) - positives)
    return {**counts, "auc": auc, "auc_ci": resampled, "auc_ci_delong": delong, "power": power}


def _area_power(auc: float, error: float, positives: int, negatives: int) -> float:
    """The power to tell the area from 0.5; under the null its variance is that of Mann and Whitney's U."""
    null = np.sqrt((positives + negatives + 1) / (12 * positives * negatives))
    power = normal_power_het(auc - 0.5, 1, ALPHA, std_null=null, std_alternative=error)
    return float(power[0] if isinstance(power, tuple) else power)


def resampled_areas(truth: Bools, score: Array, copies: Array) -> Array:
    """ROC areas [resamples] for so many `copies` [resamples, patients] of each patient; NaN where a class is lost.

    The area is a weighted mean over the pairs of a positive and a negative patient: one if the positive scores
    higher, one half for a tie.
    """
    wins = np.sign(score[truth][:, None] - score[~truth][None, :]) / 2 + 0.5  # [positives, negatives]
    positive, negative = copies[:, truth], copies[:, ~truth]
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    areas = np.full(len(copies), np.nan)
    np.divide(((positive @ wins) * negative).sum(axis=1), pairs, out=areas, where=pairs > 0)
    return areas


def detection(truth: Bools, score: Array, called: Bools | None = None) -> dict[str, Any]:
    """Area, and the rates at Youden's cut (on top), at the one closest to (0, 1), and as `called` by definition.

    `score` rises with disease; a cut is given as minus the score, the unit of the quantity itself, and patients at
    or below it are called. Null with one class only.
    """
    found = area(truth, score)
    defined = None if called is None else called_rates(truth, called)
    if found["auc"] is None:
        nothing: dict[str, Any] = dict.fromkeys(("cut", *rates(1, 1, 1, 1)))
        return {**found, **nothing, "closest": None, "defined": defined}
    false_rate, true_rate, cuts = roc_curve(truth, score, drop_intermediate=False)
    youden = int(np.argmax(true_rate - false_rate))
    closest = int(np.argmin(np.hypot(false_rate, 1 - true_rate)))
    return {
        **found,
        **_at(truth, score, float(cuts[youden])),
        "closest": _at(truth, score, float(cuts[closest])),
        "defined": defined,
    }


def _at(truth: Bools, score: Array, cut: float) -> Mapping[str, Any]:
    return {"cut": -cut if np.isfinite(cut) else None, **called_rates(truth, score >= cut)}
