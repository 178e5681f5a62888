"""The worklist: one line per study, what was decided and where the referral stands, all by query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, and_, case, func, or_, select
from sqlalchemy.orm import Session, aliased

from service.domain.reasons import Code
from service.domain.result import Category
from service.domain.states import ReferralState, StudyState
from service.store.tables import JobRow, ReferralRow, ResultRow, SeriesRow, StudyRow
from service.workflow.reading.values import (
    Page,
    Patient,
    Standing,
    Told,
    Values,
    digital_model,
    patient,
    standing,
    told,
    values_of,
)
from service.workflow.report_verdicts import only_dxa
from service.workflow.screening import not_screened_document

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
    updating: bool  # a decision stands, and the study is being measured again
    attempts: int
    referral: Standing | None


@dataclass(frozen=True, slots=True)
class Filter:
    """What the worklist is narrowed to; None leaves that aspect open."""

    stage: Stage | None = None
    category: Category | None = None
    state: StudyState | None = None
    referral: ReferralState | None = None
    synthetic: bool | None = None
    text: str | None = None


_LATEST = (
    select(ResultRow.study_id, func.max(ResultRow.id).label("result_id"))
    .where(ResultRow.superseded.is_(False))
    .group_by(ResultRow.study_id)
    .subquery()
)
IN_FORCE = aliased(ResultRow)
category_shown: ColumnElement[str | None] = case(
    (StudyRow.state == StudyState.NOT_SCREENED.value, Category.NOT_ASSESSABLE.value),
    (IN_FORCE.category.is_not(None), IN_FORCE.category),
    (StudyRow.state == StudyState.QUARANTINED.value, Category.NOT_ASSESSABLE.value),
    else_=None,
)
stage_shown: ColumnElement[str] = case(
    (
        and_(StudyRow.state == StudyState.QUARANTINED.value, IN_FORCE.category.is_(None)),
        Stage.FAILED.value,
    ),
    (category_shown.is_not(None), category_shown),
    else_=Stage.IN_PROGRESS.value,
)
# Who needs a person first: open referrals, doubt, broken work, those who wait for a DXA, the rest.
_PRIORITY: ColumnElement[int] = case(
    (ReferralRow.state.in_([ReferralState.DISMISSED.value, ReferralState.DXA_DONE.value]), 8),
    (ReferralRow.state == ReferralState.ORDERED.value, 4),
    (ReferralRow.state == ReferralState.REVIEWED.value, 1),
    (stage_shown == Stage.REFER.value, 0),
    (stage_shown == Stage.INDETERMINATE.value, 2),
    (stage_shown == Stage.FAILED.value, 3),
    (stage_shown == Stage.IN_PROGRESS.value, 5),
    (stage_shown == Stage.NOT_ASSESSABLE.value, 6),
    else_=7,
)
_ORDERS: Mapping[Order, ColumnElement[Any]] = {
    Order.PRIORITY: _PRIORITY,
    Order.RECEIVED: StudyRow.last_received_at.expression,
    Order.STUDY_DATE: StudyRow.study_date.expression,
    Order.NAME: func.lower(StudyRow.patient_name),
    Order.BMD: IN_FORCE.bmd_g_cm2.expression,
    Order.TBS: IN_FORCE.tbs.expression,
    Order.HU: IN_FORCE.hu_mean.expression,
}


# What stands beside a report or a segmentation tells nothing about why no CT was measured.
_ABOUT_OBJECTS = (
    Code.OWN_OUTPUT.value,
    Code.SEGMENTATION_USED.value,
    Code.SEGMENTATION_NOT_USED.value,
    Code.DXA_ACCEPTED.value,
    Code.DXA_DUPLICATE.value,
)


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
    total = session.scalar(joined(select(func.count())).where(*conditions)) or 0
    key = _ORDERS[order]
    rows = session.execute(
        joined(select(StudyRow, IN_FORCE, ReferralRow, stage_shown))
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
        entry_of(study, result, referral, Stage(stage), series.get(study.id, ()), attempts.get(study.id, 0))
        for study, result, referral, stage in rows
    )
    return Page(items, total, number, size)


def worklist_counts(session: Session, wanted: Filter) -> dict[Stage, int]:
    """How many studies each tab holds under the other filters."""
    conditions = _conditions(Filter(synthetic=wanted.synthetic, text=wanted.text, referral=wanted.referral))
    rows = session.execute(joined(select(stage_shown, func.count())).where(*conditions).group_by(stage_shown))
    found = dict(rows.all())
    return {stage: found.get(stage.value, 0) for stage in Stage}


def joined(query: Query) -> Query:
    return (
        query.select_from(StudyRow)
        .outerjoin(_LATEST, _LATEST.c.study_id == StudyRow.id)
        .outerjoin(IN_FORCE, IN_FORCE.id == _LATEST.c.result_id)
        .outerjoin(ReferralRow, ReferralRow.study_id == StudyRow.id)
    )


def _conditions(wanted: Filter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [~only_dxa]
    if wanted.stage is not None:
        conditions.append(stage_shown == wanted.stage.value)
    if wanted.category is not None:
        conditions.append(category_shown == wanted.category.value)
    if wanted.state is not None:
        conditions.append(StudyRow.state == wanted.state.value)
    if wanted.referral is not None:
        conditions.append(ReferralRow.state == wanted.referral.value)
    if wanted.synthetic is not None:
        conditions.append(StudyRow.synthetic.is_(wanted.synthetic))
    if wanted.text:
        conditions.append(study_contains(wanted.text))
    return conditions


def study_contains(words: str) -> ColumnElement[bool]:
    columns = (
        StudyRow.patient_name,
        StudyRow.patient_id,
        StudyRow.accession_number,
        StudyRow.study_uid,
        StudyRow.description,
    )
    return or_(*(column.icontains(words, autoescape=True) for column in columns))


def entry_of(
    study: StudyRow,
    result: ResultRow | None,
    referral: ReferralRow | None,
    stage: Stage,
    series: Sequence[SeriesRow],
    attempts: int,
) -> WorklistEntry:
    in_force = result if study.state != StudyState.NOT_SCREENED.value else None
    document: Mapping[str, Any] = in_force.document if in_force is not None else {}
    decision = document.get("decision", {})
    waiting = study.state in (StudyState.RECEIVING.value, StudyState.QUEUED.value)
    return WorklistEntry(
        study_uid=study.study_uid,
        patient=patient(study),
        study_date=study.study_date,
        description=study.description,
        accession_number=study.accession_number,
        synthetic=study.synthetic,
        state=StudyState(study.state),
        stage=stage,
        revision=study.revision,
        received_at=study.last_received_at,
        category=_category(study, in_force),
        reasons=told(decision.get("reasons", ())) or _why_not(study, series),
        driver=decision.get("driver"),
        values=values_of(document.get("patient", {})),
        digital_model=digital_model(document),
        updating=waiting and in_force is not None,
        attempts=attempts,
        referral=standing(referral),
    )


def told_by(entry: WorklistEntry, document: Mapping[str, Any]) -> WorklistEntry:
    """The line as this result document tells it, whatever is in force now."""
    decision = document["decision"]
    return replace(
        entry,
        stage=Stage(decision["category"]),
        category=Category(decision["category"]),
        reasons=told(decision["reasons"]),
        driver=decision["driver"],
        values=values_of(document["patient"]),
        digital_model=digital_model(document),
        updating=False,
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
    whole = told(document["verdict"]["reasons"][:1])
    refused = [row for row in series if any(reason["code"] not in _ABOUT_OBJECTS for reason in row.reasons)]
    if study.state == StudyState.QUARANTINED.value or not refused:
        return whole
    closest = min(refused, key=lambda row: (len(row.reasons), -row.instance_count))
    return (*told(closest.reasons), *whole)


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
