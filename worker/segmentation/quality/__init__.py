"""How good one outlined vertebra probably is: a value in [0, 1], of which one half and more is "good".

The value comes from what can be seen without the truth: how far the network believes its own outline, whether the
outline looks like a vertebra (shape), and whether bone ends where it ends (intensity). What these are worth was
calibrated on digital patients, where the truth is known: `python -m worker.segmentation.quality calibrate` writes
`calibration.json`, and the scale is laid so that one half is its limit (models/SEGMENTATION.md).

What a network believes means something only for the network that was calibrated, so that part names its weights by
their SHA-256: there one half and more means a Dice of 0.9 in 99 % of the calibration's cases. Any other outline
(TotalSegmentator's, a person's, a supplied one's) is judged by shape and intensity alone, which tell an outline from a
spoilt one and no more: there one half is what 99 % of the calibration's outlines with a Dice of 0.9 reach. The result
says which of the two it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from models.crop import Vertebra
from worker.segmentation.base import L5, L6, T12, LabelArray
from worker.volume import Volume

CALIBRATION = Path(__file__).resolve().parent / "calibration.json"
NETWORK, OUTLINE = "network", "outline"  # what a value rests on
FEATURES: Mapping[str, tuple[str, ...]] = {
    NETWORK: ("overlap", "symmetry", "size", "edge"),
    OUTLINE: ("size", "edge"),  # symmetry differs between digital patients and people: 0.78 and 0.83 with good outlines
}
GOOD = 0.5  # by construction of the scale
STEP_MM = 1.4  # outlines are looked at no finer than about this
INNER_MM, OUTER_MM = 2.5, (0.7, 4.0)  # what lies inside of a vertebra's surface, and what around it
BESIDE_MM = 6.0
MOST_SAMPLES = 4000  # of either side of an edge

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Traits:
    """What one outline shows of its own quality, none of it in HU: bone may be dense or sparse."""

    overlap: float | None  # the Dice that the network itself expects, 0..1; None where no network is known
    symmetry: float  # share of the vertebra that its mirror image covers, 0..1
    size: float  # |ln| of its volume over the median of the other lumbar vertebrae's
    edge: float  # chance that a voxel inside of its surface is denser than one outside of it, 0..1


def traits(
    volume: Volume, labels: LabelArray, vertebra: Vertebra, volumes_ml: Mapping[int, float], overlap: float | None
) -> Traits:
    """The traits of one vertebra.

    Args:
        volume: the CT.
        labels: uint8 [k, j, i] on its grid.
        vertebra: found in these labels.
        volumes_ml: class id -> volume of every vertebra that is wholly in view.
        overlap: the network's expectation, where there is one.
    """
    others = [ml for label, ml in volumes_ml.items() if label != vertebra.label_id and _lumbar(label)]
    own = volumes_ml.get(vertebra.label_id, 0.0)
    size = abs(float(np.log(own / np.median(others)))) if own > 0 and len(others) >= 2 else 0.0
    return Traits(overlap, float(vertebra.symmetry), size, _edge(volume, labels, vertebra))


def _lumbar(label: int) -> bool:
    return L5 <= label < T12 or label == L6


def _edge(volume: Volume, labels: LabelArray, vertebra: Vertebra) -> float:
    """Whether bone ends where the outline does; other vertebrae are no surroundings."""
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    grow = np.ceil(BESIDE_MM / spacing).astype(int)
    stride = np.maximum(1, np.round(STEP_MM / spacing)).astype(int)
    box = tuple(
        slice(max(0, side.start - more), min(size, side.stop + more), step)
        for side, more, size, step in zip(vertebra.box, grow, labels.shape, stride, strict=True)
    )
    near, hu = labels[box], volume.hu[box]
    own = near == vertebra.label_id
    if not own.any() or own.all():
        return 0.5
    within = ndimage.distance_transform_edt(own, sampling=spacing * stride)
    beyond = ndimage.distance_transform_edt(~own, sampling=spacing * stride)
    inner = own & (within <= max(INNER_MM, 1.01 * float((spacing * stride).max())))
    outer = (near == 0) & (beyond >= OUTER_MM[0]) & (beyond <= OUTER_MM[1])
    return _denser(hu[inner], hu[outer])


def _denser(inside: npt.NDArray[np.float32], outside: npt.NDArray[np.float32]) -> float:
    """The chance that a value of the first is higher than one of the second (Mann and Whitney's statistic)."""
    if not inside.size or not outside.size:
        return 0.5
    a, b = (some[:: max(1, some.size // MOST_SAMPLES)] for some in (inside, outside))
    b = np.sort(b)  # counted here: importing scipy.stats takes a second of every start
    lower, not_higher = np.searchsorted(b, a, "left"), np.searchsorted(b, a, "right")  # a tie counts half
    return float((lower + not_higher).mean() / (2 * b.size))


# ------------------------------------------------------------------------------------------------- the value


@dataclass(frozen=True)
class Curve:
    """A logistic regression in plain numbers, and the probability from which an outline is good."""

    basis: str
    weights_sha256: str | None  # of the networks that it belongs to; None: any outline
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...]
    intercept: float
    limit: float

    def probability(self, found: Traits) -> float:
        """That the outline is as good as was asked for, among outlines like those of the calibration."""
        known = asdict(found)
        values = [float(known[name]) for name in FEATURES[self.basis]]
        terms = zip(values, self.mean, self.scale, self.coefficients, strict=True)
        score = self.intercept + sum(weight * (value - mean) / scale for value, mean, scale, weight in terms)
        return 1.0 / (1.0 + exp(-max(-60.0, min(60.0, score))))

    def value(self, found: Traits) -> float:
        """On the scale on which one half is the limit, whatever the calibration's probability there is."""
        probability, limit = self.probability(found), min(max(self.limit, 1e-6), 1 - 1e-6)
        if probability < limit:
            return GOOD * probability / limit
        return GOOD + (1 - GOOD) * (probability - limit) / (1 - limit)


@dataclass(frozen=True)
class Quality:
    """What a level is worth, and what that rests on."""

    value: float
    basis: str


@dataclass(frozen=True)
class Calibration:
    """The curves of one calibration."""

    network: Curve | None
    outline: Curve | None

    def judge(self, found: Traits, weights_sha256: str) -> Quality | None:
        """The quality of an outline that these weights made; None where no curve is at hand."""
        network = self.network
        if network is not None and found.overlap is not None and network.weights_sha256 == weights_sha256:
            return Quality(network.value(found), NETWORK)
        return None if self.outline is None else Quality(self.outline.value(found), OUTLINE)


@cache
def shipped() -> Calibration:
    """The calibration that ships with Osteogate."""
    return read_calibration(CALIBRATION)


def read_calibration(path: Path) -> Calibration:
    """What `calibrate` wrote; none of it where there is no file."""
    if not path.is_file():
        return Calibration(None, None)
    stored = json.loads(path.read_text(encoding="utf-8"))
    return Calibration(*(_curve(basis, stored.get(basis)) for basis in (NETWORK, OUTLINE)))


def _curve(basis: str, stored: Mapping[str, Any] | None) -> Curve | None:
    if stored is None:
        return None
    numbers = (tuple(map(float, stored[name])) for name in ("mean", "scale", "coefficients"))
    mean, scale, coefficients = numbers
    sizes = [len(one) for one in (FEATURES[basis], mean, scale, coefficients)]
    if any(a != b for a, b in pairwise(sizes)):
        raise ValueError(f"the calibration's curve {basis!r} does not have one number for each of {FEATURES[basis]}")
    sha256 = stored["weights_sha256"]
    return Curve(basis, sha256, mean, scale, coefficients, float(stored["intercept"]), float(stored["limit"]))
