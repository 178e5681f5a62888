"""The Cobb angle: between the most tilted endplates, seen from the front.

Upper endplate of the upper end vertebra against lower endplate of the lower one, as planes through the endplates,
projected onto the patient's coronal plane (Cobb 1948). From 10 degrees one speaks of scoliosis; 40 and more count as
severe ([K]: the policy holds the limit). Only what the CT shows is measured: an end vertebra above T11 isn't seen.
Whoever calls leaves out bodies that lost height beyond doubt: their endplates tell of a fracture, or of an outline that
gave way.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from worker.findings.bodies import Body, FloatArray

FEWEST_BODIES = 3


def cobb_deg(bodies: Mapping[int, Body]) -> float | None:
    """The Cobb angle, degrees, of the bodies given; None where they are too few to speak of a curve."""
    if len(bodies) < FEWEST_BODIES:
        return None
    ordered = sorted(bodies.values(), key=lambda body: -float(body.vertebra.frame.centre_lps[2]))  # from the top
    tilts = [[_coronal_deg(normal) for normal in body.endplate_normals()] for body in ordered]
    pairs = [abs(upper[0] - lower[1]) for index, upper in enumerate(tilts) for lower in tilts[index + 1 :]]
    return max(pairs)


def _coronal_deg(normal: FloatArray) -> float:
    """How far an endplate's normal leans to the left in the coronal plane."""
    return float(np.degrees(np.arctan2(normal[0], normal[2])))
