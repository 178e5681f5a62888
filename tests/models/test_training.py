"""Training: it learns, it is a function of cohort and configuration, and no patient is in two sets."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from models.crop import OUTSIDE_HU
from models.inputs import network_input
from models.package import TARGETS, ModelPackage, PackageError
from models.resnet50 import infer, load_network
from models.training import (
    Cohort,
    Interrupted,
    Run,
    TrainingConfig,
    augmented,
    batches,
    conformal_intervals,
    flatness,
    known_configurations,
    learning_rate,
    load_configuration,
    train,
    train_package,
    training_images,
)
from models.training.batches import seen_slabs, steps_per_epoch
from models.training.calibration import FEWEST
from models.training.loop import predict_cohort
from models.training.packaging import package_run
from tests.models.tiny import INPUT, tiny_cohort, tiny_config

ROOT = Path(__file__).resolve().parents[2]
TWO_FOLDS = {
    "heads": "separate",
    "cross_folds": 2,
    "validation_folds": [],
    "calibration_folds": [],
    "calibration": "cross",
    "slab_images": 3,
    "input": INPUT.to_dict() | {"slabs": 1},
    "epochs": 1,
    "architecture": "mobilenet_v3_small",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_cohort(tmp_path_factory.mktemp("tiny") / "cohort")


@pytest.fixture(scope="module")
def cohort(folder: Path) -> Cohort:
    return Cohort.read(folder)


def paper_cohort(patients: int = 350) -> Cohort:
    """As many patients of four vertebrae as the paper trained on, with next to no pictures."""
    who = np.repeat(np.arange(patients), 4)
    return Cohort(
        slabs=np.full((len(who), 1, 3, 1, 1), OUTSIDE_HU, dtype=np.int16),
        targets=np.ones((len(who), 2), dtype=np.float32),
        hu=np.ones(len(who), dtype=np.float32),
        patients=np.array([f"P{number}" for number in who]),
        folds=who % 10,
        rows=(),
        facts={"provenance": "digital"},
    )


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the cohort and its folds -----------------------------------------------------------------------------------


def test_cohort_keeps_rows_and_slabs_together(cohort: Cohort) -> None:
    assert cohort.slabs.shape == (40, 2, 3, 48, 48)
    brightness = cohort.slabs[:, 0, 1, 24, 24].astype(float)
    assert np.corrcoef(brightness, cohort.targets[:, 0])[0, 1] > 0.99


def test_a_cohort_in_the_making_is_no_smaller_cohort(folder: Path, tmp_path: Path) -> None:
    begun = shutil.copytree(folder, tmp_path / "begun")
    facts = json.loads((begun / "cohort.json").read_text())
    (begun / "cohort.json").write_text(json.dumps(facts | {"patients": 350}))
    with pytest.raises(ValueError, match="holds 10 of its 350 patients"):
        Cohort.read(begun)


def test_no_patient_is_in_two_sets(cohort: Cohort) -> None:
    config = tiny_config()
    (plan,) = config.members
    sets = [
        set(cohort.patients[cohort.where(folds)])
        for folds in (plan.training, plan.validation, config.calibration_folds)
    ]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 10


def test_the_papers_protocol_counts_as_printed() -> None:
    config = load_configuration("yoshida-2023")
    cohort = paper_cohort()
    plans = config.members
    assert [(plan.fold, plan.targets) for plan in plans] == [(f, (t,)) for f in range(5) for t in TARGETS]
    assert [plan.name for plan in plans[:3]] == ["fold0-bmd", "fold0-tbs", "fold1-bmd"]
    for plan in plans:
        assert plan.validation == (2 * plan.fold, 2 * plan.fold + 1)
        assert cohort.patients_in(plan.training) == 280
        assert cohort.patients_in(plan.validation) == 70
        images = training_images(cohort, plan, config)
        assert len(images) == len(np.unique(images, axis=0)) == 3360
        assert len(cohort.where(plan.validation)) == 280
        assert steps_per_epoch(len(images), config) == 168
        assert not set(cohort.patients[images[:, 0]]) & set(cohort.patients[cohort.where(plan.validation)])
    validated = np.concatenate([cohort.where(plan.validation) for plan in plans[::2]])
    assert sorted(validated) == list(range(1400))  # everybody is judged once


def test_the_papers_protocol_is_the_papers() -> None:
    config = load_configuration("yoshida-2023")
    assert (config.batch, config.epochs, config.schedule, config.ema_decay, config.weight_decay) == (
        20, 500, "constant", 0.0, 0.0,
    )  # fmt: skip
    assert (config.input.rows, config.input.columns, config.input.slabs, config.input.grey_levels) == (256, 256, 1, 255)
    assert config.architecture == "resnet50"
    assert config.keep == "best"
    field = load_configuration("yoshida-2023-field")
    same = {"name": config.name, "input": config.input.to_dict()}
    assert TrainingConfig.from_dict(field.to_dict() | same) == config  # the picture's black border apart
    assert field.input.slabs == 1


# --- configurations ---------------------------------------------------------------------------------------------


def test_the_shipped_configurations_are_complete_and_ours_is_the_default() -> None:
    assert known_configurations() == ("osteogate", "osteogate-fine-tune", "yoshida-2023", "yoshida-2023-field")
    for name in known_configurations():
        written = json.loads((ROOT / "models" / "configurations" / f"{name}.json").read_text())
        assert written == json.loads(json.dumps(load_configuration(name).to_dict()))
    assert load_configuration() == load_configuration("osteogate")
    assert load_configuration() == dataclasses.replace(TrainingConfig(), readout="measures")


def test_an_unknown_configuration_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="osteogate, osteogate-fine-tune, yoshida-2023"):
        load_configuration("yoshida-2024")


def test_a_configuration_file_is_read_and_a_wrong_one_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"epochs": 7}))
    assert load_configuration(str(file)) == TrainingConfig(epochs=7)
    file.write_text(json.dumps({"epoch_count": 7}))
    with pytest.raises(ValueError, match=r"mine\.json: .*epoch_count"):
        load_configuration(str(file))


def test_configuration_survives_json() -> None:
    config = tiny_config(validation_folds=[1, 2])
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"calibration": "cross"}, "cross_folds"),
        ({"calibration_folds": []}, "calibration_folds"),
        ({"validation_folds": [9], "keep": "best"}, "chooses the epoch"),
        ({"keep": "first"}, "keep"),
        ({"cross_folds": 5}, "validation_folds"),
        ({"cross_folds": 3}, "cross_folds"),
        ({"slab_images": 3}, "slab_images"),
        ({"schedule": "linear"}, "schedule"),
        ({"precision": "fp16"}, "precision"),
        ({"architecture": "lenet"}, "architecture"),
        ({"architecture": "alexnet"}, "48 x 80 pixels are too few for alexnet"),
        ({"input": {"slabs": 1}, "test_time": "exchange-sides"}, "sides"),
        ({"epochs": 0}, "epochs"),
        ({"validation_folds": []}, "validate"),
    ],
)
def test_an_impossible_configuration_is_refused_by_setting(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrainingConfig.from_dict(wrong)


# --- batches ----------------------------------------------------------------------------------------------------


def test_augmentation_is_repeatable_and_only_in_training(cohort: Cohort) -> None:
    config = tiny_config()
    (plan,) = config.members
    first = [pictures for pictures, _ in batches(cohort, plan, config, 3)]
    again = [pictures for pictures, _ in batches(cohort, plan, config, 3)]
    later = [pictures for pictures, _ in batches(cohort, plan, config, 3, first=2)]
    other = [pictures for pictures, _ in batches(cohort, plan, config, 4)]
    assert len(first) == 4
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(first[2:], later, strict=True))
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


def test_slabs_as_images_of_their_own_are_the_same_picture_in_every_channel() -> None:
    config = tiny_config(**TWO_FOLDS)
    slabs = np.arange(3 * 3, dtype=np.int16).reshape(3, 3, 1, 1)
    seen = seen_slabs(slabs, np.array([-1, 0, 1]), config)
    assert seen[:, 0, 0, 0].tolist() == [0, 4, 8]
    wide = np.full((2, 1, 48, 48), 100, dtype=np.int16)
    pictures = augmented(wide, config, np.random.default_rng(0))
    assert pictures.shape == (2, 3, 32, 32)
    assert np.array_equal(pictures[:, 0], pictures[:, 2])


# --- the loop ---------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = TrainingConfig(learning_rate=1e-3, warmup_share=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] < 1e-5
    paper = load_configuration("yoshida-2023")
    assert {learning_rate(step, 100, paper) for step in range(100)} == {paper.learning_rate}


def test_loss_falls_and_a_package_comes_out(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(epochs=6, name="tiny", version="0.1")
    package = train_package(folder, tmp_path / "tiny-0.1", config)
    manifest = package.manifest
    assert manifest.synthetic_only
    assert manifest.finished
    assert manifest.training["steps_done"] == manifest.training["steps_planned"] == 6 * 4
    assert [one.levels for one in manifest.intervals] == [1, 2, 3, 4]
    assert "digital patients only" in package.model_card().lower()
    assert "Unfinished" not in package.model_card()
    assert ModelPackage.load(package.path).name == "tiny-0.1"
    assert TrainingConfig.from_dict(json.loads((package.path / "config.json").read_text())) == config
    assert (package.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (member,) = json.loads((package.path / "training.json").read_text())["members"]
    losses = [entry["training_loss"] for entry in member["curve"]]
    assert np.mean(losses[-2:]) < 0.6 * losses[0]
    with pytest.raises(PackageError, match="never overwritten"):
        train_package(folder, tmp_path / "tiny-0.1", config, resume=True)


def test_a_cohort_of_its_own_sets_the_intervals(folder: Path, tmp_path: Path) -> None:
    others = tiny_cohort(tmp_path / "others", patients=12)
    table = others / "cohort.csv"
    table.write_text(re.sub(r"(?m)^P", "Q", table.read_text()))
    config = tiny_config(epochs=2, keep="last", validation_folds=[8, 9], calibration_folds=[8, 9])
    manifest = train_package(folder, tmp_path / "apart", config, calibration_dir=others).manifest
    assert manifest.metrics["calibration"]["n_patients"] == manifest.training["patients"]["calibration"] == 12
    assert manifest.training["calibration_cohort_sha256"] == Cohort.read(others).sha256
    card = (tmp_path / "apart" / "model_card.md").read_text()
    assert "8 to train, 2 to watch, 12 to set the intervals" in card
    assert "12 patients of a cohort of their own" in card
    usual = train_package(folder, tmp_path / "usual", config)
    assert "8 to train, 2 to watch and to set the intervals" in usual.model_card()
    with pytest.raises(ValueError, match="patients in both cohorts"):
        train_package(folder, tmp_path / "same", config, calibration_dir=folder)
    facts = others / "cohort.json"
    facts.write_text(facts.read_text().replace("digital", "site"))
    with pytest.raises(ValueError, match="site patients can't"):
        train_package(folder, tmp_path / "mixed", config, calibration_dir=others)


def test_stopped_anywhere_and_resumed_is_the_same_run(cohort: Cohort, tmp_path: Path) -> None:
    config = tiny_config(epochs=2, ema_decay=0.9, architecture="mobilenet_v3_small")  # it has dropout
    (straight,) = train(cohort, config, tmp_path / "straight")
    for steps in (3, 4, 6, None):  # within an epoch, at its end, within the next
        (parts,) = train(cohort, config, tmp_path / "parts", resume=True, stop_after_steps=steps)
        assert parts.step == (steps or 8)
    assert parts.curve == straight.curve
    assert parts.best_epoch == straight.best_epoch
    assert same_state(parts.best, straight.best)


def test_killed_within_an_epoch_and_resumed_is_the_same_run(folder: Path, cohort: Cohort, tmp_path: Path) -> None:
    config = tiny_config(epochs=3, ema_decay=0.9, architecture="mobilenet_v3_small")
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    code = f"""
import torch
from pathlib import Path
from models.training import Cohort, load_configuration, train
torch.set_num_threads(1)
config = load_configuration({str(tmp_path / "config.json")!r})
train(Cohort.read(Path({str(folder)!r})), config, Path({str(killed)!r}), checkpoint_seconds=0)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None, "it ended before it could be killed"
            if (killed / "fold0.pt").exists() and (step := _step_in(killed / "fold0.pt")) % 4 not in (0, 3):
                break
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = _step_in(killed / "fold0.pt")
    assert step <= left < 12
    (resumed,) = train(cohort, config, killed, resume=True)
    (whole,) = train(cohort, config, straight)
    assert resumed.step == whole.step == 12
    assert resumed.curve == whole.curve
    assert same_state(resumed.best, whole.best)


