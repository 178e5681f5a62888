"""A storage SCU: files and folders to a peer by C-STORE (PS3.4 Annex B), their bytes as they are.

Data sets are neither parsed nor re-encoded: each goes in the transfer syntax it is stored in, so a peer that
takes no such syntax refuses the context and the report says so.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom.uid import UID
from pynetdicom import evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.transport import AssociationSocket

from service.dicom.headers import HeaderError, read_facts
from service.dicom.part10 import FileMeta, NotPart10Error, read_file_meta

MAX_CONTEXTS = 128  # PS3.8 9.3.2.2: odd identifiers up to 255
SUCCESS = 0x0000
WARNINGS = frozenset({0xB000, 0xB006, 0xB007})  # stored, with a remark (PS3.4 table B.2-1)
ENDED = "the peer ended the association"
Context = tuple[str, str]  # SOP class UID, transfer syntax UID
Progress = Callable[[int, int], None]  # files settled, files in all


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one file: sent, perhaps with a remark of the peer's, or failed."""

    path: Path
    failure: str | None = None
    remark: str | None = None  # of a warning status: the peer holds the object
    status: int | None = None  # that the peer answered; None: it did not


@dataclass
class SendReport:
    """What became of each file; files that were not come to, because the sender was told to stop, stand nowhere."""

    sent: list[Path] = field(default_factory=list)
    remarks: list[tuple[Path, str]] = field(default_factory=list)  # on files that were sent
    failed: list[tuple[Path, str]] = field(default_factory=list)
    passed_over: list[tuple[Path, str]] = field(default_factory=list)  # what lay in a folder and is no DICOM

    @property
    def total(self) -> int:
        """Files settled, one way or the other."""
        return len(self.sent) + len(self.failed)

    def add(self, answer: Answer) -> None:
        """Note what became of one more file."""
        if answer.failure is not None:
            self.failed.append((answer.path, answer.failure))
            return
        self.sent.append(answer.path)
        if answer.remark is not None:
            self.remarks.append((answer.path, answer.remark))


@dataclass(frozen=True, slots=True)
class _Outgoing:
    path: Path
    meta: FileMeta

    @property
    def context(self) -> Context:
        return self.meta.sop_class_uid, self.meta.transfer_syntax_uid


def send_files(
    paths: Sequence[Path],
    *,
    host: str,
    port: int,
    called: str,
    calling: str = "OSTEOGATE-SCU",
    on_progress: Progress | None = None,
    on_answer: Callable[[Answer], None] | None = None,
    going_on: Callable[[], bool] = lambda: True,
    timeout_seconds: float = 60.0,
) -> SendReport:
    """Send every DICOM file of `paths` once; nothing is tried twice.

    Folders are walked, and what is no DICOM in them is passed over; a file that was named must be one. `on_answer`
    hears of each file as soon as its fate is known; `going_on` is asked before each file is sent.
    """
    report = SendReport()
    named = {path for path in paths if not path.is_dir()}
    outgoing = [found for path in _files(paths) if (found := _outgoing(path, report, named)) is not None]
    total = report.total + len(outgoing)

    def settle(answer: Answer) -> None:
        report.add(answer)
        if on_answer is not None:
            on_answer(answer)
        if on_progress is not None:
            on_progress(report.total, total)

    if on_answer is not None:
        for path, failure in report.failed:
            on_answer(Answer(path, failure))
    ae = _Entity(calling)
    ae.acse_timeout = ae.connection_timeout = timeout_seconds
    ae.dimse_timeout = ae.network_timeout = timeout_seconds
    for group in _groups(outgoing):
        if going_on():
            _send_group(ae, group, (host, port, called), settle, going_on)
    return report


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(found for found in path.rglob("*") if found.is_file())
        else:
            yield path


def _outgoing(path: Path, report: SendReport, named: Container[Path]) -> _Outgoing | None:
    """The file's meta information, completed from its data set; None (and a line in the report) for no DICOM."""
    try:
        with path.open("rb") as stream:
            meta = read_file_meta(stream)
        if not (meta.sop_class_uid and meta.sop_instance_uid):
            facts = read_facts(path)
            meta = FileMeta(facts.sop_class_uid, facts.sop_instance_uid, meta.transfer_syntax_uid, meta.offset)
    except (NotPart10Error, HeaderError) as error:
        lines = report.failed if path in named else report.passed_over
        lines.append((path, f"not a DICOM file: {error}"))
    except OSError as error:
        report.failed.append((path, f"can't be read: {error.strerror}"))
    else:
        return _Outgoing(path, meta)
    return None


def _groups(outgoing: Iterable[_Outgoing]) -> list[list[_Outgoing]]:
    """Files in their order, cut where one association's contexts are used up."""
    groups: list[list[_Outgoing]] = []
    contexts: set[Context] = set()
    for file in outgoing:
        if not groups or (file.context not in contexts and len(contexts) == MAX_CONTEXTS):
            groups.append([])
            contexts = set()
        contexts.add(file.context)
        groups[-1].append(file)
    return groups


