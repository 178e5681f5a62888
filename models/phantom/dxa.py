"""The densitometer: an antero-posterior projection of the very mineral map that the CT shows.

Areal density of a pixel = sum over AP of mg/cm3 x dy (cm) / 1000 = g/cm2, on pixels of about 0.6 x 1.05 mm (Lunar
Prodigy; general knowledge). What a densitometer adds to it has a cause each, and each cause a dial:

* the patient lies anew, a few degrees rolled, and the operator draws the lines between the discs anew;
* soft tissue is compensated beside the spine, so fat that lies elsewhere than over the spine is read as bone or as a
  lack of it. It costs a spine scan about 0.06 g/cm2 (Tothill 2014, J Clin Densitom 17:91, and what it cites). Calcium
  in the aorta is left out: it added nothing significant (Drinka 1992, Calcif Tissue Int 50:507);
* the detector blurs and counts quanta;
* bone changes between CT and DXA (`Interval`).

The simulated TBS is the slope of the log variogram near its origin (Pothuaud 2008; as in the open code "bonebox"),
after an affine recalibration; it is never a measured TBS.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from models.phantom.anatomy import LEVELS, Patient, Vertebra
from models.phantom.body import FAT, tissue
from models.phantom.densitometer import PRODIGY, Densitometer
from models.phantom.grid import Array, Grid
from models.phantom.spine import Skeleton, back_wall, spine_bounds, spine_into

DEPTH_STEP_MM = 1.2
EDGE_SIGMA_MM = 1.5


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


@dataclass(frozen=True)
class Scan:
    """What differs from one DXA of a patient to the next."""

    number: int
    roll_rad: float
    bowel_cm: float  # fat over the spine, more than in the CT
    line_shift_mm: tuple[float, ...]  # of each level's lower, then upper line, L1 to L4
    noise_seed: int

    @classmethod
    def draw(cls, patient: Patient, number: int, device: Densitometer = PRODIGY) -> Scan:
        """The patient's `number`-th scan, counted from 0."""
        rng = np.random.default_rng([patient.seed, 5, number])
        return cls(
            number,
            float(np.radians(rng.normal(0, device.roll_sd_deg))),
            float(rng.normal(0, device.bowel_sd_cm)),
            tuple(float(shift) for shift in rng.normal(0, device.line_sd_mm, 2 * len(LEVELS))),
            int(rng.integers(2**31)),
        )


def measure(patient: Patient, number: int = 0, device: Densitometer = PRODIGY) -> Dxa:
    """Areal density, content, area and simulated TBS of L1-L4, in the patient's `number`-th scan."""
    scan = Scan.draw(patient, number, device)
    lying = patient.at_dxa().rolled(scan.roll_rad)
    grid = projection_grid(lying, device)
    skeleton = Skeleton.empty(grid)
    spine_into(skeleton, lying)
    areal = detected(project(skeleton.mineral, grid), grid, lying, scan, device)
    fat = fat_over_spine_cm(patient)
    return Dxa(
        {
            name: _level(
                lying.vertebra(name),
                areal + np.float32(device.fat_as_bone * (fat[name] + scan.bowel_cm - device.fat_usual_cm)),
                grid,
                scan.line_shift_mm[2 * n : 2 * n + 2],
                device,
            )
            for n, name in enumerate(LEVELS)
        }
    )


def projection_grid(patient: Patient, device: Densitometer = PRODIGY) -> Grid:
    """The box that is projected: L1-L4, with room for what overlaps them."""
    low, high = spine_bounds(patient, "L1", "L4")
    spacing = (device.pixel_mm[0], DEPTH_STEP_MM, device.pixel_mm[1])
    return Grid.covering((low[0] - 3, low[1] - 3, low[2]), (high[0] + 3, high[1] + 3, high[2] + 3), spacing)


def project(mineral: Array, grid: Grid) -> Array:
    """Areal density, g/cm2, (nk, ni)."""
    return np.asarray(mineral.sum(axis=1) * np.float32(grid.spacing_kji_mm[1] / 10 / 1000), dtype=np.float32)


def detected(areal: Array, grid: Grid, patient: Patient, scan: Scan, device: Densitometer) -> Array:
    """The projection as the detector sees it: blurred, with quantum noise that grows with the patient's depth."""
    sigma_px = [device.blur_mm / pixel for pixel in (grid.spacing_kji_mm[0], grid.spacing_kji_mm[2])]
    depth_cm = 2 * patient.torso.half_depth / 10
    # a beam of about 1/e in 4.5 cm of tissue, so that its noise doubles in twice ln 2 of these
    noise = device.noise_g_cm2 * float(np.exp((depth_cm - 20.0) / 9.0))
    quanta = np.random.default_rng(scan.noise_seed).standard_normal(areal.shape, dtype=np.float32)
    return np.asarray(ndimage.gaussian_filter(areal, sigma_px) + np.float32(noise) * quanta, dtype=np.float32)


