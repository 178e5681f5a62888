"""Drawing a digital patient: every random number of the anatomy is taken here, none while rendering.

Sizes of vertebrae follow Panjabi 1992 (Spine 17:299) and Berry 1987 (Spine 12:362), rounded, as an
approximation; the scatter is ours. Age, sex mix and BMI follow Yoshida 2023 (median 63, 49-71; 23 % men; 21.9).
Trabecular density by age is an approximation to published QCT curves: about 160 mg/cm3 young, 80 (women) at 75, SD 32
(young women have 227-236 HU, SD 42: Hendrickson 2018, Iowa Orthop J 38:25). `SOURCES.md` sets every dial beside what is
printed, and lists those that have no source or lie outside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from models.phantom import lesions as pathology
from models.phantom import solve
from models.phantom.anatomy import (
    LEVELS,
    SPINE,
    Acquisition,
    Bone,
    Interval,
    Patient,
    Sacrum,
    Texture,
    Torso,
    Vertebra,
    Vessels,
    spine_names,
)
from models.phantom.dials import Dials
from models.phantom.geometry import Frame
from models.phantom.grid import Vec3
from models.phantom.settings import VENDORS, Setting, Value, check, dials_of

__all__ = ["LEVELS", "Patient", "draw"]

Rng = np.random.Generator


@dataclass(frozen=True)
class _Size:
    """Means over both sexes, mm."""

    width: float
    depth: float
    height: float
    disc_below: float
    pedicle_width: float
    pedicle_height: float
    transverse_span: float
    spinous_length: float
    lordosis: float  # share of the L1-S1 lordosis taken in the disc below and the body


SIZES = {
    "L6": _Size(50.0, 34.5, 25.5, 10.0, 16.0, 15.5, 90.0, 19.0, 0.34),  # after L5: an approximation
    "L5": _Size(49.5, 34.5, 26.0, 10.5, 15.5, 16.0, 88.0, 21.0, 0.40),
    "L4": _Size(47.5, 34.5, 27.0, 11.5, 12.0, 14.5, 82.0, 27.0, 0.25),
    "L3": _Size(45.5, 34.0, 27.2, 11.0, 9.6, 14.5, 88.0, 31.0, 0.16),
    "L2": _Size(43.5, 33.2, 27.0, 10.0, 8.4, 14.8, 80.0, 30.0, 0.12),
    "L1": _Size(41.5, 32.3, 26.2, 8.8, 8.0, 15.5, 73.0, 28.0, 0.07),
    "T12": _Size(39.5, 31.2, 25.0, 7.4, 8.0, 16.0, 47.0, 26.0, 0.02),
    "T11": _Size(36.5, 30.2, 23.4, 6.2, 8.2, 15.6, 50.0, 27.0, -0.04),
    "T10": _Size(34.0, 29.0, 22.4, 5.4, 7.2, 14.2, 56.0, 29.0, -0.06),
}
# shares of the lordosis, caudal to cranial, where there are not five lumbar vertebrae; an approximation
LORDOSIS = {4: (0.46, 0.30, 0.16, 0.08), 6: (0.34, 0.24, 0.17, 0.12, 0.08, 0.05)}


# Yoshida 2023, table 1: median and quartiles as printed, the other quantiles ours
SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
AGE_QUANTILES = (22, 33, 49, 63, 71, 82, 91)
INTERVAL_QUANTILES_DAYS = (0, 1, 9, 49, 121, 270, 365)
VENDOR_PATIENTS = {"canon": 173, "siemens": 136, "philips": 93}
KERNELS_OF = {"canon": ("FC03", "FC18"), "philips": ("B", "C")}  # the others have one

TRABECULAR_SD = 32.0  # mg/cm3, of people of one age and sex
MARROW_SD = 0.09  # of its fat, fraction, of people of one age and sex

# Degeneration; see _worn
WEAR_SHAPE = 1.5
WEAR_BY_LEVEL = {"L5": 1.2, "L4": 1.1, "L3": 0.9, "L2": 0.75, "L1": 0.6}
WEAR_ENDPLATE, WEAR_POSTERIOR = 0.15, 0.10
# The neural arch; see _arched
ARCH_SHARE = 0.82
FACET_SHAPE, FACET_CORTEX, FACET_GROWTH = 1.0, 0.25, 0.07


def draw(seed: int, **settings: Setting) -> Patient:
    """A digital patient; ValueError names a setting that is unknown or impossible, or a BMD or TBS out of reach.

    What only some settings ask for (another number of lumbar vertebrae, lesions) is drawn by generators of its own,
    so that everybody else stays exactly as he is.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")
    given = check(settings)
    dials = dials_of(given)
    rng = np.random.default_rng([seed, 1])
    sex, age, bmi, height_m = _person(rng, given)
    build = (1.045 if sex == "M" else 0.96) * (height_m / (1.72 if sex == "M" else 1.58)) ** 0.8
    bone_density = _trabecular(rng, dials.density(sex, age))
    cortex = np.exp(rng.normal(0.0, dials.cortex_scatter)) * (1.0 - 0.003 * (age - 50)) * (bone_density / 115.0) ** 0.3
    cortex = float(np.clip(cortex, 0.65, 1.8))
    spine, discs, sacrum = _spine(rng, given, build, age, bone_density, cortex, dials)
    names = spine_names(int(_float(given.get("lumbar_count", 5))))
    if names != SPINE:
        own = np.random.default_rng([seed, 7, len(names)])
        spine, discs, sacrum = _spine(own, given, build, age, bone_density, cortex, dials, names)
    if given.get("t13_ribs"):
        spine = tuple(replace(v, transverse_span=0.68 * v.transverse_span) if v.name == "L1" else v for v in spine)
    spine = _worn(np.random.default_rng([seed, 6]), spine, age, dials)
    spine = _arched(np.random.default_rng([seed, 10]), spine, age, sex, dials)
    found = pathology.drawn(seed, given, spine)
    spine = pathology.broken(spine, discs, sacrum, found.fractures)
    torso = _torso(rng, sex, bmi, build, spine, sacrum)
    torso = replace(torso, ribs=given.get("ribs") is not False, lumbar_ribs=bool(given.get("t13_ribs")))
    patient = Patient(
        seed,
        sex,
        age,
        bmi,
        height_m,
        spine,
        discs,
        sacrum,
        _bone(rng, age, sex, bone_density, dials),
        _vessels(rng, sex, age),
        torso,
        _acquisition(rng, np.random.default_rng([seed, 8]), given, bmi, torso, dials),
        _interval(np.random.default_rng([seed, 9]), dials.yearly(sex, age)),
        found,
    )
    bmd, tbs = given.get("bmd_g_cm2"), given.get("tbs")
    return solve.met(patient, None if bmd is None else _float(bmd), None if tbs is None else _float(tbs))


