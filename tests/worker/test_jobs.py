"""One job through the runner: recorded, failed, lost, given back or ended; never silent, never twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from service.dicom.reports.codes import LEVEL_NAMES
from service.domain.policy import DEFAULT_POLICY
from service.domain.reasons import Code
from service.domain.renumber import shifted
from service.domain.result import Measurements
from service.store.engine import Store
from service.store.tables import InstanceRow, JobRow, ReportRow, ResultRow, StudyRow
from service.workflow import artefacts, renumber, screening, work
from service.workflow.clock import utc_now
from tests.service.workflow import workbench
from worker.jobs import JobRunner, Outcome, ScreenRequest
from worker.runner import EXIT_DEAF, EXIT_ENDED, EXIT_RELEASED, Ears
from worker.volume import Volume, VolumeError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with workbench.fresh_store("sqlite", tmp_path) as opened:
        yield opened


@dataclass
class Bench:
    """A queued study, and a runner whose screen function, timings and exit the test chooses."""

    store: Store
    folder: Path
    job_id: int
    exits: list[int] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def runner(self, screen: Callable[[ScreenRequest], Measurements], **changes: Any) -> JobRunner:
        grace = changes.pop("grace_seconds", 0.2)
        clock = changes.pop("clock", utc_now)
        return JobRunner(
            self.store,
            workbench.settings(self.folder, **changes),
            DEFAULT_POLICY,
            screen,
            worker="bench",
            stopping=self.stopping,
            clock=clock,
            grace_seconds=grace,
            exit_process=self.exits.append,
        )

    def job(self) -> JobRow:
        with self.store.reading() as session:
            return session.scalars(select(JobRow)).one()

    def results(self) -> list[ResultRow]:
        with self.store.reading() as session:
            return list(session.scalars(select(ResultRow)))

    def kept_folders(self) -> list[str]:
        results = self.folder / "results"
        return sorted(path.name for path in results.iterdir()) if results.exists() else []


@pytest.fixture
def bench(store: Store, tmp_path: Path) -> Bench:
    clock = workbench.Clock()
    job_id = workbench.queued(store, clock)
    return Bench(store, tmp_path, job_id)


def test_a_job_is_measured_recorded_and_its_pictures_kept(bench: Bench) -> None:
    seen: list[ScreenRequest] = []

    def screen(request: ScreenRequest) -> Measurements:
        seen.append(request)
        (request.artefacts_dir / "crop-L1.png").write_bytes(b"png")
        return workbench.measured()

    runner = bench.runner(screen)
    assert runner.run(bench.job_id) is Outcome.RECORDED
    assert runner.run(bench.job_id) is Outcome.NOT_CLAIMED
    [result] = bench.results()
    assert (result.attempt, result.category) == (1, "refer")
    assert (bench.folder / "results" / str(result.artefacts) / "crop-L1.png").exists()
    with bench.store.reading() as session:
        rows = session.scalars(select(InstanceRow).order_by(InstanceRow.sop_instance_uid)).all()
    assert seen[0].paths == tuple(bench.folder / "spool" / row.path for row in rows)
    assert seen[0].segmentation is None
    assert bench.exits == []
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("guard")]


def test_the_supplied_segmentation_is_handed_over(store: Store, tmp_path: Path) -> None:
    """Claimed with the images: exactly the files that the job's key names."""
    clock = workbench.Clock()
    job_id = workbench.queued(store, clock)
    own = workbench.slices(n=1)[0]
    with store.transaction() as session:
        instance = session.scalars(
            select(InstanceRow).where(InstanceRow.sop_instance_uid == own.sop_instance_uid)
        ).one()
        session.get_one(JobRow, job_id).segmentation_id = instance.id
        path = instance.path
    seen: list[ScreenRequest] = []

    def screen(request: ScreenRequest) -> Measurements:
        seen.append(request)
        return workbench.measured()

    assert Bench(store, tmp_path, job_id).runner(screen).run(job_id) is Outcome.RECORDED
    assert [request.segmentation for request in seen] == [tmp_path / "spool" / path]


