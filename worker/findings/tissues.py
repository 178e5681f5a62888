"""Reference tissues: what fat and muscle near the spine read, for watching a scanner (service.domain.drift).

Neither tells anything about the bone. But their HU hardly differ between people, so a scanner whose calibration, tube
voltage or reconstruction has changed shows in them long before any DXA result could tell. Nobody outlines them: the HU
about each lumbar body have two heaps, one of fat and one of muscle, and a heap's place needs no outline.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from models.crop import sample_hu
from worker.findings.bodies import Body, FloatArray, HuArray, Labels

STEP_MM = 2.5
SLAB_MM = 5.0  # on either side of a body's middle; the median over it quiets the noise
BESIDE_MM = 70.0  # on either side of the midplane
AHEAD_MM, BEHIND_MM = 40.0, 85.0  # of the body's front: vessels, psoas, the muscles of the back
LEVELS = (31, 30, 29, 28)
FAT_HU, MUSCLE_HU = (-150.0, -40.0), (15.0, 100.0)  # where each heap is looked for
SMOOTHING_HU, NEAR_HU = 6.0, 15.0
FEWEST = 300  # pixels of a heap


def reference_tissues(
    hu: HuArray, affine: FloatArray, labels: Labels, bodies: Mapping[int, Body]
) -> tuple[float | None, float | None]:
    """HU of fat and of muscle about L1 to L4; None where too little of it is in view."""
    seen = [_around(hu, affine, labels, body) for label, body in bodies.items() if label in LEVELS]
    values = np.concatenate(seen) if seen else np.empty(0, np.float32)
    return _heap(values, FAT_HU), _heap(values, MUSCLE_HU)


def _around(hu: HuArray, affine: FloatArray, labels: Labels, body: Body) -> HuArray:
    """The HU [n] beside, before and behind one body, without bone and what lies outside of the CT."""
    across = np.arange(-BESIDE_MM, BESIDE_MM + 0.1, STEP_MM)
    along = body.front_mm + np.arange(-AHEAD_MM, BEHIND_MM + 0.1, STEP_MM)
    up = np.arange(-SLAB_MM, SLAB_MM + 0.1, STEP_MM)
    local = np.stack(np.meshgrid(up, along, across, indexing="ij")[::-1], axis=-1)
    points = body.vertebra.frame.to_lps(local)  # [up, along, across, 3]
    index = np.rint((points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T).astype(int)
    inside = ((index >= 0) & (index < hu.shape)).all(axis=-1)
    bone = np.zeros(inside.shape, dtype=np.bool_)
    bone[inside] = labels[tuple(index[inside].T)] > 0
    kept = inside.all(axis=0) & ~bone.any(axis=0)
    plane = np.median(sample_hu(hu, affine, points), axis=0)
    return np.asarray(plane[kept], dtype=np.float32)


def _heap(values: HuArray, within: tuple[float, float]) -> float | None:
    """Where a heap of values lies: the mean about its highest point; None where there is no heap."""
    edges = np.arange(within[0] - 30.0, within[1] + 31.0, 1.0)
    counts = np.histogram(values, edges)[0].astype(np.float64)
    smooth = ndimage.gaussian_filter1d(counts, SMOOTHING_HU, mode="nearest")
    centres = (edges[:-1] + edges[1:]) / 2
    looked = (centres > within[0]) & (centres < within[1])
    top = int(np.argmax(np.where(looked, smooth, -1.0)))
    if not looked[top - 1] or not looked[top + 1]:  # at the rim: the slope of something else
        return None
    place = float(centres[top])
    for _ in range(3):
        near = values[np.abs(values - place) <= NEAR_HU]
        if near.size < FEWEST:
            return None
        place = float(near.mean())
    return place
