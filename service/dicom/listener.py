"""The storage SCP: C-STORE and C-ECHO (PS3.4 Annexes A and B).

Success (0x0000) is answered only when the bytes are durable in the spool and the row is committed (RULES 1). The
statuses we answer, so that a PACS knows whether to try again:

| status | when |
|---|---|
| 0x0000 | stored; stored before with the same bytes; stored before with other bytes (kept aside and flagged) |
| 0xA700 | out of resources, try again: disk below its floor or full, database down, our own failure |
| 0xA900 | the data set's SOP class or instance is not the one the command names |
| 0x0117 | a UID that breaks the rules of UIDs (PS3.7 C.5.4) |
| 0xC000 | the header can't be read |
| 0xC101 | the study has reached its limit of instances: permanent, as trying again can't help |
| 0xC102 | the series is already known under another study: permanent |
"""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import evt
from pynetdicom.ae import ApplicationEntity

from service.dicom.committer import CommitError, Committer
from service.dicom.door import Caller, Door, Rejection, Repeats
from service.dicom.headers import HeaderError, read_facts
from service.dicom.part10 import IMPLEMENTATION_CLASS_UID, encode_file_meta
from service.dicom.received import Commit, Received, Refuse, Stored
from service.dicom.recorder import Recorder, Refusal
from service.dicom.server import IntakeServer
from service.dicom.spool import Spool, SpoolError, SpoolFile
from service.dicom.syntaxes import ACCEPTED
from service.domain.facts import InstanceFacts
from service.settings import Settings

LOGGER = logging.getLogger(__name__)
COMMIT_SECONDS = 60.0  # a handler waits this long for its row

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
INVALID_OBJECT_INSTANCE = 0x0117
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
STUDY_FULL = 0xC101
SERIES_MISMATCH = 0xC102
INSTANCE_MISMATCH = 0xC103

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
MAX_UID_LENGTH = 64  # PS3.5 9.1


