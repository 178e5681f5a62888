"""Yoshida 2023 in numbers: what it prints, how it rounds, and how a cohort of its size would have looked.

Yoshida K, Tanabe Y, Nishiyama H, et al. J Comput Assist Tomogr 2023;47:467-474, doi 10.1097/RCT.0000000000001437.
"""

from collections.abc import Mapping
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np

from models.evaluation.detection import fractions, resampled_areas
from models.evaluation.statistics import association, percentiles, resampled_correlations
from models.evaluation.table import Table
from models.evaluation.tasks import Task

TEST_PATIENTS = 52
DRAWS = 500

PRINTED_R = {"bmd": 0.81, "tbs": 0.54, "hu_bmd": 0.60, "hu_tbs": 0.25}  # per vertebra
PRINTED_AUC = {
    "osteopenia": (0.921, (0.793, 0.973)),
    "osteoporosis": (0.969, (0.872, 0.993)),
    "tbs_impaired": (0.768, (0.585, 0.886)),
}
PRINTED_PERCENT = {  # sensitivity, specificity, PPV, NPV, FPR, FNR, accuracy
    "osteopenia": (93, 90, 77, 97, 11, 7, 90),
    "osteoporosis": (100, 94, 57, 100, 6, 0, 94),
    "tbs_impaired": (73, 73, 52, 87, 27, 27, 73),
}


def paper_percent(part: int, whole: int) -> int:
    """A share in whole percent as the paper rounds: to one decimal, then to none, halves up.

    Only so do the counts that its rates imply give its osteopenia column (34/38 = 89.47 -> 89.5 -> 90).
    """
    once = (Decimal(100 * part) / Decimal(whole)).quantize(Decimal("0.1"), ROUND_HALF_UP)
    return int(once.quantize(Decimal(1), ROUND_HALF_UP))


def paper_percents(tp: int, fn: int, fp: int, tn: int) -> tuple[int, ...]:
    """A 2 x 2 table's seven rates as the paper would print them."""
    return tuple(paper_percent(part, whole) for part, whole in fractions(tp, fn, fp, tn).values())


def gap_closed(paper_r: float, ours_r: float, oracle_r: float) -> float | None:
    """How much of the way from the paper's protocol to the oracle ours has gone; None without a way to go."""
    return None if oracle_r <= paper_r else (ours_r - paper_r) / (oracle_r - paper_r)


def paper_sized(table: Table, tasks: Mapping[str, Task]) -> dict[str, Any] | None:
    """The first 52 patients' r and AUC, and their range over 500 random draws of 52 (without putting back).

    None below twice 52 patients, where draws would mostly be the same.
    """
    count = len(table.first_rows)
    if count < 2 * TEST_PATIENTS:
        return None
    draw = np.random.default_rng(52)
    order = np.argsort(draw.random((DRAWS, count)), axis=1)
    copies = (order < TEST_PATIENTS).astype(float)  # [draws, patients]: 52 ones in each row
    first = table.codes < TEST_PATIENTS
    pairs = {
        "bmd": (table.bmd_dl, table.bmd),
        "tbs": (table.tbs_dl, table.tbs),
        "hu_bmd": (table.hu, table.bmd),
        "hu_tbs": (table.hu, table.tbs),
    }
    known = {name: (x, y) for name, (x, y) in pairs.items() if x is not None and y is not None}
    correlations = {
        name: {
            "first": association(x[first], y[first], table.patients[first]),
            "range": percentiles(resampled_correlations(x, y, table.codes, copies)),
        }
        for name, (x, y) in known.items()
    }
    start = np.zeros((1, count))
    start[0, :TEST_PATIENTS] = 1
    areas = {}
    for name, task in tasks.items():
        alone = float(resampled_areas(task.truth, task.score, start[:, task.who])[0])
        areas[name] = {
            "first": alone if np.isfinite(alone) else None,
            "first_positive": int(task.truth[start[0, task.who] > 0].sum()),
            "range": percentiles(resampled_areas(task.truth, task.score, copies[:, task.who])),
        }
    return {"patients": TEST_PATIENTS, "draws": DRAWS, "r": correlations, "auc": areas}