def _float(value: Value) -> float:
    assert isinstance(value, (int, float))
    return float(value)


def _person(rng: Rng, given: dict[str, Value]) -> tuple[str, int, float, float]:
    sex = "M" if rng.random() < 0.23 else "F"
    age = int(np.interp(stats.norm.cdf(rng.normal()), SHARES, AGE_QUANTILES))
    bmi = float(np.clip(22.45 + rng.gamma(6.0, 1.45) - 8.7, 15.5, 38))
    sex = str(given.get("sex", sex))
    age = int(_float(given.get("age", age)))
    bmi = _float(given.get("bmi", bmi))
    mean, sd = (1.71, 0.062) if sex == "M" else (1.58, 0.06)
    height = float(np.clip(rng.normal(mean - 0.0012 * (age - 45), sd), 1.38, 1.98))
    return sex, age, bmi, height


def _trabecular(rng: Rng, usual: float) -> float:
    return float(np.clip(rng.normal(usual, TRABECULAR_SD), 42, 260))


def _worn(rng: Rng, spine: tuple[Vertebra, ...], age: int, dials: Dials) -> tuple[Vertebra, ...]:
    """Degeneration: sclerotic endplates and facets, and rims that grow, more from level to level downwards.

    It is what a densitometer reads as bone and an attenuation disc in the body's middle does not see. Prevalence and
    strength are ours; that it grows downwards is printed (facets: Kalichman 2008, Spine 33:2560).
    """
    since, years = dials.wear_years
    severity = max(0.0, (age - since) / years) * rng.gamma(WEAR_SHAPE, 1 / WEAR_SHAPE)

    def worn(v: Vertebra) -> Vertebra:
        here = severity * WEAR_BY_LEVEL.get(v.name, 0.5) * rng.gamma(4.0, 0.25)
        return replace(
            v,
            endplate=v.endplate * (1 + WEAR_ENDPLATE * here),
            posterior_cortex=v.posterior_cortex * (1 + WEAR_POSTERIOR * here),
            lipping=v.lipping + 0.8 * here,
            facet_size=v.facet_size + 0.06 * min(here, 2.5),
        )

    return tuple(worn(v) for v in spine)


