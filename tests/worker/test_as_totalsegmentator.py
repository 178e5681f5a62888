"""The same weights and the same CT give TotalSegmentator's labels.

Its own functions make the reference here, in the order of its `nnUNet_predict_image`: its canonical axes, resampling,
cropping and nnU-Net's predictor, all in this process. `make bench` holds the same against its whole program, whose
start alone takes longer than all of these tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage

from models.phantom.patient import draw
from models.phantom.render import body_grid, render
from models.phantom.scanner import scan, scanner_rng
from tests.totalseg import TOTAL, built_in_in_their_layout
from worker.segmentation import cascade
from worker.segmentation.base import L1, L5, SACRUM, T12, LabelArray
from worker.segmentation.cascade import Cascade, neighbours
from worker.segmentation.cleaning import clean
from worker.segmentation.evaluate import dice
from worker.segmentation.grid import Shape, enlarged, nearest, shape_at, shrink
from worker.segmentation.network import Network, _read_json, load_network
from worker.segmentation.theirs import class_map
from worker.segmentation.weights import network_folder
from worker.volume import Volume

CPU = torch.device("cpu")
LUMBAR = range(L5, L1 + 1)


@pytest.mark.filterwarnings("ignore")
def test_labels_are_those_of_totalsegmentator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dice >= 0.995 for each of L1-L5, which is not our cleaning's doing; the neighbours come on top."""
    volume = digital_ct()
    root = built_in_in_their_layout(tmp_path / "weights")
    coarse, fine = (
        load_network(network_folder(root, number), CPU, class_map(TOTAL, number)).fastest() for number in TOTAL.datasets
    )
    ours = Cascade("theirs", "", coarse, fine, TOTAL)
    expected = their_labels(volume, root, coarse, fine)
    raw: list[LabelArray] = []
    monkeypatch.setattr(cascade, "clean", lambda labels, ml: raw.append(labels.copy()) or clean(labels, ml))
    found = ours.segment(volume).labels
    sizes = {label: (int((raw[0] == label).sum()), int((expected == label).sum())) for label in LUMBAR}
    assert all(abs(before - theirs) <= 0.02 * theirs for before, theirs in sizes.values()), "cleaning hides nothing"
    for label in LUMBAR:
        assert (expected == label).sum() > 500, "the reference found the level"
        assert dice(found, expected, label) >= 0.995
    assert not np.isin(expected, (SACRUM, T12)).any(), "theirs has the levels asked for and nothing else"
    assert all((found == label).any() for label in (SACRUM, T12)), "the level checks need the neighbours"


def their_labels(volume: Volume, root: Path, coarse: Network, fine: Network) -> LabelArray:
    """[k, j, i], as `totalsegmentator(..., roi_subset=[vertebrae_L1..L5])` makes them."""
    from totalsegmentator.alignment import as_closest_canonical, undo_canonical
    from totalsegmentator.cropping import crop_to_mask, undo_crop
    from totalsegmentator.resampling import change_spacing

    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine[:, [2, 1, 0, 3]]
    whole = nib.Nifti1Image(volume.hu.transpose(2, 1, 0).astype(np.float64), affine)

    def labelled(image: Any, network: Network, number: int, mm: float, names: dict[int, int]) -> Any:
        turned = as_closest_canonical(image)
        small = change_spacing(turned, mm, order=1, dtype=np.int32)
        classes = nnunet_labels(small, network_folder(root, number), network, mm)
        table = np.zeros(max(names) + 1, dtype=np.uint8)
        table[list(names)] = list(names.values())
        labels = nib.Nifti1Image(table[classes], small.affine)
        back = change_spacing(labels, mm, turned.shape, order=0, dtype=np.uint8, force_affine=turned.affine)
        return undo_canonical(back, image)

    organs = labelled(whole, coarse, TOTAL.coarse, 6.0, {index: index for index in class_map(TOTAL, TOTAL.coarse)})
    mask = nib.Nifti1Image(np.isin(organs.get_fdata(), LUMBAR).astype(np.uint8), organs.affine)
    cropped, box = crop_to_mask(whole, mask, addon=[20, 20, 20], dtype=np.int32)
    ids = {name: index for index, name in class_map(TOTAL, TOTAL.coarse).items()}
    part = {index: ids[name] for index, name in class_map(TOTAL, TOTAL.fine).items()}
    found = undo_crop(labelled(cropped, fine, TOTAL.fine, 1.5, part), whole, box).get_fdata()
    return (found * np.isin(found, LUMBAR)).transpose(2, 1, 0).astype(np.uint8)