def test_kept_outlines_and_their_new_names_are_handed_over(bench: Bench) -> None:
    seen: list[ScreenRequest] = []

    def screen(request: ScreenRequest) -> Measurements:
        seen.append(request)
        artefacts.keep_labels(request.artefacts_dir, np.full((60, 4, 4), 30, np.uint8), LEVEL_NAMES.keys(), {30: 0.9})
        return workbench.measured()

    assert bench.runner(screen).run(bench.job_id) is Outcome.RECORDED
    with bench.store.transaction() as session:
        told = {"reason": "six bodies", "actor": "dr", "now": utc_now()}
        job_id = renumber.renumber(session, "1.2.3", shifted(1), **told)
    assert bench.runner(screen).run(job_id) is Outcome.RECORDED
    first, second = (request.kept for request in seen)
    assert first is None
    assert second is not None
    found = second.segment(Volume(np.zeros((60, 4, 4), np.float32), np.eye(4)))
    assert (np.unique(found.labels).tolist(), found.overlaps) == ([29], {29: 0.9})  # L2 is L3
    assert (found.segmenter, found.sha256) == ("fake", "0" * 64)
    assert second.told({29}).levels == {"L2": "L3"}
    assert [(row.revision, row.superseded) for row in bench.results()] == [(1, True), (2, False)]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_result_keeps_its_slices_and_promises_what_can_be_made_of_it(bench: Bench, labelled: bool) -> None:
    def screen(request: ScreenRequest) -> Measurements:
        labels = np.full((2, 4, 4), 29 if labelled else 90, np.uint8)  # L3, or nothing that is coded
        assert artefacts.keep_labels(request.artefacts_dir, labels, LEVEL_NAMES.keys()) == labelled
        return workbench.measured()

    assert bench.runner(screen).run(bench.job_id) is Outcome.RECORDED
    [result] = bench.results()
    with bench.store.reading() as session:
        kinds = session.scalars(select(ReportRow.kind).where(ReportRow.result_id == result.id)).all()
        paths = session.scalars(select(InstanceRow.path)).all()
    assert sorted(kinds) == (["SEG", "SR"] if labelled else ["SR"])
    assert sorted(artefacts.sources(bench.folder / "results" / str(result.artefacts))) == sorted(paths)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), MemoryError(), RecursionError(), SystemExit(3)])
def test_a_failure_is_written_to_the_job_and_never_raised(bench: Bench, error: BaseException) -> None:
    """SystemExit too: TotalSegmentator calls sys.exit."""

    def screen(request: ScreenRequest) -> Measurements:
        (request.artefacts_dir / "half.png").write_bytes(b"")
        raise error

    runner = bench.runner(screen, max_attempts=2)
    assert runner.run(bench.job_id) is Outcome.FAILED
    assert (bench.job().state, bench.job().attempts) == ("waiting", 1)
    assert type(error).__name__ in (bench.job().last_error or "")
    assert runner.run(bench.job_id) is Outcome.FAILED
    assert bench.job().state == "quarantined"
    assert runner.run(bench.job_id) is Outcome.NOT_CLAIMED
    assert bench.kept_folders() == []
    assert bench.results() == []


def test_images_that_make_no_volume_are_a_result_not_a_failure(bench: Bench) -> None:
    """Fault 19's worker side: the study fails alone, at once, with its reason."""

    def screen(request: ScreenRequest) -> Measurements:
        raise VolumeError(Code.PIXELS_UNREADABLE, "slice 12 is truncated")

    assert bench.runner(screen).run(bench.job_id) is Outcome.RECORDED
    [result] = bench.results()
    assert result.category == "not-assessable"
    assert result.document["decision"]["reasons"] == [{"code": "PIXELS_UNREADABLE", "text": "slice 12 is truncated"}]
    assert bench.job().attempts == 1


def test_the_heart_beats_while_the_main_thread_measures(bench: Bench) -> None:
    """Fault 2: a task far longer than its lease stays this worker's, and a second copy is refused meanwhile."""
    others: list[Outcome] = []
    clock = workbench.Clock()

    def has_beaten() -> bool:
        lease_until = bench.job().lease_until
        return lease_until is not None and lease_until >= clock.now + timedelta(seconds=0.6)

    def screen(request: ScreenRequest) -> Measurements:
        for _ in range(4):
            clock.advance(0.5)
            workbench.eventually(has_beaten, "the heart beats")
            with bench.store.transaction() as session:
                assert work.reconcile(session, clock.now, 3) == []
            others.append(bench.runner(screen, clock=clock).run(bench.job_id))
        return workbench.measured()

    assert bench.runner(screen, lease_seconds=0.6, clock=clock).run(bench.job_id) is Outcome.RECORDED
    assert others == [Outcome.NOT_CLAIMED] * 4
    assert bench.job().attempts == 1


