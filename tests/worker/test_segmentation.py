"""The built-in networks on an unseen digital patient, the tiling against nnU-Net's, and tampered weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.phantom.patient import draw
from models.phantom.render import body_grid, render
from models.phantom.scanner import scan, scanner_rng
from models.spine_unet import COARSE, FINE, NETWORKS, build, write_network
from models.weight_files import CHECKPOINT, SUMS_FILE, write_sums
from service.domain.reasons import Code
from service.domain.result import LEVELS, Numbering
from tests.conftest import ROOT
from worker.anatomy import assess
from worker.segmentation import (
    SegmentationError,
    Segmenter,
    SuppliedLabels,
    WeightsError,
    load_segmenter,
    verify,
)
from worker.segmentation.base import L5, LEVEL_IDS, LabelArray
from worker.segmentation.cascade import Cascade, lumbar_box
from worker.segmentation.evaluate import dice, levels_right
from worker.segmentation.network import _pad, gaussian, load_network, precision_for, tiles
from worker.segmentation.orientation import Turn
from worker.segmentation.weights import BUILT_IN
from worker.volume import Volume, load_nifti, write_label_map

UNSEEN_SEED = 910_001  # training begins at 100001


@pytest.fixture(scope="module")
def patient() -> tuple[Volume, LabelArray]:
    """An unseen digital patient, 2.5 mm, from T12 to below S1."""
    drawn = draw(UNSEEN_SEED)
    rendered = render(drawn, body_grid(drawn, 2.5, first="T12", last="S1", margin_mm=12.0))
    hu = scan(rendered, drawn, scanner_rng(drawn)).astype(np.float32)
    return Volume(hu, rendered.affine), rendered.labels


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return load_segmenter(None, "cpu")


def test_the_built_in_networks_find_and_name_l1_to_l4(patient: tuple[Volume, LabelArray], segmenter: Segmenter) -> None:
    volume, truth = patient
    segmentation = segmenter.segment(volume)
    assert segmentation.labels.shape == volume.hu.shape
    assert segmentation.labels.dtype == np.uint8
    assert np.mean([dice(segmentation.labels, truth, label) for label in LEVEL_IDS.values()]) >= 0.85
    assert levels_right(segmentation, truth, volume)
    anatomy = assess(volume, segmentation)
    assert anatomy.numbering is Numbering.CERTAIN, anatomy.notes
    assert all(anatomy.levels[name].in_view for name in LEVELS)
    assert segmentation.sha256 == verify(BUILT_IN).sha256
    assert set(segmentation.timings_s) == {"coarse", "fine"}


def test_the_axes_of_the_ct_do_not_matter(patient: tuple[Volume, LabelArray], segmenter: Segmenter) -> None:
    """The same patient stored head first, with rows and columns exchanged: the same labels in their places."""
    volume, _ = patient
    expected = segmenter.segment(volume).labels
    flip = np.eye(4)
    flip[0, 0], flip[0, 3] = -1, volume.hu.shape[0] - 1  # k reversed
    swap = np.eye(4)[:, [0, 2, 1, 3]]  # j and i exchanged
    turned = Volume(np.ascontiguousarray(volume.hu[::-1].transpose(0, 2, 1)), volume.affine @ flip @ swap)
    found = segmenter.segment(turned).labels.transpose(0, 2, 1)[::-1]
    for label in LEVEL_IDS.values():
        assert dice(np.ascontiguousarray(found), expected, label) > 0.995


def test_randomised_weights_fail(patient: tuple[Volume, LabelArray], tmp_path: Path) -> None:
    volume, truth = patient
    torch.manual_seed(0)
    for config in NETWORKS.values():
        write_network(config, build(config).state_dict(), tmp_path, training_cases=0)
    write_sums(tmp_path)
    middle = slice(volume.hu.shape[0] // 2 - 12, volume.hu.shape[0] // 2 + 12)
    part = Volume(volume.hu[middle], volume.affine)
    segmentation = load_segmenter(tmp_path, "cpu").segment(part)
    assert not levels_right(segmentation, truth[middle], part)
    assert np.mean([dice(segmentation.labels, truth[middle], label) for label in (30, 29)]) < 0.3
    assert assess(part, segmentation).numbering is Numbering.UNCERTAIN


def test_without_a_spine_nothing_is_labelled_and_nothing_crashes(segmenter: Segmenter) -> None:
    air = Volume(np.full((20, 24, 24), -1000, dtype=np.float32), np.diag([5.0, 5.0, 5.0, 1.0])[[2, 1, 0, 3]])
    segmentation = segmenter.segment(air)
    anatomy = assess(air, segmentation)
    assert Code.NO_SPINE_FOUND in {reason.code for reason in anatomy.refusals} or segmentation.labels.any()
    assert anatomy.numbering is Numbering.UNCERTAIN


def test_a_real_spine_is_named_rightly_or_not_certainly(real_data: Path, segmenter: Segmenter) -> None:
    """The networks never saw a real CT: right levels, or uncertain with the reason; never wrong and certain."""
    folder = real_data / "totalsegmentator-example-ct"
    volume = load_nifti(folder / "example_ct.nii.gz")
    truth = SuppliedLabels(folder / "spine_report" / "test_result" / "totalseg.nii.gz").segment(volume)
    segmentation = segmenter.segment(volume)
    anatomy = assess(volume, segmentation)
    if anatomy.numbering is Numbering.CERTAIN:
        assert levels_right(segmentation, truth.labels, volume)
    else:
        assert anatomy.refusals
        assert anatomy.notes


def test_a_supplied_label_map_passes_the_same_checks(real_data: Path) -> None:
    folder = real_data / "totalsegmentator-example-ct"
    volume = load_nifti(folder / "example_ct.nii.gz")
    supplied = SuppliedLabels(folder / "spine_report" / "test_result" / "totalseg.nii.gz")
    anatomy = assess(volume, supplied.segment(volume))
    assert anatomy.numbering is Numbering.CERTAIN, anatomy.notes
    assert anatomy.lumbar_count == 5
    assert not anatomy.refusals
    assert not any(level.exclusions for level in anatomy.levels.values())
    assert len(supplied.sha256) == 64


def test_a_supplied_label_map_comes_back_as_written(patient: tuple[Volume, LabelArray], tmp_path: Path) -> None:
    volume, truth = patient
    write_label_map(truth, volume, tmp_path / "labels.nii.gz")
    assert np.array_equal(SuppliedLabels(tmp_path / "labels.nii.gz").segment(volume).labels, truth)


# --------------------------------------------------------------------------------- the same semantics as nnU-Net


@pytest.mark.filterwarnings("ignore")
def test_tiles_weights_and_padding_are_nnunets() -> None:
    sliding = pytest.importorskip("nnunetv2.inference.sliding_window_prediction")
    padding = pytest.importorskip("acvl_utils.cropping_and_padding.padding")
    tile = (32, 16, 24)
    for image in ((32, 16, 24), (33, 40, 25), (90, 17, 100)):
        steps = sliding.compute_steps_for_sliding_window(image, tile, 0.8)
        corners = [(z, y, x) for z in steps[0] for y in steps[1] for x in steps[2]]
        assert [tuple(part.start for part in one) for one in tiles(image, tile)] == corners
    theirs = sliding.compute_gaussian(tile, 1 / 8, 10, device=torch.device("cpu"))
    assert torch.equal(gaussian(tile), theirs.float())
    small = torch.rand(1, 21, 30, 7)
    padded, inner = padding.pad_nd_image(small, tile, "constant", {"value": 0}, True, None)
    ours, where = _pad(small[0], tile)
    assert torch.equal(ours, padded[0])
    assert torch.equal(ours[where], padded[inner][0])


def test_a_cpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for able, expected in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx2": True, "avx512_bf16": able})
        assert precision_for(cpu) is expected
    assert precision_for(torch.device("cuda")) is torch.float16


def test_bfloat16_gives_the_labels_of_float32(patient: tuple[Volume, LabelArray], segmenter: Segmenter) -> None:
    volume, _ = patient
    assert isinstance(segmenter, Cascade)
    hu = torch.from_numpy(np.ascontiguousarray(volume.hu[::2, ::2, ::2][:, ::-1, ::-1]))
    exact = dataclasses.replace(segmenter.coarse, precision=torch.float32)
    agree = exact.logits(hu).argmax(0) == segmenter.coarse.logits(hu).argmax(0)
    assert float(agree.float().mean()) > 0.998


def test_running_out_of_gpu_memory_takes_smaller_tiles_then_fails_clearly(segmenter: Segmenter) -> None:
    assert isinstance(segmenter, Cascade)
    sizes: list[tuple[int, ...]] = []

    class Full(torch.nn.Module):
        def forward(self, patch: torch.Tensor) -> torch.Tensor:
            sizes.append(tuple(patch.shape[2:]))
            raise torch.cuda.OutOfMemoryError("full")

    network = dataclasses.replace(segmenter.fine, module=Full(), compiled=None, tile=(128, 64, 64))
    with pytest.raises(SegmentationError, match="memory"):
        network.logits(torch.zeros(40, 40, 40))
    assert sizes == [(128, 64, 64), (64, 32, 32)]


def test_a_gpu_whose_memory_holds_half_a_tile_goes_on_with_smaller_ones(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Injected (fault 22): the study is segmented on the same device, in smaller tiles, and the log says so."""
    assert isinstance(segmenter, Cascade)
    sizes: list[tuple[int, ...]] = []
    real = segmenter.coarse.module

    class Small(torch.nn.Module):
        def forward(self, patch: torch.Tensor) -> torch.Tensor:
            sizes.append(tuple(patch.shape[2:]))
            if patch.numel() > 64 * 32 * 32:
                raise torch.OutOfMemoryError("full")
            answer: torch.Tensor = real(patch)
            return answer

    moved: list[object] = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *where, **_: moved.append(where) or self)
    network = dataclasses.replace(segmenter.coarse, module=Small(), compiled=None)
    logits = network.logits(torch.zeros(40, 34, 20))
    assert logits.shape == (network.classes, 40, 34, 20)
    assert sizes[0] == network.tile
    assert set(sizes[1:]) == {(64, 32, 32)}
    assert moved == [], "nothing is carried to another device"
    assert "going on with (64, 32, 32)" in caplog.text


