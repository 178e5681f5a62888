"""Dials that physics tells, from tabulated attenuation alone.

The CT (120 kVp, an effective energy of 65 to 70 keV): HU of mineral and of marrow.

The densitometer knows bone and soft tissue. It takes the soft tissue beside the spine for that which lies over it: with
R, the soft tissue's ratio of low- to high-energy attenuation, whatever else attenuates is bone by
(low - R x high) / (low - R x high of mineral).
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from models.phantom.densitometer import PRODIGY
from models.phantom.render import FATTY_MARROW_HU, HU_PER_MG_CM3, WATERY_MARROW_HU

ENERGIES_KEV = (40, 65, 70, 80)
# cm2/g: Elam, Ravel, Sieber 2002 (Radiat Phys Chem 63:121), as xraydb 4.5.8 (`mu_elam`) gives them
ATTENUATION = {
    "H": (0.3458, 0.3216, 0.3173, 0.3091), "C": (0.2076, 0.1710, 0.1672, 0.1610),
    "N": (0.2288, 0.1761, 0.1714, 0.1639), "O": (0.2585, 0.1832, 0.1772, 0.1679),
    "Na": (0.3969, 0.2103, 0.1976, 0.1796), "P": (0.8095, 0.3070, 0.2754, 0.2324),
    "S": (0.9873, 0.3520, 0.3123, 0.2586), "Cl": (1.1165, 0.3775, 0.3316, 0.2696),
    "K": (1.5407, 0.4791, 0.4134, 0.3252), "Ca": (1.8302, 0.5508, 0.4717, 0.3655),
}  # fmt: skip
# Shares of the weight. The tissues: ICRU report 44 (in NIST's table 2 of X-ray mass attenuation coefficients)
MUSCLE = {"H": 0.102, "C": 0.143, "N": 0.034, "O": 0.710, "Na": 0.001, "P": 0.002, "S": 0.003, "Cl": 0.001, "K": 0.004}
ADIPOSE = {"H": 0.114, "C": 0.598, "N": 0.007, "O": 0.278, "Na": 0.001, "S": 0.001, "Cl": 0.001}
TRIOLEIN = {"H": 0.1184, "C": 0.7732, "O": 0.1084}  # C57 H104 O6
HYDROXYAPATITE = {"H": 0.0020, "O": 0.4141, "P": 0.1850, "Ca": 0.3989}  # Ca5 (PO4)3 OH
WATER = {"H": 0.1119, "O": 0.8881}
MUSCLE_G_CM3, ADIPOSE_G_CM3, TRIOLEIN_G_CM3, HYDROXYAPATITE_G_CM3 = 1.05, 0.95, 0.92, 3.16


def attenuation(material: Mapping[str, float], kev: int) -> float:
    """cm2/g."""
    return sum(share * ATTENUATION[element][ENERGIES_KEV.index(kev)] for element, share in material.items())


def hu(material: Mapping[str, float], density: float, kev: int) -> float:
    """Of a material of this density, g/cm3."""
    return 1000 * (density * attenuation(material, kev) / attenuation(WATER, kev) - 1)


def as_bone(material: Mapping[str, float], density: float) -> float:
    """The mineral, g/cm2, that a centimetre of this material is taken for where muscle lies beside it."""
    ratio = attenuation(MUSCLE, 40) / attenuation(MUSCLE, 80)

    def unlike_muscle(some: Mapping[str, float]) -> float:
        return attenuation(some, 40) - ratio * attenuation(some, 80)

    return density * unlike_muscle(material) / unlike_muscle(HYDROXYAPATITE)


def test_fat_reads_as_a_lack_of_bone() -> None:
    adipose, lipid = as_bone(ADIPOSE, ADIPOSE_G_CM3), as_bone(TRIOLEIN, TRIOLEIN_G_CM3)
    assert (adipose, lipid) == (pytest.approx(-0.0402, abs=1e-4), pytest.approx(-0.0525, abs=1e-4))
    assert lipid < PRODIGY.fat_as_bone < adipose
    assert as_bone(MUSCLE, MUSCLE_G_CM3) == pytest.approx(0.0)
    assert as_bone(HYDROXYAPATITE, 1.0) == pytest.approx(1.0)


def test_the_hu_of_mineral() -> None:
    """A mg/cm3 takes the place of as much water as it displaces."""
    soft, hard = (
        attenuation(HYDROXYAPATITE, kev) / attenuation(WATER, kev) - 1 / HYDROXYAPATITE_G_CM3 for kev in (70, 65)
    )
    assert (soft, hard) == (pytest.approx(1.31, abs=0.01), pytest.approx(1.46, abs=0.01))
    assert soft < HU_PER_MG_CM3[120] < hard


def test_the_hu_of_marrow() -> None:
    """Watery marrow as muscle; the fatty one between adipose tissue and lipid."""
    assert [hu(MUSCLE, MUSCLE_G_CM3, kev) for kev in (65, 70)] == pytest.approx([WATERY_MARROW_HU] * 2, abs=2.5)
    assert hu(TRIOLEIN, TRIOLEIN_G_CM3, 70) < FATTY_MARROW_HU < hu(ADIPOSE, ADIPOSE_G_CM3, 65)
