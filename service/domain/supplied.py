"""Which supplied segmentation of a study, if any, is measured with: a pure rule over header facts.

A segmentation that others made is trusted with the vertebrae only where it plainly belongs to the CT that is
measured; every other one gets the reason why not. Whether its pixels keep what its header promises is for the worker
to find.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from service.domain.eligibility import Verdict
from service.domain.facts import InstanceFacts
from service.domain.reasons import Code, Reason
from service.domain.result import LEVELS
from service.domain.vertebrae import BY_CODE, LUMBAR

SEGMENTATION_CLASSES = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})  # PS3.3 A.51, A.90

SUPPLIED = "supplied"  # how the provenance's segmenter begins where others outlined the vertebrae


@dataclass(frozen=True, slots=True)
class Target:
    """The CT series that was chosen."""

    series_uid: str
    frame_of_reference_uid: str | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One segmentation of the study that Osteogate did not make."""

    facts: InstanceFacts
    received_at: datetime
    conflicting: bool = False  # it also arrived with other bytes

    @property
    def levels(self) -> tuple[str, ...]:
        """The lumbar vertebrae that it says it holds, from the head down."""
        held = {BY_CODE[code].name for code in self.facts.segments if code in BY_CODE}
        return tuple(level for level in LUMBAR if level in held)


@dataclass(frozen=True, slots=True)
class Supplied:
    """The chosen segmentation (None: none is used), and the verdict of every series that holds one."""

    sop_instance_uid: str | None
    verdicts: Mapping[str, Verdict]  # by series UID


def is_supplied(segmenter: str) -> bool:
    """Whether the segmenter that a result's provenance names is somebody else's outline."""
    return segmenter.startswith(f"{SUPPLIED} ")


def is_segmentation(instances: Sequence[InstanceFacts]) -> bool:
    """Whether a series holds segmentations and nothing else, whoever made them."""
    return bool(instances) and all(facts.sop_class_uid in SEGMENTATION_CLASSES for facts in instances)


def choose_supplied(candidates: Iterable[Candidate], target: Target | None) -> Supplied:
    """The usable segmentation with most of L1 to L4; of equals the latest.

    `target` is None where no CT is measured.
    """
    found = sorted(candidates, key=lambda one: one.facts.sop_instance_uid)
    against = {one.facts.sop_instance_uid: _against(one, target) for one in found}
    best = max((one for one in found if against[one.facts.sop_instance_uid] is None), key=_rank, default=None)
    by_series: dict[str, list[Candidate]] = {}
    for one in found:
        by_series.setdefault(one.facts.series_uid, []).append(one)
    return Supplied(
        best.facts.sop_instance_uid if best else None,
        {uid: _verdict(held, best, against) for uid, held in by_series.items()},
    )


def not_used(text: str) -> Verdict:
    """The verdict of a segmentation that is not used, with the reason in words."""
    return Verdict(False, (Reason(Code.SEGMENTATION_NOT_USED, text),))


def _against(one: Candidate, target: Target | None) -> str | None:
    """What speaks against using it, in words; None where nothing does."""
    facts = one.facts
    if not one.levels:
        return "It holds none of L1 to L5 (no segment carries the code of one)."
    if one.conflicting:
        return "It arrived again with other content; which of the two is meant cannot be known."
    if target is None:
        return "No CT series of this study is measured."
    named, frame = facts.referenced_series_uids, facts.frame_of_reference_uid
    if frame and target.frame_of_reference_uid and frame != target.frame_of_reference_uid:
        return "It lies in another frame of reference than the chosen series: it was drawn on another scan."
    if named and target.series_uid not in named:
        return "It was drawn on another series than the chosen one."
    if not named and not (frame and target.frame_of_reference_uid):
        return "It names neither the series that it was drawn on nor a frame of reference that the chosen one shares."
    return None


def _rank(one: Candidate) -> tuple[int, datetime, str]:
    return (sum(level in LEVELS for level in one.levels), one.received_at, one.facts.sop_instance_uid)


def _verdict(held: Sequence[Candidate], best: Candidate | None, against: Mapping[str, str | None]) -> Verdict:
    """Of one series: used where it holds the chosen one, else every reason once."""
    if best is not None and best in held:
        text = f"Its vertebrae ({', '.join(best.levels)}) are used in place of those of Osteogate's own networks."
        return Verdict(True, (Reason(Code.SEGMENTATION_USED, text),))
    told = dict.fromkeys(against[one.facts.sop_instance_uid] or _beaten(one, best) for one in held)
    return Verdict(False, tuple(Reason(Code.SEGMENTATION_NOT_USED, text) for text in told))


def _beaten(one: Candidate, best: Candidate | None) -> str:
    if best is not None and _rank(one)[0] < _rank(best)[0]:
        return f"Another segmentation was used: it holds more of L1 to L4 than this one ({', '.join(one.levels)})."
    return "Another segmentation was used: it holds as many of L1 to L4 and arrived later."
