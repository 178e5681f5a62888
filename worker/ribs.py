"""The last pair of ribs, seen in the image: an anchor for the numbering that no network's names had a part in.

Neither the built-in networks nor a supplied segmentation need outline a rib. A rib is looked for as bone beside the
spine that is thin, long, reaches farther out than any transverse process, and whose inner end lies at a vertebra: that
vertebra carries it, whatever it was called. How often this is right is measured by `python -m
worker.ribs_evaluate` and told in models/SEGMENTATION.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import cKDTree

from models.crop import sample_hu
from worker.segmentation.base import LabelArray
from worker.volume import Volume

FloatArray = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

STEP_MM = 2.0  # of the grid that is looked at
BESIDE_MM = 90.0  # on either side of the spine
SEEN_MM = 62.0  # as far out a vertebra's sides must be in the CT before anything is said of its ribs
INNER_MM = 24.0  # nearer to the midline lie bodies, joints and arches
BEHIND_MM = (-20.0, 75.0)  # about the body's middle, backwards
BELOW_MM, ABOVE_MM = 30.0, 35.0  # of the lowest and the highest vertebra's middle
BONE_HU = 140.0  # a rib smeared over thick slices still exceeds it; kidneys with contrast medium do too, but are thick
THICK_MM = 14.0  # what a cube of this width fits into is no rib
RIM_MM = 4.0  # around an outlined vertebra: its own surface is no rib
REACH_MM = 52.0  # from the midline: transverse processes end at 36 to 50
LENGTH_MM = 20.0  # from the inner to the outer end, sideways
LARGEST_ML = 20.0  # within the region; the rest of an enhanced kidney has more
INNER_END_MM = 16.0  # the inner end lies no farther from its vertebra
SPREAD_MM = (150.0, 150.0, 450.0)  # of the bodies: what lies farther apart is no lower spine
JUDGED = range(29, 36)  # L3 to T9: a spine that is misnamed by more than that fails in other ways


@dataclass(frozen=True)
class Sides:
    """How far the rib of one vertebra reaches out on either side, mm from the midline; 0.0 where there is none."""

    right_mm: float
    left_mm: float

    @property
    def ribbed(self) -> bool:
        """Whether it carries a rib, on either side."""
        return max(self.right_mm, self.left_mm) > 0


def find_ribs(
    volume: Volume, labels: LabelArray, middles: Mapping[int, FloatArray], whole: Collection[int]
) -> dict[int, Sides]:
    """The ribs of each vertebra near the thorax; of one that is cut, or whose sides are not in the CT, only those seen.

    Args:
        volume: the CT.
        labels: uint8 [k, j, i] on its grid.
        middles: class id -> middle of the body, LPS mm.
        whole: the vertebrae that are wholly in view: only such a one can be said to have no rib.
    """
    middles = {label: middle for label, middle in middles.items() if label in JUDGED}
    if len(middles) < 2 or bool((np.ptp(list(middles.values()), axis=0) > SPREAD_MM).any()):
        return {}
    look = _Look.at(volume, labels, middles)
    found = {label: [0.0, 0.0] for label, middle in middles.items() if label in whole and _sides_in(volume, middle)}
    for label, side, reach in look.ribs():
        if label in middles:
            sides = found.setdefault(label, [0.0, 0.0])
            sides[side] = max(sides[side], reach)
    return {label: Sides(right, left) for label, (right, left) in found.items()}


def _sides_in(volume: Volume, middle: FloatArray) -> bool:
    """Whether the CT holds both sides of a vertebra, as far out as a short rib reaches."""
    ends = middle + np.array([[side * SEEN_MM, y, z] for side in (-1, 1) for y, z in ((0.0, 0.0), (25.0, -10.0))])
    index = (ends - volume.affine[:3, 3]) @ np.linalg.inv(volume.affine[:3, :3]).T
    return bool(((index >= 0) & (index <= np.array(volume.hu.shape) - 1)).all())


@dataclass(frozen=True)
class _Look:
    """The region beside the spine on a grid [z, y, x] of its own, along LPS."""

    hu: npt.NDArray[np.float32]
    labels: LabelArray
    out_mm: FloatArray  # [z, x]: distance from the midline, negative to the right

    @classmethod
    def at(cls, volume: Volume, labels: LabelArray, middles: Mapping[int, FloatArray]) -> _Look:
        line = np.array(sorted(middles.values(), key=lambda middle: float(middle[2])))  # from the feet up
        x = np.arange(line[:, 0].min() - BESIDE_MM, line[:, 0].max() + BESIDE_MM, STEP_MM)
        y = np.arange(line[:, 1].min() + BEHIND_MM[0], line[:, 1].max() + BEHIND_MM[1], STEP_MM)
        z = np.arange(line[0, 2] - BELOW_MM, line[-1, 2] + ABOVE_MM, STEP_MM)
        points = np.stack(np.meshgrid(z, y, x, indexing="ij")[::-1], axis=-1)  # [z, y, x, (x, y, z)]
        hu = ndimage.gaussian_filter(sample_hu(volume.hu, volume.affine, points), 0.6)
        return cls(hu, _nearest(labels, volume.affine, points), x - np.interp(z, line[:, 2], line[:, 0])[:, None])

    def ribs(self) -> list[tuple[int, int, float]]:
        """Every rib that begins at a vertebra: the vertebra, the side (0 right, 1 left), how far it reaches, mm."""
        out = np.broadcast_to(self.out_mm[:, None, :], self.hu.shape)
        candidates = self._thin_bone() & (np.abs(out) >= INNER_MM)
        outlined = np.argwhere(self.labels > 0)
        tree = cKDTree(outlined)
        parts, _ = ndimage.label(candidates, structure=np.ones((3, 3, 3)))
        found = []
        for number, box in enumerate(ndimage.find_objects(parts), start=1):
            voxels = np.argwhere(parts[box] == number) + [side.start for side in box]
            reach = out[tuple(voxels.T)]
            distance = np.abs(reach)
            short = distance.max() < REACH_MM or distance.max() - distance.min() < LENGTH_MM
            if short or len(voxels) * STEP_MM**3 / 1000.0 > LARGEST_ML:
                continue
            inner = voxels[distance <= distance.min() + STEP_MM]
            far, nearest = tree.query(inner)
            if far.min() * STEP_MM <= INNER_END_MM:
                label = int(self.labels[tuple(outlined[nearest[far.argmin()]])])
                found.append((label, int(reach[0] > 0), float(distance.max())))
        return found

    def _thin_bone(self) -> Mask:
        """Bone that is no vertebra and not as thick as a kidney or an iliac wing."""
        bone: Mask = (self.hu > BONE_HU) & ~_grown(self.labels > 0, RIM_MM)
        thick = ndimage.minimum_filter(bone, size=_voxels(THICK_MM), mode="constant")
        thin: Mask = bone & ~_grown(thick, THICK_MM / 2 + STEP_MM)
        return thin


def _voxels(width_mm: float) -> int:
    """An odd number of voxels."""
    return 2 * round(width_mm / 2 / STEP_MM) + 1


def _grown(mask: Mask, by_mm: float) -> Mask:
    grown: Mask = ndimage.maximum_filter(mask, size=_voxels(2 * by_mm), mode="constant")
    return grown


def _nearest(labels: LabelArray, affine: FloatArray, points: FloatArray) -> LabelArray:
    """The label at each point [..., 3] LPS mm; 0 outside of the CT."""
    index = np.rint((points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T).astype(int)
    inside = ((index >= 0) & (index < labels.shape)).all(axis=-1)
    found = np.zeros(inside.shape, dtype=np.uint8)
    found[inside] = labels[tuple(index[inside].T)]
    return found
