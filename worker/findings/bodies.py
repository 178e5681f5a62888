"""The vertebral bodies of a label map, measured in their own frames: endplates and heights.

A body leans with its spine, so nothing here is measured along the CT's z. Each endplate is a surface: where the
slightly smoothed mask falls below one half on either side of the body's middle, so that neither thick slices nor
a rough outline decide alone. Heights are distances between the two surfaces in a midsagittal band.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from models.crop import Vertebra, VertebraError
from worker.located import Located

FloatArray = npt.NDArray[np.float64]
Labels = npt.NDArray[np.uint8]

BAND_MM = 8.0  # on either side of the midplane: where heights are measured
REACH_MM = 16.0  # on either side of the midplane: where endplates are seen at all
STEP_MM = 0.5  # of the samples along the body's axis; crossings are interpolated between them
HALF_HEIGHT_MM = 28.0  # no lumbar body is taller than twice this
SMOOTHING_MM = 1.0
SITES = (0.15, 0.50, 0.85)  # where heights are measured, from front to back of the body (DOMAIN.md)
WINDOW = 0.051  # on either side of a site: one surface point is a voxel's accident
ALONG = np.linspace(0.05, 0.95, 19)  # from front (0) to back (1)
ACROSS = np.arange(-REACH_MM, REACH_MM + 0.1, 1.0)
# Standard deviation of one height, mm, measured on development patients (models/SEGMENTATION.md): it grows with
# the voxel's extent along the body's axis, and does not vanish with it, for no outline is exact.
ERROR_PER_STEP, ERROR_OF_OUTLINE_MM = 0.25, 0.6


@dataclass(frozen=True)
class Body:
    """One vertebral body in its own frame (left, posterior, superior; mm)."""

    label: int
    vertebra: Vertebra
    front_mm: float  # along the posterior axis
    back_mm: float
    upper_mm: FloatArray  # [across, along]: the endplates' places along the superior axis, NaN outside of the body
    lower_mm: FloatArray
    step_mm: float  # a voxel's extent along the superior axis

    @cached_property
    def heights_mm(self) -> tuple[float, float, float]:
        """Anterior, middle and posterior height; NaN where an endplate isn't seen."""
        tall = (self.upper_mm - self.lower_mm)[np.abs(ACROSS) <= BAND_MM]
        sites = [tall[:, np.abs(ALONG - site) <= WINDOW] for site in SITES]
        anterior, middle, posterior = map(_median_mm, sites)
        return anterior, middle, posterior

    @property
    def height_error_mm(self) -> float:
        """Standard deviation of one height."""
        return float(np.hypot(ERROR_PER_STEP * self.step_mm, ERROR_OF_OUTLINE_MM))

    def endplate_normals(self) -> tuple[FloatArray, FloatArray]:
        """Unit normals [3] of the planes through the upper and the lower endplate, LPS, both pointing up."""
        upper, lower = (_normal(surface, self) for surface in (self.upper_mm, self.lower_mm))
        return upper @ self.vertebra.frame.axes, lower @ self.vertebra.frame.axes


def measure_bodies(located: Located, wanted: Iterable[int]) -> dict[int, Body]:
    """The bodies that can be measured; a label without a vertebra's shape is left out."""
    found = {label: measure_body(located, label) for label in wanted}
    return {label: body for label, body in found.items() if body is not None}


def measure_body(located: Located, label: int) -> Body | None:
    """One body, or None where the label holds none."""
    affine = located.affine
    try:
        vertebra = located.vertebra(label)
    except VertebraError:
        return None
    front, back = _depth(vertebra, affine)
    if not np.isfinite([front, back]).all() or back - front < 10.0:
        return None
    upper, lower = _endplates(vertebra, affine, front + ALONG * (back - front))
    step = float(np.linalg.norm(vertebra.frame.superior @ affine[:3, :3]))
    body = Body(label, vertebra, front, back, upper, lower, step)
    return body if np.isfinite(body.heights_mm).all() else None


def _median_mm(site: FloatArray) -> float:
    """The median over a site's lines on which anything was seen; NaN where nothing was."""
    lines = site[np.isfinite(site).any(axis=1)]
    return float(np.median(np.nanmean(lines, axis=1))) if len(lines) else float("nan")