def test_a_lost_lease_drops_the_result(bench: Bench) -> None:
    """Fault 3: overtaken while measuring; the other worker's result is the only one."""

    def overtaken(request: ScreenRequest) -> Measurements:
        with bench.store.transaction() as session:
            later = utc_now().replace(year=2100)
            assert work.reconcile(session, later, 3) == [bench.job_id]
        assert bench.runner(lambda _: workbench.measured(220.0)).run(bench.job_id) is Outcome.RECORDED
        return workbench.measured(60.0)

    assert bench.runner(overtaken).run(bench.job_id) is Outcome.LOST
    [result] = bench.results()
    assert (result.category, result.attempt) == ("no-flag", 2)
    assert bench.kept_folders() == [result.artefacts]


def test_told_to_stop_a_short_job_is_finished(bench: Bench) -> None:
    """Fault 23, finished within the grace period."""

    def screen(request: ScreenRequest) -> Measurements:
        bench.stopping.set()
        time.sleep(0.3)
        return workbench.measured()

    assert bench.runner(screen, grace_seconds=1e6).run(bench.job_id) is Outcome.RECORDED
    assert bench.exits == []
    assert bench.runner(screen).run(bench.job_id) is Outcome.NOT_CLAIMED  # and nothing new is begun


def test_told_to_stop_a_long_job_is_given_back_at_once(bench: Bench) -> None:
    """Fault 23, requeued: it waits, without an attempt lost, long before its lease would run out."""

    def screen(request: ScreenRequest) -> Measurements:
        bench.stopping.set()
        workbench.eventually(lambda: bench.exits, "the process is ended")
        assert bench.job().state == "waiting"
        return workbench.measured()

    assert bench.runner(screen, lease_seconds=600).run(bench.job_id) is Outcome.RELEASED
    assert bench.exits == [EXIT_RELEASED]
    assert (bench.job().state, bench.job().attempts) == ("waiting", 0)
    assert bench.results() == []
    bench.stopping.clear()
    assert bench.runner(lambda _: workbench.measured()).run(bench.job_id) is Outcome.RECORDED


def test_a_hung_job_ends_its_process_at_the_deadline(bench: Bench) -> None:
    def hung(request: ScreenRequest) -> Measurements:
        workbench.eventually(lambda: bench.exits, "the process is ended")
        return workbench.measured()

    bench.runner(hung, job_deadline_seconds=0.3).run(bench.job_id)
    assert bench.exits == [EXIT_ENDED]


def test_a_database_that_is_away_at_the_end_costs_a_rerun_not_a_result(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise ConnectionError("database is away")

    with monkeypatch.context() as patched:
        patched.setattr(screening, "record", away)
        patched.setattr(work, "fail", away)
        outcome = bench.runner(lambda _: workbench.measured()).run(bench.job_id)
    assert outcome is Outcome.FAILED
    assert bench.job().state == "running"  # nobody could say so; the lease will
    with bench.store.transaction() as session:
        assert work.reconcile(session, utc_now() + timedelta(hours=1), 3) == [bench.job_id]
    assert bench.runner(lambda _: workbench.measured()).run(bench.job_id) is Outcome.RECORDED
    assert bench.results()[0].attempt == 2


def test_an_interrupt_gives_the_job_back_and_goes_on_up(bench: Bench) -> None:
    def interrupted(request: ScreenRequest) -> Measurements:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.runner(interrupted).run(bench.job_id)
    assert (bench.job().state, bench.job().attempts) == ("waiting", 0)
    with bench.store.reading() as session:
        assert session.scalars(select(StudyRow.state)).one() == "queued"


def test_a_worker_that_no_longer_hears_the_bell_ends_itself(bench: Bench) -> None:
    """Celery may lose its broker connection unnoticed: idle, beside a job that was rung for."""
    runner = bench.runner(lambda _: workbench.measured())
    with Ears(runner, patience_seconds=0.2):
        with bench.store.transaction() as session:
            work.rung(session, bench.job_id, utc_now())
        time.sleep(0.5)
        assert bench.exits == []  # not listening yet
        runner.listening()
        time.sleep(0.5)
        assert bench.exits == []  # rung before it listened: perhaps for another worker
        with bench.store.transaction() as session:
            work.rung(session, bench.job_id, utc_now())
        workbench.eventually(lambda: bench.exits, "the process is ended")
    assert bench.exits == [EXIT_DEAF]


def test_a_worker_that_hears_the_bell_goes_on(bench: Bench) -> None:
    ears = ExitStack()

    def screen(request: ScreenRequest) -> Measurements:
        ears.enter_context(Ears(runner, patience_seconds=0.2))
        time.sleep(0.5)
        return workbench.measured()

    runner = bench.runner(screen)
    with ears:
        runner.listening()
        with bench.store.transaction() as session:
            work.rung(session, bench.job_id, utc_now())
        assert runner.run(bench.job_id) is Outcome.RECORDED
        time.sleep(0.5)
    assert bench.exits == []
