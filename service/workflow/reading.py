"""What people may read: the worklist, one study, the intake, the audit trail, as frozen values.

Pages and API read through these functions and never meet an ORM class. There is no second table behind the
worklist: every figure here is a query over what intake, screening and referral have written. Every function
takes a session and leaves the transaction to its caller; only `note` writes, one line of the audit trail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Select, String, and_, case, cast, func, or_, select, text
from sqlalchemy.orm import Session, aliased, selectinload

from service.domain.result import Category, Interval
from service.domain.states import JobState, ReferralState, StudyState
from service.store.tables import (
    AuditRow,
    ConflictRow,
    InstanceRow,
    JobRow,
    ReferralRow,
    RefusalRow,
    ResultRow,
    SeriesRow,
    StudyRow,
)
from service.workflow.screening import not_screened_document

T = TypeVar("T")
Query = TypeVar("Query", bound="Select[*tuple[Any, ...]]")


class Stage(StrEnum):
    """Where a study shows on the worklist: the four decisions, and the two ways of not having one yet."""

    REFER = Category.REFER.value
    INDETERMINATE = Category.INDETERMINATE.value
    NOT_ASSESSABLE = Category.NOT_ASSESSABLE.value
    NO_FLAG = Category.NO_FLAG.value
    IN_PROGRESS = "in-progress"
    FAILED = "failed"


class Order(StrEnum):
    """How the worklist can be sorted; a leading minus turns the order round."""

    PRIORITY = "priority"
    RECEIVED = "received"
    STUDY_DATE = "study-date"
    NAME = "name"
    BMD = "bmd"
    TBS = "tbs"
    HU = "hu"


@dataclass(frozen=True, slots=True)
class Told:
    """A stored reason: its code as written (a newer version may know more codes) and its text."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Patient:
    """Who the study says it shows; DICOM values as received."""

    patient_id: str | None
    name: str | None
    sex: str | None
    birth_date: str | None  # YYYYMMDD
    age_years: float | None


@dataclass(frozen=True, slots=True)
class Standing:
    """The referral of a study: where it stands, since when, by whom, and why it was dismissed."""

    state: ReferralState
    reason: str | None
    changed_at: datetime
    changed_by: str


