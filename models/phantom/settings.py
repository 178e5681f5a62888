"""The `--set KEY=VALUE` keys of a digital patient, checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping

Setting = str | int | float | bool
Value = str | int | float | bool | tuple[str, str] | None

VENDORS = {"canon": "FC18", "siemens": "Br40", "philips": "B", "ge": "STANDARD"}  # default kernel
PHASES = ("native", "arterial", "portal")
KVP = (80, 100, 120, 140)
COVERAGE = ("T10", "T11", "T12", "L1", "L2", "L3", "L4", "L5", "S1")  # cranial to caudal

# key: (lowest, highest)
RANGES = {
    "bmi": (14.0, 45.0),
    "slice_mm": (0.5, 5.0),
    "fov_mm": (200.0, 500.0),
    "noise_hu": (0.0, 60.0),
    "bmd_g_cm2": (0.4, 1.8),
    "cobb_deg": (-60.0, 60.0),
}
WHOLE = {"age": (20, 100)}
CHOICES: dict[str, tuple[str, ...]] = {"sex": ("F", "M"), "vendor": tuple(VENDORS), "contrast_phase": PHASES}
KEYS = (*RANGES, *WHOLE, *CHOICES, "kvp", "kernel", "coverage", "drop_slice")


def check(settings: Mapping[str, Setting]) -> dict[str, Value]:
    """Settings with their types; ValueError says which key and what it may be."""
    return {key: _value(key, given) for key, given in settings.items()}


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
    if key == "kernel":
        return _kernel(str(given))
    if key == "coverage":
        return _coverage(str(given))
    if key == "drop_slice":
        return _drop(given)
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


def _kernel(given: str) -> str:
    if not given.strip() or len(given) > 16 or "\\" in given:
        raise ValueError(f"kernel must be a name of 1 to 16 characters, not {given!r}")
    return given.strip()


def _coverage(given: str) -> tuple[str, str]:
    top, dash, bottom = given.strip().upper().partition("-")
    if not dash or top not in COVERAGE or bottom not in COVERAGE or COVERAGE.index(top) > COVERAGE.index(bottom):
        raise ValueError(f"coverage must be like T12-S1 (from {', '.join(COVERAGE)}), not {given!r}")
    return top, bottom


def _drop(given: Setting) -> int | None:
    text = str(given).strip().lower()
    if text in ("true", "yes"):
        return -1
    if text in ("false", "no", "none"):
        return None
    return _whole("drop_slice", given, 0, 10_000)
