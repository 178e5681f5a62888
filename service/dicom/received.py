"""What passes between the door and the database: one received instance, and what became of it.

`service.workflow.intake` imports these (arrows go workflow -> dicom); the listener knows the database only as a
callable from the one to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from service.domain.facts import InstanceFacts


@dataclass(frozen=True, slots=True)
class Received:
    """One instance whose bytes are durable in the spool and whose row is not yet committed."""

    facts: InstanceFacts
    sha256: str  # of the file in the spool: same data set and transfer syntax, same hash
    path: str  # relative to the spool, POSIX; named after the hash, so the same bytes have the same path
    size_bytes: int  # of the file in the spool
    calling_ae: str | None
    peer_address: str | None
    received_at: datetime  # UTC


class Stored(StrEnum):
    """What the database made of one instance."""

    NEW = "NEW"
    DUPLICATE = "DUPLICATE"  # same instance, same bytes: nothing changed
    CONFLICT = "CONFLICT"  # same instance, other bytes: kept aside and flagged
    STUDY_FULL = "STUDY_FULL"  # the study has reached its limit of instances: refused
    SERIES_MISMATCH = "SERIES_MISMATCH"  # its series is already known under another study: refused
    INSTANCE_MISMATCH = "INSTANCE_MISMATCH"  # it is already known under another study itself: refused


Commit = Callable[[Sequence[Received]], "list[Stored]"]
"""Commits one batch in one transaction; one outcome per instance, in order; raises if nothing was committed."""


class Refuse(Protocol):
    """Records something that was turned away, for the `/intake` page."""

    def __call__(
        self,
        *,
        at: datetime,
        kind: str,  # association, context, instance
        code: str,
        text: str,
        calling_ae: str | None,
        peer_address: str | None,
        sop_class_uid: str | None,
        status: int | None,
    ) -> None:
        """Record one refusal."""
