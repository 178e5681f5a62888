"""What two energies make of a centimetre of fat, from tabulated attenuation alone: the dial lies where physics puts it.

A densitometer knows bone and soft tissue. It takes the soft tissue beside the spine for that which lies over it: with
R, the soft tissue's ratio of low- to high-energy attenuation, whatever else attenuates is bone by
(low - R x high) / (low - R x high of mineral).
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from models.phantom.densitometer import PRODIGY

# cm2/g at 40 and at 80 keV: Elam, Ravel, Sieber 2002 (Radiat Phys Chem 63:121), as xraydb 4.5.8 (`mu_elam`) gives them
ATTENUATION = {
    "H": (0.3458, 0.3091), "C": (0.2076, 0.1610), "N": (0.2288, 0.1639), "O": (0.2585, 0.1679),
    "Na": (0.3969, 0.1796), "P": (0.8095, 0.2324), "S": (0.9873, 0.2586), "Cl": (1.1165, 0.2696),
    "K": (1.5407, 0.3252), "Ca": (1.8302, 0.3655),
}  # fmt: skip
# Shares of the weight. The tissues: ICRU report 44 (in NIST's table 2 of X-ray mass attenuation coefficients)
MUSCLE = {"H": 0.102, "C": 0.143, "N": 0.034, "O": 0.710, "Na": 0.001, "P": 0.002, "S": 0.003, "Cl": 0.001, "K": 0.004}
ADIPOSE = {"H": 0.114, "C": 0.598, "N": 0.007, "O": 0.278, "Na": 0.001, "S": 0.001, "Cl": 0.001}  # 0.95 g/cm3
TRIOLEIN = {"H": 0.1184, "C": 0.7732, "O": 0.1084}  # C57 H104 O6, 0.92 g/cm3
HYDROXYAPATITE = {"H": 0.0020, "O": 0.4141, "P": 0.1850, "Ca": 0.3989}  # Ca5 (PO4)3 OH


def attenuation(material: Mapping[str, float], energy: int) -> float:
    """cm2/g at the low (0) or the high (1) energy."""
    return sum(share * ATTENUATION[element][energy] for element, share in material.items())


def as_bone(material: Mapping[str, float], density: float) -> float:
    """The mineral, g/cm2, that a centimetre of this material is taken for where muscle lies beside it."""
    ratio = attenuation(MUSCLE, 0) / attenuation(MUSCLE, 1)

    def unlike_muscle(some: Mapping[str, float]) -> float:
        return attenuation(some, 0) - ratio * attenuation(some, 1)

    return density * unlike_muscle(material) / unlike_muscle(HYDROXYAPATITE)


def test_fat_reads_as_a_lack_of_bone_by_what_its_attenuation_says() -> None:
    adipose, lipid = as_bone(ADIPOSE, 0.95), as_bone(TRIOLEIN, 0.92)
    assert (adipose, lipid) == (pytest.approx(-0.0402, abs=1e-4), pytest.approx(-0.0525, abs=1e-4))
    assert lipid < PRODIGY.fat_as_bone < adipose
    assert as_bone(MUSCLE, 1.05) == pytest.approx(0.0)
    assert as_bone(HYDROXYAPATITE, 1.0) == pytest.approx(1.0)
