"""Training: it learns, it is a function of cohort and configuration, and no patient is in two sets."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.crop import OUTSIDE_HU
from models.inputs import network_input
from models.package import ModelPackage
from models.training import (
    Cohort,
    Run,
    TrainingConfig,
    augmented,
    batches,
    conformal_intervals,
    learning_rate,
    train,
    train_package,
)
from tests.models.tiny import INPUT, tiny_cohort, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_cohort(tmp_path_factory.mktemp("tiny") / "cohort")


@pytest.fixture(scope="module")
def cohort(folder: Path) -> Cohort:
    return Cohort.read(folder)


def test_cohort_keeps_rows_and_slabs_together(cohort: Cohort) -> None:
    assert cohort.slabs.shape == (40, 2, 3, 48, 48)
    brightness = cohort.slabs[:, 0, 1, 24, 24].astype(float)
    assert np.corrcoef(brightness, cohort.targets[:, 0])[0, 1] > 0.99


def test_no_patient_is_in_two_sets(cohort: Cohort) -> None:
    config = tiny_config()
    sets = [
        set(cohort.patients[cohort.where(folds)])
        for folds in (config.training_folds, config.validation_folds, config.calibration_folds)
    ]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 10


def test_loss_falls_and_a_package_comes_out(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(epochs=6, name="tiny", version="0.1")
    package = train_package(folder, tmp_path / "tiny-0.1", config, checkpoint_epochs=6)
    assert package.manifest.synthetic_only
    assert package.manifest.training["steps_done"] == 6 * 4
    assert [one.levels for one in package.manifest.intervals] == [1, 2, 3, 4]
    assert "digital patients only" in package.model_card()
    assert ModelPackage.load(package.path).name == "tiny-0.1"
    state = torch.load(tmp_path / "tiny-0.1.run" / "checkpoint.pt", weights_only=True)
    losses = [entry["training_loss"] for entry in state["curve"]]
    assert np.mean(losses[-2:]) < 0.6 * losses[0]


def test_killed_and_resumed_is_the_same_run(cohort: Cohort, tmp_path: Path) -> None:
    config = tiny_config(epochs=2)
    straight = train(cohort, config, tmp_path / "straight", checkpoint_epochs=2)
    train(cohort, config, tmp_path / "halves", stop_after_epochs=1)
    halves = train(cohort, config, tmp_path / "halves", resume=True)
    assert halves.step == straight.step == 8
    assert halves.curve == straight.curve
    for name, value in straight.network.state_dict().items():
        assert torch.equal(value, halves.network.state_dict()[name]), name


def test_resuming_another_configuration_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    work = tmp_path / "run"
    work.mkdir()
    (work / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not the run to resume"):
        train(cohort, tiny_config(), work, resume=True)


def test_best_epoch_is_what_the_package_holds(cohort: Cohort, tmp_path: Path) -> None:
    run: Run = train(cohort, tiny_config(epochs=2), tmp_path, checkpoint_epochs=2)
    losses = [entry["validation_loss"] for entry in run.curve]
    assert run.best_loss == min(losses)
    assert run.best_epoch == int(np.argmin(losses)) + 1


def test_statistics_stand_still_in_the_last_epochs(cohort: Cohort, tmp_path: Path) -> None:
    config = tiny_config(epochs=2, frozen_epochs=1)
    first = train(cohort, config, tmp_path, stop_after_epochs=1).best["trunk.bn1.running_mean"].clone()
    run = train(cohort, config, tmp_path, resume=True)
    assert torch.equal(run.network.state_dict()["trunk.bn1.running_mean"], first)
    assert run.best_epoch == 2  # the kept epoch is one whose statistics stood still


def test_augmentation_is_repeatable_and_only_in_training(cohort: Cohort) -> None:
    config = tiny_config()
    chosen = cohort.where(config.training_folds)
    first = [pictures for pictures, _ in batches(cohort, chosen, config, 3)]
    again = [pictures for pictures, _ in batches(cohort, chosen, config, 3)]
    other = [pictures for pictures, _ in batches(cohort, chosen, config, 4)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    still = tiny_config(shift_px=0, offset_hu=0.0, noise_hu=0.0, erode_share=0.0)
    slabs = cohort.slabs[:4, 0].copy()
    slabs[:, 2] = slabs[:, 0]  # exchanging the sides changes nothing
    plain = augmented(slabs, still, np.random.default_rng(0))
    assert np.array_equal(plain, network_input(slabs, INPUT))


def test_augmentation_never_draws_bone_outside_the_mask(cohort: Cohort) -> None:
    config = tiny_config(shift_px=0, erode_share=1.0)
    slabs = cohort.slabs[:6, 0]
    pictures = augmented(slabs, config, np.random.default_rng(1))
    outside = network_input(slabs, INPUT) == 0
    assert (pictures[outside] == 0).all()
    assert (pictures > 0).sum() < (~outside).sum()  # the rim is gone
    assert (slabs == OUTSIDE_HU).any()


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = TrainingConfig(learning_rate=1e-3, warmup_share=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] < 1e-5


def test_conformal_intervals_cover_what_they_promise() -> None:
    draw = np.random.default_rng(2)
    errors = draw.normal(0, [0.05, 0.02], size=(2000, 2)).astype(np.float32)
    intervals = conformal_intervals(errors, np.repeat(np.arange(500).astype(str), 4))
    fresh = np.abs(draw.normal(0, [0.05, 0.02], size=(20_000, 2)))
    assert (fresh[:, 0] <= intervals[0].bmd_g_cm2).mean() == pytest.approx(0.9, abs=0.02)
    assert (fresh[:, 1] <= intervals[0].tbs).mean() == pytest.approx(0.9, abs=0.02)
    assert intervals[3].bmd_g_cm2 == pytest.approx(intervals[0].bmd_g_cm2 / 2, rel=0.12)


def test_with_few_patients_the_interval_is_the_largest_error() -> None:
    errors = np.array([[0.1, 0.2], [-0.3, 0.1]], dtype=np.float32)
    intervals = conformal_intervals(errors, np.array(["A", "B"]))
    assert intervals[0].bmd_g_cm2 == pytest.approx(0.3)
    assert intervals[0].tbs == pytest.approx(0.2)


def test_configuration_survives_json() -> None:
    config = tiny_config(validation_folds=[1, 2])
    assert TrainingConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="epoch_count"):
        TrainingConfig.from_dict({"epoch_count": 5})