def _arched(rng: Rng, spine: tuple[Vertebra, ...], age: int, sex: str, dials: Dials) -> tuple[Vertebra, ...]:
    """Neural arches of their own strength, and facet joints that grow and harden with age.

    Behind the body lie 51.4 % (SD 4.2 %) of L3's mineral in young people (Lee 2009, doi 10.1359/jbmr.090224), and
    sclerotic facets add 0.03 to 0.47 g/cm2 to a level of old men (Drinka 1992, Calcif Tissue Int 50:507). A
    densitometer counts all of it; the slab through the body's middle shows the laminae and the spinous process alone.
    """
    habit = rng.normal(0.0, dials.arch_scatter)
    since, years = dials.arthrosis_years
    arthrosis = max(0.0, (age - since) / years) * rng.gamma(FACET_SHAPE, 1 / FACET_SHAPE)
    arthrosis *= dials.arthrosis_of_men if sex == "M" else 1.0

    def arched(v: Vertebra) -> Vertebra:
        own = float(np.exp(habit + rng.normal(0.0, dials.arch_level_scatter)))
        here = arthrosis * dials.arthrosis_by_level.get(v.name, 1.0) * rng.gamma(3.0, 1 / 3.0)
        return replace(
            v,
            lateral_cortex=ARCH_SHARE * v.lateral_cortex * own * (1 + FACET_CORTEX * here),
            facet_size=v.facet_size + FACET_GROWTH * min(here, 3.0),
        )

    return tuple(arched(v) for v in spine)


def _interval(rng: Rng, usual: float) -> Interval:
    """Days between CT and DXA, and the patient's own rate of loss, whose SD is ours."""
    days = int(np.interp(stats.norm.cdf(rng.normal()), SHARES, INTERVAL_QUANTILES_DAYS))
    return Interval(days, float(rng.normal(usual, 0.012)))


def _bone(rng: Rng, age: int, sex: str, density: float, dials: Dials) -> Bone:
    # microarchitecture: coarser, grainier trabeculae with age and low density, and much that neither explains
    coarse = float(np.exp(rng.normal(0, dials.texture_scatter) + 0.006 * (age - 60) - 0.0100 * (density - 115)))
    texture = Texture(
        int(rng.integers(2**31)),
        float(np.clip(dials.texture_amplitude * coarse, 0.10, 1.40)),
        dials.texture_grain * float(rng.uniform(0.9, 1.6)),
        dials.texture_slow * float(rng.uniform(0.06, 0.16)),
    )
    r = dials.marrow_by_density
    by_density = r * MARROW_SD * (density - dials.density(sex, age)) / TRABECULAR_SD
    fat = dials.marrow_fat(sex, age) + float(np.sqrt(1 - r * r)) * rng.normal(0, MARROW_SD) + by_density
    fat = float(np.clip(fat, 0.12, 0.75))
    cortical = float(rng.normal(960, dials.cortical_mineral_scatter))
    return Bone(1.0, cortical, float(np.clip(rng.normal(1.55, dials.arch_density_scatter), 1.0, 2.3)), fat, texture)


