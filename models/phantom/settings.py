"""The `--set KEY=VALUE` keys of a digital patient, checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping

from models.phantom.anatomy import KINDS, LUMBAR_COUNTS, Fracture, spine_names
from models.phantom.dials import CAUSES, Dials, turned

Setting = str | int | float | bool
Value = str | int | float | bool | tuple[str, str] | None

VENDORS = {"canon": "FC18", "siemens": "Br40", "philips": "B", "ge": "STANDARD"}  # default kernel
PHASES = ("native", "arterial", "portal")
KVP = (80, 100, 120, 140)
COVERAGE = (*spine_names(max(LUMBAR_COUNTS))[::-1], "S1")  # cranial to caudal
FRACTURE_PERCENT = (5.0, 70.0)

# key: (lowest, highest)
RANGES = {
    "bmi": (14.0, 45.0),
    "slice_mm": (0.5, 5.0),
    "fov_mm": (200.0, 500.0),
    "noise_hu": (0.0, 60.0),
    "mineral_gain": (0.7, 1.3),
    "bmd_g_cm2": (0.4, 1.8),
    "cobb_deg": (-60.0, 60.0),
    "tbs": (0.5, 2.0),
    "tilt_deg": (-30.0, 30.0),
}
WHOLE = {"age": (20, 100), "lumbar_count": (min(LUMBAR_COUNTS), max(LUMBAR_COUNTS))}
SWITCHES = ("ribs", "t13_ribs")
LEVEL_LISTS = ("metal", "cement", "sclerosis")
CHOICES: dict[str, tuple[str, ...]] = {"sex": ("F", "M"), "vendor": tuple(VENDORS), "contrast_phase": PHASES}
TEXTS = ("fracture", "kvp", "kernel", "coverage", "drop_slice", "dials")
KEYS = (*RANGES, *WHOLE, *CHOICES, *SWITCHES, *LEVEL_LISTS, *TEXTS)


def check(settings: Mapping[str, Setting]) -> dict[str, Value]:
    """Settings with their types (lists as text in one form); ValueError says which key and what it may be."""
    checked = {key: _value(key, given) for key, given in settings.items()}
    names = spine_names(int(str(checked.get("lumbar_count", 5))))
    named = {key: levels(str(checked[key])) for key in LEVEL_LISTS if key in checked}
    if "fracture" in checked:
        named["fracture"] = tuple(f.level for f in fractures(str(checked["fracture"])))
    coverage = checked.get("coverage")
    if isinstance(coverage, tuple):
        named["coverage"] = tuple(end for end in coverage if end != "S1")
    for key, wanted in named.items():
        for level in wanted:
            if level not in names:
                raise ValueError(f"{key} must name levels of this spine ({', '.join(names[::-1])}), not {level}")
    if checked.get("ribs") is False and checked.get("t13_ribs"):
        raise ValueError("t13_ribs must be no where ribs is no")
    return checked


def levels(text: str) -> tuple[str, ...]:
    """The levels of a list such as `L2,L3`."""
    return tuple(part.strip().upper() for part in text.split(",") if part.strip())


def fractures(text: str) -> tuple[Fracture, ...]:
    """The fractures of a list such as `L2:30,T12:45:crush`; a kind that isn't told is a wedge."""
    out = []
    for part in text.split(","):
        words = [word.strip() for word in part.split(":")]
        level, percent, kind = (*words, KINDS[0]) if len(words) == 2 else words
        out.append(Fracture(level.upper(), float(percent.removesuffix("%")), kind.lower()))
    return tuple(out)


def causes(text: str) -> tuple[str, ...]:
    """The causes of a list such as `wear,marrow`."""
    return tuple(part.strip().lower() for part in text.split(",") if part.strip())


def dials_of(settings: Mapping[str, Setting | Value]) -> Dials:
    """The dials that these settings ask for; the frozen ones where they ask for none."""
    return turned(causes(str(settings["dials"]))) if "dials" in settings else turned(())


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """`KEY=VALUE` strings as a dictionary."""
    out = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"a setting is KEY=VALUE, not {text!r}")
        out[key.strip()] = value.strip()
    return out


