"""Implicit shapes with soft edges: how much of each voxel lies inside a rod or an ellipsoid.

Every shape is evaluated only inside the sub-grid that its own bounding box cuts out. Edges fall linearly over
one voxel's support along the surface normal, so that volumes and thin shells keep their mass on coarse grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.phantom.grid import Array, Grid, Vec3, Window, window


@dataclass(frozen=True)
class Frame:
    """A local coordinate system: x left, y posterior, z up before it is turned."""

    center: Vec3
    angles_rad: Vec3 = (0.0, 0.0, 0.0)  # about x (sagittal tilt), y (coronal bend), z (axial rotation)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """3x3; columns are the local axes in LPS."""
        return rotation(*self.angles_rad)

    def to_lps(self, point: Vec3) -> Vec3:
        """A local point in LPS mm."""
        return as_vec3(np.asarray(self.center) + self.matrix @ np.asarray(point))

    def local(self, w: Window) -> tuple[Array, Array, Array]:
        """Local x, y, z of every voxel in a window, each (nk, nj, ni)."""
        m = self.matrix.astype(np.float32)
        dx, dy, dz = (a - np.float32(c) for a, c in zip((w.x, w.y, w.z), self.center, strict=True))
        out = [(m[0, n] * dx + m[1, n] * dy) + m[2, n] * dz for n in range(3)]
        return out[0], out[1], out[2]

    def support_mm(self, grid: Grid) -> Vec3:
        """Width of one voxel seen along each local axis."""
        sk, sj, si = grid.spacing_kji_mm
        return as_vec3(np.sqrt((self.matrix.T**2) @ np.array([si, sj, sk]) ** 2))


def rotation(about_x: float, about_y: float, about_z: float) -> NDArray[np.float64]:
    """Rz @ Ry @ Rx, angles in radians."""
    cx, cy, cz = np.cos([about_x, about_y, about_z])
    sx, sy, sz = np.sin([about_x, about_y, about_z])
    rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(rz @ ry @ rx, dtype=np.float64)


def as_vec3(values: NDArray[np.float64]) -> Vec3:
    """Three floats as a tuple."""
    return float(values[0]), float(values[1]), float(values[2])


def soft(distance: Array, width: float) -> Array:
    """Occupancy 0..1 of voxels at a signed `distance` (mm, negative inside) for edges `width` mm wide."""
    out = distance * np.float32(-1.0 / width)
    out += np.float32(0.5)
    return np.asarray(np.clip(out, 0, 1, out=out))


def box_window(grid: Grid, frame: Frame, low: Vec3, high: Vec3) -> Window | None:
    """The sub-grid around a local box."""
    corners = np.array([[a, b, c] for a in (low[0], high[0]) for b in (low[1], high[1]) for c in (low[2], high[2])])
    lps = corners @ frame.matrix.T + np.asarray(frame.center)
    pad = np.array(grid.spacing_kji_mm[::-1])
    return window(grid, as_vec3(lps.min(0) - pad), as_vec3(lps.max(0) + pad))


@dataclass(frozen=True)
class Rod:
    """A capsule with an elliptical cross-section that may taper; start == end makes it an ellipsoid."""

    start: Vec3
    end: Vec3
    radii: Vec3
    taper: float = 1.0  # radius at `end` over radius at `start`

    def window(self, grid: Grid, frame: Frame) -> Window | None:
        """The sub-grid that can hold any of it."""
        radii = np.asarray(self.radii) * max(1.0, self.taper)
        ends = np.array([self.start, self.end])
        return box_window(grid, frame, as_vec3(ends.min(0) - radii), as_vec3(ends.max(0) + radii))

    def distance(self, local: tuple[Array, Array, Array]) -> Array:
        """Signed distance along the ray from the axis, mm (exact on the surface), (nk, nj, ni)."""
        radii = np.asarray(self.radii, dtype=np.float32)
        axis = (np.asarray(self.end, dtype=np.float32) - np.asarray(self.start, dtype=np.float32)) / radii
        u = [(c - np.float32(s)) / r for c, s, r in zip(local, self.start, radii, strict=True)]
        length2 = float(axis @ axis)
        limit: Array | np.float32 = np.float32(1.0)
        if length2 > 1e-9:
            t = (u[0] * axis[0] + u[1] * axis[1] + u[2] * axis[2]) * np.float32(1 / length2)
            np.clip(t, 0, 1, out=t)
            for n in range(3):
                if axis[n] != 0:
                    u[n] -= t * axis[n]
            if self.taper != 1.0:
                limit = 1 + np.float32(self.taper - 1) * t
        squares = [v * v for v in u]
        scaled = np.sqrt(squares[0] + squares[1] + squares[2]) + np.float32(1e-6)
        mm = np.sqrt(squares[0] * radii[0] ** 2 + squares[1] * radii[1] ** 2 + squares[2] * radii[2] ** 2)
        mm = np.maximum(mm, np.float32(0.5 * float(radii.min())) * scaled)
        return np.asarray((1 - limit / scaled) * mm, dtype=np.float32)
