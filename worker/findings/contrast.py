"""Contrast medium from the pixels, whatever the tags say: the great vessels and the kidneys.

Tags of contrast are missing or wrong more often than not (arXiv 2110.08424), so the CT itself is asked. In front of
each body, at the height of its middle where no disc can be mistaken for blood, lie aorta and vena cava; beside the
upper ones lie the kidneys. Nobody outlines them: what counts is the brightest round spot of a vessel's or a kidney's
width in a plane across the body's middle, by the median within it, so that plaques, clips and ribs do not speak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from models.crop import sample_hu
from service.domain.policy import FindingsPolicy
from worker.findings.bodies import Body, FloatArray, HuArray, Labels

NATIVE, ARTERIAL, PORTAL, ENHANCED = "native", "arterial", "portal", "enhanced"
STEP_MM = 2.5
VESSEL_MM, KIDNEY_MM = 11.0, 21.0  # spots: narrower than an aorta or a kidney, wider than a plaque or a rib
SLAB_MM = 6.0  # on either side of a body's middle
AHEAD_MM = (2.5, 45.0)  # in front of a body
BESIDE_MM = 45.0  # on either side of the midplane: vessels
KIDNEY_OUT_MM = (32.0, 95.0)  # beside the midplane
KIDNEY_BACK_MM = (-35.0, 35.0)  # about the body's middle
KIDNEY_LEVELS = (32, 31, 30, 29)
AIR_HU, BONE_HU = -300.0, 450.0  # a spot that holds more than a little of either is neither vessel nor kidney
FEWEST_LEVELS = 2
FOREIGN_SHARE = 0.1
ARTERIAL_RATIO = 1.4  # arteries over kidneys, above which the veins have not filled yet


@dataclass(frozen=True)
class Region:
    """Where to look: places along the left and the posterior axis, mm, and the width of what is looked for."""

    across: FloatArray
    along: FloatArray
    spot_mm: float


@dataclass(frozen=True)
class Enhancement:
    """The brightest spots, HU; None where the region is not in view at enough levels."""

    vessels_hu: float | None
    kidneys_hu: float | None


def measure_enhancement(hu: HuArray, affine: FloatArray, labels: Labels, bodies: Mapping[int, Body]) -> Enhancement:
    """What lies where the vessels and the kidneys do: the median over the levels, so that one cannot decide."""
    ahead = [_brightest(hu, affine, labels, body, _ahead(body)) for body in bodies.values()]
    beside = [
        [_brightest(hu, affine, labels, body, _beside(side)) for side in (-1.0, 1.0)]
        for label, body in bodies.items()
        if label in KIDNEY_LEVELS
    ]
    vessels = [value for value in ahead if value is not None]
    kidneys = sorted(max(seen) for sides in beside if (seen := [value for value in sides if value is not None]))
    return Enhancement(
        vessels_hu=float(np.median(vessels)) if len(vessels) >= FEWEST_LEVELS else None,
        kidneys_hu=kidneys[-2] if len(kidneys) >= FEWEST_LEVELS else None,
    )


def phase(found: Enhancement, policy: FindingsPolicy) -> str | None:
    """ "native", "arterial", "portal" or, where only one region is in view, "enhanced"; None where neither is."""
    vessels, kidneys = found.vessels_hu, found.kidneys_hu
    if vessels is None and kidneys is None:
        return None
    by_vessels = vessels is not None and vessels >= policy.contrast_vessel_hu
    by_kidneys = kidneys is not None and kidneys >= policy.contrast_kidney_hu
    if not by_vessels and not by_kidneys:
        return NATIVE
    if vessels is None or kidneys is None:
        return ENHANCED
    return ARTERIAL if vessels > ARTERIAL_RATIO * kidneys else PORTAL


def _ahead(body: Body) -> Region:
    """Where vessels lie."""
    across = np.arange(-BESIDE_MM, BESIDE_MM + 0.1, STEP_MM)
    return Region(across, body.front_mm - np.arange(AHEAD_MM[1], AHEAD_MM[0] - 0.1, -STEP_MM), VESSEL_MM)


def _beside(side: float) -> Region:
    """Where the left (1) or the right (-1) kidney lies."""
    return Region(side * np.arange(*KIDNEY_OUT_MM, STEP_MM), np.arange(*KIDNEY_BACK_MM, STEP_MM), KIDNEY_MM)


def _brightest(hu: HuArray, affine: FloatArray, labels: Labels, body: Body, region: Region) -> float | None:
    """The highest median over spots of soft tissue; None where less than half of the region is in the CT."""
    up = np.arange(-SLAB_MM, SLAB_MM + 0.1, STEP_MM)
    local = np.stack(np.meshgrid(up, region.along, region.across, indexing="ij")[::-1], axis=-1)
    points = body.vertebra.frame.to_lps(local)  # [up, along, across, 3]
    index = np.rint((points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T).astype(int)
    inside = ((index >= 0) & (index < hu.shape)).all(axis=-1)
    if inside.mean() < 0.5:
        return None
    bone = np.zeros(inside.shape, dtype=np.bool_)
    bone[inside] = labels[tuple(index[inside].T)] > 0
    plane = np.median(sample_hu(hu, affine, points), axis=0)  # [along, across]
    foreign = (bone | ~inside).any(axis=0) | (plane < AIR_HU) | (plane > BONE_HU)
    spot = _disc(region.spot_mm / 2 / STEP_MM)
    share = ndimage.convolve(foreign.astype(np.float32), spot / spot.sum(), mode="constant", cval=1.0)
    judged = share <= FOREIGN_SHARE
    medians = ndimage.median_filter(plane, footprint=spot, mode="nearest")
    return float(medians[judged].max()) if judged.any() else None


def _disc(radius: float) -> npt.NDArray[np.float32]:
    grid = np.arange(-int(radius), int(radius) + 1)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    return np.asarray(y**2 + x**2 <= radius**2, dtype=np.float32)
