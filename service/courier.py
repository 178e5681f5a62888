"""The courier: brings made objects to one destination. One thread each, so that one that hangs delays no other.

It keeps no memory that matters: killed anywhere, its lease runs out and the objects are due again. Every answer is
written down as soon as it is heard, so a crash repeats at most the one object whose answer was not written yet, with
the same bytes under the same UID.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from service.dicom.send import Answer, send_files
from service.dicom.stow import store_files
from service.settings import Destination, Settings
from service.store.engine import Store
from service.workflow import delivery
from service.workflow.clock import Clock, utc_now
from service.workflow.delivery import Parcel

log = logging.getLogger(__name__)

DUPLICATE = 0x0111  # duplicate SOP instance (PS3.7 C.5.7): it came through the last time, and only the answer was lost
_TIMEOUTS_PER_LEASE = 5  # to connect, to negotiate, to send, to wait for the answer; and one to spare
_SPARE_SECONDS = 30.0

Hear = Callable[[Answer], None]
GoingOn = Callable[[], bool]


class Courier:
    """Delivers to one destination."""

    def __init__(self, store: Store, settings: Settings, destination: Destination, clock: Clock = utc_now) -> None:
        self.destination = destination
        self._store = store
        self._settings = settings
        self._clock = clock
        self._lease_seconds = _TIMEOUTS_PER_LEASE * settings.delivery_timeout_seconds + _SPARE_SECONDS
        self._unwritten: list[tuple[Parcel, Answer]] = []  # heard while the database was away

    def run(self, stop: threading.Event) -> None:
        """Deliver until told to stop."""
        while not stop.is_set():
            handled = 0
            try:
                handled = self.step(lambda: not stop.is_set())
            except Exception:
                log.exception("courier to %s: tried again in the next round", self.destination.name)
            if not handled:
                stop.wait(self._settings.steward_interval_seconds)

    def step(self, going_on: GoingOn = lambda: True) -> int:
        """One batch over one association or HTTP session; how many objects were answered for."""
        self._write_down()
        parcels = self._claim()
        left = {self._settings.results_dir / parcel.path: parcel for parcel in parcels}

        def hear(answer: Answer) -> None:
            self._hear(left.pop(answer.path), answer, left.values())

        try:
            for path, parcel in list(left.items()):
                if not _is_intact(path, parcel):
                    hear(Answer(path, "the file in the results folder is not the one that was made"))
            self._send(list(left), hear, lambda: going_on() and not self._unwritten)
        except Exception as error:  # not foreseen: the object in hand counts as the cause, and no other waits for it
            log.exception("courier to %s: sending broke off", self.destination.name)
            if left:
                hear(Answer(next(iter(left)), f"{type(error).__name__}: {error}"))
        answered = len(parcels) - len(left)
        self._give_back(left.values())
        return answered

    def _claim(self) -> list[Parcel]:
        name, now = self.destination.name, self._clock()
        with self._store.reading() as session:
            if not delivery.is_due(session, name, now):
                return []
        with self._store.transaction() as session:
            return delivery.claim(session, name, now=now, lease_seconds=self._lease_seconds)

    def _send(self, paths: Sequence[Path], hear: Hear, going_on: GoingOn) -> None:
        url, timeout = self.destination.url, self._settings.delivery_timeout_seconds
        if not paths:
            return
        if self.destination.is_dicomweb:
            store_files(paths, url=url, on_answer=hear, going_on=going_on, timeout_seconds=timeout)
            return
        parts = urlsplit(url)
        send_files(
            paths,
            host=parts.hostname or "",
            port=parts.port or 0,
            called=unquote(parts.username or ""),
            calling=self._settings.ae_title,
            on_answer=hear,
            going_on=going_on,
            timeout_seconds=timeout,
        )

    def _hear(self, parcel: Parcel, answer: Answer, left: Iterable[Parcel]) -> None:
        """Write an answer down at once; without a database it is remembered, and nothing more is sent until then."""
        if answer.failure is not None:
            log.warning("courier to %s: %s: %s", self.destination.name, parcel.sop_instance_uid, answer.failure)
        try:
            self._settle(parcel, answer, left)
        except Exception:
            log.exception("courier to %s: an answer could not be written yet", self.destination.name)
            self._unwritten.append((parcel, answer))

    def _settle(self, parcel: Parcel, answer: Answer, left: Iterable[Parcel] = ()) -> None:
        settings, now = self._settings, self._clock()
        with self._store.transaction() as session:
            if answer.failure is None:
                mine = delivery.delivered(session, parcel, now, answer.remark)
            elif answer.status == DUPLICATE:
                mine = delivery.delivered(session, parcel, now, "the destination held it already")
            else:
                mine = delivery.failed(
                    session,
                    parcel,
                    answer.failure,
                    now,
                    retry_seconds=settings.delivery_retry_seconds,
                    ceiling_seconds=settings.delivery_retry_ceiling_seconds,
                )
            delivery.renew(session, left, now, self._lease_seconds)
        if not mine:
            log.warning("courier to %s: the lease of %s was lost", self.destination.name, parcel.sop_instance_uid)

    def _write_down(self) -> None:
        """What was heard while the database was away comes before anything new."""
        while self._unwritten:
            self._settle(*self._unwritten[0])
            self._unwritten.pop(0)

    def _give_back(self, left: Collection[Parcel]) -> None:
        if not left:
            return
        try:
            with self._store.transaction() as session:
                delivery.release(session, left, self._clock())
        except Exception:
            log.exception("courier to %s: objects could not be given back yet", self.destination.name)


def _is_intact(path: Path, parcel: Parcel) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == parcel.sha256
    except OSError:
        return False
