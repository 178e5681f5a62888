"""Who trains and who judges: by patient, for good."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain.splits import TENTHS, Part, Person, Place, places

PEOPLE = [Person(f"P{number}", 0.6 + 0.8 * (number * 37 % 100) / 100) for number in range(100)]


def locked(found: dict[str, Place]) -> set[str]:
    return {key for key, place in found.items() if place.part is Part.LOCKED}


def test_a_fifth_judges_and_the_rest_fill_the_tenths_evenly() -> None:
    found = places(PEOPLE, {}, seed=1, locked_share=0.2)
    assert len(locked(found)) == 20
    tenths = [place.tenth for place in found.values() if place.part is Part.TRAINING]
    assert sorted(tenths) == sorted([*range(TENTHS)] * 8)  # type: ignore[type-var]
    assert all(found[key].tenth is None for key in locked(found))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5])
def test_the_share_that_is_asked_for_is_locked(share: float) -> None:
    """Of 100, and evenly over density: in every stretch of the order, to a patient on either end."""
    found = places(PEOPLE, {}, seed=1, locked_share=share)
    assert len(locked(found)) == round(100 * share)
    order = sorted(PEOPLE, key=lambda one: one.bmd_g_cm2)
    assert abs(sum(one.key in locked(found) for one in order[:50]) - 50 * share) <= 1


def test_both_draws_are_even_over_density() -> None:
    """Of the 20 with the lowest density four judge, of any 20 neighbours: the low end is never missing by chance."""
    order = sorted(PEOPLE, key=lambda one: one.bmd_g_cm2)
    for seed in range(5):
        judging = locked(places(PEOPLE, {}, seed=seed, locked_share=0.2))
        for start in range(0, 100, 20):
            assert sum(one.key in judging for one in order[start : start + 20]) == 4


def test_the_order_of_the_patients_plays_no_part_and_the_seed_does() -> None:
    shuffled = random.Random(3).sample(PEOPLE, len(PEOPLE))
    first = places(PEOPLE, {}, seed=1, locked_share=0.2)
    assert places(shuffled, {}, seed=1, locked_share=0.2) == first
    assert locked(places(PEOPLE, {}, seed=2, locked_share=0.2)) != locked(first)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 9), st.sampled_from([0.05, 0.1, 0.2, 0.5]))
def test_a_place_once_given_is_kept_whatever_comes(some: int, more: int, seed: int, share: float) -> None:
    """Other seed, other share, other patients: who judged never trains, who trained never judges."""
    before = places(PEOPLE[:some], {}, seed=1, locked_share=0.2)
    after = places(PEOPLE[: max(some, more)], before, seed=seed, locked_share=share)
    assert {key: after[key] for key in before} == before
    assert set(after) == {one.key for one in PEOPLE[: max(some, more)]}


def test_a_patient_who_is_gone_for_one_run_comes_back_to_the_old_place() -> None:
    first = places(PEOPLE, {}, seed=1, locked_share=0.2)
    gone = next(iter(locked(first)))
    second = places([one for one in PEOPLE if one.key != gone], first, seed=2, locked_share=0.2)
    assert gone not in second
    assert places(PEOPLE, first | second, seed=3, locked_share=0.2)[gone] == first[gone]


def test_new_patients_fill_the_emptiest_tenths() -> None:
    known = {f"K{tenth}": Place(Part.TRAINING, tenth) for tenth in range(7)}
    found = places(PEOPLE[:3], known, seed=1, locked_share=0.05)
    assert {place.tenth for place in found.values() if place.part is Part.TRAINING} <= {7, 8, 9}
