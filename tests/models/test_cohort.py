"""`phantom cohort`: repeatable, complete, and its crops are of the patient it says."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from models.crop import SLABS
from models.evaluation import comparators
from models.phantom import dxa
from models.phantom.anatomy import LABELS
from models.phantom.cohort import BESIDE, COLUMNS, draw_member, imperfect_labels, lumbar_box, make_cohort
from models.phantom.patient import draw
from models.phantom.render import render
from models.phantom.scanner import mineral_gain
from models.training import Cohort

QUIET = Console(quiet=True)
SETTINGS = {"slice_mm": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(77, 1, tmp_path_factory.mktemp("digital"), SETTINGS, console=QUIET)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "cohort.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_row_per_vertebra_with_its_truth(folder: Path) -> None:
    found = rows(folder)
    assert [row["level"] for row in found] == ["L1", "L2", "L3", "L4"]
    assert tuple(found[0]) == COLUMNS
    patient = draw(770_000, **SETTINGS)
    truth = dxa.measure(patient)
    for row in found:
        assert float(row["bmd_g_cm2"]) == pytest.approx(truth.levels[row["level"]].bmd_g_cm2, abs=1e-4)
        assert row["patient_id"] == patient.patient_id
    assert json.loads((folder / "cohort.json").read_text())["provenance"] == "digital"


def test_slabs_are_what_training_reads(folder: Path) -> None:
    cohort = Cohort.read(folder)
    assert cohort.slabs.shape == (4, 2, SLABS, 128, 128)
    assert cohort.slabs.dtype == np.int16
    inside = cohort.slabs[:, 0, SLABS // 2] > -1024
    area_mm2 = inside.sum(axis=(1, 2)) * (300 / 256) ** 2
    assert (area_mm2 > 900).all()  # a body of 30 x 25 mm and a spinous process
    assert (area_mm2 < 2600).all()
    assert not inside[:, 0].any()  # nothing touches the field's edge
    assert not inside[:, :, 0].any()


def test_a_cohort_is_a_function_of_its_seed(folder: Path, tmp_path: Path) -> None:
    again = make_cohort(77, 1, tmp_path / "again", SETTINGS, console=QUIET)
    name = rows(again)[0]["slabs"]
    assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert rows(again) == rows(folder)


def test_enriched_patients_spread_over_the_range() -> None:
    density = [draw_member(seed, {}, enriched=True).vertebra("L3").trabecular_mg_cm3 for seed in range(8)]
    assert np.std(density) > 25
    given = {"bmd_g_cm2": 0.8}
    assert draw_member(3, given, enriched=True) == draw_member(3, given, enriched=False)


def test_imperfect_labels_stay_near_the_truth() -> None:
    patient = draw(5, **SETTINGS)
    rendered = render(patient, lumbar_box(patient))
    rough = imperfect_labels(rendered, np.random.default_rng(0))
    for level in ("L1", "L4"):
        true, found = rendered.labels == LABELS[level], rough == LABELS[level]
        dice = 2 * (true & found).sum() / (true.sum() + found.sum())
        assert 0.85 < dice < 0.995


def test_patients_made_side_by_side_are_those_made_one_after_another(tmp_path: Path) -> None:
    one, two = (
        make_cohort(78, 2, tmp_path / str(count), SETTINGS, variants=1, processes=count, console=QUIET)
        for count in (1, 2)
    )
    for name in ("cohort.csv", "parameters.csv", rows(one)[0]["slabs"], rows(one)[-1]["slabs"]):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_parameters_stand_beside_every_vertebra(folder: Path) -> None:
    with (folder / "parameters.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert [row["level"] for row in found] == ["L1", "L2", "L3", "L4"]
    patient = draw(770_000, **SETTINGS)
    assert comparators.BESIDE == BESIDE  # else the midline oracle would see everything
    assert float(found[1]["beside_facet_size"]) == pytest.approx(patient.vertebra("L2").facet_size, abs=1e-3)
    assert float(found[2]["depth"]) == pytest.approx(patient.vertebra("L3").depth, abs=1e-3)
    assert float(found[0]["grain_amplitude"]) == pytest.approx(patient.bone.texture.amplitude, abs=1e-3)


def test_a_vendor_reads_bone_its_own_way() -> None:
    gains = {vendor: mineral_gain(draw(5, vendor=vendor)) for vendor in ("philips", "canon", "siemens", "ge")}
    assert list(gains) == sorted(gains, key=gains.__getitem__)
    assert gains["ge"] - gains["siemens"] > 0.01  # outside the span that networks are trained on
