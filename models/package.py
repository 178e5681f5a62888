"""A model package: a folder that says what a network is, what it was made from, and proves it unaltered.

    manifest.json         what it predicts, what it was trained on, how well, and the hashes below
    weights.safetensors   fp16 (batch-norm statistics fp32)
    model_card.md         for people
    training.json         the curves

This module imports no torch, so that the service can list, import and promote packages. Nothing in a package
is executable: weights are safetensors, never pickles (RULES.md 11).
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
MODEL_CARD = "model_card.md"
FORMAT = 1
TARGETS = ("bmd_g_cm2", "tbs")
_KEEP_FP32 = ("running_mean", "running_var", "target_mean", "target_std")
_SKIP = ("num_batches_tracked",)


class PackageError(ValueError):
    """A model package is missing, incomplete or altered; the text names the file."""


@dataclass(frozen=True)
class Interval:
    """Half-widths of the 90 % prediction interval of the mean over so many vertebrae (split-conformal)."""

    levels: int
    bmd_g_cm2: float
    tbs: float


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says; `files` are SHA-256 of everything else in the folder."""

    name: str
    version: str
    architecture: str  # "resnet50"
    targets: tuple[str, ...]
    input: Mapping[str, Any]  # models.inputs.InputConfig
    training: Mapping[str, Any]  # configuration, provenance, cohort, steps really done
    synthetic_only: bool  # trained and judged on digital patients only
    metrics: Mapping[str, Any]
    intervals: tuple[Interval, ...]  # of one to four vertebrae
    interval_level: float
    created: str  # ISO 8601, UTC
    files: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def from_json(cls, text: str) -> Self:
        try:
            values = json.loads(text)
            values["targets"] = tuple(values["targets"])
            values["intervals"] = tuple(Interval(**one) for one in values["intervals"])
            manifest = cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise PackageError(f"{MANIFEST} is not a manifest: {error}") from error
        if manifest.format != FORMAT:
            raise PackageError(f"{MANIFEST} has format {manifest.format}, this program reads {FORMAT}")
        return manifest

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    def interval(self, levels: int) -> Interval:
        """The half-widths for the mean over `levels` vertebrae; the widest where it was not calibrated."""
        for one in self.intervals:
            if one.levels == levels:
                return one
        return max(self.intervals, key=lambda one: one.bmd_g_cm2)


@dataclass(frozen=True)
class ModelPackage:
    """A verified package on disk. `sha256` is the manifest's hash: it covers every file's hash."""

    path: Path
    manifest: Manifest
    sha256: str

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the manifest and verify every file against it; PackageError names the first that differs."""
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            raise PackageError(f"{manifest_path} is missing: not a model package")
        raw = manifest_path.read_bytes()
        manifest = Manifest.from_json(raw.decode("utf-8", errors="replace"))
        for required in (WEIGHTS, MODEL_CARD):
            if required not in manifest.files:
                raise PackageError(f"{MANIFEST} gives no hash for {required}")
        for name, expected in manifest.files.items():
            _verify(path, name, expected)
        return cls(path, manifest, hashlib.sha256(raw).hexdigest())

    @property
    def name(self) -> str:
        return f"{self.manifest.name}-{self.manifest.version}"

    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        """The tensors by name, as float32."""
        tensors = load_file(self.path / WEIGHTS)
        return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}

    def model_card(self) -> str:
        return (self.path / MODEL_CARD).read_text(encoding="utf-8")


def write_package(
    path: Path,
    manifest: Manifest,
    tensors: Mapping[str, npt.NDArray[Any]],
    model_card: str,
    extra: Mapping[str, str] | None = None,
) -> ModelPackage:
    """Write a package beside `path`, then move it there in one step; `extra` are further text files."""
    draft = path.with_name(f".{path.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    stored = {name: _stored(name, tensor) for name, tensor in tensors.items() if _is_kept(name)}
    save_file(stored, draft / WEIGHTS)
    (draft / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone; the worker may be another user
    for name, text in {MODEL_CARD: model_card, **(extra or {})}.items():
        (draft / name).write_text(text, encoding="utf-8")
    files = {file.name: _sha256(file) for file in sorted(draft.iterdir())}
    complete = Manifest(**{**_fields(manifest), "files": files})
    (draft / MANIFEST).write_text(complete.to_json(), encoding="utf-8")
    if path.exists():
        raise PackageError(f"{path} exists: a package is never overwritten")
    draft.replace(path)
    return ModelPackage.load(path)


def _fields(manifest: Manifest) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}


def _is_kept(name: str) -> bool:
    return not name.endswith(_SKIP)


def _stored(name: str, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """fp16 for weights; statistics stay fp32, a variance may exceed what fp16 holds."""
    kind = np.float32 if name.endswith(_KEEP_FP32) else np.float16
    stored = np.ascontiguousarray(tensor.astype(kind))
    if not np.isfinite(stored).all():
        raise PackageError(f"{name} holds values that {kind.__name__} cannot")
    return stored


def _verify(folder: Path, name: str, expected: str) -> None:
    if Path(name).name != name:
        raise PackageError(f"{MANIFEST} names a file outside the package: {name!r}")
    file = folder / name
    if not file.is_file():
        raise PackageError(f"{file} is missing")
    if _sha256(file) != expected:
        raise PackageError(f"{file} was altered: its SHA-256 is not the one in {MANIFEST}")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
