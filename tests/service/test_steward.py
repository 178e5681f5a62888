"""The steward's round: every step for itself, and all of it repeatable."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from service.domain.policy import DEFAULT_POLICY
from service.domain.states import RunState
from service.domain.training import KEEP_SECONDS
from service.steward import Steward
from service.store.engine import Store
from service.store.tables import AuditRow, JobRow, StudyRow, TrainingRunRow
from service.workflow import screening, training_files, work
from service.workflow.model import shipped_model_key
from tests.service.workflow import workbench
from tests.service.workflow.workbench import Clock, claim, deliver, slices


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with workbench.fresh_store("sqlite", tmp_path) as opened:
        yield opened


class Bench:
    """A steward with a clock that stands still and a bell that remembers."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.clock = Clock()
        self.rung: list[int] = []
        self.broker_is_up = True
        self.settings = workbench.settings(folder, quiet_seconds=30, rering_seconds=30)
        self.store = store
        self.steward = Steward(
            store, self.settings, DEFAULT_POLICY, self.ring, self.clock, model_key=lambda _: workbench.MODEL
        )

    def ring(self, job_id: int) -> None:
        if not self.broker_is_up:
            raise ConnectionError("no broker")
        self.rung.append(job_id)

    def states(self) -> dict[str, str]:
        with self.store.reading() as session:
            return dict(session.execute(select(StudyRow.study_uid, StudyRow.state)).all())


@pytest.fixture
def bench(store: Store, tmp_path: Path) -> Bench:
    return Bench(store, tmp_path)


def test_a_round_closes_queues_and_rings_once(bench: Bench) -> None:
    deliver(bench.store, slices(), bench.clock.now)
    bench.steward.step()
    assert (bench.states(), bench.rung) == ({"1.2.3": "receiving"}, [])
    bench.clock.advance(31)
    bench.steward.step()
    assert bench.states() == {"1.2.3": "queued"}
    assert len(bench.rung) == 1
    bench.steward.step()
    assert len(bench.rung) == 1
    bench.clock.advance(31)
    bench.steward.step()
    assert len(bench.rung) == 2  # nobody came: rung again


