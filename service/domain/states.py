"""Where a study, a job, a referral and a training run can stand."""

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


class ReportState(StrEnum):
    """A DICOM object (SR or SEG) that is to be made of a result."""

    WAITING = "waiting"  # to be made
    MADE = "made"  # lies in the results folder; its deliveries stand in the outbox
    FAILED = "failed"  # cannot be made; the error says why


class DxaReportState(StrEnum):
    """A received structured report that may hold a DXA result."""

    WAITING = "waiting"  # to be read
    NO_DXA = "no-dxa"  # holds none; treated as any other report
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # its result was stored before
    REFUSED = "refused"


class DeliveryState(StrEnum):
    """One object on its way to one destination."""

    WAITING = "waiting"  # due now or after its back-off
    SENDING = "sending"  # held by one courier until its lease runs out
    DELIVERED = "delivered"


class RunState(StrEnum):
    """A training run's life; only the holder of the current token may move a running one on."""

    WAITING = "waiting"  # for the trainer
    RUNNING = "running"
    FINISHED = "finished"  # a package and the reports about it stand
    FAILED = "failed"  # the error says why; it can be resumed
    CANCELLED = "cancelled"  # by a person; it can be resumed

    @property
    def going(self) -> bool:
        """Whether it will move by itself."""
        return self in (RunState.WAITING, RunState.RUNNING)


class RunStage(StrEnum):
    """What a running one does."""

    CUTTING = "cutting"  # vertebrae out of the stored CTs
    TRAINING = "training"
    JUDGING = "judging"  # candidate and model in force on the locked patients
