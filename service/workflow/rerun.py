"""A person asks for the same images to be measured again."""

from __future__ import annotations

import hashlib
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.domain.errors import OsteogateError
from service.domain.states import JobState, StudyState
from service.store.tables import AuditRow, JobRow
from service.workflow import locks, work


class NotRerunnable(OsteogateError):
    """The study has nothing to run again now; the message says why."""


def rerun(session: Session, study_uid: str, *, actor: str, now: datetime, peer_address: str | None = None) -> int:
    """Queue the study's latest job again and return the job's id; the old result stands until the new one.

    A quarantined job gets its attempts back; a finished one gets a successor, the run's number in its key.
    """
    study = locks.study(session, study_uid)
    if study is None:
        raise NotRerunnable("there is no such study")
    if study.state == StudyState.NOT_SCREENED.value:
        raise NotRerunnable("no series of this study is eligible")
    if study.state == StudyState.RECEIVING.value:
        raise NotRerunnable("the study is still being received")
    if study.state == StudyState.QUEUED.value:
        raise NotRerunnable("the study already waits for the worker")
    current = (JobState.DONE.value, JobState.QUARANTINED.value)
    jobs = select(JobRow).where(JobRow.study_id == study.id, JobRow.state.in_(current))
    job = session.scalars(jobs.order_by(JobRow.revision.desc(), JobRow.id.desc())).first()
    if job is None:
        raise NotRerunnable("the study has no finished job")
    if job.state == JobState.QUARANTINED.value:
        work.retry(session, job.id, actor=actor, now=now, peer_address=peer_address)
        return job.id
    run = session.scalar(select(func.count()).select_from(JobRow).where(JobRow.study_id == study.id)) or 0
    again = JobRow(
        kind=job.kind,
        key=hashlib.sha256(f"rerun {run} of {job.key}".encode()).hexdigest(),
        study_id=study.id,
        series_id=job.series_id,
        segmentation_id=job.segmentation_id,
        rerun_of_id=job.id,
        revision=study.revision,
        created_at=now,
    )
    session.add(again)
    study.state = StudyState.QUEUED.value
    session.flush()
    detail = {"job": again.id, "of": job.id, "run": run}
    session.add(
        AuditRow(at=now, actor=actor, action="rerun", subject=study_uid, detail=detail, peer_address=peer_address)
    )
    return again.id
