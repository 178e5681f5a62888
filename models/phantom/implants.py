"""Cement and pedicle screws: what the CT shows beside bone, and the streaks that metal throws.

Streaks come as in a scanner: beam hardening leaves the longest paths through metal too bright on the detector, few
photons make them noisy, and filtered back-projection spreads both over the slice (de Man 1999, IEEE Trans Nucl Sci
46:691). Their strength is an approximation, chosen to look like a lumbar fusion at 120 kVp without a metal filter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from models.phantom.anatomy import Cement, Patient
from models.phantom.geometry import Frame, Rod, as_vec3, soft
from models.phantom.grid import Array, Grid, Vec3, Window
from models.phantom.lesions import hardware_points
from models.phantom.spine import body_of, texture_lattice

METAL_HU = 8000.0  # titanium on an extended scale; the scanner stops at 3071
SEEPING_MM, CEMENT_UNEVENNESS = 0.9, 0.12  # standard deviations
ROD_RADIUS_MM = 2.75
STUB_MM = 14.0  # how far the rods reach past the last screws
HARDENING_PER_MM = 0.006  # share of a path's metal that the detector misses, per mm of metal on it
STARVATION = 0.010  # noise of a path, mm of metal per mm of metal on it
STREAK_PIXEL_MM, ANGLES = 1.4, 120


def implants_into(hu: Array, patient: Patient, grid: Grid) -> None:
    """Lay cement, then metal with its streaks, into noise-free HU (nk, nj, ni), in place."""
    for cement in patient.lesions.cement:
        _cement_into(hu, cement, patient, grid)
    metal = _metal(patient, grid)
    if metal is None:
        return
    hu += metal * (np.float32(METAL_HU) - hu)
    grain = np.random.default_rng(patient.lesions.hardware[0].seed)
    for k in np.flatnonzero(metal.max(axis=(1, 2)) > 0.05):
        hu[k] += _streaks(metal[k], grid.spacing_kji_mm[1:], grain)


def _cement_into(hu: Array, cement: Cement, patient: Patient, grid: Grid) -> None:
    """Only inside the body, for the cortex holds it; ragged and uneven, for it seeps between the trabeculae."""
    v = patient.vertebra(cement.level)
    body, support = body_of(v), v.frame.support_mm(grid)
    w = body.window(grid, v.frame)
    if w is None:
        return
    local = v.frame.local(w)
    inside = body.occupancy(local, support)[1]
    lattice = texture_lattice(patient.bone.texture, grid)
    points = np.stack([c + np.float32(s) for c, s in zip(local[::-1], v.texture_shift, strict=True)])
    grain = ndimage.map_coordinates(lattice / lattice.std(), points, order=1, mode="grid-wrap", prefilter=False)
    width, share = float(np.mean(support)), np.zeros(w.shape, np.float32)
    for blob in cement.blobs:
        distance = Rod(blob.center, blob.center, blob.radii).distance(local)
        np.maximum(share, soft(distance + np.float32(SEEPING_MM) * grain, width), out=share)
    here = hu[w.slices]
    filled = np.float32(cement.hu) * (1 + np.float32(CEMENT_UNEVENNESS) * grain)
    here += share * inside * np.maximum(filled - here, 0)


def _metal(patient: Patient, grid: Grid) -> Array | None:
    """Share of each voxel that is metal, or None where there is none."""
    found = [(w, rod, frame) for frame, rod in metal_rods(patient) if (w := rod.window(grid, frame)) is not None]
    if not found:
        return None
    out = np.zeros(grid.shape_kji, np.float32)
    for w, rod, frame in found:
        _merge(out, w, soft(rod.distance(frame.local(w)), float(np.mean(frame.support_mm(grid)))))
    return out


def _merge(out: Array, w: Window, share: Array) -> None:
    here = out[w.slices]
    np.maximum(here, share, out=here)


def metal_rods(patient: Patient) -> Iterator[tuple[Frame, Rod]]:
    """Screws with their heads in the frames of their vertebrae, and the rods between the heads in the patient's."""
    screws = {screw.level: screw for screw in patient.lesions.hardware}
    fixed = [v for v in patient.vertebrae if v.name in screws]
    if not fixed:
        return
    still = Frame((0.0, 0.0, 0.0))
    for side in (-1.0, 1.0):
        heads = []
        for v in fixed:
            r = screws[v.name].radius
            head, tip = hardware_points(v, screws[v.name], side)
            yield v.frame, Rod(head, tip, (r, r, r), 0.75)
            yield v.frame, Rod(head, head, (5.5, 6.5, 6.0))
            heads.append(v.frame.to_lps((head[0], head[1] + 2.0, head[2])))
        for low, high in itertools.pairwise(_lengthened(heads, fixed[0].frame)):
            yield still, Rod(low, high, (ROD_RADIUS_MM,) * 3)