def test_memory_of_a_long_ct_is_that_of_its_labels() -> None:
    """300 slices of 512 x 512 as int16: a byte a voxel for labels, some for the box; a float copy would take four."""
    command = [sys.executable, "-m", "tests.bench.bench_segment", "--peak", "int16", "--slices", "300"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    told = json.loads(done.stdout.splitlines()[-1])
    voxels = 300 * 512 * 512
    assert told["volume"] * 2**30 == 2 * voxels
    assert (told["peak"] - told["before"]) * 2**30 < 4 * voxels


def test_turning_there_and_back_is_the_identity() -> None:
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    affine = np.array([[0, 0.1, -0.9, 5], [-1.9, 0, 0, 3], [0.1, 3.0, 0, 1], [0, 0, 0, 1]])
    turn = Turn.of(affine)
    there = turn.to_network(array)
    assert there.shape == (3, 2, 4)  # up is axis 1, back and forth axis 0, left and right axis 2
    assert np.array_equal(turn.to_volume(there), array)
    assert turn.spacing_to_volume((2.0, 1.5, 1.25)) == (1.5, 2.0, 1.25)  # a network's, on the CT's own axes
    sideways = Turn.of(np.array([[1.0, 0, 0, 0], [0, 0, 3.0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]]))  # sagittal slices
    assert sideways.shape_to_network((7, 8, 9)) == (8, 9, 7)
    assert sideways.spacing_to_volume((2.0, 1.5, 1.25)) == (1.25, 2.0, 1.5)


def test_the_box_holds_the_lumbar_spine_with_its_margins() -> None:
    coarse = np.zeros((50, 60, 60), dtype=np.uint8)
    coarse[20:40, 25:35, 26:34] = L5
    volume = Volume(np.zeros((100, 180, 180), dtype=np.float32), np.diag([2.0, 2.0, 3.0, 1.0])[:, [2, 1, 0, 3]])
    box = lumbar_box(coarse, volume)
    assert box is not None
    assert (box[0].start, box[0].stop) == (40 - 16, 80 + 16)  # 50 mm in whole voxels of 3 mm
    assert (box[1].start, box[1].stop) == (75 - 10, 105 + 10)
    assert lumbar_box(np.zeros_like(coarse), volume) is None


# ------------------------------------------------------------------------------------------- weights


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(BUILT_IN, tmp_path / "weights")
    return tmp_path / "weights"


def test_an_altered_byte_is_refused_and_named(copied: Path) -> None:
    before = verify(copied).sha256
    path = copied / FINE.folder / CHECKPOINT
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"checkpoint_final\.pth is altered") as caught:
        load_segmenter(copied, "cpu")
    assert FINE.dataset in str(caught.value)
    write_sums(copied)
    assert verify(copied).sha256 != before


