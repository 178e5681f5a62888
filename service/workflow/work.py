"""The life of a job: claim, heartbeat, finish or fail, and what happens to one whose worker is gone.

The database is the truth; the broker only says "look". A claim is one conditional UPDATE (the same on SQLite
and PostgreSQL). It raises the fencing token, and every later write of that worker is conditional on it: a
worker that was paused, cut off or overtaken writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Update, or_, select, update
from sqlalchemy.orm import Session

from service.domain.errors import OsteogateError
from service.domain.states import JobState, StudyState
from service.store.moves import moved
from service.store.tables import AuditRow, JobRow, StudyRow
from service.workflow import locks

_ERROR_LENGTH = 4000  # characters of an error's text that are kept
SLOWEST_RERING = 8  # a waiting job is rung ever more rarely, down to once in this many rering periods


class StaleToken(OsteogateError):
    """The job was given to another worker (or ended) meanwhile; nothing was written."""


class NotRetryable(OsteogateError):
    """Only a quarantined job can be retried."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One worker's right to one job until the lease runs out; `token` fences every write."""

    job_id: int
    token: int
    attempt: int
    worker: str
    study_id: int
    study_uid: str
    series_id: int
    series_uid: str
    revision: int
    deadline_at: datetime


def claim(
    session: Session,
    job_id: int,
    *,
    worker: str,
    now: datetime,
    lease_seconds: float,
    deadline_seconds: float,
    max_attempts: int,
) -> Claim | None:
    """Take a waiting job, or None: another worker has it, it has ended, or its study receives again."""
    study = locks.study_of_job(session, job_id)
    if study is None or study.state != StudyState.QUEUED.value:
        return None
    deadline_at = now + timedelta(seconds=deadline_seconds)
    taken = moved(
        session,
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.state == JobState.WAITING.value, JobRow.attempts < max_attempts)
        .values(
            state=JobState.RUNNING.value,
            attempts=JobRow.attempts + 1,
            token=JobRow.token + 1,
            worker=worker[:128],
            lease_until=now + timedelta(seconds=lease_seconds),
            deadline_at=deadline_at,
            started_at=now,
        ),
    )
    if not taken:
        return None
    job = locks.fresh_job(session, job_id)
    return Claim(
        job_id=job.id,
        token=job.token,
        attempt=job.attempts,
        worker=worker,
        study_id=study.id,
        study_uid=study.study_uid,
        series_id=job.series_id,
        series_uid=job.series.series_uid,
        revision=job.revision,
        deadline_at=deadline_at,
    )


def heartbeat(session: Session, held: Claim, now: datetime, lease_seconds: float) -> bool:
    """Lengthen the lease; False when the job is no longer this worker's."""
    return moved(session, _owned(held).values(lease_until=now + timedelta(seconds=lease_seconds)))


def finish(session: Session, held: Claim, now: datetime) -> None:
    """Mark the job done; StaleToken when it is no longer this worker's."""
    _must_move(
        session,
        held,
        _owned(held).values(state=JobState.DONE.value, lease_until=None, finished_at=now, last_error=None),
    )


def fail(session: Session, held: Claim, error: str, now: datetime, max_attempts: int) -> JobState:
    """Give the job back after an error: it waits for its next attempt, or is quarantined after the last one.

    The next bell is a rering period away, so that a passing fault has time to pass.
    """
    study = locks.study_of_job(session, held.job_id)
    _must_move(
        session,
        held,
        _owned(held).values(token=JobRow.token + 1, lease_until=None, last_error=kept(error), rung_at=now),
    )
    assert study is not None
    return _again_or_quarantine(session, locks.fresh_job(session, held.job_id), study, now, max_attempts)


def release(session: Session, held: Claim) -> None:
    """Give an unfinished job back at a shutdown: it waits at once, and the attempt does not count."""
    _must_move(
        session,
        held,
        _owned(held).values(
            state=JobState.WAITING.value,
            token=JobRow.token + 1,
            attempts=JobRow.attempts - 1,
            lease_until=None,
            deadline_at=None,
            rung_at=None,
        ),
    )


