"""Training, readable top to bottom: cohort -> batches -> steps -> best epoch -> calibrated package.

After Yoshida 2023: Adam, Huber loss, mini-batches of 20, augmentation in training only, split by patient, the
epoch of lowest validation loss is kept, untrained start. Ours beside it: one trunk for both targets, the
three neighbouring slabs as channels, a warm-up and cosine learning rate, bfloat16 on CPUs that have it.

A run is a function of (cohort, configuration): every epoch draws from its own generator, so a run that was
killed and resumed ends with the identical weights.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from models.crop import OUTSIDE_HU
from models.inputs import InputConfig, central_field, network_input, windowed
from models.package import Interval, Manifest, ModelPackage, write_package
from models.resnet50 import BonePredictor, Floats, NetworkConfig, Precision, infer

Ints = npt.NDArray[np.int64]

FOLDS = 10
COVERAGE = 0.90
CHECKPOINT = "checkpoint.pt"


# ---------------------------------------------------------------------------------------------------
# The cohort


@dataclass(frozen=True)
class Cohort:
    """Vertebrae with their truth, read from a folder that `phantom cohort` (or a hospital's store) wrote.

    cohort.csv has a row per vertebra; its columns `slabs` and `index` say which array of which npz file.
    """

    slabs: npt.NDArray[np.int16]  # [vertebrae, mask variants, slabs, size, size] HU
    targets: Floats  # [vertebrae, 2]: BMD g/cm2, TBS
    hu: Floats  # [vertebrae] the comparator
    patients: npt.NDArray[np.str_]  # [vertebrae]
    folds: Ints  # [vertebrae], 0..9, one per patient
    rows: tuple[Mapping[str, str], ...]
    facts: Mapping[str, Any]  # cohort.json: at least `provenance`, "digital" or "site"

    @classmethod
    def read(cls, folder: Path) -> Self:
        with (folder / "cohort.csv").open(newline="", encoding="utf-8") as stream:
            rows = tuple(csv.DictReader(stream))
        if not rows:
            raise ValueError(f"{folder / 'cohort.csv'} holds no vertebra")
        facts = json.loads((folder / "cohort.json").read_text(encoding="utf-8"))
        arrays: dict[str, npt.NDArray[np.int16]] = {}
        for name in dict.fromkeys(row["slabs"] for row in rows):
            with np.load(folder / name, allow_pickle=False) as stored:
                arrays[name] = stored["hu"]
        return cls(
            slabs=np.stack([arrays[row["slabs"]][int(row["index"])] for row in rows]),
            targets=_column(rows, "bmd_g_cm2", "tbs"),
            hu=_column(rows, "hu")[:, 0],
            patients=np.array([row["patient_id"] for row in rows]),
            folds=np.array([int(row["fold"]) for row in rows]),
            rows=rows,
            facts={"provenance": str(facts.pop("provenance")), **facts},
        )

    @property
    def provenance(self) -> str:
        """Where the pairs come from: digital or site."""
        return str(self.facts["provenance"])

    def where(self, folds: tuple[int, ...]) -> Ints:
        """Indices of the vertebrae whose patients are in these folds."""
        return np.flatnonzero(np.isin(self.folds, folds))


def _column(rows: tuple[Mapping[str, str], ...], *names: str) -> Floats:
    return np.array([[float(row[name]) for name in names] for row in rows], dtype=np.float32)


# ---------------------------------------------------------------------------------------------------
# The configuration


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. Folds are tenths of the patients; what is in no list trains."""

    architecture: str = "resnet50"
    seed: int = 1
    epochs: int = 40
    batch: int = 20  # Yoshida 2023
    frozen_epochs: int = 8  # of them, at the end: batch-norm statistics stand still
    learning_rate: float = 1e-3
    warmup_share: float = 0.05
    huber_delta: float = 1.0  # in standard deviations of the target
    precision: Precision = "bf16"
    validation_folds: tuple[int, ...] = (8,)
    calibration_folds: tuple[int, ...] = (9,)
    shift_px: int = 3  # augmentation: whole pixels, either way
    offset_hu: float = 4.0  # augmentation: standard deviation
    noise_hu: float = 3.0  # augmentation: standard deviation at most
    erode_share: float = 0.25  # augmentation: share of vertebrae whose mask loses its rim
    input: InputConfig = field(default_factory=InputConfig)
    name: str = "reference"
    version: str = "0.1.0"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown training settings: {', '.join(sorted(unknown))}")
        plain = dict(values)
        for name in ("validation_folds", "calibration_folds"):
            if name in plain:
                plain[name] = tuple(plain[name])
        if "input" in plain:
            plain["input"] = InputConfig.from_dict(plain["input"])
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def training_folds(self) -> tuple[int, ...]:
        held_out = (*self.validation_folds, *self.calibration_folds)
        return tuple(fold for fold in range(FOLDS) if fold not in held_out)


def learning_rate(step: int, steps: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warmup = max(1, int(config.warmup_share * steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))


# ---------------------------------------------------------------------------------------------------
# Batches


def batches(cohort: Cohort, chosen: Ints, config: TrainingConfig, epoch: int) -> Iterator[tuple[Floats, Floats]]:
    """One epoch of augmented (pictures [b, 3, rows, columns], targets [b, 2]), whole batches only."""
    draw = np.random.default_rng([config.seed, epoch])
    order = draw.permutation(chosen)
    size = min(config.batch, len(order))
    for start in range(0, len(order) - size + 1, size):
        part = order[start : start + size]
        variant = draw.integers(cohort.slabs.shape[1], size=size)
        yield augmented(cohort.slabs[part, variant], config, draw), cohort.targets[part]


def augmented(slabs: npt.NDArray[np.int16], config: TrainingConfig, draw: np.random.Generator) -> Floats:
    """Slabs [b, slabs, size, size] HU -> pictures: shifted, sides exchanged, mask eroded, HU disturbed."""
    middle = slabs.shape[1] // 2
    seen = slabs[:, [middle] * 3] if config.input.slabs == 1 else slabs[:, middle - 1 : middle + 2]
    field_hu = central_field(seen, config.input).astype(np.float32)
    for image in field_hu:  # [3, rows, columns]
        down, back = draw.integers(-config.shift_px, config.shift_px + 1, size=2)
        image[:] = _moved(image, int(down), int(back))
        if draw.random() < 0.5:
            image[:] = image[::-1].copy()  # left for right: the vertebra is symmetric
        if draw.random() < config.erode_share:
            image[:] = _eroded(image)
    outside = field_hu <= OUTSIDE_HU
    count = (len(field_hu), 1, 1, 1)
    noise = draw.random(count) * config.noise_hu * draw.standard_normal(field_hu.shape)
    disturbed = field_hu + draw.standard_normal(count) * config.offset_hu + noise
    return windowed(np.where(outside, OUTSIDE_HU, disturbed), config.input)


def _moved(image: Floats, down: int, back: int) -> Floats:
    """Shifted by whole pixels; what comes in is outside."""
    moved = np.full_like(image, OUTSIDE_HU)
    rows, columns = image.shape[-2:]
    moved[..., max(0, down) : rows + min(0, down), max(0, back) : columns + min(0, back)] = image[
        ..., max(0, -down) : rows + min(0, -down), max(0, -back) : columns + min(0, -back)
    ]
    return moved


def _eroded(image: Floats) -> Floats:
    """Without the outermost pixel of its mask, as a tight segmentation would have it."""
    inside = image > OUTSIDE_HU
    kept = inside.copy()
    kept[..., 1:, :] &= inside[..., :-1, :]
    kept[..., :-1, :] &= inside[..., 1:, :]
    kept[..., :, 1:] &= inside[..., :, :-1]
    kept[..., :, :-1] &= inside[..., :, 1:]
    return np.where(kept, image, np.float32(OUTSIDE_HU))


# ---------------------------------------------------------------------------------------------------
# The run


@dataclass
class Run:
    """What a checkpoint holds."""

    network: BonePredictor
    optimizer: torch.optim.Adam
    epoch: int = 0  # epochs done
    step: int = 0  # steps really done
    best_epoch: int = 0
    best_loss: float = math.inf
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "numbers": {name: getattr(self, name) for name in ("epoch", "step", "best_epoch", "best_loss")},
            "curve": self.curve,
        }
        draft = path.with_suffix(".draft")
        torch.save(state, draft)
        draft.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=next(self.network.parameters()).device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.curve = state["best"], state["curve"]
        for name, value in state["numbers"].items():
            setattr(self, name, value)


def start(cohort: Cohort, config: TrainingConfig, device: torch.device) -> Run:
    """An untrained network that answers with the training patients' mean."""
    torch.manual_seed(config.seed)
    network = BonePredictor(NetworkConfig(config.architecture))
    truth = cohort.targets[cohort.where(config.training_folds)]
    network.target_mean.copy_(torch.from_numpy(truth.mean(axis=0)))
    network.target_std.copy_(torch.from_numpy(np.maximum(truth.std(axis=0), 1e-3)))
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Run(network, torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True))


