"""TotalSegmentator's published weights -> a weights folder of ours, pinned by SHA-256 at their first import.

    with prepare([Path("Dataset292_....zip"), Path("Dataset298_....zip")], weights_dir) as prepared:
        prepared.install(by="Dr. Sato", at=now)

Everything is unpacked, checked and loaded once in a folder of its own inside the weights folder; the weights in force
change only when all of it holds. No sums are published for these archives, so the first import, by a named person, sets
them; or a site's list does. From then on other bytes under the same names are refused.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO

import torch

from models.weight_files import CHECKPOINT, CONFIGURATION, SUMS_FILE, file_sha256, write_sums
from service.version import software_version
from worker.segmentation.network import load_network
from worker.segmentation.theirs import class_map, folder_name
from worker.segmentation.weights import (
    IMPORT_FILE,
    NETWORK_FILES,
    TASKS,
    Task,
    WeightsError,
    WeightsFolder,
    find_task,
    network_folder,
    read_sums,
    verify,
)

PLANS = f"__nnUNetPlans__{CONFIGURATION}"  # the trainer's name stands before it
MOST_BYTES = {"plans.json": 64 << 20, "dataset.json": 64 << 20, CHECKPOINT.as_posix(): 4 << 30}
_DATASET = re.compile(r"Dataset(\d{3})_[\w.-]+")


@dataclass(frozen=True)
class Prepared:
    """Weights that were unpacked and found good, not yet in force."""

    stage: Path
    into: Path
    task: Task
    archives: Mapping[str, str]  # name -> SHA-256 of each source that was one file

    def install(self, *, by: str, at: datetime) -> WeightsFolder:
        """Put them in the place of the weights in force; `by` is the person who answers for where they come from.

        The sums go first and come back last: killed in between, the folder is refused until it is imported again.
        """
        manifest = {
            "task": self.task.name,
            "imported_by": by,
            "imported_at": at.isoformat(timespec="seconds"),
            "software": software_version(),
            "archives": dict(self.archives),
            "class_maps": {number: dict(class_map(self.task, number)) for number in self.task.datasets},
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (self.stage / IMPORT_FILE).write_text(text, encoding="utf-8")
        write_sums(self.stage)
        (self.into / SUMS_FILE).unlink(missing_ok=True)
        for old in self.into.glob("Dataset*"):
            shutil.rmtree(old)
        for part in sorted(self.stage.glob("Dataset*")):
            part.replace(self.into / part.name)
        for name in (IMPORT_FILE, SUMS_FILE):
            (self.stage / name).replace(self.into / name)
        return verify(self.into)


@contextmanager
def prepare(
    sources: Sequence[Path], into: Path, *, site_sums: Path | None = None, replace: bool = False
) -> Iterator[Prepared]:
    """Unpack and check archives, or folders in TotalSegmentator's layout, beside the weights folder `into`.

    Raises:
        WeightsError: a source is incomplete, altered, of another data set or tries to write elsewhere; its class map
            is not its task's; or its bytes are not those pinned before (unless `replace`).
    """
    into.mkdir(parents=True, exist_ok=True)
    with _tidy(into), tempfile.TemporaryDirectory(prefix=".import-", dir=into) as temporary:
        stage = Path(temporary)
        archives = {source.name: file_sha256(source) for source in sources if source.is_file()}
        listed = None if site_sums is None else read_sums(site_sums)
        if listed is not None:
            _check_archives(archives, listed)
        for source in sources:
            _bring(source, stage)
        _complete_from(into, stage)
        try:
            task = find_task(stage)
            _check_files(stage, listed, archives)
            if not replace:
                _check_pins(stage, into)
            _check_networks(stage, task)
        except WeightsError as error:  # told without the folder that is gone by then
            text = str(error).replace(f"{stage}/", "").replace(str(stage), "what was given")
            raise WeightsError(text) from error
        yield Prepared(stage, into, task, archives)


@contextmanager
def _tidy(folder: Path) -> Iterator[None]:
    """Leave no empty folder behind when nothing was imported."""
    try:
        yield
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


# ------------------------------------------------------------------------------------------------- unpacking


def _bring(source: Path, stage: Path) -> None:
    """Copy the networks of one archive or folder; what else lies there (logs, plots) is left."""
    if source.is_dir():
        brought = _copy_folder(source, stage)
    elif source.is_file():
        brought = _unpack(source, stage)
    else:
        raise WeightsError(f"{source} does not exist.")
    if not brought:
        known = ", ".join(f"Dataset{number}" for task in TASKS for number in task.datasets)
        raise WeightsError(f"{source}: none of the data sets that are used here ({known}) is in it.")


def _copy_folder(source: Path, stage: Path) -> int:
    root = source.parent if _DATASET.fullmatch(source.name) else source
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    brought = 0
    for path in files:
        wanted = _wanted(PurePosixPath(path.relative_to(root).as_posix()))
        if wanted is not None:
            with path.open("rb") as stream:
                _place(stream, stage / wanted, source)
            brought += 1
    return brought


def _unpack(source: Path, stage: Path) -> int:
    brought = 0
    try:
        with zipfile.ZipFile(source) as archive:
            for member in archive.infolist():
                _check_member(member, source)
            for member in archive.infolist():
                wanted = _wanted(PurePosixPath(member.filename))
                if wanted is None or member.is_dir():
                    continue
                _check_size(member, wanted, source)
                with archive.open(member) as stream:  # reading to the end checks the CRC
                    _place(stream, stage / wanted, source)
                brought += 1
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise WeightsError(f"{source} is incomplete or altered ({error}).") from error
    return brought


def _check_member(member: zipfile.ZipInfo, source: Path) -> None:
    """Refuse the whole archive when one name in it points out of the folder (zip slip), or is a link."""
    name = member.filename
    outside = name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name or "\0" in name
    if outside or stat.S_ISLNK(member.external_attr >> 16):
        raise WeightsError(f"{source}: {name!r} points out of the archive; nothing was unpacked.")


def _check_size(member: zipfile.ZipInfo, wanted: Path, source: Path) -> None:
    most = next(size for name, size in MOST_BYTES.items() if wanted.as_posix().endswith(name))
    if member.file_size > most:
        raise WeightsError(f"{source}: {member.filename} would take {member.file_size} bytes; at most {most} are read.")


def _wanted(path: PurePosixPath) -> Path | None:
    """<data set>/<trainer>__nnUNetPlans__3d_fullres/<file> of a data set of ours; None for anything else.

    A folder above the data set's own (an archive of several) is passed over.
    """
    parts = path.parts
    for at, part in enumerate(parts):
        named = _DATASET.fullmatch(part)
        if named and int(named[1]) in {number for task in TASKS for number in task.datasets}:
            inside = parts[at + 1 :]
            if len(inside) > 1 and inside[0].endswith(PLANS) and "/".join(inside[1:]) in NETWORK_FILES:
                return Path(*parts[at:])
    return None


def _place(stream: IO[bytes], path: Path, source: Path) -> None:
    if path.exists():
        raise WeightsError(f"{source}: {path.name} of {path.parts[-3]} comes twice.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)


def _complete_from(into: Path, stage: Path) -> None:
    """Archives come one at a time, too: the other network of the same task may be in force already."""
    numbers = {int(path.name[7:10]) for path in stage.glob("Dataset*")}
    for task in TASKS:
        lacking = [number for number in task.datasets if number not in numbers]
        if len(lacking) == 1 and any(into.glob(f"Dataset{lacking[0]}_*")) and (into / IMPORT_FILE).is_file():
            verify(into)
            folder = network_folder(into, lacking[0])
            shutil.copytree(folder, stage / folder.relative_to(into))


# -------------------------------------------------------------------------------------------------- checking


def _check_archives(archives: Mapping[str, str], listed: Mapping[str, str]) -> None:
    for name, sha256 in archives.items():
        if name in listed and listed[name] != sha256:
            raise WeightsError(f"{name} is altered: its SHA-256 is not the one in the site's list.")


def _check_files(stage: Path, listed: Mapping[str, str] | None, archives: Mapping[str, str]) -> None:
    """With a site's list: each file is in it, or came in an archive that is."""
    if listed is None or (archives and all(name in listed for name in archives)):
        return
    for path in _files(stage):
        relative = path.relative_to(stage).as_posix()
        if relative not in listed:
            raise WeightsError(f"{relative} is not in the site's list.")
        if listed[relative] != file_sha256(path):
            raise WeightsError(f"{relative} is altered: its SHA-256 is not the one in the site's list.")


def _check_pins(stage: Path, into: Path) -> None:
    """The same file was pinned before, with other bytes: somebody must say that this is wanted."""
    if not (into / SUMS_FILE).is_file():
        return
    pinned = read_sums(into / SUMS_FILE)
    for path in _files(stage):
        relative = path.relative_to(stage).as_posix()
        if relative in pinned and pinned[relative] != file_sha256(path):
            text = f"{relative} is not the file that was pinned at its first import; --replace takes it all the same."
            raise WeightsError(text)


def _check_networks(stage: Path, task: Task) -> None:
    """Both load, as weights and nothing else, and mean what the task says."""
    for number in task.datasets:
        folder = network_folder(stage, number)
        for name in NETWORK_FILES:
            if not (folder / name).is_file():
                raise WeightsError(f"{folder.relative_to(stage) / name} is missing: the weights are incomplete.")
        if folder.parent.name != folder_name(number):
            raise WeightsError(f"{folder.parent.name} is not {folder_name(number)}, which TotalSegmentator uses.")
        load_network(folder, torch.device("cpu"), class_map(task, number))


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())