def _step_in(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True, mmap=True)["numbers"]["step"])


def test_resuming_another_run_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    work = tmp_path / "run"
    train(cohort, tiny_config(), work, stop_after_steps=1)
    with pytest.raises(ValueError, match="holds a run"):
        train(cohort, tiny_config(), work)
    with pytest.raises(ValueError, match="not the run to resume"):
        train(cohort, tiny_config(seed=2), work, resume=True)
    others = dataclasses.replace(cohort, targets=cohort.targets + 1)
    with pytest.raises(ValueError, match="not the run to resume"):
        train(others, tiny_config(), work, resume=True)
    with pytest.raises(ValueError, match="no network fold3: they are fold0"):
        train(cohort, tiny_config(), work, resume=True, networks=("fold3",))


def test_networks_are_trained_apart_and_packaged_together(cohort: Cohort, tmp_path: Path) -> None:
    config = tiny_config(heads="separate")
    tbs = train(cohort, config, tmp_path / "apart", networks=("fold0-tbs",))
    assert [one.plan.name for one in tbs] == ["fold0-tbs"]
    apart = train(cohort, config, tmp_path / "apart", resume=True, networks=("fold0",))
    together = train(cohort, config, tmp_path / "together")
    assert [one.plan.name for one in apart] == ["fold0-bmd", "fold0-tbs"]
    assert all(same_state(one.best, other.best) for one, other in zip(apart, together, strict=True))


