"""Audit trail, health and the counts that monitoring watches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, select, text
from sqlalchemy.orm import Session

from service.domain.states import JobState
from service.store.tables import (
    AuditRow,
    ConflictRow,
    InstanceRow,
    JobRow,
    ReferralRow,
    RefusalRow,
    StudyRow,
)
from service.workflow.reading.deliveries import reports_by_state
from service.workflow.reading.values import Page
from service.workflow.reading.worklists import category_shown, joined


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
    reports: Mapping[str, int]  # DICOM objects of the results in force, by state
    instances: int
    instance_bytes: int
    refusals: Mapping[str, int]  # by kind
    conflicts: int
    oldest_waiting_at: datetime | None


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


PICTURE_VIEW = "picture.view"
VIEWS = ("study.view", "result.view", PICTURE_VIEW)


def seen_since(session: Session, study_uid: str, since: datetime, *, actor: str, peer_address: str | None) -> bool:
    """Whether the audit holds a view of this study, by this actor from this address, since then."""
    about = (AuditRow.at >= since, AuditRow.subject == study_uid, AuditRow.action.in_(VIEWS))
    own = (AuditRow.actor == actor, AuditRow.peer_address == peer_address)
    return session.scalar(select(AuditRow.id).where(*about, *own).limit(1)) is not None


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
    in_force = joined(select(category_shown, func.count())).where(category_shown.is_not(None)).group_by(category_shown)
    instances = session.execute(select(func.count(), func.sum(InstanceRow.size_bytes))).one()
    return Gauges(
        studies=_tally(session, select(StudyRow.state, func.count()).group_by(StudyRow.state)),
        decisions=_tally(session, in_force),
        jobs=_tally(session, select(JobRow.state, func.count()).group_by(JobRow.state)),
        referrals=_tally(session, select(ReferralRow.state, func.count()).group_by(ReferralRow.state)),
        reports=reports_by_state(session),
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
