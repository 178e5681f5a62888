"""The spool: our names, durable or nothing, no litter."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from service.dicom.spool import DiskFullError, Spool, SpoolError
from tests.service.dicom.harness import temp_files


def test_a_file_is_named_after_its_content(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 0)
    file = spool.write((b"one", memoryview(b"two")))
    assert (tmp_path / file.path).read_bytes() == b"onetwo"
    assert Path(file.path).stem == file.sha256
    assert file.size_bytes == 6
    assert len(Path(file.path).parts) == 3
    assert spool.write((b"onetwo",)) == file
    assert temp_files(tmp_path) == []


def test_the_steps_come_in_the_durable_order(tmp_path: Path) -> None:
    steps: list[str] = []
    Spool(tmp_path, 0, step=steps.append).write((b"x",))
    assert steps == ["created", "written", "synced", "renamed", "durable"]


def test_below_the_floor_nothing_is_written(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2**60)
    with pytest.raises(DiskFullError):
        spool.write((b"x",))
    assert temp_files(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EIO, SpoolError)]
)
def test_a_failed_write_leaves_no_litter(tmp_path: Path, number: int, expected: type[SpoolError]) -> None:
    def write_half(descriptor: int, rest: memoryview) -> int:
        if len(rest) < 600:
            raise OSError(number, os.strerror(number))
        return os.write(descriptor, rest[:500])

    with pytest.raises(expected):
        Spool(tmp_path, 0, write_bytes=write_half).write((bytes(1000),))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_short_writes_are_completed(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 0, write_bytes=lambda descriptor, rest: os.write(descriptor, rest[:7]))
    content = os.urandom(1000)
    assert (tmp_path / spool.write((content,)).path).read_bytes() == content


def test_a_removed_folder_heals_at_the_next_try(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 0)
    file = tmp_path / spool.write((b"x",)).path
    file.unlink()
    file.parent.rmdir()
    with pytest.raises(SpoolError):
        spool.write((b"x",))
    spool.write((b"x",))
    assert file.read_bytes() == b"x"


def test_sweep_removes_only_what_is_stale(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 0)
    kept = tmp_path / spool.write((b"x",)).path
    (tmp_path / "incoming" / "1-a.part").write_bytes(b"half")
    assert spool.sweep() == 0
    assert spool.sweep(older_than_seconds=0) == 1
    assert temp_files(tmp_path) == []
    assert kept.exists()
