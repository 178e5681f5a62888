"""Dials of the patients that lie outside what is printed about people, and the same dials as printed.

The phantom is frozen with the values of `Dials()`. `PRINTED` turns one cause at a time to what `SOURCES.md` (its list
of dials outside) has read, so that anybody can see by how much a figure of `models/REFERENCE.md` would change:

    osteogate phantom cohort --seed 19 --patients 200 --masks 1 --set dials=wear,marrow --out printed

Of other dials nobody was found to have printed anything. `UNSEEN` halves or doubles those, one cause at a time
(`dials=half-texture`, `dials=double-texture`): how much hangs on a figure that is ours.

It is no second phantom: no network was trained on it, and DXA's calibration is the frozen one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from models.phantom.densitometer import PRODIGY, Densitometer

Course = tuple[tuple[float, float], ...]  # (age in years, value), straight between them
ByLevel = Mapping[str, float]


@dataclass(frozen=True)
class Dials:
    """What a spine, its marrow, its loss and its scanner are drawn with; lengths in mm, angles in degrees."""

    # mg/cm3 by sex
    trabecular: Mapping[str, Course] = field(
        default_factory=lambda: {"F": ((30, 160.5), (130, -19.5)), "M": ((30, 155.0), (130, 25.0))}
    )
    # density differs a little from level to level, lowest about L3: 227 HU, 236 at L1 (Hendrickson 2018); size ours
    level_density: ByLevel = field(default_factory=lambda: {"L4": 1.0, "L3": 0.97, "L2": 0.99, "L1": 1.03})
    level_density_above: float = 1.08
    marrow_by_density: float = 0.0  # r of its fat with trabecular density in people of one age and sex
    marrow_of_old_women: float = -0.03  # fraction above men's, from 65 years on; -0.03 before 55
    endplate_hollow: float = 2.2
    growth: float = 0.0  # of a body's cross-section over 70 years, fraction
    lordosis_beyond_slope: tuple[float, float] = (22.0, 6.0)  # mean, SD
    lordosis_least: float = 28.0
    wear_years: tuple[float, float] = (40.0, 40.0)  # of endplates and rims: from which age on, and how many to 1
    arthrosis_years: tuple[float, float] = (45.0, 35.0)  # of facets
    arthrosis_by_level: ByLevel = field(default_factory=dict)  # 1 elsewhere
    arthrosis_of_men: float = 1.0  # beside women's
    # of mineral a year, by sex, from this age on; Japanese women lose 2.1 % about the menopause (Fujiwara 1998, Calcif
    # Tissue Int 63:202), the other rates are ours
    loss: Mapping[str, Course] = field(
        default_factory=lambda: {
            "F": ((0, -0.003), (48, -0.018), (60, -0.008)),
            "M": ((0, -0.003), (48, -0.008)),
        }
    )
    # of mineral contrast from day to day; 1.4 % is printed between scanners of one model (Skornitzke 2022)
    drift_sd: float = 0.01
    hardening: float = 0.0  # of mineral contrast per cm of mean body radius beyond 14, on top of `scanner.SIZE_LOSS`

    # UNSEEN, from here on. The trabeculae's relief: its amplitude in a person of 60 with 115 mg/cm3, how much people
    # differ (SD of the logarithm), the grain's size and the slow course's amplitude beside the usual ones
    texture_amplitude: float = 0.60
    texture_scatter: float = 0.65
    texture_grain: float = 1.0
    texture_slow: float = 1.0
    level_scatter: float = 0.055  # of one level's own trabecular density
    cortex_scatter: float = 0.20  # of people's cortices, of the logarithm
    cortical_mineral_scatter: float = 50.0  # mg/cm3
    arch_scatter: float = 0.36  # of people's arches, of the logarithm
    arch_level_scatter: float = 0.12
    arch_density_scatter: float = 0.22  # of the arches' trabecular density, the body's being 1
    noise: float = 1.0  # of the CT's noise, beside the usual one
    blur: float = 1.0  # of every kernel's width, beside the usual one
    densitometer: Densitometer = PRODIGY

    def density(self, sex: str, age: int) -> float:
        """The mean trabecular density of these people, mg/cm3."""
        ages, values = zip(*self.trabecular[sex], strict=True)
        return float(np.interp(age, ages, values))

    def marrow_fat(self, sex: str, age: int) -> float:
        """The mean of these people, fraction; women of 20 to 39 have 27 % (Baum 2018, doi 10.3389/fendo.2018.00141)."""
        beside_men = 0.0 if sex == "M" else float(np.interp(age, (55, 65), (-0.03, self.marrow_of_old_women)))
        return 0.36 + 0.0045 * (age - 50) + (0.03 + beside_men)

    def yearly(self, sex: str, age: int) -> float:
        """The usual change of mineral a year, fraction."""
        return next(rate for since, rate in reversed(self.loss[sex]) if age >= since)


FROZEN = Dials()

PRINTED: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    # Japan: 1.1 % a year in women, most of it at the menopause; over life -55 % and -46 % (Riggs 2004); L1 to L3 4 %
    "trabecular": {
        "trabecular": {
            "F": ((20, 163.0), (30, 160.5), (48, 146.0), (58, 119.0), (80, 80.0), (90, 73.0)),
            "M": ((20, 158.0), (90, 85.0)),
        },
        "level_density": {"L4": 1.0, "L3": 0.98, "L2": 1.0, "L1": 1.02},
        "level_density_above": 1.035,
    },
    # r -0.66 to -0.82 at all ages; over 60 women have about 10 % more than men (He 2019, Menopause 2021, Griffith 2012)
    "marrow": {"marrow_by_density": -0.5, "marrow_of_old_women": 0.10},
    # 1.5 and 0.7 mm at the two ends of a disc (Wang 2012), drawn alike at both ends here
    "endplates": {"endplate_hollow": 1.1},
    # the area grows by 15 % over life (Riggs 2004)
    "growth": {"growth": 0.15},
    # 36.8 (13.2) in people who lie
    "lordosis": {"lordosis_beyond_slope": (2.0, 11.0), "lordosis_least": 8.0},
    # from the twenties on, L4-5 three times L2-3, more in men (Kalichman 2008); as much as ours at 70 to 75 years
    "wear": {
        "wear_years": (25.0, 60.0),
        "arthrosis_years": (25.0, 58.0),
        "arthrosis_by_level": {"L1": 0.4, "L2": 0.5, "L3": 1.0, "L4": 1.5, "L5": 1.3},
        "arthrosis_of_men": 1.2,
    },
    # Miyama: women in their forties and from sixty on, men
    "loss": {"loss": {
        "F": ((0, -0.003), (40, -0.0087), (48, -0.018), (60, -0.0048)),
        "M": ((0, 0.0017), (50, 0.0)),
    }},
    # 9.2 % between eight scanners (Skornitzke 2022), whoever made them
    "scanners": {"drift_sd": 0.088},
    # 0.12 of 0.46 between bodies of 5 and 17 cm (a GE CT750): 2.2 % a cm
    "hardening": {"hardening": 0.020},
})  # fmt: skip


# What no source was seen for: the dials of a cause, which are halved or doubled together
UNSEEN: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "texture": ("texture_amplitude",),
    "texture-scatter": ("texture_scatter",),
    "grain": ("texture_grain",),
    "slow-texture": ("texture_slow",),
    "bone-scatter": (
        "level_scatter", "cortex_scatter", "cortical_mineral_scatter", "arch_scatter", "arch_level_scatter",
        "arch_density_scatter",
    ),
    "noise": ("noise",),
    "blur": ("blur",),
    "dxa-errors": ("roll_sd_deg", "line_sd_mm", "blur_mm", "noise_g_cm2", "bowel_sd_cm"),
    "dxa-fat": ("fat_as_bone",),
})  # fmt: skip
FACTORS = MappingProxyType({"half": 0.5, "double": 2.0})
CAUSES = (*PRINTED, *(f"{factor}-{cause}" for cause in UNSEEN for factor in FACTORS))


def turned(names: tuple[str, ...]) -> Dials:
    """The frozen dials, these causes as printed, halved or doubled; KeyError for one that isn't in CAUSES."""
    dials = FROZEN
    for name in names:
        factor, _, cause = name.partition("-")
        scaled = factor in FACTORS
        dials = _scaled(dials, UNSEEN[cause], FACTORS[factor]) if scaled else replace(dials, **PRINTED[name])
    return dials


def _scaled(dials: Dials, names: tuple[str, ...], factor: float) -> Dials:
    """Dials of the patient, or of the densitometer, times a factor."""
    if not hasattr(dials, names[0]):
        device = replace(dials.densitometer, **{name: factor * getattr(dials.densitometer, name) for name in names})
        return replace(dials, densitometer=device)
    return replace(dials, **{name: factor * getattr(dials, name) for name in names})
