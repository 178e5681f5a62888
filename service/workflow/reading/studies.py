"""One study, whole: its decision, its results with everything that replaced them, its work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.domain.states import StudyState
from service.store.tables import ConflictRow, InstanceRow, JobRow, ReferralRow, ResultRow, SeriesRow, StudyRow
from service.workflow.reading.arrivals import (
    ConflictLine,
    IntakeStudy,
    JobLine,
    conflict_line,
    intake_study,
    jobs_of,
)
from service.workflow.reading.deliveries import ReportLine, report_line
from service.workflow.reading.worklists import (
    IN_FORCE,
    Stage,
    WorklistEntry,
    entry_of,
    joined,
    stage_shown,
    told_by,
)
from service.workflow.reporting import SEGMENTATION
from service.workflow.screening import not_screened_document


@dataclass(frozen=True, slots=True)
class Supplied:
    """A segmentation made elsewhere that came with the study."""

    sop_instance_uid: str
    description: str | None  # of its series
    calling_ae: str | None
    used: bool  # False: it turned out unusable, and our own networks measured; the result's notes say why


@dataclass(frozen=True, slots=True)
class ResultLine:
    """One result document, in force or superseded."""

    result_id: int
    series_uid: str
    revision: int
    run: int  # counts repeated measurements of one revision
    attempt: int
    superseded: bool
    category: str
    created_at: datetime
    artefacts: str | None
    document: Mapping[str, Any]
    supplied: Supplied | None  # the segmentation that came with the study and was offered to this measurement
    reports: tuple[ReportLine, ...]

    @property
    def outlined(self) -> bool:
        """Whether outlines were kept with it: they can be measured under other names."""
        return self.artefacts is not None and any(report.kind == SEGMENTATION for report in self.reports)


@dataclass(frozen=True, slots=True)
class StudyDetail:
    """Everything that is known about one study."""

    entry: WorklistEntry
    intake: IntakeStudy
    jobs: tuple[JobLine, ...]
    results: tuple[ResultLine, ...]  # newest first
    conflicts: tuple[ConflictLine, ...]
    unmeasured: Mapping[str, Any] | None  # result.json of a study that could not be measured
    earlier: ResultLine | None = None  # the superseded result that is looked at instead of the one in force

    @property
    def in_force(self) -> ResultLine | None:
        """The result in force; one that a failed rerun was to replace still stands."""
        if self.intake.state is StudyState.NOT_SCREENED:
            return None
        return next((line for line in self.results if not line.superseded), None)

    @property
    def result(self) -> ResultLine | None:
        """The result that is looked at: the one in force unless an earlier one was asked for."""
        return self.earlier or self.in_force

    @property
    def replaced(self) -> ResultLine | None:
        """The result that the one looked at replaced."""
        shown = self.result
        return next((line for line in self.results if shown and line.result_id < shown.result_id), None)

    @property
    def reports(self) -> tuple[ReportLine, ...]:
        """The DICOM objects of every result, those of the newest first."""
        return tuple(report for result in self.results for report in result.reports)

    @property
    def document(self) -> Mapping[str, Any] | None:
        """result.json: of the result in force, or of a study that cannot be measured; else None."""
        return self.result.document if self.result is not None else self.unmeasured


def study(session: Session, study_uid: str, *, result_id: int | None = None) -> StudyDetail | None:
    """Everything about one study, or None where there is no such study.

    With a `result_id` the study is told as that result, superseded or not, has it; None where it has no such one.
    """
    row = session.execute(
        joined(select(StudyRow, IN_FORCE, ReferralRow, stage_shown)).where(StudyRow.study_uid == study_uid)
    ).one_or_none()
    if row is None:
        return None
    found, result, referral, stage = row
    jobs = jobs_of(session, [found.id]).get(found.id, [])
    attempts = jobs[0].attempts if jobs else 0
    conflicts = session.scalars(select(ConflictRow).where(ConflictRow.study_uid == study_uid).order_by(ConflictRow.id))
    detail = StudyDetail(
        entry=entry_of(found, result, referral, Stage(stage), found.series, attempts),
        intake=intake_study(found, jobs[0] if jobs else None),
        jobs=tuple(jobs),
        results=tuple(_result_line(row, _supplied(session, row)) for row in reversed(found.results)),
        conflicts=tuple(conflict_line(row) for row in conflicts),
        unmeasured=not_screened_document(found),
    )
    return detail if result_id is None else _as_told_by(detail, result_id)


def _as_told_by(detail: StudyDetail, result_id: int) -> StudyDetail | None:
    wanted = next((line for line in detail.results if line.result_id == result_id), None)
    if wanted is None:
        return None
    if wanted == detail.in_force:
        return detail
    return replace(detail, entry=told_by(detail.entry, wanted.document), earlier=wanted)


def knows(session: Session, study_uid: str) -> bool:
    """True where there is such a study."""
    return session.scalar(select(StudyRow.id).where(StudyRow.study_uid == study_uid)) is not None


def result_folder(session: Session, study_uid: str, result_id: int) -> str | None:
    """The folder (relative to the results) that holds the pictures of one result of this study."""
    return session.scalar(
        select(ResultRow.artefacts)
        .join(StudyRow, StudyRow.id == ResultRow.study_id)
        .where(StudyRow.study_uid == study_uid, ResultRow.id == result_id)
    )


def _supplied(session: Session, row: ResultRow) -> Supplied | None:
    """The segmentation that was offered to the measurement; it was used where the provenance carries its hash."""
    query = (
        select(InstanceRow, SeriesRow.description)
        .join(JobRow, JobRow.segmentation_id == InstanceRow.id)
        .join(SeriesRow, SeriesRow.id == InstanceRow.series_id)
        .where(JobRow.id == row.job_id)
    )
    found = session.execute(query).one_or_none()
    if found is None:
        return None
    instance, description = found
    used = row.document["provenance"]["segmenter_sha256"] == instance.sha256
    return Supplied(instance.sop_instance_uid, description, instance.calling_ae, used)


def _result_line(row: ResultRow, supplied: Supplied | None) -> ResultLine:
    return ResultLine(
        result_id=row.id,
        series_uid=row.series.series_uid,
        revision=row.revision,
        run=row.run,
        attempt=row.attempt,
        superseded=row.superseded,
        category=row.category,
        created_at=row.created_at,
        artefacts=row.artefacts,
        document=row.document,
        supplied=supplied,
        reports=tuple(report_line(report) for report in row.reports),
    )
