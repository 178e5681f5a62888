"""How a model does on patients whose DXA has arrived: agreement, calibration, coverage, and what became of its flags.

Each figure carries a 95 % interval, and with too few pairs there is none at all: a number would be believed. Pure, and
of the standard library alone. Methods: Bland and Altman 1986 and 1999 (limits of agreement, and their error), Fisher
1921 (interval of r), Wilson 1927 (of a proportion); coverage counts vertebrae and takes the patient as the unit that
was drawn (ratio estimator, Cochran, Sampling Techniques, 6.3); the quantile of t by its Cornish-Fisher expansion
(Abramowitz and Stegun 26.7.5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist, fmean, stdev

from service.domain.result import Category, Interval

LEVEL = 0.95
WITHIN = 1.96  # limits of agreement hold 95 % of the differences
_Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
LOW_T, VERY_LOW_T = -1.0, -2.5  # WHO 1994, by the densitometer's own T-score


@dataclass(frozen=True, slots=True)
class Vertebra:
    """One level that counts on both sides, g/cm2."""

    predicted: float
    dxa: float
    interval: Interval | None  # the model's own, of this level


@dataclass(frozen=True, slots=True)
class Compared:
    """One CT whose DXA has arrived."""

    vertebrae: tuple[Vertebra, ...]  # at least one
    category: Category
    t_score: float | None  # of the DXA's total, as the densitometer told it

    @property
    def predicted(self) -> float:
        """Mean over the levels that count on both sides, g/cm2."""
        return fmean(one.predicted for one in self.vertebrae)

    @property
    def dxa(self) -> float:
        """The same of the DXA."""
        return fmean(one.dxa for one in self.vertebrae)

    @property
    def error(self) -> float:
        """Predicted less measured, g/cm2."""
        return self.predicted - self.dxa


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval and the number that it rests on."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Third:
    """A third of the patients, from the lowest predicted density up: what was predicted, what came, g/cm2."""

    predicted: float
    dxa: float
    error: Estimate


@dataclass(frozen=True, slots=True)
class Flags:
    """What DXA said of the patients with and without a flag; those whose DXA told no T-score stand apart.

    "Confirmed" is a T-score below -1.0, "very low" one of -2.5 or less; neither is a diagnosis.
    """

    flagged: int
    confirmed: Estimate | None  # share of the flagged with T < -1.0
    flagged_very_low: Estimate | None  # share of the flagged with T <= -2.5
    unflagged: int
    missed: Estimate | None  # share of those with "no flag" whose T is < -1.0
    missed_very_low: Estimate | None
    without_t_score: int


@dataclass(frozen=True, slots=True)
class Performance:
    """Everything that is told about one group of pairs; the figures are None where there are too few."""

    n: int
    minimum: int
    figures: Figures | None


@dataclass(frozen=True, slots=True)
class Figures:
    """Agreement of the patients' mean densities, calibration, coverage, and flags."""

    mean_error: Estimate  # g/cm2, predicted less measured
    lower_limit: Estimate  # limits of agreement
    upper_limit: Estimate
    r: Estimate | None  # None where one side does not vary
    thirds: tuple[Third, ...]
    coverage: Estimate | None  # share of vertebrae whose DXA lies in the model's own interval
    flags: Flags


def performance(pairs: Iterable[Compared], minimum: int) -> Performance:
    """The figures of a group of pairs, or that there are too few (fewer than `minimum`, at least 6)."""
    found = tuple(pairs)
    least = max(minimum, 6)
    return Performance(len(found), least, _figures(found) if len(found) >= least else None)


