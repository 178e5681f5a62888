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

from worker.segmentation.base import L1, L5, L6, S1, SACRUM, LabelArray, Point, Segmentation, SegmentationError
from worker.segmentation.cleaning import clean, largest_part
from worker.segmentation.grid import Shape, enlarged, nearest, shape_at, shape_of, shrink
from worker.segmentation.network import Network, load_network
from worker.segmentation.orientation import Turn
from worker.segmentation.outlines import outline
from worker.segmentation.weights import Task, WeightsError, WeightsFolder, verify
from worker.volume import Volume

MARGIN_MM = 20.0  # around the lumbar box in the axial plane; TotalSegmentator's `crop_addon` for a subset
MARGIN_ALONG_MM = 50.0  # up and down: the neighbours (T12, S1) must be seen for the level checks
NEIGHBOUR_MM = 95.0  # that the fine network sees of the lumbar box's end to name a neighbour
SMALLEST_PART_VOXELS = 8  # of a level at 6 mm: less than this is no second opinion

Box = tuple[slice, slice, slice]
Spacing = tuple[float, float, float]  # mm along (z, y, x)
EVERYTHING: Box = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class Cascade:
    """Two resident networks; `segment` is a pure function of the volume and the weights.

    `task` is set for TotalSegmentator's weights: its spacings, whole HU and labels enlarged to the nearest voxel,
    so that the labels are those of its own program. Networks of our own (None) are outlined on the CT's own
    grid (outlines.py).
    """

    name: str
    sha256: str
    coarse: Network
    fine: Network
    task: Task | None = None

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
            coarse=load_network(folder.coarse, where, _class_map(folder, 0)).fastest(),
            fine=load_network(folder.fine, where, _class_map(folder, 1)).fastest(),
            task=folder.task,
        )

    def segment(self, volume: Volume) -> Segmentation:
        """Label the vertebrae of one CT; empty labels where the coarse network finds no vertebra.

        Raises:
            SegmentationError: the GPU's memory does not hold it.
        """
        try:
            return self._segment(volume)
        except torch.OutOfMemoryError as error:
            raise SegmentationError("The GPU's memory does not hold this CT.") from error

    def _segment(self, volume: Volume) -> Segmentation:
        timings: dict[str, float] = {}
        started = time.perf_counter()
        coarse = one_spine(self._coarse_labels(volume))
        opinion = _centroids(coarse, volume)
        box = lumbar_box(coarse, volume, MARGIN_ALONG_MM)
        timings["coarse"] = time.perf_counter() - started
        labels, overlaps = np.zeros(volume.hu.shape, dtype=np.uint8), dict[int, float]()
        if box is not None:
            started = time.perf_counter()
            core = lumbar_box(coarse, volume, MARGIN_MM) or box
            labels[box] = self.labels_in(volume, box, core, overlaps)
            labels[box] = clean(labels[box], abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000.0)
            timings["fine"] = time.perf_counter() - started
        return Segmentation(labels, self.name, self.sha256, timings, opinion, overlaps)

    def labels_in(self, volume: Volume, box: Box, core: Box, overlaps: dict[int, float] | None = None) -> LabelArray:
        """The fine network's labels [k, j, i] of the box, not cleaned; `overlaps` is filled with what it expects.

        What a tile holds sways its answer, so TotalSegmentator's labels need its own box, the core: L1-L5 with 20 mm
        around. The neighbours that the level checks look at, beyond it, are then outlined apart, in smaller tiles.
        """
        if self.task is None:
            return self._smooth(volume, box, overlaps)
        labels = np.zeros(volume.hu[box].shape, dtype=np.uint8)
        labels[_within(box, core)] = self._as_theirs(volume, core, self.task, self.fine)
        for look, keep in neighbours(box, core, volume):
            turn = Turn.of(volume.affine)
            wanted = turn.spacing_to_volume(self.fine.spacing_mm)
            shape = shape_at(volume.hu[look].shape, volume.spacing_mm, wanted)
            network = self.fine.fitted(turn.shape_to_network(shape))
            labels[_within(box, keep)] = self._as_theirs(volume, look, self.task, network)[_within(look, keep)]
        return labels

    def _coarse_labels(self, volume: Volume) -> LabelArray:
        """Labels [k, j, i] on the volume's axes at the coarse network's spacing, or the one that its task gives it."""
        spacing_mm = self.coarse.spacing_mm if self.task is None else _cube(self.task.coarse_mm)
        turn, seen = self._seen(self.coarse, volume, EVERYTHING, spacing_mm)
        return turn.to_volume(_labels_at(self.coarse, self.coarse.normalised(seen), spacing_mm))

    def _smooth(self, volume: Volume, box: Box, overlaps: dict[int, float] | None = None) -> LabelArray:
        """Labels [k, j, i] drawn on the CT's own grid: nearer to the truth than enlarged labels."""
        turn, seen = self._seen(self.fine, volume, box, self.fine.spacing_mm)
        logits = self.fine.logits_of(self.fine.normalised(seen))
        hu = turn.tensor_to_network(torch.from_numpy(np.ascontiguousarray(volume.hu[box]))).to(seen)
        found = outline(logits, seen, hu, self.fine.label_ids)
        if overlaps is not None:
            overlaps.update(found.overlaps)
        return turn.to_volume(found.labels.cpu().numpy())

    def _as_theirs(self, volume: Volume, box: Box, task: Task, network: Network) -> LabelArray:
        """Labels [k, j, i] found at the task's spacing and enlarged to the nearest voxel of the CT."""
        turn, seen = self._seen(network, volume, box, _cube(task.fine_mm))
        labels = _labels_at(network, network.normalised(seen), _cube(task.fine_mm))
        return turn.to_volume(nearest(labels, turn.shape_to_network(shape_of(volume.hu[box]))))

    def _seen(self, network: Network, volume: Volume, box: Box, spacing_mm: Spacing) -> tuple[Turn, Tensor]:
        """The box as the network is shown it: its axes, and HU [z, y, x] at a spacing, on its device."""
        turn, hu = Turn.of(volume.affine), volume.hu[box]
        wanted = turn.spacing_to_volume(spacing_mm)
        small = shrink(hu, shape_at(hu.shape, volume.spacing_mm, wanted), network.device)
        if self.task is not None:
            # TotalSegmentator hands HU cut to whole numbers to its networks; float32 leaves -999.9999 of -1000
            small = small.mul_(1024).round_().div_(1024).trunc_()
        return turn, turn.tensor_to_network(small)


