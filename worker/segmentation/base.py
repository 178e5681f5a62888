"""What every segmenter gives, whoever made the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from service.domain.errors import OsteogateError
from worker.volume import Volume

LabelArray = npt.NDArray[np.uint8]
Point = tuple[float, float, float]  # LPS mm

# TotalSegmentator's `total` ids; 126 is a sixth lumbar body (ours)
SACRUM, S1, L5, L4, L3, L2, L1, T12, T11, T10 = 25, 26, 27, 28, 29, 30, 31, 32, 33, 34
L6 = 126
LEVEL_IDS: Mapping[str, int] = {"L1": L1, "L2": L2, "L3": L3, "L4": L4}


class SegmentationError(OsteogateError):
    """The segmenter could not run on this volume (out of memory); the text is for people."""


@dataclass(frozen=True)
class Segmentation:
    """Labels [k, j, i] on the volume's own grid, who made them, and the coarse network's own view."""

    labels: LabelArray
    segmenter: str
    sha256: str
    timings_s: dict[str, float] = field(default_factory=dict)
    second_opinion: Mapping[int, Point] | None = (
        None  # level id -> centroid by the coarse network; None: none was asked
    )
    overlaps: Mapping[int, float] | None = (
        None  # level id -> the Dice that the network itself expects of it, 0..1; None: no network outlined it
    )


class Segmenter(Protocol):
    """Anything that labels the vertebrae of a CT."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    def segment(self, volume: Volume) -> Segmentation:
        """Label the volume; an empty label map is a possible answer."""
        ...
