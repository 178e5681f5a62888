"""Whatever the CT and whatever was outlined: an answer with reasons, and nothing implausible is ever "no flag"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from models.crop import SagittalSlabs
from models.package import Scanner
from service.domain.eligibility import Verdict
from service.domain.policy import DEFAULT_POLICY
from service.domain.reasons import Code
from service.domain.referral import PatientFacts, decide
from service.domain.result import Category
from worker.pipeline import Pipeline
from worker.predict import Prediction, Predictor
from worker.segmentation import Segmentation
from worker.segmentation.base import L1, L5, L6, LEVEL_IDS, S1, SACRUM, T12, LabelArray
from worker.volume import Volume

SHAPE = (60, 56, 64)  # of 3 mm slices and 2.5 mm pixels: a small CT, quickly looked at
AFFINE = np.array([[0, 0, 2.5, -80], [0, 2.5, 0, -70], [3.0, 0, 0, -90], [0, 0, 0, 1]], dtype=np.float64)
HuArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Outlines:
    """A segmenter that hands out what it was given."""

    labels: LabelArray
    name: str = "whatever"
    sha256: str = "f" * 64

    def segment(self, volume: Volume) -> Segmentation:
        return Segmentation(self.labels, self.name, self.sha256)


class SoundsHealthy:
    """A predictor whose every value lies far above the thresholds: whatever reached it would be "no flag"."""

    name, sha256, synthetic_only, measures_tbs, engine = "healthy", "0" * 64, True, True, "none"
    densitometer = "GE Lunar"

    def predict(
        self, slabs: Sequence[SagittalSlabs], levels: Sequence[str], fat_cm: Sequence[float], scanner: Scanner
    ) -> list[Prediction]:
        return [self.patient([], scanner) for _ in slabs]

    def knows(self, scanner: Scanner) -> bool:
        return True

    def patient(self, levels: Sequence[Prediction], scanner: Scanner) -> Prediction:
        return Prediction(1.4, (1.35, 1.45), 1.5, (1.45, 1.55))


def spine(labels: LabelArray) -> None:
    """Boxes for T12 to the sacrum, the size of vertebrae, each with an arch and a process behind it."""
    for place, label in enumerate((SACRUM, *range(L5, T12 + 1))):
        low = 2 + 8 * place
        labels[low : low + 7, 20:34, 24:42] = label
        labels[low + 1 : low + 5, 34:48, 31:35] = label


def nothing(labels: LabelArray) -> None:
    """The segmenter found nothing."""


def one_voxel_each(labels: LabelArray) -> None:
    for label in (*range(SACRUM, T12 + 1), L6):
        labels[label - SACRUM if label != L6 else 40, 20, 20] = label


def everything_is_l1(labels: LabelArray) -> None:
    labels[:] = L1


def at_the_border(labels: LabelArray) -> None:
    spine(labels)
    labels[:, :, :20] = labels[:, :, 24:44]
    labels[:, :, 20:] = 0


def plates(labels: LabelArray) -> None:
    for label in range(S1, T12 + 1):
        labels[5 + 6 * (label - S1), 10:50, 10:50] = label


def noise(labels: LabelArray) -> None:
    labels[:] = np.random.default_rng(5).integers(0, 40, labels.shape)


def foreign_ids(labels: LabelArray) -> None:
    labels[10:40, 10:40, 10:40] = 255


def swapped_axes(labels: LabelArray) -> None:
    upright = np.zeros_like(labels)
    spine(upright)
    lying = np.ascontiguousarray(upright.transpose(2, 1, 0))[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    labels[: lying.shape[0], : lying.shape[1], : lying.shape[2]] = lying


def upside_down(labels: LabelArray) -> None:
    spine(labels)
    labels[:] = labels[::-1].copy()


def only_the_lumbar_four(labels: LabelArray) -> None:
    spine(labels)
    labels[~np.isin(labels, list(LEVEL_IDS.values()))] = 0


def air(shape: tuple[int, ...]) -> HuArray:
    return np.full(shape, -1024, dtype=np.float32)


def metal(shape: tuple[int, ...]) -> HuArray:
    return np.full(shape, 3071, dtype=np.float32)


def extremes(shape: tuple[int, ...]) -> HuArray:
    return np.random.default_rng(6).choice(np.array([-32768, 32767], dtype=np.float32), shape)


def bone(shape: tuple[int, ...]) -> HuArray:
    return np.full(shape, 180, dtype=np.float32)


OUTLINED = (nothing, one_voxel_each, everything_is_l1, at_the_border, plates, noise, foreign_ids, swapped_axes,
            upside_down, only_the_lumbar_four, spine)  # fmt: skip
Paint, Fill = Callable[[LabelArray], None], Callable[[tuple[int, ...]], HuArray]


def answer(labels: LabelArray, hu: HuArray, affine: npt.NDArray[np.float64], out: Path) -> tuple[Any, Any]:
    pipeline = Pipeline(Outlines(labels), cast(Predictor, SoundsHealthy()), "cpu")
    measured, _ = pipeline.run(Volume(hu, affine), out)
    patient = PatientFacts(synthetic=True, sex="F", age_years=60.0, manufacturer="CANON")
    return measured, decide(measured, patient, Verdict(True, ()), DEFAULT_POLICY)


@pytest.mark.parametrize(
    ("paint", "fill"),
    [
        *((paint, bone) for paint in OUTLINED),
        *((spine, fill) for fill in (air, metal, extremes)),
        (everything_is_l1, metal),
    ],
)
def test_no_outline_of_nothing_is_ever_assessed(paint: Paint, fill: Fill, tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    paint(labels)
    measured, outcome = answer(labels, fill(SHAPE), AFFINE, tmp_path)
    assert outcome.decision.category is Category.NOT_ASSESSABLE
    assert outcome.decision.reasons
    assert outcome.patient.bmd_g_cm2 is None
    assert {reason.code for reason in measured.refusals} & {
        Code.NO_SPINE_FOUND, Code.LEVELS_UNCERTAIN, Code.LEVEL_OUT_OF_VIEW
    }  # fmt: skip


@pytest.mark.parametrize(
    "affine",
    [
        AFFINE[:, [2, 1, 0, 3]],  # the array's first axis runs from right to left
        AFFINE @ np.diag([-1.0, 1.0, 1.0, 1.0]),
        AFFINE @ np.diag([1.0, -1.0, -1.0, 1.0]),
        AFFINE @ np.diag([0.01, 1.0, 1.0, 1.0]),  # slices of 0.03 mm
        AFFINE @ np.diag([20.0, 1.0, 1.0, 1.0]),
    ],
)
def test_no_geometry_makes_a_spine_of_boxes_assessable(affine: npt.NDArray[np.float64], tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    spine(labels)
    _, outcome = answer(labels, bone(SHAPE), affine, tmp_path)
    assert outcome.decision.category is Category.NOT_ASSESSABLE


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 8), (8, 1, 8), (40, 5, 5)])
def test_a_sliver_of_a_ct_is_answered(shape: tuple[int, int, int], tmp_path: Path) -> None:
    _, outcome = answer(np.full(shape, L1, dtype=np.uint8), bone(shape), AFFINE, tmp_path)
    assert outcome.decision.category is Category.NOT_ASSESSABLE
    assert outcome.decision.reasons
