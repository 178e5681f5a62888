"""What came in: every study and series with its verdict, its work, and what was turned away at the door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, String, cast, func, or_, select
from sqlalchemy.orm import Session, selectinload

from service.domain.states import JobState, StudyState
from service.store.tables import ConflictRow, JobRow, RefusalRow, ReportRow, ResultRow, SeriesRow, StudyRow
from service.workflow.reading.deliveries import ReportLine, report_line
from service.workflow.reading.values import Page, Patient, Told, patient, told
from service.workflow.reading.worklists import study_contains


@dataclass(frozen=True, slots=True)
class SeriesLine:
    """One series with its verdict."""

    series_uid: str
    modality: str | None
    description: str | None
    number: int | None
    instance_count: int
    eligible: bool | None
    chosen: bool
    reasons: tuple[Told, ...]
    cautions: tuple[Told, ...]
    found: tuple[Told, ...] = ()  # what the pixels of the chosen series said against it, once measured


@dataclass(frozen=True, slots=True)
class JobLine:
    """One piece of work and how often it was tried."""

    job_id: int
    kind: str
    series_uid: str
    revision: int
    state: JobState
    attempts: int
    worker: str | None
    last_error: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class ConflictLine:
    """An instance that came again with other bytes."""

    sop_instance_uid: str
    study_uid: str
    sha256: str
    calling_ae: str | None
    received_at: datetime


@dataclass(frozen=True, slots=True)
class RefusalLine:
    """Something turned away at the door."""

    at: datetime
    kind: str
    code: str
    text: str
    calling_ae: str | None
    peer_address: str | None
    sop_class_uid: str | None
    status: int | None


@dataclass(frozen=True, slots=True)
class IntakeStudy:
    """One study as it came in, with every series and its verdict."""

    study_uid: str
    patient: Patient
    study_date: str | None
    description: str | None
    accession_number: str | None
    synthetic: bool
    state: StudyState
    revision: int
    choice: str | None
    calling_ae: str | None
    first_received_at: datetime
    last_received_at: datetime
    closed_at: datetime | None
    series: tuple[SeriesLine, ...]
    job: JobLine | None  # the latest
    reports: tuple[ReportLine, ...]  # the DICOM objects of the result in force


def intake(session: Session, *, words: str | None = None, number: int = 1, size: int = 25) -> Page[IntakeStudy]:
    """One page of studies, the latest arrival first, with every series and its verdict."""
    conditions = [_intake_contains(words)] if words else []
    total = session.scalar(select(func.count()).select_from(StudyRow).where(*conditions)) or 0
    rows = session.scalars(
        select(StudyRow)
        .options(
            selectinload(StudyRow.series),
            selectinload(StudyRow.results).selectinload(ResultRow.reports).selectinload(ReportRow.deliveries),
        )
        .where(*conditions)
        .order_by(StudyRow.last_received_at.desc(), StudyRow.id.desc())
        .limit(size)
        .offset((number - 1) * size)
    ).all()
    jobs = jobs_of(session, [row.id for row in rows])
    items = tuple(intake_study(row, next(iter(jobs.get(row.id, [])), None)) for row in rows)
    return Page(items, total, number, size)


def _intake_contains(words: str) -> ColumnElement[bool]:
    """Words in the study, in one of its series, or in the code of one of their reasons."""
    columns: tuple[ColumnElement[Any], ...] = (
        SeriesRow.series_uid.expression,
        SeriesRow.description.expression,
        SeriesRow.modality.expression,
        cast(SeriesRow.reasons, String),
        cast(SeriesRow.cautions, String),
    )
    in_series = select(SeriesRow.study_id).where(or_(*(column.icontains(words, autoescape=True) for column in columns)))
    return or_(
        study_contains(words),
        StudyRow.calling_ae.icontains(words, autoescape=True),
        StudyRow.id.in_(in_series),
    )


def intake_study(row: StudyRow, job: JobLine | None) -> IntakeStudy:
    """The row as people may read it."""
    found = _found(row)
    return IntakeStudy(
        study_uid=row.study_uid,
        patient=patient(row),
        study_date=row.study_date,
        description=row.description,
        accession_number=row.accession_number,
        synthetic=row.synthetic,
        state=StudyState(row.state),
        revision=row.revision,
        choice=row.choice,
        calling_ae=row.calling_ae,
        first_received_at=row.first_received_at,
        last_received_at=row.last_received_at,
        closed_at=row.closed_at,
        series=tuple(_series_line(one, found.get(one.id, [])) for one in row.series),
        job=job,
        reports=_reports(row),
    )


def _reports(row: StudyRow) -> tuple[ReportLine, ...]:
    in_force = [result for result in row.results if not result.superseded]
    return tuple(report_line(report) for result in in_force[-1:] for report in result.reports)


def _found(row: StudyRow) -> dict[int, list[Any]]:
    """Series id -> the reasons for which its measured CT turned out not to be eligible after all."""
    in_force = (result for result in row.results if not result.superseded)
    return {
        result.series_id: result.document["decision"]["reasons"]
        for result in in_force
        if not result.document["verdict"]["eligible"]
    }


def _series_line(row: SeriesRow, found: list[Any]) -> SeriesLine:
    return SeriesLine(
        series_uid=row.series_uid,
        modality=row.modality,
        description=row.description,
        number=row.number,
        instance_count=row.instance_count,
        eligible=row.eligible,
        chosen=row.chosen,
        reasons=told(row.reasons),
        cautions=told(row.cautions),
        found=told(found),
    )


def jobs_of(session: Session, study_ids: Sequence[int]) -> dict[int, list[JobLine]]:
    """Jobs of each study, newest first."""
    found: dict[int, list[JobLine]] = {}
    query = (
        select(JobRow, SeriesRow.series_uid)
        .join(SeriesRow, SeriesRow.id == JobRow.series_id)
        .where(JobRow.study_id.in_(study_ids))
        .order_by(JobRow.id.desc())
    )
    for row, series_uid in session.execute(query):
        found.setdefault(row.study_id, []).append(_job(row, series_uid))
    return found


def _job(row: JobRow, series_uid: str) -> JobLine:
    return JobLine(
        job_id=row.id,
        kind=row.kind,
        series_uid=series_uid,
        revision=row.revision,
        state=JobState(row.state),
        attempts=row.attempts,
        worker=row.worker,
        last_error=row.last_error,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


def conflict_line(row: ConflictRow) -> ConflictLine:
    return ConflictLine(row.sop_instance_uid, row.study_uid, row.sha256, row.calling_ae, row.received_at)


def refusals(session: Session, *, words: str | None = None, limit: int = 100) -> tuple[RefusalLine, ...]:
    """What was turned away at the door, the latest first."""
    query = select(RefusalRow).order_by(RefusalRow.id.desc()).limit(limit)
    if words:
        columns = (RefusalRow.code, RefusalRow.text, RefusalRow.calling_ae, RefusalRow.peer_address)
        query = query.where(or_(*(column.icontains(words, autoescape=True) for column in columns)))
    return tuple(
        RefusalLine(
            at=row.at,
            kind=row.kind,
            code=row.code,
            text=row.text,
            calling_ae=row.calling_ae,
            peer_address=row.peer_address,
            sop_class_uid=row.sop_class_uid,
            status=row.status,
        )
        for row in session.scalars(query)
    )


def conflicts(session: Session, *, words: str | None = None, limit: int = 100) -> tuple[ConflictLine, ...]:
    """Instances that came again with other bytes, the latest first."""
    query = select(ConflictRow).order_by(ConflictRow.id.desc()).limit(limit)
    if words:
        columns = (ConflictRow.sop_instance_uid, ConflictRow.study_uid, ConflictRow.calling_ae)
        query = query.where(or_(*(column.icontains(words, autoescape=True) for column in columns)))
    return tuple(conflict_line(row) for row in session.scalars(query))
