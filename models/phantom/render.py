"""From a patient to voxels: mineral, noise-free HU and labels on any axis-aligned grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.phantom.anatomy import Patient
from models.phantom.body import MARROW_GAIN, tissue
from models.phantom.grid import Array, Grid
from models.phantom.implants import implants_into
from models.phantom.spine import skeleton_of, spine_bounds

# HU per mg/cm3 of hydroxyapatite. 1.43 of ash at 120 kVp in print (PMC5234499, table 1); the ratios give the few
# per cent by which L1 falls at 140 and rises at 100 kVp (DOMAIN.md, AAPM 2026). Approximation.
HU_PER_MG_CM3 = {80: 1.86, 100: 1.56, 120: 1.40, 140: 1.28}
WATERY_MARROW_HU, FATTY_MARROW_HU = 45.0, -95.0  # approximation


@dataclass(frozen=True)
class Rendered:
    """One patient on one grid; arrays are [k, j, i]."""

    grid: Grid
    mineral_mg_cm3: Array
    hu_noise_free: Array
    labels: NDArray[np.uint8]  # TotalSegmentator `total` ids

    @property
    def affine(self) -> NDArray[np.float64]:
        """(k, j, i, 1) to LPS mm."""
        return self.grid.affine


def render(patient: Patient, grid: Grid) -> Rendered:
    """Mineral, HU before any scanner, and labels."""
    if grid.tilt_deg:
        return _tilted(patient, grid)
    skeleton = skeleton_of(patient, grid)
    hu = tissue(patient, grid)
    gain = np.float32(HU_PER_MG_CM3[patient.acquisition.kvp])
    fat = patient.bone.marrow_fat
    marrow = np.float32(
        fat * FATTY_MARROW_HU + (1 - fat) * WATERY_MARROW_HU + MARROW_GAIN[patient.acquisition.contrast_phase]
    )
    for k in range(grid.shape_kji[0]):
        hu[k] += skeleton.bone[k] * (marrow - hu[k]) + gain * skeleton.mineral[k]
    implants_into(hu, patient, grid)
    return Rendered(grid, skeleton.mineral, hu, skeleton.labels)


def _tilted(patient: Patient, grid: Grid) -> Rendered:
    """Slices that lean: an upright volume, twice as fine along z where slices are thick, sampled along them."""
    place = _upright_row_z(grid)  # (nk, nj)
    nk, nj, ni = grid.shape_kji
    sk, sj, si = grid.spacing_kji_mm
    x, y, _ = grid.origin_lps
    low, step = float(place.min()), min(sk, max(1.0, sk / 2))
    count = int(np.ceil((float(place.max()) - low) / step)) + 2
    row = sj * float(np.cos(np.radians(grid.tilt_deg)))
    upright = render(patient, Grid((count, nj, ni), (step, row, si), (x, y, low)))
    at = (place - low) / step
    first = np.floor(at).astype(int)
    share = (at - first).astype(np.float32)[..., None]
    rows = np.arange(nj)
    mineral, hu = np.empty(grid.shape_kji, np.float32), np.empty(grid.shape_kji, np.float32)
    labels = np.empty(grid.shape_kji, np.uint8)
    for k in range(nk):
        for source, target in ((upright.mineral_mg_cm3, mineral), (upright.hu_noise_free, hu)):
            below = source[first[k], rows]
            target[k] = below + share[k] * (source[first[k] + 1, rows] - below)
        labels[k] = upright.labels[np.rint(at[k]).astype(int), rows]
    return Rendered(grid, mineral, hu, labels)


def _upright_row_z(grid: Grid) -> NDArray[np.float64]:
    """z of every row of every slice, mm, (nk, nj)."""
    nk, nj, _ = grid.shape_kji
    affine = grid.affine
    return np.asarray(affine[2, 3] + affine[2, 0] * np.arange(nk)[:, None] + affine[2, 1] * np.arange(nj))


def lumbar_grid(
    patient: Patient, spacing_mm: float, first: str = "T12", last: str = "S1", margin_mm: float = 12.0
) -> Grid:
    """An isotropic grid around the vertebrae `first` (cranial) to `last`, posterior elements included."""
    low, high = spine_bounds(patient, first, last)
    m = margin_mm
    return Grid.covering(
        (low[0] - m, low[1] - m, low[2] - m), (high[0] + m, high[1] + m, high[2] + m), (spacing_mm,) * 3
    )


def body_grid(
    patient: Patient, spacing_mm: float, first: str = "T11", last: str = "S1", margin_mm: float = 20.0
) -> Grid:
    """An isotropic grid around the whole torso, along z from `first` to `last` (and what hangs below)."""
    low, high = spine_bounds(patient, first, last)
    t = patient.torso
    wide = t.half_width + max(t.hip_widening, t.chest_widening, 0.0) + 10
    deep = t.half_depth + 10 + 8
    x, y, _ = t.center
    return Grid.covering(
        (x - wide, y - deep, low[2] - margin_mm), (x + wide, y + deep, high[2] + margin_mm), (spacing_mm,) * 3
    )


def native_grid(patient: Patient) -> Grid:
    """The CT's own grid: 512 x 512 over the field of view, slices over the coverage that was asked for."""
    a = patient.acquisition
    bottom, top = coverage_z(patient)
    count = max(2, int(np.ceil((top - bottom) / a.slice_mm)) + 1)
    pixel = a.fov_mm / 512
    x, y, _ = patient.torso.center
    lean = np.radians(a.tilt_deg)
    front = y + 12 - 255.5 * pixel * float(np.cos(lean))
    # tilted slices pass through the coverage where the spine is
    lift = (patient.vertebra("L3").frame.center[1] - front) * float(np.tan(lean))
    corner = (x - 255.5 * pixel, front, bottom + lift)
    return Grid((count, 512, 512), (a.slice_mm, pixel, pixel), corner, a.tilt_deg)


def coverage_z(patient: Patient) -> tuple[float, float]:
    """Lowest and highest slice position (z, mm).

    A lumbar level on top is seen whole, its articular processes too, and little of the level above it; from T12
    upwards 12 mm more are scanned, as a whole abdomen would be.
    """
    first, last = patient.acquisition.coverage
    top = spine_bounds(patient, first, first)[1][2] + (12.0 if first[0] == "T" else 1.0)
    bottom = spine_bounds(patient, last, last)[0][2] - (20.0 if last == "S1" else 4.0)
    return bottom, top