def fat_over_spine_cm(patient: Patient) -> dict[str, float]:
    """Per level, how much thicker fat is over the spine than beside it (35-65 mm from its middle), cm.

    Read off the soft parts of the very patient, on a coarse grid.
    """
    x, y, _ = patient.torso.center
    deep, wide = patient.torso.half_depth + 8, 72.0
    centers = [patient.vertebra(name).frame.center for name in LEVELS]
    step = 5.0
    grid = Grid.covering(
        (x - wide, y - deep, min(c[2] for c in centers) - 12),
        (x + wide, y + deep, max(c[2] for c in centers) + 12),
        (8.0, step, step),
    )
    hu = tissue(patient, grid)
    fat = np.clip((20 - hu) / (20 - FAT), 0, 1) * (hu > -250)  # neither air nor lung nor gas
    thickness_cm = fat.sum(axis=1) * step / 10  # (nk, ni)
    heights, _, across = grid.axes()
    out = {}
    for name, center in zip(LEVELS, centers, strict=True):
        rows = np.abs(heights - center[2]) <= 12
        aside = np.abs(across - center[0])
        over, beside = thickness_cm[rows][:, aside <= 22], thickness_cm[rows][:, (aside >= 35) & (aside <= 65)]
        out[name] = float(over.mean() - beside.mean())
    return out


def _level(v: Vertebra, areal: Array, grid: Grid, lines_mm: tuple[float, ...], device: Densitometer) -> DxaLevel:
    region = _region(v, areal, grid, lines_mm, device)
    pixel_cm2 = grid.spacing_kji_mm[0] * grid.spacing_kji_mm[2] / 100
    area = float(region.sum()) * pixel_cm2
    content = float(areal[region].sum(dtype=np.float64)) * pixel_cm2
    return DxaLevel(content / area, content, area, simulated_tbs(areal, region, grid, device))


def simulated_tbs(areal: Array, region: NDArray[np.bool_], grid: Grid, device: Densitometer) -> float:
    """The recalibrated slope of the log variogram, where the cortical edges of pedicles and arches do not decide it."""
    core = ndimage.binary_erosion(region, iterations=3)
    core = core if core.sum() > 200 else region
    edges = ndimage.gaussian_gradient_magnitude(areal, [EDGE_SIGMA_MM / pixel for pixel in device.pixel_mm])
    calm = core & (edges <= np.quantile(edges[core], device.calm_share))
    fine = areal - ndimage.gaussian_filter(areal, [device.trend_mm / pixel for pixel in device.pixel_mm])
    return device.tbs_offset + device.tbs_slope * variogram_slope(fine, calm, grid, device)


def _region(
    v: Vertebra, areal: Array, grid: Grid, lines_mm: tuple[float, ...], device: Densitometer
) -> NDArray[np.bool_]:
    """The level's region, (nk, ni): between the operator's lines, within the bone's edges.

    Edges are where the density falls below a share of the level's median; transverse processes are left out.
    """
    z, _, x = grid.axes()
    m = v.frame.matrix
    cx, _, cz = v.frame.center
    # in-plane coordinates of the projected body: along its own axes, seen from the front
    across = m[0, 0] * (x[None, :] - cx) + m[2, 0] * (z[:, None] - cz)
    along = m[0, 2] * (x[None, :] - cx) + m[2, 2] * (z[:, None] - cz)
    half = 0.5 * v.height + 1.5
    near = (np.abs(across) < 0.53 * v.width + 1) & (along > -half + lines_mm[0]) & (along < half + lines_mm[1])
    smooth = ndimage.gaussian_filter(areal, 1.0)
    bone = near & (smooth > device.edge_share * np.median(smooth[near]))
    return np.asarray(ndimage.binary_fill_holes(bone))


def variogram_slope(areal: Array, region: NDArray[np.bool_], grid: Grid, device: Densitometer = PRODIGY) -> float:
    """Slope of ln V against ln k (mm), fitted at every pixel, then averaged over a region.

    V(k) at a pixel is the mean squared difference to the pixels k away on either side, along and across the
    spine, up to the device's `radius_mm`.
    """
    lags, logs = [], []
    for axis, pixel in ((0, grid.spacing_kji_mm[0]), (1, grid.spacing_kji_mm[2])):
        for k in range(1, int(device.radius_mm / pixel) + 1):
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
