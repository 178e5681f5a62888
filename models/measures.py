"""What rulers and variograms read from a vertebra's slabs: the measures beside the network's own answer.

TBS is by definition a variogram of the densitometer's picture (Hans 2011, doi 10.1002/jbmr.499), and areal BMD a
sum of mineral over the projected area. Both can be taken from the slabs directly: a network that learned from a few
hundred patients has not found them all. Grey values only, no age, no sex, no body size: what a vertebra measures
must not hang on whose it is.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from models.crop import OUTSIDE_HU, PIXEL_MM

Values = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

MARROW_HU = -50.0  # fatty marrow: what counts as mineral begins here
BODY_END_MM = 18.0  # behind the body's middle: there the canal begins (deepest lumbar body: 36 mm)
RIM_PX = 3  # 3.5 mm of cortex and partial volume, left out of texture
REACHES = (0, 1, 2)  # slabs to either side of the middle one whose texture is read together
LAGS_PX = (1, 2, 3, 4)
FAR_LAGS_PX = (1, 2, 3, 4, 6)
PERCENTILES = (5, 25, 50, 75, 95)
ROWS, COLUMNS = -2, -1  # down, and back
PARTS = ("whole", "body", "behind")
_AXES = {"down": ROWS, "back": COLUMNS}

NAMES = (
    "projected_area", "mineral", "mineral_per_area",
    *(f"{part}_{name}" for part in PARTS[1:] for name in ("mineral_per_area", "mean", "volume")),
    *(f"{part}_projection_{name}" for part in PARTS for name in ("mean", "sd")),
    *(f"{part}_projection_variogram_{lag}" for part in PARTS for lag in FAR_LAGS_PX),
    "projection_variogram_sides",
    *(f"slabs{2 * reach + 1}_variogram_{axis}_{lag}" for reach in REACHES for axis in _AXES for lag in LAGS_PX),
    "slabs_variogram_sides",
    *(f"core_{name}" for name in ("mean", "sd", *(f"p{share}" for share in PERCENTILES), "fine_sd", "coarse_sd")),
    *(f"middle_{name}" for name in ("mean", "sd", *(f"p{share}" for share in PERCENTILES), "edges")),
    "middle_area", "middle_height", "middle_depth",
)  # fmt: skip


def measures(slabs: npt.NDArray[Any]) -> Values:
    """Slabs [slabs, size, size] HU (the body's middle in their middle) -> [len(NAMES)]; NaN where there is nothing.

    A standard deviation, a variogram and a sum of HU enter as logarithms: their errors grow with them.
    """
    hu = np.rint(np.asarray(slabs, dtype=np.float64))  # as a cohort stores them
    inside = hu > OUTSIDE_HU
    if not inside.any():
        return np.full(len(NAMES), np.nan)
    body_end = hu.shape[COLUMNS] // 2 + round(BODY_END_MM / PIXEL_MM)
    rows = np.flatnonzero(inside.any((0, 2)))
    columns = np.flatnonzero(inside.any((0, 1)))
    box = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    hu, inside = hu[box], inside[box]
    front = np.arange(columns[0], columns[-1] + 1) < body_end
    found = np.array([*_mineral(hu, inside, front), *_texture(hu, inside), *_middle(hu, inside)])
    if len(found) != len(NAMES):
        raise AssertionError(f"{len(found)} measures for {len(NAMES)} names")
    return found


def _mineral(hu: Values, inside: Bools, front: Bools) -> list[float]:
    """Sums, and the picture that a densitometer would see: added up from front to back, [slabs, rows]."""
    area = inside.any(COLUMNS)
    core = area & ndimage.binary_erosion(area, np.ones((1, 3)), iterations=2)
    parts = {"whole": inside, "body": inside & front, "behind": inside & ~front}
    mineral = {name: np.where(part, np.maximum(hu - MARROW_HU, 0.0), 0.0) for name, part in parts.items()}
    total = mineral["whole"].sum()
    sums = [float(area.sum()), _log(total), _log(total / area.sum())]
    for name in PARTS[1:]:
        sums += [_log(mineral[name].sum() / area.sum()), _mean(hu[parts[name]]), float(parts[name].sum())]
    projections = [mineral[name].sum(COLUMNS) for name in PARTS]
    for projection in projections:
        sums += [_log(_mean(projection[core])), _log(_sd(projection[core]))]
    for projection in projections:
        sums += [_variogram(projection, core, lag, -1) for lag in FAR_LAGS_PX]
    return [*sums, _variogram(projections[0], core, 1, 0)]


def _texture(hu: Values, inside: Bools) -> list[float]:
    """Of the middle slabs without their rim."""
    core = np.stack([ndimage.binary_erosion(one, iterations=RIM_PX) for one in inside])
    middle = len(hu) // 2
    found = []
    for reach in REACHES:
        near = slice(max(0, middle - reach), middle + reach + 1)
        found += [_variogram(hu[near], core[near], lag, axis) for axis in _AXES.values() for lag in LAGS_PX]
    near = slice(max(0, middle - 2), middle + 3)
    found.append(_variogram(hu[near], core[near], 1, 0))
    near = slice(max(0, middle - 1), middle + 2)
    smooth = np.stack([_smooth(one, mask) for one, mask in zip(hu[near], inside[near], strict=True)])
    bone, coarse = hu[near][core[near]], smooth[core[near]]
    return [*found, *_histogram(bone), _log(_sd(bone - coarse)), _log(_sd(coarse))]


def _middle(hu: Values, inside: Bools) -> list[float]:
    """Of the midsagittal slab, rim included."""
    middle, mask = hu[len(hu) // 2], inside[len(hu) // 2]
    if not mask.any():
        return [np.nan] * (len(PERCENTILES) + 6)
    edges = ndimage.gaussian_gradient_magnitude(_filled(middle, mask), 1.0)[mask]
    height, depth = (float(mask.any(axis).sum()) for axis in (1, 0))
    return [*_histogram(middle[mask]), _log(_mean(edges)), float(mask.sum()), height, depth]


def _histogram(values: Values) -> list[float]:
    if len(values) == 0:
        return [np.nan] * (len(PERCENTILES) + 2)
    return [_mean(values), _log(_sd(values)), *np.percentile(values, PERCENTILES)]


def _variogram(values: Values, inside: Bools, lag: int, axis: int) -> float:
    """Log of half the mean squared difference of values `lag` apart, both inside; NaN without such a pair."""
    if values.shape[axis] <= lag:
        return float(np.nan)
    values, inside = np.moveaxis(values, axis, 0), np.moveaxis(inside, axis, 0)
    both = inside[lag:] & inside[:-lag]
    steps = (values[lag:] - values[:-lag])[both]
    return _log(np.square(steps).mean() / 2) if len(steps) else float(np.nan)


def _smooth(values: Values, inside: Bools) -> Values:
    smooth: Values = ndimage.gaussian_filter(_filled(values, inside), 1.0)
    return smooth


def _filled(values: Values, inside: Bools) -> Values:
    """The mean bone outside of the mask, so that no filter sees the masked air."""
    return np.where(inside, values, values[inside].mean() if inside.any() else 0.0)


def _mean(values: Values) -> float:
    return float(values.mean()) if values.size else float(np.nan)


def _sd(values: Values) -> float:
    return float(values.std()) if values.size else float(np.nan)


def _log(value: float) -> float:
    """log(1 + value): finite for an even picture."""
    return float(np.log1p(max(value, 0.0))) if np.isfinite(value) else float(np.nan)