def test_best_epoch_is_kept_of_the_averaged_weights(cohort: Cohort, tmp_path: Path) -> None:
    config = tiny_config(epochs=2, ema_decay=0.9)
    (averaged,) = train(cohort, config, tmp_path / "averaged")
    losses = [entry["validation_loss"] for entry in averaged.curve]
    assert averaged.best_epoch == int(np.argmin(losses)) + 1
    (plain,) = train(cohort, tiny_config(epochs=2), tmp_path / "plain")
    assert plain.curve[0]["training_loss"] == averaged.curve[0]["training_loss"]  # averaging does not steer
    assert plain.curve[0]["validation_loss"] != averaged.curve[0]["validation_loss"]


def test_the_last_epoch_is_kept_where_nothing_is_to_choose(cohort: Cohort, tmp_path: Path) -> None:
    """Then the patients who are watched have chosen nothing, and may set the intervals."""
    config = tiny_config(epochs=4, keep="last", validation_folds=[8, 9], calibration_folds=[8, 9], learning_rate=0.1)
    (plan,) = config.members
    assert plan.training == tuple(range(8))
    assert plan.validation == (8, 9)
    (last,) = train(cohort, config, tmp_path / "last")
    assert last.best_epoch == 4
    (best,) = train(cohort, dataclasses.replace(config, keep="best", calibration_folds=(0,)), tmp_path / "best")
    assert best.best_epoch == int(np.argmin([entry["validation_loss"] for entry in best.curve])) + 1


