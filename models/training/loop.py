"""The training loop, readable top to bottom: learning rate, step, evaluate, log, checkpoint.

After Yoshida 2023: Huber loss, Adam, mini-batches of 20, augmentation in training only, an untrained start, the epoch
of lowest validation loss is kept. A run has one or more networks (folds x targets), trained one after another, each
with its own checkpoint.

Every batch, and the dropout of every step, draw from generators of their own, so a run that was killed at any moment
and resumed ends with the identical weights: on one kind of machine, in one precision and with one number of threads.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.inputs import InputConfig, network_input
from models.package import TARGETS, Member, ModelPackage
from models.resnet50 import (
    BonePredictor,
    Floats,
    NetworkConfig,
    PackageNetwork,
    Precision,
    infer,
    load_tensors,
    resolved_precision,
)
from models.training.batches import batches, steps_per_epoch, training_images
from models.training.cohort import Cohort, Ints
from models.training.configuration import MemberPlan, TrainingConfig

RUN = "run.json"
CHECKPOINT_SECONDS = 120.0
State = dict[str, torch.Tensor]


class Interrupted(Exception):
    """Whoever watches the run asked it to stop; every step done so far is in its checkpoint."""


def learning_rate(step: int, steps: int, config: TrainingConfig) -> float:
    """Constant, or a linear warm-up and then a cosine down to zero."""
    if config.schedule == "constant":
        return config.learning_rate
    warmup = max(1, int(config.warmup_share * steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))


# ---------------------------------------------------------------------------------------------------
# One network


@dataclass(frozen=True)
class Trained:
    """What a network's training has come to: enough to judge and to package it."""

    plan: MemberPlan
    step: int  # steps really done
    steps: int  # of the whole protocol
    best_epoch: int  # the one kept; 0: no epoch is complete yet
    best: State
    curve: tuple[dict[str, float], ...]

    @classmethod
    def read(cls, path: Path, plan: MemberPlan, steps: int) -> Self:
        state = torch.load(path, map_location="cpu", weights_only=True)
        numbers = state["numbers"]
        return cls(plan, numbers["step"], steps, numbers["best_epoch"], state["best"], tuple(state["curve"]))

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    def network(self, config: TrainingConfig) -> BonePredictor:
        """The network of the best epoch, on the CPU."""
        network = BonePredictor(NetworkConfig(config.architecture, self.plan.targets, config.input.channels))
        network.load_state_dict(self.best)
        return network.eval()


