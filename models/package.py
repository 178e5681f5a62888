"""A model package: a folder that says what a network is, what it was made from, and proves it unaltered.

    manifest.json         what it predicts, what it was trained on, how well, and the hashes below
    weights.safetensors   fp16 (batch-norm statistics fp32); with several networks a file for each
    model_card.md         for people
    config.json           the whole training configuration
    readout.json          how the network's answers and the slabs' measures are weighed (where the package does)
    training.json         the curves
    curves.png            and their picture

Format 5 may tell scanners apart, format 4 may predict BMD alone, format 3 may have a readout; format 2, which names its
networks (`members`), and format 1, which had one network for both targets, are still read.
This module imports no torch, so that the service can list, import and promote packages. Nothing in a package is
executable: weights are safetensors, never pickles (RULES.md 11).
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
MODEL_CARD = "model_card.md"
READOUT = "readout.json"
FORMAT = 5
READ_FORMATS = (1, 2, 3, 4, 5)
TARGETS = ("bmd_g_cm2", "tbs")
BMD_ALONE = TARGETS[:1]  # where the site's DXA tells no TBS
DENSITOMETER = "GE Lunar"  # the maker whose BMD a package predicts, unless it says otherwise (Yoshida 2023)
TestTime = Literal["none", "exchange-sides"]
_KEEP_FP32 = ("running_mean", "running_var", "target_mean", "target_std")
_SKIP = ("num_batches_tracked",)


class PackageError(ValueError):
    """A model package is missing, incomplete or altered; the text names the file."""


@dataclass(frozen=True)
class Interval:
    """Half-widths of the 90 % prediction interval of the mean over so many vertebrae (conformal)."""

    levels: int
    bmd_g_cm2: float
    tbs: float | None  # None: the package predicts BMD alone


@dataclass(frozen=True)
class Member:
    """One network of the package. The package's answer for a target is the mean over the members that predict it."""

    file: str
    fold: int  # of the cross-validation; 0 where there is one
    targets: tuple[str, ...]
    steps: int  # really done
    best_epoch: int  # the one kept


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says; `files` are SHA-256 of everything else in the folder."""

    name: str
    version: str
    architecture: str  # "resnet50"
    targets: tuple[str, ...]  # TARGETS or BMD_ALONE
    input: Mapping[str, Any]  # models.inputs.InputConfig
    training: Mapping[str, Any]  # configuration, provenance, cohort, steps really done
    synthetic_only: bool  # trained and judged on digital patients only
    metrics: Mapping[str, Any]
    intervals: tuple[Interval, ...]  # of one to four vertebrae
    interval_level: float
    created: str  # ISO 8601, UTC
    files: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT
    members: tuple[Member, ...] = ()
    test_time: TestTime = "none"  # "exchange-sides": the mean over the slabs and the slabs in reversed order
    finished: bool = True  # False: made from a run that can be resumed

    @classmethod
    def from_json(cls, text: str) -> Self:
        try:
            values = json.loads(text)
            values["targets"] = tuple(values["targets"])
            values["intervals"] = tuple(Interval(**one) for one in values["intervals"])
            members = [Member(**one | {"targets": tuple(one["targets"])}) for one in values.pop("members", ())]
            manifest = cls(**values, members=tuple(members))
        except (ValueError, KeyError, TypeError) as error:
            raise PackageError(f"{MANIFEST} is not a manifest: {error}") from error
        if manifest.format not in READ_FORMATS:
            known = ", ".join(map(str, READ_FORMATS))
            raise PackageError(f"{MANIFEST} has format {manifest.format}, this program reads {known}")
        if manifest.targets not in (TARGETS, BMD_ALONE):
            raise PackageError(f"{MANIFEST}: a package predicts {' and '.join(TARGETS)}, or {BMD_ALONE[0]} alone")
        widths = [width for one in manifest.intervals for width in (one.bmd_g_cm2, one.tbs) if width is not None]
        if not all(math.isfinite(width) and width >= 0 for width in widths) or not 0 < manifest.interval_level < 1:
            raise PackageError(f"{MANIFEST}: an interval's half-width is 0 or more, and its level within 0 and 1")
        if any((one.tbs is None) != (manifest.targets == BMD_ALONE) for one in manifest.intervals):
            raise PackageError(f"{MANIFEST}: its intervals are not those of {' and '.join(manifest.targets)}")
        if not manifest.members:
            manifest = replace(manifest, members=(manifest.single(),))
        if {target for member in manifest.members for target in member.targets} != set(manifest.targets):
            raise PackageError(f"{MANIFEST}: the members do not predict {', '.join(manifest.targets)}")
        return manifest

    def single(self) -> Member:
        """The one network of a package whose manifest names no members: it predicts every target."""
        steps, best_epoch = (int(self.training.get(name, 0)) for name in ("steps_done", "best_epoch"))
        return Member(WEIGHTS, 0, self.targets, steps, best_epoch)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @property
    def densitometer(self) -> str:
        """The maker whose BMD it predicts; what does not say was made before there was a choice."""
        return str(self.training.get("cohort", {}).get("densitometer", DENSITOMETER))

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
        for required in (*(member.file for member in manifest.members), MODEL_CARD):
            if required not in manifest.files:
                raise PackageError(f"{MANIFEST} gives no hash for {required}")
        for name, expected in manifest.files.items():
            _verify(path, name, expected)
        return cls(path, manifest, hashlib.sha256(raw).hexdigest())

    @property
    def name(self) -> str:
        return f"{self.manifest.name}-{self.manifest.version}"

    def weights(self, file: str = WEIGHTS) -> dict[str, npt.NDArray[np.float32]]:
        """A member's tensors by name, as float32."""
        tensors = load_file(self.path / file)
        return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}

    def model_card(self) -> str:
        return (self.path / MODEL_CARD).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Scanner:
    """What a CT was made on."""

    name: str = ""  # by `scanner_name`
    digital: bool = False  # no machine, whatever it is called: the CT is a digital patient's