def nnunet_labels(image: Any, folder: Path, network: Network, mm: float) -> npt.NDArray[np.int64]:
    """Classes [x, y, z] by nnU-Net's own predictor: its preprocessing, tiles, half-precision sums and resampling."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(_read_json(folder / "plans.json"))
    predictor = nnUNetPredictor(tile_step_size=0.8, use_mirroring=False, device=CPU, allow_tqdm=False)
    weights = network.module.state_dict()
    arguments = (network.module, plans, plans.get_configuration("3d_fullres"), [weights])
    predictor.manual_initialization(*arguments, _read_json(folder / "dataset.json"), folder.name.split("__")[0], None)
    values = image.get_fdata().transpose(2, 1, 0)[None].astype(np.float32)
    classes = predictor.predict_single_npy_array(values, {"spacing": [mm] * 3}, None, None, False)
    return np.asarray(classes).transpose(2, 1, 0)


def digital_ct() -> Volume:
    """An unseen digital patient from T12 to S1, whole HU."""
    drawn = draw(910_001)
    rendered = render(drawn, body_grid(drawn, 2.5, first="T12", last="S1", margin_mm=12.0))
    return Volume(np.round(scan(rendered, drawn, scanner_rng(drawn))).astype(np.float32), rendered.affine)


# ------------------------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize("spacing_mm", [(3.0, 1.0, 1.0), (1.0, 0.7, 0.7), (1.5, 1.5, 1.5), (0.8, 2.2, 6.0)])
@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_resampling_is_ndimage_zoom_without_a_float_copy(spacing_mm: tuple[float, float, float], kind: type) -> None:
    rng = np.random.default_rng(1)
    hu = rng.integers(-1000, 2000, (23, 31, 19)).astype(kind)
    zoom = np.array(spacing_mm) / 1.5
    expected = ndimage.zoom(hu.astype(np.float64), zoom, order=1, mode="nearest")
    shape = shape_at(hu.shape, spacing_mm, (1.5, 1.5, 1.5))
    assert np.abs(shrink(hu, shape, CPU).numpy() - expected).max() < 0.02
    turned = hu[::-1].transpose(2, 0, 1)  # a view, not contiguous
    small: Shape = (shape[2], shape[0], shape[1])
    assert np.abs(shrink(turned, small, CPU).numpy() - expected[::-1].transpose(2, 0, 1)).max() < 0.02
    labels = rng.integers(0, 5, shape).astype(np.uint8)
    back = ndimage.zoom(labels.astype(np.float64), np.array(hu.shape) / np.array(shape), order=0, mode="nearest")
    assert np.array_equal(nearest(labels, (23, 31, 19)), back)


def test_the_box_is_found_without_enlarging_the_labels() -> None:
    rng = np.random.default_rng(2)
    for large in (7, 20, 61, 200):
        found = np.zeros(20, dtype=np.bool_)
        found[rng.integers(0, 20, 3)] = True
        grown = np.flatnonzero(nearest(found[:, None, None].astype(np.uint8), (large, 1, 1))[:, 0, 0])
        first, last = enlarged(found, large)
        assert 0 <= first < last <= large
        if grown.size:
            assert (first, last) == (grown[0], grown[-1] + 1)


def test_the_neighbours_lie_above_and_below_the_core_and_nowhere_else() -> None:
    volume = Volume(np.zeros((300, 20, 20), dtype=np.float32), np.diag([1.0, 1.0, 1.0, 1.0])[:, [2, 1, 0, 3]])
    sides = (slice(4, 16), slice(4, 16))
    box, core = (slice(40, 290), *sides), (slice(70, 260), *sides)
    (below, kept_below), (above, kept_above) = neighbours(box, core, volume)
    assert (below[0], kept_below[0]) == (slice(40, 135), slice(40, 70))
    assert (above[0], kept_above[0]) == (slice(195, 290), slice(260, 290))
    assert below[1:] == above[1:] == kept_below[1:] == sides
    assert neighbours(core, core, volume) == []
