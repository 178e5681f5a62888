"""Quiet time proposes, slice geometry disposes."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from service.domain.completeness import Closing, closing, normal_of, stack_of
from service.domain.facts import InstanceFacts
from service.domain.policy import DEFAULT_POLICY

from .helpers import GOOD, enhanced, series

RULES = DEFAULT_POLICY.eligibility
LAST = datetime(2026, 11, 23, 12, tzinfo=UTC)


def holed() -> list[InstanceFacts]:
    return [one for k, one in enumerate(series()) if k != 80]


def close_after(seconds: float, *found: list[InstanceFacts]) -> Closing:
    return closing(LAST + timedelta(seconds=seconds), LAST, 30, 300, found)


@pytest.mark.parametrize(
    ("seconds", "found", "close", "words"),
    [
        (10, series(), False, "last image 10 s ago; quiet after 30 s"),
        (31, series(), True, "every CT series is geometrically whole"),
        (31, holed(), False, "series 3 has a hole between -121.0 and -119.0 mm"),
        (300, holed(), True, "patience of 300 s exhausted: series 3 has a hole"),
        (31, [*series(80), *series()[100:110:3]], False, "series 3 has a hole"),
        (31, [], True, "whole"),
        (31, series(1), True, "whole"),
        (31, series(row_cosine=None), True, "whole"),  # no further slice would mend it
        (31, [replace(one, sop_class_uid="1.2.840.10008.5.1.4.1.1.4") for one in holed()], True, "whole"),
        (10, [enhanced(series())], False, "last image 10 s ago"),
        (31, [enhanced(series())], True, "whole"),
        (31, [enhanced(holed())], True, "whole"),  # a frame that it lacks will not follow
        (-5, series(), False, "last image -5 s ago"),  # a clock set back
    ],
)
def test_closing(seconds: float, found: list[InstanceFacts], close: bool, words: str) -> None:
    answer = close_after(seconds, found)
    assert answer.close is close
    assert words in answer.text


def test_one_holed_series_of_several_holds_the_study() -> None:
    assert not close_after(31, series(), holed()).close
    assert close_after(31, series(), series(40, step_mm=3.0)).close


def test_an_uneven_series_waits_too() -> None:
    images = series(20)
    images[-1] = replace(images[-1], position_lps_mm=(-150.0, -150.0, -180.7))
    assert "series 3 is unevenly spaced" in close_after(31, images).text


def test_spacing_comes_from_positions_not_from_the_tag() -> None:
    stack = stack_of(series(50, step_mm=0.8, slice_thickness_mm=5.0), RULES)
    assert stack is not None
    assert stack.spacing_mm == pytest.approx(0.8)
    assert stack.extent_mm == pytest.approx(50 * 0.8)
    assert stack.whole


def test_oblique_slices_are_spaced_along_their_normal() -> None:
    """Slices leaning by 3-4-5 about x, moved by 2 mm along their own normal."""
    column, normal = (0.0, 0.8, 0.6), (0.0, -0.6, 0.8)
    images = [
        replace(GOOD, column_cosine=column, position_lps_mm=(0.0, k * 2 * normal[1], k * 2 * normal[2]))
        for k in range(10)
    ]
    stack = stack_of(images, RULES)
    assert stack is not None
    assert stack.normal == pytest.approx(normal)
    assert stack.spacing_mm == pytest.approx(2.0)
    assert stack.shear_deg == pytest.approx(0.0, abs=1e-4)


def test_offsets_read_as_z_whichever_way_the_patient_lies() -> None:
    feet_first = stack_of(series(5, row_cosine=(-1.0, 0.0, 0.0)), RULES)
    head_first = stack_of(series(5), RULES)
    assert feet_first is not None
    assert head_first is not None
    assert feet_first.offsets_mm == head_first.offsets_mm == (-200.0, -199.0, -198.0, -197.0, -196.0)


def test_the_order_of_arrival_does_not_matter() -> None:
    images = holed()
    assert stack_of(random.Random(1).sample(images, len(images)), RULES) == stack_of(images, RULES)


def test_what_has_no_stack() -> None:
    assert stack_of([], RULES) is None
    assert stack_of(series(3, position_lps_mm=None), RULES) is None
    assert stack_of([*series(3), *series(3, row_cosine=(0.0, 0.0, 1.0))], RULES) is None
    assert stack_of(series(3, position_lps_mm=(1e308, 1e308, 1e308), row_cosine=(1.0, 0.0, 0.0)), RULES) is not None


@pytest.mark.parametrize("row", [None, (0.0, 0.0, 0.0), (2.0, 0.0, 0.0), (0.0, 1.0, 0.0), (float("nan"), 0.0, 0.0)])
def test_an_impossible_orientation_has_no_normal(row: tuple[float, float, float] | None) -> None:
    assert normal_of(replace(GOOD, row_cosine=row)) is None