@dataclass(frozen=True, slots=True)
class Values:
    """The patient's values as the result in force gives them: g/cm2, no unit, HU, percent."""

    bmd_g_cm2: float | None = None
    bmd_interval: Interval | None = None
    tbs: float | None = None
    tbs_interval: Interval | None = None
    hu_mean: float | None = None
    percent_yam: float | None = None
    levels_used: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorklistEntry:
    """One line of the worklist."""

    study_uid: str
    patient: Patient
    study_date: str | None
    description: str | None
    accession_number: str | None
    synthetic: bool
    state: StudyState
    stage: Stage
    revision: int
    received_at: datetime
    category: Category | None
    reasons: tuple[Told, ...]
    driver: str | None
    values: Values
    digital_model: bool  # the network behind the values was validated on digital patients only
    updating: bool  # a decision stands, and newer slices are on their way to replace it
    attempts: int
    referral: Standing | None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A slice of a longer list; `number` counts from 1."""

    items: tuple[T, ...]
    total: int
    number: int
    size: int

    @property
    def last(self) -> int:
        """Number of the last page; an empty list has one, empty, page."""
        return max(1, -(-self.total // self.size))


@dataclass(frozen=True, slots=True)
class Filter:
    """What the worklist is narrowed to; None leaves that aspect open."""

    stage: Stage | None = None
    category: Category | None = None
    state: StudyState | None = None
    referral: ReferralState | None = None
    synthetic: bool | None = None
    text: str | None = None


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
class ResultLine:
    """One result document, in force or superseded."""

    result_id: int
    series_uid: str
    revision: int
    attempt: int
    superseded: bool
    category: str
    created_at: datetime
    artefacts: str | None
    document: Mapping[str, Any]


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


@dataclass(frozen=True, slots=True)
class StudyDetail:
    """Everything that is known about one study."""

    entry: WorklistEntry
    intake: IntakeStudy
    jobs: tuple[JobLine, ...]
    results: tuple[ResultLine, ...]  # newest first
    conflicts: tuple[ConflictLine, ...]
    unmeasured: Mapping[str, Any] | None  # result.json of a study that could not be measured

    @property
    def result(self) -> ResultLine | None:
        """The result in force; one that a failed rerun was to replace still stands."""
        if self.intake.state is StudyState.NOT_SCREENED:
            return None
        return next((line for line in self.results if not line.superseded), None)

    @property
    def document(self) -> Mapping[str, Any] | None:
        """result.json: of the result in force, or of a study that cannot be measured; else None."""
        return self.result.document if self.result is not None else self.unmeasured


@dataclass(frozen=True, slots=True)
class AuditLine:
    """One line of the audit trail."""

    at: datetime
    actor: str
    action: str
    subject: str
    detail: Mapping[str, Any]
    peer_address: str | None


@dataclass(frozen=True, slots=True)
class Gauges:
    """Counts for the metrics page."""

    studies: Mapping[str, int]  # by state
    decisions: Mapping[str, int]  # by category, in force
    jobs: Mapping[str, int]  # by state
    referrals: Mapping[str, int]  # by state
    instances: int
    instance_bytes: int
    refusals: Mapping[str, int]  # by kind
    conflicts: int
    oldest_waiting_at: datetime | None


# The worklist ------------------------------------------------------------------------------------------

_LATEST = (
    select(ResultRow.study_id, func.max(ResultRow.id).label("result_id"))
    .where(ResultRow.superseded.is_(False))
    .group_by(ResultRow.study_id)
    .subquery()
)
_IN_FORCE = aliased(ResultRow)
_category_column: ColumnElement[str | None] = case(
    (StudyRow.state == StudyState.NOT_SCREENED.value, Category.NOT_ASSESSABLE.value),
    (_IN_FORCE.category.is_not(None), _IN_FORCE.category),
    (StudyRow.state == StudyState.QUARANTINED.value, Category.NOT_ASSESSABLE.value),
    else_=None,
)
_stage: ColumnElement[str] = case(
    (
        and_(StudyRow.state == StudyState.QUARANTINED.value, _IN_FORCE.category.is_(None)),
        Stage.FAILED.value,
    ),
    (_category_column.is_not(None), _category_column),
    else_=Stage.IN_PROGRESS.value,
)
# Who needs a person first: open referrals, doubt, broken work, those who wait for a DXA, the rest.
_PRIORITY: ColumnElement[int] = case(
    (ReferralRow.state.in_([ReferralState.DISMISSED.value, ReferralState.DXA_DONE.value]), 8),
    (ReferralRow.state == ReferralState.ORDERED.value, 4),
    (ReferralRow.state == ReferralState.REVIEWED.value, 1),
    (_stage == Stage.REFER.value, 0),
    (_stage == Stage.INDETERMINATE.value, 2),
    (_stage == Stage.FAILED.value, 3),
    (_stage == Stage.IN_PROGRESS.value, 5),
    (_stage == Stage.NOT_ASSESSABLE.value, 6),
    else_=7,
)
_ORDERS: Mapping[Order, ColumnElement[Any]] = {
    Order.PRIORITY: _PRIORITY,
    Order.RECEIVED: StudyRow.last_received_at.expression,
    Order.STUDY_DATE: StudyRow.study_date.expression,
    Order.NAME: func.lower(StudyRow.patient_name),
    Order.BMD: _IN_FORCE.bmd_g_cm2.expression,
    Order.TBS: _IN_FORCE.tbs.expression,
    Order.HU: _IN_FORCE.hu_mean.expression,
}


def worklist(
    session: Session,
    wanted: Filter,
    *,
    order: Order = Order.PRIORITY,
    descending: bool = False,
    number: int = 1,
    size: int = 50,
) -> Page[WorklistEntry]:
    """One page of the worklist; missing values sort last, ties go to the study that came in last."""
    conditions = _conditions(wanted)
    total = session.scalar(_joined(select(func.count())).where(*conditions)) or 0
    key = _ORDERS[order]
    rows = session.execute(
        _joined(select(StudyRow, _IN_FORCE, ReferralRow, _stage))
        .where(*conditions)
        .order_by(
            key.is_(None),
            key.desc() if descending else key.asc(),
            StudyRow.last_received_at.desc(),
            StudyRow.id.desc(),
        )
        .limit(size)
        .offset((number - 1) * size)
    ).all()
    series = _series_of(session, [study.id for study, *_ in rows])
    attempts = _attempts_of(session, [study.id for study, *_ in rows])
    items = tuple(
        _entry(study, result, referral, Stage(stage), series.get(study.id, ()), attempts.get(study.id, 0))
        for study, result, referral, stage in rows
    )
    return Page(items, total, number, size)


def worklist_counts(session: Session, wanted: Filter) -> dict[Stage, int]:
    """How many studies each tab holds under the other filters."""
    conditions = _conditions(Filter(synthetic=wanted.synthetic, text=wanted.text, referral=wanted.referral))
    rows = session.execute(_joined(select(_stage, func.count())).where(*conditions).group_by(_stage))
    found = dict(rows.all())
    return {stage: found.get(stage.value, 0) for stage in Stage}


def _joined(query: Query) -> Query:
    return (
        query.select_from(StudyRow)
        .outerjoin(_LATEST, _LATEST.c.study_id == StudyRow.id)
        .outerjoin(_IN_FORCE, _IN_FORCE.id == _LATEST.c.result_id)
        .outerjoin(ReferralRow, ReferralRow.study_id == StudyRow.id)
    )


def _conditions(wanted: Filter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.stage is not None:
        conditions.append(_stage == wanted.stage.value)
    if wanted.category is not None:
        conditions.append(_category_column == wanted.category.value)
    if wanted.state is not None:
        conditions.append(StudyRow.state == wanted.state.value)
    if wanted.referral is not None:
        conditions.append(ReferralRow.state == wanted.referral.value)
    if wanted.synthetic is not None:
        conditions.append(StudyRow.synthetic.is_(wanted.synthetic))
    if wanted.text:
        conditions.append(_study_contains(wanted.text))
    return conditions


def _study_contains(words: str) -> ColumnElement[bool]:
    columns = (
        StudyRow.patient_name,
        StudyRow.patient_id,
        StudyRow.accession_number,
        StudyRow.study_uid,
        StudyRow.description,
    )
    return or_(*(column.icontains(words, autoescape=True) for column in columns))


def _entry(
    study: StudyRow,
    result: ResultRow | None,
    referral: ReferralRow | None,
    stage: Stage,
    series: Sequence[SeriesRow],
    attempts: int,
) -> WorklistEntry:
    standing = result if study.state != StudyState.NOT_SCREENED.value else None
    document: Mapping[str, Any] = standing.document if standing is not None else {}
    decision = document.get("decision", {})
    waiting = study.state in (StudyState.RECEIVING.value, StudyState.QUEUED.value)
    return WorklistEntry(
        study_uid=study.study_uid,
        patient=_patient(study),
        study_date=study.study_date,
        description=study.description,
        accession_number=study.accession_number,
        synthetic=study.synthetic,
        state=StudyState(study.state),
        stage=stage,
        revision=study.revision,
        received_at=study.last_received_at,
        category=_category(study, standing),
        reasons=_told(decision.get("reasons", ())) or _why_not(study, series),
        driver=decision.get("driver"),
        values=_values(document.get("patient", {})),
        digital_model=digital_model(document),
        updating=waiting and standing is not None,
        attempts=attempts,
        referral=_standing(referral),
    )


def _category(study: StudyRow, result: ResultRow | None) -> Category | None:
    if result is not None:
        return Category(result.category)
    unmeasured = (StudyState.NOT_SCREENED.value, StudyState.QUARANTINED.value)
    return Category.NOT_ASSESSABLE if study.state in unmeasured else None


def _why_not(study: StudyRow, series: Sequence[SeriesRow]) -> tuple[Told, ...]:
    """Why a study without a result has none: the refusals of the series that came closest, then the whole."""
    document = not_screened_document(study)
    if document is None:
        return ()
    whole = _told(document["verdict"]["reasons"][:1])
    refused = [row for row in series if row.reasons]
    if study.state == StudyState.QUARANTINED.value or not refused:
        return whole
    closest = min(refused, key=lambda row: (len(row.reasons), -row.instance_count))
    return (*_told(closest.reasons), *whole)


def digital_model(document: Mapping[str, Any]) -> bool:
    """True when the network behind the values is known from digital patients only.

    A document that does not say so is taken to be of that kind, unless the network decided for a real
    patient: the claim "validated on people" must be written down, never assumed.
    """
    provenance = document.get("provenance", {})
    if provenance.get("model") is None:
        return False
    told = provenance.get("model_synthetic_only")
    if told is not None:
        return bool(told)
    network = document.get("decision", {}).get("driver") == "network"
    return not (network and not document.get("patient", {}).get("synthetic", False))


def _values(patient: Mapping[str, Any]) -> Values:
    return Values(
        bmd_g_cm2=patient.get("bmd_g_cm2"),
        bmd_interval=_interval(patient.get("bmd_interval")),
        tbs=patient.get("tbs"),
        tbs_interval=_interval(patient.get("tbs_interval")),
        hu_mean=patient.get("hu_mean"),
        percent_yam=patient.get("percent_yam"),
        levels_used=tuple(patient.get("levels_used", ())),
    )


def _interval(pair: Sequence[float] | None) -> Interval | None:
    return None if pair is None else (pair[0], pair[1])


def _told(stored: Sequence[Mapping[str, str]]) -> tuple[Told, ...]:
    return tuple(Told(one["code"], one["text"]) for one in stored)


def _patient(study: StudyRow) -> Patient:
    return Patient(
        patient_id=study.patient_id,
        name=study.patient_name,
        sex=study.patient_sex,
        birth_date=study.patient_birth_date,
        age_years=study.patient_age_years,
    )


def _standing(referral: ReferralRow | None) -> Standing | None:
    if referral is None:
        return None
    return Standing(ReferralState(referral.state), referral.reason, referral.changed_at, referral.changed_by)


def _series_of(session: Session, study_ids: Sequence[int]) -> dict[int, list[SeriesRow]]:
    found: dict[int, list[SeriesRow]] = {}
    query = select(SeriesRow).where(SeriesRow.study_id.in_(study_ids)).order_by(SeriesRow.id)
    for row in session.scalars(query):
        found.setdefault(row.study_id, []).append(row)
    return found


def _attempts_of(session: Session, study_ids: Sequence[int]) -> dict[int, int]:
    """Attempts of each study's latest job."""
    query = select(JobRow.study_id, JobRow.attempts).where(JobRow.study_id.in_(study_ids)).order_by(JobRow.id)
    return dict(session.execute(query).all())


