"""DXA of the lumbar spine: what a result must hold, and every reason why one is refused.

Pure: a result is judged from its own figures. What else is stored (duplicates, contradictions) `service.workflow.dxa`
knows. Limits are wide on purpose: they find wrong units and wrong columns, they do not judge patients.

Sources: [S1] NHANES 2007-2008, DXXSPN_E codebook: per level BMD 0.292-2.025 g/cm2, BMC 2.07-46.5 g, area 6.1-26.0 cm2,
TBS 0.647-1.782; total BMD 0.422-1.901, BMC 13.2-165, area 23.3-89.8. [S2] DOMAIN: plausible TBS 0.6-1.8.
[K] general knowledge that nobody here has verified.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from enum import StrEnum
from typing import Final

from service.domain.reasons import Code, Reason
from service.domain.result import LEVELS

REGION: Final = "lumbar-spine"  # the only region that is taken: its levels are what the CT is compared with
MAX_TEXT = 64  # characters of a patient ID (DICOM LO), a maker, a model, a number
OLDEST = date(1987, 1, 1)  # the first commercial DXA scanners [K]


class Validity(StrEnum):
    """Why a level counts or not, as NHANES codes it (DXXL1BCC and others, 0 to 6)."""

    VALID = "valid"
    OBJECT = "object"
    IMPLANT = "implant"
    NOISE = "noise"
    INSUFFICIENT_AREA = "insufficient-area"
    MOVEMENT = "movement"
    OTHER = "other"


NHANES_VALIDITY: Mapping[str, Validity] = {str(code): validity for code, validity in enumerate(Validity)}


@dataclass(frozen=True, slots=True)
class Figures:
    """What the densitometer said about one level, or about the total; None: it did not say."""

    bmd_g_cm2: float | None = None
    bmc_g: float | None = None
    area_cm2: float | None = None
    t_score: float | None = None
    z_score: float | None = None
    tbs: float | None = None

    @property
    def empty(self) -> bool:
        """True when nothing was said at all."""
        return all(value is None for value in asdict(self).values())


@dataclass(frozen=True, slots=True)
class Level:
    """One vertebra. Only valid levels are included in the total and compared with a CT."""

    figures: Figures
    validity: Validity = Validity.VALID

    @property
    def included(self) -> bool:
        """True when the level counts: valid, and with a density."""
        return self.validity is Validity.VALID and self.figures.bmd_g_cm2 is not None


@dataclass(frozen=True, slots=True)
class DxaScan:
    """One DXA result of the lumbar spine, as it was delivered."""

    patient_id: str
    scan_date: date
    manufacturer: str
    model: str
    levels: Mapping[str, Level]
    total: Figures = field(default_factory=Figures)
    region: str = REGION
    scan_id: str = ""  # the device's own number of the scan, where it gives one: tells two scans of one day apart
    sex: str = ""  # F, M or unknown
    synthetic: bool = False  # of a digital patient

    @property
    def included(self) -> tuple[str, ...]:
        """The levels that count."""
        return tuple(name for name in LEVELS if name in self.levels and self.levels[name].included)

    @property
    def identity(self) -> str:
        """SHA-256 of what makes it this scan: patient, day, device and the device's number."""
        return _digest([self.patient_id, self.scan_date.isoformat(), self.manufacturer.casefold(), self.scan_id])

    @property
    def content(self) -> str:
        """SHA-256 of all figures: two deliveries with one identity and one content are the same result."""
        levels = {name: [asdict(level.figures), level.validity.value] for name, level in sorted(self.levels.items())}
        return _digest([self.model, self.region, self.sex, self.synthetic, levels, asdict(self.total)])


@dataclass(frozen=True, slots=True)
class Limit:
    """What a figure may be, and its unit."""

    low: float
    high: float
    unit: str
    source: str


