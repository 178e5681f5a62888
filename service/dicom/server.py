"""pynetdicom's acceptor with deadlines and limits (RULES 2 and 3, read in its 3.0.4 sources).

What is changed, by subclassing only: connections come through the `Lobby`; every PDU must arrive whole within the idle
deadline plus its length at the minimum rate; a PDU's length is checked before it is read; a message's size, pace
and memory are checked as its fragments arrive; a peer that sends requests without waiting for answers is simply
not read until the one in hand is done. Each breach is an A-ABORT and, through `refuse`, a row for people to see.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from socketserver import BaseServer
from typing import Any

from pynetdicom import evt
from pynetdicom._globals import MODE_ACCEPTOR
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.transport import AddressInformation, AssociationSocket, RequestHandler, ThreadedAssociationServer

from service.dicom.door import Caller, Door
from service.dicom.lobby import Address, Lobby, Rejected
from service.settings import Settings

LOGGER = logging.getLogger(__name__)
MAX_COMMAND_BYTES = 16 * 1024  # a C-STORE-RQ command set is about 200 bytes
PDU_TYPES = range(0x01, 0x08)
P_DATA_TF = 0x04
MAX_CONTROL_PDU_BYTES = 1024  # release and abort are 4 bytes

# State machine events (PS3.8 9.2)
CONNECTION_CLOSED = "Evt17"
INVALID_PDU = "Evt19"  # the state machine answers with an A-ABORT
AWAITING_CLOSE = "Sta13"

Breach = Callable[[Caller, str, str], None]  # caller, code, text


class _TooSlowError(Exception):
    """A PDU did not arrive in its time."""


class _ClosedError(Exception):
    """The peer closed the connection inside a PDU."""


class _Connection(AssociationSocket):  # type: ignore[misc]  # pynetdicom is untyped
    """The accepted socket; `poll` instead of `select`, which fails on file descriptors above 1023."""

    @property
    def ready(self) -> bool:
        if self.socket is None or self._is_connected is False:
            return False
        poll = select.poll()
        try:
            poll.register(self.socket, select.POLLIN)
        except (OSError, ValueError):
            self.event_queue.put(CONNECTION_CLOSED)
            return False
        return bool(poll.poll(0))


class _UpperLayer(DULServiceProvider):  # type: ignore[misc]  # pynetdicom is untyped
    """The DUL provider with deadlines and lengths (PS3.8)."""

    def __init__(self, association: IntakeAssociation, settings: Settings, first_pdu: bytes) -> None:
        super().__init__(association)
        self.daemon = True
        self._settings = settings
        self._first_pdu: bytes | None = first_pdu

    def run_reactor(self) -> None:
        """An exception in the state machine ends this association, not more."""
        try:
            super().run_reactor()
        except Exception:
            LOGGER.exception("upper layer failed; the association ends")
        finally:
            if self.socket is not None:
                self.socket._shutdown_socket()

    def _is_transport_event(self) -> bool:
        if self._first_pdu is not None:
            pdu, self._first_pdu = self._first_pdu, None
            self._decode(bytearray(pdu))
            return True
        if self.socket is not None and self.state_machine.current_state == AWAITING_CLOSE:
            self.socket.close()
            return True
        if self.assoc.dimse.is_backed_up:
            return False
        return bool(super()._is_transport_event())

    def _read_pdu_data(self) -> None:
        try:
            pdu = self._receive()
        except _ClosedError:
            self.event_queue.put(CONNECTION_CLOSED)
        except _TooSlowError:
            self.assoc.breach("TOO_SLOW", "the peer stalled or sent too slowly inside a PDU")
            self.event_queue.put(INVALID_PDU)
        except OSError:
            self.event_queue.put(CONNECTION_CLOSED)
        else:
            if pdu is None:
                self.event_queue.put(INVALID_PDU)
            else:
                self._decode(pdu)

    def _receive(self) -> bytearray | None:
        """One whole PDU; None where its type or length is refused."""
        idle = self._settings.idle_seconds
        header = bytearray(6)
        self._fill(memoryview(header), time.monotonic() + idle)
        length = int.from_bytes(header[2:6], "big")
        limit = self._settings.max_pdu_bytes if header[0] == P_DATA_TF else MAX_CONTROL_PDU_BYTES
        if header[0] not in PDU_TYPES or length > limit:
            self.assoc.breach("PDU_REFUSED", f"PDU of type {header[0]} and {length} bytes; the limit is {limit}")
            return None
        pdu = bytearray(6 + length)
        pdu[:6] = header
        rate = self._settings.minimum_bytes_per_second
        deadline = time.monotonic() + idle + length / rate if rate else float("inf")
        self._fill(memoryview(pdu)[6:], deadline)
        return pdu

    def _fill(self, view: memoryview, deadline: float) -> None:
        connection = self.socket.socket if self.socket is not None else None
        if connection is None:
            raise _ClosedError
        while view:
            patience = min(self._settings.idle_seconds, deadline - time.monotonic())
            if patience <= 0:
                raise _TooSlowError
            connection.settimeout(patience)
            try:
                count = connection.recv_into(view)
            except TimeoutError:
                raise _TooSlowError from None
            if count == 0:
                raise _ClosedError
            view = view[count:]
        connection.settimeout(self._settings.idle_seconds)  # for sending
        _acknowledge_at_once(connection)

    def _decode(self, pdu: bytearray) -> None:
        try:
            decoded, event = self._decode_pdu(pdu)
        except Exception as error:
            LOGGER.info("a PDU could not be decoded: %s", type(error).__name__)
            self.event_queue.put(INVALID_PDU)
            return
        self.event_queue.put(event)
        self._recv_pdu.put(decoded)


class _Messages(DIMSEServiceProvider):  # type: ignore[misc]  # pynetdicom is untyped
    """The DIMSE provider with a size, a pace and a memory limit (PS3.7)."""

    def __init__(self, association: IntakeAssociation, settings: Settings, door: Door) -> None:
        super().__init__(association)
        self.message: Any
        self._settings = settings
        self._door = door
        self._held_lock = threading.Lock()
        self._held_bytes = 0
        self._command_bytes = 0
        self._data_bytes = 0
        self._started = 0.0

    @property
    def is_backed_up(self) -> bool:
        """True while a received request waits for the one in hand."""
        return not self.msg_queue.empty()

    @property
    def is_receiving(self) -> bool:
        """True inside a message."""
        return self.message is not None

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Check the fragments, then let pynetdicom put them together."""
        if self.message is None:
            self._command_bytes = self._data_bytes = 0
            self._started = time.monotonic()
        refusal = self._check(primitive)
        if refusal is None:
            try:
                super().receive_primitive(primitive)
            except Exception as error:
                refusal = ("DIMSE_INVALID", f"a DIMSE message could not be decoded: {type(error).__name__}")
        if refusal is not None:
            self.message = None
            self.assoc.breach(*refusal)
            self.dul.event_queue.put(INVALID_PDU)

    def let_go(self, size_bytes: int | None = None) -> None:
        """Give memory back: of one handled data set, or (None) of all."""
        with self._held_lock:
            size_bytes = self._held_bytes if size_bytes is None else min(size_bytes, self._held_bytes)
            self._held_bytes -= size_bytes
        self._door.give_back_memory(size_bytes)

    def _check(self, primitive: P_DATA) -> tuple[str, str] | None:
        for _context, fragment in primitive.presentation_data_value_list:
            if not fragment:
                return "DIMSE_INVALID", "an empty presentation data value"
            size = len(fragment) - 1
            if fragment[0] & 1:
                self._command_bytes += size
            else:
                self._data_bytes += size
                if not self._door.take_memory(size):
                    return "MEMORY_BUDGET", "too many large instances at once"
                with self._held_lock:
                    self._held_bytes += size
        if self._command_bytes > MAX_COMMAND_BYTES:
            return "DIMSE_INVALID", "the command set is too long"
        if self._data_bytes > self._settings.max_instance_bytes:
            return "INSTANCE_TOO_LARGE", f"an instance exceeds {self._settings.max_instance_bytes} bytes"
        rate = self._settings.minimum_bytes_per_second
        elapsed = time.monotonic() - self._started
        if rate and elapsed > self._settings.idle_seconds + (self._command_bytes + self._data_bytes) / rate:
            return "TOO_SLOW", "an instance arrived below the minimum rate"
        return None


