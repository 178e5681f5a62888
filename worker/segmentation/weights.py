"""A weights folder in TotalSegmentator's layout: where its networks lie, and that no byte of it was altered.

TotalSegmentator checks only that a folder exists. Here every file is pinned by SHA-256 in `SHA256SUMS` beside
the data set folders: ours in the repository, foreign ones written at their import by a named person (RULES
10, fault 24), with `IMPORT.json`, which says who imported what and keeps the class map that belongs to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.weight_files import CHECKPOINT, CONFIGURATION, SUMS_FILE, file_sha256
from service.domain.errors import OsteogateError
from service.settings import Settings

BUILT_IN = Path(__file__).resolve().parents[2] / "models" / "packages" / "segmentation"
IMPORT_FILE = "IMPORT.json"
NETWORK_FILES = ("plans.json", "dataset.json", CHECKPOINT.as_posix())


class WeightsError(OsteogateError):
    """The weights cannot be used; the text names the file."""


@dataclass(frozen=True)
class Task:
    """What TotalSegmentator calls a task: its two data sets that are used here, and the spacings that it gives them."""

    name: str
    coarse: int
    fine: int
    coarse_mm: float = 6.0
    fine_mm: float = 1.5

    @property
    def datasets(self) -> tuple[int, int]:
        """Coarse, fine."""
        return self.coarse, self.fine


TASKS = (Task("total", 298, 292), Task("total_v3", 837, 832))


@dataclass(frozen=True)
class WeightsFolder:
    """Two verified networks, and one hash that stands for every byte of them.

    For imported weights `task` says how TotalSegmentator uses them, and `class_maps` (data set -> class -> name) what
    their classes mean; our own networks say it themselves in dataset.json.
    """

    coarse: Path
    fine: Path
    sha256: str
    task: Task | None = None
    class_maps: Mapping[int, Mapping[int, str]] = field(default_factory=dict)
    imported: Mapping[str, Any] = field(default_factory=dict)  # IMPORT.json

    @property
    def name(self) -> str:
        """How results name these weights."""
        networks = f"nnU-Net {self.coarse.parent.name.split('_')[0]} + {self.fine.parent.name.split('_')[0]}"
        return networks if self.task is None else f"{networks} ({self.task.name})"


def weights_in_force(settings: Settings) -> Path | None:
    """The site's segmentation weights where it has some, else None: the built-in networks."""
    if settings.weights_dir is not None:
        return settings.weights_dir
    imported = settings.data_dir / "weights"
    return imported if any(imported.glob("[!.]*")) else None  # an unfinished import is refused, not passed over


def verify(root: Path) -> WeightsFolder:
    """Find both networks below `root` and check every file of theirs; WeightsError names what is missing or
    altered.
    """
    sums = read_sums(root / SUMS_FILE)
    task = find_task(root)
    coarse, fine = (network_folder(root, number) for number in task.datasets)
    needed = [folder / name for folder in (coarse, fine) for name in NETWORK_FILES]
    imported = (root / IMPORT_FILE).exists()
    for path in [*needed, *([root / IMPORT_FILE] if imported else [])]:
        if path.relative_to(root).as_posix() not in sums:
            raise WeightsError(f"{path} is not pinned in {SUMS_FILE}: import the weights again.")
    check_sums(root, sums)
    lines = "\n".join(f"{pinned}  {relative}" for relative, pinned in sorted(sums.items()))
    sha256 = hashlib.sha256(lines.encode()).hexdigest()
    if not imported:
        return WeightsFolder(coarse, fine, sha256)
    manifest = _read_manifest(root, task)
    return WeightsFolder(coarse, fine, sha256, task, _class_maps(manifest), manifest)


def find_task(root: Path) -> Task:
    """The task whose two data sets lie below `root`.

    Raises:
        WeightsError: one is missing, they belong to different tasks, or there are several tasks.
    """
    found = {task: [number for number in task.datasets if any(root.glob(f"Dataset{number}_*"))] for task in TASKS}
    complete = [task for task, numbers in found.items() if len(numbers) == len(task.datasets)]
    if len(complete) > 1:
        raise WeightsError(f"{root} holds the networks of {' and '.join(task.name for task in complete)}: keep one.")
    if complete:
        return complete[0]
    begun = {task: numbers for task, numbers in found.items() if numbers}
    if len(begun) > 1:
        names = " and ".join(f"Dataset{n} ({task.name})" for task, numbers in begun.items() for n in numbers)
        raise WeightsError(f"{root}: {names} do not belong together, their class maps differ.")
    task = next(iter(begun), TASKS[0])
    missing = next(number for number in task.datasets if number not in found[task])
    need = " and ".join(f"Dataset{number}" for number in task.datasets)
    raise WeightsError(f"{root / f'Dataset{missing}_'}* is missing: {task.name} needs {need}.")


def network_folder(root: Path, dataset: int) -> Path:
    """The folder of one trained network; WeightsError where there is none, or more than one."""
    found = sorted(root.glob(f"Dataset{dataset}_*/*__nnUNetPlans__{CONFIGURATION}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise WeightsError(f"{found[1]}: more than one trainer's weights for Dataset{dataset}.")
    raise WeightsError(f"{root / f'Dataset{dataset}_'}*: no {CONFIGURATION} network in it.")


def read_sums(path: Path) -> Mapping[str, str]:
    """Relative path -> SHA-256 from a list as `sha256sum` writes it."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is missing or unreadable: unpinned weights are not used.") from error
    sums: dict[str, str] = {}
    for line in lines:
        pinned, separator, relative = line.partition("  ")
        if not separator or len(pinned) != 64 or ".." in Path(relative).parts or Path(relative).is_absolute():
            raise WeightsError(f"{path} is damaged: {line[:80]!r}.")
        sums[relative] = pinned.lower()
    return sums


def check_sums(root: Path, sums: Mapping[str, str]) -> None:
    """WeightsError names the first file that is missing or has another SHA-256."""
    for relative, pinned in sums.items():
        path = root / relative
        if not path.is_file():
            raise WeightsError(f"{path} is missing: the weights are incomplete.")
        if file_sha256(path) != pinned:
            raise WeightsError(f"{path} is altered: its SHA-256 is not the pinned one.")


def _read_manifest(root: Path, task: Task) -> Mapping[str, Any]:
    path = root / IMPORT_FILE
    try:
        manifest: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        named = str(manifest["task"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} does not read ({error}).") from error
    if named != task.name:
        raise WeightsError(f"{path} is of {named}, the networks beside it are of {task.name}.")
    return manifest


def _class_maps(manifest: Mapping[str, Any]) -> Mapping[int, Mapping[int, str]]:
    maps: Mapping[str, Mapping[str, str]] = manifest["class_maps"]
    return {int(number): {int(index): name for index, name in names.items()} for number, names in maps.items()}
