"""The drawings of a value against its reference bands, computed here and drawn by a template as plain SVG.

Lengths are in the drawing's own units (`WIDTH` wide); values keep the unit of their axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.domain.criteria import PROFILES, CriteriaProfile
from service.domain.figures import digits_beside
from service.domain.policy import ReferralPolicy
from service.domain.result import LEVELS
from service.web.words import number

WIDTH = 640.0
MARGIN = 14.0


@dataclass(frozen=True, slots=True)
class Band:
    """One stretch of the axis; `tone` is a class name."""

    x: float
    width: float
    label: str
    tone: str


@dataclass(frozen=True, slots=True)
class Mark:
    """One value with its interval; `main` is the patient's (or the deciding) one, the others stay small."""

    x: float
    low_x: float | None
    high_x: float | None
    label: str
    main: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """A threshold, written below the bands."""

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class Axis:
    """A whole drawing."""

    title: str
    unit: str
    summary: str  # what a screen reader says
    bands: tuple[Band, ...]
    marks: tuple[Mark, ...]
    ticks: tuple[Tick, ...]
    note: str | None = None


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float

    def x(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(MARGIN + share * (WIDTH - 2 * MARGIN), 1)


def axes(document: Mapping[str, Any], policy: ReferralPolicy) -> list[Axis]:
    """The drawings for one result: BMD, CT attenuation and TBS, each only where it was measured."""
    judged_by = document["decision"]["criteria"]
    drawn = (
        _bmd(document["patient"], document["levels"], PROFILES.get(judged_by, policy.profile)),
        _attenuation(document["levels"], document["patient"], policy),
        _tbs(document["patient"], document["levels"], policy),
    )
    return [axis for axis in drawn if axis is not None]


def _bmd(patient: Mapping[str, Any], levels: Mapping[str, Any], profile: CriteriaProfile) -> Axis | None:
    """Against the thresholds of the criteria, in g/cm2 for the young adults that stand behind %YAM and T."""
    used = patient["reference"]
    if used is None:
        return None if patient["bmd_g_cm2"] is None else _bmd_alone(patient, levels)
    young = (used["mean_g_cm2"], used["sd_g_cm2"])
    low = max(profile.osteoporosis, key=lambda cut: cut.bmd_g_cm2(*young))
    middle = max(profile.osteopenia, key=lambda cut: cut.bmd_g_cm2(*young))
    edges = (low.bmd_g_cm2(*young), middle.bmd_g_cm2(*young))
    digits = digits_beside(used["bmd_g_cm2"], edges, 2)
    return _axis(
        title=f"BMD, {used['region']}",
        unit="g/cm²",
        value=used["bmd_g_cm2"],
        interval=used["bmd_interval"],
        others=[(name, value) for name, value in _others(levels, "bmd_g_cm2") if name in used["levels"]],
        edges=edges,
        ticks=tuple(number(edge, digits) for edge in edges),
        labels=(low.words, middle.words, f"above {middle.limit}" if middle.inclusive else f"{middle.limit} and above"),
        reach=(0.4, 1.5),
        digits=digits,
        note=None,
    )


def _bmd_alone(patient: Mapping[str, Any], levels: Mapping[str, Any]) -> Axis:
    return _axis(
        title="BMD",
        unit="g/cm²",
        value=patient["bmd_g_cm2"],
        interval=patient["bmd_interval"],
        others=_others(levels, "bmd_g_cm2"),
        edges=(),
        ticks=(),
        labels=("no reference in force",),
        reach=(0.4, 1.5),
        digits=2,
        note="%YAM and its bands are withheld: no young-adult reference is in force here (see the reasons).",
    )


def _attenuation(levels: Mapping[str, Any], patient: Mapping[str, Any], policy: ReferralPolicy) -> Axis | None:
    """L1 leads: the published thresholds hold for L1; the other levels stand beside it."""
    first = levels["L1"]
    value = first["hu_mean"] if first["valid"] else None
    others = _others(levels, "hu_mean")
    if value is None and patient["hu_mean"] is None:
        return None
    return _axis(
        title="CT attenuation, L1" if value is not None else "CT attenuation, mean of levels",
        unit="HU",
        value=value if value is not None else patient["hu_mean"],
        interval=first.get("hu_shift_range") if value is not None else None,
        others=[(name, level) for name, level in others if name != "L1"],
        edges=(policy.hu_refer, policy.hu_no_flag),
        ticks=(f"{policy.hu_refer:g}", f"{policy.hu_no_flag:g}"),
        labels=(f"≤ {policy.hu_refer:g}", "between", f"> {policy.hu_no_flag:g}"),
        reach=(20.0, 260.0),
        digits=0,
        note=None if value is not None else "L1 was not measured; the thresholds hold for L1 only.",
    )


def _tbs(patient: Mapping[str, Any], levels: Mapping[str, Any], policy: ReferralPolicy) -> Axis | None:
    if patient["tbs"] is None:
        return None
    limit = policy.tbs_impaired
    return _axis(
        title="TBS",
        unit="",
        value=patient["tbs"],
        interval=patient["tbs_interval"],
        others=_others(levels, "tbs"),
        edges=(limit,),
        ticks=(f"{limit:g}",),
        labels=(f"≤ {limit:g}", f"> {limit:g}"),
        reach=(1.0, 1.6),
        digits=2,
        note=None,
    )


def _others(levels: Mapping[str, Any], key: str) -> list[tuple[str, float]]:
    return [(name, levels[name][key]) for name in LEVELS if levels[name]["valid"] and levels[name][key] is not None]


def _axis(
    *,
    title: str,
    unit: str,
    value: float,
    interval: Sequence[float] | None,
    others: Sequence[tuple[str, float]],
    edges: tuple[float, ...],
    ticks: tuple[str, ...],
    labels: tuple[str, ...],
    reach: tuple[float, float],
    digits: int,
    note: str | None,
) -> Axis:
    shown = [value, *(interval or ()), *(other for _, other in others), *edges]
    span = reach[1] - reach[0]
    scale = _Scale(min(reach[0], min(shown) - span / 20), max(reach[1], max(shown) + span / 20))
    bounds = [scale.low, *edges, scale.high]
    tones = {1: ("plain",), 2: ("low", "high"), 3: ("low", "middle", "high")}[len(labels)]
    bands = tuple(
        Band(scale.x(low), round(scale.x(high) - scale.x(low), 1), label, tone)
        for low, high, label, tone in zip(bounds, bounds[1:], labels, tones, strict=False)
    )
    small = [Mark(scale.x(other), None, None, name, main=False) for name, other in others]
    low_x, high_x = (scale.x(interval[0]), scale.x(interval[1])) if interval else (None, None)
    digits = digits_beside(value, edges, digits)
    main = Mark(scale.x(value), low_x, high_x, number(value, digits), main=True)
    spread = f", interval {number(interval[0], digits)} to {number(interval[1], digits)}" if interval else ""
    return Axis(
        title=title,
        unit=unit,
        summary=f"{title} {number(value, digits)} {unit}{spread}; bands: {', '.join(labels)}",
        bands=bands,
        marks=(*small, main),
        ticks=tuple(Tick(scale.x(edge), text) for edge, text in zip(edges, ticks, strict=True)),
        note=note,
    )
