"""The built-in segmentation networks: small U-Nets, written down exactly as nnU-Net writes its own.

Two networks in TotalSegmentator's folder layout: a coarse one at 6 mm (its dataset 298), which finds the
lumbar box and names the levels a first time, and a fine one (its dataset 292), which outlines and names the
vertebrae. Each folder holds `plans.json` (architecture, spacing, intensity window), `dataset.json` (the class
map) and `fold_0/checkpoint_final.pth`. Whatever reads TotalSegmentator's published weights therefore reads
these, and the other way round; the class map and the spacing belong to the package, never to the program.
"""

from __future__ import annotations

import json
import pydoc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.weight_files import CHECKPOINT, CONFIGURATION

# Anatomy from the bottom up, by TotalSegmentator's names; the position in the tuple is the network's class
# index.
CLASSES = (
    "background",
    "sacrum",
    "vertebrae_S1",
    "vertebrae_L5",
    "vertebrae_L4",
    "vertebrae_L3",
    "vertebrae_L2",
    "vertebrae_L1",
    "vertebrae_T12",
    "vertebrae_T11",
    "vertebrae_T10",
)

# Label ids of every label map in this project: TotalSegmentator's `total` task, and 126 for a sixth lumbar
# body (ours).
LABEL_IDS: Mapping[str, int] = {
    "sacrum": 25,
    "vertebrae_S1": 26,
    "vertebrae_L5": 27,
    "vertebrae_L4": 28,
    "vertebrae_L3": 29,
    "vertebrae_L2": 30,
    "vertebrae_L1": 31,
    "vertebrae_T12": 32,
    "vertebrae_T11": 33,
    "vertebrae_T10": 34,
    "vertebrae_T9": 35,
    "vertebrae_T8": 36,
    "vertebrae_T7": 37,
    "vertebrae_T6": 38,
    "vertebrae_T5": 39,
    "vertebrae_T4": 40,
    "vertebrae_T3": 41,
    "vertebrae_T2": 42,
    "vertebrae_T1": 43,
    "vertebrae_L6": 126,
}


@dataclass(frozen=True)
class SpineUNetConfig:
    """Everything that `plans.json` and `dataset.json` say about one network (lengths in mm, intensities in
    HU).
    """

    dataset: str
    trainer: str
    spacing_mm: tuple[float, float, float]  # (z, y, x)
    patch_size: tuple[int, int, int]  # voxels (z up, y to the front, x to the right)
    features: tuple[int, ...]
    convolutions: tuple[int, ...]
    window_hu: tuple[float, float] = (-200.0, 1000.0)
    mean_hu: float = 100.0
    std_hu: float = 220.0
    classes: tuple[str, ...] = CLASSES

    @property
    def folder(self) -> Path:
        """The network's folder below the weights folder."""
        return Path(self.dataset) / f"{self.trainer}__nnUNetPlans__{CONFIGURATION}"


COARSE = SpineUNetConfig(
    dataset="Dataset298_TotalSegmentator_total_6mm_1559subj",
    trainer="nnUNetTrainer_4000epochs_NoMirroring",
    spacing_mm=(6.0, 6.0, 6.0),
    patch_size=(64, 64, 64),
    features=(16, 32, 64, 128),
    convolutions=(2, 2, 2, 2),
)
FINE = SpineUNetConfig(
    dataset="Dataset292_TotalSegmentator_part2_vertebrae_1532subj",
    trainer="nnUNetTrainerNoMirroring",
    spacing_mm=(2.0, 1.5, 1.5),
    patch_size=(128, 80, 80),
    features=(16, 32, 64, 96, 128),
    convolutions=(1, 2, 2, 2, 2),
)
NETWORKS: Mapping[str, SpineUNetConfig] = {"coarse": COARSE, "fine": FINE}


