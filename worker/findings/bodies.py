"""The vertebral bodies of a label map, measured in their own frames: endplates and heights.

A body leans with its spine, so nothing here is measured along the CT's z. Each endplate is a surface, and the CT itself
says where it lies: a bright layer between spongy bone and disc. The outline only says where to look (at 3 mm slices it
can be a whole slice too tall, and just where a body has caved in), and speaks where the CT shows no such layer.
Heights are distances between the two surfaces in a midsagittal band.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from models.crop import Vertebra, VertebraError, sample_hu
from worker.located import Located

FloatArray = npt.NDArray[np.float64]
HuArray = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]

BAND_MM = 8.0  # on either side of the midplane: where heights are measured
REACH_MM = 16.0  # on either side of the midplane: where endplates are seen at all
STEP_MM = 0.5  # of the samples along the body's axis; crossings are interpolated between them
HALF_HEIGHT_MM = 28.0  # no lumbar body is taller than twice this
UP = np.arange(-HALF_HEIGHT_MM, HALF_HEIGHT_MM + STEP_MM / 2, STEP_MM)
SMOOTHING_MM = 1.0
# An endplate is the brightest place this far inside and outside of the outline's end; the disc is the darkest of those
# this far beyond it. Between them, where so much of the difference has fallen, the bone ends: a slice smears that place
# outwards by a share of its own extent. Measured on development patients (models/SEGMENTATION.md).
INSIDE_MM, OUTSIDE_MM, BEYOND_MM = 4.0, 2.0, 5.0
FALLEN, SMEARED = 0.35, 0.25
THICKEST_MM = 5.5  # measured up to 5; in slices of 10 mm an endplate is lost, so the outline speaks
LEAST_HU = 0.0  # gas in a disc, and what lies beyond the CT, is no darker than soft tissue
# Cement or metal hides the endplates, so the outline speaks: more than this share of the body is brighter than bone
# (four cemented bodies: 8 to 16 %; sixteen others, dense, broken, beside cement: 0.9 % at most).
FOREIGN_HU, FOREIGN_SHARE = 800.0, 0.03
NOISE_LINES = (1.5, 0.9, 0.0)  # lines across and along over which HU are smoothed
SITES = (0.15, 0.50, 0.85)  # where heights are measured, from front to back of the body (DOMAIN.md)
WINDOW = 0.051  # on either side of a site: one surface point is a voxel's accident
ALONG = np.linspace(0.05, 0.95, 19)  # from front (0) to back (1)
ACROSS = np.arange(-REACH_MM, REACH_MM + 0.1, 1.0)
# Standard deviation of one height, mm, measured on development patients (models/SEGMENTATION.md): it grows with
# the voxel's extent along the body's axis, and does not quite vanish with it.
ERROR_PER_STEP, ERROR_AT_LEAST_MM = 0.32, 0.15


@dataclass(frozen=True)
class Body:
    """One vertebral body in its own frame (left, posterior, superior; mm)."""

    label: int
    vertebra: Vertebra
    front_mm: float  # along the posterior axis
    back_mm: float
    upper_mm: FloatArray  # [across, along]: the endplates' places along the superior axis, NaN outside of the body
    lower_mm: FloatArray
    outline_mm: tuple[FloatArray, FloatArray]  # of the same lines: where the outline ends above and below
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
        return float(np.hypot(ERROR_PER_STEP * self.step_mm, ERROR_AT_LEAST_MM))

    def endplate_normals(self) -> tuple[FloatArray, FloatArray]:
        """Unit normals [3] of the planes through the upper and the lower endplate, LPS, both pointing up.

        Each plane lies midway between endplate and outline's end: their tilts err by as much, but not together.
        """
        pairs = zip((self.upper_mm, self.lower_mm), self.outline_mm, strict=True)
        upper, lower = (_normal((endplate + end) / 2, self) for endplate, end in pairs)
        return upper @ self.vertebra.frame.axes, lower @ self.vertebra.frame.axes


def measure_bodies(hu: HuArray, located: Located, wanted: Iterable[int]) -> dict[int, Body]:
    """The bodies that can be measured; a label without a vertebra's shape is left out."""
    found = {label: measure_body(hu, located, label) for label in wanted}
    return {label: body for label, body in found.items() if body is not None}


def measure_body(hu: HuArray, located: Located, label: int) -> Body | None:
    """One body, or None where the label holds none."""
    affine = located.affine
    try:
        vertebra = located.vertebra(label)
    except VertebraError:
        return None
    front, back = _depth(vertebra, affine)
    if not np.isfinite([front, back]).all() or back - front < 10.0:
        return None
    step = float(np.linalg.norm(vertebra.frame.superior @ affine[:3, :3]))
    points = vertebra.frame.to_lps(_lines(front + ALONG * (back - front)))
    ends = _outline_ends(vertebra, affine, points)
    upper, lower = _endplates(sample_hu(hu, affine, points), ends, step)
    body = Body(label, vertebra, front, back, upper, lower, ends, step)
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


