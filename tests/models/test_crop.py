"""The crop follows the vertebra: hand-made vertebrae, turned and shifted by known amounts, and the real case."""

import numpy as np
import numpy.typing as npt
import pytest

from models.crop import (
    OUTSIDE_HU,
    VertebraError,
    body_frame,
    body_mask,
    locate,
    sagittal_context,
    sagittal_slabs,
)
from tests.models.block import L2, make_block, rotation
from tests.models.real_case import real_case

Vector = npt.NDArray[np.float64]


def angle_deg(a: Vector, b: Vector) -> float:
    return float(np.degrees(np.arccos(np.clip(a @ b, -1, 1))))


@pytest.mark.parametrize("yaw_deg", [-18.0, 0.0, 12.0])
@pytest.mark.parametrize("tilt_deg", [-25.0, 0.0, 20.0])
def test_the_frame_follows_a_turned_and_tilted_vertebra(yaw_deg: float, tilt_deg: float) -> None:
    turn = rotation(yaw_deg=yaw_deg, tilt_deg=tilt_deg, bend_deg=6.0)
    block = make_block(turn)
    frame = body_frame(block.labels, block.affine, L2)
    assert angle_deg(frame.left, turn[:, 0]) < 3.0
    assert angle_deg(frame.superior, turn[:, 2]) < 3.0
    midplane_error = abs((frame.centre_lps - block.centre) @ turn[:, 0])
    assert midplane_error < 1.0


def test_axes_are_a_right_handed_lps_frame() -> None:
    block = make_block(rotation())
    frame = body_frame(block.labels, block.affine, L2)
    assert np.allclose(frame.axes @ frame.axes.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(frame.axes) == pytest.approx(1.0)
    assert frame.posterior[1] > 0.99
    assert frame.superior[2] > 0.99
    points = np.array([[1.0, 2.0, 3.0], [-4.0, 0.5, 9.0]])
    assert np.allclose(frame.from_lps(frame.to_lps(points)), points)


@pytest.mark.parametrize("spacing", [(3.0, 0.8, 0.8), (3.0, 3.0, 3.0), (1.0, 0.9, 0.9)])
def test_the_body_is_told_from_the_posterior_elements(spacing: tuple[float, float, float]) -> None:
    block = make_block(rotation(yaw_deg=8.0, tilt_deg=10.0), spacing=spacing)
    found = body_mask(block.labels, block.affine, L2)
    dice = 2 * (found & block.body).sum() / (found.sum() + block.body.sum())
    assert dice > 0.95
    assert not (found & (block.labels != L2)).any()


def test_any_orientation_of_the_volume_gives_the_same_slabs() -> None:
    block = make_block(rotation(yaw_deg=10.0))
    straight = sagittal_slabs(block.hu, block.affine, block.labels, L2)
    flip = np.eye(4)
    flip[0, 0], flip[0, 3] = -1.0, block.hu.shape[0] - 1  # slices stored from head to foot
    turned = sagittal_slabs(
        np.ascontiguousarray(block.hu[::-1]), block.affine @ flip, np.ascontiguousarray(block.labels[::-1]), L2
    )
    both = straight.mask & turned.mask
    assert (straight.mask != turned.mask).mean() < 0.001
    assert np.abs(straight.hu[both] - turned.hu[both]).max() < 5.0


def test_rows_go_down_and_columns_go_back() -> None:
    block = make_block(rotation())
    slab = sagittal_slabs(block.hu, block.affine, block.labels, L2)
    middle = slab.hu[slab.middle]
    columns = np.nonzero(slab.mask[slab.middle])[1]
    assert columns.max() - 127.5 > 30  # the spinous process reaches far behind
    assert 127.5 - columns.min() < 20  # the body ends 17 mm in front
    top, bottom = middle[: 128 - 3, 120:136], middle[128 + 3 :, 120:136]
    assert top[top > OUTSIDE_HU].mean() > bottom[bottom > OUTSIDE_HU].mean() + 50  # made denser above
    assert slab.pixel_mm == pytest.approx(300 / 256)
    assert slab.hu.shape == (3, 256, 256)


def test_the_slab_is_masked_to_one_vertebra_and_its_hu_are_not_diluted() -> None:
    block = make_block(rotation(yaw_deg=-7.0, tilt_deg=15.0))
    slab = sagittal_slabs(block.hu, block.affine, block.labels, L2)
    assert (slab.hu[~slab.mask] == OUTSIDE_HU).all()
    inside = slab.hu[slab.mask]
    assert inside.min() > 90.0  # bone is 150 +- 50; the disc outside is -300 and would pull the rim down
    assert inside.max() < 210.0


def test_neighbouring_slabs_lie_5_mm_to_either_side() -> None:
    block = make_block(rotation())
    slab = sagittal_slabs(block.hu, block.affine, block.labels, L2)
    assert slab.offsets_mm == (-5.0, 0.0, 5.0)
    spinous = slab.mask[:, :, 127 + 35 :].sum(axis=(1, 2))
    assert spinous[1] > 4 * max(spinous[0], spinous[2])  # the process is 6 mm wide


def test_the_context_is_the_same_plane_unmasked() -> None:
    block = make_block(rotation(yaw_deg=9.0))
    vertebra = locate(block.labels, block.affine, L2)
    slab = sagittal_slabs(block.hu, block.affine, block.labels, L2, vertebra=vertebra)
    context = sagittal_context(block.hu, block.affine, vertebra.frame)
    core = slab.mask[1] & np.roll(slab.mask[1], 4, 0) & np.roll(slab.mask[1], -4, 0)
    core &= np.roll(slab.mask[1], 4, 1) & np.roll(slab.mask[1], -4, 1)
    assert np.abs(context[core] - slab.hu[1][core]).mean() < 8.0


def test_no_vertebra_is_a_clear_error() -> None:
    block = make_block(rotation())
    with pytest.raises(VertebraError, match="label 28 is not in the label map"):
        body_frame(block.labels, block.affine, 28)
    speck = np.zeros_like(block.labels)
    speck[10:13, 20:23, 20:23] = 28
    with pytest.raises(VertebraError, match="too little"):
        body_frame(speck, block.affine, 28)


def test_real_case_bodies_agree_with_an_independent_segmentation() -> None:
    case = real_case()
    for label_id in (31, 30, 29, 28):
        reference = case.bodies & (case.labels == label_id)
        found = body_mask(case.labels, case.affine, label_id)
        dice = 2 * (found & reference).sum() / (found.sum() + reference.sum())
        assert dice > 0.95, label_id


def test_real_case_midplanes_pass_through_canal_and_spinous_process() -> None:
    case = real_case()
    for label_id in (31, 30, 29, 28):
        slab = sagittal_slabs(case.hu, case.affine, case.labels, label_id)
        row_of_pieces = slab.mask[1].any(axis=0)  # columns: body, canal (empty), spinous process
        changes = np.flatnonzero(np.diff(row_of_pieces.astype(int)))
        assert len(changes) == 4, label_id
        canal_mm = (changes[2] - changes[1]) * slab.pixel_mm
        assert 8.0 < canal_mm < 30.0
