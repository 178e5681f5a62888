"""A training run as it is asked for: what may be set, and what its configuration becomes.

The shipped configurations are data (models/configurations); a run takes one and changes a few lines. What is
impossible is refused here as far as plain numbers tell; the worker checks the whole before its first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from service.domain.reasons import Code, Reason

TARGETS = ("bmd_g_cm2", "tbs")
BMD_ALONE = TARGETS[:1]  # where the site's DXA tells no TBS: a model that does not measure it
FOLDS = (1, 2, 5, 10)
MAX_SEED = 2**31 - 1
KEEP_SECONDS = 30 * 86_400.0  # how long a run that failed or was cancelled can be resumed
INHERITED = ("heads", "slab_images", "test_time")  # with architecture and input: what a fine-tuned network can't change
AS_IN_FORCE = "as-in-force"  # the configuration of a refit: what made the networks that it keeps
REFIT_FOLDS = (8, 9)  # the tenths that set a refit's intervals; the others adjust the readout
NAME = "site"  # of a package that was trained here; its version is the run's number


class Start(StrEnum):
    """What the weights begin as."""

    SCRATCH = "scratch"
    FINE_TUNE = "fine-tune"  # the model in force
    REFIT = "refit"  # the model in force, of which nothing but readout and intervals is fitted


class People(StrEnum):
    """Whose pairs are learned from. Never both: a model of people must not rest on digital patients unseen."""

    PATIENTS = "patients"
    DIGITAL = "digital"


@dataclass(frozen=True, slots=True)
class Limits:
    """A setting that a run may change: its kind and how far."""

    kind: type
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()


SETTINGS: Mapping[str, Limits] = {
    "epochs": Limits(int, 1, 5000),
    "batch": Limits(int, 2, 512),
    "learning_rate": Limits(float, 1e-7, 0.1),
    "weight_decay": Limits(float, 0, 1),
    "warmup_share": Limits(float, 0, 0.5),
    "ema_decay": Limits(float, 0, 0.9999),
    "architecture": Limits(str, choices=("resnet50", "resnet34", "resnet18")),
    "heads": Limits(str, choices=("joint", "separate")),
    "keep": Limits(str, choices=("best", "last")),
    "schedule": Limits(str, choices=("cosine", "constant")),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a person asks for."""

    reason: str
    configuration: str
    targets: tuple[str, ...] = TARGETS
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: Start = Start.SCRATCH
    folds: int | None = None  # None: as the configuration has it
    seed: int = 1
    people: People = People.PATIENTS

    @property
    def learned(self) -> tuple[str, ...]:
        """The targets in the order in which everything names them, each once."""
        return tuple(target for target in TARGETS if target in self.targets)


@dataclass(frozen=True, slots=True)
class Origin:
    """The package that a run is fine-tuned from, as far as its manifest tells."""

    name: str
    sha256: str
    architecture: str
    input: Mapping[str, Any]
    config: Mapping[str, Any]  # the configuration that made it
    trained_here: bool  # its networks, on patients of this installation
    targets: tuple[str, ...] = TARGETS  # what it measures


def objections(wanted: Wanted, known: Mapping[str, Mapping[str, Any]], origin: Origin | None) -> Iterator[Reason]:
    """Every reason why the request itself cannot be met; `known` are the shipped configurations by name."""
    if set(wanted.targets) not in (set(TARGETS), set(BMD_ALONE)):
        told = f"a run learns {' and '.join(TARGETS)}, or {BMD_ALONE[0]} alone where the DXA tells no TBS"
        yield Reason(Code.TRAINING_TARGETS, told)
    if wanted.start is not Start.REFIT and wanted.configuration not in known:
        told = f"no configuration {wanted.configuration[:64]!r}; there are {', '.join(sorted(known))}"
        yield Reason(Code.TRAINING_CONFIGURATION, told)
    if wanted.folds is not None and wanted.folds not in FOLDS:
        yield Reason(Code.TRAINING_CONFIGURATION, f"folds are {', '.join(map(str, FOLDS))}")
    if not 0 <= wanted.seed <= MAX_SEED:
        yield Reason(Code.TRAINING_CONFIGURATION, f"a seed is 0 to {MAX_SEED}")
    for name, value in wanted.settings.items():
        yield from _objections_to(name, value)
    if wanted.start is Start.FINE_TUNE:
        yield from _objections_to_start(wanted, known, origin)
    if wanted.start is Start.REFIT:
        yield from _objections_to_refit(wanted, origin)