def _labels_at(network: Network, image: Tensor, spacing_mm: Spacing) -> LabelArray:
    """Labels of an image [z, y, x], of a spacing along [z, y, x], on its own grid.

    A network whose plans name another spacing gets it, and its logits come back from it, as nnU-Net does.
    """
    planned = shape_at(shape_of(image), spacing_mm, network.spacing_mm)
    seen = image
    if planned != shape_of(image):
        seen = functional.interpolate(image[None, None], size=planned, mode="trilinear", align_corners=False)[0, 0]
    return _winners(network.logits_of(seen), network.label_ids, shape_of(image))


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


def lumbar_box(coarse: LabelArray, volume: Volume, along_mm: float = MARGIN_ALONG_MM) -> Box | None:
    """Where the fine network looks, in the volume's own voxels: L1-L5 with margins; any vertebra where there
    is no lumbar one.
    """
    lumbar = np.isin(coarse, [*range(L5, L1 + 1), L6])
    found = lumbar if lumbar.any() else coarse > S1
    if not found.any():
        return None
    along = _along(volume)
    box = []
    for axis, length in enumerate(volume.hu.shape):
        others = tuple(n for n in range(3) if n != axis)
        first, last = enlarged(np.asarray(found.any(axis=others)), length)
        margin = int((along_mm if axis == along else MARGIN_MM) / volume.spacing_mm[axis])
        box.append(slice(max(0, first - margin), min(length, last + margin)))
    return box[0], box[1], box[2]


def neighbours(box: Box, core: Box, volume: Volume) -> list[tuple[Box, Box]]:
    """What of the box lies above and below the core: where the fine network looks, and what of that is kept."""
    along = _along(volume)
    reach = round(NEIGHBOUR_MM / volume.spacing_mm[along])
    low, high, first, last = box[along].start, box[along].stop, core[along].start, core[along].stop
    found = []
    for look, keep in (
        (slice(low, min(high, low + reach)), slice(low, first)),
        (slice(max(low, high - reach), high), slice(last, high)),
    ):
        if keep.start < keep.stop:
            found.append((_with(box, along, look), _with(box, along, keep)))
    return found


def _with(box: Box, axis: int, part: slice) -> Box:
    k, j, i = (part if n == axis else one for n, one in enumerate(box))
    return k, j, i


def _within(outer: Box, inner: Box) -> Box:
    """`inner`, counted from the corner of `outer`."""
    k, j, i = (slice(n.start - o.start, n.stop - o.start) for o, n in zip(outer, inner, strict=True))
    return k, j, i


def _along(volume: Volume) -> int:
    """The array axis that runs feet to head."""
    return int(np.argmax(np.abs(volume.affine[2, :3])))


def _cube(spacing_mm: float) -> Spacing:
    return spacing_mm, spacing_mm, spacing_mm


def _winners(logits: Tensor, label_ids: Mapping[int, int], shape: Shape) -> LabelArray:
    """The label id of the highest logit per voxel of another shape; classes are enlarged one at a time, so memory
    stays that of two volumes.
    """
    best: Tensor | None = None
    labels = torch.zeros(shape, dtype=torch.uint8, device=logits.device)
    for index, scores in enumerate(logits):
        if tuple(scores.shape) != shape:
            scores = functional.interpolate(
                scores[None, None], size=list(shape), mode="trilinear", align_corners=False
            )[0, 0]
        if best is None:
            best = scores.clone()
            continue
        wins = scores > best
        torch.maximum(best, scores, out=best)
        labels[wins] = label_ids.get(index, 0)
    result: npt.NDArray[np.uint8] = labels.cpu().numpy()
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


def _class_map(folder: WeightsFolder, which: int) -> Mapping[int, str] | None:
    """Of the coarse (0) or fine (1) network of imported weights; None for our own."""
    return None if folder.task is None else folder.class_maps[folder.task.datasets[which]]


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise WeightsError(f"The device {wanted} was asked for and no GPU is there: nothing runs on the CPU unasked.")
    return torch.device(wanted)
