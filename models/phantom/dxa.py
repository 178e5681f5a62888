"""The DXA of a digital patient: an antero-posterior projection of the very mineral map that the CT shows.

Areal density of a pixel = sum over AP of mg/cm3 x dy (cm) / 1000 = g/cm2, on pixels of about 0.6 x 1.05 mm
(Lunar Prodigy; general knowledge). The simulated TBS is the slope of the log variogram near its origin
(Pothuaud 2008; as in the open code "bonebox"), after an affine recalibration; it is never a measured TBS.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from models.phantom.anatomy import LEVELS, Patient, Vertebra
from models.phantom.grid import Array, Grid
from models.phantom.spine import Skeleton, back_wall, spine_bounds, spine_into

PIXEL_MM = (1.05, 0.6)  # along the spine, across
DEPTH_STEP_MM = 1.2
RADIUS_MM = 3.7  # neighbourhood of the variogram: 6 pixels across, 3 along
# affine recalibration of the variogram's slope, chosen once on drawn patients for a mean of 1.36 (0.13)
TBS_SLOPE, TBS_OFFSET = 1.2, -0.56


@dataclass(frozen=True)
class DxaLevel:
    """One vertebra as a densitometer would report it."""

    bmd_g_cm2: float
    bmc_g: float
    area_cm2: float
    tbs: float  # simulated


@dataclass(frozen=True)
class Dxa:
    """L1 to L4. Patient values are the means of the levels, as in the paper; the device's is beside them."""

    levels: dict[str, DxaLevel]

    @property
    def bmd_g_cm2(self) -> float:
        """Mean of the four levels."""
        return float(np.mean([v.bmd_g_cm2 for v in self.levels.values()]))

    @property
    def bmd_device_g_cm2(self) -> float:
        """Sum of content over sum of area."""
        return sum(v.bmc_g for v in self.levels.values()) / sum(v.area_cm2 for v in self.levels.values())

    @property
    def tbs(self) -> float:
        """Mean of the four levels, simulated."""
        return float(np.mean([v.tbs for v in self.levels.values()]))


def projection_grid(patient: Patient) -> Grid:
    """The box that is projected: L1-L4, with room for what overlaps them."""
    low, high = spine_bounds(patient, "L1", "L4")
    spacing = (PIXEL_MM[0], DEPTH_STEP_MM, PIXEL_MM[1])
    return Grid.covering((low[0] - 3, low[1] - 3, low[2]), (high[0] + 3, high[1] + 3, high[2] + 3), spacing)


def measure(patient: Patient) -> Dxa:
    """Areal density, content, area and simulated TBS of L1-L4."""
    grid = projection_grid(patient)
    skeleton = Skeleton.empty(grid)
    spine_into(skeleton, patient)
    areal = project(skeleton.mineral, grid)
    return Dxa({name: _level(patient.vertebra(name), areal, skeleton, grid) for name in LEVELS})


def project(mineral: Array, grid: Grid) -> Array:
    """Areal density, g/cm2, (nk, ni)."""
    return np.asarray(mineral.sum(axis=1) * np.float32(grid.spacing_kji_mm[1] / 10 / 1000), dtype=np.float32)


def _level(v: Vertebra, areal: Array, skeleton: Skeleton, grid: Grid) -> DxaLevel:
    region = _region(v, skeleton, grid)
    pixel_cm2 = grid.spacing_kji_mm[0] * grid.spacing_kji_mm[2] / 100
    area = float(region.sum()) * pixel_cm2
    content = float(areal[region].sum(dtype=np.float64)) * pixel_cm2
    core = ndimage.binary_erosion(region, iterations=4)
    slope = variogram_slope(areal, core if core.sum() > 200 else region, grid)
    return DxaLevel(content / area, content, area, TBS_OFFSET + TBS_SLOPE * slope)


def _region(v: Vertebra, skeleton: Skeleton, grid: Grid) -> NDArray[np.bool_]:
    """The level's region, (nk, ni): its body's shadow, from disc to disc, without transverse processes."""
    z, _, x = grid.axes()
    m = v.frame.matrix
    cx, _, cz = v.frame.center
    # in-plane coordinates of the projected body: along its own axes, seen from the front
    across = m[0, 0] * (x[None, :] - cx) + m[2, 0] * (z[:, None] - cz)
    along = m[0, 2] * (x[None, :] - cx) + m[2, 2] * (z[:, None] - cz)
    near = (np.abs(across) < 0.53 * v.width + 1) & (np.abs(along) < 0.5 * v.height + 1.5)
    shadow = (skeleton.labels == v.label).any(axis=1)
    return np.asarray(near & shadow)


def variogram_slope(areal: Array, region: NDArray[np.bool_], grid: Grid) -> float:
    """Slope of ln V against ln k (mm), fitted at every pixel, then averaged over a region.

    V(k) at a pixel is the mean squared difference to the pixels k away on either side, along and across the
    spine, up to RADIUS_MM.
    """
    lags, logs = [], []
    for axis, pixel in ((0, grid.spacing_kji_mm[0]), (1, grid.spacing_kji_mm[2])):
        for k in range(1, int(RADIUS_MM / pixel) + 1):
            ahead = (np.roll(areal, k, axis) - areal) ** 2
            back = (np.roll(areal, -k, axis) - areal) ** 2
            lags.append(np.log(k * pixel))
            logs.append(np.log(0.5 * (ahead + back)[region] + np.float32(1e-6)))
    centred = np.asarray(lags) - np.mean(lags)
    weights = (centred / np.sum(centred**2)).astype(np.float32)
    return float(np.tensordot(weights, np.stack(logs), axes=1).mean())


def posterior_share(patient: Patient) -> float:
    """Share of L3's content that lies behind its body (for tests and for looking)."""
    grid = projection_grid(patient)
    skeleton = Skeleton.empty(grid)
    spine_into(skeleton, patient)
    v = patient.vertebra("L3")
    own = skeleton.labels == v.label
    _, y, _ = grid.axes()
    behind = y > v.frame.to_lps((0.0, back_wall(v), 0.0))[1]
    return float((skeleton.mineral * own)[:, behind].sum() / (skeleton.mineral * own).sum())