def reconcile(session: Session, now: datetime, max_attempts: int) -> list[int]:
    """Take back every job whose lease or deadline has passed; the ids of those jobs.

    The token goes up here already, so a worker that was only paused finds its claim stale when it wakes.
    """
    overdue = or_(JobRow.lease_until < now, JobRow.deadline_at < now)
    statement = select(JobRow.id, StudyRow.study_uid).join(StudyRow, JobRow.study_id == StudyRow.id)
    found = session.execute(statement.where(JobRow.state == JobState.RUNNING.value, overdue)).all()
    if not found:
        return []
    studies = {row.study_uid: row for row in locks.studies(session, {uid for _, uid in found})}
    taken = []
    for job_id, study_uid in sorted(found, key=lambda pair: pair[1]):
        statement_back = (
            update(JobRow)
            .where(JobRow.id == job_id, JobRow.state == JobState.RUNNING.value, overdue)
            .values(token=JobRow.token + 1, rung_at=None)
        )
        if moved(session, statement_back):
            job = locks.fresh_job(session, job_id)
            job.last_error = _overdue_text(job, now)
            job.lease_until = None
            _again_or_quarantine(session, job, studies[study_uid], now, max_attempts)
            taken.append(job_id)
    return taken


def due_for_bell(session: Session, now: datetime, rering_seconds: float) -> list[int]:
    """Waiting jobs that the bell must be rung for: never rung yet, or rung too long ago; oldest first.

    A ring may be lost with its broker, so it is repeated, but ever more rarely as a job grows old (at most 8
    rering periods apart): behind a long queue the messages would otherwise pile up.
    """
    statement = select(JobRow.id, JobRow.created_at, JobRow.rung_at).join(StudyRow, JobRow.study_id == StudyRow.id)
    waiting = statement.where(
        JobRow.state == JobState.WAITING.value,
        StudyRow.state == StudyState.QUEUED.value,
        or_(JobRow.rung_at.is_(None), JobRow.rung_at <= now - timedelta(seconds=rering_seconds)),
    ).order_by(JobRow.id)
    due = []
    for job_id, created_at, rung_at in session.execute(waiting):
        if rung_at is not None:
            age = (rung_at - created_at).total_seconds()
            pause = min(max(rering_seconds, age), SLOWEST_RERING * rering_seconds)
            if rung_at > now - timedelta(seconds=pause):
                continue
        due.append(job_id)
    return due


def rung(session: Session, job_id: int, now: datetime) -> None:
    """Note that the bell was rung for a waiting job."""
    moved(
        session,
        update(JobRow).where(JobRow.id == job_id, JobRow.state == JobState.WAITING.value).values(rung_at=now),
    )


def unheard(session: Session, *, since: datetime) -> bool:
    """Whether a job still waits that was rung for since then: nobody heard the bell yet."""
    statement = (
        select(JobRow.id)
        .join(StudyRow, JobRow.study_id == StudyRow.id)
        .where(
            JobRow.state == JobState.WAITING.value,
            StudyRow.state == StudyState.QUEUED.value,
            JobRow.rung_at > since,
        )
    )
    return session.scalars(statement.limit(1)).first() is not None


def retry(session: Session, job_id: int, *, actor: str, now: datetime, peer_address: str | None = None) -> None:
    """A person gives a quarantined job a fresh set of attempts."""
    study = locks.study_of_job(session, job_id)
    back = (
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.state == JobState.QUARANTINED.value)
        .values(state=JobState.WAITING.value, attempts=0, rung_at=None, finished_at=None)
    )
    if study is None or study.state != StudyState.QUARANTINED.value or not moved(session, back):
        raise NotRetryable(f"job {job_id} is not in quarantine")
    study.state = StudyState.QUEUED.value
    session.add(
        AuditRow(
            at=now,
            actor=actor,
            action="retry",
            subject=study.study_uid,
            detail={"job": job_id},
            peer_address=peer_address,
        )
    )


def _again_or_quarantine(session: Session, job: JobRow, study: StudyRow, now: datetime, max_attempts: int) -> JobState:
    job.deadline_at = None
    if job.attempts < max_attempts:
        job.state = JobState.WAITING.value
        session.flush()
        return JobState.WAITING
    job.state = JobState.QUARANTINED.value
    job.finished_at = now
    if study.state == StudyState.QUEUED.value:
        study.state = StudyState.QUARANTINED.value
    session.flush()
    return JobState.QUARANTINED


def _overdue_text(job: JobRow, now: datetime) -> str:
    what = "its deadline passed" if job.deadline_at and job.deadline_at < now else "its lease ran out"
    return f"attempt {job.attempts} on {job.worker}: {what} (the worker died, hung or was cut off)"


def _owned(held: Claim) -> Update:
    return update(JobRow).where(
        JobRow.id == held.job_id, JobRow.token == held.token, JobRow.state == JobState.RUNNING.value
    )


def _must_move(session: Session, held: Claim, statement: Update) -> None:
    if not moved(session, statement):
        raise StaleToken(f"job {held.job_id}: token {held.token} of {held.worker} is stale")


def kept(error: str) -> str:
    """An error's text as a row keeps it."""
    return error.replace("\x00", " ")[:_ERROR_LENGTH]
