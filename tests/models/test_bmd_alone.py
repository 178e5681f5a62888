"""A model of BMD alone, for a site whose DXA tells no TBS: nothing on the way invents one."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.evaluation import evaluate
from models.package import BMD_ALONE, TARGETS, Interval, ModelPackage, PackageError
from models.readout import Readout, column_names
from models.training import Cohort, TrainingConfig, estimate_cohort, train_package
from models.training.loop import predict_cohort, start
from models.training.readout import FEWEST, fit_readout
from tests.models.tiny import tiny_cohort, tiny_config
from worker.predict import Predictor


def without_tbs(folder: Path) -> Path:
    """The same cohort from a site whose densitometer tells no TBS."""
    path = folder / "cohort.csv"
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row | {"tbs": ""} for row in csv.DictReader(stream)]
    with path.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return folder


def one_epoch(**changes: object) -> TrainingConfig:
    return tiny_config(epochs=1, **changes)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cohort(tmp_path_factory.mktemp("told") / "cohort")


@pytest.fixture(scope="module")
def untold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_tbs(tiny_cohort(tmp_path_factory.mktemp("untold") / "cohort"))


@pytest.fixture(scope="module")
def both(told: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    return train_package(told, tmp_path_factory.mktemp("both") / "package", one_epoch())


@pytest.fixture(scope="module")
def alone(untold: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    return train_package(untold, tmp_path_factory.mktemp("alone") / "package", one_epoch(targets=list(BMD_ALONE)))


def test_it_predicts_bmd_and_says_that_it_tells_no_tbs(alone: ModelPackage) -> None:
    manifest = alone.manifest
    assert (manifest.targets, manifest.finished) == (BMD_ALONE, True)
    assert [member.targets for member in manifest.members] == [BMD_ALONE]
    assert all(one.tbs is None and one.bmd_g_cm2 > 0 for one in manifest.intervals)
    assert manifest.metrics["calibration"].keys() == {
        "n_vertebrae", "n_patients", "bmd_r", "hu_bmd_r", "bmd_mean_error",
    }  # fmt: skip
    card = alone.model_card()
    assert "TBS is not measured by this model" in card
    assert "trabecular" not in card
    assert TrainingConfig.from_dict(manifest.training["config"]).targets == BMD_ALONE
    assert not any("tbs_r" in point for point in json.loads((alone.path / "training.json").read_text())["members"])


def test_both_cannot_be_learned_where_the_dxa_tells_one(untold: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="40 of 40 vertebrae of the cohort have no bmd_g_cm2 and tbs"):
        train_package(untold, tmp_path / "package", one_epoch())
    with pytest.raises(ValueError, match="targets must be bmd_g_cm2 and tbs, or bmd_g_cm2 alone"):
        one_epoch(targets=["tbs"])


def test_a_configuration_of_both_reads_as_it_did_before_there_was_a_choice() -> None:
    assert "targets" not in one_epoch().to_dict()
    assert one_epoch(targets=list(BMD_ALONE)).to_dict()["targets"] == BMD_ALONE
    assert [plan.name for plan in one_epoch(targets=list(BMD_ALONE), heads="separate").members] == ["fold0-bmd"]


def test_fine_tuned_from_a_network_of_both_it_begins_with_that_ones_bmd(both: ModelPackage, untold: Path) -> None:
    cohort, chosen = Cohort.read(untold), np.arange(6)
    config = one_epoch(targets=list(BMD_ALONE), start_from=both.sha256)
    run = start(cohort, config.members[0], config, torch.device("cpu"), both)
    begun = predict_cohort(run.network, cohort, chosen, config.input, "fp32", torch.device("cpu"))
    assert begun.shape == (6, 1)
    assert np.allclose(begun[:, 0], estimate_cohort(both, cohort, chosen)[:, 0], atol=1e-5)


def test_a_network_of_bmd_alone_cannot_go_on_with_both(alone: ModelPackage, told: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no network for bmd_g_cm2 and tbs"):
        train_package(told, tmp_path / "p", one_epoch(start_from=alone.sha256), initial=alone)


def test_a_report_tells_nothing_of_tbs(
    both: ModelPackage, alone: ModelPackage, told: Path, untold: Path, tmp_path: Path
) -> None:
    """A model without on a cohort with it, and a model with it on a cohort without: for two reasons."""
    cases = (
        ("model", alone, told, "TBS not measured by this model."),
        ("cohort", both, untold, "This cohort does not know TBS of every vertebra."),
    )
    for name, package, cohort, why in cases:
        report = evaluate(package, cohort, tmp_path / name)
        assert report["targets"] == list(package.manifest.targets)
        assert report["per_vertebra"]["bmd"]["n"] == 40
        assert report["per_vertebra"]["tbs"] is report["per_patient"]["tbs"] is report["calibration"]["tbs"] is None
        assert report["per_patient"]["tbs_impaired"] is report["power"]["tbs"] is report["regression"]["tbs"] is None
        assert report["intervals"]["patient_tbs_coverage"] is report["intervals"]["tbs_coverage"] is None
        assert report["intervals"]["patient_bmd_coverage"] is not None
        assert all(group["tbs"] is None for groups in report["subgroups"].values() for group in groups.values())
        assert (report["per_vertebra"]["hu_tbs"] is None) is (name == "cohort")  # the attenuation is still there
        assert (report["per_vertebra"]["gbm_tbs"] is None) is (name == "cohort")
        page = (tmp_path / name / "report.html").read_text(encoding="utf-8")
        assert why in page
        assert "None" not in page


def test_prediction_has_no_tbs(alone: ModelPackage, both: ModelPackage, told: Path) -> None:
    slabs = Cohort.read(told).slabs[:2, 0].astype(np.float32)
    for package, measured in ((alone, False), (both, True)):
        predictor = Predictor(package.path, "cpu")
        vertebrae = predictor.predict(slabs, ["L1", "L2"])
        for one in (*vertebrae, predictor.patient(vertebrae)):
            assert one.bmd_interval[0] < one.bmd_g_cm2 < one.bmd_interval[1]
            assert (one.tbs is not None, one.tbs_interval is not None) == (measured, measured)
        assert predictor.measures_tbs is measured


def test_a_manifest_that_contradicts_itself_is_refused(alone: ModelPackage, both: ModelPackage) -> None:
    read = type(alone.manifest).from_json
    assert read(alone.manifest.to_json()) == alone.manifest
    with pytest.raises(PackageError, match="its intervals are not those of bmd_g_cm2"):
        read(replace(alone.manifest, intervals=(Interval(1, 0.1, 0.1),)).to_json())
    with pytest.raises(PackageError, match="or bmd_g_cm2 alone"):
        read(replace(both.manifest, targets=("tbs",)).to_json())


def test_a_readout_of_bmd_alone(tmp_path: Path) -> None:
    """Fitted, written and read back with one answer of the network in place of two."""
    draw = np.random.default_rng(3)
    names = column_names(BMD_ALONE)
    assert len(names) == len(column_names(TARGETS)) - 1
    learned, unseen = (draw.normal(size=(FEWEST + 5, len(names))) for _ in range(2))
    learned[:, 0] = np.nan
    truth = [(values[:, 1:2] * 0.5 + 1.0).astype(np.float32) for values in (learned, unseen)]
    made = fit_readout(learned, truth[0], unseen, truth[1], BMD_ALONE)
    assert made.weights.shape == (1, len(names))
    back = Readout.from_json(made.to_json(), tmp_path, BMD_ALONE)
    assert np.allclose(back.of_columns(unseen), made.of_columns(unseen))
    with pytest.raises(PackageError, match="its columns differ: tbs"):
        Readout.from_json(made.to_json(), tmp_path, TARGETS)
