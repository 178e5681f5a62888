"""One job from claim to record, whatever happens on the way.

The main thread measures. A guard thread beats the lease through database sessions of its own, gives the job
back when the process is told to stop, and ends a process whose job outlives its deadline: nothing inside a hung
native call can be interrupted, so a supervisor starts a fresh process and the job gets its next attempt.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Protocol, Self

from sqlalchemy.orm import Session

from service.domain.policy import Policy
from service.domain.reasons import Code, Reason
from service.domain.result import Measurements, unmeasured
from service.settings import Settings
from service.store.engine import Store
from service.version import software_version
from service.workflow import artefacts, model, renumber, screening, work
from service.workflow.clock import Clock, utc_now
from service.workflow.model import InForce
from service.workflow.pulse import Beat, no_pulse
from worker.segmentation.renamed import KeptLabels
from worker.volume import VolumeError

log = logging.getLogger(__name__)

GRACE_SECONDS = 5.0  # after SIGTERM a job may still finish for this long; docker kills after 10
EXIT_DEADLINE = 70  # EX_SOFTWARE: the process was ended by its own watchdog
EXIT_RELEASED = 0
EXIT_DEAF = 71  # EX_OSERR: the broker's messages no longer reach this process
_BEATS_PER_LEASE = 3
_TICK_SECONDS = 0.2
DEAF_SECONDS = 20.0
_LOOKS_PER_PATIENCE = 10


@dataclass(frozen=True)
class ScreenRequest:
    """One CT to measure: its files, a fresh folder for what is made, a supplied segmentation, the model in force."""

    paths: tuple[Path, ...]
    artefacts_dir: Path
    segmentation: Path | None = None  # None: our own networks segment
    kept: KeptLabels | None = None  # the outlines of an earlier result, under other names: nothing segments
    model: InForce | None = None  # None: whichever is resident
    shadow: InForce | None = None  # its values are kept beside the result


@dataclass(frozen=True)
class Taken:
    """A claim with what it is to be done on, all of it as the claim's transaction saw it."""

    held: work.Claim
    paths: tuple[Path, ...]
    segmentation: Path | None
    model: InForce
    shadow: InForce | None
    kept: KeptLabels | None


ScreenFunction = Callable[[ScreenRequest], Measurements]
Exit = Callable[[int], None]


class Outcome(StrEnum):
    """What became of one ring of the bell."""

    RECORDED = "recorded"
    NOT_CLAIMED = "not-claimed"  # someone else has it, or it has ended: a second copy of the message
    FAILED = "failed"  # waits for its next attempt, or is in quarantine
    LOST = "lost"  # the lease was taken away meanwhile; nothing was written
    RELEASED = "released"  # given back at a shutdown


