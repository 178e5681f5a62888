"""The readout weighs the network's answers with the measures; it is fitted where the answers are honest."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.measures import NAMES
from models.package import READOUT, ModelPackage, PackageError
from models.readout import COLUMNS, FURTHEST, LEVELS, Readout, columns
from models.resnet50 import load_network
from models.training import (
    Cohort,
    TrainingConfig,
    conformal_intervals,
    estimate_cohort,
    refit_for_site,
    refit_package,
    train_package,
)
from models.training import readout as readout_room
from models.training.readout import adjust_readout, fit_readout, weigh, weigh_apart
from tests.models.tiny import INPUT, tiny_cohort, tiny_config

HERE = Path("readout.json")
SEEN = INPUT.to_dict() | {"slabs": 3}
RUN = {"epochs": 1, "keep": "last", "validation_folds": [7, 8, 9], "calibration_folds": [7, 8, 9], "input": SEEN}


def any_readout(seed: int = 0) -> Readout:
    draw = np.random.default_rng(seed)
    count = len(COLUMNS)
    return Readout(
        draw.normal(size=count), draw.uniform(0.5, 2.0, count), draw.normal(size=(2, count)), draw.normal(size=2)
    )


def test_it_survives_the_package() -> None:
    made = any_readout()
    read = Readout.from_json(made.to_json(), HERE)
    assert all(np.array_equal(getattr(made, f.name), getattr(read, f.name)) for f in dataclasses.fields(Readout))


def test_what_cannot_be_measured_counts_as_the_mean_and_nothing_is_extrapolated() -> None:
    readout = any_readout()
    middle = readout.centre[None]
    assert np.allclose(readout.of_columns(middle), readout.bias)
    assert np.allclose(readout.of_columns(np.full((1, len(COLUMNS)), np.nan)), readout.bias)
    far, further = middle.copy(), middle.copy()
    far[0, 5] += FURTHEST * readout.scale[5]
    further[0, 5] += 1e6
    assert np.allclose(readout.of_columns(far), readout.of_columns(further))
    assert not np.allclose(readout.of_columns(far), readout.bias)


def test_a_level_of_no_known_name_lies_between_the_named_ones() -> None:
    answers = np.ones((5, 2))
    slabs = [np.full((3, 48, 48), 100.0)] * 5
    table = columns(answers, slabs, [*LEVELS, "L6"])
    assert table.shape == (5, 2 + len(NAMES) + 1 + 4)
    assert np.isnan(table[:, -5]).all()  # the fat over the spine was not told
    assert np.array_equal(table[:, -4:], np.vstack([np.eye(4), np.zeros(4)]))
    with pytest.raises(ValueError, match="5 answers for 5 vertebrae and 1 levels"):
        columns(answers, slabs, ["L1"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda stored: stored["columns"].pop("core_sd"), "core_sd"),
        (lambda stored: stored["columns"].update(unheard_of=stored["columns"]["core_sd"]), "unheard_of"),
        (lambda stored: stored["columns"]["core_sd"].update(scale=0.0), "not above 0"),
        (lambda stored: stored["columns"]["core_sd"].update(tbs="much"), "much"),
        (lambda stored: stored["columns"]["core_sd"].update(tbs=float("nan")), "no number"),
        (lambda stored: stored.pop("bias"), "bias"),
    ],
)
def test_a_damaged_one_is_refused_by_name(change, named: str) -> None:  # type: ignore[no-untyped-def]
    stored = json.loads(any_readout().to_json())
    change(stored)
    with pytest.raises(PackageError, match=named):
        Readout.from_json(json.dumps(stored), HERE)


def test_answers_learned_by_heart_are_not_trusted() -> None:
    """On the training patients the answers are perfect, on others worthless; the measures tell a part of the truth."""
    draw = np.random.default_rng(1)

    def vertebrae(count: int, honest: bool) -> tuple[np.ndarray, np.ndarray]:
        table = draw.normal(size=(count, len(COLUMNS)))
        truth = table[:, 5:7] * 0.1 + draw.normal(size=(count, 2)) * 0.02 + [1.0, 1.3]
        table[:, :2] = draw.normal(size=(count, 2)) if honest else truth
        return table, truth.astype(np.float32)

    readout = fit_readout(*vertebrae(400, honest=False), *vertebrae(120, honest=True))
    table, truth = vertebrae(400, honest=True)
    assert np.abs(readout.weights[:, :2]).max() < 0.02  # g/cm2 and TBS a standard deviation; the measures have 0.1
    found = readout.of_columns(table)
    assert all(np.corrcoef(found[:, row], truth[:, row])[0, 1] > 0.95 for row in (0, 1))


def test_good_answers_carry_the_weight() -> None:
    draw = np.random.default_rng(2)
    table = draw.normal(size=(300, len(COLUMNS)))
    truth = (table[:, :2] * 0.15 + [1.0, 1.3]).astype(np.float32)
    readout = fit_readout(table[:200], truth[:200], table[200:], truth[200:])
    found = readout.of_columns(table[200:])
    assert np.abs(found - truth[200:]).max() < 0.02
    with pytest.raises(ValueError, match="20 vertebrae"):
        fit_readout(table[:200], truth[:200], table[:5], truth[:5])


def test_an_adjustment_learns_a_shift_from_few_and_a_slope_from_many() -> None:
    """What stood before is the start: where nothing is missing, nothing changes."""
    draw = np.random.default_rng(3)
    table = draw.normal(size=(600, len(COLUMNS)))
    patients = np.array([f"P{number // 3}" for number in range(600)])
    before = any_readout()
    same = adjust_readout(before, table, before.of_columns(table), patients)
    assert np.allclose(same.of_columns(table), before.of_columns(table), atol=1e-6)
    error = draw.normal(0, 0.05, size=(600, 2))
    shifted = adjust_readout(before, table[:60], before.of_columns(table[:60]) + 0.1 + error[:60], patients[:60])
    left = (shifted.of_columns(table) - before.of_columns(table) - 0.1).mean(axis=0)
    assert np.abs(left).max() < 0.03
    stretched = adjust_readout(before, table, 0.8 * before.of_columns(table) + error, patients)
    assert np.abs(stretched.of_columns(table) - 0.8 * before.of_columns(table)).std() < 0.02
    with pytest.raises(ValueError, match="5 patients at least"):
        adjust_readout(before, table[:30], before.of_columns(table[:30]), np.array(["P1"] * 30))


def test_answers_without_a_readout_are_the_start_of_one() -> None:
    table = np.random.default_rng(4).normal(1.0, 0.2, size=(50, len(COLUMNS)))
    table[:, 7] = np.nan
    plain = Readout.unweighed(table)
    assert np.allclose(plain.of_columns(table), table[:, :2])
    assert Readout.from_json(plain.to_json(), HERE) is not None


# --- in a package -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_cohort(tmp_path_factory.mktemp("tiny") / "cohort", patients=30)


@pytest.fixture(scope="module")
def package(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    config = TrainingConfig.from_dict(tiny_config(**RUN).to_dict() | {"readout": "measures"})
    return train_package(folder, tmp_path_factory.mktemp("made") / "weighed", config)


def test_a_package_estimates_with_its_readout(folder: Path, package: ModelPackage) -> None:
    cohort = Cohort.read(folder)
    rows = np.arange(12)
    readout = Readout.of(package)
    assert readout is not None
    assert READOUT in package.manifest.files
    weighed = estimate_cohort(package, cohort, rows)
    answers = estimate_cohort(without_readout(package), cohort, rows)
    levels = [cohort.rows[row]["level"] for row in rows]
    assert np.allclose(weighed, readout(answers, [cohort.slabs[row, 0] for row in rows], levels), atol=1e-6)
    assert not np.allclose(weighed, answers, atol=1e-3)
    assert f"weighed with {len(NAMES)} measures" in package.model_card()


def without_readout(package: ModelPackage) -> ModelPackage:
    files = {name: sha for name, sha in package.manifest.files.items() if name != READOUT}
    return dataclasses.replace(package, manifest=dataclasses.replace(package.manifest, files=files))


def test_who_fits_a_readout_and_calibrates_it_is_judged_by_one_fitted_without_them(tmp_path: Path) -> None:
    """The shipped configuration's patients do both; their own errors are smaller than anybody else's."""
    both = {"readout": "measures", "keep": "last", "validation_folds": [8, 9], "calibration_folds": [8, 9]}
    config = TrainingConfig.from_dict(tiny_config(**RUN).to_dict() | both)
    cohort_dir = tiny_cohort(tmp_path / "cohort", patients=60)
    made = train_package(cohort_dir, tmp_path / "made", config)
    cohort, device = Cohort.read(cohort_dir), torch.device("cpu")
    judged, network = cohort.where((8, 9)), load_network(made, torch.device("cpu"))
    apart = weigh_apart(network, cohort, config, device)
    assert apart is not None
    own, truth = estimate_cohort(made, cohort, judged), cohort.targets[judged]
    assert np.abs(apart - truth).mean() > np.abs(own - truth).mean()
    intervals = conformal_intervals(apart - truth, cohort.patients[judged])
    assert made.manifest.intervals[0].bmd_g_cm2 == pytest.approx(intervals[0].bmd_g_cm2, abs=1e-3)  # fp16
    separate = dataclasses.replace(config, validation_folds=(8,), calibration_folds=(9,))
    assert weigh_apart(network, cohort, separate, device) is None
    few = Cohort.read(tiny_cohort(tmp_path / "few", patients=25))  # twenty vertebrae, none to leave out
    assert weigh(network, few, config, device) is None


def test_refitting_finds_the_same_readout_and_trains_nothing(
    folder: Path, package: ModelPackage, tmp_path: Path
) -> None:
    told = TrainingConfig.from_dict(package.manifest.training["config"])
    again = refit_package(package, folder, tmp_path / "again", dataclasses.replace(told, version="9.9.9"))
    first, second = Readout.of(package), Readout.of(again)
    assert first is not None
    assert second is not None
    assert np.allclose(first.weights, second.weights, atol=1e-3)  # the stored network is rounded to fp16
    assert again.manifest.training["networks_from"]["sha256"] == package.sha256
    assert again.manifest.files["weights.safetensors"] == package.manifest.files["weights.safetensors"]
    assert again.name.endswith("9.9.9")
    plain = refit_package(again, folder, tmp_path / "plain", dataclasses.replace(told, readout="none"))
    assert Readout.of(plain) is None


def test_refitting_refuses_another_cohort_or_another_network(
    folder: Path, package: ModelPackage, tmp_path: Path
) -> None:
    told = TrainingConfig.from_dict(package.manifest.training["config"])
    others = tiny_cohort(tmp_path / "others", patients=21)
    with pytest.raises(ValueError, match="is not the cohort"):
        refit_package(package, others, tmp_path / "out", told)
    with pytest.raises(ValueError, match="more than version and readout"):
        refit_package(package, folder, tmp_path / "out", dataclasses.replace(told, epochs=2))
    with pytest.raises(PackageError, match="never overwritten"):
        refit_package(package, folder, package.path, told)


def test_the_same_digital_patients_rendered_elsewhere_are_the_same_cohort(
    package: ModelPackage, folder: Path, tmp_path: Path
) -> None:
    """One voxel rounded otherwise changes the hash; the seed and the phantom say who they are."""
    facts = json.loads((folder / "cohort.json").read_text()) | {"phantom_sha256": "f" * 64}
    training = {**package.manifest.training, "cohort": facts, "cohort_sha256": "0" * 64}
    moved = dataclasses.replace(package, manifest=dataclasses.replace(package.manifest, training=training))
    told = TrainingConfig.from_dict(training["config"])
    with pytest.raises(ValueError, match="is not the cohort"):
        refit_package(moved, folder, tmp_path / "out", told)
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    (again / "cohort.json").write_text(json.dumps(facts))
    made = refit_package(moved, again, tmp_path / "out", told)
    assert made.manifest.training["cohort_sha256"] == Cohort.read(again).sha256


def test_a_refit_for_a_site_judges_itself_on_patients_that_fitted_nothing(
    package: ModelPackage, tmp_path: Path
) -> None:
    """A site whose scanner reads 60 HU more: the networks stay, the readout follows, the card says who taught what."""
    site = tiny_cohort(tmp_path / "site", patients=30, brighter_hu=60)
    cohort = Cohort.read(site)
    told = TrainingConfig.from_dict(package.manifest.training["config"])
    apart = {"validation_folds": (8, 9), "calibration_folds": (8, 9)}
    config = dataclasses.replace(told, name="site", start_from=package.sha256, **apart)
    made = refit_for_site(package, site, tmp_path / "out", config)
    held_out = cohort.where((8, 9))
    errors = {
        one.name: float((estimate_cohort(one, cohort, held_out) - cohort.targets[held_out])[:, 0].mean())
        for one in (package, made)
    }
    assert abs(errors[made.name]) < 0.5 * abs(errors[package.name])
    assert made.manifest.metrics["calibration"]["bmd_mean_error"] == pytest.approx(errors[made.name], abs=1e-3)
    assert made.manifest.files["weights.safetensors"] == package.manifest.files["weights.safetensors"]
    training = made.manifest.training
    assert training["patients"] == {"training": 24, "validation": 0, "calibration": 6}
    assert training["networks_cohort"] == package.manifest.training["cohort"]
    assert training["cohort_sha256"] == cohort.sha256 != package.manifest.training["cohort_sha256"]
    assert "24 adjusted the readout, 6 set the intervals" in made.model_card()
    assert f"unchanged from the package {package.name}" in made.model_card()


def test_a_readout_needs_the_whole_vertebra_and_unseen_patients() -> None:
    with pytest.raises(ValueError, match="whole vertebra"):
        TrainingConfig.from_dict({"readout": "measures", "input": INPUT.to_dict() | {"slabs": 1}})


def test_the_network_is_weighed_on_patients_that_it_never_trained_on(
    folder: Path, package: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers perfectly whom it knows by heart, and others at random: the measures must carry the weight."""
    cohort = Cohort.read(folder)
    config = TrainingConfig.from_dict(package.manifest.training["config"])
    by_heart = cohort.where(config.members[0].training)
    asked: list[np.ndarray] = []

    def answers(_network: object, cohort: Cohort, chosen: np.ndarray, *_: object, **__: object) -> np.ndarray:
        asked.append(chosen)
        noise = np.random.default_rng(9).normal(1.0, 0.2, cohort.targets.shape)
        noise[by_heart] = cohort.targets[by_heart]
        return noise[chosen].astype(np.float32)

    monkeypatch.setattr(readout_room, "predict_cohort", answers)
    cpu = torch.device("cpu")
    made = readout_room.weigh(load_network(package, cpu), cohort, config, cpu)
    assert made is not None
    assert not np.isin(np.concatenate(asked), by_heart).any()
    assert np.abs(made.weights[:, :2]).max() < 0.02  # g/cm2 and TBS a standard deviation; the measures have the rest
    others = cohort.where(config.calibration_folds)
    table = readout_room.cohort_columns(cohort, others, answers(None, cohort, others))
    assert np.corrcoef(made.of_columns(table)[:, 0], cohort.targets[others, 0])[0, 1] > 0.95


def test_the_measures_are_learned_from_every_outline_of_the_training_patients_alone(
    folder: Path, package: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = Cohort.read(folder)
    config = TrainingConfig.from_dict(package.manifest.training["config"])
    given: list[np.ndarray] = []

    def fitted(learned: np.ndarray, learned_truth: np.ndarray, unseen: np.ndarray, *rest: Any) -> Readout:
        given.extend((learned, learned_truth, unseen))
        return fit_readout(learned, learned_truth, unseen, *rest)

    monkeypatch.setattr(readout_room, "fit_readout", fitted)
    cpu = torch.device("cpu")
    readout_room.weigh(load_network(package, cpu), cohort, config, cpu)
    learned, learned_truth, unseen = given
    first, second = np.nan_to_num(np.split(learned, 2))  # the exact outlines, the rough ones
    assert not np.array_equal(first, second)
    (plan,) = config.members
    assert np.array_equal(learned_truth, np.tile(cohort.targets[cohort.where(plan.training)], (2, 1)))
    assert len(unseen) == len(cohort.where(plan.validation))
