"""Compression fractures: which body lost height, how much, and whether that is beyond the measurement's own error.

Two rulers, for either alone is blind to something. The neighbours (each body's heights over what its level usually
has, against the same of the other levels) see a crush, which leaves no shape; the body's own shape (front against
back, middle against rims) sees a spine in which many bodies gave way, and is not misled by an outline that is too
wide. Grades are Genant's (1993, J Bone Miner Res 8:1137): 20-25 % of height lost is grade 1, 25-40 % grade 2, more
is grade 3.

A body is left out from grade 2 on, and only where what is lost exceeds grade 1's lower bound even if the measurement
erred by as much as one in twenty do (at 3 mm slices one voxel is 12 % of a body). Anything from grade 1 on is noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.findings.bodies import Body

FloatArray = npt.NDArray[np.float64]

GRADES = (0.20, 0.25, 0.40)  # Genant 1993: loss of height from which grade 1, 2 and 3 begin
ONE_SIDED_95 = 1.645
FEWEST_NEIGHBOURS = 2
# What levels usually have, relative to L3: mean height, and (front - back) / mean. Rounded after Berry 1987 and
# Panjabi 1992; an approximation, no threshold depends on a percent of it.
USUAL: Mapping[int, tuple[float, float]] = {
    34: (0.83, -0.05), 33: (0.87, -0.05), 32: (0.93, -0.05), 31: (0.97, -0.04), 30: (1.0, -0.02), 29: (1.0, 0.01),
    28: (1.0, 0.04), 27: (0.97, 0.10), 126: (0.96, 0.10),
}  # fmt: skip
USUAL_HOLLOW = 0.93  # middle over the higher rim: endplates are dished
RIM_SHARE = 0.15  # where front and back are measured, from the margin
# What a wedge's front margin has lost more than its first site, as a share of what that site lost more than the last.
BEYOND = RIM_SHARE / (1 - 2 * RIM_SHARE)


@dataclass(frozen=True)
class Loss:
    """How much height one body lost, by the ruler that shows most of it."""

    kind: str  # "wedge", "biconcave" or "crush"
    loss: float  # share of the height, 0..1
    error: float  # its standard deviation

    @property
    def grade(self) -> int:
        """Genant's grade, 0 to 3."""
        return sum(self.loss >= bound for bound in GRADES)

    @property
    def surely(self) -> float:
        """The loss that remains if the measurement exaggerated it (one-sided 95 %)."""
        return self.loss - ONE_SIDED_95 * self.error

    @property
    def excludes(self) -> bool:
        """Grade 2 or more, and more than the measurement's error away from no fracture at all."""
        return self.grade >= 2 and self.surely >= GRADES[0]


def losses(bodies: Mapping[int, Body]) -> dict[int, Loss]:
    """The loss of height of every body."""
    relative = {label: _relative(body) for label, body in bodies.items() if label in USUAL}
    return {label: _worst(bodies[label], _reference(relative, label), relative[label]) for label in relative}


def _relative(body: Body) -> FloatArray:
    """Anterior, middle, posterior height, mm, as if the body were an L3."""
    tall, wedge = USUAL[body.label]
    usual = tall * np.array([1 + wedge / 2, 1.0, 1 - wedge / 2])
    return np.asarray(body.heights_mm) / usual


@dataclass(frozen=True)
class _Reference:
    """What a body's heights should be by its neighbours, mm as an L3's; and how many of them say so."""

    heights: FloatArray
    count: int


def _reference(relative: Mapping[int, FloatArray], label: int) -> _Reference | None:
    """The median of the other levels that stand; a level that itself lost height is no ruler."""
    others = np.array([heights for other, heights in relative.items() if other != label])
    if len(others) < FEWEST_NEIGHBOURS:
        return None
    tall = np.percentile(others, 75, axis=0)  # up to half of them may be broken
    for _ in range(2):
        stand = 1 - others / tall < GRADES[0]
        tall = np.array([np.median(column[ok]) for column, ok in zip(others.T, stand.T, strict=True)])
    return _Reference(tall, int(stand.all(axis=1).sum()))


def _worst(body: Body, reference: _Reference | None, relative: FloatArray) -> Loss:
    found = _by_shape(body, relative)
    if reference is not None:
        found += _by_neighbours(body, reference, relative)
    return max(found, key=lambda one: (one.excludes, one.loss))


def _by_neighbours(body: Body, reference: _Reference, relative: FloatArray) -> list[Loss]:
    lost: FloatArray = 1 - relative / reference.heights
    error = body.height_error_mm / reference.heights * np.sqrt(1 + 1 / max(reference.count, 1))
    kinds: tuple[str, ...] = ("wedge", "biconcave", "crush")
    if lost.min() >= 0.7 * lost.max():
        kinds = ("crush",) * 3
    elif lost[0] == lost.max():
        lost[0] += BEYOND * (lost[0] - lost[2])
        error[0] *= np.hypot(1 + BEYOND, BEYOND)
    return [Loss(kind, float(one), float(e)) for kind, one, e in zip(kinds, lost, error, strict=True)]


def _by_shape(body: Body, relative: FloatArray) -> list[Loss]:
    """Wedge and biconcave deformity by the body's own heights.

    Front and back are measured inside of the margins, where a wedge has lost less in front and already something
    behind, and a dent has begun: the loss at the margin, and in the middle, follows from straight lines between.
    """
    anterior, middle, posterior = relative
    rim = max(anterior, posterior)
    wedge = 1 - min(anterior, posterior) / rim
    hollow = max(0.0, 1 - middle / rim / USUAL_HOLLOW)
    error = np.sqrt(2) * body.height_error_mm / rim
    return [
        Loss("wedge", float(wedge / (1 - 2 * RIM_SHARE + RIM_SHARE * wedge)), float(error / (1 - 2 * RIM_SHARE))),
        Loss("biconcave", float(hollow / (0.5 + 0.5 * hollow)), float(error / (0.5 + 0.5 * hollow))),
    ]
