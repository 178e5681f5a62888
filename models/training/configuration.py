"""One training run as a value: what is trained on which patients, and how.

Four configurations ship (models/configurations):

- `yoshida-2023`, the paper's protocol: 5 folds by patient, a network per target, three slabs of each vertebra as
  training images of their own, the whole 256 x 256 picture, Adam, Huber loss, batches of 20, up to 500 epochs, the
  epoch of lowest validation loss. The paper prints no learning rate, no grey-value window and no augmentation: the
  constant 1e-3, the window and the augmentation are ours.
- `yoshida-2023-field`, the same without the black around the vertebra: 48 x 80 pixels, a sixth of the work.
- `osteogate`, ours, and the default: one trunk for both targets, the whole vertebra in nine slabs as channels (a
  densitometer counts pedicles and facets too, and no midsagittal slab shows them), the field that a vertebra can fill,
  a warm-up and a cosine, averaged weights of the last epoch, and a readout that weighs its answers with measures.
- `osteogate-fine-tune`, the same for a run that starts with trained networks: a tenth of the learning rate, 20 epochs.

Any of them with `"targets": ["bmd_g_cm2"]` learns BMD alone, for a site whose DXA tells no TBS. A copy of either with
changed lines is a configuration too.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import models
from models.inputs import InputConfig
from models.package import BMD_ALONE, TARGETS, TestTime
from models.resnet50 import WantedPrecision, check_input
from models.training.cohort import TENTHS

CONFIGURATIONS = Path(models.__path__[0]) / "configurations"
DEFAULT = "osteogate"

Heads = Literal["joint", "separate"]
Schedule = Literal["cosine", "constant"]
Calibration = Literal["split", "cross"]
Keep = Literal["best", "last"]
Weighing = Literal["none", "measures"]
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "heads": get_args(Heads),
    "schedule": get_args(Schedule),
    "calibration": get_args(Calibration),
    "keep": get_args(Keep),
    "readout": get_args(Weighing),
    "precision": get_args(WantedPrecision),
    "test_time": get_args(TestTime),
}


@dataclass(frozen=True)
class MemberPlan:
    """One network of the run: which targets it learns, which tenths of the patients train it and choose its epoch."""

    index: int
    fold: int
    targets: tuple[str, ...]
    training: tuple[int, ...]
    validation: tuple[int, ...]

    @property
    def name(self) -> str:
        """As progress, files and manifest call it: fold0-bmd, fold0-tbs or fold0."""
        if self.targets == TARGETS:
            return f"fold{self.fold}"
        return f"fold{self.fold}-" + "-".join(target.partition("_")[0] for target in self.targets)


@dataclass(frozen=True)
class TrainingConfig:
    """The defaults are those of configurations/osteogate.json, which has a readout besides.

    Raises:
        ValueError: a setting is impossible; the text names it.
    """

    name: str = "reference"
    version: str = "0.5.0"
    architecture: str = "resnet50"
    targets: tuple[str, ...] = TARGETS  # or BMD_ALONE
    heads: Heads = "joint"  # "separate": a network per target
    seed: int = 1
    cross_folds: int = 1  # by patient; fold f of 5 validates on tenths 2f and 2f + 1
    validation_folds: tuple[int, ...] = (8, 9)  # tenths that are watched, or choose the epoch, where there is one fold
    calibration_folds: tuple[int, ...] = (8, 9)  # tenths that no network learns from
    calibration: Calibration = "split"
    slab_images: int = 1  # training images per vertebra: the middle slab, or 3: its neighbours as well
    input: InputConfig = field(default_factory=InputConfig)
    epochs: int = 60
    batch: int = 20  # Yoshida 2023
    schedule: Schedule = "cosine"
    learning_rate: float = 1e-3
    warmup_share: float = 0.05  # of all steps; cosine only
    weight_decay: float = 0.01  # decoupled (AdamW), of matrices and kernels; with 0 it is Adam
    huber_delta: float = 1.0  # in standard deviations of the target
    keep: Keep = "last"  # epoch; "best": of lowest validation loss (Yoshida 2023)
    ema_decay: float = 0.998  # of the averaged weights, which are then judged and kept; 0: none
    norm_momentum: float = 0.1  # of the batch-norm statistics
    precision: WantedPrecision = "auto"
    shift_px: int = 3  # augmentation: whole pixels, either way
    offset_hu: float = 4.0  # augmentation: standard deviation
    noise_hu: float = 3.0  # augmentation: standard deviation at most
    erode_share: float = 0.25  # augmentation: share of vertebrae whose mask loses its rim
    test_time: TestTime = "none"
    readout: Weighing = "none"  # weighed with the network's answers: `models.measures`, or nothing
    start_from: str = ""  # SHA-256 of the package whose networks it starts with (fine-tuning); "": an untrained start

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.targets not in (TARGETS, BMD_ALONE):
            raise ValueError(f"targets must be {' and '.join(TARGETS)}, or {BMD_ALONE[0]} alone")
        if self.slab_images not in (1, 3) or (self.slab_images == 3 and self.input.slabs != 1):
            raise ValueError("slab_images must be 1, or 3 for a network that sees one slab")
        if self.test_time == "exchange-sides" and self.input.slabs == 1:
            raise ValueError("exchanging the sides of a single slab changes nothing")
        if min(self.epochs, self.batch) < 1 or not 0 <= self.ema_decay < 1:
            raise ValueError("epochs and batch must be at least 1, ema_decay at least 0 and below 1")
        if self.cross_folds not in (1, 2, 5, 10):
            raise ValueError(f"cross_folds must be 1, 2, 5 or 10 (it divides tenths), not {self.cross_folds}")
        if self.calibration == "cross" and (self.cross_folds == 1 or self.calibration_folds):
            raise ValueError("cross calibration needs several cross_folds and no calibration_folds")
        if self.calibration == "split" and not self.calibration_folds:
            raise ValueError("split calibration needs calibration_folds")
        if self.cross_folds > 1 and self.validation_folds:
            raise ValueError("with several cross_folds each has its own validation_folds: leave the list empty")
        if self.readout == "measures" and (self.input.slabs == 1 or self.cross_folds > 1):
            raise ValueError("measures need the whole vertebra (several slabs), and patients that no fold trains on")
        if self.keep == "best" and set(self.validation_folds) & set(self.calibration_folds):
            raise ValueError("a tenth that chooses the epoch (keep best) can't calibrate as well")
        if not all(plan.training and plan.validation for plan in self.members):
            raise ValueError("a fold has no tenth left to train, or none to validate")
        check_input(self.architecture, self.input.rows, self.input.columns)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown training settings: {', '.join(sorted(unknown))}")
        plain = dict(values)
        for name in ("targets", "validation_folds", "calibration_folds"):
            if name in plain:
                plain[name] = tuple(plain[name])
        if "input" in plain:
            plain["input"] = InputConfig.from_dict(plain["input"])
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        for name in ("start_from", "targets"):  # so that runs and packages from before either read the same
            if values[name] == self.__dataclass_fields__[name].default:
                del values[name]
        return values

    @property
    def members(self) -> tuple[MemberPlan, ...]:
        """The networks in the order of their training: fold by fold, within it target by target."""
        learned = (self.targets,) if self.heads == "joint" else tuple((target,) for target in self.targets)
        plans = []
        for fold in range(self.cross_folds):
            share = TENTHS // self.cross_folds
            validation = self.validation_folds
            if self.cross_folds > 1:
                own = range(fold * share, (fold + 1) * share)
                validation = tuple(tenth for tenth in own if tenth not in self.calibration_folds)
            held_out = {*validation, *self.calibration_folds}
            training = tuple(tenth for tenth in range(TENTHS) if tenth not in held_out)
            plans += [(fold, targets, training, validation) for targets in learned]
        return tuple(MemberPlan(index, *plan) for index, plan in enumerate(plans))


def known_configurations() -> tuple[str, ...]:
    """The names of the shipped configurations."""
    return tuple(sorted(file.stem for file in CONFIGURATIONS.glob("*.json")))


def load_configuration(name: str = DEFAULT) -> TrainingConfig:
    """A shipped configuration by name, or any JSON file with TrainingConfig's fields by path.

    Raises:
        ValueError: there is neither, or the file is not a configuration.
    """
    shipped = CONFIGURATIONS / f"{name}.json"
    path = shipped if name in known_configurations() else Path(name)
    if not path.is_file():
        raise ValueError(f"no configuration {name!r}: give a file, or one of {', '.join(known_configurations())}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return TrainingConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
