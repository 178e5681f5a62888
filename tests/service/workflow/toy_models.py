"""Model packages of a few bytes, runs that left them, and libraries to keep them in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models.package import Interval, Manifest, ModelPackage, write_package
from service.domain.policy import DEFAULT_POLICY
from service.store.engine import Store
from service.workflow import models
from service.workflow.model import shipped_model
from service.workflow.packages import Kept, Library
from service.workflow.people import By
from tests.service.domain.reports import passing
from tests.service.workflow import workbench

BY = By("Dr. Tanabe", workbench.START, "10.0.0.9")
POLICY = DEFAULT_POLICY


def package(folder: Path, version: str = "1", *, synthetic_only: bool = False, finished: bool = True) -> ModelPackage:
    """A package whose one weight is its version."""
    manifest = Manifest(
        name="site",
        version=version,
        architecture="resnet18",
        targets=("bmd_g_cm2", "tbs"),
        input={},
        training={
            "provenance": "site",
            "patients": {"training": 200},
            "steps_done": 10,
            "steps_planned": 10,
            "scanners": {"ge Revolution CT": {"patients": 88, "bmd_g_cm2": 1.0516, "tbs": 1.0}},
        },
        synthetic_only=synthetic_only,
        metrics={},
        intervals=(Interval(1, 0.1, 0.1),),
        interval_level=0.9,
        created="2026-11-01T00:00:00+00:00",
        finished=finished,
    )
    tensors = {"w": np.array([float(version)], dtype=np.float32)}
    return write_package(folder, manifest, tensors, f"# site {version}\n", {"config.json": "{}\n"})


def run(
    folder: Path,
    version: str = "1",
    champion: str | None = None,
    make: Callable[..., ModelPackage] = package,
    **changes: Any,
) -> Path:
    """What a finished training run left: package and reports; `changes` spoil the candidate's report."""
    made = {name: changes.pop(name) for name in ("synthetic_only", "finished") if name in changes}
    sha256 = make(folder / "package", version, **made).sha256
    reports = {"candidate": passing(sha256, **changes), "champion": passing(champion or shipped_model().sha256)}
    for name, report in reports.items():
        (folder / "report" / name).mkdir(parents=True)
        (folder / "report" / name / "report.json").write_text(json.dumps(report))
    (folder / "manifest.json").write_text('{"studies": ["1.2.840.55.4711"]}')
    return folder


def library(folder: Path) -> Library:
    return Library(folder / "models", folder / "keys" / "models.key")


def registered(store: Store, kept: Kept) -> models.ModelLine:
    with store.transaction() as session:
        return models.register(session, kept, BY, policy=POLICY, run_id="r1")


def promoted(store: Store, model_id: int, at: Library, reason: str = "agrees with our DXA") -> models.ModelLine:
    with store.transaction() as session:
        return models.promote(session, model_id, reason, BY, library=at, policy=POLICY)
