"""Fat that lies over the spine and not beside it: what makes a densitometer tell too little bone.

A densitometer compensates soft tissue by what it sees beside the spine. Where the spine is covered by more fat than its
surroundings, bone is missed, and the other way round; that costs a scan of the spine about 0.06 g/cm2 (Tothill 2014,
J Clin Densitom 17:91, and what it cites). A CT shows how the fat lies.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

OVER_MM = 22.0  # half the width of the spine's shadow
BESIDE_MM = (35.0, 65.0)  # from the spine's middle: where soft tissue is read
HEIGHT_MM = 12.0  # up and down from the vertebra's middle
MUSCLE_HU, FAT_HU = 20.0, -103.0  # all lean from here on; all fat
GAS_HU = -250.0  # below: lung, gas, air
SMOOTH_MM, BODY_STEP_MM = 2.0, 4.0
LEAST_ALONG = 0.7  # of a row's or column's length along its own axis of the body


def fat_over_spine_cm(
    hu: npt.NDArray[Any], affine: npt.NDArray[np.float64], middle: npt.NDArray[np.float64] | tuple[float, ...]
) -> float:
    """How much thicker fat is in front of and behind the spine than beside it, cm; NaN where the CT does not show it.

    Args:
        hu: [k, j, i], axial slices: j runs from front to back or the other way, i across.
        affine: maps (k, j, i, 1) to LPS mm.
        middle: of the vertebra, LPS mm.
    """
    row_mm, column_mm = abs(float(affine[1, 1])), abs(float(affine[0, 2]))
    if min(row_mm, column_mm) < LEAST_ALONG * np.linalg.norm(affine[:3, :3], axis=0)[1:].max():
        return float("nan")  # slices that do not lie across the body
    x, y, z = (_coordinates(hu, affine, axis) for axis in range(3))
    aside = np.abs(x - middle[0])
    slices, columns = np.abs(z - middle[2]) <= HEIGHT_MM, aside <= BESIDE_MM[1]
    if not slices.any() or x.min() > middle[0] - BESIDE_MM[1] or x.max() < middle[0] + BESIDE_MM[1]:
        return float("nan")
    block = ndimage.gaussian_filter(
        hu[slices][:, :, columns].astype(np.float32), (0.0, SMOOTH_MM / row_mm, SMOOTH_MM / column_mm)
    )
    body = _body(block, row_mm, column_mm, int(np.argmin(np.abs(y - middle[1]))))
    if body is None:
        return float("nan")
    fat = np.clip((MUSCLE_HU - block) / (MUSCLE_HU - FAT_HU), 0.0, 1.0) * body * (block > GAS_HU)
    thickness = fat.sum(axis=1).mean(axis=0) * row_mm / 10.0
    distance = aside[columns]
    return float(thickness[distance <= OVER_MM].mean() - thickness[distance >= BESIDE_MM[0]].mean())


def _coordinates(hu: npt.NDArray[Any], affine: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
    """Of LPS axis 0, 1 or 2 (mm) along the array axis that runs with it: i, j or k."""
    along = 2 - axis
    found: npt.NDArray[np.float64] = affine[axis, 3] + affine[axis, along] * np.arange(hu.shape[along])
    return found


def _body(block: npt.NDArray[np.float32], row_mm: float, column_mm: float, row: int) -> npt.NDArray[np.bool_] | None:
    """Each slice's body without table and clothes; None where it runs out of the picture, in front or behind."""
    solid = block.mean(axis=0) > GAS_HU
    steps = [max(1, round(BODY_STEP_MM / size)) for size in (row_mm, column_mm)]
    opened = ndimage.binary_opening(solid, np.ones([2 * step + 1 for step in steps], np.bool_))
    parts, _ = ndimage.label(opened)
    own = parts[row, parts.shape[1] // 2]
    if own == 0:
        return None
    body = parts == own
    if body[0].any() or body[-1].any():
        return None
    first, last = np.argmax(body, axis=0), body.shape[0] - 1 - np.argmax(body[::-1], axis=0)
    rows = np.arange(body.shape[0])[:, None]
    within: npt.NDArray[np.bool_] = ((rows >= first) & (rows <= last))[None]
    return within
