"""A listener with a database in memory, small slices, and a peer that can misbehave at the level of bytes."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.filewriter import write_dataset

from service.dicom import syntaxes
from service.dicom.listener import Listener
from service.dicom.part10 import encode_file_meta
from service.dicom.received import Received, Stored
from service.dicom.spool import Spool
from service.settings import Settings
from tests.conftest import absent, of_dcmtk

PATIENCE_SECONDS = 60.0  # of a wait that ends early: only what hangs takes so long
CT = syntaxes.CT_IMAGE_STORAGE
EXPLICIT = syntaxes.EXPLICIT_VR_LITTLE_ENDIAN


class Database:
    """What `service.workflow.intake` does, in memory and without its rules about studies."""

    def __init__(self) -> None:
        self.rows: dict[str, Received] = {}
        self.conflicts: list[Received] = []
        self.refusals: list[dict[str, Any]] = []
        self.batches: list[int] = []
        self.is_down = False
        self.answer: Stored | None = None
        self._lock = threading.Lock()

    def commit(self, batch: Sequence[Received]) -> list[Stored]:
        if self.is_down:
            raise ConnectionError("the database is down")
        with self._lock:
            self.batches.append(len(batch))
            return [self.answer or self._store(received) for received in batch]

    def refuse(self, **refusal: Any) -> None:
        if self.is_down:
            raise ConnectionError("the database is down")
        self.refusals.append(refusal)

    def codes(self) -> list[str]:
        return [refusal["code"] for refusal in self.refusals]

    def _store(self, received: Received) -> Stored:
        known = self.rows.setdefault(received.facts.sop_instance_uid, received)
        if known is received:
            return Stored.NEW
        if known.sha256 == received.sha256:
            return Stored.DUPLICATE
        self.conflicts.append(received)
        return Stored.CONFLICT


def settings_for(folder: Path, **changes: Any) -> Settings:
    """Any free port, no disk floor, and deadlines that no healthy peer meets; a test of a deadline sets its own."""
    values: dict[str, Any] = {"data_dir": folder, "dicom_port": 0, "disk_floor_bytes": 0, "handshake_seconds": 60.0}
    return Settings(**(values | changes))


@contextmanager
def listening(folder: Path, database: Database, *, spool: Spool | None = None, **changes: Any) -> Iterator[Listener]:
    listener = Listener(settings_for(folder, **changes), database.commit, database.refuse, spool=spool)
    listener.start()
    try:
        yield listener
    finally:
        listener.stop(grace_seconds=1.0)


def ct_slice(number: int = 1, **changes: Any) -> Dataset:
    """A small CT slice; `changes` are keywords, None removes one."""
    dataset = Dataset()
    values: dict[str, Any] = {
        "SOPClassUID": CT,
        "SOPInstanceUID": f"1.2.3.4.{number}",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "Modality": "CT",
        "PatientID": "P1",
        "PatientAge": "065Y",
        "KVP": "120",
        "ImagePositionPatient": [0, 0, number],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "Rows": 8,
        "Columns": 8,
        "BitsAllocated": 16,
        "PixelData": bytes([number % 256]) * 128,
    }
    for keyword, value in (values | changes).items():
        if value is not None:
            setattr(dataset, keyword, value)
    return dataset


def encoded(dataset: Dataset, syntax: str = EXPLICIT) -> bytes:
    from pydicom.filebase import DicomBytesIO

    stream = DicomBytesIO()
    stream.is_implicit_VR = syntax == syntaxes.IMPLICIT_VR_LITTLE_ENDIAN
    stream.is_little_endian = syntax != syntaxes.EXPLICIT_VR_BIG_ENDIAN
    write_dataset(stream, dataset)
    return bytes(stream.getvalue())


def slice_file(folder: Path, number: int = 1, **changes: Any) -> Path:
    dataset = ct_slice(number, **changes)
    path = folder / f"slice-{number}.dcm"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_file_meta(CT, str(dataset.SOPInstanceUID), EXPLICIT) + encoded(dataset))
    return path


def assert_intact(spool: Path, received: Received) -> bytes:
    """The file of a row is there and whole; returns its bytes."""
    content = (spool / received.path).read_bytes()
    assert hashlib.sha256(content).hexdigest() == received.sha256
    assert len(content) == received.size_bytes
    return content


def temp_files(spool: Path) -> list[Path]:
    return list((spool / "incoming").iterdir())


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; the deadline only ends what hangs."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def is_closed(connection: socket.socket) -> bool:
    """Wait until the other end has closed the connection, and be it by a reset; what still comes is read over.

    A socket that was cut off ends with FIN (recv gives b"") or RST (ConnectionError), as the kernel happens to have
    unread bytes or not: both free it. False where it is still open after a long wait.
    """
    connection.settimeout(PATIENCE_SECONDS)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def is_open(connection: socket.socket) -> bool:
    """Whether the other end has kept the connection open until now, and sent nothing."""
    connection.setblocking(False)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def peer_program(name: str) -> str:
    """The path of a dcmtk program; skipped, visibly, where it is absent and not required."""
    return of_dcmtk(name) or absent(f"dcmtk's {name}")


# A peer at the level of bytes (PS3.8 9.3, PS3.7 6.3)


def _item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(content)) + content


def associate_request(
    called: str = "OSTEOGATE", calling: str = "RAW", *, sop_class: str = CT, syntax: str = EXPLICIT
) -> bytes:
    context = bytes((1, 0, 0, 0)) + _item(0x30, sop_class.encode()) + _item(0x40, syntax.encode())
    user = _item(0x51, struct.pack(">I", 16384)) + _item(0x52, b"1.2.3")
    body = struct.pack(">H2x16s16s32x", 1, called.encode().ljust(16), calling.encode().ljust(16))
    body += _item(0x10, b"1.2.840.10008.3.1.1.1") + _item(0x20, context) + _item(0x50, user)
    return struct.pack(">BxI", 1, len(body)) + body


def p_data(fragment: bytes, control: int) -> bytes:
    value = struct.pack(">IBB", len(fragment) + 2, 1, control) + fragment
    return struct.pack(">BxI", 4, len(value)) + value


def store_command(sop_instance: str, *, sop_class: str = CT, message_id: int = 1) -> bytes:
    def element(number: int, value: bytes) -> bytes:
        value += b"\x00" * (len(value) % 2)
        return struct.pack("<HHI", 0, number, len(value)) + value

    def short(number: int) -> bytes:
        return struct.pack("<H", number)

    body = element(0x0002, sop_class.encode()) + element(0x0100, short(1)) + element(0x0110, short(message_id))
    body += element(0x0700, short(0)) + element(0x0800, short(1)) + element(0x1000, sop_instance.encode())
    return element(0x0000, struct.pack("<I", len(body))) + body


class RawPeer:
    """A TCP connection to a listener that sends what it is told to."""

    def __init__(self, listener: Listener) -> None:
        self.socket = socket.create_connection(listener.address, timeout=PATIENCE_SECONDS)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, content: bytes) -> None:
        self.socket.sendall(content)

    def associate(self, **changes: str) -> int:
        """Ask for an association; the answer's PDU type (2 accepted, 3 rejected)."""
        self.send(associate_request(**changes))
        return self.read_pdu()[0]

    def store(self, dataset: bytes, sop_instance: str, *, sop_class: str = CT, message_id: int = 1) -> int:
        """One C-STORE; its status, or -1 where the association ended instead."""
        self.send(p_data(store_command(sop_instance, sop_class=sop_class, message_id=message_id), 3))
        for start in range(0, len(dataset), 16000):
            rest = start + 16000 < len(dataset)
            self.send(p_data(dataset[start : start + 16000], 0 if rest else 2))
        return self.read_status()

    def read_status(self) -> int:
        pdu = self.read_pdu()
        if not pdu or pdu[0] != 4:
            return -1
        stream = BytesIO(pdu[12:])
        while header := stream.read(8):
            _, number, length = struct.unpack("<HHI", header)
            value = stream.read(length)
            if number == 0x0900:
                return int(struct.unpack("<H", value)[0])
        return -1

    def read_pdu(self) -> bytes:
        """One PDU, or b"" where the connection was closed."""
        header = self._read(6)
        return header + self._read(int.from_bytes(header[2:6], "big")) if len(header) == 6 else b""

    def is_closed(self) -> bool:
        """True once the listener has closed the connection (an abort before that is read over)."""
        return is_closed(self.socket)

    def _read(self, count: int) -> bytes:
        content = b""
        try:
            while len(content) < count and (more := self.socket.recv(count - len(content))):
                content += more
        except ConnectionError:
            pass
        return content