@pytest.mark.parametrize(
    "name",
    [COARSE.folder / CHECKPOINT, COARSE.folder / "plans.json", FINE.folder / "dataset.json", Path(SUMS_FILE)],
)
def test_a_missing_file_is_refused_and_named(copied: Path, name: Path) -> None:
    (copied / name).unlink()
    with pytest.raises(WeightsError, match=name.name):
        verify(copied)


def test_a_half_unzipped_folder_is_refused(copied: Path) -> None:
    shutil.rmtree(copied / COARSE.dataset)
    with pytest.raises(WeightsError, match="Dataset298"):
        verify(copied)
    with pytest.raises(WeightsError, match=SUMS_FILE):
        verify(copied / "nowhere")


def test_a_checkpoint_that_carries_code_is_refused(copied: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(copied / "ran"),)

    path = copied / COARSE.folder / CHECKPOINT
    torch.save({"network_weights": {}, "init_args": {}, "payload": Payload()}, path)
    with pytest.raises(WeightsError, match="plain weights"):
        load_network(copied / COARSE.folder, torch.device("cpu"))
    assert not (copied / "ran").exists()


def test_plans_may_name_network_parts_only(copied: Path) -> None:
    path = copied / COARSE.folder / "plans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "os.system"
    path.write_text(json.dumps(plans))
    with pytest.raises(WeightsError, match=r"os\.system"):
        load_network(copied / COARSE.folder, torch.device("cpu"))


