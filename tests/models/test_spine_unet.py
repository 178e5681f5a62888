"""The networks' files, and that the training loop learns, resumes and sees what prediction sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.spine_training import (
    Case,
    TrainingConfig,
    _arches,
    _shell_and_marrow,
    batches,
    class_indices,
    learning_rate,
    loss_of,
    prepare_case,
    random_crop,
    train,
)
from models.spine_unet import (
    COARSE,
    FINE,
    LABEL_IDS,
    SpineUNetConfig,
    build,
    dataset,
    normalise,
    plans,
    resample,
    write_network,
)
from models.weight_files import CHECKPOINT, SUMS_FILE, file_sha256, write_sums

TINY = replace(
    COARSE, patch_size=(16, 16, 16), features=(4, 8), convolutions=(1, 1), classes=("background", "vertebrae_L1")
)


def blocks(seed: int = 0) -> list[Case]:
    """A bright block in noise: anything that learns at all learns this."""
    rng = np.random.default_rng(seed)
    hu = rng.normal(0, 20, (24, 24, 24))
    classes = np.zeros(hu.shape, dtype=np.uint8)
    classes[8:16, 6:18, 6:18] = 1
    return [Case((hu + 400.0 * classes).astype(np.int16), classes)]


@pytest.mark.parametrize("config", [COARSE, FINE])
def test_folders_are_totalsegmentators(config: SpineUNetConfig) -> None:
    assert config.folder.as_posix() in {
        "Dataset298_TotalSegmentator_total_6mm_1559subj/nnUNetTrainer_4000epochs_NoMirroring__nnUNetPlans__3d_fullres",
        "Dataset292_TotalSegmentator_part2_vertebrae_1532subj/nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres",
    }
    assert set(config.classes[1:]) <= set(LABEL_IDS)
    configuration = plans(config)["configurations"]["3d_fullres"]
    assert configuration["spacing"] == list(config.spacing_mm)
    halvings = 2 ** (len(config.features) - 1)
    assert all(size % halvings == 0 for size in config.patch_size)
    assert dataset(config, 3)["labels"]["background"] == 0


def test_a_written_network_reads_back_and_is_pinned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build(TINY)
    folder = write_network(TINY, network.state_dict(), tmp_path, training_cases=7)
    sums = write_sums(tmp_path).read_text().splitlines()
    assert len(sums) == 3
    for line in sums:
        pinned, _, name = line.partition("  ")
        assert file_sha256(tmp_path / name) == pinned
    checkpoint = torch.load(folder / CHECKPOINT, weights_only=True)
    assert checkpoint["trainer_name"] == TINY.trainer
    assert checkpoint["init_args"]["configuration"] == "3d_fullres"
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 7
    again = build(TINY)
    again.load_state_dict(checkpoint["network_weights"])
    patch = torch.rand(1, 1, 16, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(again(patch), network(patch), atol=2e-2)  # stored as float16
    assert (tmp_path / SUMS_FILE).is_file()
    parameters = sum(p.numel() for p in network.parameters())
    assert (folder / CHECKPOINT).stat().st_size < 2 * parameters + 40_000  # each tensor once, two bytes


def test_training_learns_and_resumes_where_it_stopped(tmp_path: Path) -> None:
    run = TrainingConfig(steps=30, batch=1, learning_rate=1e-2, warm_up=3, truncate=0.0, max_bend_mm=0.0)
    patches, classes = next(batches(blocks(), TINY, run, 999))
    torch.manual_seed(run.seed)
    before = loss_of([build(TINY)(patches)], classes).item()
    weights = train(TINY, blocks(), tmp_path / "whole", run, save_every=100, state=None)
    network = build(TINY)
    network.load_state_dict(weights)
    assert loss_of([network(patches)], classes).item() < 0.7 * before

    state, half = tmp_path / "state.pt", tmp_path / "half"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("models.spine_training.learning_rate", _stop_at(12))
        with pytest.raises(KeyboardInterrupt):
            train(TINY, blocks(), half, run, save_every=12, state=state)
    resumed = train(TINY, blocks(), half, run, save_every=100, state=state)
    for name, value in weights.items():
        assert torch.allclose(value, resumed[name], atol=1e-6), name


def _stop_at(last: int) -> Callable[[int, TrainingConfig], float]:
    def rate(step: int, run: TrainingConfig) -> float:
        if step >= last:
            raise KeyboardInterrupt
        return learning_rate(step, run)

    return rate


def test_the_learning_rate_rises_then_falls() -> None:
    run = TrainingConfig(steps=100, warm_up=10, learning_rate=1.0)
    rates = [learning_rate(step, run) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.02


def test_a_crop_is_a_function_of_its_seed_and_keeps_labels_on_bone() -> None:
    run = TrainingConfig()
    for seed in range(8):
        patch, classes = random_crop(blocks()[0], TINY, run, np.random.default_rng(seed))
        again, _ = random_crop(blocks()[0], TINY, run, np.random.default_rng(seed))
        assert torch.equal(patch, again)
        assert patch.shape == (1, 16, 16, 16)
        if int(classes.sum()) > 50:
            assert float(patch[0][classes == 1].mean()) > float(patch[0][classes == 0].mean()) + 0.3


def test_outside_of_the_field_of_view_is_zero_as_nnunet_pads() -> None:
    case = Case(np.full((4, 4, 4), 900, dtype=np.int16), np.zeros((4, 4, 4), dtype=np.uint8))
    patch, _ = random_crop(case, TINY, TrainingConfig(truncate=0.0), np.random.default_rng(0))
    assert float((patch == 0).float().mean()) > 0.9
    assert float(patch.abs().max()) > 1.0


def test_a_digital_patient_is_prepared_with_every_level_at_both_resolutions() -> None:
    case = prepare_case(5)
    for name in ("coarse", "fine"):
        classes = case[f"{name}_classes"]
        assert classes.shape == case[f"{name}_hu"].shape
        assert set(range(9)) <= set(np.unique(classes).tolist())
        up = [float(np.argwhere(classes == index)[:, 0].mean()) for index in range(1, 9)]
        assert up == sorted(up)  # z runs to the head: sacrum lowest, T12 highest
    spine = np.argwhere(case["fine_classes"] == 5)
    bright = case["fine_hu"][tuple(spine.T)]
    assert float(bright.mean()) > 80


def test_unknown_labels_become_background() -> None:
    labels = np.array([[[0, 25, 31, 90]]], dtype=np.uint8)
    assert class_indices(labels, COARSE).tolist() == [[[0, 1, 7, 0]]]


def test_resampling_keeps_the_ends_and_normalising_the_window() -> None:
    ramp = torch.arange(31.0).view(31, 1, 1).expand(31, 5, 5).contiguous()
    small = resample(ramp, (2.0, 6.0, 6.0), (6.0, 6.0, 6.0))
    assert small.shape == (10, 5, 5)
    assert float(small[0, 0, 0]) == 0.0
    assert float(small[-1, 0, 0]) == pytest.approx(30.0)
    scaled = normalise(torch.tensor([-3000.0, COARSE.mean_hu, 9000.0]), COARSE)
    low, high = ((edge - COARSE.mean_hu) / COARSE.std_hu for edge in COARSE.window_hu)
    assert scaled.tolist() == pytest.approx([low, 0.0, high])


def test_shells_and_marrow_are_recoloured_apart() -> None:
    bone = torch.zeros((1, 1, 24, 24, 24), dtype=torch.bool)
    bone[..., 6:18, 6:18, 6:18] = True
    ratios = []
    for seed in range(12):
        factor = _shell_and_marrow(bone, np.random.default_rng(seed))
        assert factor.shape == bone.shape
        assert bool((factor > 0).all())
        ratios.append(float(factor[0, 0, 12, 12, 12] / factor[0, 0, 6, 12, 12]))
    assert min(ratios) < 0.7
    assert max(ratios) > 1.1


def test_arches_are_told_from_bodies() -> None:
    bone = torch.zeros((1, 1, 40, 48, 40), dtype=torch.bool)
    bone[..., 10:30, 20:40, 8:32] = True  # a body
    bone[..., 14:22, 4:16, 18:21] = True  # a spinous process behind it
    arches = _arches(bone)
    assert arches.shape == bone.shape
    assert float(arches[..., 20, 30, 20]) == 0.0
    assert float(arches[..., 10:30, 20:40, 8:32].mean()) < 0.1
    assert float(arches[..., 18, 6, 19]) == 1.0
