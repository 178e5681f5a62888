"""A site with a training run whose vertebrae are drawn instead of cut, and a trainer that can be killed anywhere."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from models.crop import OUTSIDE_HU
from models.training import Run
from service.settings import Settings
from service.store.engine import Store, make_engine
from service.workflow.clock import utc_now
from tests.service.workflow import workbench
from worker import cohorts, training
from worker.pipeline import Found
from worker.trainer import Ended, TrainingRunner

Hook = Callable[[Run], None]


@dataclass
class Site:
    """One installation, by its folder."""

    folder: Path
    settings: Settings
    store: Store

    @classmethod
    def at(cls, folder: Path) -> Site:
        settings = workbench.settings(folder, lease_seconds=0.9, disk_floor_bytes=0, training_disk_bytes=0)
        return cls(folder, settings, Store(make_engine(settings.sqlalchemy_url)))

    def trainer(self, **changes: Any) -> TrainingRunner:
        """A trainer in this process; its process is never ended."""
        exits: list[int] = []
        told: dict[str, Any] = {"worker": "bench", "exit_process": exits.append, "grace_seconds": 600.0, **changes}
        return TrainingRunner(self.store, self.settings, **told)


def drawn(pair: Mapping[str, Any], _: Settings) -> Iterator[tuple[str, Found]]:
    """Each level as slabs whose brightness is their BMD, with noise of the study's own."""
    draw = np.random.default_rng(zlib.crc32(str(pair["study_uid"]).encode()))
    for level, truth in pair["levels"].items():
        hu = np.full((9, 128, 128), OUTSIDE_HU, dtype=np.float32)
        hu[:, 52:76, 50:90] = 250 * truth["bmd_g_cm2"] + draw.normal(0, 10, (9, 24, 40))
        slabs, attenuation = SimpleNamespace(hu=hu), SimpleNamespace(hu_mean=150 * truth["bmd_g_cm2"])
        yield level, Found(level, None, slabs, attenuation)  # type: ignore[arg-type]


def run(
    site: Site, run_id: int, *, hook: Hook = lambda _: None, checkpoint_seconds: float = 60.0, **changes: Any
) -> Ended:
    """Train in this process, `hook` called after every step."""
    torch.set_num_threads(1)
    watch = training._Steps.watch

    def hooked(steps: training._Steps, run: Run) -> bool:
        hook(run)
        return watch(steps, run)

    with (
        patch.object(cohorts, "_levels", drawn),
        patch.object(training, "CHECKPOINT_SECONDS", checkpoint_seconds),
        patch.object(training._Steps, "watch", hooked),
    ):
        return site.trainer(clock=utc_now, **changes).run(run_id)


def killed_at(folder: Path, run_id: int, step: int) -> None:
    """In a process of its own: train until this step, a checkpoint after each, and die."""

    def die(run: Run) -> None:
        if run.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    run(Site.at(folder), run_id, hook=die, checkpoint_seconds=0.0)
