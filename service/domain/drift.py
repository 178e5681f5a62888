"""Has a scanner changed? Its reference tissues and its flag rate against its own beginning, before any DXA can tell.

Tissues: an exponentially weighted moving average (EWMA; Roberts, Technometrics 1959;1:239; NIST/SEMATECH e-Handbook
6.3.2.4) of each tissue's HU, study by study, against mean and standard deviation of the scanner's first studies. The
limit also carries the error of a mean that was estimated from a few dozen studies, and one odd study counts for no
more than a few standard deviations. Flag rate: a Shewhart chart by week, with the exact chance (beta-binomial, prior of
Jeffreys) of so many flags among so few studies where the base rate itself is only estimated. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from statistics import fmean, stdev

from service.domain.policy import MonitoringPolicy
from service.domain.reasons import Code, Reason

TISSUES: Mapping[str, Code] = {
    "fat": Code.DRIFT_FAT_HU,
    "muscle": Code.DRIFT_MUSCLE_HU,
    "vessel": Code.DRIFT_VESSEL_HU,
}
LEAST_SD_HU = 2.0  # steadier than that no tissue of different people is
CALM_AGAIN = 0.5  # of the limit: an excursion ends well within it, so that an alert does not come and go
ODD_SD = 3.5  # what one study counts for at the most


@dataclass(frozen=True, slots=True, order=True)
class Scanner:
    """What makes two CTs comparable; the digital never stand beside people."""

    synthetic: bool
    manufacturer: str
    model: str
    kernel: str

    @property
    def label(self) -> str:
        """For people: "SIEMENS SOMATOM, kernel Br40"."""
        device = " ".join(part for part in (self.manufacturer, self.model) if part) or "unknown scanner"
        return f"{device}, kernel {self.kernel or 'unknown'}"


@dataclass(frozen=True, slots=True)
class Observation:
    """One measured CT."""

    day: date
    tissues: Mapping[str, float]  # of TISSUES, HU; what was not measured is absent
    flagged: bool | None  # None where the CT could not be assessed
    model: str  # whose decision it is: another model makes another flag rate


@dataclass(frozen=True, slots=True)
class Chart:
    """One tissue of one scanner; the figures are None while its beginning is still being gathered."""

    tissue: str
    n: int
    needed: int  # studies of the beginning
    mean_hu: float | None = None
    sd_hu: float | None = None
    now_hu: float | None = None  # the weighted average
    limit_hu: float | None = None  # how far from the mean it may lie
    since: date | None = None  # the first study of the present excursion
    studies: int = 0  # of the excursion, the first one beyond the limit included
    excursions: int = 0  # so far, the present one included


@dataclass(frozen=True, slots=True)
class Week:
    """One ISO week of one scanner."""

    monday: date
    n: int
    decided: int
    flagged: int
    means_hu: Mapping[str, float]
    beyond: bool  # its flags are too many or too few for the scanner's beginning


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that a person should look at."""

    scanner: Scanner
    reason: Reason
    since: date


@dataclass(frozen=True, slots=True)
class Watched:
    """One scanner with its charts, weeks (the latest first) and alerts."""

    scanner: Scanner
    n: int
    charts: tuple[Chart, ...]
    weeks: tuple[Week, ...]
    alerts: tuple[Alert, ...]
    flag_base: tuple[int, int] | None  # flags among the decided studies of the beginning


def watch(scanner: Scanner, studies: Iterable[Observation], policy: MonitoringPolicy) -> Watched:
    """Look at everything that one scanner made; studies of one day stay in the order given."""
    ordered = sorted(studies, key=lambda one: one.day)
    charts = tuple(_chart(tissue, ordered, policy) for tissue in TISSUES)
    base, weeks = _weeks(ordered, policy)
    alerts = [_tissue_alert(scanner, chart) for chart in charts if chart.since is not None]
    return Watched(scanner, len(ordered), charts, weeks, (*alerts, *_flag_alert(scanner, weeks, base, policy)), base)


# --- tissues -----------------------------------------------------------------------------------------------------


def _chart(tissue: str, studies: Sequence[Observation], policy: MonitoringPolicy) -> Chart:
    seen = [(one.day, one.tissues[tissue]) for one in studies if tissue in one.tissues]
    needed = policy.baseline_studies
    if len(seen) < needed:
        return Chart(tissue, len(seen), needed)
    beginning = [value for _, value in seen[:needed]]
    mean, sd = fmean(beginning), max(stdev(beginning), LEAST_SD_HU)
    now, limit, since, count, excursions = mean, _limit(1, sd, needed, policy), None, 0, 0
    for number, (day, value) in enumerate(seen[needed:], start=1):
        odd = max(-ODD_SD * sd, min(ODD_SD * sd, value - mean))
        now += policy.ewma_weight * (mean + odd - now)
        limit = _limit(number, sd, needed, policy)
        if abs(now - mean) <= (limit if since is None else limit * CALM_AGAIN):
            since, count = None, 0
        else:
            excursions += since is None
            since, count = since or day, count + 1
    return Chart(tissue, len(seen), needed, mean, sd, now, limit, since, count, excursions)


