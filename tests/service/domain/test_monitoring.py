"""The figures of live performance against values worked out elsewhere, and silence where there are too few pairs."""

from __future__ import annotations

import random
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from service.domain.monitoring import Compared, Estimate, Vertebra, _t, correlation, mean_of, performance, proportion
from service.domain.result import Category


def pair(predicted: float, dxa: float, half: float = 0.1, category: str = "refer", t: float | None = None) -> Compared:
    level = Vertebra(predicted, dxa, (predicted - half, predicted + half))
    return Compared((level, level), Category(category), t)


def drawn(n: int, bias: float = 0.0, seed: int = 1) -> list[Compared]:
    """True densities about 1.0, predicted with an error of 0.05."""
    dice = random.Random(seed)
    return [pair((true := dice.gauss(1.0, 0.15)) + bias + dice.gauss(0, 0.05), true) for _ in range(n)]


@pytest.mark.parametrize("n", [0, 1, 19])
def test_too_few_pairs_give_no_figure(n: int) -> None:
    found = performance(drawn(n), 20)
    assert (found.n, found.minimum, found.figures) == (n, 20, None)


def test_a_minimum_that_is_too_small_is_raised() -> None:
    assert performance(drawn(5), 1).figures is None
    assert performance(drawn(6), 1).figures is not None


@pytest.mark.parametrize("degrees", [5, 10, 19, 60, 500])
def test_the_quantile_of_t(degrees: int) -> None:
    assert _t(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=5e-3)


def test_agreement_is_that_of_bland_and_altman() -> None:
    pairs = drawn(60, bias=0.03)
    figures = performance(pairs, 20).figures
    assert figures is not None
    errors = np.array([one.predicted - one.dxa for one in pairs])
    low, high = stats.t.interval(0.95, 59, errors.mean(), stats.sem(errors))
    assert figures.mean_error.value == pytest.approx(errors.mean())
    assert (figures.mean_error.low, figures.mean_error.high) == pytest.approx((low, high), abs=1e-4)
    assert figures.upper_limit.value == pytest.approx(errors.mean() + 1.96 * errors.std(ddof=1))
    # Bland and Altman 1999: the standard error of a limit is about 1.71 s / sqrt(n)
    half = figures.upper_limit.high - figures.upper_limit.value
    assert half == pytest.approx(stats.t.ppf(0.975, 59) * 1.71 * errors.std(ddof=1) / 60**0.5, rel=0.01)
    assert figures.r is not None
    expected = stats.pearsonr([one.predicted for one in pairs], [one.dxa for one in pairs])
    assert figures.r.value == pytest.approx(expected.statistic)
    assert (figures.r.low, figures.r.high) == pytest.approx(tuple(expected.confidence_interval(0.95)), abs=1e-9)


def test_thirds_show_a_model_that_pulls_towards_the_mean() -> None:
    pairs = [pair(1.0 + 0.5 * (true - 1.0), true) for true in np.linspace(0.7, 1.3, 31)]
    figures = performance(pairs, 20).figures
    assert figures is not None
    low, middle, high = figures.thirds
    assert low.error.low > 0.05  # the lowest are told too high
    assert high.error.high < -0.05
    assert abs(middle.error.value) < 0.01
    assert sum(one.error.n for one in figures.thirds) == 31
    assert low.predicted < middle.predicted < high.predicted


def test_intervals_of_95_per_cent_hold_their_truth_about_so_often() -> None:
    held = []
    for seed in range(200):
        figures = performance(drawn(25, bias=0.02, seed=seed), 20).figures
        assert figures is not None
        held.append(figures.mean_error.low <= 0.02 <= figures.mean_error.high)
    assert 0.90 <= fmean(held) <= 0.99


def test_coverage_takes_the_patient_as_its_unit() -> None:
    """Four vertebrae of one patient are all in, or all out: no more sure than one vertebra each."""
    within = [Vertebra(1.0, 1.0, (0.9, 1.1))] * 4
    without = [Vertebra(1.0, 1.2, (0.9, 1.1))] * 4
    some = [Compared(tuple(within if k % 10 else without), Category.REFER, None) for k in range(50)]
    figures = performance(some, 20).figures
    assert figures is not None
    assert figures.coverage is not None
    assert figures.coverage.value == pytest.approx(0.9)
    assert figures.coverage.n == 200
    assert figures.coverage.high - figures.coverage.low > 0.15  # 200 vertebrae by themselves would say 0.083
    every = performance(drawn(30), 20).figures  # an error of 0.05 within 0.1: nearly always in
    assert every is not None
    assert every.coverage is not None
    assert every.coverage.value > 0.9
    assert every.coverage.high <= 1.0


def test_flags_are_held_against_the_densitometers_own_t_score() -> None:
    flagged = [pair(0.8, 0.8, t=t) for t in (-3.0, -2.5, -1.5, -1.0, 0.5, None)]
    others = [pair(1.1, 1.1, category="no-flag", t=t) for t in (0.0, -0.5, -1.2, -2.6)]
    doubt = [pair(1.0, 1.0, category="indeterminate", t=-3.0)] * 12
    figures = performance([*flagged, *others, *doubt], 20).figures
    assert figures is not None
    flags = figures.flags
    assert (flags.flagged, flags.unflagged, flags.without_t_score) == (6, 4, 1)
    assert flags.confirmed is not None
    assert (flags.confirmed.value, flags.confirmed.n) == (0.6, 5)
    assert flags.flagged_very_low is not None
    assert flags.flagged_very_low.value == 0.4
    assert flags.missed is not None
    assert flags.missed.value == 0.5
    assert flags.missed_very_low is not None
    assert flags.missed_very_low.value == 0.25


def test_shares_of_nobody_are_none_and_wilsons_interval_is_his() -> None:
    assert proportion(0, 0) is None
    found = proportion(3, 10)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.1078, 0.6032), abs=1e-3)


def test_a_side_that_does_not_vary_has_no_correlation() -> None:
    assert correlation([1.0] * 8, [1.0, 2.0] * 4) is None
    assert correlation([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]) == Estimate(1.0, 1.0, 1.0, 4)
    assert mean_of([1.0, 1.0, 1.0]) == Estimate(1.0, 1.0, 1.0, 3)


@pytest.mark.parametrize("category", ["refer", "no-flag"])
def test_a_t_score_on_a_limit_is_not_low_but_very_low(category: str) -> None:
    """-1.0 is not below -1.0; -2.5 is -2.5 or less; a tenth further on it is the other way round."""
    for t, low, very_low in ((-1.0, 0.0, 0.0), (-1.1, 1.0, 0.0), (-2.4, 1.0, 0.0), (-2.5, 1.0, 1.0)):
        figures = performance([pair(0.8, 0.8 + k / 100, category=category, t=t) for k in range(20)], 20).figures
        assert figures is not None
        flags = figures.flags
        found = (
            (flags.confirmed, flags.flagged_very_low) if category == "refer" else (flags.missed, flags.missed_very_low)
        )
        assert [one.value for one in found if one is not None] == [low, very_low]