def _value(key: str, given: Setting) -> Value:
    if key in RANGES:
        return _number(key, given, *RANGES[key])
    if key in WHOLE:
        return _whole(key, given, *WHOLE[key])
    if key in CHOICES:
        return _choice(key, str(given), CHOICES[key])
    if key == "kvp":
        kvp = _whole(key, given, min(KVP), max(KVP))
        if kvp not in KVP:
            raise ValueError(f"kvp must be one of {', '.join(map(str, KVP))}, not {given!r}")
        return kvp
    if key in SWITCHES:
        return _switch(key, given)
    if key in LEVEL_LISTS:
        return _levels(key, str(given))
    if key == "fracture":
        return _fractures(str(given))
    if key == "kernel":
        return _kernel(str(given))
    if key == "coverage":
        return _coverage(str(given))
    if key == "drop_slice":
        return _drop(given)
    if key == "dials":
        return _causes(str(given))
    raise ValueError(f"unknown setting {key!r}; known: {', '.join(sorted(KEYS))}")


def _number(key: str, given: Setting, low: float, high: float) -> float:
    try:
        value = float(given)
    except ValueError:
        raise ValueError(f"{key} must be a number, not {given!r}") from None
    if not low <= value <= high:
        raise ValueError(f"{key} must be {low:g} to {high:g}, not {given!r}")
    return value


def _whole(key: str, given: Setting, low: int, high: int) -> int:
    value = _number(key, given, low, high)
    if value != int(value):
        raise ValueError(f"{key} must be a whole number, not {given!r}")
    return int(value)


def _choice(key: str, given: str, allowed: tuple[str, ...]) -> str:
    for choice in allowed:
        if given.strip().lower() == choice.lower():
            return choice
    raise ValueError(f"{key} must be one of {', '.join(allowed)}, not {given!r}")


def _switch(key: str, given: Setting) -> bool:
    text = str(given).strip().lower()
    if text not in ("yes", "no", "true", "false"):
        raise ValueError(f"{key} must be yes or no, not {given!r}")
    return text in ("yes", "true")


def _levels(key: str, given: str) -> str:
    named = levels(given)
    known = COVERAGE[:-1]
    if not named or len(set(named)) < len(named) or not set(named) <= set(known):
        raise ValueError(f"{key} must be levels like L2,L3 (from {', '.join(known)}, each once), not {given!r}")
    return ",".join(named)


def _fractures(given: str) -> str:
    low, high = FRACTURE_PERCENT
    rule = f"LEVEL:PERCENT or LEVEL:PERCENT:KIND, {low:g} to {high:g} % of height lost, kind {' or '.join(KINDS)}"
    refusal = ValueError(f"fracture must be {rule}, each level once, such as L2:30,T12:45:crush, not {given!r}")
    try:
        found = fractures(given)
    except ValueError:
        raise refusal from None
    known = {f.level for f in found} <= set(COVERAGE[:-1]) and len({f.level for f in found}) == len(found)
    if not known or not all(low <= f.percent <= high and f.kind in KINDS for f in found):
        raise refusal
    return ",".join(f"{f.level}:{f.percent:g}:{f.kind}" for f in found)


def _kernel(given: str) -> str:
    if not given.strip() or len(given) > 16 or "\\" in given:
        raise ValueError(f"kernel must be a name of 1 to 16 characters, not {given!r}")
    return given.strip()


def _coverage(given: str) -> tuple[str, str]:
    top, dash, bottom = given.strip().upper().partition("-")
    if not dash or top not in COVERAGE or bottom not in COVERAGE or COVERAGE.index(top) > COVERAGE.index(bottom):
        raise ValueError(f"coverage must be like T12-S1 (from {', '.join(COVERAGE)}), not {given!r}")
    return top, bottom


def _causes(given: str) -> str:
    named = causes(given)
    if not named or len(set(named)) < len(named) or not set(named) <= set(CAUSES):
        raise ValueError(f"dials must be of {', '.join(CAUSES)}, each once, not {given!r}")
    return ",".join(named)


def _drop(given: Setting) -> int | None:
    text = str(given).strip().lower()
    if text in ("true", "yes"):
        return -1
    if text in ("false", "no", "none"):
        return None
    return _whole("drop_slice", given, 0, 10_000)
