"""The vertebrae: their names, the codes by which other programs know them, and TotalSegmentator's class ids.

The one table that the door (which reads codes), the rules (which ask for L1 to L5) and the worker (which paints class
ids) share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LUMBAR = ("L1", "L2", "L3", "L4", "L5")
PRIVATE_SCHEME = "99OSTEOGATE"


@dataclass(frozen=True, slots=True)
class Vertebra:
    """One vertebra, or the sacrum."""

    name: str
    class_id: int  # of TotalSegmentator's `total`; 126 is ours
    code: str  # SNOMED CT by PS3.16 CID 7603, as "SCT:66794005"
    retired_code: str | None  # SNOMED-RT, which dcmqi wrote, as "SRT:T-11910" (PS3.16 2017 and before)


def _snomed(name: str, class_id: int, code: str, retired: str | None) -> Vertebra:
    return Vertebra(name, class_id, f"SCT:{code}", None if retired is None else f"SRT:{retired}")


VERTEBRAE: tuple[Vertebra, ...] = (  # from the sacrum to the head
    _snomed("sacrum", 25, "54735007", "T-11AD0"),
    _snomed("S1", 26, "65985001", None),  # no SNOMED-RT code of it is known to PS3.16
    _snomed("L5", 27, "49668003", "T-11950"),
    _snomed("L4", 28, "11994002", "T-11940"),
    _snomed("L3", 29, "36470004", "T-11930"),
    _snomed("L2", 30, "14293000", "T-11920"),
    _snomed("L1", 31, "66794005", "T-11910"),
    _snomed("T12", 32, "23215003", "T-117C0"),
    _snomed("T11", 33, "12989004", "T-117B0"),
    _snomed("T10", 34, "7610001", "T-117A0"),
    _snomed("T9", 35, "82687006", "T-11790"),
    _snomed("T8", 36, "11068009", "T-11780"),
    _snomed("T7", 37, "62487009", "T-11770"),
    _snomed("T6", 38, "45296009", "T-11760"),
    _snomed("T5", 39, "56401006", "T-11750"),
    _snomed("T4", 40, "73071006", "T-11740"),
    _snomed("T3", 41, "1626008", "T-11730"),
    _snomed("T2", 42, "53733008", "T-11720"),
    _snomed("T1", 43, "64864005", "T-11710"),
    _snomed("C7", 44, "87391001", "T-11670"),
    _snomed("C6", 45, "36054005", "T-11660"),
    _snomed("C5", 46, "36978003", "T-11650"),
    _snomed("C4", 47, "5329002", "T-11640"),
    _snomed("C3", 48, "113205007", "T-11630"),
    _snomed("C2", 49, "39976000", "T-11620"),
    _snomed("C1", 50, "14806007", "T-11610"),
    Vertebra("L6", 126, f"{PRIVATE_SCHEME}:L6", None),  # no public code of a sixth lumbar body is known to us
)

BY_CODE: Mapping[str, Vertebra] = {
    code: vertebra for vertebra in VERTEBRAE for code in (vertebra.code, vertebra.retired_code) if code is not None
}
