"""Who we are in DICOM: the device, the names of our series and objects, and how we recognise them again.

Every UID is a function of what it names (UUID-derived, PS3.5 B.2), so making the same report twice makes the same
object, and a PACS that already holds it loses nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

MANUFACTURER = "Osteogate"
MODEL_NAME = "Osteogate opportunistic bone screening"
DISCLAIMER = "Investigational. Not a medical device. Confirm with DXA."

SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"
COMPREHENSIVE_3D_SR_STORAGE = "1.2.840.10008.5.1.4.1.1.88.34"


class Kind(StrEnum):
    """What is named: one of the two objects, or a part of one."""

    SEGMENTATION = "SEG"
    REPORT = "SR"
    TRACKING = "tracking"
    DEVICE = "device"


KIND_OF_SOP_CLASS = {SEGMENTATION_STORAGE: Kind.SEGMENTATION, COMPREHENSIVE_3D_SR_STORAGE: Kind.REPORT}


@dataclass(frozen=True, slots=True)
class ReportKey:
    """What tells one result from another: the CT, its revision, the networks, and the run where it was repeated.

    `run` is 0 for the first result of a revision; a person's rerun of the very same images counts up, since a
    PACS drops a second, different object under a UID that it already holds.
    """

    study_uid: str
    series_uid: str  # several, joined, where a study was refused as a whole
    revision: int
    model: str  # the hashes of the weights, whichever there are
    run: int = 0

    def uid(self, kind: Kind, *parts: str) -> str:
        """The UID of the object of this kind, or of one part of it."""
        key = (self.study_uid, self.series_uid, str(self.revision), self.model, str(self.run))
        return hashed_uid("object", kind, *key, *parts)


def hashed_uid(*parts: str) -> str:
    """A UID that is a function of its parts: "2.25." and 128 bits, at most 44 characters."""
    digest = hashlib.sha256("\x1f".join(("osteogate", *parts)).encode()).digest()[:16]
    return f"2.25.{int.from_bytes(digest, 'big')}"


def series_uid(kind: Kind, study_uid: str, frame_of_reference_uid: str | None) -> str:
    """Our series of one kind in a study; all revisions share it.

    It can be worked out again from the header of any object in it. A series has one frame of reference (PS3.3
    C.7.4.1), so segmentations of CTs in different frames go to different series; a report has none.
    """
    frame = frame_of_reference_uid or "" if kind is Kind.SEGMENTATION else ""
    return hashed_uid("series", kind, study_uid, frame)


class DeviceFacts(Protocol):
    """The header facts that recognition needs; `service.domain.facts.InstanceFacts` has them."""

    @property
    def study_uid(self) -> str: ...
    @property
    def series_uid(self) -> str: ...
    @property
    def sop_class_uid(self) -> str: ...
    @property
    def manufacturer(self) -> str | None: ...
    @property
    def model_name(self) -> str | None: ...
    @property
    def frame_of_reference_uid(self) -> str | None: ...


def is_ours(facts: DeviceFacts) -> bool:
    """Whether this is a segmentation or report that Osteogate made, by its device or by its series.

    Either suffices: an archive may rewrite UIDs, or the equipment, but hardly both. Ours is never a supplied
    segmentation and never a new revision.
    """
    kind = KIND_OF_SOP_CLASS.get(facts.sop_class_uid)
    if kind is None:
        return False
    if (facts.manufacturer or "").strip() == MANUFACTURER and (facts.model_name or "").strip() == MODEL_NAME:
        return True
    return facts.series_uid == series_uid(kind, facts.study_uid, facts.frame_of_reference_uid)
