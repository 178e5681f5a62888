"""Dials as printed: each turns its own cause and nothing else, and what comes out is what SOURCES.md has read."""

from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import pytest

from models.phantom.anatomy import LEVELS, Patient
from models.phantom.dials import FROZEN, PRINTED, turned
from models.phantom.patient import draw

FIRST_SEED = 91_000_000
PATIENTS = 200

# what a cause may change, as the patient's own fields
TOUCHED = {
    "trabecular": {"vertebrae", "bone", "sacrum"},  # texture and cortex hang on density
    "marrow": {"bone"},
    "endplates": {"vertebrae"},
    "growth": {"vertebrae", "torso"},  # the back's length stands on the bodies' depth
    "lordosis": {"vertebrae", "torso", "acquisition"},  # and the field of view on the torso
    "wear": {"vertebrae"},
    "loss": {"interval"},
    "scanners": {"acquisition"},
    "hardening": {"acquisition"},
}


@cache
def drawn(dials: str = "") -> tuple[Patient, ...]:
    settings: dict[str, Any] = {"dials": dials} if dials else {}
    return tuple(draw(seed, **settings) for seed in range(FIRST_SEED, FIRST_SEED + PATIENTS))


@pytest.mark.parametrize("cause", PRINTED)
def test_a_cause_turns_what_it_names_and_nothing_else(cause: str) -> None:
    changed = set()
    for frozen, printed in zip(drawn()[:40], drawn(cause)[:40], strict=True):
        before, after = asdict(frozen), asdict(printed)
        changed |= {name for name in before if before[name] != after[name]}
    assert changed
    assert changed <= TOUCHED[cause]


def test_marrow_fat_hangs_on_density_and_old_women_have_more_than_men() -> None:
    patients = drawn("marrow")
    fat = np.array([one.bone.marrow_fat for one in patients])
    assert -0.82 <= np.corrcoef(fat, _density(patients))[0, 1] <= -0.66
    old = [[one.bone.marrow_fat for one in patients if one.sex == sex and one.age >= 65] for sex in "FM"]
    assert np.mean(old[0]) - np.mean(old[1]) == pytest.approx(0.10, abs=0.04)


def test_lordosis_is_that_of_people_who_lie() -> None:
    lordosis = [
        np.degrees(one.sacrum.frame.angles_rad[0] - one.vertebra("L1").frame.angles_rad[0]) for one in drawn("lordosis")
    ]
    assert np.mean(lordosis) == pytest.approx(36.8, abs=3.5)
    assert np.std(lordosis) == pytest.approx(13.2, abs=3.0)


def test_a_body_grows_by_as_much_as_printed() -> None:
    young, old = (draw(FIRST_SEED, age=age, dials="growth").vertebra("L3") for age in (28, 98))
    grown = draw(FIRST_SEED, age=98).vertebra("L3")
    usual = draw(FIRST_SEED, age=28).vertebra("L3")
    area = (
        (old.width * old.depth)
        / (young.width * young.depth)
        / ((grown.width * grown.depth) / (usual.width * usual.depth))
    )
    assert area == pytest.approx(1.15, abs=0.02)


def test_wear_begins_in_the_twenties_and_grows_downwards() -> None:
    def facets(dials: str, level: str, ages: range) -> float:
        return float(np.mean([one.vertebra(level).facet_size for one in drawn(dials) if one.age in ages]))

    assert facets("wear", "L4", range(30, 45)) > facets("", "L4", range(30, 45))
    everybody = range(20, 100)
    assert facets("wear", "L4", everybody) > facets("wear", "L2", everybody)


def test_loss_and_scanners_are_those_printed() -> None:
    rates = [one.interval.change_per_year for one in drawn("loss") if one.sex == "M" and one.age >= 50]
    assert np.mean(rates) == pytest.approx(0.0, abs=0.006)
    gains = [one.acquisition.drift for one in drawn("scanners")]
    assert np.std(gains) == pytest.approx(0.088, abs=0.012)
    radii = [one.torso.radius_cm for one in drawn("hardening")]
    gains = [one.acquisition.drift for one in drawn("hardening")]
    assert np.polyfit(radii, gains, 1)[0] == pytest.approx(-0.02, abs=0.002)


def test_levels_differ_as_printed() -> None:
    dials = turned(("trabecular",))
    assert dials.level_density["L1"] / dials.level_density["L3"] == pytest.approx(1.04, abs=0.005)
    assert 1 - dials.density("F", 90) / dials.density("F", 20) == pytest.approx(0.55, abs=0.01)
    assert 1 - dials.density("M", 90) / dials.density("M", 20) == pytest.approx(0.46, abs=0.01)


def test_an_unknown_cause_is_refused_and_none_is_the_frozen_phantom() -> None:
    with pytest.raises(ValueError, match=r"dials must be of trabecular, marrow, .* not 'wear,weather'"):
        draw(FIRST_SEED, dials="wear,weather")
    assert turned(()) == FROZEN


def _density(patients: tuple[Patient, ...]) -> list[float]:
    return [float(np.mean([one.vertebra(level).trabecular_mg_cm3 for level in LEVELS])) for one in patients]