# --- several networks -------------------------------------------------------------------------------------------


def test_two_folds_of_two_targets_in_parts(folder: Path, cohort: Cohort, tmp_path: Path) -> None:
    """One fold, then all, some steps each, then the rest: four networks, and their mean answers."""
    config = tiny_config(**TWO_FOLDS)  # 5 patients x 4 x 3 = 60 images, 7 steps
    out = tmp_path / "two"
    with pytest.raises(ValueError, match="no network of bmd_g_cm2 has finished an epoch"):
        train_package(folder, out, config, stop_after_steps=2)
    first = train_package(folder, out, config, resume=True, networks=("fold0",))
    assert [member.file for member in first.manifest.members] == ["fold0-bmd.safetensors", "fold0-tbs.safetensors"]
    assert not first.manifest.finished
    assert "**Unfinished: 18 of 28 steps.**" in first.model_card()
    assert first.manifest.metrics["calibration"]["n_patients"] == 5  # only whom fold 0 never saw
    package = train_package(folder, out, config, resume=True)
    manifest = package.manifest
    assert manifest.finished
    assert [(one.fold, one.targets, one.steps, one.best_epoch) for one in manifest.members] == [
        (fold, (target,), 7, 1) for fold in (0, 1) for target in TARGETS
    ]
    assert manifest.metrics["calibration"]["n_patients"] == 10
    assert "28 of 28 steps" in package.model_card()
    pictures = network_input(cohort.slabs[:3, 0], config.input)
    network = load_network(package, torch.device("cpu"))
    answer = infer(network, pictures, device=torch.device("cpu"))
    single = [infer(member, pictures, device=torch.device("cpu"))[:, 0] for member in network.members]
    assert np.allclose(answer[:, 0], (single[0] + single[2]) / 2, atol=1e-6)
    assert np.allclose(answer[:, 1], (single[1] + single[3]) / 2, atol=1e-6)


