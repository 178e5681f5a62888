"""One connected piece per level: stray islands go to the vertebra that they touch, or away."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from worker.segmentation.base import SACRUM, LabelArray

Mask = npt.NDArray[np.bool_]
Box = tuple[slice, ...]

MOST_ISLANDS = 12  # of one label
SMALLEST_ISLAND = 4  # voxels
SMALLEST_LEVEL_ML = 1.0  # a label of less is noise, not the end of a vertebra
_NEIGHBOURS = np.ones((3, 3, 3), dtype=np.bool_)


def largest_part(mask: npt.NDArray[np.bool_]) -> Mask:
    """The largest connected part of a mask (26 neighbours); the empty mask stays empty."""
    parts, count = ndimage.label(mask, structure=_NEIGHBOURS)
    if count <= 1:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    largest: Mask = parts == int(sizes.argmax())
    return largest


def clean(labels: LabelArray, voxel_ml: float) -> LabelArray:
    """Keep the largest part of each label.

    A label that fills less than a millilitre in one piece goes altogether. An island takes the name of the
    vertebra that it mostly touches, else it is dropped; so are all islands beyond the largest few of a label,
    which are noise.
    """
    cleaned = np.zeros_like(labels)
    islands: list[tuple[Box, Mask]] = []
    for label, found in enumerate(ndimage.find_objects(labels), start=1):
        if found is None:
            continue
        where: Box = tuple(found)
        parts, _ = ndimage.label(labels[where] == label, structure=_NEIGHBOURS)
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        order = np.argsort(-sizes)[: MOST_ISLANDS + 1]
        if sizes[order[0]] * voxel_ml < SMALLEST_LEVEL_ML:
            continue
        cleaned[where][parts == order[0]] = label
        boxes = ndimage.find_objects(parts)
        for part in order[1:]:
            if sizes[part] >= SMALLEST_ISLAND:
                inner = boxes[part - 1]
                islands.append((_inside(where, inner), parts[inner] == part))
    settled = cleaned.copy()
    for box, island in islands:
        _give_to_neighbour(settled, cleaned, box, island)
    return settled


def _inside(outer: Box, inner: Box) -> Box:
    """`inner`, counted from the corner of `outer`, in the whole array's indices."""
    return tuple(slice(o.start + i.start, o.start + i.stop) for o, i in zip(outer, inner, strict=True))


def _give_to_neighbour(settled: LabelArray, main: LabelArray, box: Box, island: Mask) -> None:
    grown = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in box)
    inside = np.zeros(main[grown].shape, dtype=np.bool_)
    offset = tuple(part.start - big.start for part, big in zip(box, grown, strict=True))
    inside[tuple(slice(o, o + n) for o, n in zip(offset, island.shape, strict=True))] = island
    rim = ndimage.binary_dilation(inside, structure=_NEIGHBOURS) & ~inside
    touched = np.bincount(main[grown][rim], minlength=256)
    touched[:SACRUM] = 0
    if touched.any():
        settled[grown][inside] = int(touched.argmax())
