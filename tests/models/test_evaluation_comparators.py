"""Gradient boosting and the oracle: features by hand, and never judged on a patient they were fitted on."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.crop import OUTSIDE_HU, PIXEL_MM
from models.evaluation.comparators import OF_SLABS, compare, read_parameters, slab_features
from models.training import Cohort
from tests.models.tiny import tiny_cohort


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cohort(tmp_path_factory.mktemp("comparators") / "cohort", patients=20)


@pytest.fixture
def cohort(folder: Path) -> Cohort:
    return Cohort.read(folder)


def write_parameters(folder: Path, cohort: Cohort, columns: dict[str, np.ndarray]) -> None:
    with (folder / "parameters.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["patient_id", "level", *columns])
        for index, row in enumerate(cohort.rows):
            writer.writerow([row["patient_id"], row["level"], *(values[index] for values in columns.values())])


def r(estimate: np.ndarray, truth: np.ndarray) -> float:
    return float(np.corrcoef(estimate, truth)[0, 1])


def test_features_of_a_chequered_rectangle() -> None:
    slab = np.full((3, 48, 64), int(OUTSIDE_HU), dtype=np.int16)
    rows, columns = np.mgrid[0:16, 0:20]
    slab[:, 10:26, 30:50] = 200 + 10 * (1 - 2 * ((rows + columns) % 2))
    found = dict(zip(OF_SLABS, slab_features(slab), strict=True))
    assert (found["hu_mean"], found["hu_sd"], found["hu_beside"]) == pytest.approx((200, 10, 200))
    assert (found["variogram_1px"], found["variogram_2px"]) == pytest.approx((200, 0))  # half of 20 squared, and none
    assert found["area_mm2"] == pytest.approx(16 * 20 * PIXEL_MM**2)
    assert (found["height_mm"], found["depth_mm"]) == pytest.approx((16 * PIXEL_MM, 20 * PIXEL_MM))
    assert np.isnan(slab_features(np.full((3, 8, 8), int(OUTSIDE_HU), dtype=np.int16))).all()


def test_boosting_finds_the_brightness_that_is_the_bmd(folder: Path, cohort: Cohort) -> None:
    (folder / "parameters.csv").unlink(missing_ok=True)
    chosen = np.arange(len(cohort.rows))
    found = compare(cohort, chosen, folder, None)
    assert r(found.estimates["gbm_bmd"], cohort.targets[:, 0]) > 0.9
    assert set(found.estimates) == {"gbm_bmd", "gbm_tbs"}
    assert "cross-fitted" in found.account["fitted_on"]
    assert compare(cohort, chosen[:4], folder, None).estimates == {}


def test_fitted_on_another_cohort_that_shares_no_patient(folder: Path, cohort: Cohort) -> None:
    chosen = np.arange(len(cohort.rows))
    with pytest.raises(ValueError, match="in both cohorts"):
        compare(cohort, chosen, folder, (cohort, folder))
    other = replace(cohort, patients=np.char.add("Q", cohort.patients))
    found = compare(cohort, chosen[:4], folder, (other, folder))
    assert len(found.estimates["gbm_bmd"]) == 4
    assert found.account["fitted_on"] == "another cohort: cohort, seed 0"


def test_the_oracle_takes_what_cross_validates_better(folder: Path, cohort: Cohort) -> None:
    draw = np.random.default_rng(1)
    chosen = np.arange(len(cohort.rows))
    bmd = cohort.targets[:, 0].astype(float)
    write_parameters(folder, cohort, {"density": 3 * bmd + draw.normal(0, 0.01, len(bmd)), "other": draw.random(80)})
    found = compare(cohort, chosen, folder, None)
    assert found.account["oracle"]["model_bmd"] == "ridge"  # a straight line
    assert found.account["oracle"]["columns"] == ["density", "other"]
    assert np.array_equal(found.estimates["oracle_bmd"], found.estimates["midline_oracle_bmd"])
    assert r(found.estimates["oracle_bmd"], bmd) > 0.99
    bent = (bmd - bmd.mean()) ** 2
    write_parameters(folder, cohort, {"density": bmd})
    curved = replace(cohort, targets=np.stack([bent, bent], axis=1).astype(np.float32))
    assert compare(curved, chosen, folder, None).account["oracle"]["model_bmd"] == "gradient boosting"


def test_the_midline_oracle_sees_nothing_beside_the_middle(folder: Path, cohort: Cohort) -> None:
    chosen = np.arange(len(cohort.rows))
    bmd = cohort.targets[:, 0].astype(float)
    write_parameters(folder, cohort, {"beside_facets": bmd, "other": np.random.default_rng(3).random(80)})
    found = compare(cohort, chosen, folder, None)
    assert found.account["midline_oracle"]["columns"] == ["other"]
    assert r(found.estimates["oracle_bmd"], bmd) > 0.9
    assert r(found.estimates["midline_oracle_bmd"], bmd) < 0.4


def test_both_see_the_fat_over_the_spine_and_the_midline_oracle_does_not(folder: Path, cohort: Cohort) -> None:
    draw = np.random.default_rng(4)
    chosen = np.arange(len(cohort.rows))
    fat = draw.normal(0.0, 1.0, 80)
    told = replace(
        cohort,
        rows=[row | {"fat_over_spine_cm": str(cm)} for row, cm in zip(cohort.rows, fat, strict=True)],
        targets=np.stack([1 - 0.1 * fat, 1 - 0.1 * fat], axis=1).astype(np.float32),
    )
    write_parameters(folder, cohort, {"other": draw.random(80)})
    found = compare(told, chosen, folder, None)
    assert found.account["oracle"]["columns"] == ["other", "beside_fat_over_spine_cm"]
    assert found.account["midline_oracle"]["columns"] == ["other"]
    assert r(found.estimates["oracle_bmd"], fat) < -0.99
    assert r(found.estimates["gbm_bmd"], fat) < -0.9
    assert abs(r(found.estimates["midline_oracle_bmd"], fat)) < 0.4


def test_a_patients_own_name_tells_the_oracle_nothing(folder: Path, cohort: Cohort) -> None:
    draw = np.random.default_rng(2)
    chosen = np.arange(len(cohort.rows))
    own = np.repeat(draw.permutation(20), 4).astype(float)  # a number of each patient
    bmd = np.repeat(draw.normal(1.0, 0.2, 20), 4)  # the same for all its vertebrae, nothing to do with the number
    write_parameters(folder, cohort, {"number": own})
    changed = replace(cohort, targets=np.stack([bmd, bmd], axis=1).astype(np.float32))
    assert r(compare(changed, chosen, folder, None).estimates["oracle_bmd"], bmd) < 0.4


def test_parameters_must_be_numbers_for_every_vertebra(folder: Path, cohort: Cohort) -> None:
    path, chosen = folder / "parameters.csv", np.arange(4)
    path.write_text("patient_id,level,density\nP0,L1,0.5\n")
    with pytest.raises(ValueError, match="no row for P0 L2"):
        read_parameters(folder, cohort, chosen)
    path.write_text("patient_id,level,density\nP0,L1,high\n")
    with pytest.raises(ValueError, match="not a table of numbers"):
        read_parameters(folder, cohort, chosen)
    path.write_text("patient_id,level,density\n" + "".join(f"P0,L{level},\n" for level in range(1, 5)))
    columns, values = read_parameters(folder, cohort, chosen)
    assert columns == ("density",)
    assert np.isnan(values).all()
    path.unlink()
