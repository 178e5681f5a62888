"""The steward: closes quiet studies, takes back work whose worker is gone, rings the bell for what waits, and reads
the structured reports that may hold a DXA result.

Beside it, each in a thread of its own, the scribe makes the DICOM objects of the results and one courier for each
destination delivers them: a slow report or a destination that hangs delays no closing of studies.

None keeps a memory of its own: killed and restarted anywhere, they go on from the database.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from sqlalchemy.orm import Session

from service.courier import Courier
from service.domain.policy import Policy
from service.settings import Settings
from service.store.engine import Store
from service.workflow import dxa_reports, reporting, screening, training_files, training_work, work
from service.workflow.bell import Ring
from service.workflow.clock import Clock, utc_now
from service.workflow.model import model_key
from service.workflow.pulse import Beat, no_pulse

log = logging.getLogger(__name__)

LEAVE_SECONDS = 5.0  # a send in flight may end within this time; docker and `osteogate up` kill after 10


class Steward:
    """One loop over a few steps; a step that fails is logged and stops no other."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        policy: Policy,
        ring: Ring,
        clock: Clock = utc_now,
        *,
        model_key: Callable[[Session], str] = model_key,
        beat: Beat = no_pulse,
        ring_training: Callable[[int], None] | None = None,
    ) -> None:
        """`model_key` names the model in force (its package's hash): a new model makes new job keys.

        `ring_training` rings for training runs; None: nobody trains here.
        """
        self._store = store
        self._settings = settings
        self._policy = policy
        self._ring = ring
        self._clock = clock
        self._model_key = model_key
        self._beat = beat
        self._ring_training = ring_training

    def run(self, stop: threading.Event) -> None:
        """Step until told to stop."""
        while not stop.is_set():
            self.step()
            self._beat()
            stop.wait(self._settings.steward_interval_seconds)

    def step(self) -> None:
        """One round."""
        tasks = [self._close_quiet_studies, self._reconcile, self._ring_for_waiting, self._read_dxa_reports]
        tasks.append(self._tidy_training)
        if self._ring_training is not None:
            tasks += [self._reconcile_training, self._ring_for_training]
        for task in tasks:
            try:
                task()
            except Exception:
                log.exception("steward: %s failed; tried again in the next round", task.__name__.lstrip("_"))

    def _close_quiet_studies(self) -> None:
        settings, now = self._settings, self._clock()
        with self._store.reading() as session:
            due = screening.quiet_studies(session, now=now, quiet_seconds=settings.quiet_seconds)
            if not due:
                return
            model = self._model_key(session)
        rules = screening.Closure(
            quiet_seconds=settings.quiet_seconds,
            patience_seconds=settings.incomplete_patience_seconds,
            policy=self._policy,
            model_key=model,
        )
        for study_uid in due:
            try:  # each study for itself: one that cannot be judged delays no other
                with self._store.transaction() as session:
                    closed = screening.close_study(session, study_uid, now=now, rules=rules)
            except Exception:
                log.exception("steward: study %s could not be closed", study_uid)
                continue
            if closed:
                log.info("steward: study %s closed", study_uid)

    def _read_dxa_reports(self) -> None:
        window_days = self._policy.pairing.window_days
        dxa_reports.read_waiting(self._store, self._settings.spool_dir, self._clock, window_days)

    def _reconcile(self) -> None:
        with self._store.transaction() as session:
            taken = work.reconcile(session, self._clock(), self._settings.max_attempts)
        for job_id in taken:
            log.warning("steward: job %d taken back from a worker that is gone", job_id)

    def _ring_for_waiting(self) -> None:
        with self._store.reading() as session:
            due = work.due_for_bell(session, self._clock(), self._settings.rering_seconds)
        for job_id in due:
            try:
                self._ring(job_id)
            except Exception as error:
                # The first failure ends the round: a broker that is down would cost its time-out once per job.
                log.warning("steward: the bell could not be rung, tried again in the next round: %r", error)
                return
            with self._store.transaction() as session:
                work.rung(session, job_id, self._clock())

    def _reconcile_training(self) -> None:
        with self._store.transaction() as session:
            taken = training_work.reconcile(session, self._clock(), self._settings.max_attempts)
        for run_id in taken:
            log.warning("steward: training run %d taken back from a worker that is gone, or late", run_id)

    def _ring_for_training(self) -> None:
        assert self._ring_training is not None
        with self._store.reading() as session:
            due = training_work.due_for_bell(session, self._clock(), self._settings.rering_seconds)
        for run_id in due:
            try:
                self._ring_training(run_id)
            except Exception as error:
                log.warning("steward: the trainer's bell could not be rung, tried again in the next round: %r", error)
                return
            with self._store.transaction() as session:
                training_work.rung(session, run_id, self._clock())

    def _tidy_training(self) -> None:
        """A finished run's worker does it itself, unless it is killed just then."""
        folders, now = training_files.leftovers(self._settings.training_dir), self._clock()
        if not folders:
            return
        with self._store.reading() as session:
            spent = training_files.spent(session, folders, now, self._settings.training_keep_seconds)
        for run_id in spent:
            removed = training_files.tidy(folders[run_id])
            with self._store.transaction() as session:
                training_files.note(session, run_id, removed, now)
            log.info("steward: removed %s of training run %d", ", ".join(removed), run_id)


class Scribe:
    """Makes the objects that results promise."""

    def __init__(self, store: Store, settings: Settings, clock: Clock = utc_now) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock

    def run(self, stop: threading.Event) -> None:
        """Make what is due until told to stop."""
        while not stop.is_set():
            try:
                self.step(lambda: not stop.is_set())
            except Exception:
                log.exception("scribe: tried again in the next round")
            stop.wait(self._settings.steward_interval_seconds)

    def step(self, going_on: Callable[[], bool] = lambda: True) -> int:
        """Everything that is due now; how many objects were made."""
        return reporting.make_reports(self._store, self._settings, self._clock, going_on=going_on)


def serve(steward: Steward, store: Store, settings: Settings, stop: threading.Event) -> bool:
    """Run the steward with its scribe and couriers until told to stop.

    False: one of them was still at work when the time to leave was over (a send in flight, say). The process may end
    all the same: what it held comes back when its lease runs out.
    """
    helpers = [
        threading.Thread(target=Scribe(store, settings).run, args=(stop,), name="scribe", daemon=True),
        *(
            threading.Thread(
                target=Courier(store, settings, destination).run,
                args=(stop,),
                name=f"courier-{destination.name}",
                daemon=True,
            )
            for destination in settings.destinations
        ),
    ]
    for helper in helpers:
        helper.start()
    steward.run(stop)
    until = time.monotonic() + LEAVE_SECONDS
    for helper in helpers:
        helper.join(max(0.0, until - time.monotonic()))
    return not any(helper.is_alive() for helper in helpers)