def _tilts(
    rng: Rng, cobb_deg: float | None, names: tuple[str, ...], dials: Dials
) -> tuple[float, list[float], list[float], list[float]]:
    """Sacral slope, then tilt, bend and rotation of every vertebra, radians, caudal to cranial."""
    slope = np.radians(np.clip(rng.normal(35, 7), 17, 56))
    beyond = np.radians(rng.normal(*dials.lordosis_beyond_slope))
    lordosis = np.clip(slope + beyond, np.radians(dials.lordosis_least), np.radians(80))
    tilt, tilts = float(slope), []
    lumbar = sum(name.startswith("L") for name in names)
    own = [SIZES[name].lordosis for name in names]
    shares = [*LORDOSIS.get(lumbar, own[:lumbar]), *own[lumbar:]]
    for share in shares:
        step = share * lordosis * rng.normal(1, 0.10)
        tilts.append(tilt - 0.62 * step)  # body's middle: after its disc and half of its own wedge
        tilt -= step
    cobb = rng.normal(0, 3.0) if cobb_deg is None else cobb_deg
    phase = rng.uniform(-0.5, 0.5)
    wave = np.sin(np.linspace(-1.25, 1.9, len(names)) + phase)
    lean = rng.normal(0, 1.6)
    bend = np.radians(cobb * wave / np.ptp(wave[:lumbar]) + lean + rng.normal(0, 0.7, len(names)))
    spin = np.radians(0.5 * cobb * np.gradient(wave) + rng.normal(0, 2.0) + rng.normal(0, 0.8, len(names)))
    return float(slope), tilts, [float(b) for b in bend], [float(s) for s in spin]


def _spine(
    rng: Rng,
    given: dict[str, Value],
    build: float,
    age: int,
    density: float,
    cortex: float,
    dials: Dials,
    names: tuple[str, ...] = SPINE,
) -> tuple[tuple[Vertebra, ...], tuple[float, ...], Sacrum]:
    cobb = given.get("cobb_deg")
    slope, tilts, bends, spins = _tilts(rng, None if cobb is None else _float(cobb), names, dials)
    roll = float(np.radians(rng.normal(0, 3)))
    build *= float(rng.normal(1, 0.035))
    width_habit, depth_habit, height_habit = rng.normal(1, 0.04, 3)
    disc_habit = float(rng.normal(1.0 - 0.002 * max(0, age - 45), 0.10))
    position = np.array([rng.normal(0, 7), rng.normal(45, 8), rng.uniform(-420, 80)])
    sacrum = _sacrum(rng, build, slope, bends[0], spins[0] + roll, position, density)
    at = position + sacrum.frame.matrix @ np.array([0, 0, sacrum.height / 2])
    up = sacrum.frame.matrix[:, 2]
    habit = _Habit(
        build,
        float(width_habit),
        float(depth_habit),
        float(height_habit),
        age,
        density,
        cortex,
        float(np.exp(rng.normal(0, 0.12))),
        dials,
    )
    vertebrae, discs = [], []
    for name, tilt, bend, spin in zip(names, tilts, bends, spins, strict=True):
        size = SIZES[name]
        disc = float(np.clip(size.disc_below * build * disc_habit * rng.normal(1, 0.10), 3.0, 17.0))
        angles = (tilt, bend, spin + roll)
        own_up = Frame((0, 0, 0), angles).matrix[:, 2]
        height = size.height * build * habit.height * float(rng.normal(1, 0.025))
        middle = own_up + up
        at = at + disc * middle / np.linalg.norm(middle)
        center = at + own_up * height / 2
        frame = Frame((float(center[0]), float(center[1]), float(center[2])), angles)
        vertebrae.append(_vertebra(rng, name, frame, height, habit))
        discs.append(disc)
        at, up = at + own_up * height, own_up
    return tuple(vertebrae), tuple(discs), sacrum


@dataclass(frozen=True)
class _Habit:
    """What the levels of one spine share."""

    build: float
    width: float
    depth: float
    height: float
    age: int
    density: float
    cortex: float
    posterior: float
    dials: Dials


