"""A hand-made vertebra whose frame, body and HU are known exactly."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

L2 = 30
SHAPE_MM = (90.0, 120.0, 110.0)  # z, y, x
AFFINE = np.array(  # (k, j, i) -> LPS
    [[0, 0, 1.0, -55.0], [0, 1.0, 0, -40.0], [1.5, 0, 0, 600.0], [0, 0, 0, 1.0]], dtype=np.float64
)

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Block:
    """Volume [k, j, i], its labels (only L2), the true body, and the body's true centre."""

    hu: npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint8]
    affine: Vector
    body: npt.NDArray[np.bool_]
    centre: Vector


def rotation(yaw_deg: float = 0.0, tilt_deg: float = 0.0, bend_deg: float = 0.0) -> Vector:
    """Columns: the turned left, posterior and superior axes in LPS."""
    yaw, tilt, bend = np.radians([yaw_deg, tilt_deg, bend_deg])
    about_z = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    about_y = np.array([[np.cos(bend), 0, np.sin(bend)], [0, 1, 0], [-np.sin(bend), 0, np.cos(bend)]])
    turned: Vector = about_x @ about_y @ about_z
    return turned


def lps_grid(shape: tuple[int, ...], affine: Vector) -> Vector:
    """LPS of every voxel [k, j, i, 3]."""
    indices = np.stack(np.meshgrid(*[np.arange(size) for size in shape], indexing="ij"), axis=-1)
    grid: Vector = indices @ affine[:3, :3].T + affine[:3, 3]
    return grid


def make_block(turn: Vector, spacing: tuple[float, float, float] = (1.5, 1.0, 1.0)) -> Block:
    """Body 44 x 34 x 27 mm, pedicles, arch, transverse processes 70 mm, spinous process to 68 mm behind.

    Bone is 150 HU, 50 more at the upper endplate and 50 less at the lower; everything else is -300.
    """
    return _make_block(tuple(turn.ravel().round(12)), spacing)


@cache
def _make_block(turn: tuple[float, ...], spacing: tuple[float, float, float]) -> Block:
    axes = np.array(turn).reshape(3, 3)
    affine = AFFINE.copy()
    affine[:3, :3] = AFFINE[:3, :3] / (1.5, 1.0, 1.0) * spacing
    shape = tuple(int(mm / step) for mm, step in zip(SHAPE_MM, spacing, strict=True))
    centre = np.array([2.3, 5.7, 646.2])
    local = (lps_grid(shape, affine) - centre) @ axes  # left, posterior, superior
    left, back, up = np.abs(local[..., 0]), local[..., 1], local[..., 2]
    body = ((left / 22) ** 4 + (np.abs(back) / 17) ** 4 <= 1) & (np.abs(up) <= 13.5)
    pedicle = (np.abs(left - 15) <= 4) & (back > 14) & (back <= 32) & (np.abs(up - 5) <= 7)
    arch = (left <= 19) & (np.abs(back - 35 - 0.15 * left) <= 4) & (np.abs(up + 2) <= 11)
    transverse = (left > 15) & (left <= 35) & (np.abs(back - 29) <= 4) & (np.abs(up - 3) <= 5)
    spinous = (left <= 3) & (back > 35) & (back <= 68) & (np.abs(up + 6) <= 9)
    vertebra = body | pedicle | arch | transverse | spinous
    hu = np.where(vertebra, 150.0 + 50.0 * np.clip(up / 13.5, -1, 1), -300.0).astype(np.float32)
    labels = np.where(vertebra, L2, 0).astype(np.uint8)
    true_body = body & vertebra
    return Block(hu, labels, affine, true_body, centre)