# One study ---------------------------------------------------------------------------------------------


def study(session: Session, study_uid: str) -> StudyDetail | None:
    """Everything about one study, or None where there is no such study."""
    row = session.execute(
        _joined(select(StudyRow, _IN_FORCE, ReferralRow, _stage)).where(StudyRow.study_uid == study_uid)
    ).one_or_none()
    if row is None:
        return None
    found, result, referral, stage = row
    jobs = _jobs_of(session, [found.id]).get(found.id, [])
    attempts = jobs[0].attempts if jobs else 0
    conflicts = session.scalars(select(ConflictRow).where(ConflictRow.study_uid == study_uid).order_by(ConflictRow.id))
    return StudyDetail(
        entry=_entry(found, result, referral, Stage(stage), found.series, attempts),
        intake=_intake_study(found, jobs[0] if jobs else None),
        jobs=tuple(jobs),
        results=tuple(_result_line(row) for row in reversed(found.results)),
        conflicts=tuple(_conflict(row) for row in conflicts),
        unmeasured=not_screened_document(found),
    )


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


def _jobs_of(session: Session, study_ids: Sequence[int]) -> dict[int, list[JobLine]]:
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


def _result_line(row: ResultRow) -> ResultLine:
    return ResultLine(
        result_id=row.id,
        series_uid=row.series.series_uid,
        revision=row.revision,
        attempt=row.attempt,
        superseded=row.superseded,
        category=row.category,
        created_at=row.created_at,
        artefacts=row.artefacts,
        document=row.document,
    )


