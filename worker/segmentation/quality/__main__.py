"""Calibrate the quality of outlines on digital patients, and measure on others what it is worth.

    python -m worker.segmentation.quality calibrate --patients 40 --first-seed 800000 --cases calibration.jsonl
    python -m worker.segmentation.quality evaluate --patients 40 --first-seed 850000 --cases evaluation.jsonl

`--cases` is where every outlined level is kept as a line of JSON: a run that was stopped goes on where it was, and
patients that were done with other weights are done again. `calibrate` writes `calibration.json` beside this file (or
`--out`), with the SHA-256 of the weights that its network part belongs to. `--weights DIR` takes other weights.
Seeds: training begins at 100001, calibration at 800000, the report at 850000; they do not meet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from statsmodels.stats.proportion import proportion_confint

from worker.segmentation import load_segmenter
from worker.segmentation.quality import (
    CALIBRATION,
    FEATURES,
    GOOD,
    NETWORK,
    OUTLINE,
    Calibration,
    Quality,
    read_calibration,
)
from worker.segmentation.quality.cases import Case, collect

# With the network's own belief "good" is a claim: a Dice of 0.9 in 99 % of cases. Shape and intensity alone do not tell
# 0.88 from 0.92, so without it nothing is claimed: the limit is what 99 % of outlines of 0.9 pass, and what is below is
# spoilt (the curve tells outlines of 0.8 from lesser ones).
GOOD_DICE, SHARE = 0.9, 0.99
TOLD_APART = {NETWORK: GOOD_DICE, OUTLINE: 0.8}
# Of the good ones so many must be called good: a level withheld for nothing costs a patient more than an outline of
# 0.87 does, so a curve that withholds every fourth is not put in force.
USEFUL = 0.9
MOST_FOLDS = 5
SOURCES: dict[str, tuple[str, ...]] = {
    NETWORK: ("network", "strained"),
    OUTLINE: ("network", "strained", "imperfect", "spoilt"),
}

FloatArray = npt.NDArray[np.float64]


def calibrate(cases: Sequence[Case], weights_sha256: str) -> dict[str, Any]:
    """The content of `calibration.json`; a curve is null where its cases do not tell good from bad."""
    seeds = sorted({case.seed for case in cases})
    made = {"first_seed": seeds[0], "patients": len(seeds), "dice": GOOD_DICE, "share": SHARE}
    curves = {basis: fit(basis, cases, weights_sha256 if basis == NETWORK else None) for basis in (NETWORK, OUTLINE)}
    return {"made": made, **curves}


def fit(basis: str, cases: Sequence[Case], weights_sha256: str | None) -> dict[str, Any] | None:
    """One logistic curve with its limit, found on patients that the curve had not seen; None where it is of no use."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    some = [case for case in cases if case.source in SOURCES[basis]]
    x = np.array([[asdict(case.traits)[name] for name in FEATURES[basis]] for case in some], dtype=np.float64)
    dices = np.array([case.dice for case in some])
    wanted, good = dices >= TOLD_APART[basis], dices >= GOOD_DICE
    groups = np.array([case.seed for case in some])
    if not wanted.any() or wanted.all() or len(set(groups.tolist())) < 2:
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = GroupKFold(min(MOST_FOLDS, len(set(groups.tolist()))))
    unseen = cross_val_predict(model, x, wanted, groups=groups, cv=folds, method="predict_proba")[:, 1]
    limit = sure_limit(unseen, good) if basis == NETWORK else lenient_limit(unseen, good)
    if float((unseen[good] >= limit).mean()) < USEFUL:
        return None
    model.fit(x, wanted)
    scaler, logistic = model[0], model[1]
    return {
        "weights_sha256": weights_sha256,
        "features": list(FEATURES[basis]),
        "mean": _numbers(scaler.mean_),
        "scale": _numbers(scaler.scale_),
        "coefficients": _numbers(logistic.coef_[0]),
        "intercept": round(float(logistic.intercept_[0]), 6),
        "limit": round(limit, 6),
        "levels": len(some),
        "good": int(good.sum()),
    }


def sure_limit(probability: FloatArray, good: npt.NDArray[np.bool_]) -> float:
    """The lowest probability from which 99 % are good; more than 1 where there is none."""
    order = np.argsort(-probability)
    share = np.cumsum(good[order]) / np.arange(1, len(order) + 1)
    held = np.flatnonzero(share >= SHARE)
    return float(probability[order][held[-1]]) if held.size else 1.1


def lenient_limit(probability: FloatArray, good: npt.NDArray[np.bool_]) -> float:
    """The probability that 99 % of the good ones reach."""
    return float(np.quantile(probability[good], 1 - SHARE))


def _numbers(values: FloatArray) -> list[float]:
    return [round(float(value), 6) for value in values]


Judge = Callable[[Case], Quality | None]


def judges(calibration: Calibration) -> dict[str, Judge]:
    """How a case is judged as the networks' own, and as anybody's outline."""
    anybodys = Calibration(None, calibration.outline)
    return {
        NETWORK: lambda case: Calibration(calibration.network, None).judge(case.traits, case.weights_sha256 or ""),
        OUTLINE: lambda case: anybodys.judge(case.traits, ""),
    }


def table(cases: Sequence[Case], calibration: Calibration) -> str:
    """What the quality is worth on these cases, as Markdown."""
    lines = [
        f"| basis | outlines | levels | Dice >= {GOOD_DICE:g} | called good | of these Dice >= {GOOD_DICE:g}, % "
        "| lowest Dice of these | withheld for nothing |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for basis, judge in judges(calibration).items():
        for source in SOURCES[basis]:
            judged = [(case, judge(case)) for case in cases if case.source == source]
            known = [(case, quality.value >= GOOD) for case, quality in judged if quality is not None]
            if known:
                lines.append(_line(basis, source, known))
    return "\n".join(lines)


def _line(basis: str, source: str, known: Sequence[tuple[Case, bool]]) -> str:
    kept = [case for case, called in known if called]
    right = sum(case.dice >= GOOD_DICE for case in kept)
    truly = sum(case.dice >= GOOD_DICE for case, _ in known)
    lowest = f"{min(case.dice for case in kept):.2f}" if kept else "-"
    counts = f"{len(known)} | {truly} | {len(kept)} | {right}/{len(kept)}: {_share(right, len(kept))}"
    return f"| {basis} | {source} | {counts} | {lowest} | {truly - right} |"


def _share(count: int, total: int) -> str:
    if not total:
        return "-"
    low, high = proportion_confint(count, total, alpha=0.05, method="wilson")
    return f"{100 * count / total:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """The two commands of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m worker.segmentation.quality", description=__doc__)
    parser.add_argument("command", choices=("calibrate", "evaluate"))
    parser.add_argument("--patients", type=int, default=40)
    parser.add_argument("--first-seed", type=int)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="a weights folder; without it the built-in one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=CALIBRATION, help="the calibration to write, or to evaluate")
    given = parser.parse_args(arguments)
    segmenter = load_segmenter(given.weights, given.device)
    first = (
        given.first_seed if given.first_seed is not None else {"calibrate": 800_000, "evaluate": 850_000}[given.command]
    )
    cases = collect(given.cases, range(first, first + given.patients), segmenter)
    if given.command == "calibrate":
        given.out.write_text(json.dumps(calibrate(cases, segmenter.sha256), indent=1) + "\n", encoding="utf-8")
    print(table(cases, read_calibration(given.out)))


if __name__ == "__main__":
    main()
