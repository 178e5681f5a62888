"""One nnU-Net, read once from its folder and kept in memory.

The same semantics as nnU-Net's own predictor (2.8: `predict_from_raw_data`, `sliding_window_prediction`),
which a test holds it to: zero padding around the centre, evenly spread tiles, Gaussian weights, logits
averaged. Read here rather than through nnU-Net because its loader unpickles (weights_only=False), its import
takes seconds and writes to stdout, and it autocasts on CUDA only.
"""

from __future__ import annotations

import itertools
import json
import math
import pydoc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from models.resnet50 import has_bf16
from models.spine_unet import CHECKPOINT, CONFIGURATION, LABEL_IDS
from worker.segmentation.base import SegmentationError
from worker.segmentation.weights import WeightsError

TILE_STEP = 0.8  # of a tile; TotalSegmentator's choice

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Network:
    """A network with everything its plans say: spacing in mm, tile in voxels, intensity window in HU."""

    module: nn.Module
    device: torch.device
    spacing_mm: tuple[float, float, float]  # (z, y, x)
    tile: Shape
    window_hu: tuple[float, float]
    mean_hu: float
    std_hu: float
    label_ids: Mapping[int, int]  # the network's class -> label id, vertebrae and sacrum only
    classes: int
    precision: torch.dtype  # of the convolutions; logits are summed in float32

    def logits(self, hu: Tensor) -> Tensor:
        """HU [z, y, x] at the network's spacing (z up, y to the front, x to the right) -> logits [classes, z,
        y, x].
        """
        image = (hu.float().clamp(*self.window_hu) - self.mean_hu) / max(self.std_hu, 1e-8)
        tile = self.tile
        while True:
            try:
                return self._tiled(image, tile)
            except torch.cuda.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                if max(tile) <= 32:
                    raise SegmentationError("The GPU's memory does not hold even the smallest tile.") from error
                tile = _smaller(tile)

    def _tiled(self, image: Tensor, tile: Shape) -> Tensor:
        padded, inner = _pad(image, tile)
        weight = gaussian(tile).to(self.device)
        total = torch.zeros((self.classes, *padded.shape))
        weights = torch.zeros(padded.shape)
        with torch.inference_mode(), self._autocast():
            for part in tiles(_shape(padded), tile):
                scores = self.module(padded[part][None, None].to(self.device))[0].float()
                total[(slice(None), *part)] += (scores * weight).cpu()
                weights[part] += weight.cpu()
        total /= weights
        return total[(slice(None), *inner)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)


def load_network(folder: Path, device: torch.device) -> Network:
    """Read plans.json, dataset.json and the checkpoint of one trained nnU-Net; WeightsError names what does
    not fit.
    """
    plans, dataset = _read_json(folder / "plans.json"), _read_json(folder / "dataset.json")
    checkpoint = _read_checkpoint(folder / CHECKPOINT)
    try:
        configuration = _configuration(plans, checkpoint["init_args"].get("configuration", CONFIGURATION))
        intensities = _intensities(plans)
        labels = {str(name): int(index) for name, index in dataset["labels"].items()}
        module = _build(_architecture(configuration), len(labels))
        module.load_state_dict(checkpoint["network_weights"])
        if list(plans["transpose_forward"]) != [0, 1, 2] or len(configuration["patch_size"]) != 3:
            raise ValueError("only untransposed 3-D networks are read")
        if configuration["normalization_schemes"] != ["CTNormalization"]:
            raise ValueError("only CT networks are read")
        spacing, tile = configuration["spacing"], configuration["patch_size"]
        network = Network(
            module=module.to(device).eval(),
            device=device,
            spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
            tile=(int(tile[0]), int(tile[1]), int(tile[2])),
            window_hu=(float(intensities["percentile_00_5"]), float(intensities["percentile_99_5"])),
            mean_hu=float(intensities["mean"]),
            std_hu=float(intensities["std"]),
            label_ids={index: LABEL_IDS[name] for name, index in labels.items() if name in LABEL_IDS},
            classes=len(labels),
            precision=precision_for(device),
        )
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise WeightsError(f"{folder}: plans, class map and checkpoint do not fit together ({error}).") from error
    if not network.label_ids:
        raise WeightsError(f"{folder / 'dataset.json'} names no vertebra.")
    return network


def tiles(image: Shape, tile: Shape) -> list[tuple[slice, slice, slice]]:
    """Evenly spread, overlapping tiles that cover the image (nnU-Net's compute_steps_for_sliding_window)."""
    starts = []
    for length, size in zip(image, tile, strict=True):
        count = math.ceil((length - size) / (size * TILE_STEP)) + 1
        step = (length - size) / (count - 1) if count > 1 else 0.0
        starts.append([round(step * n) for n in range(count)])
    return [
        (slice(z, z + tile[0]), slice(y, y + tile[1]), slice(x, x + tile[2])) for z, y, x in itertools.product(*starts)
    ]


