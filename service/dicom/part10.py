"""DICOM Part 10 file meta information, written and read without touching the data set (PS3.10 7.1).

The listener puts a preamble and this meta information before the bytes it received and never re-encodes them. The meta
information is a pure function of three UIDs (no version, no AE title), so that the same data set always
makes the same file and thus the same hash.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PREAMBLE = bytes(128) + b"DICM"
IMPLEMENTATION_CLASS_UID = "2.25.61409152349783154062617783318391403"  # ours, PS3.7 D.3.3.2; fixed for ever: see above
MAX_META_BYTES = 64 * 1024
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})


class NotPart10Error(Exception):
    """The bytes don't begin with a readable DICOM Part 10 preamble and file meta information."""


@dataclass(frozen=True, slots=True)
class FileMeta:
    """What the file meta information says, and where the data set begins."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    offset: int  # bytes from the start of the file


class BoundedFile(io.BufferedReader):
    """A file whose reads end where it ends.

    `read(n)` of an ordinary file allocates n bytes before it reads, and pydicom reads what an element's length claims:
    up to 4 GiB, whatever there is.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """At most what is left."""
        left = max(self._size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def encode_file_meta(sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
    """Preamble, prefix and file meta information (explicit VR little endian)."""
    elements = struct.pack("<HH2s2xI2s", 0x0002, 0x0001, b"OB", 2, b"\x00\x01") + b"".join(
        _uid_element(element, uid)
        for element, uid in (
            (0x0002, sop_class_uid),
            (0x0003, sop_instance_uid),
            (0x0010, transfer_syntax_uid),
            (0x0012, IMPLEMENTATION_CLASS_UID),
        )
    )
    return PREAMBLE + struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, len(elements)) + elements


def read_file_meta(stream: BinaryIO) -> FileMeta:
    """Read the file meta information and leave `stream` at the first byte of the data set."""
    head = stream.read(132)
    if len(head) < 132 or head[128:] != b"DICM":
        raise NotPart10Error("no DICM prefix")
    uids: dict[int, str] = {}
    offset = 132
    while offset < MAX_META_BYTES:
        header = stream.read(8)
        if len(header) < 8 or header[:2] != b"\x02\x00":
            break
        element, length, header_bytes = _element(header, stream)
        if length > MAX_META_BYTES:
            raise NotPart10Error("file meta information is broken")
        value = stream.read(length)
        if len(value) < length:
            raise NotPart10Error("file meta information is cut off")
        offset += header_bytes + length
        if element in (0x0002, 0x0003, 0x0010):
            uids[element] = value.rstrip(b"\x00 ").decode("ascii", "replace")
    stream.seek(offset)
    if not uids.get(0x0010):
        raise NotPart10Error("no transfer syntax in the file meta information")
    return FileMeta(uids.get(0x0002, ""), uids.get(0x0003, ""), uids[0x0010], offset)


def _element(header: bytes, stream: BinaryIO) -> tuple[int, int, int]:
    """Element number, value length and size of the element's header."""
    element = int.from_bytes(header[2:4], "little")
    if header[4:6] in _LONG_VRS:
        return element, int.from_bytes(stream.read(4), "little"), 12
    return element, int.from_bytes(header[6:8], "little"), 8


def _uid_element(element: int, uid: str) -> bytes:
    value = uid.encode("ascii")
    value += b"\x00" * (len(value) % 2)
    return struct.pack("<HH2sH", 0x0002, element, b"UI", len(value)) + value
