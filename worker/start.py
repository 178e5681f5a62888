"""Which model package and which weights are in force, and the resident pipeline made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from models.package import ModelPackage
from service.domain.policy import Policy
from service.domain.result import Measurements
from service.settings import Settings
from worker.pipeline import Pipeline, ScreenInput
from worker.segmentation import SuppliedLabels

SHIPPED_PACKAGES = Path(__file__).resolve().parent.parent / "models" / "packages"
REFERENCE = "reference-0.4.0"


def packages() -> list[ModelPackage]:
    """The packages at hand, verified."""
    return [ModelPackage.load(manifest.parent) for manifest in sorted(SHIPPED_PACKAGES.glob("*/manifest.json"))]


def package_path(name: str) -> Path:
    """A package by folder, by id, or `active`: the one in force (here: the shipped one).

    Raises:
        ValueError: there is no such package.
    """
    if name == "active":
        name = REFERENCE
    for candidate in (Path(name), SHIPPED_PACKAGES / name):
        if (candidate / "manifest.json").is_file():
            return candidate
    raise ValueError(f"no model package {name!r}")


def make_pipeline(settings: Settings, segmentation: Path | None = None) -> Pipeline:
    """The resident networks; a supplied label map takes the place of the segmentation network."""
    supplied = SuppliedLabels(segmentation) if segmentation else None
    return Pipeline.load(settings, package_path("active"), supplied)


def make_screen(settings: Settings, policy: Policy) -> Callable[[ScreenInput], Measurements]:
    """The worker's screen function, its networks loaded and verified before the first study."""
    return make_pipeline(settings).screen
