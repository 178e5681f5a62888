"""What a DICOM Segmentation says of itself in its header: what was outlined, and on which series.

Read tolerantly, like everything at the door. The descriptions of the frames are never looked at: there are thousands
of them, and only the worker needs to know where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from service.dicom.syntaxes import LABEL_MAP_SEGMENTATION_STORAGE, SEGMENTATION_STORAGE
from service.domain.vertebrae import BY_CODE

SOP_CLASSES = frozenset({SEGMENTATION_STORAGE, LABEL_MAP_SEGMENTATION_STORAGE})

KEYWORDS = ("SegmentSequence", "ReferencedSeriesSequence")
MAX_SEGMENTS = 1024  # looked at; TotalSegmentator's largest task has 117
MAX_SERIES = 64
MAX_CODE = 64  # characters; PS3.5 6.2 allows 16 for a code's value and its scheme (SH)


class Header(Protocol):
    """Keyword access to one data set; `service.dicom.headers` has it."""

    def text(self, keyword: str) -> str | None: ...
    def items(self, keyword: str) -> Sequence[Self]: ...


def property_types(header: Header) -> tuple[str, ...]:
    """The type code of every segment, once, in their order: "SCT:66794005".

    A vertebra's retired SNOMED-RT code is written as its SNOMED CT code; every other code stays as it stands.
    """
    codes = (_code(item) for item in header.items("SegmentSequence")[:MAX_SEGMENTS])
    return tuple(dict.fromkeys(code for code in codes if code is not None))


def referenced_series(header: Header) -> tuple[str, ...]:
    """The UIDs of the series that the segmentation says it was drawn on, once, in their order."""
    found = (item.text("SeriesInstanceUID") for item in header.items("ReferencedSeriesSequence")[:MAX_SERIES])
    return tuple(dict.fromkeys(uid for uid in found if uid))


def _code(segment: Header) -> str | None:
    for item in segment.items("SegmentedPropertyTypeCodeSequence")[:1]:
        value, scheme = item.text("CodeValue"), item.text("CodingSchemeDesignator")
        if value and scheme:
            written = f"{scheme}:{value}"[:MAX_CODE]
            return BY_CODE[written].code if written in BY_CODE else written
    return None