@lru_cache(maxsize=4)
def gaussian(tile: Shape) -> Tensor:
    """The weight of each voxel of a tile [z, y, x]: a Gaussian of an eighth of the tile, 10 in the middle,
    never 0.
    """
    peak = np.zeros(tile)
    peak[tuple(n // 2 for n in tile)] = 1
    weight = ndimage.gaussian_filter(peak, [n / 8 for n in tile], 0, mode="constant", cval=0)
    weight *= 10 / weight.max()
    weight = weight.astype(np.float16).astype(np.float32)  # nnU-Net keeps it in half precision
    weight[weight == 0] = weight[weight > 0].min()
    return torch.from_numpy(weight)


def _pad(image: Tensor, tile: Shape) -> tuple[Tensor, tuple[slice, slice, slice]]:
    """Zeros on both sides up to one tile, as nnU-Net's pad_nd_image; and where the image lies inside."""
    missing = [max(0, size - length) for length, size in zip(image.shape, tile, strict=True)]
    before = [n // 2 for n in missing]
    sides = [side for n, b in zip(reversed(missing), reversed(before), strict=True) for side in (b, n - b)]
    inner = [slice(b, b + length) for b, length in zip(before, image.shape, strict=True)]
    return torch.nn.functional.pad(image, sides), (inner[0], inner[1], inner[2])


def _smaller(tile: Shape) -> Shape:
    # Multiples of 32: no published network halves its input more than five times.
    z, y, x = (max(32, n // 2 // 32 * 32) for n in tile)
    return z, y, x


def _shape(image: Tensor) -> Shape:
    z, y, x = image.shape
    return int(z), int(y), int(x)


# ---------------------------------------------------------------------------------------------------- reading


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} does not read ({error}).") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is not a JSON object.")
    return content


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint without running any code that it may carry (RULES 11)."""
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(f"{path} does not read as plain weights ({type(error).__name__}).") from error
    if not isinstance(content, dict) or "network_weights" not in content or "init_args" not in content:
        raise WeightsError(f"{path} is not an nnU-Net checkpoint.")
    return content


def _numpy_scalars() -> list[Any]:
    # nnU-Net's published checkpoints keep their loss log as numpy scalars; these constructors run no foreign
    # code.
    return [_scalar_constructor(), np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i8"))]


def _scalar_constructor() -> Any:
    from numpy._core import multiarray

    return multiarray.scalar


def _configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One configuration with what it inherits."""
    configuration = dict(plans["configurations"][name])
    parent = configuration.pop("inherits_from", None)
    return configuration if parent is None else {**_configuration(plans, parent), **configuration}


def _intensities(plans: Mapping[str, Any]) -> Mapping[str, float]:
    properties = plans.get("foreground_intensity_properties_per_channel")
    if properties is None:  # plans written before nnU-Net 2.0's release
        properties = plans["foreground_intensity_properties_by_modality"]
    channel: Mapping[str, float] = properties["0"]
    return channel


def _architecture(configuration: Mapping[str, Any]) -> Mapping[str, Any]:
    """The architecture block; plans older than nnU-Net 2.4 (TotalSegmentator's published ones) are translated
    as it does.
    """
    if "architecture" in configuration:
        block: Mapping[str, Any] = configuration["architecture"]
        return block
    stages = len(configuration["n_conv_per_stage_encoder"])
    base, most = configuration["UNet_base_num_features"], configuration["unet_max_num_features"]
    if configuration["UNet_class_name"] != "PlainConvUNet":
        raise ValueError(f"unknown architecture {configuration['UNet_class_name']}")
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [min(base * 2**stage, most) for stage in range(stages)],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": configuration["conv_kernel_sizes"],
            "strides": configuration["pool_op_kernel_sizes"],
            "n_conv_per_stage": configuration["n_conv_per_stage_encoder"],
            "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
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


_ALLOWED_MODULES = ("torch.nn.", "dynamic_network_architectures.")


def _build(architecture: Mapping[str, Any], classes: int) -> nn.Module:
    """The untrained module. Plans name Python classes; only network building blocks may be named."""
    arguments = dict(architecture["arch_kwargs"])
    for name in architecture["_kw_requires_import"]:
        if arguments.get(name) is not None:
            arguments[name] = _locate(arguments[name])
    network: nn.Module = _locate(architecture["network_class_name"])(
        input_channels=1, num_classes=classes, deep_supervision=False, **arguments
    )
    return network


def _locate(name: Sequence[str] | str) -> Any:
    text = str(name)
    found = pydoc.locate(text) if text.startswith(_ALLOWED_MODULES) else None
    if found is None:
        raise ValueError(f"plans name an unknown building block {text!r}")
    return found


def precision_for(device: torch.device) -> torch.dtype:
    """What the convolutions compute in: half on CUDA; on a CPU bfloat16 where it has instructions for it, else float32.

    A CPU that only emulates bfloat16 takes minutes for what float32 does in seconds.
    """
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if has_bf16(device) else torch.float32