def _vertebra(rng: Rng, name: str, frame: Frame, height: float, habit: _Habit) -> Vertebra:
    size, b, dials = SIZES[name], habit.build, habit.dials
    wedge = {"L6": 2.6, "L5": 2.6, "L4": 1.0, "L3": 0.2, "L2": -0.5, "L1": -1.2, "T12": -1.2}.get(
        name, -0.9
    ) + rng.normal(0, 0.7)
    wear = max(0.0, (habit.age - 45) / 40)
    level = dials.level_density.get(name, dials.level_density_above)
    girth = float(np.sqrt(1 + dials.growth * (habit.age - 63) / 70))  # 63: the median
    return Vertebra(
        name=name,
        frame=frame,
        width=size.width * b * girth * habit.width * rng.normal(1, 0.02),
        depth=size.depth * b * girth * habit.depth * rng.normal(1, 0.02),
        height_anterior=height + wedge / 2,
        height_posterior=height - wedge / 2,
        waist=float(np.clip(rng.normal(0.10, 0.025), 0.03, 0.18)),
        squareness=float(np.clip(rng.normal(0.22, 0.08), 0.0, 0.45)),
        posterior_hollow=float(np.clip(rng.normal(0.24 if name not in ("L5", "L6") else 0.10, 0.05), 0.0, 0.4)),
        endplate_hollow=float(np.clip(rng.normal(dials.endplate_hollow, 0.6) + 0.6 * wear, 0.6, 4.5)),
        lipping=float(max(0.0, rng.gamma(1.2, 1.1) * wear)),
        cortex=0.78 * habit.cortex * float(rng.normal(1, 0.05)),
        endplate=0.98 * habit.cortex * float(rng.normal(1, 0.08)),
        posterior_cortex=(posterior := 1.95 * habit.cortex * habit.posterior * float(rng.normal(1, 0.05))),
        lateral_cortex=posterior,  # see _arched
        trabecular_mg_cm3=max(22.0, habit.density * level * float(rng.normal(1, dials.level_scatter))),
        canal_width=(23.5 if name[0] == "L" else 20.5) * b * float(rng.normal(1, 0.06)),
        canal_depth=(16.0 if name[0] == "L" else 15.5) * b * float(rng.normal(1, 0.07)),
        pedicle_width=size.pedicle_width * b * float(rng.normal(1, 0.09)),
        pedicle_height=size.pedicle_height * b * float(rng.normal(1, 0.06)),
        transverse_span=size.transverse_span * b * float(rng.normal(1, 0.07)),
        transverse_rise=float(rng.normal(4.0 if name[0] == "L" else 2.0, 3.0)),
        spinous_length=size.spinous_length * b * float(rng.normal(1, 0.10)),
        spinous_drop=float(rng.normal(7.0 if name[0] == "L" else 15.0, 2.0)),
        spinous_height=(20.0 if name in ("L1", "L2", "L3", "L4") else 15.0) * b * float(rng.normal(1, 0.10)),
        facet_size=float(rng.normal(1.0, 0.08) + 0.15 * wear),
        texture_shift=(float(rng.uniform(0, 64)), float(rng.uniform(0, 64)), float(rng.uniform(0, 64))),
    )


def _sacrum(
    rng: Rng,
    build: float,
    slope: float,
    bend: float,
    spin: float,
    position: np.typing.NDArray[np.float64],
    density: float,
) -> Sacrum:
    frame = Frame((float(position[0]), float(position[1]), float(position[2])), (slope + 0.06, 0.6 * bend, 0.6 * spin))
    wing = (float(rng.normal(131, 6)), float(rng.normal(82, 6)), float(rng.normal(95, 8)))
    return Sacrum(
        frame,
        50.0 * build * float(rng.normal(1, 0.04)),
        33.0 * build * float(rng.normal(1, 0.04)),
        29.0 * build * float(rng.normal(1, 0.04)),
        float(np.radians(rng.normal(16, 4))),
        108.0 * build * float(rng.normal(1, 0.03)),
        max(20.0, 0.9 * density * float(rng.normal(1, 0.06))),
        wing,
        float(rng.normal(48, 9)),
        float(rng.normal(9, 1.2)),
    )


def _vessels(rng: Rng, sex: str, age: int) -> Vessels:
    radius = (9.2 if sex == "M" else 8.0) + 0.035 * (age - 60)
    return Vessels(
        float(np.clip(rng.normal(radius, 0.9), 6, 14)),
        float(rng.normal(9, 4)),
        float(rng.normal(10.5, 1.5)),
        float(rng.normal(17, 3)),
        float(np.clip(rng.beta(1.0, 3.0) + 0.012 * (age - 60), 0, 1)),
        float(rng.uniform(1, 5)),
    )


