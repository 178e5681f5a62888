"""The worker's pulse: while it works and while it hears, not before it listens and not when it is deaf."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.domain.policy import DEFAULT_POLICY
from service.store.engine import Store
from tests.service.workflow import workbench
from tests.service.workflow.workbench import eventually
from worker.jobs import JobRunner
from worker.runner import EXIT_DEAF, Ears


class Beats:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with workbench.fresh_store("sqlite", tmp_path) as opened:
        yield opened


def runner(store: Store, tmp_path: Path, beats: Beats, exits: list[int] | None = None) -> JobRunner:
    def nothing(_: Any) -> Any:
        raise AssertionError("no job is run here")

    return JobRunner(
        store,
        workbench.settings(tmp_path),
        DEFAULT_POLICY,
        nothing,
        worker="w1",
        beat=beats,
        exit_process=(exits if exits is not None else []).append,
    )


def test_it_beats_while_it_listens_and_while_it_works(store: Store, tmp_path: Path) -> None:
    beats = Beats()
    made = runner(store, tmp_path, beats)
    with Ears(made, patience_seconds=0.1):
        made.listening()
        eventually(lambda: beats.count >= 3, "it beats while idle")
        made.busy = True
        at = beats.count
        eventually(lambda: beats.count >= at + 3, "it beats while a job runs")


def test_it_does_not_beat_before_it_listens_nor_when_deaf(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = Beats()

    def unheard(*_: Any, **__: Any) -> bool:
        looks()
        return True

    monkeypatch.setattr("worker.jobs.work.unheard", unheard)
    beats, exits = Beats(), list[int]()
    made = runner(store, tmp_path, beats, exits)
    with Ears(made, patience_seconds=0.1):
        made.listening()
        eventually(lambda: exits, "the deaf process ends")
    assert exits == [EXIT_DEAF]
    assert looks.count > 1
    assert beats.count == 0