def _objections_to(name: str, value: Any) -> Iterator[Reason]:
    limits = SETTINGS.get(name)
    if limits is None:
        yield Reason(Code.TRAINING_CONFIGURATION, f"{name[:64]!r} is no setting; they are {', '.join(SETTINGS)}")
    elif limits.choices:
        if value not in limits.choices:
            yield Reason(Code.TRAINING_CONFIGURATION, f"{name} is {', '.join(limits.choices)}")
    elif not isinstance(value, (int, float) if limits.kind is float else int) or isinstance(value, bool):
        yield Reason(Code.TRAINING_CONFIGURATION, f"{name} is a number")
    elif not limits.low <= value <= limits.high:  # NaN fails this too
        yield Reason(Code.TRAINING_CONFIGURATION, f"{name} is {limits.low:g} to {limits.high:g}")


def _objections_to_start(
    wanted: Wanted, known: Mapping[str, Mapping[str, Any]], origin: Origin | None
) -> Iterator[Reason]:
    if origin is None:
        yield Reason(Code.TRAINING_START, "there is no model in force to start with")
        return
    if missing := [target for target in wanted.learned if target not in origin.targets]:
        told = f"{origin.name} does not measure {' and '.join(missing)}, and fine-tuning adds nothing: take scratch"
        yield Reason(Code.TRAINING_START, told)
    fixed = sorted({"architecture", "heads"} & set(wanted.settings))
    if fixed:
        yield Reason(Code.TRAINING_START, f"fine-tuning keeps {' and '.join(fixed)} of {origin.name}")
    folds = wanted.folds or int(known.get(wanted.configuration, {}).get("cross_folds", 1))
    if origin.trained_here and max(folds, int(origin.config.get("cross_folds", 1))) > 1:
        told = f"{origin.name} was trained on this site's patients: in several folds, each would start with a network "
        instead = "take folds 1 or scratch" if int(origin.config.get("cross_folds", 1)) == 1 else "take scratch"
        yield Reason(Code.TRAINING_START, f"{told}that has seen the patients who shall judge it; {instead}")


def _objections_to_refit(wanted: Wanted, origin: Origin | None) -> Iterator[Reason]:
    if wanted.configuration != AS_IN_FORCE or wanted.settings or wanted.folds not in (None, 1):
        told = "a refit trains no network: it takes no configuration, no settings and no folds"
        yield Reason(Code.TRAINING_CONFIGURATION, told)
    if origin is None:
        yield Reason(Code.TRAINING_START, "there is no model in force to start with")
        return
    if set(wanted.targets) != set(origin.targets):
        told = f"{origin.name} measures {' and '.join(origin.targets)}, and a refit neither adds nor leaves out"
        yield Reason(Code.TRAINING_START, told)
    if origin.trained_here:
        told = f"the networks of {origin.name} know this site's patients by heart: nothing honest can be fitted to them"
        yield Reason(Code.TRAINING_START, f"{told}; take fine-tune or scratch")
    if int(origin.input.get("slabs", 1)) == 1:
        yield Reason(Code.TRAINING_START, f"{origin.name} sees one slab: a readout needs the whole vertebra")


def configured(
    wanted: Wanted, known: Mapping[str, Mapping[str, Any]], origin: Origin | None, version: str
) -> dict[str, Any]:
    """The whole configuration of a run without objections, as models.training takes it."""
    if wanted.start is Start.REFIT:
        assert origin is not None
        values = dict(origin.config) | {"name": NAME, "version": version, "start_from": origin.sha256}
        values |= {"readout": "measures", "calibration": "split", "cross_folds": 1, "keep": "last"}
        return values | {"validation_folds": list(REFIT_FOLDS), "calibration_folds": list(REFIT_FOLDS)}
    values = {**known[wanted.configuration], **wanted.settings}
    values |= {"name": NAME, "version": version, "seed": wanted.seed}
    if wanted.learned != TARGETS:
        values |= {"targets": list(wanted.learned)}
    if wanted.start is Start.FINE_TUNE:
        assert origin is not None
        values |= {"architecture": origin.architecture, "input": dict(origin.input), "start_from": origin.sha256}
        values |= {name: origin.config[name] for name in INHERITED if name in origin.config}
    folds = wanted.folds or int(values["cross_folds"])
    if folds > 1 or int(values["input"]["slabs"]) == 1:
        values |= {"readout": "none"}  # it needs patients whom no network has trained on, and the whole vertebra
    if folds > 1:
        values |= {"cross_folds": folds, "validation_folds": [], "calibration_folds": [], "calibration": "cross"}
    elif int(values["cross_folds"]) > 1 or set(values["validation_folds"]) & set(values["calibration_folds"]):
        # An epoch or a readout that hangs on the patients who calibrate would make the intervals too narrow.
        watched = values["keep"] == "best" or values.get("readout", "none") != "none"
        apart = ([8], [9]) if watched else ([8, 9], [8, 9])
        values |= {"cross_folds": 1, "validation_folds": apart[0], "calibration_folds": apart[1]}
        values |= {"calibration": "split"}
    return values
