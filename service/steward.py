"""The steward: closes quiet studies, takes back jobs whose worker is gone, rings the bell for what waits.

It keeps no memory of its own: killed and restarted anywhere, it goes on from the database.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from service.domain.policy import Policy
from service.settings import Settings
from service.store.engine import Store
from service.workflow import screening, work
from service.workflow.bell import Ring
from service.workflow.clock import Clock, utc_now
from service.workflow.model import shipped_model_key

log = logging.getLogger(__name__)


class Steward:
    """One loop over three steps; a step that fails is logged and stops no other."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        policy: Policy,
        ring: Ring,
        clock: Clock = utc_now,
        *,
        model_key: Callable[[], str] = shipped_model_key,
    ) -> None:
        """`model_key` names the model in force (its package's hash): a new model makes new job keys."""
        self._store = store
        self._settings = settings
        self._policy = policy
        self._ring = ring
        self._clock = clock
        self._model_key = model_key

    def run(self, stop: threading.Event) -> None:
        """Step until told to stop."""
        while not stop.is_set():
            self.step()
            stop.wait(self._settings.steward_interval_seconds)

    def step(self) -> None:
        """One round."""
        for task in (self._close_quiet_studies, self._reconcile, self._ring_for_waiting):
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
        rules = screening.Closure(
            quiet_seconds=settings.quiet_seconds,
            patience_seconds=settings.incomplete_patience_seconds,
            policy=self._policy,
            model_key=self._model_key(),
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