def _figures(pairs: Sequence[Compared]) -> Figures:
    errors = [one.error for one in pairs]
    n, mean, spread = len(errors), fmean(errors), stdev(errors)
    of_limits = _t(n - 1) * spread * math.sqrt(1 / n + WITHIN**2 / (2 * (n - 1)))
    lower, upper = mean - WITHIN * spread, mean + WITHIN * spread
    return Figures(
        mean_error=mean_of(errors),
        lower_limit=Estimate(lower, lower - of_limits, lower + of_limits, n),
        upper_limit=Estimate(upper, upper - of_limits, upper + of_limits, n),
        r=correlation([one.predicted for one in pairs], [one.dxa for one in pairs]),
        thirds=_thirds(pairs),
        coverage=_coverage(pairs),
        flags=_flags(pairs),
    )


def mean_of(values: Sequence[float]) -> Estimate:
    """A mean of at least two values with its interval by t."""
    mean, half = fmean(values), _t(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, len(values))


def correlation(one: Sequence[float], other: Sequence[float]) -> Estimate | None:
    """Pearson's r of at least four pairs; None where one side does not vary."""
    n, mean_one, mean_other = len(one), fmean(one), fmean(other)
    across = math.fsum((a - mean_one) * (b - mean_other) for a, b in zip(one, other, strict=True))
    spread = math.fsum((a - mean_one) ** 2 for a in one) * math.fsum((b - mean_other) ** 2 for b in other)
    if spread <= 0:
        return None
    r = max(-1.0, min(1.0, across / math.sqrt(spread)))
    if abs(r) == 1.0:
        return Estimate(r, r, r, n)
    half = _Z / math.sqrt(n - 3)
    return Estimate(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), n)


def proportion(hits: int, n: int) -> Estimate | None:
    """A share with Wilson's interval; None of nobody."""
    if not n:
        return None
    share, z2 = hits / n, _Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), n)


def _thirds(pairs: Sequence[Compared]) -> tuple[Third, ...]:
    ordered = sorted(pairs, key=lambda one: one.predicted)
    ends = [round(len(ordered) * k / 3) for k in range(4)]
    groups = [ordered[start:stop] for start, stop in pairwise(ends)]
    return tuple(
        Third(
            fmean(one.predicted for one in some), fmean(one.dxa for one in some), mean_of([one.error for one in some])
        )
        for some in groups
    )


def _coverage(pairs: Sequence[Compared]) -> Estimate | None:
    """Vertebrae of one patient err together, so the patient is the unit."""
    counts = [
        (sum(one.interval[0] <= one.dxa <= one.interval[1] for one in told if one.interval), len(told))
        for pair in pairs
        if (told := [one for one in pair.vertebrae if one.interval is not None])
    ]
    total, patients = sum(n for _, n in counts), len(counts)
    if patients < 2:
        return None
    share = sum(hits for hits, _ in counts) / total
    squares = math.fsum((hits - share * n) ** 2 for hits, n in counts)
    half = _t(patients - 1) * math.sqrt(patients / (patients - 1) * squares) / total
    if half == 0.0:  # all in, or none: the patients alone say how sure that is
        return proportion(patients if share else 0, patients)
    return Estimate(share, max(0.0, share - half), min(1.0, share + half), total)


def _flags(pairs: Sequence[Compared]) -> Flags:
    flagged = [one.t_score for one in pairs if one.category is Category.REFER]
    unflagged = [one.t_score for one in pairs if one.category is Category.NO_FLAG]
    told, told_un = ([t for t in some if t is not None] for some in (flagged, unflagged))
    return Flags(
        flagged=len(flagged),
        confirmed=proportion(sum(t < LOW_T for t in told), len(told)),
        flagged_very_low=proportion(sum(t <= VERY_LOW_T for t in told), len(told)),
        unflagged=len(unflagged),
        missed=proportion(sum(t < LOW_T for t in told_un), len(told_un)),
        missed_very_low=proportion(sum(t <= VERY_LOW_T for t in told_un), len(told_un)),
        without_t_score=sum(t is None for t in (*flagged, *unflagged)),
    )


def _t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t; off by less than 0.5 % from 5 degrees of freedom on."""
    z, v = _Z, degrees
    terms = (
        (z**3 + z) / (4 * v),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3),
    )
    return z + sum(terms)
