"""Heights are the CT's own: the outline says where to look, and speaks only where no endplate shows."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from models.phantom.patient import draw
from models.phantom.render import render
from models.phantom.scanner import scan, scanner_rng
from worker.findings.bodies import LEAST_HU, SMEARED, UP, HuArray, _endplate, measure_bodies
from worker.findings.evaluate import lumbar_box
from worker.findings.fractures import losses
from worker.located import Located
from worker.segmentation.base import LEVEL_IDS, LabelArray
from worker.volume import Volume

L2, L3 = LEVEL_IDS["L2"], LEVEL_IDS["L3"]
SLICE_MM = 3.0


@cache
def caved_in() -> tuple[Volume, LabelArray]:
    """A spine whose L2 lost 40 % in its middle, at thick slices."""
    patient = draw(610_105, slice_mm=SLICE_MM, fracture="L2:40:biconcave")
    rendered = render(patient, lumbar_box(patient))
    volume = Volume(scan(rendered, patient, scanner_rng(patient)).astype(np.float32), rendered.affine)
    return volume, rendered.labels


def heights(volume: Volume, labels: LabelArray) -> dict[int, tuple[float, float, float]]:
    bodies = measure_bodies(volume.hu, Located(labels, volume.affine), LEVEL_IDS.values())
    return {label: body.heights_mm for label, body in bodies.items()}


def a_slice_taller(labels: LabelArray, label: int) -> LabelArray:
    """The outline of one level, a slice more at either end."""
    grown = ndimage.binary_dilation(labels == label, np.ones((3, 1, 1), dtype=bool))
    return np.where(grown & (labels == 0), label, labels).astype(np.uint8)


def test_an_outline_that_is_a_slice_too_tall_changes_no_height() -> None:
    volume, labels = caved_in()
    tall = a_slice_taller(labels, L2)
    assert heights(volume, tall)[L2] == pytest.approx(heights(volume, labels)[L2], abs=1.0)  # of 6 mm more


def test_a_dent_that_the_outline_covers_is_seen_all_the_same() -> None:
    volume, labels = caved_in()
    covered = a_slice_taller(labels, L2)
    found = losses(measure_bodies(volume.hu, Located(covered, volume.affine), LEVEL_IDS.values()))[L2]
    assert found.kind == "biconcave"
    assert found.loss == pytest.approx(0.40, abs=0.12)
    assert found.excludes


def test_without_an_endplate_the_outline_speaks() -> None:
    volume, labels = caved_in()
    even = Volume(np.full_like(volume.hu, 50.0), volume.affine)
    told = heights(even, a_slice_taller(labels, L3))[L3]
    assert np.subtract(told, heights(even, labels)[L3]) == pytest.approx(2 * SLICE_MM, abs=1.5)


def line(*, gas: bool = False) -> HuArray:
    """HU along a body: spongy bone, an endplate a millimetre thick up to 12 mm, the disc; smeared by a slice."""
    fine = np.arange(UP[0] - 4, UP[-1] + 4, 0.01)
    hu = np.select([fine < 11, fine < 12], [120.0, 700.0], 70.0)
    if gas:
        hu[(fine > 15) & (fine < 17)] = -900.0
    smeared = ndimage.uniform_filter1d(hu, round(SLICE_MM / 0.01), mode="nearest")
    return np.maximum(np.interp(UP, fine, smeared), LEAST_HU).astype(np.float32)[None, None]


@pytest.mark.parametrize("off_mm", [-2.0, 0.0, 1.5, 3.0])
def test_the_endplate_is_where_it_is_wherever_the_outline_ends(off_mm: float) -> None:
    end = np.array([[12.0 + off_mm]])
    found = _endplate(line(), end, 1.0, SMEARED * SLICE_MM)
    assert found.item() == pytest.approx(12.0, abs=0.7)


def test_gas_in_the_disc_moves_no_endplate_far() -> None:
    end = np.array([[12.0]])
    without, within = (_endplate(line(gas=gas), end, 1.0, SMEARED * SLICE_MM).item() for gas in (False, True))
    assert without == pytest.approx(within, abs=0.7)


def test_the_lower_endplate_is_the_upper_one_upside_down() -> None:
    upper = _endplate(line(), np.array([[12.0]]), 1.0, 0.5)
    lower = _endplate(line()[..., ::-1], np.array([[-12.0]]), -1.0, 0.5)
    assert lower.item() == pytest.approx(-upper.item(), abs=0.01)


def test_a_line_without_outline_has_no_end() -> None:
    assert np.isnan(_endplate(line(), np.array([[np.nan]]), 1.0, 0.5)).all()
