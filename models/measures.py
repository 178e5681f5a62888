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
IN_PLANE = ndimage.generate_binary_structure(2, 1)[None]  # neighbours within a slab
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
    seen = np.asarray(slabs)
    inside: Bools = np.greater(seen, OUTSIDE_HU + 0.5)  # in whole HU, as a cohort stores them
    if not inside.any():
        return np.full(len(NAMES), np.nan)
    body_end = seen.shape[COLUMNS] // 2 + round(BODY_END_MM / PIXEL_MM)
    footprint: Bools = np.logical_or.reduce(inside)
    rows, columns = np.flatnonzero(footprint.any(1)), np.flatnonzero(footprint.any(0))
    box = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    hu, inside = np.rint(seen[box], dtype=np.float64), inside[box]
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
    projections = np.stack([mineral[name].sum(COLUMNS) for name in PARTS])  # [parts, slabs, rows]
    for projection in projections:
        sums += [_log(_mean(projection[core])), _log(_sd(projection[core]))]
    down = [_pairs(projections, core, lag, -1) for lag in FAR_LAGS_PX]  # the core is the same for every part
    sums += [_half_mean(squares[part].sum(), count.sum()) for part in range(len(PARTS)) for squares, count in down]
    squares, count = _pairs(projections[0], core, 1, 0)
    return [*sums, _half_mean(squares.sum(), count.sum())]


def _texture(hu: Values, inside: Bools) -> list[float]:
    """Of the middle slabs without their rim."""
    middle = len(hu) // 2
    near = slice(max(0, middle - max(REACHES)), middle + max(REACHES) + 1)
    hu, inside = hu[near], inside[near]
    middle = len(hu) // 2
    core = ndimage.binary_erosion(inside, IN_PLANE, iterations=RIM_PX)
    pairs = [_pairs(hu, core, lag, axis) for axis in _AXES.values() for lag in LAGS_PX]
    found = []
    for reach in REACHES:
        near = slice(max(0, middle - reach), middle + reach + 1)
        found += [_half_mean(squares[near].sum(), count[near].sum()) for squares, count in pairs]
    squares, count = _pairs(hu, core, 1, 0)
    found.append(_half_mean(squares.sum(), count.sum()))
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


def _pairs(values: Values, inside: Bools, lag: int, axis: int) -> tuple[Values, Values]:
    """Of values `lag` apart, both inside: the sum of their squared differences, and how many, by what the last two
    axes are summed over. [..., slabs, rows, columns] -> [..., slabs]; a lag across the first axis leaves one slab less.
    """
    late: list[Any] = [slice(None)] * inside.ndim
    early = late.copy()
    late[axis], early[axis] = slice(lag, None), slice(None, -lag)
    both = inside[tuple(late)] & inside[tuple(early)]
    steps: Values = np.subtract(values[(..., *late)], values[(..., *early)])
    over = tuple(range(-both.ndim + 1, 0))
    return np.where(both, steps * steps, 0.0).sum(over), both.sum(over, dtype=np.float64)


def _half_mean(squares: float, pairs: float) -> float:
    """Log of the variogram, half the mean squared difference; NaN without a pair."""
    return _log(float(squares / pairs / 2)) if pairs else float(np.nan)


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
