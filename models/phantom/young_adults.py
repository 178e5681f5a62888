"""The young-adult reference of digital patients: what "100 % YAM" means where nobody is real.

A cohort of 20 to 44 years per sex (the ages of the Japanese lumbar YAM, JSBMR 2012), drawn and measured exactly as
every other digital patient is. It says nothing about people.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.phantom import dxa
from models.phantom.patient import draw

AGES = (20, 44)  # JSBMR 2012: young adults for the lumbar spine


@dataclass(frozen=True, slots=True)
class YoungAdults:
    """Mean and SD of the patient BMD (mean of L1-L4, g/cm2) of one sex's cohort."""

    sex: str
    patients: int
    mean_g_cm2: float
    sd_g_cm2: float


def measure_young_adults(seed: int, patients: int, sex: str) -> YoungAdults:
    """Draw `patients` young adults of one sex, ages spread evenly, and measure each by the simulated DXA.

    Raises:
        ValueError: fewer than two patients, or an unknown sex.
    """
    if patients < 2:
        raise ValueError("a reference needs at least two patients")
    ages = AGES[0] + np.arange(patients) % (AGES[1] - AGES[0] + 1)
    bmd = [dxa.measure(draw(seed + index, sex=sex, age=int(age))).bmd_g_cm2 for index, age in enumerate(ages)]
    return YoungAdults(sex, patients, float(np.mean(bmd)), float(np.std(bmd, ddof=1)))


# `osteogate phantom reference --seed 44000 --patients 250`; the service ships the same (references/digital.toml)
SHIPPED = {
    "F": YoungAdults("F", 250, 1.1544, 0.1769),
    "M": YoungAdults("M", 250, 1.1447, 0.1801),
}


def t_score(bmd_g_cm2: float, sex: str) -> float:
    """Standard deviations from the young adults' mean of the same sex; for one level too (an approximation there)."""
    reference = SHIPPED[sex]
    return (bmd_g_cm2 - reference.mean_g_cm2) / reference.sd_g_cm2