# --- fine-tuning, and a run that somebody watches ----------------------------------------------------------------


def test_fine_tuning_begins_where_the_package_stands(folder: Path, cohort: Cohort, tmp_path: Path) -> None:
    """Without learning, what comes out answers as what went in: weights, statistics, mean and scale."""
    first = train_package(folder, tmp_path / "first", tiny_config(epochs=2, keep="last"))
    still = {"learning_rate": 0.0, "norm_momentum": 0.0, "start_from": first.sha256, "epochs": 1, "keep": "last"}
    same = train_package(folder, tmp_path / "same", tiny_config(**still), initial=first)
    pictures = network_input(cohort.slabs[:6, 0], INPUT)
    device = torch.device("cpu")
    before, after = (infer(load_network(one, device), pictures, device=device) for one in (first, same))
    assert np.array_equal(before, after)
    assert same.manifest.training["config"]["start_from"] == first.sha256
    assert f"fine-tuned from the package {first.sha256[:12]}" in same.model_card()
    assert "untrained start" in first.model_card()
    others = tiny_config(**still | {"learning_rate": 1e-3})
    moved = train_package(folder, tmp_path / "moved", others, initial=first)
    assert not np.array_equal(before, infer(load_network(moved, device), pictures, device=device))


def test_a_package_that_does_not_fit_is_no_start(folder: Path, tmp_path: Path) -> None:
    first = train_package(folder, tmp_path / "first", tiny_config(epochs=1))
    for config, initial, told in (
        (tiny_config(), first, "by its SHA-256"),
        (tiny_config(start_from=first.sha256), None, "by its SHA-256"),
        (tiny_config(start_from=first.sha256, architecture="resnet34"), first, "another architecture"),
        (tiny_config(start_from=first.sha256, input=INPUT.to_dict() | {"rows": 40}), first, "another input"),
        (tiny_config(start_from=first.sha256, heads="separate"), first, "no network for bmd_g_cm2 alone"),
    ):
        with pytest.raises(ValueError, match=told):
            train_package(folder, tmp_path / "no", config, initial=initial)
    assert not (tmp_path / "no.run").exists()


