"""What a result leaves in its folder: whole, or not there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from service.workflow import artefacts
from tests.service.workflow.outbox import Killed

L3, RIB = 29, 92


def test_labels_come_back_as_they_were(tmp_path: Path) -> None:
    labels = np.zeros((3, 4, 5), np.uint8)
    labels[1, 2, 3] = L3
    assert artefacts.keep_labels(tmp_path, labels, [L3])
    kept = artefacts.labels(tmp_path)
    assert kept.dtype == np.uint8
    assert np.array_equal(kept, labels)


def test_labels_without_a_wanted_one_are_not_kept(tmp_path: Path) -> None:
    assert not artefacts.keep_labels(tmp_path, np.full((2, 3, 3), RIB, np.uint8), [L3])
    assert list(tmp_path.iterdir()) == []


def test_sources_come_back_as_they_were(tmp_path: Path) -> None:
    artefacts.keep_sources(tmp_path, ["ab/1.dcm", "cd/2.dcm"])
    assert artefacts.sources(tmp_path) == ["ab/1.dcm", "cd/2.dcm"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '["a"'])
def test_a_damaged_list_of_sources_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / artefacts.SOURCES).write_text(text)
    with pytest.raises(ValueError, match=r"list of names|Expecting"):
        artefacts.sources(tmp_path)


def test_killed_while_writing_it_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sr.dcm"
    path.write_bytes(b"old")

    def killed(_: int) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", killed)
        with pytest.raises(Killed):
            artefacts.write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    artefacts.write_durably(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_published_disappears(tmp_path: Path) -> None:
    with artefacts.pending(tmp_path / "seg.dcm", b"bytes"):
        (waiting,) = tmp_path.iterdir()
        assert waiting.read_bytes() == b"bytes"
    assert list(tmp_path.iterdir()) == []
