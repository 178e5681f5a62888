"""What a result leaves in its folder for the objects that are made of it: its slices, its labels, SEG and SR.

The worker writes `sources.json` before it measures and `labels.npz` when it has; the steward reads both and adds
`seg.dcm` and `sr.dcm`. Each file is complete and on the disk under its name, or not there.
"""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.dicom.spool import sync_folder

SOURCES = "sources.json"
LABELS = "labels.npz"


def keep_sources(folder: Path, names: Sequence[str]) -> None:
    """Remember the files that were measured, relative to the spool.

    Slices that arrive afterwards join the series' rows, but never this list.
    """
    write_durably(folder / SOURCES, json.dumps(list(names)).encode())


def sources(folder: Path) -> list[str]:
    """The files that were measured, relative to the spool.

    Raises:
        OSError, ValueError: the list is absent or damaged.
    """
    names = json.loads((folder / SOURCES).read_text(encoding="utf-8"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{SOURCES} is no list of names")
    return names


def keep_labels(
    folder: Path, labels: NDArray[np.uint8], wanted: Collection[int], overlaps: Mapping[int, float] | None = None
) -> bool:
    """Keep uint8 [k, j, i] labels on the sorted slices where any of the wanted ids is among them; whether it is.

    `overlaps`: the Dice that a network expects of each of its labels, where one outlined them.
    """
    values: set[int] = set()
    for plane in labels:  # by slice: a whole volume would be widened to 8 bytes a voxel
        values.update(np.flatnonzero(np.bincount(plane.ravel(), minlength=256)).tolist())
    if values.isdisjoint(wanted):
        return False
    content = io.BytesIO()
    expected = np.array(sorted((overlaps or {}).items()), dtype=np.float64).reshape(-1, 2)
    np.savez_compressed(content, labels=labels, overlaps=expected)
    write_durably(folder / LABELS, content.getvalue())
    return True


def labels(folder: Path) -> NDArray[np.uint8]:
    """The labels, uint8 [k, j, i].

    Raises:
        OSError, ValueError, KeyError, zipfile.BadZipFile: the file is absent or damaged.
    """
    with (folder / LABELS).open("rb") as file, np.load(file, allow_pickle=False) as kept:
        return np.asarray(kept["labels"], dtype=np.uint8)


def overlaps(folder: Path) -> dict[int, float]:
    """The Dice that a network expects of each label that was kept; empty where none outlined them.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: the file is absent or damaged.
    """
    with (folder / LABELS).open("rb") as file, np.load(file, allow_pickle=False) as kept:
        expected = kept["overlaps"] if "overlaps" in kept.files else np.zeros((0, 2))  # none in earlier versions' files
    return {int(label): float(overlap) for label, overlap in expected}


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that is complete and on the disk under its name, or not there."""
    with pending(path, content) as publish:
        publish()


@contextmanager
def pending(path: Path, content: bytes | memoryview) -> Iterator[Callable[[], None]]:
    """The content, on the disk beside `path`, and what gives it that name; without that call it disappears."""
    temp = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")

    def publish() -> None:
        temp.replace(path)
        sync_folder(path.parent)

    try:
        with temp.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield publish
    finally:
        temp.unlink(missing_ok=True)
