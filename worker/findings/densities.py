"""What is denser in a vertebra than bone is: metal, cement, and endplates gone hard with wear.

Metal is looked for in the vertebra and close around it, for rods and screw heads lie outside of the bone and throw
their streaks into it. Cement and sclerosis are looked for in the body's own frame, away from its walls: cement as a
lump in the core, sclerosis as bone under an endplate that is much denser than the middle of the same body.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from models.crop import sample_hu
from service.domain.policy import FindingsPolicy
from worker.findings.bodies import ACROSS, ALONG, HALF_HEIGHT_MM, Body, FloatArray, HuArray, Labels

CORE_ACROSS_MM = 14.0  # on either side of the midplane
CORE_ALONG = (0.12, 0.88)  # of the depth
CORE_DEPTH_MM = 4.0  # below either endplate: deeper than a bony endplate smeared over a 3 mm slice
LAYER_MM = (3.5, 7.5)  # below an endplate: where sclerosis shows and the endplate itself no longer does
MIDDLE = 0.15  # on either side of half height, as a share of it: the body's middle


@dataclass(frozen=True)
class Densities:
    """Volumes of metal and cement, and by how much the bone under the denser endplate exceeds the body's middle."""

    metal_mm3: float
    cement_mm3: float
    sclerosis_hu: float


def measure_densities(hu: HuArray, affine: FloatArray, labels: Labels, body: Body, policy: FindingsPolicy) -> Densities:
    """Metal, cement and sclerosis of one vertebra."""
    points, height, cell_mm3 = _core_points(body)
    values = sample_hu(hu, affine, body.vertebra.frame.to_lps(points).astype(np.float64))
    deep = np.minimum(body.upper_mm[..., None] - height, height - body.lower_mm[..., None])
    cement = (deep >= CORE_DEPTH_MM) & _inner(body)[..., None] & (values > policy.cement_hu)
    metal = _metal_mm3(hu, affine, labels, body, policy)
    return Densities(metal, float(cement.sum()) * cell_mm3, _sclerosis_hu(body, values, height))


def _inner(body: Body) -> npt.NDArray[np.bool_]:
    """Which of a body's lines [across, along] run through its core."""
    along = (CORE_ALONG[0] <= ALONG) & (CORE_ALONG[1] >= ALONG)
    seen = np.isfinite(body.upper_mm) & np.isfinite(body.lower_mm)
    inner: npt.NDArray[np.bool_] = seen & (np.abs(ACROSS) <= CORE_ACROSS_MM)[:, None] & along
    return inner


def _core_points(body: Body) -> tuple[FloatArray, FloatArray, float]:
    """Points [across, along, up, 3] of the body, their place along its axis, and the volume that each stands for."""
    up = np.arange(-HALF_HEIGHT_MM, HALF_HEIGHT_MM + 0.5, 1.0)
    depth = body.front_mm + ALONG * (body.back_mm - body.front_mm)
    points = np.stack(np.meshgrid(ACROSS, depth, up, indexing="ij"), axis=-1)
    cell = float((ACROSS[1] - ACROSS[0]) * (depth[1] - depth[0]) * (up[1] - up[0]))
    return points, points[..., 2], cell


def _sclerosis_hu(body: Body, values: HuArray, height: FloatArray) -> float:
    """Mean HU under the denser endplate less that of the body's middle."""
    inner = _inner(body)[..., None]
    upper, lower = body.upper_mm[..., None], body.lower_mm[..., None]
    middle = inner & (np.abs(height - (upper + lower) / 2) <= MIDDLE * (upper - lower))
    layers = [
        inner & (depth >= LAYER_MM[0]) & (depth <= LAYER_MM[1]) & (depth <= (upper - lower) / 2)
        for depth in (upper - height, height - lower)
    ]
    if not middle.any() or not all(layer.any() for layer in layers):
        return 0.0
    return float(max(values[layer].mean() for layer in layers) - values[middle].mean())


def _metal_mm3(hu: HuArray, affine: FloatArray, labels: Labels, body: Body, policy: FindingsPolicy) -> float:
    """Volume above the limit in the vertebra and close around it."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    grow = np.ceil(policy.metal_near_mm / spacing).astype(int)
    box = tuple(
        slice(max(0, side.start - more), min(size, side.stop + more))
        for side, more, size in zip(body.vertebra.box, grow, hu.shape, strict=True)
    )
    metal = hu[box] > policy.metal_hu
    if not metal.any():
        return 0.0
    near = ndimage.distance_transform_edt(labels[box] != body.label, sampling=spacing) <= policy.metal_near_mm
    return float((metal & near).sum() * abs(np.linalg.det(affine[:3, :3])))