def _lines(depth_mm: FloatArray) -> FloatArray:
    """Points [across, along, up, 3] of the body's frame, on lines along its axis at these depths."""
    return np.stack(np.meshgrid(ACROSS, depth_mm, UP, indexing="ij"), axis=-1)


def _outline_ends(vertebra: Vertebra, affine: FloatArray, points: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Where each line [across, along] leaves the slightly smoothed outline above and below, mm along its axis."""
    own, pad = _in_box(vertebra, affine), 4
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    blur = [min(SMOOTHING_MM / step, 1.5) for step in spacing]
    mask = ndimage.gaussian_filter(np.pad(vertebra.mask.astype(np.float32), pad), blur)
    inverse = np.linalg.inv(own)
    index = points @ inverse[:3, :3].T + inverse[:3, 3] + pad
    density = ndimage.map_coordinates(mask, np.moveaxis(index, -1, 0), order=1)
    upper, lower = _ends(density.reshape(-1, UP.size) - 0.5)
    return upper.reshape(points.shape[:2]), lower.reshape(points.shape[:2])


def _ends(lines: npt.NDArray[np.float32]) -> tuple[FloatArray, FloatArray]:
    """Where each line [n, up] turns negative above and below its own middle; NaN where the middle already is."""
    inside, place = lines >= 0, np.arange(UP.size)
    count = inside.sum(axis=1)
    middle = np.rint((inside * place).sum(axis=1) / np.maximum(count, 1)).astype(int)[:, None]
    valid = (count > 0) & inside[np.arange(len(lines)), middle[:, 0]]
    above = (~inside & (place > middle)).argmax(axis=1)  # 0 where a line never leaves
    below = UP.size - 1 - (~inside & (place < middle))[:, ::-1].argmax(axis=1)
    upper = _crossing(lines, UP, above, above - 1)
    lower = _crossing(lines, UP, below, np.minimum(below + 1, UP.size - 1))
    return np.where(valid & (above > 0), upper, np.nan), np.where(valid & (below < UP.size - 1), lower, np.nan)


def _endplates(hu: HuArray, ends_mm: tuple[FloatArray, FloatArray], step_mm: float) -> tuple[FloatArray, FloatArray]:
    """Both endplates on lines of HU [across, along, up]; where slices, cement, metal hide them, the outline's ends."""
    if step_mm > THICKEST_MM:
        return ends_mm
    seen = ndimage.gaussian_filter(np.maximum(hu, LEAST_HU), NOISE_LINES)
    above, below = ends_mm
    within = (below[..., None] <= UP) & (above[..., None] >= UP)
    if within.any() and (seen[within] > FOREIGN_HU).mean() > FOREIGN_SHARE:
        return ends_mm
    smeared = SMEARED * step_mm
    return _endplate(seen, above, 1.0, smeared), _endplate(seen, below, -1.0, smeared)


def _endplate(hu: HuArray, end_mm: FloatArray, side: float, smeared_mm: float) -> FloatArray:
    """Where bone ends on each line of HU [across, along, up]: at its endplate, or where the outline ends (`end_mm`).

    `side` is 1 for the upper endplate and -1 for the lower one; NaN where the line has no outline.
    """
    away = np.arange(-INSIDE_MM, OUTSIDE_MM + BEYOND_MM + STEP_MM / 4, STEP_MM / 2)
    lines = _along(hu.reshape(-1, UP.size), end_mm.reshape(-1, 1) + side * away)
    bright = np.where(away <= OUTSIDE_MM, lines, -np.inf).argmax(axis=1)[:, None]
    after = away - away[bright]
    bone = np.take_along_axis(lines, bright, axis=1)
    disc = np.where((after >= 0) & (after <= BEYOND_MM), lines, np.inf).min(axis=1, keepdims=True)
    above = lines - (bone - FALLEN * (bone - disc))
    out = (after > 0) & (above < 0)
    first = out.argmax(axis=1)
    moved = _crossing(above, away, first, np.maximum(first - 1, 0)) - smeared_mm
    return end_mm + side * np.where(out.any(axis=1), moved, 0.0).reshape(end_mm.shape)


def _along(lines: HuArray, places_mm: FloatArray) -> FloatArray:
    """Values [n, places] of lines [n, up] at places of their own, linearly between samples; at NaN any value."""
    at = np.clip((np.nan_to_num(places_mm) - UP[0]) / STEP_MM, 0, UP.size - 1)
    rows = np.broadcast_to(np.arange(len(lines))[:, None], at.shape)
    values: FloatArray = ndimage.map_coordinates(lines, [rows, at], order=1, output=np.float64)
    return values


def _crossing(
    lines: npt.NDArray[np.floating], places: FloatArray, outer: npt.NDArray[Any], inner: npt.NDArray[Any]
) -> FloatArray:
    """Where each line [n, places] passes zero between two neighbouring samples."""
    rows = np.arange(len(lines))
    outside, inside = lines[rows, outer], lines[rows, inner]
    crossing: FloatArray = places[inner] + inside / np.maximum(inside - outside, 1e-6) * (places[outer] - places[inner])
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
