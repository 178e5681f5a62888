"""Outlines on the CT's grid: what is taken in, where the CT's own edges move it, and what is expected of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.segmentation.cascade import EVERYTHING, Cascade
from worker.segmentation.evaluate import dice
from worker.segmentation.outlines import BELIEVED, CHUNK, EDGE_SHARE, expected_overlaps, outline
from worker.volume import Volume

L3 = 29
FLAT_HU = 100.0


def scores(lead: Tensor, classes: int = 2) -> Tensor:
    """Logits [classes, z, y, x] whose class 1 leads the background by so much, and no other class says anything."""
    logits = torch.full((classes, *lead.shape), -50.0)
    logits[0], logits[1] = 0.0, lead
    return logits


def flat(shape: tuple[int, int, int]) -> Tensor:
    """A CT that shows no edge."""
    return torch.full(shape, FLAT_HU)


def test_where_hu_tell_nothing_the_network_decides_and_is_taken_for_timid() -> None:
    for believed, taken in ((BELIEVED - 0.01, False), (BELIEVED + 0.01, True)):
        lead = torch.full((9, 9, 9), float(np.log(believed / (1 - believed))))
        found = outline(scores(lead), flat((9, 9, 9)), flat((9, 9, 9)), {1: L3})
        assert bool((found.labels == L3).all()) is taken
        assert bool((found.labels == 0).all()) is not taken


@pytest.mark.parametrize(("end", "unmoved"), [(30.25, 62), (31.25, 64)])
def test_an_outline_moves_to_the_edge_that_the_ct_shows(end: float, unmoved: int) -> None:
    """Bone ends behind the 63rd voxel of the CT; the network, on half as many, believes in too little or too much."""
    hu = torch.where(torch.arange(120) < 63, 400.0, 0.0).expand(12, 12, 120)
    grid = {"size": [6, 6, 60], "mode": "trilinear", "align_corners": True}
    seen = torch.nn.functional.interpolate(hu[None, None], **grid)[0, 0]
    logits = scores(2.0 * (end - torch.arange(60.0)).expand(6, 6, 60))
    moved = outline(logits, seen, hu, {1: L3})
    blind = outline(logits, flat((6, 6, 60)), flat((12, 12, 120)), {1: L3})
    assert int((blind.labels[6, 6] == L3).sum()) == unmoved
    assert int((moved.labels[6, 6] == L3).sum()) == 63


def test_metal_and_gas_are_no_stronger_edges_than_bone_and_fat() -> None:
    """A screw of 3000 HU in the window must not draw the belief to itself and away from the bone around it."""
    hu = flat((9, 15, 15))
    hu[:, 5:10, 5:10] = 800.0
    screw = hu.clone()
    screw[4, 7, 7] = 3000.0
    lead = torch.full((9, 15, 15), -6.0)
    lead[:, 5:10, 5:10] = 6.0
    plain, with_screw = (outline(scores(lead), image, image, {1: L3}).labels for image in (hu, screw))
    assert torch.equal(plain, with_screw)


def test_the_leading_vertebra_names_a_voxel_and_a_class_without_a_label_names_none() -> None:
    logits = scores(torch.full((6, 6, 12), 4.0), classes=4)
    logits[2, ..., 6:] = 5.0
    logits[3, ..., 9:] = 6.0
    found = outline(logits, flat((6, 6, 12)), flat((6, 6, 12)), {1: L3, 2: 28})
    assert found.labels[0, 0].tolist() == [L3] * 6 + [28] * 3 + [0] * 3
    assert set(found.overlaps) == {L3, 28}


def test_the_expected_dice_is_that_of_the_networks_own_probabilities() -> None:
    logits = torch.full((3, 2 * CHUNK + 1, 2, 2), -50.0)
    logits[0], logits[1, :5], logits[1, 5:7] = 0.0, 50.0, float(np.log(3.0))  # 5 planes beyond doubt, 2 by 3 : 1
    assert expected_overlaps(logits, {1: 31, 2: 30}) == {31: pytest.approx(2 * 6.5 / (7 + 6.5))}
    for believed, taken in ((0.3, False), (0.45, True)):  # a plane that it half believes in
        logits[1, 7] = float(np.log(believed / (1 - believed)))
        expected = 6.5 + believed
        dice = 2 * (expected if taken else 6.5) / ((8 if taken else 7) + expected)
        assert expected_overlaps(logits, {1: 31})[31] == pytest.approx(dice)


def test_what_the_network_alone_believes_by_half_is_not_taken() -> None:
    """One voxel in a window that shows neither bone nor belief around it."""
    believed = 0.6
    lead = torch.full((9, 15, 15), -50.0)
    lead[4, 7, 7] = float(np.log(believed / (1 - believed)))
    assert believed > BELIEVED > (1 - EDGE_SHARE) * believed
    assert not outline(scores(lead), flat((9, 15, 15)), flat((9, 15, 15)), {1: L3}).labels.any()


def test_our_own_networks_are_outlined_on_the_cts_own_grid() -> None:
    """Through the cascade: a turned CT of half the spacing, a network that believes in bright voxels."""

    class Fine:
        spacing_mm, device, label_ids = (2.0, 2.0, 2.0), torch.device("cpu"), {1: L3}

        def normalised(self, hu: Tensor) -> Tensor:
            return (hu - 200.0) / 20.0

        def logits_of(self, image: Tensor) -> Tensor:
            return scores(image)

    hu = np.zeros((40, 40, 40), dtype=np.float32)
    hu[6:26, 8:30, 5:21] = 400.0
    volume = Volume(hu, np.array([[0, 0, -1.0, 0], [0, 1.0, 0, 0], [-1.0, 0, 0, 0], [0, 0, 0, 1]]))
    cascade = Cascade("a stand-in", "0" * 64, coarse=Fine(), fine=Fine())  # type: ignore[arg-type]
    overlaps: dict[int, float] = {}
    found = cascade.labels_in(volume, EVERYTHING, EVERYTHING, overlaps)
    assert dice(found, np.where(hu > 0, L3, 0).astype(np.uint8), L3) > 0.98
    assert 0.8 < overlaps[L3] <= 1.0
