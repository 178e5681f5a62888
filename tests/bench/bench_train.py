"""Training images per second: a run as a hospital starts it against a plain torchvision loop, in one process.

Ours does all that a run does: it draws, augments and windows every batch, averages the weights and tells its watch
after each step. The peer gets ready pictures and does the least that trains the same network on them: torchvision's
model, Adam, Huber loss, fp32, the memory layout that PyTorch has by default.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision.models import resnet50

from models.crop import OUTSIDE_HU
from models.training import Cohort, Interrupted, Run, TrainingConfig, load_configuration
from models.training.batches import batches
from models.training.loop import resolved, start, train_member
from worker.predict import find_device

STEPS = 5  # timed, after one that warms up
ROUNDS = 3  # of each side, in turn
PATIENTS = 60


def main() -> None:
    """Time the shipped configuration on noise in the shape of vertebrae."""
    device = find_device("auto")
    config = resolved(load_configuration(), device)
    cohort = noise()
    sides = {"ours": lambda: ours(cohort, config, device), "plain torchvision": lambda: plain(cohort, config, device)}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            found[name].append(side())
    best = {name: max(rates) for name, rates in found.items()}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"training images per second, {config.architecture}, batch {config.batch}, {where}")
    for heading in ("", "precision", "best", f"all {ROUNDS}", "ratio to the peer"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, precision in (("ours", config.precision), ("plain torchvision", "fp32")):
        rates = ", ".join(f"{rate:.1f}" for rate in found[name])
        table.add_row(name, precision, f"{best[name]:.1f}", rates, f"{best[name] / best['plain torchvision']:.2f} x")
    Console(width=120).print(table)


def noise() -> Cohort:
    """Vertebrae of noise: what a step costs does not depend on what is seen."""
    draw = np.random.default_rng(1)
    count = 4 * PATIENTS
    slabs = np.full((count, 1, 9, 128, 128), OUTSIDE_HU, dtype=np.int16)
    slabs[..., 40:88, 40:110] = draw.integers(-100, 600, (count, 1, 9, 48, 70), dtype=np.int16)
    who = np.repeat(np.arange(PATIENTS), 4)
    return Cohort(
        slabs=slabs,
        targets=draw.normal(1.0, 0.2, (count, 2)).astype(np.float32),
        hu=np.ones(count, dtype=np.float32),
        patients=who.astype(str),
        folds=who % 10,
        rows=(),
        facts={"provenance": "digital"},
    )


def ours(cohort: Cohort, config: TrainingConfig, device: torch.device) -> float:
    """Images per second of a run's own loop, from the first step's end to the last one's."""
    (plan,) = config.members
    run, times = start(cohort, plan, config, device), []

    def watch(_: Run) -> bool:
        times.append(_now(device))
        return len(times) <= STEPS

    with tempfile.TemporaryDirectory() as folder, suppress(Interrupted):
        train_member(
            run,
            cohort,
            config,
            Path(folder) / "run.pt",
            stop_after_steps=STEPS + 2,
            checkpoint_seconds=1e9,
            log=lambda run, note: None,
            watch=watch,
        )
    return config.batch * STEPS / (times[STEPS] - times[0])


def plain(cohort: Cohort, config: TrainingConfig, device: torch.device) -> float:
    """The same of the peer."""
    network = resnet50(weights=None, num_classes=2)
    network.conv1 = nn.Conv2d(config.input.channels, 64, 7, stride=2, padding=3, bias=False)
    network.to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    ready = list(_ready(cohort, config, device))
    times = []
    for pictures, targets in (ready[number % len(ready)] for number in range(STEPS + 1)):
        loss = nn.functional.huber_loss(network(pictures), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(_now(device))
    return config.batch * STEPS / (times[STEPS] - times[0])


def _ready(cohort: Cohort, config: TrainingConfig, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    (plan,) = config.members
    for pictures, targets in batches(cohort, plan, replace(config, seed=2), 0):
        yield torch.from_numpy(pictures).to(device), torch.from_numpy(targets).to(device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
