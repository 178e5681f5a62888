"""Dials as printed: each turns its own cause and nothing else, and what comes out is what SOURCES.md has read."""

from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import pytest

from models.phantom import dxa
from models.phantom.anatomy import LEVELS, Patient
from models.phantom.cohort import patient_slabs
from models.phantom.densitometer import PRODIGY
from models.phantom.dials import FROZEN, PRINTED, UNSEEN, turned
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
    "texture": {"bone"},
    "texture-scatter": {"bone"},
    "grain": {"bone"},
    "slow-texture": {"bone"},
    "bone-scatter": {"vertebrae", "bone"},
    "noise": {"acquisition"},
    "blur": set(),  # of the scan
    "dxa-errors": set(),
    "dxa-fat": set(),
}


@cache
def drawn(dials: str = "") -> tuple[Patient, ...]:
    settings: dict[str, Any] = {"dials": dials} if dials else {}
    return tuple(draw(seed, **settings) for seed in range(FIRST_SEED, FIRST_SEED + PATIENTS))


def changed_by(cause: str) -> set[str]:
    """The patient's fields that the cause changes."""
    changed = set()
    for frozen, turned_so in zip(drawn()[:40], drawn(cause)[:40], strict=True):
        before, after = asdict(frozen), asdict(turned_so)
        changed |= {name for name in before if before[name] != after[name]}
    return changed


@pytest.mark.parametrize("cause", PRINTED)
def test_a_cause_turns_what_it_names_and_nothing_else(cause: str) -> None:
    assert changed_by(cause)
    assert changed_by(cause) <= TOUCHED[cause]


@pytest.mark.parametrize("cause", UNSEEN)
def test_a_dial_without_a_source_is_halved_or_doubled_and_nothing_else(cause: str) -> None:
    assert changed_by(f"half-{cause}") == changed_by(f"double-{cause}") == TOUCHED[cause]


def test_halves_and_doubles_are_what_they_say() -> None:
    half, usual, double = (
        [one.bone.texture.amplitude for one in drawn(name)] for name in ("half-texture", "", "double-texture")
    )
    between = [(low, middle, high) for low, middle, high in zip(half, usual, double, strict=True) if 0.2 < middle < 0.7]
    assert len(between) > 50
    for low, middle, high in between:
        assert (2 * low, high / 2) == pytest.approx((middle, middle))
    noisy = [one.acquisition.noise_hu for one in drawn("double-noise")]
    assert noisy == pytest.approx([2 * one.acquisition.noise_hu for one in drawn()])


def test_the_densitometer_s_errors_grow_and_a_wider_kernel_blurs() -> None:
    errors, fat = turned(("double-dxa-errors",)).densitometer, turned(("half-dxa-fat",)).densitometer
    assert errors.roll_sd_deg == 2 * PRODIGY.roll_sd_deg
    assert errors.fat_as_bone == PRODIGY.fat_as_bone == 2 * fat.fat_as_bone
    patient = drawn()[0]
    again = [abs(dxa.measure(patient, n, errors).bmd_g_cm2 - dxa.measure(patient, 0).bmd_g_cm2) for n in range(4)]
    assert max(again) > 0.005
    usual, wide = (patient_slabs(patient, 1, turned(names)) for names in ((), ("double-blur",)))
    assert usual.slabs.std() > wide.slabs.std()
    assert usual.truth == wide.truth


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
