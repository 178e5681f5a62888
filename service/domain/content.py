"""The content tree of a structured report as plain values (PS3.3 C.17.3): what `service.dicom.structured` reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Value types (PS3.3 table C.17.3-7), those that are looked at
CONTAINER, NUM, TEXT, CODE, DATE, DATETIME = "CONTAINER", "NUM", "TEXT", "CODE", "DATE", "DATETIME"


@dataclass(frozen=True, slots=True)
class Concept:
    """One coded entry (PS3.3 8.8); what is absent is empty."""

    value: str = ""
    scheme: str = ""
    meaning: str = ""

    @property
    def key(self) -> str:
        """ "SCT:66794005"."""
        return f"{self.scheme}:{self.value}"


@dataclass(frozen=True, slots=True)
class Item:
    """One content item with those below it; texts as they stand in the object."""

    kind: str
    name: Concept = Concept()
    text: str = ""  # TEXT, DATE, DATETIME
    code: Concept = Concept()  # CODE
    number: str = ""  # NUM; empty where the report gives none
    unit: Concept = Concept()  # NUM
    items: tuple[Item, ...] = ()

    def walk(self) -> Iterator[tuple[Item, tuple[Item, ...]]]:
        """Every item of the tree with those above it, the nearest first; this one included."""
        waiting: list[tuple[Item, tuple[Item, ...]]] = [(self, ())]
        while waiting:
            item, above = waiting.pop()
            yield item, above
            waiting += [(one, (item, *above)) for one in reversed(item.items)]
