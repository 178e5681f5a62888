"""Refusals on their way to the database, without ever holding up the door.

A refused instance is recorded in its handler's thread, before the peer hears of it. Rejected associations and
refused contexts (dcmtk's storescu proposes sixty SOP classes at once) are recorded behind the back of the one
lobby thread, which must not wait for a database.
"""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import asdict, dataclass
from datetime import datetime

from service.dicom.received import Refuse

LOGGER = logging.getLogger(__name__)
MAX_WAITING = 2000


@dataclass(frozen=True, slots=True)
class Refusal:
    """One row for people to see: the fields of `Refuse`."""

    at: datetime
    kind: str
    code: str
    text: str
    calling_ae: str | None
    peer_address: str | None
    sop_class_uid: str | None
    status: int | None


class Recorder:
    """Writes refusals; a database that is down costs a log line, never the listener."""

    def __init__(self, refuse: Refuse) -> None:
        self._refuse = refuse
        self._queue: queue.Queue[Refusal | None] = queue.Queue(maxsize=MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="intake-recorder", daemon=True)

    def start(self) -> None:
        """Start the recording thread."""
        self._thread.start()

    def stop(self) -> None:
        """Record what is waiting, then end."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(timeout=10.0)

    def record(self, refusal: Refusal) -> None:
        """Record now."""
        try:
            self._refuse(**asdict(refusal))
        except Exception as error:  # the database may be the very thing that is down
            LOGGER.error("a refusal could not be recorded (%s): %s", type(error).__name__, refusal)

    def record_soon(self, refusal: Refusal) -> None:
        """Record from the recording thread; dropped, with a log line, where too many wait."""
        try:
            self._queue.put_nowait(refusal)
        except queue.Full:
            LOGGER.error("too many refusals to record: %s", refusal)

    def _run(self) -> None:
        while (refusal := self._queue.get()) is not None:
            self.record(refusal)