class _RefusedError(Exception):
    """This C-STORE is answered with a failure."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.code = code
        self.text = text


@dataclass(frozen=True, slots=True)
class _Request:
    """One C-STORE as it came."""

    sop_class_uid: str
    sop_instance_uid: str
    abstract_syntax: str
    transfer_syntax: str
    data: BytesIO
    caller: Caller


class Listener:
    """The DICOM door of one process: `start`, `stop`, and between them it serves.

    `commit` puts a batch of instances into the database in one transaction, `refuse` records what was turned
    away; both are called from several threads. The listener knows nothing else of the database.
    """

    def __init__(self, settings: Settings, commit: Commit, refuse: Refuse, *, spool: Spool | None = None) -> None:
        self._settings = settings
        self._recorder = Recorder(refuse)
        self._repeats = Repeats()
        self._spool = spool or Spool(settings.spool_dir, settings.disk_floor_bytes)
        self._committer = Committer(commit)
        self._door = Door(settings)
        self._stopped = threading.Event()
        self._server: IntakeServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Sweep the spool, then listen. Raises OSError where the port is taken."""
        self._spool.sweep()
        self._server = self._make_server()
        self._committer.start()
        self._recorder.start()
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="intake-accept", daemon=True
        )
        self._thread.start()

    def stop(self, *, grace_seconds: float = 10.0) -> None:
        """Accept no more, let requests in hand finish within the grace period, end the rest, commit, close."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            _end_associations(server, grace_seconds)
            self._committer.stop()
            self._recorder.stop()
        self._stopped.set()

    def serve_forever(self) -> None:
        """Start, and return when another thread (or a signal handler) has called `stop`."""
        self.start()
        self._stopped.wait()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens; the real port where port 0 was asked for."""
        if self._server is None:
            raise RuntimeError("the listener is not running")
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    @property
    def open_associations(self) -> int:
        """How many associations are open."""
        return self._door.inside

    # Set-up

    def _make_server(self) -> IntakeServer:
        settings = self._settings
        ae = ApplicationEntity(settings.ae_title)
        ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        ae.implementation_version_name = "OSTEOGATE"
        ae.maximum_pdu_size = settings.max_pdu_bytes
        ae.maximum_associations = settings.max_associations + 1  # the door counts; pynetdicom must never refuse
        ae.acse_timeout = settings.handshake_seconds
        ae.dimse_timeout = settings.idle_seconds
        ae.network_timeout = settings.idle_seconds
        for abstract_syntax, transfer_syntaxes in ACCEPTED.items():
            ae.add_supported_context(abstract_syntax, list(transfer_syntaxes))
        server: IntakeServer = ae.make_server(
            (settings.dicom_host, settings.dicom_port),
            evt_handlers=[
                (evt.EVT_C_STORE, self._on_c_store),
                (evt.EVT_C_ECHO, self._on_c_echo),
                (evt.EVT_ACCEPTED, self._on_accepted),
                (evt.EVT_DIMSE_RECV, _clip_uids),
            ],
            server_class=IntakeServer,
            settings=settings,
            door=self._door,
            breach=self._on_breach,
            rejected=self._on_rejected,
        )
        return server

    # What peers ask

    def _on_c_echo(self, _event: Any) -> int:
        """Success means: a C-STORE sent now could be stored. pynetdicom answers Success to an exception here."""
        try:
            self._spool.require_room()
            return SUCCESS if self._committer.is_alive else PROCESSING_FAILURE
        except Exception as error:
            LOGGER.warning("C-ECHO answered with a failure: %s", error)
            return PROCESSING_FAILURE

    def _on_c_store(self, event: Any) -> Dataset:
        request = _Request(
            sop_class_uid=str(event.request.AffectedSOPClassUID),
            sop_instance_uid=str(event.request.AffectedSOPInstanceUID),
            abstract_syntax=str(event.context.abstract_syntax),
            transfer_syntax=str(event.context.transfer_syntax),
            data=event.request.DataSet or BytesIO(),
            caller=event.assoc.caller,
        )
        size_bytes = len(request.data.getbuffer())
        try:
            self._store(request)
            return _status(SUCCESS)
        except _RefusedError as refusal:
            return self._refuse_instance(request, refusal)
        except Exception:
            LOGGER.exception("C-STORE failed inside")
            failure = _RefusedError(OUT_OF_RESOURCES, "INTERNAL_ERROR", "the receiver failed; try again")
            return self._refuse_instance(request, failure)
        finally:
            event.assoc.dimse.let_go(size_bytes)
            event.assoc.dul._idle_timer.restart()  # the peer was waiting for us, not idle

    def _store(self, request: _Request) -> None:
        """Bytes durable, row committed, or _RefusedError."""
        facts = _check(request)
        meta = encode_file_meta(request.sop_class_uid, request.sop_instance_uid, request.transfer_syntax)
        try:
            file = self._spool.write((meta, request.data.getbuffer()))
        except SpoolError as error:
            raise _RefusedError(OUT_OF_RESOURCES, "SPOOL_FULL", str(error)) from error
        received = Received(
            facts=facts,
            sha256=file.sha256,
            path=file.path,
            size_bytes=file.size_bytes,
            calling_ae=request.caller.calling_ae,
            peer_address=request.caller.address,
            received_at=datetime.now(UTC),
        )
        try:
            stored = self._committer.store(received, timeout_seconds=COMMIT_SECONDS)
        except CommitError as error:
            # The file stays: the commit may have happened all the same, and a retry makes the same file.
            raise _RefusedError(OUT_OF_RESOURCES, "DATABASE_DOWN", str(error)) from error
        self._accept(stored, file, facts)

    def _accept(self, stored: Stored, file: SpoolFile, facts: InstanceFacts) -> None:
        if stored is Stored.STUDY_FULL:
            self._spool.discard(file)
            limit = self._settings.max_instances_per_study
            raise _RefusedError(STUDY_FULL, "STUDY_FULL", f"the study has its limit of {limit} instances")
        if stored is Stored.SERIES_MISMATCH:
            self._spool.discard(file)
            raise _RefusedError(SERIES_MISMATCH, "SERIES_MISMATCH", _of_another_study("series", facts))
        if stored is Stored.INSTANCE_MISMATCH:
            self._spool.discard(file)
            raise _RefusedError(INSTANCE_MISMATCH, "INSTANCE_MISMATCH", _of_another_study("image", facts))
        if stored is Stored.CONFLICT:
            LOGGER.warning("instance %s came again with other bytes", facts.sop_instance_uid)

    # What is recorded

    def _refuse_instance(self, request: _Request, refusal: _RefusedError) -> Dataset:
        self._record(
            "instance", refusal.code, refusal.text, request.caller, request.sop_class_uid, status=refusal.status
        )
        return _status(refusal.status, refusal.text)

    def _on_accepted(self, event: Any) -> None:
        """Refused contexts, so that a PACS administrator sees what this peer could not send."""
        for context in event.assoc.rejected_contexts:
            abstract_syntax = UID(str(context.abstract_syntax))
            if context.result == 0x03:
                text, code = f"{abstract_syntax.name} is not taken here", "SOP_CLASS_REFUSED"
            else:
                text, code = f"{abstract_syntax.name}: no proposed transfer syntax is taken", "SYNTAX_REFUSED"
            self._record("context", code, text, event.assoc.caller, str(abstract_syntax)[:MAX_UID_LENGTH])

    def _on_rejected(self, caller: Caller, rejection: Rejection) -> None:
        self._record("association", rejection.code, rejection.text, caller)

    def _on_breach(self, caller: Caller, code: str, text: str) -> None:
        self._record("association", code, text, caller)

    def _record(
        self, kind: str, code: str, text: str, caller: Caller, sop_class_uid: str | None = None, *,
        status: int | None = None,
    ) -> None:  # fmt: skip
        if not self._repeats.is_new(kind, (code, caller, sop_class_uid)):
            return
        LOGGER.info("refused %s from %s at %s: %s", kind, caller.calling_ae, caller.address, text)
        refusal = Refusal(
            at=datetime.now(UTC),
            kind=kind,
            code=code,
            text=text,
            calling_ae=caller.calling_ae,
            peer_address=caller.address,
            sop_class_uid=sop_class_uid[:MAX_UID_LENGTH] if sop_class_uid else None,
            status=status,
        )
        if kind == "instance":
            self._recorder.record(refusal)
        else:
            self._recorder.record_soon(refusal)


