"""Which model is in force, as a job's key names it (this service reads manifests, never weights)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import models.package

PACKAGES = Path(models.package.__file__).parent / "packages"


def shipped_model_key(packages: Path = PACKAGES) -> str:
    """SHA-256 over the shipped packages' manifests, which hold the hashes of their weights.

    A release with another model makes new job keys; the same study resent to the same release makes none.
    """
    digest = hashlib.sha256()
    for manifest in sorted(packages.glob(f"*/{models.package.MANIFEST}")):
        digest.update(manifest.read_bytes())
    return digest.hexdigest()


def manifest_in_force(packages: Path = PACKAGES) -> tuple[models.package.Manifest, str] | None:
    """The manifest of the model in force and its SHA-256, which names the package; None where there is none.

    Here the newest shipped one: a registry of models takes this function's place.

    Raises:
        PackageError: the manifest cannot be read.
    """
    found = sorted(packages.glob(f"*/{models.package.MANIFEST}"))
    if not found:
        return None
    raw = found[-1].read_bytes()
    return models.package.Manifest.from_json(raw.decode("utf-8")), hashlib.sha256(raw).hexdigest()
