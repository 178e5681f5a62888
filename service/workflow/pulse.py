"""A process shows that its loop turns: by the age of a file that the loop touches.

Steward and worker listen on no port, so there is nothing else to ask (`osteogate health` looks at the age).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0

Beat = Callable[[], None]


def no_pulse() -> None:
    """For loops that nobody watches."""


class Pulse:
    """The pulse of one part (`steward`, `worker`) of an installation."""

    def __init__(self, folder: Path, part: str) -> None:
        self._file = folder / part

    def beat(self) -> None:
        """Touch the file; one that cannot be touched stops no work."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch()
        except OSError as error:
            log.warning("the pulse %s cannot be shown: %s", self._file, error)

    def age_seconds(self) -> float | None:
        """Seconds since the last beat; None where there was none."""
        try:
            return max(0.0, time.time() - self._file.stat().st_mtime)
        except FileNotFoundError:
            return None

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beat for as long as the block runs, from a thread: for a process whose loop is not ours."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.is_set():
                self.beat()
                ended.wait(BEAT_SECONDS)

        thread = threading.Thread(target=beat, name="pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