def test_a_dead_broker_stops_nothing_and_is_rung_when_it_is_back(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Faults 5 and 6: the ring fails after the commit; it is repeated until it succeeds."""
    bench.broker_is_up = False
    for number in range(3):
        deliver(bench.store, slices(f"1.{number}", f"1.{number}.1"), bench.clock.now)
    bench.clock.advance(31)
    with caplog.at_level(logging.WARNING):
        bench.steward.step()
    assert set(bench.states().values()) == {"queued"}
    assert caplog.text.count("no broker") == 1  # one failed ring ends the round's ringing
    bench.broker_is_up = True
    bench.steward.step()
    assert len(bench.rung) == 3


def test_a_study_that_cannot_be_judged_delays_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deliver(bench.store, slices("1.1", "1.1.1") + slices("2.2", "2.2.1"), bench.clock.now)
    real = screening.assess_series

    def poisoned(instances, policy, **more):  # type: ignore[no-untyped-def]
        if instances[0].study_uid == "1.1":
            raise RuntimeError("poison")
        return real(instances, policy, **more)

    monkeypatch.setattr(screening, "assess_series", poisoned)
    bench.clock.advance(31)
    bench.steward.step()
    assert bench.states() == {"1.1": "receiving", "2.2": "queued"}
    assert "poison" in caplog.text
    assert len(bench.rung) == 1


def test_one_failing_step_stops_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver(bench.store, slices(), bench.clock.now)
    bench.clock.advance(31)

    def broken(*_: object) -> list[int]:
        raise RuntimeError("broken step")

    monkeypatch.setattr(work, "reconcile", broken)
    bench.steward.step()
    assert len(bench.rung) == 1


def test_a_dead_workers_job_is_taken_back_and_rung_in_the_same_round(bench: Bench) -> None:
    deliver(bench.store, slices(), bench.clock.now)
    bench.clock.advance(31)
    bench.steward.step()
    assert claim(bench.store, bench.rung[0], bench.clock.now) is not None
    bench.clock.advance(59)
    bench.steward.step()
    assert len(bench.rung) == 1
    bench.clock.advance(2)
    bench.steward.step()
    assert len(bench.rung) == 2
    with bench.store.reading() as session:
        assert session.scalars(select(JobRow.state)).one() == "waiting"


def test_it_runs_until_told_to_stop(bench: Bench) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=bench.steward.run, args=(stop,))
    thread.start()
    stop.set()
    thread.join(5)
    assert not thread.is_alive()


def test_the_model_key_follows_the_shipped_manifests(tmp_path: Path) -> None:
    empty = shipped_model_key(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").write_text("{}")
    first = shipped_model_key(tmp_path)
    (tmp_path / "a" / "manifest.json").write_text('{"weights": "other"}')
    assert len({empty, first, shipped_model_key(tmp_path)}) == 3
    assert shipped_model_key() == shipped_model_key()


# --- what training runs leave ---------------------------------------------------------------------------------------

RECORD = {"manifest.json", "package", "report"}


def a_run(bench: Bench, state: RunState, *, ended_seconds_ago: float | None = None) -> Path:
    """A run with everything that one leaves on the disk; its folder."""
    ended = None if ended_seconds_ago is None else bench.clock.now - timedelta(seconds=ended_seconds_ago)
    with bench.store.transaction() as session:
        row = TrainingRunRow(
            state=state.value, going=1 if state.going else None, reason="r", created_at=bench.clock.now,
            created_by="lena", configuration="osteogate", start="scratch", people="patients", patients=1, locked=1,
            vertebrae=4, manifest={}, manifest_sha256="", finished_at=ended,
        )  # fmt: skip
        session.add(row)
        session.flush()
        folder = bench.settings.training_dir / str(row.id)
    for name in ("package", "report", "cohort-training/slabs", "cohort-locked/slabs", "package.run"):
        (folder / name).mkdir(parents=True)
    for name in ("manifest.json", "cut.json", "package.run/fold0.pt", "cohort-training/slabs/00001.npz"):
        (folder / name).write_bytes(b"x")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_only_a_resume_would_need_goes_when_there_can_be_none(bench: Bench) -> None:
    """A worker that was killed between its run's end and its tidying; and runs that stopped long ago."""
    done = a_run(bench, RunState.FINISHED, ended_seconds_ago=1)
    fresh = [a_run(bench, state, ended_seconds_ago=KEEP_SECONDS) for state in (RunState.CANCELLED, RunState.FAILED)]
    old = [a_run(bench, one, ended_seconds_ago=KEEP_SECONDS + 3601) for one in (RunState.CANCELLED, RunState.FAILED)]
    going = a_run(bench, RunState.RUNNING)
    stranger = bench.settings.training_dir / "999"  # no row: a database from a backup, say
    (stranger / "package.run").mkdir(parents=True)
    (bench.settings.training_dir / "notes").mkdir()
    bench.steward.step()
    for folder in (done, *old):
        assert names(folder) == RECORD
    for folder in (*fresh, going):
        assert names(folder) == RECORD | set(training_files.PASSING) - {".package.draft"}
    assert (stranger / "package.run").is_dir()
    bench.steward.step()
    with bench.store.reading() as session:
        rows = session.scalars(select(AuditRow).where(AuditRow.action == "training.tidy")).all()
    assert [row.subject for row in rows] == [f"training-run:{folder.name}" for folder in (done, *old)]  # each once


def test_a_folder_that_cannot_be_removed_delays_no_study(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = a_run(bench, RunState.FINISHED, ended_seconds_ago=1)
    deliver(bench.store, slices(), bench.clock.now)

    def refuses(_: Path) -> None:
        raise PermissionError("not ours")

    with monkeypatch.context() as patched:
        patched.setattr(training_files.shutil, "rmtree", refuses)
        bench.steward.step()
    assert "tidy_training failed" in caplog.text
    assert bench.states() == {"1.2.3": "receiving"}
    bench.steward.step()
    assert names(folder) == RECORD
