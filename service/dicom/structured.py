"""A received structured report, read tolerantly into plain values: never a guess, and never an error for odd content.

What is too deep or too much is left out: no densitometer writes thousands of items, and a report decides nothing
about what else is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from service.dicom.headers import HeaderError, read_header
from service.dicom.values import Header
from service.domain.content import Concept, Item

MAX_DEPTH = 12
MAX_ITEMS = 10_000
KEYWORDS = ("SpecificCharacterSet", "SOPClassUID", "ValueType", "ConceptNameCodeSequence", "ContentSequence")


@dataclass(slots=True)
class _Left:
    items: int


def read_content(path: Path) -> Item:
    """The content tree of the report in this Part 10 file.

    Raises:
        HeaderError: it is no readable DICOM.
        OSError: the file cannot be read.
    """
    top = read_header(path, KEYWORDS)
    if top.is_unreadable("ContentSequence"):
        raise HeaderError("its content cannot be read, or is larger than that of any report of a densitometer")
    return _item(top, _Left(MAX_ITEMS), 0)


def _item(header: Header, left: _Left, depth: int) -> Item:
    left.items -= 1
    measured = next(iter(header.items("MeasuredValueSequence")), None)
    return Item(
        kind=header.text("ValueType") or "",
        name=_concept(header, "ConceptNameCodeSequence"),
        text=header.text("TextValue") or header.text("Date") or header.text("DateTime") or "",
        code=_concept(header, "ConceptCodeSequence"),
        number="" if measured is None else measured.text("NumericValue") or "",
        unit=Concept() if measured is None else _concept(measured, "MeasurementUnitsCodeSequence"),
        items=_below(header, left, depth),
    )


def _below(header: Header, left: _Left, depth: int) -> tuple[Item, ...]:
    found: list[Item] = []
    if depth < MAX_DEPTH:
        for one in header.items("ContentSequence"):
            if left.items <= 0:
                break
            found.append(_item(one, left, depth + 1))
    return tuple(found)


def _concept(header: Header, keyword: str) -> Concept:
    for one in header.items(keyword)[:1]:
        value = one.text("CodeValue") or one.text("LongCodeValue") or one.text("URNCodeValue") or ""
        return Concept(value, one.text("CodingSchemeDesignator") or "", one.text("CodeMeaning") or "")
    return Concept()
