"""The two rulers, held to bodies whose shape is written down: straight lines between the margins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from worker.findings.bodies import SITES
from worker.findings.fractures import USUAL, Loss, losses

L3, BROKEN = 30, 29  # 29 is L3's neighbour below in the classes, and as tall as an L3


@dataclass(frozen=True)
class Body:
    """As much of a body as a ruler asks for."""

    label: int
    heights_mm: tuple[float, float, float]
    height_error_mm: float = 0.95


def spine(front: float = 0.0, middle: float = 0.0, back: float = 0.0) -> Loss:
    """Five bodies of usual shape, one of which lost these shares at its margins and in its middle."""
    bodies = {}
    for label in range(28, 33):
        tall, wedge = USUAL[label]
        usual = 27.0 * tall * np.array([1 + wedge / 2, 1.0, 1 - wedge / 2])
        lost = np.interp(SITES, (0.0, 0.5, 1.0), (front, middle, back)) if label == BROKEN else np.zeros(3)
        bodies[label] = Body(label, tuple(usual * (1 - lost)))
    found = losses(bodies)  # type: ignore[arg-type]
    assert all(one.loss < 0.1 for label, one in found.items() if label != BROKEN)
    return found[BROKEN]


@pytest.mark.parametrize("lost", [0.25, 0.30, 0.45])
def test_of_a_wedge_the_margin_counts_not_the_site_behind_it(lost: float) -> None:
    found = spine(front=lost, middle=lost / 2)
    assert found.kind == "wedge"
    assert found.loss == pytest.approx(lost, abs=0.005)


@pytest.mark.parametrize("lost", [0.25, 0.30, 0.45])
def test_a_crush_is_as_deep_as_its_sites(lost: float) -> None:
    found = spine(lost, lost, lost)
    assert found.kind == "crush"
    assert found.loss == pytest.approx(lost, abs=0.005)


def test_a_wedge_of_thirty_per_cent_is_left_out_at_thick_slices_and_one_of_a_fifth_is_noted() -> None:
    assert spine(front=0.30, middle=0.15).excludes
    fifth = spine(front=0.21, middle=0.105)
    assert fifth.grade == 1
    assert not fifth.excludes