def _conflict(row: ConflictRow) -> ConflictLine:
    return ConflictLine(row.sop_instance_uid, row.study_uid, row.sha256, row.calling_ae, row.received_at)


# Intake ------------------------------------------------------------------------------------------------


def intake(session: Session, *, words: str | None = None, number: int = 1, size: int = 25) -> Page[IntakeStudy]:
    """One page of studies, the latest arrival first, with every series and its verdict."""
    conditions = [_intake_contains(words)] if words else []
    total = session.scalar(select(func.count()).select_from(StudyRow).where(*conditions)) or 0
    rows = session.scalars(
        select(StudyRow)
        .options(selectinload(StudyRow.series), selectinload(StudyRow.results))
        .where(*conditions)
        .order_by(StudyRow.last_received_at.desc(), StudyRow.id.desc())
        .limit(size)
        .offset((number - 1) * size)
    ).all()
    jobs = _jobs_of(session, [row.id for row in rows])
    items = tuple(_intake_study(row, next(iter(jobs.get(row.id, [])), None)) for row in rows)
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
        _study_contains(words),
        StudyRow.calling_ae.icontains(words, autoescape=True),
        StudyRow.id.in_(in_series),
    )


def _intake_study(row: StudyRow, job: JobLine | None) -> IntakeStudy:
    found = _found(row)
    return IntakeStudy(
        study_uid=row.study_uid,
        patient=_patient(row),
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
    )


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
        reasons=_told(row.reasons),
        cautions=_told(row.cautions),
        found=_told(found),
    )


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
    return tuple(_conflict(row) for row in session.scalars(query))


