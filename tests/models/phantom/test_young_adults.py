"""The young adults of digital patients: one set of figures, in the phantom and in the service."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import service.domain
from models.phantom.patient import draw
from models.phantom.render import lumbar_grid, render
from models.phantom.study import truth
from models.phantom.young_adults import SHIPPED, t_score


@pytest.mark.parametrize("sex", ["F", "M"])
def test_phantom_and_service_ship_the_same_reference(sex: str) -> None:
    folder = Path(service.domain.__file__).parent / "references"
    shipped = tomllib.loads((folder / "digital.toml").read_text())["digital"][f"young-{sex.lower()}-l1l4"]
    assert shipped["mean_g_cm2"] == pytest.approx(SHIPPED[sex].mean_g_cm2, abs=5e-5)
    assert shipped["sd_g_cm2"] == pytest.approx(SHIPPED[sex].sd_g_cm2, abs=5e-5)
    assert str(SHIPPED[sex].patients) in shipped["population"]


def test_t_is_in_standard_deviations_of_the_own_sex() -> None:
    young = SHIPPED["F"]
    assert t_score(young.mean_g_cm2, "F") == 0
    assert t_score(young.mean_g_cm2 - 2.5 * young.sd_g_cm2, "F") == pytest.approx(-2.5)
    assert t_score(1.0, "F") != t_score(1.0, "M")


def test_truth_tells_t_per_level_and_patient() -> None:
    patient = draw(4)
    told = truth(patient, render(patient, lumbar_grid(patient, 4.0)))
    assert told["patient"]["t_score"] == pytest.approx(t_score(told["patient"]["bmd_g_cm2"], patient.sex))
    levels = [level["t_score"] for level in told["levels"].values()]
    assert min(levels) < told["patient"]["t_score"] < max(levels)
