"""One training run from claim to outcome, whatever happens on the way.

The main thread trains. A watch thread beats the lease, hears of a cancellation, sees the time limit pass and the
process being told to stop; the run itself asks after each step whether it shall go on, and keeps what it has done.
What does not come to the end of a step in time (a hung native call) is given up, and the process ends.

Imports no torch: the process that waits for a first run stays small.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy.orm import Session

from service.domain.states import RunStage
from service.settings import MIB
from service.workflow import models, training_files, training_work
from service.workflow.packages import Kept, Library
from service.workflow.people import By
from service.workflow.rules import policy_in_force
from service.workflow.training import Lost, Outcome, free_bytes
from service.workflow.training_work import Grip, RunClaim
from service.workflow.work import StaleToken
from worker.runner import BEATS_PER_LEASE, EXIT_ENDED, EXIT_RELEASED, Runner, Watch, leave

log = logging.getLogger(__name__)

GRACE_SECONDS = 8.0  # to come to the end of a step; docker kills after 10
BEAT_SECONDS = 2.0  # at most: a cancellation is heard with a beat


class DiskLow(OSError):
    """There is too little room to go on; what is done is kept."""


class Ended(StrEnum):
    """What became of one ring of the bell."""

    FINISHED = "finished"
    NOT_CLAIMED = "not-claimed"
    FAILED = "failed"  # waits for its next attempt, or has failed for good
    CANCELLED = "cancelled"
    LOST = "lost"  # the lease was taken away meanwhile; nothing was written
    RELEASED = "released"  # given back at a shutdown


class TrainingRunner(Runner[Ended]):
    """Runs training runs with one worker's store and settings."""

    patience = GRACE_SECONDS

    def unheard(self, session: Session, since: datetime) -> bool:
        """Whether a run waits that was rung for since then."""
        return training_work.unheard(session, since=since)

    def _run(self, run_id: int, /) -> Ended:
        if self.stopping.is_set():
            return Ended.NOT_CLAIMED
        with self.store.transaction() as session:
            held = training_work.claim(
                session,
                run_id,
                worker=self.worker,
                now=self.clock(),
                lease_seconds=self.settings.lease_seconds,
                deadline_seconds=self.settings.training_deadline_seconds,
                max_attempts=self.settings.max_attempts,
            )
        if held is None:
            log.info("training run %d: not for us (taken or ended)", run_id)
            return Ended.NOT_CLAIMED
        log.info("training run %d: attempt %d", run_id, held.attempt)
        with RunWatch(self, held) as watch:
            ended = self._train(held, watch)
        log.info("training run %d: %s", run_id, ended.value)
        if ended is Ended.FINISHED:
            self._tidy(run_id)
        return ended

    def _train(self, held: RunClaim, watch: RunWatch) -> Ended:
        try:
            self._require_room()
        except DiskLow as error:
            return self._fail(held, watch, error)
        from worker.training import Halted, train_run  # here: it loads torch

        folder = self.settings.training_dir / str(held.run_id)
        try:
            outcome = train_run(held.manifest, held.manifest_sha256, held.created_at, self.settings, folder, watch)
            kept = Library.of(self.settings).keep_run(folder)
            return self._write(watch, Ended.FINISHED, lambda s: self._finish(s, held, outcome, kept))
        except Halted:
            return self._halt(held, watch)
        except ValueError as error:  # the run itself is at fault: another attempt would say the same
            log.error("training run %d failed", held.run_id, exc_info=error)
            text = str(error)
            return self._write(watch, Ended.FAILED, lambda s: training_work.give_up(s, held, text, self.clock()))
        except (Exception, SystemExit) as error:
            return self._fail(held, watch, error)

    def _tidy(self, run_id: int) -> None:
        """Remove crops and checkpoints; what remains (the disk is stubborn, the process killed) the steward removes."""
        try:
            removed = training_files.tidy(self.settings.training_dir / str(run_id))
            with self.store.transaction() as session:
                training_files.note(session, run_id, removed, self.clock())
        except Exception:
            log.exception("training run %d: its crops and checkpoints could not be removed", run_id)

    def _finish(self, session: Session, held: RunClaim, outcome: Outcome, kept: Kept) -> None:
        """The run is finished and its candidate stands in the registry with its verdict, or neither."""
        now = self.clock()
        training_work.finish(session, held, outcome, now)
        policy = policy_in_force(self.settings)
        models.register(session, kept, By("osteogate", now), policy=policy, run_id=str(held.run_id))

    def _fail(self, held: RunClaim, watch: RunWatch, error: BaseException) -> Ended:
        """What may pass: it costs an attempt."""
        log.error("training run %d failed", held.run_id, exc_info=error)
        text = f"attempt {held.attempt} on {held.worker}: {type(error).__name__}: {error}"
        most = self.settings.max_attempts
        return self._write(watch, Ended.FAILED, lambda s: training_work.fail(s, held, text, self.clock(), most))

    def _halt(self, held: RunClaim, watch: RunWatch) -> Ended:
        """Somebody wanted it to stop: who?"""
        if watch.lost_lease:
            return Ended.LOST
        if watch.cancelled:
            return self._write(watch, Ended.CANCELLED, lambda s: training_work.stop(s, held, self.clock()))
        if watch.late:
            text = training_work.TIME_LIMIT
            return self._write(watch, Ended.FAILED, lambda s: training_work.give_up(s, held, text, self.clock()))
        return self._write(watch, Ended.RELEASED, lambda s: training_work.release(s, held))

    def _write(self, watch: RunWatch, ended: Ended, change: Callable[[Session], object]) -> Ended:
        if not watch.end():
            return Ended.LOST
        try:
            with self.store.transaction() as session:
                change(session)
        except StaleToken:
            return Ended.LOST
        except Exception:  # the database is away: the lease runs out and the steward takes the run back
            log.exception("what became of a training run could not be written")
            return Ended.LOST
        return ended

    def _require_room(self) -> None:
        free = free_bytes(self.settings)
        if free < self.settings.training_disk_bytes:
            needed = self.settings.training_disk_bytes
            raise DiskLow(f"{free // MIB} MiB are free on the disk; a run needs {needed // MIB} MiB")


