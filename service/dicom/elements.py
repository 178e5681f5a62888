"""Data elements walked one by one, within a budget, and without building anything of them (PS3.5 7.1, 7.5).

pydicom makes several objects of every element of a sequence. A large multi-frame object would cost seconds, and a peer
that sends millions of empty items would cost the listener its memory. Here an element is a tag and its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import SEEK_CUR, BytesIO
from itertools import product
from typing import BinaryIO, NamedTuple

UNDEFINED_LENGTH = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
MAX_DEPTH = 32  # sequences and items within each other; real objects hold about ten
_LETTERS = [bytes([letter]) for letter in range(ord("A"), ord("Z") + 1)]
_LITTLE_HEAD, _BIG_HEAD = struct.Struct("<HH2sH").unpack, struct.Struct(">HH2sH").unpack
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_VRS = frozenset(first + second for first, second in product(_LETTERS, _LETTERS))


class WalkError(ValueError):
    """The bytes are cut off, nested too deeply, or hold more elements than anybody needs."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How elements are written: with or without their VR, and in which order of bytes."""

    implicit: bool
    little: bool

    def inside(self, vr: bytes | None) -> Encoding:
        """The encoding of a sequence's items: one of unknown VR holds implicit VR little endian (PS3.5 6.2.2)."""
        return Encoding(implicit=True, little=True) if vr == b"UN" else self


@dataclass(slots=True)
class Budget:
    """How many elements may still be walked over in one header."""

    elements: int

    def spend(self) -> None:
        """Count one element; WalkError where there were enough."""
        self.elements -= 1
        if self.elements < 0:
            raise WalkError("too many elements in its sequences")


class Element(NamedTuple):  # made by the hundred thousand
    """The head of one element; `vr` is None in implicit VR and in delimiters."""

    tag: int
    vr: bytes | None
    length: int


def read_head(stream: BinaryIO, encoding: Encoding) -> Element | None:
    """The next element's head; the stream then stands at its value. None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        if head:
            raise WalkError("it ends within an element")
        return None
    group, number, vr, short = (_LITTLE_HEAD if encoding.little else _BIG_HEAD)(head)
    tag = group << 16 | number
    if encoding.implicit or group == 0xFFFE or vr not in _VRS:
        return Element(tag, None, int.from_bytes(head[4:], "little" if encoding.little else "big"))
    if vr not in _LONG_VRS:
        return Element(tag, vr, short)
    length = stream.read(4)
    if len(length) < 4:
        raise WalkError("it ends within an element")
    return Element(tag, vr, int.from_bytes(length, "little" if encoding.little else "big"))


def pass_over(stream: BinaryIO, element: Element, encoding: Encoding, budget: Budget) -> int:
    """Move behind a value, delimiters included; where the value itself ends."""
    if element.length != UNDEFINED_LENGTH:
        return stream.seek(element.length, SEEK_CUR)
    open_ends = [(ITEM_END if element.tag == ITEM else SEQUENCE_END, encoding.inside(element.vr))]
    while True:
        budget.spend()
        awaited, inner = open_ends[-1]
        found = read_head(stream, inner)
        if found is None:
            raise WalkError("it ends within a sequence")
        if found.tag == awaited:
            open_ends.pop()
            if not open_ends:
                return stream.tell() - 8
        elif found.length != UNDEFINED_LENGTH:
            stream.seek(found.length, SEEK_CUR)
        elif len(open_ends) >= MAX_DEPTH:
            raise WalkError("sequences are nested too deeply")
        else:
            open_ends.append((ITEM_END if found.tag == ITEM else SEQUENCE_END, inner.inside(found.vr)))


def items(value: bytes, encoding: Encoding, budget: Budget) -> Iterator[bytes]:
    """The content of every item of a sequence's value."""
    for element, content in _parts(value, encoding, budget):
        if element.tag == ITEM:
            yield content


def elements(content: bytes, encoding: Encoding, budget: Budget) -> Iterator[tuple[Element, bytes]]:
    """Every element of an item, with its value."""
    return _parts(content, encoding, budget)


def _parts(value: bytes, encoding: Encoding, budget: Budget) -> Iterator[tuple[Element, bytes]]:
    stream = BytesIO(value)
    while (element := read_head(stream, encoding)) is not None:
        budget.spend()
        if element.tag in (ITEM_END, SEQUENCE_END):
            return
        start = stream.tell()
        end = pass_over(stream, element, encoding, budget)
        if end > len(value):
            raise WalkError("it ends within an element")
        yield element, value[start:end]