def _of_another_study(what: str, facts: InstanceFacts) -> str:
    """Found on /intake by the study that it was sent as, of which no row was made."""
    return f"the {what} belongs to another study; sent as study {facts.study_uid}, series {facts.series_uid}"


def _check(request: _Request) -> InstanceFacts:
    """The header's facts, once command, context and data set agree and every UID is one."""
    for uid in (request.sop_class_uid, request.sop_instance_uid):
        _require_uid(uid)
    if request.sop_class_uid != request.abstract_syntax:
        raise _RefusedError(DOES_NOT_MATCH, "SOP_CLASS_MISMATCH", "the command's SOP class is not the context's")
    try:
        facts = read_facts(request.data, request.transfer_syntax)
    except HeaderError as error:
        raise _RefusedError(CANNOT_UNDERSTAND, "HEADER_UNREADABLE", str(error)) from error
    for uid in (facts.sop_class_uid, facts.sop_instance_uid, facts.study_uid, facts.series_uid):
        _require_uid(uid)
    if facts.sop_class_uid != request.sop_class_uid:
        raise _RefusedError(DOES_NOT_MATCH, "SOP_CLASS_MISMATCH", "the data set's SOP class is not the command's")
    if facts.sop_instance_uid != request.sop_instance_uid:
        text = "the data set's SOP instance is not the command's"
        raise _RefusedError(DOES_NOT_MATCH, "SOP_INSTANCE_MISMATCH", text)
    return facts


def _require_uid(uid: str) -> None:
    if len(uid) > MAX_UID_LENGTH or not _UID.fullmatch(uid):
        raise _RefusedError(INVALID_OBJECT_INSTANCE, "UID_INVALID", f"not a UID: {uid[:80]!r}")


def _clip_uids(event: Any) -> None:
    """Cut a UID of more than 64 characters in a command set, which would otherwise end the whole association.

    The cut UID can't equal the data set's, so the instance is still refused, alone, and with a status.
    """
    for element in event.message.command_set:
        if element.VR == "UI" and len(str(element.value)) > MAX_UID_LENGTH:
            element._value = UID(str(element.value)[:MAX_UID_LENGTH], validation_mode=0)


def _status(status: int, comment: str = "") -> Dataset:
    answer = Dataset()
    answer.Status = status
    if comment:
        answer.ErrorComment = comment.encode("ascii", "replace").decode("ascii")[:64]  # LO, PS3.7 C.4.2
    return answer


def _end_associations(server: IntakeServer, grace_seconds: float) -> None:
    deadline = time.monotonic() + grace_seconds
    while (running := server.running) and time.monotonic() < deadline:
        for association in running:
            if not association.is_busy and not association._sent_abort:
                association.abort()
        time.sleep(0.02)
    for association in server.running:
        association.abort()
