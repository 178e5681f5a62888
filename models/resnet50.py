"""The predictor: a ResNet50 trunk with one joint head for BMD and TBS, or several such networks and their mean.

The paper trains one ResNet50 per target; one trunk for both halves the work and the package, and each target
regularises the other. Weights start untrained, as in the paper. Other torchvision backbones can be named for
comparison (the paper's limitations name AlexNet and GoogLeNet).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from models.inputs import InputConfig
from models.package import TARGETS, Member, ModelPackage, TestTime

ARCHITECTURES = (
    "resnet50", "resnet34", "resnet18",
    "alexnet",  # at least 63 x 63 pixels
    "googlenet",  # without its auxiliary classifiers; torchvision takes it down to 15 x 15, below our 32 x 32
    "densenet121", "efficientnet_b0", "convnext_tiny", "mobilenet_v3_small",
)  # fmt: skip
Precision = Literal["fp32", "bf16"]
WantedPrecision = Literal["auto", "fp32", "bf16"]
Floats = npt.NDArray[np.float32]


def resolved_precision(wanted: WantedPrecision, device: torch.device) -> Precision:
    """`auto` is bf16 where the device computes in it, else fp32.

    A CPU without bf16 instructions (AVX-512 BF16 or AMX) emulates it: 8.4 s a training step instead of 0.70 s.
    """
    if wanted != "auto":
        return wanted
    return "bf16" if has_bf16(device) else "fp32"


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16; a CPU that only emulates it does not (AVX512-BF16 and AMX do)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@dataclass(frozen=True)
class NetworkConfig:
    """What is needed to build the network; the input's shape is no part of it (global pooling)."""

    architecture: str = "resnet50"
    targets: tuple[str, ...] = TARGETS
    channels: int = 3  # of the picture
    norm_momentum: float = 0.1  # of batch-norm statistics; training only

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, not {self.architecture!r}")
        if not self.targets or not set(self.targets) <= set(TARGETS):
            raise ValueError(f"targets are of {', '.join(TARGETS)}, not {', '.join(self.targets)}")


@lru_cache
def check_input(architecture: str, rows: int, columns: int) -> None:
    """Whether a picture survives the backbone's pooling, tried with shapes alone.

    Raises:
        ValueError: the picture is too small, or there is no such backbone.
    """
    with torch.device("meta"), torch.no_grad():
        trunk, _ = _trunk(NetworkConfig(architecture))
        try:
            trunk.eval()(torch.empty(1, 3, rows, columns))
        except RuntimeError as error:
            raise ValueError(f"{rows} x {columns} pixels are too few for {architecture}") from error


def _trunk(config: NetworkConfig) -> tuple[nn.Module, int]:
    """An untrained torchvision classifier without its last layer, and how many features that layer saw."""
    extra = {"aux_logits": False, "init_weights": True} if config.architecture == "googlenet" else {}
    trunk: nn.Module = get_model(config.architecture, weights=None, **extra)
    name, last = [(name, module) for name, module in trunk.named_modules() if isinstance(module, nn.Linear)][-1]
    trunk.set_submodule(name, nn.Identity())
    if config.channels != 3:
        _see_channels(trunk, config.channels)
    return trunk, last.in_features  # 2048 in ResNet50