def test_a_watched_run_stops_after_the_step_and_ends_as_the_same_package(folder: Path, tmp_path: Path) -> None:
    config, created = tiny_config(epochs=2, ema_decay=0.9), datetime(2026, 11, 28, tzinfo=UTC)
    straight = train_package(folder, tmp_path / "a" / "package", config, created=created)
    seen: list[int] = []

    def watch(run: Run) -> bool:
        seen.append(run.step)
        return run.step != 3

    with pytest.raises(Interrupted, match="after step 3 of 8"):
        train_package(folder, tmp_path / "b" / "package", config, watch=watch, created=created)
    assert seen == [1, 2, 3]
    resumed = train_package(folder, tmp_path / "b" / "package", config, resume=True, watch=watch, created=created)
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8]
    assert resumed.sha256 == straight.sha256


# --- what is said of it -----------------------------------------------------------------------------------------


def curve_of(losses: np.ndarray) -> list[dict[str, float]]:
    return [{"epoch": number + 1, "validation_loss": float(loss)} for number, loss in enumerate(losses)]


def test_a_falling_curve_is_not_flat_and_a_level_one_is() -> None:
    epochs = np.arange(60)
    assert flatness(curve_of(1 / (1 + epochs)))["flat"] is False
    level = 0.1 + np.exp(-epochs / 4)
    assert flatness(curve_of(level))["flat"] is True
    level[[50, 57]] = 90.0  # spikes do not decide
    assert flatness(curve_of(level))["flat"] is True
    assert flatness(curve_of(level[:20])) == {"flat": None, "fall": None}
    fall = flatness(curve_of(np.linspace(2.0, 1.0, 60)))["fall"]
    assert fall == pytest.approx(11 / 59)  # the last 12 epochs' share, of the best loss 1.0


def test_where_the_best_epoch_is_kept_spikes_do_not_decide_at_any_length() -> None:
    epochs = np.arange(100)
    spikes = np.random.default_rng(3).gamma(1.0, 0.3, size=100)  # as of batch norm at a constant learning rate
    level = curve_of(0.33 * (1 + spikes) + np.exp(-epochs / 3))
    assert all(flatness(level[:length], "best")["flat"] for length in range(60, 101))
    assert not all(flatness(level[:length], "last")["flat"] for length in range(60, 101))
    falling = curve_of(1 / (1 + epochs) * (1 + spikes))
    assert not any(flatness(falling[:length], "best")["flat"] for length in range(60, 101, 10))
    assert flatness(level[:20], "best") == {"flat": None, "fall": None}
    assert flatness(curve_of(np.linspace(2.0, 1.0, 60)), "best")["fall"] == pytest.approx(12 / 59)


def test_conformal_intervals_cover_what_they_promise() -> None:
    draw = np.random.default_rng(2)
    errors = draw.normal(0, [0.05, 0.02], size=(2000, 2)).astype(np.float32)
    intervals = conformal_intervals(errors, np.repeat(np.arange(500).astype(str), 4))
    fresh = np.abs(draw.normal(0, [0.05, 0.02], size=(20_000, 2)))
    assert (fresh[:, 0] <= intervals[0].bmd_g_cm2).mean() == pytest.approx(0.9, abs=0.02)
    assert (fresh[:, 1] <= intervals[0].tbs).mean() == pytest.approx(0.9, abs=0.02)
    assert intervals[3].bmd_g_cm2 == pytest.approx(intervals[0].bmd_g_cm2 / 2, rel=0.12)


