"""The work of a training run: stored CTs -> cohorts -> a trained package -> reports on the locked patients.

Knows no queue and no database: `Watcher` hears how far it is and says whether it shall go on. Each stage leaves its
outcome in the run's folder, so a run that is taken up again goes on, and ends with the identical package.

    cut.json, cohort-training/, cohort-locked/    vertebrae with their truth
    package.run/                                  checkpoints
    package/                                      the candidate
    report/candidate/, report/champion/           it and the model in force on the locked patients

The first two lines go when nothing can need them any more (`service.workflow.training_files`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from models.evaluation import evaluate
from models.package import MANIFEST, ModelPackage
from models.training import Interrupted, Run, TrainingConfig, refit_for_site, train_package
from service.domain.splits import Part
from service.domain.states import RunStage
from service.domain.training import Start
from service.settings import Settings
from service.workflow.training import Lost, Outcome, content, content_hash
from worker.cohorts import cohort_dir, make_cohorts
from worker.predict import find_device
from worker.start import package_path, packages

PACKAGE, REPORT = "package", "report"
PROGRESS_SECONDS = 1.0
CHECKPOINT_SECONDS = 60.0  # at most so much is done again after a kill


class Watcher(Protocol):
    """Who watches a run."""

    def go_on(self) -> bool:
        """Whether the run shall go on; asked after every study and every step."""

    def progress(self, stage: RunStage, values: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]] = ()) -> None:
        """Hear how far it is."""

    def lost(self, lost: Sequence[Lost]) -> None:
        """Hear what of the manifest could not be cut."""


class Halted(Exception):
    """The watcher said so; what was done is kept."""


def train_run(
    manifest: Mapping[str, Any],
    manifest_sha256: str,
    created: datetime,
    settings: Settings,
    folder: Path,
    watcher: Watcher,
) -> Outcome:
    """Take a run from wherever its folder stands to its package and reports.

    Raises:
        Halted: the watcher said so.
        ValueError: the manifest was altered, its configuration is impossible, its start is gone, too little could be
            cut, or the loss is no longer a number: another attempt would say the same.
    """
    if content_hash(manifest) != manifest_sha256:
        raise ValueError("the manifest is not the one that was frozen: its hash differs")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_bytes(content(manifest))
    _cut(manifest, manifest_sha256, settings, folder, watcher)
    package = _trained(manifest, created, settings, folder, watcher)
    champion = ModelPackage.load(package_path("active", settings))
    for name, judged in (("candidate", package), ("champion", champion)):
        watcher.progress(RunStage.JUDGING, {"judging": name})
        if not watcher.go_on():
            raise Halted
        evaluate(
            judged,
            cohort_dir(folder, Part.LOCKED),
            folder / REPORT / name,
            comparators_from=cohort_dir(folder, Part.TRAINING),
        )
    data = settings.data_dir.resolve()
    reports = {name: str((folder / REPORT / name).relative_to(data)) for name in ("candidate", "champion")}
    return Outcome(
        package_path=str(package.path.relative_to(data)),
        package_sha256=package.sha256,
        candidate_report=reports["candidate"],
        champion_report=reports["champion"],
        champion=champion.name,
        champion_sha256=champion.sha256,
    )


def _cut(manifest: Mapping[str, Any], sha256: str, settings: Settings, folder: Path, watcher: Watcher) -> None:
    def on_study(done: int, of: int) -> None:
        watcher.progress(RunStage.CUTTING, {"studies_done": done, "studies": of})
        if not watcher.go_on():
            raise Halted

    watcher.lost(make_cohorts(manifest, sha256, settings, folder, on_study))


def _trained(
    manifest: Mapping[str, Any], created: datetime, settings: Settings, folder: Path, watcher: Watcher
) -> ModelPackage:
    """The run's package; one that a killed attempt left is taken as it is."""
    out = folder / PACKAGE
    if (out / MANIFEST).is_file() and (package := ModelPackage.load(out)).manifest.finished:
        return package
    config = TrainingConfig.from_dict(manifest["configuration"])
    initial = _package(config.start_from, settings) if config.start_from else None
    if manifest["start"] == Start.REFIT:
        assert initial is not None
        watcher.progress(RunStage.TRAINING, {})
        return refit_for_site(initial, cohort_dir(folder, Part.TRAINING), out, config, created=created)
    try:
        return train_package(
            cohort_dir(folder, Part.TRAINING),
            out,
            config,
            device=find_device(settings.device),
            resume=True,
            checkpoint_seconds=CHECKPOINT_SECONDS,
            console=Console(quiet=True),
            initial=initial,
            watch=_Steps(config, watcher).watch,
            created=created,
        )
    except Interrupted as error:
        raise Halted from error


def _package(sha256: str, settings: Settings) -> ModelPackage:
    """The package of this hash, wherever this installation keeps it.

    Raises:
        ValueError: it is not here any more.
    """
    own = (ModelPackage.load(file.parent) for file in settings.training_dir.glob(f"*/{PACKAGE}/{MANIFEST}"))
    for package in (*packages(settings), *own):
        if package.sha256 == sha256:
            return package
    raise ValueError(f"the package that the run starts with ({sha256[:12]}) is not here any more")


@dataclass
class _Steps:
    """Tells the watcher of steps and epochs."""

    config: TrainingConfig
    watcher: Watcher
    told: dict[str, int] = field(default_factory=dict)  # epochs that the watcher has heard of, by network
    told_at: float = -math.inf
    began: tuple[float, int] | None = None  # when, and at which step, this attempt's current network began
    network: str = ""

    def watch(self, run: Run) -> bool:
        """After every step: whether to go on."""
        if run.losses and not math.isfinite(run.losses[-1]):
            raise ValueError(f"the loss of {run.plan.name} is no longer a number at step {run.step}: a smaller rate?")
        now, name = time.monotonic(), run.plan.name
        if self.network != name or self.began is None:
            self.network, self.began = name, (now, run.step)
        fresh = run.curve[self.told.get(name, 0) :]
        if fresh or now - self.told_at >= PROGRESS_SECONDS:
            self.watcher.progress(RunStage.TRAINING, self._values(run, now), [_epoch(name, one) for one in fresh])
            self.told[name], self.told_at = len(run.curve), now
        return self.watcher.go_on()

    def _values(self, run: Run, now: float) -> dict[str, Any]:
        assert self.began is not None
        seconds, steps = now - self.began[0], run.step - self.began[1]
        networks = len(self.config.members)
        return {
            "network": run.plan.name,
            "networks": networks,
            "epoch": run.step // run.steps_per_epoch,
            "epochs": self.config.epochs,
            "steps_done": run.plan.index * run.steps + run.step,
            "steps_planned": networks * run.steps,
            "images_per_second": round(steps * self.config.batch / seconds, 2) if steps and seconds else None,
        }


def _epoch(network: str, entry: Mapping[str, float]) -> dict[str, Any]:
    names = ("epoch", "step", "training_loss", "validation_loss")
    rs = {name: entry.get(name) for name in ("bmd_r", "tbs_r")}
    return {"network": network, **{name: entry[name] for name in names}, **rs}