NOT_TOLD = Scanner()


def scanner_name(maker: str | None, model: str | None) -> str:
    """A scanner as packages and cohorts name it, "canon Aquilion ONE"; "" where its model is not told."""
    words = (model or "").split()
    return " ".join((maker or "unknown", *words)) if words else ""


def write_package(
    path: Path,
    manifest: Manifest,
    tensors: Mapping[str, npt.NDArray[Any]],
    model_card: str,
    extra: Mapping[str, str | bytes] | None = None,
) -> ModelPackage:
    """Write a package of one network that predicts every target."""
    single = replace(manifest, members=(manifest.single(),))
    return write_members(path, single, {WEIGHTS: tensors}, model_card, extra)


def write_members(
    path: Path,
    manifest: Manifest,
    tensors: Mapping[str, Mapping[str, npt.NDArray[Any]]],
    model_card: str,
    extra: Mapping[str, str | bytes] | None = None,
) -> ModelPackage:
    """Write a package beside `path`, then move it there in one step.

    `tensors` are those of each member by its file; `extra` are further files.

    Raises:
        PackageError: a package is at `path` (only an unfinished one gives way), or a weight does not fit fp16.
    """
    draft = path.with_name(f".{path.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for file, network in tensors.items():
        save_file({name: _stored(name, one) for name, one in network.items() if _is_kept(name)}, draft / file)
        (draft / file).chmod(0o644)  # safetensors writes for the owner alone; the worker may be another user
    for name, content in {MODEL_CARD: model_card, **(extra or {})}.items():
        (draft / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    files = {file.name: _sha256(file) for file in sorted(draft.iterdir())}
    complete = replace(manifest, files=files, format=FORMAT)
    (draft / MANIFEST).write_text(complete.to_json(), encoding="utf-8")
    if path.exists():
        refuse_to_overwrite(path)
        shutil.rmtree(path)
    draft.replace(path)
    return ModelPackage.load(path)


def refuse_to_overwrite(path: Path) -> None:
    """Only a package made from an unfinished run gives way, to what its run makes next.

    Raises:
        PackageError: anything else is at `path`.
    """
    if path.exists() and not (path.is_dir() and (path / MANIFEST).is_file() and not _manifest(path).finished):
        raise PackageError(f"{path} exists: a package is never overwritten")


def _manifest(path: Path) -> Manifest:
    return Manifest.from_json((path / MANIFEST).read_text(encoding="utf-8", errors="replace"))


def _is_kept(name: str) -> bool:
    return not name.endswith(_SKIP)


def _stored(name: str, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """fp16 for weights; statistics stay fp32, a variance may exceed what fp16 holds."""
    kind = np.float32 if name.endswith(_KEEP_FP32) else np.float16
    with np.errstate(over="ignore"):  # it becomes infinite, and is refused by name
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