def _see_channels(trunk: nn.Module, channels: int) -> None:
    """Replace the first convolution, made for three channels, by an untrained one for so many."""
    name, first = next((name, module) for name, module in trunk.named_modules() if isinstance(module, nn.Conv2d))
    wider = nn.Conv2d(
        channels,
        first.out_channels,
        kernel_size=cast(tuple[int, int], first.kernel_size),
        stride=cast(tuple[int, int], first.stride),
        padding=cast(tuple[int, int], first.padding),
        bias=first.bias is not None,
    )
    nn.init.kaiming_normal_(wider.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNet
    trunk.set_submodule(name, wider)


class BonePredictor(nn.Module):
    """Pictures [n, channels, rows, columns] -> targets [n, targets] in their own units."""

    target_mean: Tensor
    target_std: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk, features = _trunk(config)
        for module in self.trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = config.norm_momentum
        self.head = nn.Linear(features, len(config.targets))
        nn.init.zeros_(self.head.weight)  # an untrained network answers with the mean
        nn.init.zeros_(self.head.bias)
        self.register_buffer("target_mean", torch.zeros(len(config.targets)))
        self.register_buffer("target_std", torch.ones(len(config.targets)))

    @property
    def targets(self) -> tuple[str, ...]:
        return self.config.targets

    def standardised(self, pictures: Tensor) -> Tensor:
        """[n, targets] in standard deviations from the training mean: what the loss sees."""
        scores: Tensor = self.head(self.trunk(pictures))
        return scores.float()

    def forward(self, pictures: Tensor) -> Tensor:
        return self.standardised(pictures) * self.target_std + self.target_mean

    def tensors(self) -> dict[str, Floats]:
        """Weights and statistics by name, for a package."""
        return {name: value.detach().cpu().numpy() for name, value in self.state_dict().items()}


class PackageNetwork(nn.Module):
    """A package's networks, [n, channels, rows, columns] -> [n, targets]: the mean over who predicts a target."""

    def __init__(
        self, members: list[BonePredictor], targets: tuple[str, ...] = TARGETS, test_time: TestTime = "none"
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.targets = targets
        self.test_time = test_time
        self._who = [  # of each target: (member, its column) of everyone who predicts it
            [(number, one.targets.index(target)) for number, one in enumerate(members) if target in one.targets]
            for target in targets
        ]
        if len(members) == 1 and members[0].targets != targets:
            raise ValueError(f"the network predicts {', '.join(members[0].targets)}, not {', '.join(targets)}")
        if not all(self._who):
            raise ValueError(f"no network predicts {targets[self._who.index([])]}")

    def forward(self, pictures: Tensor) -> Tensor:
        if self.test_time == "exchange-sides":  # the vertebra is symmetric: left for right
            return (self._mean(pictures) + self._mean(pictures.flip(1))) / 2
        return self._mean(pictures)

    def _mean(self, pictures: Tensor) -> Tensor:
        answers: list[Tensor] = [member(pictures) for member in self.members]
        if len(answers) == 1:
            return answers[0]
        means = [torch.stack([answers[number][:, column] for number, column in who]).mean(0) for who in self._who]
        return torch.stack(means, dim=1)


def load_network(package: ModelPackage, device: torch.device) -> PackageNetwork:
    """The package's network(s) in evaluation mode, as one module."""
    manifest = package.manifest
    members = [_load_member(package, member) for member in manifest.members]
    network = PackageNetwork(members, manifest.targets, manifest.test_time)
    return network.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


def _load_member(package: ModelPackage, member: Member) -> BonePredictor:
    manifest = package.manifest
    channels = InputConfig.from_dict(manifest.input).channels
    network = BonePredictor(NetworkConfig(manifest.architecture, member.targets, channels))
    load_tensors(network, package.weights(member.file))
    return network


def load_tensors(network: BonePredictor, tensors: Mapping[str, Floats]) -> None:
    """Put tensors into the network; every weight must be there, batch counters need not."""
    state = {name: torch.from_numpy(np.asarray(value)) for name, value in tensors.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"weights do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")


@torch.inference_mode()
def infer(
    network: BonePredictor | PackageNetwork,
    pictures: Floats,
    *,
    device: torch.device,
    precision: Precision = "fp32",
    batch: int = 32,
) -> Floats:
    """Pictures [n, channels, rows, columns] -> [n, targets] in their own units."""
    parts = []
    for start in range(0, len(pictures), batch):
        part = torch.from_numpy(np.ascontiguousarray(pictures[start : start + batch]))
        part = part.to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            parts.append(network(part).float().cpu().numpy())
    if not parts:
        return np.empty((0, len(network.targets)), dtype=np.float32)
    return np.concatenate(parts)