class IntakeAssociation(Association):  # type: ignore[misc]  # pynetdicom is untyped
    """One admitted peer's association."""

    def __init__(self, server: IntakeServer, caller: Caller, first_pdu: bytes) -> None:
        super().__init__(server.ae, MODE_ACCEPTOR)
        self._server = server
        self._server_of_intake = server
        self.caller = caller
        self.dul = _UpperLayer(self, server.intake_settings, first_pdu)
        self.dimse = _Messages(self, server.intake_settings, server.door)
        self.acse_timeout = server.ae.acse_timeout  # again: these reach into the new upper layer
        self.network_timeout = server.ae.network_timeout
        self._handlers.clear()

    def breach(self, code: str, text: str) -> None:
        """Record why this association is being aborted."""
        self._server_of_intake.breach(self.caller, code, text)

    @property
    def is_busy(self) -> bool:
        """True while a request is being received or handled."""
        return self.dimse.is_receiving or self.dimse.is_backed_up or self._is_paused

    def _serve_request(self, msg: Any, context_id: int) -> None:
        """pynetdicom leaves a request that lacks a mandatory field without an answer; we end the association."""
        if not msg.is_valid_request:
            self.breach("DIMSE_INVALID", f"a {msg.msg_type} request lacks a mandatory field")
            self.abort()
            return
        super()._serve_request(msg, context_id)

    def run_reactor(self) -> None:
        """The association, then its traces removed whatever happened."""
        try:
            super().run_reactor()
        except Exception:
            LOGGER.exception("association failed")
        finally:
            self.dul.kill_dul()
            if self.dul.socket is not None and self.dul.socket.socket is not None:
                with suppress(OSError):
                    self.dul.socket.socket.close()
            self.dimse.let_go()
            self._server_of_intake.ended(self)


