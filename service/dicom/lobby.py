"""The lobby: connections wait here, without a thread of their own, until they have sent an A-ASSOCIATE-RQ.

pynetdicom gives every TCP connection two threads and reads with blocking calls, so two hundred silent connections are
four hundred parked threads. Here one selector thread reads each connection's first PDU within the handshake
deadline, decides from its fixed fields (PS3.8 table 9-11) whether the caller may come in, and answers the
A-ASSOCIATE-RJ itself. Only admitted callers get threads.
"""

from __future__ import annotations

import logging
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from service.dicom.door import Caller, Door, Rejection

LOGGER = logging.getLogger(__name__)
MAX_WAITING = 512
MIN_REQUEST_BYTES = 68  # the fixed fields
MAX_REQUEST_BYTES = 256 * 1024  # 128 contexts with every transfer syntax are about 60 kB
LINGER_SECONDS = 2.0  # after a rejection: time for the peer to read it and close (PS3.8 9.1.5, ARTIM)
ABORT_PDU = b"\x07\x00\x00\x00\x00\x04\x00\x00\x02\x02"  # provider, unexpected PDU (PS3.8 table 9-26)
A_ASSOCIATE_RQ = 0x01

Address = tuple[str, int]
Enter = Callable[[socket.socket, Address, Caller, bytes], None]
Rejected = Callable[[Caller, Rejection], None]


@dataclass
class _Guest:
    socket: socket.socket
    address: Address
    deadline: float  # monotonic seconds
    received: bytearray = field(default_factory=bytearray)
    leaving: bool = False  # told to go: whatever still comes is dropped


class Lobby:
    """One thread for all connections that have no association yet."""

    def __init__(self, door: Door, handshake_seconds: float, enter: Enter, rejected: Rejected) -> None:
        self._door = door
        self._handshake_seconds = handshake_seconds
        self._enter = enter
        self._rejected = rejected
        self._selector = selectors.DefaultSelector()
        self._arrivals: queue.SimpleQueue[_Guest | None] = queue.SimpleQueue()
        self._bell, self._bell_rope = socket.socketpair()
        self._bell.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._guests: dict[socket.socket, _Guest] = {}  # in order of arrival
        self._thread = threading.Thread(target=self._run, name="intake-lobby", daemon=True)
        self._thread.start()

    def receive(self, connection: socket.socket, address: Address) -> None:
        """Take over a connection that was just accepted."""
        connection.setblocking(False)
        self._arrivals.put(_Guest(connection, address, time.monotonic() + self._handshake_seconds))
        self._bell_rope.send(b"\x00")

    def stop(self) -> None:
        """Close every waiting connection and end."""
        self._arrivals.put(None)
        with suppress(OSError):
            self._bell_rope.send(b"\x00")
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            while self._take_arrivals():
                for key, _ in self._selector.select(self._patience()):
                    if key.fileobj is not self._bell:
                        self._serve(self._guests[key.fileobj])  # type: ignore[index]
                self._dismiss_late()
        finally:
            for guest in list(self._guests.values()):
                self._dismiss(guest)
            self._selector.close()
            self._bell.close()
            self._bell_rope.close()

    def _take_arrivals(self) -> bool:
        with suppress(BlockingIOError):
            self._bell.recv(4096)
        while True:
            try:
                guest = self._arrivals.get_nowait()
            except queue.Empty:
                return True
            if guest is None:
                return False
            if len(self._guests) >= MAX_WAITING:
                self._dismiss(next(iter(self._guests.values())))
            self._guests[guest.socket] = guest
            self._selector.register(guest.socket, selectors.EVENT_READ)

    def _patience(self) -> float:
        if not self._guests:
            return 60.0
        return max(0.0, min(guest.deadline for guest in self._guests.values()) - time.monotonic())

    def _dismiss_late(self) -> None:
        now = time.monotonic()
        for guest in [guest for guest in self._guests.values() if guest.deadline <= now]:
            if not guest.leaving:
                LOGGER.info("%s sent no association request in time", guest.address[0])
            self._dismiss(guest)

    def _serve(self, guest: _Guest) -> None:
        """Read what has come; never more than the one PDU."""
        try:
            data = guest.socket.recv(4096 if guest.leaving else self._missing(guest))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._dismiss(guest)
        elif not guest.leaving:
            guest.received += data
            self._judge(guest)

    def _missing(self, guest: _Guest) -> int:
        if len(guest.received) < 6:
            return 6 - len(guest.received)
        return 6 + int.from_bytes(guest.received[2:6], "big") - len(guest.received)

    def _judge(self, guest: _Guest) -> None:
        header_is_in = len(guest.received) >= 6
        length = int.from_bytes(guest.received[2:6], "big")
        if guest.received[0] != A_ASSOCIATE_RQ or (
            header_is_in and not MIN_REQUEST_BYTES <= length <= MAX_REQUEST_BYTES
        ):
            self._show_out(guest, ABORT_PDU)
        elif header_is_in and self._missing(guest) == 0:
            self._decide(guest)

    def _decide(self, guest: _Guest) -> None:
        pdu = bytes(guest.received)
        caller = Caller(_ae_title(pdu[26:42]), _ae_title(pdu[10:26]), guest.address[0])
        rejection = self._door.admit(caller)
        if rejection is not None:
            answer = bytes((0x03, 0, 0, 0, 0, 4, 0, rejection.result, rejection.source, rejection.reason))
            self._show_out(guest, answer)
            self._rejected(caller, rejection)
            return
        self._forget(guest)
        try:
            self._enter(guest.socket, guest.address, caller, pdu)
        except Exception:
            LOGGER.exception("an association could not be started")
            self._door.leave(caller)
            guest.socket.close()

    def _show_out(self, guest: _Guest, answer: bytes) -> None:
        guest.leaving = True
        guest.deadline = time.monotonic() + min(LINGER_SECONDS, self._handshake_seconds)
        with suppress(OSError):
            guest.socket.send(answer)
            guest.socket.shutdown(socket.SHUT_WR)

    def _dismiss(self, guest: _Guest) -> None:
        self._forget(guest)
        guest.socket.close()

    def _forget(self, guest: _Guest) -> None:
        if self._guests.pop(guest.socket, None) is not None:
            self._selector.unregister(guest.socket)


def _ae_title(field_bytes: bytes) -> str:
    return field_bytes.decode("ascii", "replace").strip(" \x00")
