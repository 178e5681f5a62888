"""One job from claim to record, whatever happens on the way.

The main thread measures. A guard thread beats the lease through database sessions of its own, gives the job
back when the process is told to stop, and ends a process whose job outlives its deadline: nothing inside a hung
native call can be interrupted, so a supervisor starts a fresh process and the job gets its next attempt.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Unpack

from sqlalchemy.orm import Session

from service.domain.policy import Policy
from service.domain.reasons import Code, Reason
from service.domain.result import Measurements, unmeasured
from service.settings import Settings
from service.store.engine import Store
from service.version import software_version
from service.workflow import artefacts, model, renumber, screening, work
from service.workflow.model import InForce
from worker.runner import BEATS_PER_LEASE, EXIT_ENDED, EXIT_RELEASED, Runner, Told, Watch, leave
from worker.segmentation.renamed import KeptLabels
from worker.volume import VolumeError

log = logging.getLogger(__name__)

GRACE_SECONDS = 5.0  # after SIGTERM a job may still finish for this long; docker kills after 10


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


class Outcome(StrEnum):
    """What became of one ring of the bell."""

    RECORDED = "recorded"
    NOT_CLAIMED = "not-claimed"  # someone else has it, or it has ended: a second copy of the message
    FAILED = "failed"  # waits for its next attempt, or is in quarantine
    LOST = "lost"  # the lease was taken away meanwhile; nothing was written
    RELEASED = "released"  # given back at a shutdown


class JobRunner(Runner[Outcome]):
    """Runs jobs with one worker's store, settings and screen function."""

    patience = GRACE_SECONDS

    def __init__(
        self,
        store: Store,
        settings: Settings,
        policy: Policy,
        screen: ScreenFunction,
        **told: Unpack[Told],
    ) -> None:
        super().__init__(store, settings, **told)
        self.policy = policy
        self.screen = screen

    def unheard(self, session: Session, since: datetime) -> bool:
        """Whether a job waits that was rung for since then."""
        return work.unheard(session, since=since)

    def _run(self, job_id: int, /) -> Outcome:
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


class Guard(Watch):
    """Watches over one running job.

    `writing` is a short critical section of the main thread: the guard gives nothing back while a result is
    being written, and what the guard has given back is never written.
    """

    def __init__(self, runner: JobRunner, held: work.Claim) -> None:
        super().__init__(
            f"guard-{held.job_id}",
            grace_seconds=runner.grace_seconds,
            beat_seconds=runner.settings.lease_seconds / BEATS_PER_LEASE,
        )
        self.lost = False  # a heartbeat was refused
        self.released = False
        self._runner = runner
        self._held = held

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """Hold the guard off; True when the job is still this worker's to write."""
        with self._mutex:
            yield not (self.lost or self.released)
            self._ended.set()

    def _ends_process(self, now: float) -> bool:
        if now - self._began > self._runner.settings.job_deadline_seconds:
            self._end_process()
            return True
        if self._grace_is_over(now, wanted=self._runner.stopping.is_set()):
            self._release_and_exit()
            return True
        return False

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
        leave(self._runner.exit_process, EXIT_RELEASED)

    def _end_process(self) -> None:
        """Past its deadline and not interruptible: end the process; the steward takes the job back."""
        log.critical("job %d: past its deadline; this process ends", self._held.job_id)
        leave(self._runner.exit_process, EXIT_ENDED)
