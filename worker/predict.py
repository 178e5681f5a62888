"""Slabs of a study -> BMD, and TBS where the package measures it, with 90 % intervals: one verified model package."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from models.crop import SagittalSlabs
from models.inputs import InputConfig, network_input
from models.package import NOT_TOLD, Interval, ModelPackage, Scanner
from models.readout import PRINTED_BETWEEN, Readout, widened
from models.resnet50 import Floats, WantedPrecision, has_bf16, load_network, resolved_precision
from service.domain.errors import OsteogateError
from worker.compiled import fastest


class DeviceError(OsteogateError):
    """The asked-for device, or its bf16, is not there; nothing falls back to another one (RULES.md 10, 22)."""


@dataclass(frozen=True)
class Prediction:
    """Values of one vertebra, or of the mean over several, with their 90 % prediction intervals."""

    bmd_g_cm2: float
    bmd_interval: tuple[float, float]
    tbs: float | None  # None: not measured by this model
    tbs_interval: tuple[float, float] | None


class Predictor:
    """A resident network. Loading verifies every file of the package against its manifest, then compiles.

    fp32 is the default everywhere, so that a value does not hang on the machine. bf16 is taken only when asked for
    (`auto`: where the hardware computes it; a CPU that emulates it is twelve times slower than in fp32): it halves
    30 ms of a study that takes seconds, and moves BMD by up to 0.0019 g/cm2, TBS by 0.0010 (models/REFERENCE.md).

    Raises:
        PackageError: a file of the package is missing or altered.
        DeviceError: there is no such device here, or it does not compute bf16.
    """

    def __init__(self, package_path: Path, device: str = "auto", precision: WantedPrecision = "fp32") -> None:
        self.package = ModelPackage.load(package_path)
        self._device = find_device(device)
        self.precision = resolved_precision(precision, self._device)
        if self.precision == "bf16" and not has_bf16(self._device):
            raise DeviceError(f"bf16 was asked for, but this machine's {self._device.type} does not compute it")
        self.input = InputConfig.from_dict(self.package.manifest.input)
        self.readout = Readout.of(self.package)
        network = load_network(self.package, self._device)
        self._engine = fastest(network, self._device, self.precision, _example(self.input))

    @property
    def name(self) -> str:
        return self.package.name

    @property
    def device(self) -> str:
        """Where it really runs: "cpu" or "cuda"."""
        return self._device.type

    @property
    def engine(self) -> str:
        """What computes there, for instance "OpenVINO 2026.4.1 fp32"; stands in every result's provenance."""
        return self._engine.name

    @property
    def sha256(self) -> str:
        return self.package.sha256

    @property
    def measures_tbs(self) -> bool:
        """Whether the package was made to tell TBS as well."""
        return "tbs" in self.package.manifest.targets

    @property
    def synthetic_only(self) -> bool:
        return self.package.manifest.synthetic_only

    @property
    def densitometer(self) -> str:
        """The maker whose BMD it predicts."""
        return self.package.manifest.densitometer

    @property
    def scanners(self) -> tuple[str, ...]:
        """The scanners that it was fitted to at a site, where it tells scanners apart."""
        return () if self.readout is None else tuple(self.readout.scanners)

    def knows(self, scanner: Scanner) -> bool:
        """Whether it is known how this scanner reads mineral; where it is not, intervals are wider.

        A model that learned from digital patients alone has seen no machine. One that was fitted to a site's pairs
        knows the scanners that these came from.
        """
        if self.synthetic_only and not scanner.digital:
            return False
        if self.readout is not None:
            return self.readout.knows(scanner.name)
        learned_on = self.package.manifest.training.get("learned_on")  # None: told apart nowhere
        return learned_on is None or scanner.name in learned_on

    def predict(
        self,
        slabs: Sequence[SagittalSlabs] | Floats,
        levels: Sequence[str],
        fat_cm: Sequence[float] | None = None,
        scanner: Scanner = NOT_TOLD,
    ) -> list[Prediction]:
        """One Prediction per vertebra, from its slabs or from an array [vertebrae, slabs, size, size] HU.

        `levels` are the vertebrae's names; one of no known name is judged as the average of L1-L4. `fat_cm` lies over
        the spine at each of them (`models.soft_tissue`). `scanner` is what they were scanned on.
        """
        if len(slabs) == 0:
            return []
        stacked = slabs if isinstance(slabs, np.ndarray) else np.stack([one.hu for one in slabs])
        values: npt.NDArray[np.floating] = self.answers(stacked)
        if self.readout is not None:
            values = self.readout(values, list(stacked), levels, scanner.name if self.knows(scanner) else "", fat_cm)
        return [self._with_interval(*map(float, one), levels=1, scanner=scanner) for one in values]

    def answers(self, slabs: Floats) -> Floats:
        """What the network alone says of [vertebrae, slabs, size, size] HU: [vertebrae, targets]."""
        return self._engine(network_input(slabs, self.input))

    def patient(self, vertebrae: Sequence[Prediction], scanner: Scanner = NOT_TOLD) -> Prediction:
        """The mean over the patient's usable vertebrae, as in the paper, with that mean's own interval."""
        if not vertebrae:
            raise ValueError("a patient's value needs at least one vertebra")
        bmd = float(np.mean([one.bmd_g_cm2 for one in vertebrae]))
        scores = [one.tbs for one in vertebrae if one.tbs is not None]
        tbs = float(np.mean(scores)) if scores else None
        return self._with_interval(bmd, tbs, levels=len(vertebrae), scanner=scanner)

    def _with_interval(self, bmd: float, tbs: float | None = None, *, levels: int, scanner: Scanner) -> Prediction:
        half = self.package.manifest.interval(levels)
        if not self.knows(scanner):
            half = self._unsure(half, bmd, tbs)
        score = None if tbs is None or half.tbs is None else (tbs - half.tbs, tbs + half.tbs)
        return Prediction(bmd, (bmd - half.bmd_g_cm2, bmd + half.bmd_g_cm2), tbs, score)

    def _unsure(self, half: Interval, bmd: float, tbs: float | None) -> Interval:
        """The half-widths where nobody knows how the scanner reads: what scanners differ by comes on top."""
        between = None if self.readout is None else self.readout.between
        if between is None:
            between = np.array([PRINTED_BETWEEN[target] for target in self.package.manifest.targets])
        told = np.array([bmd] if tbs is None else [bmd, tbs])
        wide = [float(one) for one in widened(_halves(half), between * np.abs(told))]
        return Interval(half.levels, wide[0], wide[1] if len(wide) > 1 else None)


def _halves(half: Interval) -> npt.NDArray[np.float64]:
    return np.array([one for one in (half.bmd_g_cm2, half.tbs) if one is not None])


def _example(config: InputConfig) -> Floats:
    """One picture [1, channels, rows, columns] of every grey value, on which the engines must agree."""
    return np.random.default_rng(0).random((1, config.channels, config.rows, config.columns), dtype=np.float32)


def find_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one; a device asked for by name must be there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device 'cuda' was asked for, but PyTorch finds no CUDA device on this machine")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not supported: use auto, cpu or cuda")
    return device
