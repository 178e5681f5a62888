"""The walk over elements: it finds what is there, and stops where there is too much."""

from __future__ import annotations

import struct
from io import BytesIO

import pytest

from service.dicom.elements import (
    ITEM,
    ITEM_END,
    MAX_DEPTH,
    SEQUENCE_END,
    UNDEFINED_LENGTH,
    Budget,
    Encoding,
    WalkError,
    elements,
    items,
    pass_over,
    read_head,
)

LITTLE, BIG, IMPLICIT = Encoding(False, True), Encoding(False, False), Encoding(True, True)
SEQUENCE, TEXT = 0x00081115, 0x00080060


def head(tag: int, length: int, vr: bytes | None, encoding: Encoding) -> bytes:
    order = "<" if encoding.little else ">"
    number = struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF)
    if vr is None or encoding.implicit:
        return number + struct.pack(f"{order}L", length)
    if vr == b"CS":
        return number + vr + struct.pack(f"{order}H", length)
    return number + vr + b"\0\0" + struct.pack(f"{order}L", length)


def sequence(content: bytes, encoding: Encoding, *, undefined: bool, vr: bytes = b"SQ") -> bytes:
    """One sequence of one item."""
    inner = encoding.inside(vr)
    if not undefined:
        item = head(ITEM, len(content), None, inner) + content
        return head(SEQUENCE, len(item), vr, encoding) + item
    item = head(ITEM, UNDEFINED_LENGTH, None, inner) + content + head(ITEM_END, 0, None, inner)
    return head(SEQUENCE, UNDEFINED_LENGTH, vr, encoding) + item + head(SEQUENCE_END, 0, None, inner)


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize("encoding", [LITTLE, BIG, IMPLICIT])
def test_sequences_within_sequences(encoding: Encoding, undefined: bool) -> None:
    text = head(TEXT, 2, b"CS", encoding) + b"CT"
    content = sequence(text, encoding, undefined=undefined) + text
    found = list(elements(sequence(content, encoding, undefined=undefined) + text, encoding, Budget(100)))
    assert [element.tag for element, _ in found] == [SEQUENCE, TEXT]
    assert found[1][1] == b"CT"
    (inner,) = items(found[0][1], encoding, Budget(100))
    ((_, nested), (last, value)) = elements(inner, encoding, Budget(100))
    assert (last.tag, value) == (TEXT, b"CT")
    assert list(items(nested, encoding, Budget(100))) == [text]


def test_a_sequence_of_unknown_vr_is_implicit_little_endian() -> None:
    """PS3.5 6.2.2: so it is written by whoever does not know the element."""
    text = head(TEXT, 2, None, IMPLICIT) + b"CT"
    whole = sequence(text, BIG, undefined=True, vr=b"UN")
    stream = BytesIO(whole + b"behind")
    element = read_head(stream, BIG)
    assert element is not None
    pass_over(stream, element, BIG, Budget(10))
    assert stream.read() == b"behind"
    ((element, value),) = elements(whole, BIG, Budget(10))
    assert list(items(value, BIG.inside(element.vr), Budget(10))) == [text]


@pytest.mark.parametrize("undefined", [False, True])
def test_a_value_that_was_cut_off(undefined: bool) -> None:
    whole = sequence(head(TEXT, 2, b"CS", LITTLE) + b"CT", LITTLE, undefined=undefined)
    for length in range(1, len(whole)):
        with pytest.raises(WalkError, match="it ends within"):
            list(elements(whole[:length], LITTLE, Budget(10)))


def test_too_deep_and_too_many() -> None:
    opening = head(SEQUENCE, UNDEFINED_LENGTH, b"SQ", LITTLE) + head(ITEM, UNDEFINED_LENGTH, None, LITTLE)
    with pytest.raises(WalkError, match="nested too deeply"):
        list(elements(opening * MAX_DEPTH, LITTLE, Budget(10_000)))
    empty = head(ITEM, 0, None, LITTLE)
    assert len(list(items(empty * 50, LITTLE, Budget(50)))) == 50
    with pytest.raises(WalkError, match="too many"):
        list(items(empty * 51, LITTLE, Budget(50)))
    with pytest.raises(WalkError, match="too many"):
        list(elements(head(SEQUENCE, UNDEFINED_LENGTH, b"SQ", LITTLE) + empty * 51, LITTLE, Budget(50)))