def _send_group(
    ae: ApplicationEntity,
    group: list[_Outgoing],
    peer: tuple[str, int, str],
    settle: Callable[[Answer], None],
    going_on: Callable[[], bool],
) -> None:
    host, port, called = peer
    ae.requested_contexts = []
    for sop_class, syntax in dict.fromkeys(file.context for file in group):
        ae.add_requested_context(sop_class, syntax)
    association = ae.associate(host, port, ae_title=called, evt_handlers=[(evt.EVT_CONN_OPEN, _prepare_socket)])
    if not association.is_established:
        nothing_taken = association.is_aborted and association.rejected_contexts
        for file in group:
            settle(Answer(file.path, _not_taken(file) if nothing_taken else _why_not(association, host, port)))
        return
    _keep_answers(association)
    accepted = {
        (str(context.abstract_syntax), str(context.transfer_syntax[0])): context.context_id
        for context in association.accepted_contexts
    }
    try:
        for number, file in enumerate(group):
            context_id = accepted.get(file.context)
            if not going_on():
                break
            if not association.is_established:
                settle(Answer(file.path, ENDED))
            elif context_id is None:
                settle(Answer(file.path, _not_taken(file)))
            else:
                settle(_store(association, file, context_id, number % 65535 + 1))
    finally:
        if association.is_established:
            association.release()


def _keep_answers(association: Any) -> None:
    """Let nobody but `_store`, which waits for it, take an answer off the queue.

    pynetdicom's reactor looks for messages once more after it has said that it is paused; on a busy machine it takes
    the answer to a request that was sent meanwhile, drops it as unexpected, and the sender waits in vain.
    """
    take = association.dimse.get_msg
    association.dimse.get_msg = lambda block=False: take(block=True) if block else (None, None)


def _store(association: Any, file: _Outgoing, context_id: int, message_id: int) -> Answer:
    """One C-STORE.

    Not `send_c_store`: that one decodes and re-encodes the data set.
    """
    try:
        with file.path.open("rb") as stream:
            stream.seek(file.meta.offset)
            data = stream.read()
    except OSError as error:
        return Answer(file.path, f"can't be read: {error.strerror}")
    request = C_STORE()
    request.MessageID = message_id
    request.Priority = 2
    request.AffectedSOPClassUID = file.meta.sop_class_uid
    request.AffectedSOPInstanceUID = file.meta.sop_instance_uid
    request.DataSet = BytesIO(data)
    association._reactor_checkpoint.clear()  # as send_c_store does: the reactor must not take our answer
    try:
        while not association._is_paused:
            if not association.is_alive():
                return Answer(file.path, ENDED)
        association.dimse.send_msg(request, context_id)
        _, response = association.dimse.get_msg(block=True)
    finally:
        association._reactor_checkpoint.set()
    if response is None:
        association.abort()
        return Answer(file.path, "no answer: the association was ended")
    return _answer(file.path, response)


def _answer(path: Path, response: Any) -> Answer:
    status = response.Status
    if status == SUCCESS:
        return Answer(path, status=status)
    comment = getattr(response, "ErrorComment", None)
    told = f"0x{status:04X}" + (f": {comment}" if comment else "")
    if status in WARNINGS:
        return Answer(path, remark=f"stored with warning {told}", status=status)
    return Answer(path, f"refused with status {told}", status=status)


def _not_taken(file: _Outgoing) -> str:
    return f"the peer takes no {UID(file.meta.sop_class_uid).name} as {UID(file.meta.transfer_syntax_uid).name}"


def _why_not(association: Any, host: str, port: int) -> str:
    answer = _rejection(association)
    if answer is None:
        return f"no association with {host}:{port}"
    return f"{host}:{port} rejected the association: {answer.reason_str}"


def _rejection(association: Any) -> A_ASSOCIATE | None:
    """The peer's A-ASSOCIATE-RJ, or None where it sent none.

    One that comes back before pynetdicom's own thread has looked at the new connection closes it, is taken for a
    connection that failed, and stays in the queue unread.
    """
    if association.is_rejected:
        rejection: A_ASSOCIATE = association.acceptor.primitive
        return rejection
    unread = association.dul.receive_pdu(wait=False)
    return unread if isinstance(unread, A_ASSOCIATE) and unread.result else None


class _Socket(AssociationSocket):  # type: ignore[misc]
    """pynetdicom leaves the socket of a refused connection open: its close stands behind a shutdown that fails."""

    def _shutdown_socket(self) -> None:
        held = self.socket
        super()._shutdown_socket()
        if held is not None:
            held.close()


class _Entity(ApplicationEntity):  # type: ignore[misc]
    """An application entity whose associations close what they opened."""

    def _create_socket(self, assoc: Any, address: Any, tls_args: Any) -> _Socket:
        made = _Socket(assoc, address=address)
        made.tls_args = tls_args
        return made


def _prepare_socket(event: Any) -> None:
    """Nagle's algorithm would hold each data set back until the command's ACK: 40 ms an instance.

    And a peer that has stopped reading would hold the sender for ever: pynetdicom's time-outs wait for answers only.
    """
    connection = event.assoc.dul.socket.socket
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        milliseconds = int(1000 * event.assoc.network_timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
