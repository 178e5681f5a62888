"""One nnU-Net, read once from its folder and kept in memory.

The same semantics as nnU-Net's own predictor (2.8: `predict_from_raw_data`, `sliding_window_prediction`),
which a test holds it to: zero padding around the centre, evenly spread tiles, Gaussian weights, logits
averaged. Read here rather than through nnU-Net because its loader unpickles (weights_only=False), its import
takes seconds and writes to stdout, and it autocasts on CUDA only.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import pydoc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from models.resnet50 import has_bf16
from models.spine_unet import LABEL_IDS
from models.weight_files import CHECKPOINT, CONFIGURATION
from worker.compiled import OpenVinoEngine, fastest_volume
from worker.segmentation.base import SegmentationError
from worker.segmentation.grid import Shape, shape_of
from worker.segmentation.weights import WeightsError

log = logging.getLogger(__name__)

STEP = 32  # no published network halves its input more than five times
TILE_STEP = 0.8  # of a tile; TotalSegmentator's choice


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
    compiled: OpenVinoEngine | None = None  # takes the module's place on a CPU

    def logits(self, hu: Tensor) -> Tensor:
        """HU [z, y, x] at the network's spacing (z up, y to the front, x to the right) -> logits [classes, z,
        y, x].
        """
        return self.logits_of(self.normalised(hu))

    def normalised(self, hu: Tensor) -> Tensor:
        """nnU-Net's CTNormalization: HU clipped to the window, centred and scaled."""
        return (hu.float().clamp(*self.window_hu) - self.mean_hu) / max(self.std_hu, 1e-8)

    def logits_of(self, image: Tensor) -> Tensor:
        """Normalised intensities [z, y, x] -> logits [classes, z, y, x], on the network's device.

        Where the GPU's memory is too small the tiles become smaller; nothing runs on the CPU unasked (fault 22).

        Raises:
            SegmentationError: not even the smallest tile fits.
        """
        tile = self.tile
        while True:
            try:
                return self._tiled(image, tile)
            except torch.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                smaller = _smaller(tile)
                if smaller == tile:
                    raise SegmentationError("The GPU's memory does not hold even the smallest tile.") from error
                log.warning("The GPU's memory does not hold a tile of %s voxels: going on with %s.", tile, smaller)
                tile = smaller

    def _tiled(self, image: Tensor, tile: Shape) -> Tensor:
        padded, inner = _pad(image, tile)
        weight = gaussian(tile).to(self.device)
        where = tiles(shape_of(padded), tile)
        if len(where) == 1:  # the weights cancel
            return self._scores(padded[None, None])[(slice(None), *inner)]
        total = torch.zeros((self.classes, *padded.shape), device=self.device)
        weights = torch.zeros(padded.shape, device=self.device)
        for part in where:
            total[(slice(None), *part)] += self._scores(padded[part][None, None]).mul_(weight)
            weights[part] += weight
        total /= weights
        return total[(slice(None), *inner)]

    def _scores(self, patch: Tensor) -> Tensor:
        """One tile [1, 1, z, y, x] -> float32 logits [classes, z, y, x]."""
        if self.compiled is not None:
            return torch.from_numpy(self.compiled(patch.numpy())[0])
        with torch.no_grad(), self._autocast():
            scores: Tensor = self.module(patch.to(self.device))[0].float()
            return scores

    def fastest(self) -> Network:
        """The same network, computed by the fastest engine of this machine that gives its classes."""
        return replace(self, compiled=fastest_volume(self.module, self.device, self.precision))

    def fitted(self, shape: Shape) -> Network:
        """The same network with a tile no larger than an image of `shape` needs, in steps that its halvings divide."""
        z, y, x = (min(size, -(-length // STEP) * STEP) for size, length in zip(self.tile, shape, strict=True))
        return replace(self, tile=(z, y, x) if max(z, y, x) > STEP else (min(self.tile[0], 2 * STEP), y, x))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)


def load_network(folder: Path, device: torch.device, class_map: Mapping[int, str] | None = None) -> Network:
    """Read plans.json, dataset.json and the checkpoint of one trained nnU-Net; WeightsError names what does
    not fit.

    `class_map` (class -> name) is what imported weights keep in IMPORT.json; None takes dataset.json's own.
    """
    plans, dataset = _read_json(folder / "plans.json"), _read_json(folder / "dataset.json")
    checkpoint = _read_checkpoint(folder / CHECKPOINT)
    try:
        configuration = _configuration(plans, checkpoint["init_args"].get("configuration", CONFIGURATION))
        intensities = _intensities(plans)
        labels = {str(name): int(index) for name, index in dataset["labels"].items()}
        names = agreed_names(labels, class_map)
        module = _build(_architecture(configuration), len(labels))
        module.load_state_dict(checkpoint["network_weights"])
        if list(plans["transpose_forward"]) != [0, 1, 2] or len(configuration["patch_size"]) != 3:
            raise ValueError("only untransposed 3-D networks are read")
        if configuration["normalization_schemes"] != ["CTNormalization"]:
            raise ValueError("only CT networks are read")
        spacing, tile = configuration["spacing"], configuration["patch_size"]
        module = module.to(device).eval().requires_grad_(False)
        network = Network(
            module=module,
            device=device,
            spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
            tile=(int(tile[0]), int(tile[1]), int(tile[2])),
            window_hu=(float(intensities["percentile_00_5"]), float(intensities["percentile_99_5"])),
            mean_hu=float(intensities["mean"]),
            std_hu=float(intensities["std"]),
            label_ids={index: LABEL_IDS[name] for index, name in names.items() if name in LABEL_IDS},
            classes=len(labels),
            precision=precision_for(device),
        )
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise WeightsError(f"{folder}: plans, class map and checkpoint do not fit together ({error}).") from error
    if not network.label_ids:
        raise WeightsError(f"{folder / 'dataset.json'} names no vertebra.")
    return network


def agreed_names(labels: Mapping[str, int], class_map: Mapping[int, str] | None) -> Mapping[int, str]:
    """Class -> name: the class map where there is one, which dataset.json's own `labels` may not contradict.

    Raises:
        ValueError: another number of classes, or a vertebra that is another class in the other.
    """
    own = {index: name for name, index in labels.items()}
    if class_map is None:
        return own
    if set(own) != set(class_map):
        raise ValueError(f"dataset.json has {len(own)} classes, the class map {len(class_map)}")
    for index, name in own.items():
        theirs = class_map[index]
        if name != theirs and not name.isdigit() and (name in LABEL_IDS or theirs in LABEL_IDS):
            raise ValueError(f"class {index} is {name} in dataset.json and {theirs} in the class map")
    return class_map


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
    """Half the tile, in steps of 32; the smallest one again where there is nothing smaller.

    One side stays 64: five halvings of 32^3 would leave one voxel, which has no norm of an instance.
    """
    z, y, x = (max(STEP, n // 2 // STEP * STEP) for n in tile)
    if max(tile) < 2 * STEP:
        return tile
    if max(z, y, x) > STEP:
        return z, y, x
    z, y, x = (2 * STEP if axis == tile.index(max(tile)) else STEP for axis in range(3))
    return z, y, x


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
    # code. The published ones were written by numpy 1, which called the module numpy.core.
    from numpy._core import multiarray

    kinds = [type(np.dtype(kind)) for kind in ("f4", "f8", "i8")]
    return [multiarray.scalar, (multiarray.scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]


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