LEVEL_LIMITS: Mapping[str, Limit] = {
    "bmd_g_cm2": Limit(0.2, 2.5, "g/cm2", "[S1], with room"),
    "bmc_g": Limit(1.0, 60.0, "g", "[S1], with room"),
    "area_cm2": Limit(4.0, 35.0, "cm2", "[S1], with room"),
    "t_score": Limit(-10.0, 10.0, "", "[K]"),
    "z_score": Limit(-10.0, 10.0, "", "[K]"),
    "tbs": Limit(0.6, 1.8, "", "[S2]"),
}
TOTAL_LIMITS: Mapping[str, Limit] = {
    **LEVEL_LIMITS,
    "bmc_g": Limit(2.0, 200.0, "g", "[S1], with room"),
    "area_cm2": Limit(8.0, 120.0, "cm2", "[S1], with room; two levels at the least"),
}
# A figure that many times too large is in another unit: mg/cm2, mg, mm2.
_OTHER_UNITS: Mapping[str, tuple[float, str]] = {
    "bmd_g_cm2": (1000.0, "mg/cm2"),
    "bmc_g": (1000.0, "mg"),
    "area_cm2": (100.0, "mm2"),
}
# BMD = BMC / area to within the rounding of a print-out: BMC and area of two decimals give 0.002 g/cm2 at an area of
# 10 cm2 and a BMD of 1. 0.01 also passes an area that is printed with one decimal.
RATIO_TOLERANCE_G_CM2 = 0.01
# The total of the included levels, sum of BMC over sum of area, errs less than its parts do.
TOTAL_TOLERANCE_G_CM2 = 0.01
SUM_TOLERANCE = 0.02  # of summed BMC and area, relative


@dataclass(frozen=True, slots=True)
class Recomputed:
    """The total of the included levels, worked out anew; both, since devices and the paper do it differently."""

    by_area_g_cm2: float | None  # sum of BMC / sum of area, as devices do; None where a level lacks BMC or area
    mean_g_cm2: float | None  # mean of the levels, as Yoshida 2023 does
    bmc_g: float | None
    area_cm2: float | None


def recompute(scan: DxaScan) -> Recomputed:
    """The total of the included levels."""
    parts = [scan.levels[name].figures for name in scan.included]
    densities = [part.bmd_g_cm2 for part in parts if part.bmd_g_cm2 is not None]
    mean = sum(densities) / len(densities) if densities else None
    contents = [part.bmc_g for part in parts if part.bmc_g is not None]
    areas = [part.area_cm2 for part in parts if part.area_cm2 is not None]
    if not parts or len(contents) != len(parts) or len(areas) != len(parts):
        return Recomputed(None, mean, None, None)
    return Recomputed(sum(contents) / sum(areas), mean, sum(contents), sum(areas))


@dataclass(frozen=True, slots=True)
class Objection:
    """A reason why a result is not taken, and which part of it is meant: a level, "total", or "" for the whole."""

    where: str
    reason: Reason


def refusals(scan: DxaScan, today: date) -> tuple[Reason, ...]:
    """Every reason why this result is not taken; empty: it is."""
    return tuple(one.reason for one in objections(scan, today))


def objections(scan: DxaScan, today: date) -> tuple[Objection, ...]:
    """The same, with the part that each one means."""
    total = (*_ranges("total", scan.total, TOTAL_LIMITS), *_ratio("total", scan.total), *_total(scan))
    return (
        *(Objection("", reason) for reason in _who_and_when(scan, today)),
        *(Objection(name, reason) for name, level in scan.levels.items() for reason in _level(name, level)),
        *(Objection("total", reason) for reason in total),
    )


def _who_and_when(scan: DxaScan, today: date) -> Iterator[Reason]:
    if not scan.patient_id.strip():
        yield Reason(Code.DXA_PATIENT_MISSING, "no patient ID: the result could never be paired with a CT")
    if not OLDEST <= scan.scan_date <= today:
        yield Reason(Code.DXA_DATE, f"scanned on {scan.scan_date}: before {OLDEST.year}, or in the future")
    if not scan.manufacturer.strip() or not scan.model.strip():
        yield Reason(Code.DXA_DEVICE_MISSING, "manufacturer and model are needed: devices differ by more than patients")
    for name in ("patient_id", "manufacturer", "model", "scan_id"):
        told = getattr(scan, name)
        if len(told) > MAX_TEXT or not told.isprintable():
            yield Reason(Code.DXA_VALUE, f"{name} is longer than {MAX_TEXT} characters, or not printable")
    if scan.region != REGION:
        yield Reason(Code.DXA_REGION, f"region {scan.region!r}; only {REGION} is taken")
    if scan.sex not in ("F", "M", ""):
        yield Reason(Code.DXA_VALUE, "sex must be F, M or empty")
    unknown = sorted(set(scan.levels) - set(LEVELS))
    if unknown:
        yield Reason(Code.DXA_REGION, f"levels {', '.join(unknown)}; L1 to L4 are taken")
    if not scan.included:
        yield Reason(Code.DXA_NO_LEVEL, "no valid level with a BMD")