class _Handler(RequestHandler):  # type: ignore[misc]  # pynetdicom is untyped
    """Makes our association instead of pynetdicom's."""

    def __init__(self, request: Any, client_address: Any, server: IntakeServer, caller: Caller, pdu: bytes) -> None:
        self._caller = caller
        self._pdu = pdu
        super().__init__(request, client_address, server)

    def _create_association(self) -> IntakeAssociation:
        server = self.server
        association = IntakeAssociation(server, self._caller, self._pdu)
        association.name = f"AcceptorThread@{self._caller.calling_ae}"
        association.set_socket(_Connection(association, client_socket=self.request))
        association.acceptor.maximum_length = self.ae.maximum_pdu_size
        association.acceptor.ae_title = server.ae_title
        association.acceptor.address_info = self.local
        association.acceptor.implementation_class_uid = self.ae.implementation_class_uid
        association.acceptor.implementation_version_name = self.ae.implementation_version_name
        association.acceptor.supported_contexts = deepcopy(server.contexts)
        association.requestor.address_info = AddressInformation.from_tuple(self.client_address)
        for event, bound in server._handlers.items():
            if event.is_intervention:
                association.bind(event, *bound)
            else:
                for handler, arguments in bound:
                    association.bind(event, handler, arguments)
        server.began(association)
        return association


class IntakeServer(ThreadedAssociationServer):  # type: ignore[misc]  # pynetdicom is untyped
    """Accepts connections, hands them to the lobby, and knows the associations that run."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(
        self,
        ae: ApplicationEntity,
        *arguments: Any,
        settings: Settings,
        door: Door,
        breach: Breach,
        rejected: Rejected,
        **keywords: Any,
    ) -> None:
        self.intake_settings = settings
        self.door = door
        self.breach = breach
        self._running: set[IntakeAssociation] = set()
        self._running_lock = threading.Lock()
        super().__init__(ae, *arguments, **keywords)
        self.lobby = Lobby(door, settings.handshake_seconds, self._enter, rejected)

    @property
    def running(self) -> list[IntakeAssociation]:
        """The associations that run now."""
        with self._running_lock:
            return list(self._running)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A connection was accepted."""
        self.lobby.receive(request, client_address)

    def began(self, association: IntakeAssociation) -> None:
        """An association exists from here on."""
        with self._running_lock:
            self._running.add(association)

    def ended(self, association: IntakeAssociation) -> None:
        """An association is over: its place is free."""
        with self._running_lock:
            if association not in self._running:
                return
            self._running.discard(association)
        self.door.leave(association.caller)

    def shutdown(self) -> None:
        """Accept no more; running associations are the caller's to end."""
        BaseServer.shutdown(self)  # pynetdicom's own also removes us from a list that we never joined
        self.server_close()
        self.lobby.stop()

    def _bind_defaults(self) -> None:
        """Only what answers requests: the standard logging handlers format every message."""
        for event in evt._INTERVENTION_EVENTS:
            self.bind(event, evt.get_default_handler(event))

    def _enter(self, connection: socket.socket, address: Address, caller: Caller, pdu: bytes) -> None:
        connection.settimeout(self.intake_settings.idle_seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            _Handler(connection, address, self, caller, pdu)
        except Exception:
            with self._running_lock:
                self._running = {association for association in self._running if association.is_alive()}
            raise


def _acknowledge_at_once(connection: socket.socket) -> None:
    """Ask Linux for an immediate TCP ACK.

    A sender with Nagle's algorithm holds the data set back until the command's ACK, which a receiver delays by
    up to 40 ms: 25 instances a second at most.
    """
    if hasattr(socket, "TCP_QUICKACK"):
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
