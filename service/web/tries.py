"""Patience: how many wrong passwords or keys are looked at, and how many requests, and then none for a while."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

MAX_WRONG = 20  # by one guesser within the window; then nothing of theirs is looked at
WINDOW_SECONDS = 60.0
MAX_REMEMBERED = 4096


class Tries:
    """Counts wrong guesses by who made them, within a window that moves on."""

    def __init__(
        self, most: int = MAX_WRONG, window_seconds: float = WINDOW_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` gives seconds."""
        self._most = most
        self._window = window_seconds
        self._clock = clock
        self._wrong: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def wait_seconds(self, who: str) -> int:
        """How long nothing of theirs is looked at; 0: it is."""
        with self._lock:
            tries = self._lately(who)
            return 0 if len(tries) < self._most else max(1, round(tries[0] + self._window - self._clock()))

    def add(self, who: str) -> str | None:
        """One more wrong guess; the event for the audit: the first one, and the one that locks."""
        with self._lock:
            tries = self._lately(who)
            tries.append(self._clock())
            if len(self._wrong) >= MAX_REMEMBERED:
                self._wrong.clear()
            self._wrong[who] = tries
            return {1: "password.wrong", self._most: "password.locked"}.get(len(tries))

    def _lately(self, who: str) -> deque[float]:
        tries = self._wrong.get(who, deque())
        while tries and self._clock() - tries[0] >= self._window:
            tries.popleft()
        return tries


class Pace:
    """Counts requests by who makes them, window after window."""

    def __init__(
        self, most: int, window_seconds: float = WINDOW_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` gives seconds."""
        self._most = most
        self._window = window_seconds
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}  # who -> begin of the window, requests in it
        self._lock = threading.Lock()

    def wait_seconds(self, who: str) -> int:
        """0, and the request is counted; or how long they must wait."""
        with self._lock:
            now = self._clock()
            begin, count = self._seen.get(who, (now, 0))
            if now - begin >= self._window:
                begin, count = now, 0
            if count >= self._most:
                return max(1, round(begin + self._window - now))
            if len(self._seen) >= MAX_REMEMBERED:
                self._seen.clear()
            self._seen[who] = (begin, count + 1)
            return 0
