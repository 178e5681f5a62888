"""Coarse network -> lumbar box -> fine network -> labels on the CT's own grid, as TotalSegmentator does with
`roi_subset`.

The coarse network's answer is used twice: for the box, and as a second, independent opinion on the names of
the levels.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from models.spine_unet import resample
from worker.segmentation.base import L1, L5, L6, S1, SACRUM, LabelArray, Point, Segmentation
from worker.segmentation.cleaning import clean, largest_part
from worker.segmentation.margins import label_margins
from worker.segmentation.network import Network, load_network
from worker.segmentation.orientation import Turn
from worker.segmentation.weights import WeightsError, verify
from worker.volume import Volume

MARGIN_MM = 20.0  # around the lumbar box in the axial plane; TotalSegmentator's `crop_addon` for a subset
MARGIN_ALONG_MM = 50.0  # up and down: the neighbours (T12, S1) must be seen for the level checks
SMALLEST_PART_VOXELS = 8  # of a level at 6 mm: less than this is no second opinion

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Cascade:
    """Two resident networks; `segment` is a pure function of the volume and the weights."""

    name: str
    sha256: str
    coarse: Network
    fine: Network

    @classmethod
    def load(cls, root: Path, device: str) -> Cascade:
        """Verify the weights folder and read both networks onto the device; a GPU asked for and absent is an
        error.
        """
        folder = verify(root)
        where = _device(device)
        return cls(
            name=folder.name,
            sha256=folder.sha256,
            coarse=load_network(folder.coarse, where),
            fine=load_network(folder.fine, where),
        )

    def segment(self, volume: Volume) -> Segmentation:
        """Label the vertebrae of one CT; empty labels where the coarse network finds no vertebra."""
        timings: dict[str, float] = {}
        started = time.perf_counter()
        coarse = one_spine(self._coarse_labels(volume))
        opinion = _centroids(coarse, volume)
        box = lumbar_box(coarse, volume)
        timings["coarse"] = time.perf_counter() - started
        labels, margins = np.zeros(volume.hu.shape, dtype=np.uint8), dict[int, float]()
        if box is not None:
            started = time.perf_counter()
            labels[box] = self._fine_labels(volume, box, margins)
            labels = clean(labels, abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000.0)
            timings["fine"] = time.perf_counter() - started
        return Segmentation(labels, self.name, self.sha256, timings, opinion, margins)

    def _coarse_labels(self, volume: Volume) -> LabelArray:
        """Labels [k, j, i] on the volume's axes at the coarse network's spacing."""
        return self._predict(self.coarse, volume, (slice(None), slice(None), slice(None)), upsample=None)

    def _fine_labels(self, volume: Volume, box: Box, margins: dict[int, float]) -> LabelArray:
        """Labels [k, j, i] of the box at the CT's own resolution; `margins` is filled with how clear each was."""
        shape = volume.hu[box].shape
        return self._predict(self.fine, volume, box, upsample=(shape[0], shape[1], shape[2]), margins=margins)

    def _predict(
        self,
        network: Network,
        volume: Volume,
        box: Box,
        *,
        upsample: tuple[int, int, int] | None,
        margins: dict[int, float] | None = None,
    ) -> LabelArray:
        turn = Turn.of(volume.affine)
        hu = torch.from_numpy(np.ascontiguousarray(volume.hu[box]))
        small = resample(hu, volume.spacing_mm, network.spacing_mm[0])
        logits = network.logits(torch.from_numpy(turn.to_network(small.numpy())))
        if margins is not None:
            margins.update(label_margins(logits, network.label_ids))
        on_axes = torch.stack([torch.from_numpy(turn.to_volume(one.numpy())) for one in logits])
        return _winners(on_axes, network.label_ids, upsample)


def one_spine(coarse: LabelArray) -> LabelArray:
    """The coarse labels of one column and one sacrum: a femoral head is sometimes taken for a vertebra.

    Neighbouring vertebrae are at most two voxels of 6 mm apart, so the column is one piece once grown by two.
    """
    vertebrae = coarse > S1
    kept = largest_part(ndimage.binary_dilation(vertebrae, iterations=2)) & vertebrae
    for label in (SACRUM, S1):
        kept |= largest_part(coarse == label)
    column: LabelArray = np.where(kept, coarse, 0).astype(np.uint8)
    return column


def lumbar_box(coarse: LabelArray, volume: Volume) -> Box | None:
    """Where the fine network looks, in the volume's own voxels: L1-L5 with margins; any vertebra where there
    is no lumbar one.
    """
    lumbar = np.isin(coarse, [*range(L5, L1 + 1), L6])
    found = lumbar if lumbar.any() else coarse > S1
    if not found.any():
        return None
    along = int(np.argmax(np.abs(volume.affine[2, :3])))  # the array axis that runs feet to head
    box = []
    for axis in range(3):
        others = tuple(n for n in range(3) if n != axis)
        where = np.flatnonzero(found.any(axis=others))
        ratio = volume.hu.shape[axis] / coarse.shape[axis]
        margin = (MARGIN_ALONG_MM if axis == along else MARGIN_MM) / volume.spacing_mm[axis]
        low = max(0, int(np.floor(where[0] * ratio - margin)))
        high = min(volume.hu.shape[axis], int(np.ceil((where[-1] + 1) * ratio + margin)))
        box.append(slice(low, high))
    return box[0], box[1], box[2]


def _winners(logits: Tensor, label_ids: Mapping[int, int], upsample: tuple[int, int, int] | None) -> LabelArray:
    """The label id of the highest logit per voxel; classes are enlarged one at a time, so memory stays that
    of two volumes.
    """
    best: Tensor | None = None
    labels = torch.zeros(upsample or tuple(logits.shape[1:]), dtype=torch.uint8)
    for index, scores in enumerate(logits):
        if upsample is not None:
            scores = functional.interpolate(scores[None, None], size=upsample, mode="trilinear", align_corners=True)[
                0, 0
            ]
        if best is None:
            best = scores.clone()
            continue
        wins = scores > best
        best = torch.where(wins, scores, best)
        labels[wins] = label_ids.get(index, 0)
    result: npt.NDArray[np.uint8] = labels.numpy()
    return result


def _centroids(coarse: LabelArray, volume: Volume) -> dict[int, Point]:
    """Level id -> LPS centroid of its largest part at the coarse resolution."""
    scale = np.array([
        (fine - 1) / (small - 1) if small > 1 else 1.0
        for fine, small in zip(volume.hu.shape, coarse.shape, strict=True)
    ])  # fmt: skip
    centroids: dict[int, Point] = {}
    for label in np.unique(coarse[coarse > 0]):
        part = largest_part(coarse == label)
        if int(part.sum()) < SMALLEST_PART_VOXELS:
            continue
        voxel = np.argwhere(part).mean(axis=0) * scale
        x, y, z = (volume.affine @ np.append(voxel, 1.0))[:3]
        centroids[int(label)] = (float(x), float(y), float(z))
    return centroids


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise WeightsError(f"The device {wanted} was asked for and no GPU is there: nothing runs on the CPU unasked.")
    return torch.device(wanted)