class RunWatch(Watch):
    """Watches over one run; the run asks it after every step (worker.training.Watcher).

    `end` is called once, before the run's outcome is written: from then on the
    thread gives nothing back.
    """

    def __init__(self, runner: TrainingRunner, held: RunClaim) -> None:
        super().__init__(
            f"run-{held.run_id}",
            grace_seconds=runner.grace_seconds,
            beat_seconds=min(runner.settings.lease_seconds / BEATS_PER_LEASE, BEAT_SECONDS),
        )
        self.lost_lease = False
        self.cancelled = False
        self.late = False
        self._asked_at = time.monotonic()
        self._runner = runner
        self._held = held

    def end(self) -> bool:
        """Hold the thread off for good; True when the run is still this worker's to write."""
        with self._mutex:
            mine = not (self.lost_lease or self._ended.is_set())
            self._ended.set()
        return mine

    def go_on(self) -> bool:
        """Whether nobody wants the run to stop."""
        self._asked_at = time.monotonic()
        return not self._must_stop()

    def progress(self, stage: RunStage, values: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]] = ()) -> None:
        """Store how far the run is; a database that is away for a moment costs the picture, not the run."""
        free, floor = free_bytes(self._runner.settings), self._runner.settings.disk_floor_bytes
        if free < floor:
            raise DiskLow(f"{free // MIB} MiB are free on the disk, below the floor of {floor // MIB} MiB")
        self._tell(lambda session: training_work.progress(session, self._held, stage, values, epochs))

    def lost(self, lost: Sequence[Lost]) -> None:
        """Store what of the manifest could not be cut."""
        self._tell(lambda session: training_work.note_lost(session, self._held, lost))

    def _tell(self, change: Callable[[Session], None]) -> None:
        try:
            with self._runner.store.transaction() as session:
                change(session)
        except StaleToken:
            self.lost_lease = True
        except Exception:
            log.exception("training run %d: its progress could not be written", self._held.run_id)

    def _must_stop(self) -> bool:
        return self.lost_lease or self.cancelled or self.late or self._runner.stopping.is_set()

    def _ends_process(self, now: float) -> bool:
        runner = self._runner
        self.late = self.late or runner.clock() > self._held.deadline_at
        if self._grace_is_over(now, wanted=runner.stopping.is_set() or self.late):
            self._leave()
            return True
        if now - self._asked_at > runner.settings.job_deadline_seconds:
            self._abandon()
            return True
        return False

    def _beat(self) -> None:
        runner = self._runner
        try:
            with runner.store.transaction() as session:
                grip = training_work.heartbeat(session, self._held, runner.clock(), runner.settings.lease_seconds)
        except Exception:  # the database is away: the next beat may reach it before the lease runs out
            log.exception("training run %d: heartbeat failed", self._held.run_id)
            return
        self.cancelled = self.cancelled or grip is Grip.CANCEL
        if grip is Grip.LOST and not self._ended.is_set():
            log.warning("training run %d: the lease is gone", self._held.run_id)
            self.lost_lease = True

    def _abandon(self) -> None:
        """No study and no step has come to its end for too long: end the process; the attempt counts."""
        log.critical("training run %d: hangs; this process ends", self._held.run_id)
        leave(self._runner.exit_process, EXIT_ENDED)

    def _leave(self) -> None:
        """The grace period is over and no step came to its end: give the run back and end the process."""
        runner, held = self._runner, self._held
        if not self.end():
            return
        late = self.late
        try:
            with runner.store.transaction() as session:
                if late:
                    training_work.give_up(session, held, training_work.TIME_LIMIT, runner.clock())
                else:
                    training_work.release(session, held)
        except Exception:
            log.exception("training run %d: could not be given back; its lease will run out", held.run_id)
        log.warning("training run %d: this process ends in the midst of it", held.run_id)
        leave(runner.exit_process, EXIT_ENDED if late else EXIT_RELEASED)