def test_the_class_map_is_the_packages(copied: Path) -> None:
    """The same weights with two names exchanged in dataset.json give exchanged labels: nothing is built in."""
    path = copied / COARSE.folder / "dataset.json"
    dataset = json.loads(path.read_text())
    labels = dataset["labels"]
    labels["vertebrae_L1"], labels["vertebrae_L2"] = labels["vertebrae_L2"], labels["vertebrae_L1"]
    path.write_text(json.dumps(dataset))
    network = load_network(copied / COARSE.folder, torch.device("cpu"))
    original = load_network(BUILT_IN / COARSE.folder, torch.device("cpu"))
    swapped = {index for index in original.label_ids if original.label_ids[index] != network.label_ids[index]}
    assert {original.label_ids[index] for index in swapped} == {LEVEL_IDS["L1"], LEVEL_IDS["L2"]}


def test_published_plans_of_before_nnunet_2_4_are_read(copied: Path) -> None:
    """TotalSegmentator's published plans describe the architecture in nnU-Net's older words."""
    path = copied / COARSE.folder / "plans.json"
    plans = json.loads(path.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    described = configuration.pop("architecture")["arch_kwargs"]
    configuration |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": described["features_per_stage"][0],
        "unet_max_num_features": described["features_per_stage"][-1],
        "n_conv_per_stage_encoder": described["n_conv_per_stage"],
        "n_conv_per_stage_decoder": described["n_conv_per_stage_decoder"],
        "conv_kernel_sizes": described["kernel_sizes"],
        "pool_op_kernel_sizes": described["strides"],
    }
    properties = plans.pop("foreground_intensity_properties_per_channel")
    plans["foreground_intensity_properties_by_modality"] = properties
    path.write_text(json.dumps(plans))
    old = load_network(copied / COARSE.folder, torch.device("cpu"))
    new = load_network(BUILT_IN / COARSE.folder, torch.device("cpu"))
    patch = torch.rand(1, 1, 16, 16, 16)
    with torch.inference_mode():
        assert torch.equal(old.module(patch), new.module(patch))


def test_a_gpu_that_is_not_there_is_an_error_not_a_slow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WeightsError, match="GPU"):
        load_segmenter(None, "cuda")