def _limit(number: int, sd: float, needed: int, policy: MonitoringPolicy) -> float:
    """How far the average may lie from the mean after so many studies."""
    weight = policy.ewma_weight
    own = weight / (2 - weight) * (1 - (1 - weight) ** (2 * number))
    return policy.ewma_limit_sd * sd * math.sqrt(own + 1 / needed)


def _tissue_alert(scanner: Scanner, chart: Chart) -> Alert:
    assert chart.mean_hu is not None
    assert chart.now_hu is not None
    assert chart.limit_hu is not None
    assert chart.since is not None
    off = chart.now_hu - chart.mean_hu
    text = (
        f"{chart.tissue} reads {abs(off):.1f} HU {'higher' if off > 0 else 'lower'} than in the scanner's first "
        f"{chart.needed} studies ({chart.now_hu:.1f}, was {chart.mean_hu:.1f}; {chart.limit_hu:.1f} are allowed)"
    )
    return Alert(scanner, Reason(TISSUES[chart.tissue], text), chart.since)


# --- flags -------------------------------------------------------------------------------------------------------


def _weeks(studies: Sequence[Observation], policy: MonitoringPolicy) -> tuple[tuple[int, int] | None, tuple[Week, ...]]:
    """The base of the flag rate (None while it is gathered), and every week, the latest first."""
    model = studies[-1].model if studies else ""
    decided = [one for one in studies if one.flagged is not None and one.model == model]
    beginning, later = decided[: policy.baseline_studies], decided[policy.baseline_studies :]
    base = None
    if len(beginning) == policy.baseline_studies:
        base = sum(bool(one.flagged) for one in beginning), len(beginning)
    judged = dict(_by_week(later))
    found = [_week(monday, some, judged.get(monday, []), base, policy) for monday, some in _by_week(studies)]
    return base, tuple(reversed(found))


def _by_week(studies: Sequence[Observation]) -> Iterator[tuple[date, list[Observation]]]:
    weeks: dict[date, list[Observation]] = {}
    for one in studies:
        weeks.setdefault(one.day - timedelta(days=one.day.weekday()), []).append(one)
    yield from sorted(weeks.items())


def _week(
    monday: date,
    studies: Sequence[Observation],
    judged: Sequence[Observation],
    base: tuple[int, int] | None,
    policy: MonitoringPolicy,
) -> Week:
    flags = sum(bool(one.flagged) for one in judged)
    beyond = (
        base is not None
        and len(judged) >= policy.week_studies
        and min(chance_of(flags, len(judged), *base)) < policy.flag_chance / 2
    )
    means = {
        tissue: fmean(values)
        for tissue in TISSUES
        if (values := [one.tissues[tissue] for one in studies if tissue in one.tissues])
    }
    decided = [one for one in studies if one.flagged is not None]
    return Week(monday, len(studies), len(decided), sum(bool(one.flagged) for one in decided), means, beyond)


def chance_of(flags: int, n: int, base_flags: int, base_n: int) -> tuple[float, float]:
    """The chance of so many flags or fewer, and of so many or more, of a scanner that has not changed."""
    a, b = base_flags + 0.5, base_n - base_flags + 0.5
    chances = [
        math.exp(
            math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
            + _log_beta(k + a, n - k + b) - _log_beta(a, b)
        )
        for k in range(n + 1)
    ]  # fmt: skip
    return math.fsum(chances[: flags + 1]), math.fsum(chances[flags:])


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _flag_alert(
    scanner: Scanner, weeks: Sequence[Week], base: tuple[int, int] | None, policy: MonitoringPolicy
) -> Iterator[Alert]:
    """Where the latest week with enough studies is beyond."""
    full = [week for week in weeks if week.decided >= policy.week_studies]
    if base is None or not full or not full[0].beyond:
        return
    first = full[0]
    for week in full:
        if not week.beyond:
            break
        first = week
    text = (
        f"{full[0].flagged} of {full[0].decided} studies were flagged in the week of {full[0].monday}; "
        f"{base[0]} of {base[1]} in the scanner's beginning"
    )
    yield Alert(scanner, Reason(Code.DRIFT_FLAG_RATE, text), first.monday)
