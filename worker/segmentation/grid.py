"""Moving HU and labels between grids of one box, as TotalSegmentator does: corner voxels on corner voxels.

`ndimage.zoom` of order 1 for HU and of order 0 for labels, without its copies: a CT of 2000 slices is never held
as float, only the few slices that one slice of the answer is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from worker.segmentation.base import LabelArray

Shape = tuple[int, int, int]
Range = tuple[int, int]

SLICES = 16  # of the answer at a time


def shape_of(values: Tensor | npt.NDArray[Any]) -> Shape:
    """Of a volume, as plain numbers."""
    k, j, i = values.shape
    return int(k), int(j), int(i)


def shape_at(shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float]) -> Shape:
    """How many voxels of `target_mm` a box takes, axis by axis; at least one along each."""
    k, j, i = (max(1, round(n * step / wanted)) for n, step, wanted in zip(shape, spacing_mm, target_mm, strict=True))
    return k, j, i


def shrink(hu: npt.NDArray[np.generic], shape: Shape, device: torch.device) -> Tensor:
    """HU [k, j, i] of any number type -> float32 of another shape, trilinear, on the device.

    Slices are picked first and only those are turned into floats, so the memory is that of the answer.
    """
    at = np.linspace(0.0, hu.shape[0] - 1.0, shape[0])
    low = np.floor(at).astype(np.intp)
    high = np.minimum(low + 1, hu.shape[0] - 1)
    weight = torch.from_numpy((at - low).astype(np.float32)).to(device)
    small = torch.empty(shape, device=device)
    for start in range(0, shape[0], SLICES):
        part = slice(start, start + SLICES)
        below, above = (_in_plane(hu[which[part]], shape[1:], device) for which in (low, high))
        small[part] = torch.lerp(below, above, weight[part, None, None])
    return small


def _in_plane(slices: npt.NDArray[np.generic], shape: Sequence[int], device: torch.device) -> Tensor:
    hu = torch.from_numpy(np.ascontiguousarray(slices)).to(device).float()
    if tuple(hu.shape[1:]) == tuple(shape):
        return hu
    return functional.interpolate(hu[:, None], size=list(shape), mode="bilinear", align_corners=True)[:, 0]


def nearest(labels: LabelArray, shape: Shape) -> LabelArray:
    """Labels [k, j, i] -> another shape: each voxel takes the label of the nearest one."""
    k, j, i = (sources(small, large) for small, large in zip(labels.shape, shape, strict=True))
    return labels[np.ix_(k, j, i)]


def sources(small: int, large: int) -> npt.NDArray[np.intp]:
    """Which of `small` voxels each of `large` voxels along an axis takes its label from (ndimage.zoom, order 0)."""
    step = (small - 1) / (large - 1) if large > 1 else 1.0
    from_: npt.NDArray[np.intp] = np.floor(np.arange(large) * step + 0.5).astype(np.intp)
    return from_


def enlarged(found: npt.NDArray[np.bool_], large: int) -> Range:
    """Where the marked voxels of an axis lie [first, last + 1) once the axis is enlarged to `large` voxels."""
    where = np.flatnonzero(found[sources(len(found), large)])
    if not where.size:  # a mark so thin that no voxel of a coarser grid takes it
        middle = int(np.flatnonzero(found).mean() * large / len(found))
        return min(middle, large - 1), min(middle, large - 1) + 1
    return int(where[0]), int(where[-1]) + 1