# Audit, health, metrics --------------------------------------------------------------------------------


def note(
    session: Session,
    *,
    at: datetime,
    actor: str,
    action: str,
    subject: str,
    detail: Mapping[str, Any],
    peer_address: str | None,
) -> None:
    """Write one line of the audit trail: who looked at or took out what (RULES 14)."""
    session.add(
        AuditRow(
            at=at,
            actor=actor,
            action=action,
            subject=subject,
            detail=dict(detail),
            peer_address=peer_address,
        )
    )


def audit(session: Session, *, subject: str | None = None, number: int = 1, size: int = 50) -> Page[AuditLine]:
    """One page of the audit trail, the latest first."""
    conditions = [AuditRow.subject == subject] if subject else []
    total = session.scalar(select(func.count()).select_from(AuditRow).where(*conditions)) or 0
    rows = session.scalars(
        select(AuditRow).where(*conditions).order_by(AuditRow.id.desc()).limit(size).offset((number - 1) * size)
    )
    items = tuple(AuditLine(row.at, row.actor, row.action, row.subject, row.detail, row.peer_address) for row in rows)
    return Page(items, total, number, size)


def answers(session: Session) -> bool:
    """True when the database answers."""
    return bool(session.scalar(text("SELECT 1")))


def gauges(session: Session) -> Gauges:
    """The counts that monitoring watches."""
    in_force = (
        _joined(select(_category_column, func.count())).where(_category_column.is_not(None)).group_by(_category_column)
    )
    instances = session.execute(select(func.count(), func.sum(InstanceRow.size_bytes))).one()
    return Gauges(
        studies=_tally(session, select(StudyRow.state, func.count()).group_by(StudyRow.state)),
        decisions=_tally(session, in_force),
        jobs=_tally(session, select(JobRow.state, func.count()).group_by(JobRow.state)),
        referrals=_tally(session, select(ReferralRow.state, func.count()).group_by(ReferralRow.state)),
        instances=instances[0],
        instance_bytes=instances[1] or 0,
        refusals=_tally(session, select(RefusalRow.kind, func.count()).group_by(RefusalRow.kind)),
        conflicts=session.scalar(select(func.count()).select_from(ConflictRow)) or 0,
        oldest_waiting_at=session.scalar(
            select(func.min(JobRow.created_at)).where(JobRow.state == JobState.WAITING.value)
        ),
    )


def _tally(session: Session, query: Select[Any, int]) -> dict[str, int]:
    return dict(session.execute(query).all())
