"""`osteogate acceptance`: the whole pipeline on digital patients whose truth is known, measured on this very machine.

For every patient: a CT rendered on the scanner's own grid, segmented, named, cut, predicted; held against the true
labels, against what the same network says of vertebrae cut with these, and against the DXA of the same mineral map.
The seeds are none that any shipped network was trained on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from models.crop import SLABS, sagittal_slabs
from models.phantom import dxa
from models.phantom.patient import draw
from models.soft_tissue import fat_over_spine_cm
from service.domain.result import LEVELS, Numbering
from worker.pipeline import LABEL_IDS, Pipeline
from worker.segmentation.evaluate import dice, digital_patient, levels_right

FIRST_SEED = 7_000_000  # far from every seed that a shipped network was trained on (their cards name them)
REQUIRED = {"mean_dice": 0.85, "levels_right": 0.95, "bmd_r": 0.7}
MOST_BIAS_G_CM2 = 0.08  # of the mean over all vertebrae; five patients tell it to about 0.03


@dataclass(frozen=True, slots=True)
class LevelOutcome:
    """One vertebra: what the pipeline measured beside what is true (g/cm2, HU, Dice); None: not measured."""

    level: str
    dice: float
    true_bmd_g_cm2: float
    true_tbs: float
    bmd_g_cm2: float | None
    tbs: float | None
    hu_mean: float | None
    bmd_by_true_mask: float | None = None  # of the same vertebra, cut with its true label
    tbs_by_true_mask: float | None = None


@dataclass(frozen=True, slots=True)
class PatientOutcome:
    """One digital patient through the pipeline."""

    seed: int
    levels_right: bool
    certain: bool
    levels: tuple[LevelOutcome, ...]

    def __str__(self) -> str:
        """One line for a terminal: per level Dice and BMD, measured against true."""
        levels = "  ".join(
            f"{one.level} {one.dice:.3f} {'-' if one.bmd_g_cm2 is None else f'{one.bmd_g_cm2:.2f}'}"
            f"/{one.true_bmd_g_cm2:.2f}"
            for one in self.levels
        )
        names = "right" if self.levels_right else "WRONG"
        return f"seed {self.seed}: {levels}  levels {names}, {'certain' if self.certain else 'uncertain'}"


def run(
    pipeline: Pipeline, seeds: Sequence[int], on_patient: Callable[[PatientOutcome], None] = lambda _: None
) -> dict[str, Any]:
    """Measure every seed and summarise; `passed`: each of REQUIRED holds, BMD beats HU and is not biased."""
    outcomes = []
    for outcome in _outcomes(pipeline, seeds):
        on_patient(outcome)
        outcomes.append(outcome)
    return summary(outcomes)


def summary(outcomes: Sequence[PatientOutcome]) -> dict[str, Any]:
    """Figures over all patients; correlations are per vertebra, over those that were measured."""
    vertebrae = [level for outcome in outcomes for level in outcome.levels]
    measured = [level for level in vertebrae if level.bmd_g_cm2 is not None and level.hu_mean is not None]
    true_bmd = [level.true_bmd_g_cm2 for level in measured]
    figures: dict[str, Any] = {
        "patients": len(outcomes),
        "vertebrae": len(vertebrae),
        "vertebrae_measured": len(measured),
        "mean_dice": round(float(np.mean([level.dice for level in vertebrae])), 4),
        "levels_right": round(float(np.mean([outcome.levels_right for outcome in outcomes])), 4),
        "wrong_and_certain": sum(outcome.certain and not outcome.levels_right for outcome in outcomes),
        "bmd_r": _correlation(true_bmd, [level.bmd_g_cm2 for level in measured]),
        "hu_bmd_r": _correlation(true_bmd, [level.hu_mean for level in measured]),
        "tbs_r": _correlation([level.true_tbs for level in measured], [level.tbs for level in measured]),
        "bmd_r_by_true_masks": _correlation(true_bmd, [level.bmd_by_true_mask for level in measured]),
        "tbs_r_by_true_masks": _correlation(
            [level.true_tbs for level in measured], [level.tbs_by_true_mask for level in measured]
        ),
        "bmd_mean_error": _mean([(level.bmd_g_cm2 or 0) - level.true_bmd_g_cm2 for level in measured]),
    }
    figures["passed"] = _passed(figures)
    return figures


def _passed(figures: dict[str, Any]) -> bool:
    if any(figures[name] is None or figures[name] < least for name, least in REQUIRED.items()):
        return False
    return bool(figures["bmd_r"] > figures["hu_bmd_r"] and abs(figures["bmd_mean_error"]) <= MOST_BIAS_G_CM2)


def _outcomes(pipeline: Pipeline, seeds: Sequence[int]) -> Iterator[PatientOutcome]:
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            yield _outcome(pipeline, seed, Path(folder))


def _outcome(pipeline: Pipeline, seed: int, pictures: Path) -> PatientOutcome:
    volume, true_labels = digital_patient(seed)
    measurements, segmentation = pipeline.run(volume, pictures)
    true = dxa.measure(draw(seed)).levels
    grid = (volume.hu, volume.affine, true_labels)
    cut = [sagittal_slabs(*grid, LABEL_IDS[name], n=SLABS) for name in LEVELS]
    fat = [fat_over_spine_cm(volume.hu, volume.affine, one.frame.centre_lps) for one in cut]
    by_true_mask = dict(zip(LEVELS, pipeline.predictor.predict(cut, LEVELS, fat, volume.scanner), strict=True))
    return PatientOutcome(
        seed=seed,
        levels_right=levels_right(segmentation, true_labels, volume),
        certain=measurements.anatomy.numbering is Numbering.CERTAIN,
        levels=tuple(
            LevelOutcome(
                level=name,
                dice=dice(segmentation.labels, true_labels, LABEL_IDS[name]),
                true_bmd_g_cm2=true[name].bmd_g_cm2,
                true_tbs=true[name].tbs,
                bmd_g_cm2=measurements.levels[name].bmd_g_cm2,
                tbs=measurements.levels[name].tbs,
                hu_mean=measurements.levels[name].hu_mean,
                bmd_by_true_mask=by_true_mask[name].bmd_g_cm2,
                tbs_by_true_mask=by_true_mask[name].tbs,
            )
            for name in LEVELS
        ),
    )


def _correlation(true: Sequence[float], measured: Sequence[float | None]) -> float | None:
    values = [value for value in measured if value is not None]
    if len(values) < 3 or np.ptp(values) == 0:
        return None
    return round(float(stats.pearsonr(true, values).statistic), 4)


def _mean(errors: Sequence[float]) -> float | None:
    return round(float(np.mean(errors)), 4) if errors else None
