"""The predictor: a ResNet50 trunk with one joint head for BMD and TBS.

The paper trains one ResNet50 per target; one trunk for both halves the work and the package, and each target
regularises the other. Weights start untrained, as in the paper. Smaller ResNets can be named for comparison.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from models.package import TARGETS, ModelPackage

NORM_MOMENTUM = 0.01  # over some 100 batches: with PyTorch's 0.1 the last ten mostly empty batches decide
ARCHITECTURES = ("resnet50", "resnet34", "resnet18")
Precision = Literal["fp32", "bf16"]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class NetworkConfig:
    """What is needed to build the network; the input's shape is no part of it (global pooling)."""

    architecture: str = "resnet50"
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}")


class BonePredictor(nn.Module):
    """Pictures [n, 3, rows, columns] -> targets [n, targets] in their own units."""

    target_mean: Tensor
    target_std: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = get_model(config.architecture, weights=None)
        features = self.trunk.fc.in_features  # 2048 in ResNet50
        self.trunk.fc = nn.Identity()
        for module in self.trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = NORM_MOMENTUM
        self.head = nn.Linear(features, len(config.targets))
        nn.init.zeros_(self.head.weight)  # an untrained network answers with the mean
        nn.init.zeros_(self.head.bias)
        self.register_buffer("target_mean", torch.zeros(len(config.targets)))
        self.register_buffer("target_std", torch.ones(len(config.targets)))

    def standardised(self, pictures: Tensor) -> Tensor:
        """[n, targets] in standard deviations from the training mean: what the loss sees."""
        scores: Tensor = self.head(self.trunk(pictures))
        return scores.float()

    def forward(self, pictures: Tensor) -> Tensor:
        return self.standardised(pictures) * self.target_std + self.target_mean

    def tensors(self) -> dict[str, Floats]:
        """Weights and statistics by name, for a package."""
        return {name: value.detach().cpu().numpy() for name, value in self.state_dict().items()}


def load_network(package: ModelPackage, device: torch.device) -> BonePredictor:
    """The package's network in evaluation mode."""
    manifest = package.manifest
    network = BonePredictor(NetworkConfig(manifest.architecture, manifest.targets))
    load_tensors(network, package.weights())
    return network.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


def load_tensors(network: BonePredictor, tensors: Mapping[str, Floats]) -> None:
    """Put tensors into the network; every weight must be there, batch counters need not."""
    state = {name: torch.from_numpy(np.asarray(value)) for name, value in tensors.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"weights do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")


@torch.inference_mode()
def infer(
    network: BonePredictor,
    pictures: Floats,
    *,
    device: torch.device,
    precision: Precision = "fp32",
    batch: int = 32,
) -> Floats:
    """Pictures [n, 3, rows, columns] -> [n, targets] in their own units."""
    parts = []
    for start in range(0, len(pictures), batch):
        part = torch.from_numpy(np.ascontiguousarray(pictures[start : start + batch]))
        part = part.to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            parts.append(network(part).float().cpu().numpy())
    if not parts:
        return np.empty((0, len(network.config.targets)), dtype=np.float32)
    return np.concatenate(parts)
