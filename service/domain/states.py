"""Where a study, a job and a referral can stand."""

from __future__ import annotations

from enum import StrEnum


class StudyState(StrEnum):
    """Where a study is on its way."""

    RECEIVING = "receiving"  # instances still arrive
    QUEUED = "queued"  # an eligible series waits for the worker
    SCREENED = "screened"  # a result stands (whatever its category)
    NOT_SCREENED = "not-screened"  # no eligible series; the reasons stand beside every series
    QUARANTINED = "quarantined"  # the worker failed on it as often as allowed


class JobState(StrEnum):
    """A job's life; only the holder of the current token may move it on."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    QUARANTINED = "quarantined"
    SUPERSEDED = "superseded"


class ReferralState(StrEnum):
    """The referral loop of a flagged patient."""

    OPEN = "open"
    REVIEWED = "reviewed"
    ORDERED = "ordered"
    DXA_DONE = "dxa-done"
    DISMISSED = "dismissed"