def test_intervals_from_few_patients_are_as_wide_as_few_can_tell() -> None:
    """The largest of two errors holds two thirds of further ones; Student's t of two holds what it says."""
    draw = np.random.default_rng(4)
    held = []
    for patients in (2, 3, 8):
        names = np.arange(patients).astype(str)
        errors = draw.normal(0, [0.05, 0.02], size=(4000, patients, 2)).astype(np.float32)
        widths = [conformal_intervals(one, names)[0].bmd_g_cm2 for one in errors]
        held.append((np.abs(draw.normal(0, 0.05, 4000)) <= widths).mean())
        assert (np.abs(errors[:, :, 0]).max(axis=1) >= np.abs(draw.normal(0, 0.05, 4000))).mean() < 0.89
    assert held == pytest.approx([0.9] * 3, abs=0.015)


def test_nine_patients_are_the_fewest_whose_errors_tell_90_percent() -> None:
    assert FEWEST == 9
    errors = np.arange(1, 10, dtype=np.float32)[:, None] / 100
    assert conformal_intervals(errors, np.arange(9).astype(str))[0].bmd_g_cm2 == pytest.approx(0.09)
    assert conformal_intervals(errors[:8], np.arange(8).astype(str))[0].bmd_g_cm2 > 0.08


def test_every_patient_is_judged_by_the_fold_that_never_saw_it(cohort: Cohort, tmp_path: Path) -> None:
    """Cross calibration: never by the other folds' networks, nor by the mean that the package answers with."""
    config = tiny_config(**{**TWO_FOLDS, "heads": "joint"})
    trained = train(cohort, config, tmp_path / "run")
    package = package_run(trained, cohort, config, tmp_path / "package")
    errors = np.full_like(cohort.targets, np.nan)
    for one in trained:
        unseen = np.flatnonzero(~np.isin(cohort.folds, one.plan.training))
        found = predict_cohort(one.network(config), cohort, unseen, config.input, "fp32", torch.device("cpu"))
        errors[unseen] = found - cohort.targets[unseen]
    told = package.manifest.metrics["calibration"]
    assert [told["bmd_mean_error"], told["tbs_mean_error"]] == pytest.approx(errors.mean(axis=0), abs=1e-5)
    expected = conformal_intervals(errors, cohort.patients)
    for made, one in zip(package.manifest.intervals, expected, strict=True):
        assert (made.levels, made.bmd_g_cm2, made.tbs) == pytest.approx((one.levels, one.bmd_g_cm2, one.tbs), abs=1e-5)


@pytest.mark.parametrize(("patients", "rank"), [(9, 9), (10, 10), (19, 18), (20, 19), (29, 27), (30, 28), (99, 90)])
def test_the_quantile_counts_the_patient_who_is_to_come(patients: int, rank: int) -> None:
    """ceil((n + 1) * 0.9), not ceil(n * 0.9): the errors are 1, 2, 3... hundredths, one vertebra a patient."""
    sizes = np.random.default_rng(0).permutation(patients) + 1
    errors = np.repeat(sizes[:, None] / 100, 2, axis=1).astype(np.float32)
    (interval,) = conformal_intervals(errors, np.arange(patients).astype(str))
    assert (interval.bmd_g_cm2, interval.tbs) == pytest.approx((rank / 100, rank / 100))


def test_a_patient_gives_one_mean_however_many_vertebrae_it_has() -> None:
    """20 patients: the largest error of a mean is the one that an interval of 90 % may leave out."""
    who = np.repeat([f"P{number}" for number in range(20)], [4] + [2] * 19)
    errors = np.where(who == "P0", 0.5, 0.01)[:, None].repeat(2, axis=1).astype(np.float32)
    two = next(one for one in conformal_intervals(errors, who) if one.levels == 2)
    assert (two.bmd_g_cm2, two.tbs) == pytest.approx((0.01, 0.01))
