"""Ribs beside a spine of boxes: what is one, whose it is, and when nothing can be said."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest

from worker.ribs import Sides, find_ribs
from worker.segmentation.base import L1, LabelArray
from worker.volume import Volume

STEP = 2.0
MIDDLE = {L1 - 1: 30.0, L1: 62.0, L1 + 1: 94.0}  # z of L2, L1 and T12, mm
SHAPE = (65, 60, 100)  # 200 mm wide, the midline at 100 mm
Hu = npt.NDArray[np.float32]


def spine() -> tuple[Hu, LabelArray, Mapping[int, npt.NDArray[np.float64]]]:
    hu, labels = np.full(SHAPE, 40, dtype=np.float32), np.zeros(SHAPE, dtype=np.uint8)
    for label, z in MIDDLE.items():
        k = int(z / STEP)
        labels[k - 6 : k + 6, 12:30, 40:60] = label
    hu[labels > 0] = 200
    return hu, labels, {label: np.array([99.0, 42.0, z]) for label, z in MIDDLE.items()}


def bar(hu: Hu, z_mm: float, from_mm: float, to_mm: float, thick_mm: float = 8.0) -> None:
    """Bone that runs sideways, this far from the midline, at the back of the bodies."""
    k, half = int(z_mm / STEP), int(thick_mm / STEP / 2)
    i = sorted(int((99.0 + x) / STEP) for x in (from_mm, to_mm))
    hu[k - half : k + half, 28 - half : 28 + half, i[0] : i[1]] = 300


def found(hu: Hu, cut: tuple[int, ...] = ()) -> dict[int, Sides]:
    _, labels, middles = spine()
    affine = np.array([[0, 0, STEP, 0], [0, STEP, 0, 0], [STEP, 0, 0, 0], [0, 0, 0, 1]])
    return find_ribs(Volume(hu, affine), labels, middles, [label for label in middles if label not in cut])


def test_a_rib_belongs_to_the_vertebra_that_it_leaves() -> None:
    hu, _, _ = spine()
    bar(hu, 90.0, 22.0, 80.0)
    bar(hu, 90.0, -22.0, -70.0)
    ribs = found(hu)
    assert ribs[L1 + 1].left_mm == pytest.approx(80.0, abs=3.0)
    assert ribs[L1 + 1].right_mm == pytest.approx(70.0, abs=3.0)
    assert not ribs[L1].ribbed
    assert not ribs[L1 - 1].ribbed


@pytest.mark.parametrize(
    ("z", "start", "end", "thick"),
    [(62.0, 22.0, 46.0, 8.0), (62.0, 22.0, 80.0, 36.0), (62.0, 60.0, 90.0, 8.0), (112.0, 40.0, 90.0, 8.0)],
    ids=["a transverse process", "an enhanced kidney", "too far out", "of a vertebra above"],
)
def test_what_is_no_rib_of_these_vertebrae(z: float, start: float, end: float, thick: float) -> None:
    hu, _, _ = spine()
    bar(hu, z, start, end, thick)
    assert not any(sides.ribbed for sides in found(hu).values())


def test_of_a_vertebra_that_is_cut_only_a_rib_that_is_seen_is_told() -> None:
    hu, _, _ = spine()
    assert set(found(hu, cut=(L1 + 1,))) == {L1, L1 - 1}  # not that it has none
    bar(hu, 90.0, 22.0, 80.0)
    assert found(hu, cut=(L1 + 1,))[L1 + 1].ribbed


def test_of_a_vertebra_whose_sides_are_not_in_the_ct_nothing_is_told() -> None:
    hu, labels, middles = spine()
    narrow = slice(30, 70)
    affine = np.array([[0, 0, STEP, 30 * STEP], [0, STEP, 0, 0], [STEP, 0, 0, 0], [0, 0, 0, 1]])
    assert find_ribs(Volume(hu[:, :, narrow], affine), labels[:, :, narrow], middles, list(middles)) == {}


def test_what_is_no_spine_is_not_looked_at() -> None:
    hu, labels, middles = spine()
    volume = Volume(hu, np.diag([STEP, STEP, STEP, 1.0])[[2, 1, 0, 3]])
    assert find_ribs(volume, labels, {}, []) == {}
    assert find_ribs(volume, labels, {L1: middles[L1]}, [L1]) == {}
    scattered = {L1: middles[L1], L1 + 1: middles[L1] + [0.0, 0.0, 2000.0]}
    assert find_ribs(volume, labels, scattered, list(scattered)) == {}