def _lengthened(heads: list[Vec3], frame: Frame) -> list[Vec3]:
    """The heads, caudal to cranial, and the rod's own ends a little beyond them; straight at a single level."""
    points = np.array(heads)
    first, last = (points[1] - points[0], points[-1] - points[-2]) if len(heads) > 1 else [frame.matrix[:, 2]] * 2
    below = points[0] - STUB_MM * first / np.linalg.norm(first)
    above = points[-1] + STUB_MM * last / np.linalg.norm(last)
    return [as_vec3(below), *heads, as_vec3(above)]


def _streaks(metal: Array, spacing_mm: tuple[float, float], grain: np.random.Generator) -> Array:
    """HU that one slice's metal adds elsewhere, (nj, ni), in parallel-beam geometry."""
    step = max(1, round(STREAK_PIXEL_MM / spacing_mm[1])), max(1, round(STREAK_PIXEL_MM / spacing_mm[0]))
    nj, ni = metal.shape
    y, x = (np.arange(n) * mm - n * mm / 2 for n, mm in zip(metal.shape, spacing_mm, strict=True))
    jj, ii = np.nonzero(metal > 0.02)
    weights = metal[jj, ii] * np.float32(spacing_mm[0] * spacing_mm[1] / STREAK_PIXEL_MM)
    coarse_y, coarse_x = y[:: step[1]], x[:: step[0]]
    reach = float(np.hypot(nj * spacing_mm[0], ni * spacing_mm[1])) / 2 + 2 * STREAK_PIXEL_MM
    detector = np.arange(-reach, reach + STREAK_PIXEL_MM, STREAK_PIXEL_MM)
    ramp = np.abs(np.fft.rfftfreq(2 * detector.size, STREAK_PIXEL_MM))
    total = np.zeros((coarse_y.size, coarse_x.size))
    for angle in np.pi * np.arange(ANGLES) / ANGLES:
        c, s = np.cos(angle), np.sin(angle)
        path = _shadow(x[ii] * c + y[jj] * s, weights, detector)  # mm of metal
        error = path * (-HARDENING_PER_MM * path + STARVATION * grain.standard_normal(detector.size))
        filtered = np.fft.irfft(np.fft.rfft(error, 2 * detector.size) * ramp)[: detector.size]
        total += np.interp(coarse_x[None, :] * c + coarse_y[:, None] * s, detector, filtered)
    fine = ndimage.zoom(total * (METAL_HU * np.pi / ANGLES), (nj / total.shape[0], ni / total.shape[1]), order=1)
    return np.asarray(fine, dtype=np.float32)


def _shadow(position: NDArray[np.float64], weights: Array, detector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Metal along each ray, mm: every voxel's share falls on the two detector elements next to it."""
    place = (position - detector[0]) / (detector[1] - detector[0])
    first = np.floor(place).astype(int)
    share = place - first
    out = np.bincount(first, weights * (1 - share), detector.size + 1)
    out += np.bincount(first + 1, weights * share, detector.size + 1)
    return np.asarray(out[: detector.size], dtype=np.float64)
