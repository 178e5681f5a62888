"""What the runner of studies and that of training runs share: who they are, how they watch over their work, and how a
process ends that no longer hears the bell.

The main thread works. A thread beside it beats the lease, notices that the process is told to stop, and ends a process
that cannot be interrupted: nothing inside a hung native call can.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import datetime
from typing import Any, ClassVar, Generic, Required, Self, TypedDict, TypeVar

from sqlalchemy.orm import Session

from service.settings import Settings
from service.store.engine import Store
from service.workflow.clock import Clock, utc_now
from service.workflow.pulse import Beat, no_pulse

log = logging.getLogger(__name__)

EXIT_ENDED = 70  # EX_SOFTWARE: the process was ended by its own watch
EXIT_RELEASED = 0
EXIT_DEAF = 71  # EX_OSERR: the broker's messages no longer reach this process
BEATS_PER_LEASE = 3
DEAF_SECONDS = 20.0
_TICK_SECONDS = 0.2
_LOOKS_PER_PATIENCE = 10

Exit = Callable[[int], None]
Ending = TypeVar("Ending")  # what became of one ring of the bell


class Told(TypedDict, total=False):
    """Who a runner is, and what it does otherwise than by default."""

    worker: Required[str]
    grace_seconds: float
    stopping: threading.Event | None
    clock: Clock
    exit_process: Exit
    beat: Beat


class Runner(ABC, Generic[Ending]):
    """Takes what the bell names, one at a time, with one worker's store and settings."""

    patience: ClassVar[float]  # seconds that its work has to come to an end after SIGTERM, unless told otherwise

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        worker: str,
        grace_seconds: float | None = None,
        stopping: threading.Event | None = None,
        clock: Clock = utc_now,
        exit_process: Exit = os._exit,
        beat: Beat = no_pulse,
    ) -> None:
        self.store = store
        self.settings = settings
        self.worker = worker
        self.stopping = stopping or threading.Event()
        self.clock = clock
        self.grace_seconds = self.patience if grace_seconds is None else grace_seconds
        self.exit_process = exit_process
        self.beat = beat
        self.busy = False
        self.idle_since: datetime | None = None  # None until it listens

    def listening(self) -> None:
        """Note that the process is ready for messages."""
        self.idle_since = self.clock()

    def run(self, number: int) -> Ending:
        """Claim, work, record. A failure is written to its row, never raised into Celery."""
        self.busy = True
        try:
            return self._run(number)
        finally:
            self.idle_since = self.clock()
            self.busy = False

    @abstractmethod
    def unheard(self, session: Session, since: datetime) -> bool:
        """Whether something waits that was rung for since then."""

    @abstractmethod
    def _run(self, number: int, /) -> Ending: ...


class Beside(ABC):
    """A thread beside the main one, for as long as the context manager lasts."""

    def __init__(self, name: str) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @abstractmethod
    def _watch(self) -> None:
        """Look, again and again, until `_ended` is set."""


class Watch(Beside):
    """Watches over one piece of work."""

    def __init__(self, name: str, *, grace_seconds: float, beat_seconds: float) -> None:
        super().__init__(name)
        self._mutex = threading.Lock()
        self._grace_seconds = grace_seconds
        self._beat_seconds = beat_seconds
        self._began = time.monotonic()
        self._leave_at: float | None = None

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        return super().__enter__()

    def _watch(self) -> None:
        next_beat = self._began + self._beat_seconds
        while not self._ended.wait(min(_TICK_SECONDS, self._beat_seconds)):
            now = time.monotonic()
            if self._ends_process(now):
                return
            if now >= next_beat:
                self._beat()
                next_beat = time.monotonic() + self._beat_seconds

    def _grace_is_over(self, now: float, *, wanted: bool) -> bool:
        """Whether the grace period has passed since the process was first wanted to stop."""
        if self._leave_at is None and wanted:
            self._leave_at = now + self._grace_seconds
        return self._leave_at is not None and now >= self._leave_at

    @abstractmethod
    def _ends_process(self, now: float) -> bool:
        """End the process where it has to; True: nothing is left to watch over."""

    @abstractmethod
    def _beat(self) -> None:
        """Lengthen the lease; a database that is away for a moment is no reason to stop."""


def leave(exit_process: Exit, code: int) -> None:
    """End the process, its log written."""
    logging.shutdown()
    exit_process(code)


class Ears(Beside):
    """Ends a process that no longer hears the bell.

    A consumer may lose its broker connection in a way that its library does not notice, and then sits idle beside
    a full queue for ever. The sign: idle for a while, all of it with a job waiting that was rung for since.
    Until then each look is a beat of the pulse: the process works (the guard bounds for how long), or it hears.
    """

    def __init__(self, runner: Runner[Any], patience_seconds: float = DEAF_SECONDS) -> None:
        super().__init__("ears")
        self._runner = runner
        self._patience_seconds = patience_seconds

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
                leave(runner.exit_process, EXIT_DEAF)
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