def train(
    cohort: Cohort,
    config: TrainingConfig,
    work: Path,
    *,
    device: torch.device | None = None,
    resume: bool = False,
    stop_after_epochs: int | None = None,
    checkpoint_epochs: int = 1,
    console: Console | None = None,
) -> Run:
    """Train to the end (or `stop_after_epochs`), with a checkpoint in `work` every so many epochs and last."""
    device = device or torch.device("cpu")
    work.mkdir(parents=True, exist_ok=True)
    run = start(cohort, config, device)
    _same_configuration(work / "config.json", config, resume)
    if resume and (work / CHECKPOINT).exists():
        run.load(work / CHECKPOINT)
    chosen = cohort.where(config.training_folds)
    steps_an_epoch = max(1, len(chosen) // config.batch)
    steps = config.epochs * steps_an_epoch
    last = min(config.epochs, stop_after_epochs or config.epochs)
    with _progress(console) as progress:
        task = progress.add_task("training", total=steps, completed=run.step, note="")
        while run.epoch < last:
            losses = []
            frozen_from = config.epochs - config.frozen_epochs
            if run.epoch == frozen_from and run.best:
                run.network.load_state_dict(run.best)
                run.best_loss = math.inf  # an epoch before this one may owe its rank to its statistics' luck
            _train_mode(run.network, frozen=run.epoch >= frozen_from)
            for pictures, targets in batches(cohort, chosen, config, run.epoch):
                for group in run.optimizer.param_groups:
                    group["lr"] = learning_rate(run.step, steps, config)
                losses.append(_step(run, pictures, targets, config, device))
                run.step += 1
                progress.advance(task)
            run.epoch += 1
            note = _end_of_epoch(run, cohort, config, float(np.mean(losses)), device)
            progress.update(task, note=note)
            if run.epoch % checkpoint_epochs == 0 or run.epoch == last:
                run.save(work / CHECKPOINT)
    return run


def _train_mode(network: BonePredictor, *, frozen: bool) -> None:
    """Training mode; with frozen batch-norm statistics the network learns as prediction will see it.

    The statistics of 20 mostly empty pictures differ much from batch to batch and from their average, which
    alone moved the validation error by half from epoch to epoch.
    """
    network.train()
    for module in network.modules():
        if frozen and isinstance(module, nn.BatchNorm2d):
            module.eval()


def _step(run: Run, pictures: Floats, targets: Floats, config: TrainingConfig, device: torch.device) -> float:
    """One Adam step on one batch; returns its loss."""
    network = run.network
    x = torch.from_numpy(pictures).to(device).contiguous(memory_format=torch.channels_last)
    y = (torch.from_numpy(targets).to(device) - network.target_mean) / network.target_std
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        scores = network.standardised(x)
    loss = nn.functional.huber_loss(scores, y, delta=config.huber_delta)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    run.optimizer.step()
    return float(loss.detach())


def _end_of_epoch(run: Run, cohort: Cohort, config: TrainingConfig, training_loss: float, device: torch.device) -> str:
    """Validate, keep the best weights, log."""
    held_out = cohort.where(config.validation_folds)
    predicted = predict_cohort(run.network, cohort, held_out, config.input, config.precision, device)
    std = run.network.target_std.cpu().numpy()
    error = torch.from_numpy((predicted - cohort.targets[held_out]) / std)
    loss = float(nn.functional.huber_loss(error, torch.zeros_like(error), delta=config.huber_delta))
    entry = {"epoch": run.epoch, "step": run.step, "training_loss": training_loss, "validation_loss": loss}
    for column, target in enumerate(("bmd", "tbs")):
        entry[f"{target}_r"] = correlation(predicted[:, column], cohort.targets[held_out][:, column])
    run.curve.append(entry)
    if loss < run.best_loss:
        run.best_loss, run.best_epoch = loss, run.epoch
        run.best = {name: value.detach().clone() for name, value in run.network.state_dict().items()}
    return f"epoch {run.epoch} val {loss:.4f} bmd r {entry['bmd_r']:.3f} tbs r {entry['tbs_r']:.3f}"


def predict_cohort(
    network: BonePredictor,
    cohort: Cohort,
    chosen: Ints,
    config: InputConfig,
    precision: Precision,
    device: torch.device,
    *,
    variant: int = 0,
) -> Floats:
    """Predictions [chosen, targets] in evaluation mode."""
    network.eval()
    parts = [
        infer(network, network_input(cohort.slabs[part, variant], config), device=device, precision=precision)
        for part in np.array_split(chosen, max(1, len(chosen) // 32))
    ]
    return np.concatenate(parts)


def correlation(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Pearson's r; 0 where one side does not vary."""
    if len(a) < 2 or float(np.std(a)) == 0.0 or float(np.std(b)) == 0.0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _same_configuration(path: Path, config: TrainingConfig, resume: bool) -> None:
    """A resumed run must be the same run."""
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
    if resume and path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} differs from the given configuration: not the run to resume")
    path.write_text(text, encoding="utf-8")


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console or Console(stderr=True),
    )


# ---------------------------------------------------------------------------------------------------
# The package


def train_package(
    cohort_dir: Path,
    out: Path,
    config: TrainingConfig | Path | None = None,
    *,
    device: torch.device | None = None,
    resume: bool = False,
    checkpoint_epochs: int = 1,
    console: Console | None = None,
) -> ModelPackage:
    """Cohort folder -> trained, calibrated package at `out`; the run's checkpoint lies beside it.

    `config` may be a JSON file with any of TrainingConfig's fields.
    """
    if isinstance(config, Path):
        config = TrainingConfig.from_dict(json.loads(config.read_text(encoding="utf-8")))
    config = config or TrainingConfig()
    cohort = Cohort.read(cohort_dir)
    work = out.with_name(f"{out.name}.run")
    run = train(
        cohort, config, work, device=device, resume=resume, checkpoint_epochs=checkpoint_epochs, console=console
    )
    return package_run(run, cohort, config, out, device=device)


def package_run(
    run: Run, cohort: Cohort, config: TrainingConfig, out: Path, *, device: torch.device | None = None
) -> ModelPackage:
    """Best epoch's weights + intervals from patients that neither trained nor chose the epoch."""
    device = device or torch.device("cpu")
    network = run.network
    network.load_state_dict(run.best)
    held_out = cohort.where(config.calibration_folds)
    predicted = predict_cohort(network, cohort, held_out, config.input, "fp32", device)
    truth = cohort.targets[held_out]
    metrics = {
        "calibration": {
            "n_vertebrae": len(held_out),
            "n_patients": len(set(cohort.patients[held_out])),
            "bmd_r": correlation(predicted[:, 0], truth[:, 0]),
            "tbs_r": correlation(predicted[:, 1], truth[:, 1]),
            "hu_bmd_r": correlation(cohort.hu[held_out], truth[:, 0]),
            "hu_tbs_r": correlation(cohort.hu[held_out], truth[:, 1]),
            "bmd_mean_error": float((predicted - truth)[:, 0].mean()),
            "tbs_mean_error": float((predicted - truth)[:, 1].mean()),
        }
    }
    training = {
        "provenance": cohort.provenance,
        "cohort": dict(cohort.facts),
        "config": config.to_dict(),
        "patients": {
            "training": len(set(cohort.patients[cohort.where(config.training_folds)])),
            "validation": len(set(cohort.patients[cohort.where(config.validation_folds)])),
            "calibration": metrics["calibration"]["n_patients"],
        },
        "steps_done": run.step,
        "best_epoch": run.best_epoch,
    }
    manifest = Manifest(
        name=config.name,
        version=config.version,
        architecture=config.architecture,
        targets=network.config.targets,
        input=config.input.to_dict(),
        training=training,
        synthetic_only=cohort.provenance == "digital",
        metrics=metrics,
        intervals=conformal_intervals(predicted - truth, cohort.patients[held_out]),
        interval_level=COVERAGE,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    curve = json.dumps({"curve": run.curve}, indent=1)
    return write_package(out, manifest, network.tensors(), model_card(manifest), {"training.json": curve})


def conformal_intervals(errors: Floats, patients: npt.NDArray[np.str_]) -> tuple[Interval, ...]:
    """Split-conformal half-widths of the mean over 1..4 vertebrae of a patient, from held-out errors [n, 2].

    The quantile is the ceil((n + 1) * 0.9)-th smallest absolute error. Means over fewer than four use the
    patient's consecutive vertebrae, one mean a patient, so that n counts exchangeable patients; single
    vertebrae use all of them.
    """
    groups = [errors[patients == patient] for patient in dict.fromkeys(patients)]
    intervals = []
    for levels in range(1, 5):
        enough = [group for group in groups if len(group) >= levels]
        means = errors if levels == 1 else np.array([group[:levels].mean(axis=0) for group in enough])
        if len(means) == 0:
            continue
        width = _conformal_quantile(np.abs(means))
        intervals.append(Interval(levels, float(width[0]), float(width[1])))
    return tuple(intervals)


def _conformal_quantile(sizes: Floats) -> Floats:
    """Per column; with too few errors for the level, the largest of them."""
    rank = min(len(sizes), math.ceil((len(sizes) + 1) * COVERAGE))
    quantile: Floats = np.sort(sizes, axis=0)[rank - 1]
    return quantile


def model_card(manifest: Manifest) -> str:
    """What people must know before they use the package."""
    held_out = manifest.metrics["calibration"]
    patients = manifest.training["patients"]
    widths = "\n".join(f"| {one.levels} | {one.bmd_g_cm2:.3f} | {one.tbs:.3f} |" for one in manifest.intervals)
    if manifest.synthetic_only:
        kind = "digital patients only (no person's image)"
        use = (
            "Digital patients: demonstration, tests, and a start for training on a site's own pairs.\n"
            "For a real patient its values are shown as investigational and drive no decision."
        )
    else:
        kind = "patients of one site"
        use = "Non-contrast 120 kVp CT of adults of the site it was trained on."
    return f"""# {manifest.name} {manifest.version}

Investigational, not a medical device; confirm with DXA.

**What it does.** Estimates lumbar DXA bone mineral density (g/cm2) and trabecular bone score of a vertebra
from three masked sagittal CT slabs (5 mm thick), after Yoshida et al. 2023
(doi 10.1097/RCT.0000000000001437).
Trunk {manifest.architecture}, untrained start, one joint head; {manifest.training["steps_done"]} steps of batch
{manifest.training["config"]["batch"]}, epoch {manifest.training["best_epoch"]} kept.

**What it was trained on.** {kind}: {patients["training"]} to train, {patients["validation"]} to choose the
epoch, {patients["calibration"]} to set the intervals. TBS is *simulated* TBS.

**Intended use.** {use}

**Results on the {held_out["n_patients"]} calibration patients** (per vertebra, n {held_out["n_vertebrae"]}):

| | r | mean error |
|---|---|---|
| BMD | {held_out["bmd_r"]:.3f} | {held_out["bmd_mean_error"]:+.4f} g/cm2 |
| TBS | {held_out["tbs_r"]:.3f} | {held_out["tbs_mean_error"]:+.4f} |
| HU with BMD (comparator) | {held_out["hu_bmd_r"]:.3f} | |
| HU with TBS (comparator) | {held_out["hu_tbs_r"]:.3f} | |

**90 % intervals** (split-conformal half-widths of a mean over so many vertebrae):

| vertebrae | BMD g/cm2 | TBS |
|---|---|---|
{widths}

**Limits.** Not for contrast-enhanced CT, other tube voltages than 120 kVp, fractured or operated vertebrae,
metal. The network was trained on masks that follow the bone; coarse masks shift its values.
Intervals hold for patients like the calibration patients, not for other scanners or populations.
"""