class JobRunner:
    """Runs jobs with one worker's store, settings and screen function."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        policy: Policy,
        screen: ScreenFunction,
        *,
        worker: str,
        stopping: threading.Event | None = None,
        clock: Clock = utc_now,
        grace_seconds: float = GRACE_SECONDS,
        exit_process: Exit = os._exit,
        beat: Beat = no_pulse,
    ) -> None:
        self.store = store
        self.settings = settings
        self.policy = policy
        self.screen = screen
        self.worker = worker
        self.stopping = stopping or threading.Event()
        self.clock = clock
        self.grace_seconds = grace_seconds
        self.exit_process = exit_process
        self.beat = beat
        self.busy = False
        self.idle_since: datetime | None = None  # None until it listens

    def listening(self) -> None:
        """Note that the process is ready for messages."""
        self.idle_since = self.clock()

    def unheard(self, session: Session, since: datetime) -> bool:
        """Whether a job waits that was rung for since then."""
        return work.unheard(session, since=since)

    def run(self, job_id: int) -> Outcome:
        """Claim, measure, record. A failure is written to the job, never raised into Celery."""
        self.busy = True
        try:
            return self._run(job_id)
        finally:
            self.idle_since = self.clock()
            self.busy = False

    def _run(self, job_id: int) -> Outcome:
        if self.stopping.is_set():
            return Outcome.NOT_CLAIMED
        taken = self._claim(job_id)
        if taken is None:
            log.info("job %d: not for us (taken, ended or not due)", job_id)
            return Outcome.NOT_CLAIMED
        held = taken.held
        log.info("job %d: attempt %d on study %s", job_id, held.attempt, held.study_uid)
        folder = f"{held.job_id}-{held.token}"  # a stale worker keeps to a folder of its own
        request = ScreenRequest(
            paths=taken.paths,
            artefacts_dir=self.settings.results_dir / folder,
            segmentation=taken.segmentation,
            kept=taken.kept,
            model=taken.model,
            shadow=taken.shadow,
        )
        with Guard(self, held) as guard:
            outcome = self._measure(held, request, folder, guard)
            if guard.released:
                outcome = Outcome.RELEASED
        if outcome is not Outcome.RECORDED:
            shutil.rmtree(request.artefacts_dir, ignore_errors=True)
        log.info("job %d: %s", job_id, outcome.value)
        return outcome

    def _claim(self, job_id: int) -> Taken | None:
        with self.store.transaction() as session:
            held = work.claim(
                session,
                job_id,
                worker=self.worker,
                now=self.clock(),
                lease_seconds=self.settings.lease_seconds,
                deadline_seconds=self.settings.job_deadline_seconds,
                max_attempts=self.settings.max_attempts,
            )
            if held is None:
                return None
            # In the claim's transaction, while the study is held: exactly the instances that the key names.
            names = screening.instance_paths(session, held.series_id)
            supplied = screening.segmentation_path(session, held.job_id)
            kept = renumber.kept(session, held.job_id)
            in_force = model.in_force(session, self.settings.models_dir)  # to the study's end, whatever is promoted
            beside = model.in_shadow(session, self.settings.models_dir)
        spool = self.settings.spool_dir
        paths, segmentation = tuple(spool / name for name in names), None if supplied is None else spool / supplied
        return Taken(held, paths, segmentation, in_force, beside, None if kept is None else self._kept(kept))

    def _kept(self, kept: renumber.Kept) -> KeptLabels:
        folder = self.settings.results_dir / kept.artefacts
        return KeptLabels(folder, kept.segmenter, kept.segmenter_sha256, kept.renumbering)

    def _measure(self, held: work.Claim, request: ScreenRequest, folder: str, guard: Guard) -> Outcome:
        try:
            request.artefacts_dir.mkdir(parents=True, exist_ok=True)
            names = [str(path.relative_to(self.settings.spool_dir)) for path in request.paths]
            artefacts.keep_sources(request.artefacts_dir, names)
            measurements = self.screen(request)
        except VolumeError as error:  # the images are at fault: another attempt would say the same
            measurements = not_readable(error)
        except (Exception, SystemExit) as error:  # libraries of the worker call sys.exit
            return self._fail(held, error, guard)
        except BaseException:  # told to stop in the midst of it
            self._release(held, guard)
            raise
        try:
            return self._record(held, measurements, folder, guard)
        except Exception as error:
            return self._fail(held, error, guard)

    def _record(self, held: work.Claim, measurements: Measurements, folder: str, guard: Guard) -> Outcome:
        with guard.writing() as mine:
            if not mine:
                return Outcome.LOST
            try:
                with self.store.transaction() as session:
                    screening.record(
                        session,
                        held,
                        measurements,
                        artefacts=folder,
                        labelled=(self.settings.results_dir / folder / artefacts.LABELS).is_file(),
                        policy=self.policy,
                        now=self.clock(),
                    )
            except work.StaleToken:
                return Outcome.LOST
        return Outcome.RECORDED

    def _fail(self, held: work.Claim, error: BaseException, guard: Guard) -> Outcome:
        log.error("job %d failed", held.job_id, exc_info=error)
        text = f"attempt {held.attempt} on {held.worker}: {type(error).__name__}: {error}"
        with guard.writing() as mine:
            if not mine:
                return Outcome.LOST
            try:
                with self.store.transaction() as session:
                    work.fail(session, held, text, self.clock(), self.settings.max_attempts)
            except work.StaleToken:
                return Outcome.LOST
            except Exception:  # the database is away: the lease runs out and the steward takes the job back
                log.exception("job %d: its failure could not be written", held.job_id)
        return Outcome.FAILED

    def _release(self, held: work.Claim, guard: Guard) -> None:
        with guard.writing() as mine:
            if mine:
                self.give_back(held)

    def give_back(self, held: work.Claim) -> None:
        """Release the claim; a failure to do so costs only the wait for the lease to run out."""
        try:
            with self.store.transaction() as session:
                work.release(session, held)
        except Exception:
            log.exception("job %d: could not be given back; its lease will run out", held.job_id)


def not_readable(error: VolumeError) -> Measurements:
    """The measurements of images that make no volume: none, and the reason why."""
    empty = unmeasured(software_version())
    return replace(empty, refusals=(Reason(Code(error.code), error.text),))


class Hearing(Protocol):
    """A runner of jobs, as far as its ears are concerned."""

    store: Store
    stopping: threading.Event
    exit_process: Exit
    beat: Beat
    busy: bool
    idle_since: datetime | None

    def unheard(self, session: Session, since: datetime) -> bool:
        """Whether something waits that was rung for since then."""


class Ears:
    """Ends a process that no longer hears the bell; a context manager around its service.

    A consumer may lose its broker connection in a way that its library does not notice, and then sits idle beside
    a full queue for ever. The sign: idle for a while, all of it with a job waiting that was rung for since.
    Until then each look is a beat of the pulse: the process works (the guard bounds for how long), or it hears.
    """

    def __init__(self, runner: Hearing, patience_seconds: float = DEAF_SECONDS) -> None:
        self._runner = runner
        self._patience_seconds = patience_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ears", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        runner = self._runner
        unheard_since: float | None = None
        while not self._ended.wait(self._patience_seconds / _LOOKS_PER_PATIENCE):
            if not self._unheard():
                unheard_since = None
                if runner.busy or runner.idle_since is not None:
                    runner.beat()
                continue
            unheard_since = unheard_since or time.monotonic()
            if time.monotonic() - unheard_since > self._patience_seconds and not runner.busy:
                log.critical("this worker no longer hears the bell; the process ends to be started afresh")
                logging.shutdown()
                runner.exit_process(EXIT_DEAF)
                return

    def _unheard(self) -> bool:
        runner = self._runner
        if runner.busy or runner.idle_since is None or runner.stopping.is_set():
            return False
        try:
            with runner.store.reading() as session:
                return runner.unheard(session, runner.idle_since)
        except Exception:  # the database is away: nothing can be said
            log.exception("whether the bell was heard could not be checked")
            return False


class Guard:
    """Watches over one running job from a thread of its own; a context manager around the work.

    `writing` is a short critical section of the main thread: the guard gives nothing back while a result is
    being written, and what the guard has given back is never written.
    """

    def __init__(self, runner: JobRunner, held: work.Claim) -> None:
        self.lost = False  # a heartbeat was refused
        self.released = False
        self._runner = runner
        self._held = held
        self._ended = threading.Event()
        self._mutex = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name=f"guard-{held.job_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """Hold the guard off; True when the job is still this worker's to write."""
        with self._mutex:
            yield not (self.lost or self.released)
            self._ended.set()

    def _watch(self) -> None:
        settings = self._runner.settings
        started = time.monotonic()
        beat_seconds = settings.lease_seconds / _BEATS_PER_LEASE
        next_beat = started + beat_seconds
        stop_at: float | None = None
        while not self._ended.wait(min(_TICK_SECONDS, beat_seconds)):
            now = time.monotonic()
            if now - started > settings.job_deadline_seconds:
                self._end_process()
                return
            if stop_at is None and self._runner.stopping.is_set():
                stop_at = now + self._runner.grace_seconds
            if stop_at is not None and now >= stop_at:
                self._release_and_exit()
                return
            if now >= next_beat:
                self._beat()
                next_beat = time.monotonic() + beat_seconds

    def _beat(self) -> None:
        if self.lost:
            return
        runner = self._runner
        try:
            with runner.store.transaction() as session:
                kept = work.heartbeat(session, self._held, runner.clock(), runner.settings.lease_seconds)
        except Exception:  # the database is away: the next beat may reach it before the lease runs out
            log.exception("job %d: heartbeat failed", self._held.job_id)
            return
        if not kept and not self._ended.is_set():
            log.warning("job %d: the lease is gone; its result will be dropped", self._held.job_id)
            self.lost = True

    def _release_and_exit(self) -> None:
        """The grace period is over: give the job back now, so that nobody waits for the lease to run out."""
        with self._mutex:
            if self._ended.is_set():
                return
            if not self.lost:
                self._runner.give_back(self._held)
            self.released = True
        log.warning("job %d: given back at shutdown", self._held.job_id)
        self._leave(EXIT_RELEASED)

    def _end_process(self) -> None:
        """Past its deadline and not interruptible: end the process; the steward takes the job back."""
        log.critical("job %d: past its deadline; this process ends", self._held.job_id)
        self._leave(EXIT_DEADLINE)

    def _leave(self, code: int) -> None:
        logging.shutdown()
        self._runner.exit_process(code)