def architecture(config: SpineUNetConfig) -> dict[str, Any]:
    """The `architecture` block of plans.json: a PlainConvUNet as nnU-Net's planner describes it."""
    stages = len(config.features)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(config.features),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
            "n_conv_per_stage": list(config.convolutions),
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def plans(config: SpineUNetConfig) -> dict[str, Any]:
    """plans.json: what nnU-Net's PlansManager needs to rebuild the network and its preprocessing."""
    spacing = list(config.spacing_mm)
    nearest = {"is_seg": True, "order": 0, "order_z": 0, "force_separate_z": None}
    linear = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    intensities = {
        "mean": config.mean_hu,
        "median": config.mean_hu,
        "std": config.std_hu,
        "min": config.window_hu[0],
        "max": config.window_hu[1],
        "percentile_00_5": config.window_hu[0],
        "percentile_99_5": config.window_hu[1],
    }
    return {
        "dataset_name": config.dataset,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": list(config.patch_size),
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {
            CONFIGURATION: {
                "data_identifier": f"nnUNetPlans_{CONFIGURATION}",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 1,
                "patch_size": list(config.patch_size),
                "median_image_size_in_voxels": list(config.patch_size),
                "spacing": spacing,
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": linear,
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_seg_kwargs": nearest,
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": linear,
                "batch_dice": True,
                "architecture": architecture(config),
            }
        },
    }


def dataset(config: SpineUNetConfig, training_cases: int) -> dict[str, Any]:
    """dataset.json: the class map that belongs to these weights."""
    return {
        "channel_names": {"0": "CT"},
        "labels": {name: index for index, name in enumerate(config.classes)},
        "numTraining": training_cases,
        "file_ending": ".nii.gz",
        "name": config.dataset,
        "description": "Osteogate's built-in network, trained on digital patients only.",
    }


def build(config: SpineUNetConfig, *, deep_supervision: bool = False) -> nn.Module:
    """The network itself, [n, 1, z, y, x] -> [n, classes, z, y, x]; initialised as nnU-Net does."""
    described = architecture(config)
    arguments = dict(described["arch_kwargs"])
    for name in described["_kw_requires_import"]:
        if arguments[name] is not None:
            arguments[name] = pydoc.locate(arguments[name])
    network_class: Any = pydoc.locate(described["network_class_name"])
    network: nn.Module = network_class(
        input_channels=1, num_classes=len(config.classes), deep_supervision=deep_supervision, **arguments
    )
    network.apply(network_class.initialize)
    return network


def resample(hu: Tensor, spacing_mm: Sequence[float], target_mm: Sequence[float]) -> Tensor:
    """[z, y, x] -> the network's spacing: trilinear with aligned corners, which is TotalSegmentator's
    `ndimage.zoom` order 1.
    """
    shape = [max(1, round(n * step / wanted)) for n, step, wanted in zip(hu.shape, spacing_mm, target_mm, strict=True)]
    if shape == list(hu.shape):
        return hu
    return functional.interpolate(hu[None, None], size=shape, mode="trilinear", align_corners=True)[0, 0]


def normalise(hu: Tensor, config: SpineUNetConfig) -> Tensor:
    """nnU-Net's CTNormalization: HU clipped to the window, centred and scaled."""
    return (hu.clamp(*config.window_hu) - config.mean_hu) / config.std_hu


def write_network(config: SpineUNetConfig, weights: Mapping[str, Tensor], root: Path, *, training_cases: int) -> Path:
    """Write one network below `root` in TotalSegmentator's layout; weights are stored as float16."""
    folder = root / config.folder
    (folder / CHECKPOINT).parent.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "plans.json", plans(config))
    _write_json(folder / "dataset.json", dataset(config, training_cases))
    checkpoint = {
        "network_weights": _stored_once(weights),
        "trainer_name": config.trainer,
        "init_args": {"configuration": CONFIGURATION, "fold": 0},
        "inference_allowed_mirroring_axes": None,
    }
    unfinished = (folder / CHECKPOINT).with_suffix(".part")
    torch.save(checkpoint, unfinished)
    unfinished.replace(folder / CHECKPOINT)
    return folder


def _stored_once(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as float16, each tensor once.

    A PlainConvUNet names every tensor three times (`conv`, `all_modules.0`, `decoder.encoder`). torch.save
    writes shared storage once, so the copies must stay one tensor through the cast.
    """
    cast: dict[int, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for name, value in weights.items():
        key = value.data_ptr()
        if key not in cast:
            cast[key] = value.detach().to("cpu", torch.float16) if value.is_floating_point() else value
        stored[name] = cast[key]
    return stored


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
