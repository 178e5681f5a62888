"""The HU disc against known HU, and against a computation in voxel space on the real case."""

import numpy as np
import pytest

from models.attenuation import ROI_MM2, disc_attenuation
from tests.models.block import L2, make_block, rotation
from tests.models.real_case import RealCase, real_case


def test_a_uniform_body_reads_its_own_hu() -> None:
    block = make_block(rotation(yaw_deg=10.0))
    uniform = np.where(block.labels == L2, 131.0, -300.0).astype(np.float32)
    found = disc_attenuation(uniform, block.affine, block.labels, L2)
    assert found.hu_mean == pytest.approx(131.0, abs=0.01)
    assert found.shift_range_hu == pytest.approx((131.0, 131.0), abs=0.01)
    assert found.roi_mm2 == ROI_MM2
    assert found.inside == 1.0


def test_a_gradient_shows_in_the_shift_range() -> None:
    block = make_block(rotation())  # 50 HU over 13.5 mm upwards
    found = disc_attenuation(block.hu, block.affine, block.labels, L2)
    assert found.hu_mean == pytest.approx(150.0, abs=4.0)
    low, high = found.shift_range_hu
    assert (high - low) == pytest.approx(2 * 3.0 * 50 / 13.5, abs=2.0)


def test_the_disc_lies_at_the_body_not_at_the_whole_vertebra() -> None:
    block = make_block(rotation())
    found = disc_attenuation(block.hu, block.affine, block.labels, L2)
    assert np.allclose(found.centre_lps, block.centre, atol=1.0)


def test_real_case_agrees_with_voxel_space_within_8_hu() -> None:
    case = real_case()
    for label_id in (31, 30, 29, 28):
        found = disc_attenuation(case.hu, case.affine, case.labels, label_id)
        assert found.hu_mean == pytest.approx(voxel_space_disc(case, label_id), abs=8.0), label_id
        assert found.inside > 0.95


def test_real_case_l1_reads_as_the_definition_says() -> None:
    case = real_case()
    found = disc_attenuation(case.hu, case.affine, case.labels, 31)
    assert found.hu_mean == pytest.approx(108.0, abs=8.0)  # TRAPS.md
    assert found.shift_range_hu[0] < 100.0
    assert found.shift_range_hu[1] > 150.0


def voxel_space_disc(case: RealCase, label_id: int) -> float:
    """The definition once more, without our geometry: TotalSegmentator's own body mask, nearest voxels."""
    centroid = np.argwhere(case.bodies & (case.labels == label_id)).mean(axis=0)  # k, j, i
    radius = np.sqrt(125.0 / np.pi)
    steps = np.arange(-7.0, 7.01, 0.25)
    z, y, x = np.meshgrid(np.arange(-2.25, 2.5, 0.5), steps, steps, indexing="ij")
    disc = x**2 + y**2 <= radius**2
    offsets = np.stack([z[disc], y[disc], x[disc]], axis=1) / 3.0  # the case is 3 mm isotropic
    k, j, i = np.rint(centroid + offsets).astype(int).T
    return float(case.hu[k, j, i].mean())