def _torso(rng: Rng, sex: str, bmi: float, build: float, spine: tuple[Vertebra, ...], sacrum: Sacrum) -> Torso:
    man = sex == "M"
    tips = [v.frame.to_lps((0.0, 0.4 * v.depth + v.canal_depth + 7 + v.spinous_length, -8.0))[1] for v in spine]
    tips.append(sacrum.frame.to_lps((0.0, sacrum.depth / 2 + 22, -35.0))[1])
    back = max(tips)
    fronts = [v.frame.center[1] - v.depth / 2 for v in spine[:7]]
    fat_back = float(np.clip((7 if man else 9) + 1.5 * (bmi - 20) + rng.normal(0, 3), 4, 45))
    half_width = float((164 if man else 152) * build**0.5 + 4.6 * (bmi - 22) + rng.normal(0, 6))
    half_depth = float((104 if man else 95) * build**0.5 + 4.0 * (bmi - 22) + rng.normal(0, 6))
    # room for vessels and bowel before the foremost body, however thin the patient
    half_depth = max(half_depth, (back + fat_back - min(fronts) + 62 + 1.5 * max(0.0, bmi - 17)) / 2)
    half_width = max(half_width, 1.32 * half_depth)
    x, _, z = spine[2].frame.center
    center: Vec3 = (x + float(rng.normal(0, 4)), back + fat_back - half_depth, z)
    thin = 0.6 if man else 1.0
    return Torso(
        seed=int(rng.integers(2**31)),
        center=center,
        roll_rad=spine[2].frame.angles_rad[2],
        half_width=half_width,
        half_depth=half_depth,
        hip_widening=float(rng.normal(6 if man else 16, 6)),
        chest_widening=float(rng.normal(2, 6)),
        squareness=float(rng.uniform(0.1, 0.5)),
        fat_side=float(np.clip(thin * (10 + 2.4 * (bmi - 20)) + rng.normal(0, 3), 3, 60)),
        fat_front=float(np.clip(thin * (13 + 2.6 * (bmi - 20)) + rng.normal(0, 4), 3, 70)),
        fat_back=fat_back,
        wall=float(np.clip(rng.normal(15 if man else 12, 2.5), 6, 22)),
        psoas=float((19 if man else 15.5) * rng.normal(1, 0.12)),
        erector=float(rng.normal(1.05 if man else 0.95, 0.1)),
        kidney=(float(rng.normal(26, 2.5)), float(rng.normal(28, 2.5)), float(rng.normal(52, 4))),
        kidney_lift=float(rng.normal(20, 10)),
        liver=float(rng.normal(1.0, 0.12)),
        lung_lift=float(rng.normal(20, 14)),
        bowel_count=int(rng.integers(25, 60)),
        gas=float(rng.uniform(0.05, 0.6)),
        visceral_fat_hu=float(np.clip(rng.normal(-85 - 1.2 * (bmi - 22), 12), -112, -40)),
        muscle_hu=float(rng.normal(54 if man else 48, 7)),
        ribs=True,
        table_gap=float(rng.uniform(2, 14)),
    )


def _acquisition(rng: Rng, day: Rng, given: dict[str, Value], bmi: float, torso: Torso, dials: Dials) -> Acquisition:
    shares = np.array(list(VENDOR_PATIENTS.values())) / sum(VENDOR_PATIENTS.values())
    vendor = str(rng.choice(list(VENDOR_PATIENTS), p=shares))
    vendor = str(given.get("vendor", vendor))
    kernel = str(day.choice(KERNELS_OF.get(vendor, (VENDORS[vendor],))))
    noise = dials.noise * float(np.clip(rng.normal(12 + 0.35 * (bmi - 22), 2.5), 7, 22))
    fov = float(
        np.clip(
            5 * np.ceil((2 * (torso.half_width + max(torso.hip_widening, torso.chest_widening, 0.0)) + 25) / 5),
            350,
            500,
        )
    )
    coverage = given.get("coverage", ("T12", "S1"))
    assert isinstance(coverage, tuple)
    drop = given.get("drop_slice")
    drift = float(day.normal(0, dials.drift_sd)) - dials.hardening * (torso.radius_cm - 14.0)
    if "mineral_gain" in given:  # where it is not told, the very same number as ever
        drift = (1.0 + drift) * _float(given["mineral_gain"]) - 1.0
    return Acquisition(
        vendor,
        str(given.get("kernel", kernel)),
        int(_float(given.get("kvp", 120))),
        _float(given.get("slice_mm", 3.0)),
        _float(given.get("fov_mm", fov)),
        _float(given.get("noise_hu", noise)),
        str(given.get("contrast_phase", "native")),
        coverage,
        None if drop is None else int(_float(drop)),
        drift,
        _float(given.get("tilt_deg", 0.0)),
    )
