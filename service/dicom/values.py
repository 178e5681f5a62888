"""The values of one data set, read tolerantly: raw bytes in, plain values or None out.

Values are taken from the raw bytes instead of through pydicom's converters: those warn or raise on the values that
real archives hold (empty strings, a comma in a DS, two values where one belongs).
"""

from __future__ import annotations

import math
import re
import struct
import threading
import warnings
from collections.abc import Iterable

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag

from service.dicom.elements import Budget, Element, Encoding, elements

MAX_TEXT = 255  # characters kept of any one value; PS3.5 6.2 allows 64 for LO and per PN component group
MAX_SEQUENCE_BYTES = 1024 * 1024  # of a sequence that is built item by item; a longer one counts as unreadable

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # PostgreSQL keeps no NUL; no header value needs the others
UNDECLARED = ["iso8859"]  # as pydicom calls the default repertoire, ISO_IR 6: beyond ASCII it holds nothing
_CHARSET_LOCK = threading.Lock()  # warnings.catch_warnings changes the process, not the thread


class Header:
    """Keyword access to a data set: raw bytes in, plain values or None out."""

    def __init__(self, dataset: Dataset, encodings: list[str] | None = None) -> None:
        self._dataset = dataset
        self._encodings = encodings or UNDECLARED
        charsets = list(self.texts("SpecificCharacterSet"))
        if any(charsets):
            self._encodings = _python_encodings(charsets)

    def texts(self, keyword: str) -> tuple[str, ...]:
        """Every value as stripped text; () where the element is absent or empty."""
        element = self._dataset.get_item(keyword)
        if element is None:
            return ()
        value = element.value
        if isinstance(element, RawDataElement) and isinstance(value, bytes):
            parts = self._decode(value).split("\\")
        elif isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
            parts = [str(part) for part in value]
        else:
            parts = [] if value is None else [str(value)]
        cleaned = tuple(_CONTROL.sub(" ", part).strip()[:MAX_TEXT] for part in parts)
        return cleaned if any(cleaned) else ()

    def text(self, keyword: str) -> str | None:
        """The first value that isn't empty."""
        return next((part for part in self.texts(keyword) if part), None)

    def number(self, keyword: str) -> float | None:
        """The first value as a finite number."""
        values = self.numbers(keyword)
        return values[0] if values else None

    def numbers(self, keyword: str) -> tuple[float, ...] | None:
        """Every value as a finite number, or None if one of them is not."""
        try:
            values = tuple(float(part) for part in self.texts(keyword))
        except ValueError:
            return None
        return values if values and all(map(math.isfinite, values)) else None

    def integer(self, keyword: str) -> int | None:
        """An IS value."""
        value = self.number(keyword)
        return int(value) if value is not None and value == int(value) and abs(value) < 2**31 else None

    def unsigned(self, keyword: str) -> int | None:
        """A US value."""
        element = self._dataset.get_item(keyword)
        if isinstance(element, RawDataElement) and isinstance(element.value, bytes):
            if len(element.value) < 2:
                return None
            order = "<H" if element.is_little_endian else ">H"
            return int(struct.unpack(order, element.value[:2])[0])
        return self.integer(keyword)

    def items(self, keyword: str) -> list[Header]:
        """The items of a sequence; [] where it is absent, can't be read or is too large to be built."""
        element = self._dataset.get_item(keyword)
        if element is None or (isinstance(element, RawDataElement) and len(element.value or b"") > MAX_SEQUENCE_BYTES):
            return []
        try:
            value = self._dataset[keyword].value
        except Exception:  # whatever a broken nested sequence makes pydicom raise, RecursionError included
            return []
        return [Header(item, self._encodings) for item in value] if isinstance(value, Sequence) else []

    def is_unreadable(self, keyword: str) -> bool:
        """True for a sequence that holds bytes but gives no items."""
        element = self._dataset.get_item(keyword)
        return element is not None and bool(element.value) and not self.items(keyword)

    def raw(self, keyword: str) -> tuple[bytes, Encoding] | None:
        """A sequence's bytes and how they are encoded; None where it is absent or empty."""
        element = self._dataset.get_item(keyword)
        if element is None or not element.value:
            return None
        if isinstance(element, RawDataElement):
            encoding = Encoding(element.is_implicit_VR, element.is_little_endian)
            return bytes(element.value), encoding.inside(b"UN" if element.VR == "UN" else None)
        return _encoded(element.value), Encoding(implicit=False, little=True)

    def inside(self, content: bytes, encoding: Encoding, budget: Budget, wanted: frozenset[int]) -> Header:
        """The wanted elements of an item's bytes; the character set goes down with it."""
        return Header(dataset_of(elements(content, encoding, budget), encoding, wanted), self._encodings)

    def holding(self, element: Element, value: bytes, encoding: Encoding) -> Header:
        """A data set that holds one sequence, given by its bytes."""
        return Header(Dataset({element.tag: raw_sequence(element, value, encoding)}), self._encodings)

    def _decode(self, value: bytes) -> str:
        if value.isascii() and b"\x1b" not in value:
            return value.decode("ascii")
        if self._encodings == UNDECLARED and (told := _as_utf8(value)) is not None:
            return told
        try:
            with _CHARSET_LOCK, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return str(decode_bytes(value, self._encodings, {0x5C, 0x5E, 0x3D}))
        except Exception:
            return value.decode("ascii", "replace")


def _as_utf8(value: bytes) -> str | None:
    """What senders that declare no character set (or ISO_IR 6) mostly mean beyond ASCII; None where it is no UTF-8."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _python_encodings(charsets: list[str]) -> list[str]:
    try:
        with _CHARSET_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(convert_encodings(charsets))
    except Exception:
        return UNDECLARED


def dataset_of(found: Iterable[tuple[Element, bytes]], encoding: Encoding, wanted: frozenset[int]) -> Dataset:
    """The wanted elements as a data set of raw values, of which nothing has been converted."""
    return Dataset({element.tag: _raw(element, value, encoding) for element, value in found if element.tag in wanted})


def raw_sequence(element: Element, value: bytes, encoding: Encoding) -> RawDataElement:
    """A sequence by its items' bytes, whatever its VR says and however its length was given."""
    return _raw(Element(element.tag, b"SQ", len(value)), value, encoding.inside(element.vr))


def _raw(element: Element, value: bytes, encoding: Encoding) -> RawDataElement:
    vr = None if element.vr is None else element.vr.decode("ascii")
    return RawDataElement(
        BaseTag(element.tag), vr, len(value), value, 0, encoding.implicit or vr is None, encoding.little
    )


def _encoded(sequence: Sequence) -> bytes:
    """A sequence's items, explicit VR little endian."""
    stream = DicomBytesIO()
    stream.is_implicit_VR, stream.is_little_endian = False, True
    for item in sequence:
        content = DicomBytesIO()
        content.is_implicit_VR, content.is_little_endian = False, True
        write_dataset(content, item)
        value = content.getvalue()
        stream.write(struct.pack("<HHL", 0xFFFE, 0xE000, len(value)) + value)
    return bytes(stream.getvalue())
