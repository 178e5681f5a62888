"""Row locks in one order: studies first, by study UID. (SQLite locks the whole database instead.)"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.store.tables import JobRow, StudyRow


def studies(session: Session, study_uids: Collection[str]) -> list[StudyRow]:
    """The named studies, held until the commit and freshly read."""
    statement = select(StudyRow).where(StudyRow.study_uid.in_(list(study_uids))).order_by(StudyRow.study_uid)
    locked = statement.with_for_update().execution_options(populate_existing=True)
    return list(session.scalars(locked))


def study(session: Session, study_uid: str) -> StudyRow | None:
    """One study, held until the commit and freshly read."""
    return next(iter(studies(session, [study_uid])), None)


def study_of_job(session: Session, job_id: int) -> StudyRow | None:
    """The study of a job, held until the commit and freshly read."""
    uid = select(StudyRow.study_uid).join(JobRow, JobRow.study_id == StudyRow.id).where(JobRow.id == job_id)
    study_uid = session.scalar(uid)
    return None if study_uid is None else study(session, study_uid)


def fresh_job(session: Session, job_id: int) -> JobRow:
    """A job as the database has it now, whatever the session remembers of it."""
    statement = select(JobRow).where(JobRow.id == job_id).execution_options(populate_existing=True)
    return session.scalars(statement).one()