@dataclass
class Run:
    """One network under training, and what its checkpoint holds."""

    plan: MemberPlan
    steps: int  # of the whole protocol
    steps_per_epoch: int
    network: BonePredictor
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None  # of the weights and statistics
    step: int = 0  # steps really done
    best_epoch: int = 0
    best_loss: float = math.inf
    best: State = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of the epoch under way

    @property
    def judged(self) -> BonePredictor:
        """The network that is validated and kept: the averaged one where there is one."""
        return self.network if self.average is None else cast(BonePredictor, self.average.module)

    def save(self, path: Path) -> None:
        """Write the checkpoint in one step; a finished network needs no optimizer any more."""
        numbers = {name: getattr(self, name) for name in ("step", "best_epoch", "best_loss")}
        state: dict[str, Any] = {"numbers": numbers, "best": self.best, "curve": self.curve, "losses": self.losses}
        if self.step < self.steps:
            state |= {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
            state |= {} if self.average is None else {"average": self.average.state_dict()}
        draft = path.with_suffix(".draft")
        with draft.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.network.target_mean.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.best, self.curve, self.losses = state["best"], state["curve"], state["losses"]
        for name, value in state["numbers"].items():
            setattr(self, name, value)


Watch = Callable[[Run], bool]  # asked after every step: shall it go on?


def never_stop(_: Run) -> bool:
    """The watch of a run that nobody stops."""
    return True


def start(
    cohort: Cohort,
    plan: MemberPlan,
    config: TrainingConfig,
    device: torch.device,
    initial: ModelPackage | None = None,
) -> Run:
    """A network that answers with the training patients' mean; or, to fine-tune, as the `initial` package does.

    A fine-tuned network keeps the mean and scale that it was trained with: its first answers are the package's own.
    """
    torch.manual_seed(_seed(config, plan))
    channels = config.input.channels
    network = BonePredictor(NetworkConfig(config.architecture, plan.targets, channels, config.norm_momentum))
    if initial is None:
        truth = cohort.truth(plan.targets, cohort.where(plan.training))
        network.target_mean.copy_(torch.from_numpy(truth.mean(axis=0)))
        network.target_std.copy_(torch.from_numpy(np.maximum(truth.std(axis=0), 1e-3)))
    else:
        member = _member_for(plan, config, initial)
        load_tensors(network, _answering(initial.weights(member.file), member.targets, plan.targets))
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    decaying = [weight for weight in network.parameters() if weight.ndim > 1]
    others = [weight for weight in network.parameters() if weight.ndim <= 1]
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    average = None
    if config.ema_decay:
        average = AveragedModel(network, multi_avg_fn=_averaging(config.ema_decay), use_buffers=True)
    an_epoch = steps_per_epoch(len(training_images(cohort, plan, config)), config)
    return Run(plan, config.epochs * an_epoch, an_epoch, network.train(), optimizer, average)


def check_start(config: TrainingConfig, initial: ModelPackage | None) -> None:
    """Whether the configuration fits the package that it starts with.

    Raises:
        ValueError: it names another package, or its networks are of another kind.
    """
    if config.start_from != ("" if initial is None else initial.sha256):
        raise ValueError("start_from must name the package that the run starts with, by its SHA-256")
    if initial is None:
        return
    made = initial.manifest
    for name, wanted, there in (
        ("architecture", config.architecture, made.architecture),
        ("input", config.input, InputConfig.from_dict(made.input)),
    ):
        if wanted != there:
            raise ValueError(f"{initial.name} has another {name} than the configuration: it can't be fine-tuned so")
    for plan in config.members:
        _member_for(plan, config, initial)


def _member_for(plan: MemberPlan, config: TrainingConfig, initial: ModelPackage) -> Member:
    """The package's network that this one starts with; of several the folds take turns.

    A run that learns BMD alone goes on with a network of both as well, without its answer for TBS.
    """
    wanted = set(config.targets)
    found = [one for one in initial.manifest.members if wanted & set(one.targets) == set(plan.targets)]
    if not found:
        raise ValueError(f"{initial.name} has no network for {' and '.join(plan.targets)} alone: it has other heads")
    return found[plan.fold % len(found)]


def _answering(
    tensors: dict[str, npt.NDArray[np.float32]], has: tuple[str, ...], wanted: tuple[str, ...]
) -> dict[str, npt.NDArray[np.float32]]:
    """A network's tensors with the answers for the wanted targets alone, in their order."""
    rows = [has.index(target) for target in wanted]
    answers = ("head.weight", "head.bias", "target_mean", "target_std")
    return {name: tensor[rows] if name in answers else tensor for name, tensor in tensors.items()}


def train_member(
    run: Run,
    cohort: Cohort,
    config: TrainingConfig,
    checkpoint: Path,
    *,
    stop_after_steps: int,
    checkpoint_seconds: float,
    log: Callable[[Run, str], None],
    watch: Watch = never_stop,
) -> None:
    """Steps until the end or `stop_after_steps`; a checkpoint every so many seconds and last.

    Raises:
        Interrupted: `watch` said so after a step; the checkpoint holds it.
    """
    saved, note = time.monotonic(), ""
    feed = batches(cohort, run.plan, config, *divmod(run.step, run.steps_per_epoch))
    while run.step < stop_after_steps:
        pictures, targets = next(feed)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.step, run.steps, config)
        torch.manual_seed(_seed(config, run.plan, run.step))  # dropout, where the backbone has it
        run.losses.append(_step(run, pictures, targets[:, _columns(run.plan)], config))
        run.step += 1
        if run.step % run.steps_per_epoch == 0:
            note = _end_of_epoch(run, cohort, config)
            feed = batches(cohort, run.plan, config, run.step // run.steps_per_epoch)
        log(run, note)
        go_on = watch(run)
        if not go_on or run.step == stop_after_steps or time.monotonic() - saved >= checkpoint_seconds:
            run.save(checkpoint)
            saved = time.monotonic()
        if not go_on:
            raise Interrupted(f"{run.plan.name} was stopped after step {run.step} of {run.steps}")


def _step(run: Run, pictures: Floats, targets: Floats, config: TrainingConfig) -> float:
    """One Adam step on one batch; returns its loss."""
    network = run.network
    device = network.target_mean.device
    x = torch.from_numpy(pictures).to(device).contiguous(memory_format=torch.channels_last)
    y = (torch.from_numpy(targets).to(device) - network.target_mean) / network.target_std
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        scores = network.standardised(x)
    loss = nn.functional.huber_loss(scores, y, delta=config.huber_delta)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    run.optimizer.step()
    if run.average is not None:
        run.average.update_parameters(network)
    return float(loss.detach())


def _averaging(decay: float) -> Callable[..., None]:
    """torch's exponential moving average with a warm-up, so that the untrained start is soon forgotten.

    The decay after n steps is (1 + n) / (10 + n), at most `decay`: TensorFlow's ExponentialMovingAverage
    (`num_updates`). Batch-norm statistics are averaged with the weights that they belong to: those of one batch of 20
    mostly empty pictures are luck, which alone moved the validation loss by half from epoch to epoch.
    """

    def update(average: Any, current: Any, count: Any) -> None:
        warm = min(decay, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(warm)(average, current, count)  # type: ignore[no-untyped-call]

    return update


def _end_of_epoch(run: Run, cohort: Cohort, config: TrainingConfig) -> str:
    """Validate on the middle slab, keep the weights where they are the best or the newest are wanted, log."""
    network, device = run.judged, run.network.target_mean.device
    held_out = cohort.where(run.plan.validation)
    truth = cohort.targets[held_out][:, _columns(run.plan)]
    predicted = predict_cohort(network, cohort, held_out, config.input, _precision(config), device)
    run.network.train()
    error = torch.from_numpy((predicted - truth) / network.target_std.cpu().numpy())
    loss = float(nn.functional.huber_loss(error, torch.zeros_like(error), delta=config.huber_delta))
    epoch = run.step // run.steps_per_epoch
    entry = {"epoch": epoch, "step": run.step, "training_loss": float(np.mean(run.losses)), "validation_loss": loss}
    rs = {short(target): correlation(predicted[:, i], truth[:, i]) for i, target in enumerate(run.plan.targets)}
    run.curve.append(entry | {f"{name}_r": r for name, r in rs.items()})
    run.losses.clear()
    run.best_loss = min(loss, run.best_loss)
    if config.keep == "last" or loss == run.best_loss:
        run.best_epoch = epoch
        run.best = {name: value.detach().clone() for name, value in network.state_dict().items()}
    return f"epoch {epoch} val {loss:.4f} (best {run.best_loss:.4f}) " + " ".join(
        f"{name} r {r:.3f}" for name, r in rs.items()
    )


def predict_cohort(
    network: BonePredictor | PackageNetwork,
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
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:  # a deviation of equal float32 need not be exactly 0
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def short(target: str) -> str:
    """bmd or tbs."""
    return target.partition("_")[0]


def _columns(plan: MemberPlan) -> list[int]:
    return [TARGETS.index(target) for target in plan.targets]


def _precision(config: TrainingConfig) -> Precision:
    return "bf16" if config.precision == "bf16" else "fp32"


def _seed(config: TrainingConfig, plan: MemberPlan, *more: int) -> int:
    return int(np.random.SeedSequence([config.seed, plan.index, *more]).generate_state(1)[0])


# ---------------------------------------------------------------------------------------------------
# All of them


def resolved(config: TrainingConfig, device: torch.device) -> TrainingConfig:
    """The configuration as it really runs here: its precision is fp32 or bf16."""
    return replace(config, precision=resolved_precision(config.precision, device))


def train(
    cohort: Cohort,
    config: TrainingConfig,
    work: Path,
    *,
    device: torch.device | None = None,
    resume: bool = False,
    stop_after_steps: int | None = None,
    networks: tuple[str, ...] | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    console: Console | None = None,
    initial: ModelPackage | None = None,
    watch: Watch = never_stop,
) -> tuple[Trained, ...]:
    """Train the run's networks one after another, each to its end or to `stop_after_steps` of its own steps.

    `networks` names those to train now (all by default): fold0-tbs, or fold0 for every one of that fold. `initial` is
    the package to fine-tune, which the configuration names by its hash. Returns every network that has been trained so
    far.

    Raises:
        ValueError: `work` holds another run, or one that `resume` was not asked to go on with; a vertebra has no value
            of a target; or the package to start with doesn't fit.
        Interrupted: `watch` said so after a step.
    """
    device = device or torch.device("cpu")
    config = resolved(config, device)
    cohort.truth(config.targets)
    check_start(config, initial)
    wanted = config.members if networks is None else _named(config.members, networks)
    _begin(work, cohort, config, resume)
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True  # else a resumed run need not be the same
    trained = []
    with _progress(console) as progress:
        for plan in config.members:
            checkpoint = work / f"{plan.name}.pt"
            if plan in wanted:
                _continue(
                    plan,
                    cohort,
                    config,
                    checkpoint,
                    device,
                    stop_after_steps,
                    checkpoint_seconds,
                    progress,
                    initial,
                    watch,
                )
            if checkpoint.exists():
                trained.append(Trained.read(checkpoint, plan, _steps(cohort, plan, config)))
    return tuple(trained)


def _named(plans: Sequence[MemberPlan], names: Sequence[str]) -> tuple[MemberPlan, ...]:
    """The networks of these names, and of these folds."""
    known = {name for plan in plans for name in (plan.name, f"fold{plan.fold}")}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no network {unknown[0]}: they are {', '.join(plan.name for plan in plans)}")
    return tuple(plan for plan in plans if plan.name in names or f"fold{plan.fold}" in names)


def _continue(
    plan: MemberPlan,
    cohort: Cohort,
    config: TrainingConfig,
    checkpoint: Path,
    device: torch.device,
    stop_after_steps: int | None,
    checkpoint_seconds: float,
    progress: Progress,
    initial: ModelPackage | None,
    watch: Watch,
) -> None:
    """One network, from its checkpoint where there is one."""
    steps = _steps(cohort, plan, config)
    last = min(steps, stop_after_steps or steps)
    label = f"{plan.name} ({plan.index + 1} of {len(config.members)})"
    if checkpoint.exists() and (done := Trained.read(checkpoint, plan, steps)).step >= last:
        progress.add_task(label, total=last, completed=done.step, note="done before")
        return
    run = start(cohort, plan, config, device, initial)
    if checkpoint.exists():
        run.load(checkpoint)
    task = progress.add_task(label, total=last, completed=run.step, note="")
    train_member(
        run,
        cohort,
        config,
        checkpoint,
        stop_after_steps=last,
        checkpoint_seconds=checkpoint_seconds,
        log=lambda run, note: progress.update(task, completed=run.step, note=note),
        watch=watch,
    )


def _steps(cohort: Cohort, plan: MemberPlan, config: TrainingConfig) -> int:
    """Of the whole protocol, for one network."""
    return config.epochs * steps_per_epoch(len(training_images(cohort, plan, config)), config)


def _begin(work: Path, cohort: Cohort, config: TrainingConfig, resume: bool) -> None:
    """A resumed run must be the same run, and a new one must not fall over the remains of another."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / RUN
    run = {"config": config.to_dict(), "cohort_sha256": cohort.sha256}
    text = json.dumps(run, indent=2, sort_keys=True) + "\n"
    if not resume and any(work.glob("*.pt")):
        raise ValueError(f"{work} holds a run: resume it, or remove the folder")
    if resume and path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} differs from the given configuration and cohort: not the run to resume")
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console or Console(stderr=True),
    )
