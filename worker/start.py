"""Which model package and which weights are in force, and the resident pipeline made of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from models.package import ModelPackage, PackageError
from service.domain.policy import Policy
from service.domain.result import Measurements
from service.settings import Settings
from service.workflow.model import PACKAGES, REFERENCE, InForce, in_force_here
from worker.jobs import ScreenRequest
from worker.pipeline import Pipeline
from worker.predict import Predictor
from worker.segmentation import SuppliedLabels

__all__ = ["REFERENCE", "SHIPPED_PACKAGES", "ModelSwitch", "make_pipeline", "make_screen", "package_path", "packages"]

log = logging.getLogger(__name__)

SHIPPED_PACKAGES = PACKAGES


def packages(settings: Settings | None = None) -> list[ModelPackage]:
    """The packages at hand, verified: those that ship, and those that an installation has trained or imported."""
    found = sorted(SHIPPED_PACKAGES.glob("*/manifest.json"))
    if settings is not None:
        found += sorted(settings.models_dir.glob("[0-9a-f]*/package/manifest.json"))
    return [ModelPackage.load(manifest.parent) for manifest in found]


def package_path(name: str, settings: Settings | None = None) -> Path:
    """A package by folder, by id (name with version, or the beginning of its hash), or `active`: the one in force.

    Without `settings` there is no installation, and what ships is in force.

    Raises:
        ValueError: there is no such package, or more than one.
    """
    if name == "active":
        return SHIPPED_PACKAGES / REFERENCE if settings is None else in_force_here(settings).folder
    for candidate in (Path(name), SHIPPED_PACKAGES / name):
        if (candidate / "manifest.json").is_file():
            return candidate
    at_hand = {package.path: package for package in packages(settings)}
    found = [
        path
        for path, package in at_hand.items()
        if name == package.name or (len(name) >= 6 and package.sha256.startswith(name))
    ]
    if len(found) != 1:
        raise ValueError(f"no model package {name!r}" if not found else f"{len(found)} packages are called {name!r}")
    return found[0]


class ModelSwitch:
    """Screens each study with the model that was in force when the study was claimed.

    The networks stay resident; another model is loaded, and verified, by the first study that is claimed after its
    promotion. A study that runs meanwhile ends with the model that it began with. One that cannot be loaded fails its
    jobs, visibly: nothing falls back to a model that is not in force.
    """

    def __init__(self, settings: Settings, pipeline: Pipeline) -> None:
        self._settings = settings
        self._pipeline = pipeline

    def __call__(self, request: ScreenRequest) -> Measurements:
        """Measure one CT."""
        if request.model is not None:
            self._take(request.model)
            self._take_shadow(request.shadow)
        return self._pipeline.screen(request)

    def _take(self, model: InForce) -> None:
        predictor = self._pipeline.predictor
        if predictor.sha256 != model.sha256:
            predictor = load_predictor(model, self._settings)
            log.info("the model in force is now %s", model.name)
        self._pipeline = replace(
            self._pipeline,
            predictor=predictor,
            device=predictor.device,
            gate_passed=model.gate_passed,
            judged_on=model.judged_on,
        )

    def _take_shadow(self, model: InForce | None) -> None:
        """The candidate in shadow beside it; one that cannot be loaded casts none, and holds no study up."""
        resident = self._pipeline.shadow
        if model is not None and resident is not None and resident.sha256 == model.sha256:
            return
        loaded = None
        if model is not None:
            try:
                loaded = load_predictor(model, self._settings)
            except Exception:
                log.exception("the model in shadow (%s) cannot be loaded; the study goes on without it", model.name)
        self._pipeline = replace(self._pipeline, shadow=loaded)


def load_predictor(model: InForce, settings: Settings) -> Predictor:
    """The networks of a model, its every byte that which was put in force.

    Raises:
        PackageError: a file is missing or altered, or the package is another one.
    """
    predictor = Predictor(model.folder, settings.device, settings.prediction_precision)
    if predictor.sha256 != model.sha256:
        raise PackageError(f"{model.folder} is not the package that was put in force ({model.name})")
    return predictor


def make_pipeline(settings: Settings, segmentation: Path | None = None, model: str | None = None) -> Pipeline:
    """The resident networks.

    Args:
        settings: of this installation.
        segmentation: a label map that takes the place of the segmentation network.
        model: one to look at, as `package_path` finds it; without it the one in force, which alone may have passed
            this site's gate.

    Raises:
        ValueError: there is no such model.
        PackageError: a package is altered, or not the one that was put in force.
    """
    supplied = SuppliedLabels(segmentation) if segmentation else None
    in_force = in_force_here(settings)
    folder = in_force.folder if model is None else package_path(model, settings)
    pipeline = Pipeline.load(settings, folder, supplied)
    is_in_force = pipeline.predictor.sha256 == in_force.sha256
    if model is None and not is_in_force:
        raise PackageError(f"{in_force.folder} is not the package that was put in force ({in_force.name})")
    return replace(pipeline, gate_passed=is_in_force and in_force.gate_passed, judged_on=in_force.judged_on)


def make_screen(settings: Settings, policy: Policy) -> Callable[[ScreenRequest], Measurements]:
    """The worker's screen function, its networks loaded and verified before the first study."""
    return ModelSwitch(settings, make_pipeline(settings))
