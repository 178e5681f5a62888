"""Axis-aligned sampling grids in patient space (LPS, mm) and windows into them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Vec3 = tuple[float, float, float]
Slices = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Grid:
    """Where voxels lie: [k, j, i] run along z (superior), y (posterior) and x (left)."""

    shape_kji: tuple[int, int, int]
    spacing_kji_mm: Vec3
    origin_lps: Vec3  # centre of voxel (0, 0, 0): x, y, z
    tilt_deg: float = 0.0  # rows go down towards the back by it, while slices still follow z: a tilted gantry

    @property
    def affine(self) -> NDArray[np.float64]:
        """4x4, maps (k, j, i, 1) to (x, y, z, 1) in LPS mm."""
        sk, sj, si = self.spacing_kji_mm
        x, y, z = self.origin_lps
        back, down = self.row_direction[1:]
        return np.array([[0, 0, si, x], [0, sj * back, 0, y], [sk, sj * down, 0, z], [0, 0, 0, 1]], dtype=np.float64)

    @property
    def row_direction(self) -> Vec3:
        """The unit vector, LPS, from a row to the next."""
        if not self.tilt_deg:
            return 0.0, 1.0, 0.0
        lean = np.radians(self.tilt_deg)
        return 0.0, float(np.cos(lean)), -float(np.sin(lean))

    def axes(self) -> tuple[Array, Array, Array]:
        """Voxel centres along z, y and x, in mm; only an upright grid has them."""
        if self.tilt_deg:
            raise ValueError("the slices of a tilted gantry do not lie along z and y")
        x, y, z = self.origin_lps
        starts = (z, y, x)
        return (
            _axis(starts[0], self.spacing_kji_mm[0], self.shape_kji[0]),
            _axis(starts[1], self.spacing_kji_mm[1], self.shape_kji[1]),
            _axis(starts[2], self.spacing_kji_mm[2], self.shape_kji[2]),
        )

    @classmethod
    def covering(cls, low: Vec3, high: Vec3, spacing_kji_mm: Vec3) -> Grid:
        """The smallest grid of this spacing whose voxel centres reach from `low` to `high` (x, y, z)."""
        extent_kji = (high[2] - low[2], high[1] - low[1], high[0] - low[0])
        counts = [max(1, int(np.ceil(e / s)) + 1) for e, s in zip(extent_kji, spacing_kji_mm, strict=True)]
        return cls((counts[0], counts[1], counts[2]), spacing_kji_mm, low)


def _axis(start: float, step: float, count: int) -> Array:
    return (start + step * np.arange(count)).astype(np.float32)


@dataclass(frozen=True)
class Window:
    """A box of a grid: its slices and its open (broadcastable) coordinates in LPS mm."""

    slices: Slices
    z: Array  # (nk, 1, 1)
    y: Array  # (1, nj, 1)
    x: Array  # (1, 1, ni)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(nk, nj, ni)."""
        return self.z.size, self.y.size, self.x.size

    def relative_to(self, outer: Window) -> Slices:
        """This window's slices inside an array that covers `outer`."""
        a, b, c = (slice(s.start - o.start, s.stop - o.start) for s, o in zip(self.slices, outer.slices, strict=True))
        return a, b, c


def window(grid: Grid, low: Vec3, high: Vec3) -> Window | None:
    """The part of `grid` inside the box `low`..`high` (x, y, z), or None where they do not meet."""
    x, y, z = grid.origin_lps
    spans = []
    for start, step, count, lo, hi in zip(
        (z, y, x), grid.spacing_kji_mm, grid.shape_kji, low[::-1], high[::-1], strict=True
    ):
        first = max(0, int(np.floor((lo - start) / step)))
        last = min(count, int(np.ceil((hi - start) / step)) + 1)
        if last <= first:
            return None
        spans.append((start, step, slice(first, last)))
    zs, ys, xs = ((s + d * np.arange(w.start, w.stop)).astype(np.float32) for s, d, w in spans)
    where = (spans[0][2], spans[1][2], spans[2][2])
    return Window(where, zs[:, None, None], ys[None, :, None], xs[None, None, :])
