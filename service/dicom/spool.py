"""The durable spool: bytes are on the disk, under our own name, before anybody hears Success (RULES 1).

Order of events: a temp file on the spool's own filesystem, fsync, rename, fsync of the directory. A crash at any
point leaves either nothing, or a stale temp file that `sweep` removes, or a complete file. Names are the file's
own SHA-256, never a peer's UID: nothing a peer sends can choose a path, and the same bytes sent twice are one file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TEMP_FOLDER = "incoming"
STALE_SECONDS = 600.0  # a temp file lives for milliseconds; another listener on this spool may be writing one
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Buffer = bytes | memoryview
Step = Callable[[str], None]
Write = Callable[[int, memoryview], int]


class SpoolError(Exception):
    """The bytes are not durable; the sender must keep them and may try again."""


class DiskFullError(SpoolError):
    """Free space is below the floor, or ran out while writing."""


@dataclass(frozen=True, slots=True)
class SpoolFile:
    """One durable file."""

    path: str  # relative to the spool, POSIX
    sha256: str
    size_bytes: int


def _no_step(_name: str) -> None:
    """Default `step`: nothing happens between the steps of a write."""


class Spool:
    """A folder of received instances.

    `write_bytes` and `step` are seams for fault tests: the first stands for os.write, the second is told each
    step's name ("created", "written", "synced", "renamed", "durable") after it happened.
    """

    def __init__(
        self, root: Path, disk_floor_bytes: int, *, write_bytes: Write = os.write, step: Step = _no_step
    ) -> None:
        self.root = root
        self._disk_floor_bytes = disk_floor_bytes
        self._write_bytes = write_bytes
        self._step = step
        self._temp = root / TEMP_FOLDER
        self._temp.mkdir(parents=True, exist_ok=True)
        self._known_folders: set[Path] = set()

    def write(self, pieces: Iterable[Buffer]) -> SpoolFile:
        """Make `pieces` one durable file. Raises SpoolError, and then leaves no temp file behind."""
        views = [memoryview(piece).cast("B") for piece in pieces]
        size_bytes = sum(len(view) for view in views)
        temp = self._temp / f"{os.getpid()}-{secrets.token_hex(8)}.part"
        try:
            self.require_room(size_bytes)
            sha256 = self._write_temp(temp, views)
            relative = f"{sha256[:2]}/{sha256[2]}/{sha256}.dcm"
            self._publish(temp, self.root / relative)
        except BaseException as error:
            with suppress(OSError):
                temp.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            self._known_folders.clear()  # somebody may have removed one
            kind = DiskFullError if error.errno in _FULL else SpoolError
            raise kind(f"spool: {error.strerror or error}") from error
        return SpoolFile(relative, sha256, size_bytes)

    def require_room(self, size_bytes: int = 0) -> None:
        """Raise DiskFullError where `size_bytes` more would leave less than the floor."""
        try:
            disk = os.statvfs(self.root)
        except OSError as error:
            raise SpoolError(f"spool: {error.strerror or error}") from error
        if disk.f_bavail * disk.f_frsize - size_bytes < self._disk_floor_bytes:
            raise DiskFullError("spool: free disk space is below its floor")

    def discard(self, file: SpoolFile) -> None:
        """Remove a file whose instance was refused, so that no row ever names it."""
        with suppress(OSError):
            (self.root / file.path).unlink(missing_ok=True)

    def sweep(self, *, older_than_seconds: float = STALE_SECONDS) -> int:
        """Remove temp files that a crash left behind; returns how many."""
        removed = 0
        for temp in self._temp.glob("*.part"):
            with suppress(OSError):
                if time.time() - temp.stat().st_mtime >= older_than_seconds:
                    temp.unlink()
                    removed += 1
        return removed

    def _write_temp(self, temp: Path, views: list[memoryview]) -> str:
        digest = hashlib.sha256()
        descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            self._step("created")
            for view in views:
                digest.update(view)
                rest = view
                while rest:
                    rest = rest[self._write_bytes(descriptor, rest) :]
            self._step("written")
            os.fsync(descriptor)
            self._step("synced")
        finally:
            os.close(descriptor)
        return digest.hexdigest()

    def _publish(self, temp: Path, final: Path) -> None:
        self._ensure_folder(final.parent)
        temp.replace(final)
        self._step("renamed")
        sync_folder(final.parent)
        self._step("durable")

    def _ensure_folder(self, folder: Path) -> None:
        """Make the fan-out folder, its parents' entries durable too."""
        if folder in self._known_folders:
            return
        for made in (folder.parent, folder):
            made.mkdir(exist_ok=True)
            sync_folder(made.parent)
        self._known_folders.add(folder)


def sync_folder(folder: Path) -> None:
    """Make what was renamed or made in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