def _in_box(vertebra: Vertebra, affine: FloatArray) -> FloatArray:
    """The affine of the vertebra's own box."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.array([side.start for side in vertebra.box], dtype=np.float64)
    return moved


def _depth(vertebra: Vertebra, affine: FloatArray) -> tuple[float, float]:
    """Front and back of the body in the band, along the posterior axis; NaN where there is too little of it."""
    own = _in_box(vertebra, affine)
    local = vertebra.frame.from_lps(np.argwhere(vertebra.body) @ own[:3, :3].T + own[:3, 3])
    band = local[np.abs(local[:, 0]) <= BAND_MM]
    if len(band) < 20:
        return float("nan"), float("nan")
    front, back = np.percentile(band[:, 1], [1, 99])
    return float(front), float(back)


def _endplates(vertebra: Vertebra, affine: FloatArray, depth_mm: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Both surfaces [across, along] at these depths, mm along the superior axis."""
    own, pad = _in_box(vertebra, affine), 4
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    blur = [min(SMOOTHING_MM / step, 1.5) for step in spacing]
    mask = ndimage.gaussian_filter(np.pad(vertebra.mask.astype(np.float32), pad), blur)
    up = np.arange(-HALF_HEIGHT_MM, HALF_HEIGHT_MM + STEP_MM / 2, STEP_MM)
    points = np.stack(np.meshgrid(ACROSS, depth_mm, up, indexing="ij"), axis=-1)  # [across, along, up, 3]
    inverse = np.linalg.inv(own)
    index = vertebra.frame.to_lps(points) @ inverse[:3, :3].T + inverse[:3, 3] + pad
    density = ndimage.map_coordinates(mask, np.moveaxis(index, -1, 0), order=1)
    lines = density.reshape(-1, up.size)
    upper, lower = _ends(lines, up)
    return upper.reshape(points.shape[:2]), lower.reshape(points.shape[:2])


def _ends(lines: npt.NDArray[np.float32], up: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Where each line [n, up] leaves the body above and below its own middle; NaN where the middle is outside."""
    inside, place = lines >= 0.5, np.arange(up.size)
    count = inside.sum(axis=1)
    middle = np.rint((inside * place).sum(axis=1) / np.maximum(count, 1)).astype(int)[:, None]
    rows = np.arange(len(lines))
    valid = (count > 0) & inside[rows, middle[:, 0]]
    above = (~inside & (place > middle)).argmax(axis=1)  # 0 where a line never leaves
    below = up.size - 1 - (~inside & (place < middle))[:, ::-1].argmax(axis=1)
    upper = _crossing(lines, up, rows, above, above - 1)
    lower = _crossing(lines, up, rows, below, np.minimum(below + 1, up.size - 1))
    return np.where(valid & (above > 0), upper, np.nan), np.where(valid & (below < up.size - 1), lower, np.nan)


def _crossing(
    lines: npt.NDArray[np.float32], up: FloatArray, rows: npt.NDArray[Any], outer: npt.NDArray[Any], inner: Any
) -> FloatArray:
    """Where the line passes one half between two neighbouring samples."""
    outside, inside = lines[rows, outer], lines[rows, inner]
    share = (inside - 0.5) / np.maximum(inside - outside, 1e-6)
    crossing: FloatArray = up[inner] + share * (up[outer] - up[inner])
    return crossing


def _normal(surface: FloatArray, body: Body) -> FloatArray:
    """Unit normal (left, posterior, superior) of the plane through the middle half of an endplate."""
    inner = np.abs(ALONG - 0.5) <= 0.26
    across, along = np.meshgrid(ACROSS, (body.front_mm + ALONG * (body.back_mm - body.front_mm))[inner], indexing="ij")
    height = surface[:, inner]
    keep = np.isfinite(height)
    design = np.stack([np.ones(keep.sum()), across[keep], along[keep]], axis=1)
    plane = np.linalg.lstsq(design, height[keep], rcond=None)[0]
    residual = np.abs(height[keep] - design @ plane)
    near = residual <= np.quantile(residual, 0.8)  # a rim or a node is no part of the plane
    plane = np.linalg.lstsq(design[near], height[keep][near], rcond=None)[0]
    normal: FloatArray = np.array([-plane[1], -plane[2], 1.0])
    return normal / float(np.linalg.norm(normal))
