"""Who may come in, and how much of everything at once (RULES 3 and 4).

No network code: the server asks, this answers.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

from service.settings import MIB, Settings

IN_FLIGHT_BYTES = 1024 * MIB  # received data sets held in memory, all associations together
REPEAT_SECONDS = {"context": 3600.0, "association": 10.0}  # the same refusal is recorded once in this time
MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Rejection:
    """An A-ASSOCIATE-RJ (PS3.8 table 9-21) and what we record of it."""

    result: int  # 1 permanent, 2 transient
    source: int
    reason: int
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Caller:
    """The requestor of an association, from its A-ASSOCIATE-RQ and its connection."""

    calling_ae: str
    called_ae: str
    address: str


class Door:
    """Admits associations and counts them; keeps the memory budget."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._inside: Counter[tuple[str, str]] = Counter()
        self._in_flight_bytes = 0
        self._in_flight_limit = max(IN_FLIGHT_BYTES, 2 * settings.max_instance_bytes)

    def admit(self, caller: Caller) -> Rejection | None:
        """None admits and counts the caller, until `leave`."""
        rejection = self._unknown(caller)
        if rejection is not None:
            return rejection
        peer = (caller.calling_ae, caller.address)
        with self._lock:
            if self._inside[peer] >= self._settings.max_associations_per_peer:
                return _full("TOO_MANY_FROM_PEER", "this peer has too many associations open")
            if self._inside.total() >= self._settings.max_associations:
                return _full("TOO_MANY_ASSOCIATIONS", "too many associations are open")
            self._inside[peer] += 1
        return None

    def leave(self, caller: Caller) -> None:
        """An admitted caller's association has ended."""
        with self._lock:
            peer = (caller.calling_ae, caller.address)
            self._inside[peer] -= 1
            if self._inside[peer] <= 0:
                del self._inside[peer]

    @property
    def inside(self) -> int:
        """Open associations."""
        with self._lock:
            return self._inside.total()

    def take_memory(self, size_bytes: int) -> bool:
        """Reserve memory for received bytes; False where the budget is spent."""
        with self._lock:
            if self._in_flight_bytes + size_bytes > self._in_flight_limit:
                return False
            self._in_flight_bytes += size_bytes
            return True

    def give_back_memory(self, size_bytes: int) -> None:
        """Release what `take_memory` reserved."""
        with self._lock:
            self._in_flight_bytes -= size_bytes

    def _unknown(self, caller: Caller) -> Rejection | None:
        if caller.called_ae != self._settings.ae_title:
            return Rejection(1, 1, 7, "CALLED_AE_UNKNOWN", f"no AE here is called {caller.called_ae!r}")
        peers = self._settings.peers
        if not peers or any(peer.admits(caller.calling_ae, caller.address) for peer in peers):
            return None
        if any(peer.ae_title == caller.calling_ae for peer in peers):
            text = f"AE {caller.calling_ae!r} may not come from {caller.address}"
            return Rejection(1, 1, 3, "PEER_ADDRESS_WRONG", text)
        return Rejection(1, 1, 3, "CALLING_AE_UNKNOWN", f"AE {caller.calling_ae!r} is not on the list of peers")


def _full(code: str, text: str) -> Rejection:
    return Rejection(2, 3, 2, code, text)  # transient, local limit exceeded


class Repeats:
    """Keeps a scanner or a chatty PACS from filling the refusals table: the same refusal counts once in a while."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[Hashable, float] = {}

    def is_new(self, kind: str, key: Hashable) -> bool:
        """True where this refusal was not recorded lately."""
        seconds = REPEAT_SECONDS.get(kind)
        if seconds is None:
            return True
        now = time.monotonic()
        with self._lock:
            last = self._last.get((kind, key))
            if last is not None and now - last < seconds:
                return False
            if len(self._last) >= MAX_REMEMBERED:
                self._last.clear()
            self._last[(kind, key)] = now
            return True