def _level(name: str, level: Level) -> Iterator[Reason]:
    if level.validity is Validity.VALID and level.figures.bmd_g_cm2 is None and not level.figures.empty:
        yield Reason(Code.DXA_VALUE, f"{name}: BMD is missing")
    if level.validity is Validity.VALID:  # an implant may well read 4 g/cm2: that is why the level is left out
        yield from _ranges(name, level.figures, LEVEL_LIMITS)
        yield from _ratio(name, level.figures)


def _ranges(where: str, figures: Figures, limits: Mapping[str, Limit]) -> Iterator[Reason]:
    for name, limit in limits.items():
        value: float | None = getattr(figures, name)
        if value is None:
            continue
        if not math.isfinite(value):
            yield Reason(Code.DXA_VALUE, f"{where}: {name} is no number")
        elif not limit.low <= value <= limit.high:
            yield _out_of_range(where, name, value, limit)


def _out_of_range(where: str, name: str, value: float, limit: Limit) -> Reason:
    factor, other = _OTHER_UNITS.get(name, (1.0, ""))
    if other and limit.low <= value / factor <= limit.high:
        return Reason(Code.DXA_UNIT, f"{where}: {name} {value:g} looks like {other}; {limit.unit} is needed")
    unit = f" {limit.unit}" if limit.unit else ""
    return Reason(Code.DXA_RANGE, f"{where}: {name} {value:g} is not within {limit.low:g} to {limit.high:g}{unit}")


def _ratio(where: str, figures: Figures) -> Iterator[Reason]:
    bmd, bmc, area = figures.bmd_g_cm2, figures.bmc_g, figures.area_cm2
    if bmd is None or bmc is None or area is None or not area > 0:
        return
    if not abs(bmd - bmc / area) <= RATIO_TOLERANCE_G_CM2:
        text = f"{where}: BMD {bmd:g} is not BMC / area = {bmc / area:.3f} g/cm2"
        yield Reason(Code.DXA_INCONSISTENT, text)


def _total(scan: DxaScan) -> Iterator[Reason]:
    """The device's total against the included levels: a mismatch means other levels, or other columns."""
    told, found = scan.total, recompute(scan)
    which = ", ".join(scan.included)
    if not which:
        return
    if told.bmd_g_cm2 is not None:
        if found.by_area_g_cm2 is not None:
            expected, off = found.by_area_g_cm2, abs(told.bmd_g_cm2 - found.by_area_g_cm2)
        else:  # without areas the weighted mean lies somewhere between the levels
            densities = [scan.levels[name].figures.bmd_g_cm2 or 0.0 for name in scan.included]
            expected = min(max(told.bmd_g_cm2, min(densities)), max(densities))
            off = abs(told.bmd_g_cm2 - expected)
        if not off <= TOTAL_TOLERANCE_G_CM2:
            text = f"total BMD {told.bmd_g_cm2:g}, but {which} give {expected:.3f} g/cm2"
            yield Reason(Code.DXA_TOTAL_MISMATCH, text)
    for name, value, expected_sum in (
        ("BMC", told.bmc_g, found.bmc_g),
        ("area", told.area_cm2, found.area_cm2),
    ):
        if value is not None and expected_sum is not None and not abs(value - expected_sum) <= SUM_TOLERANCE * value:
            yield Reason(Code.DXA_TOTAL_MISMATCH, f"total {name} {value:g}, but {which} add up to {expected_sum:.2f}")


def included_in(region: str) -> tuple[str, ...] | None:
    """The levels that a region of a print-out names, "L1-L4" or "L1,L3-L4"; None for another part of the body."""
    text = region.upper().replace(" ", "").replace("&", ",").replace("+", ",").replace("–", "-")
    found: list[str] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if first not in LEVELS or (dash and last not in LEVELS):
            return None
        start, stop = LEVELS.index(first), LEVELS.index(last or first)
        if stop < start:
            return None
        found += LEVELS[start : stop + 1]
    return tuple(name for name in LEVELS if name in found)


_GE = re.compile(r"^ge\b|^ge[_-]|general electric|\bgehc|\bgems\b")


def manufacturer_named(told: str) -> str:
    """One name for one maker: "GE", "GE Medical Systems" and "Lunar" are the same line of devices."""
    words = told.strip()
    key = words.casefold()
    if "hologic" in key:
        return "Hologic"
    if "lunar" in key or _GE.search(key):
        return "GE Lunar"
    return "Norland" if "norland" in key else words


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
