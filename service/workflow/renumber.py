"""A person gives the levels of a result other names, or confirms them: everything is measured again under these names.

The outlines that were kept with the result are taken as they are: nothing is segmented again. The new result is a
revision of its own and says whose word its names are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.domain.errors import OsteogateError
from service.domain.result import Renumbering
from service.domain.states import StudyState
from service.store.tables import AuditRow, JobRow, ReportRow, ResultRow
from service.workflow import locks
from service.workflow.reporting import SEGMENTATION


class NotRenumberable(OsteogateError):
    """The study's levels cannot be renumbered now; the message says why."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The outlines of an earlier result, to be measured under other names."""

    artefacts: str  # the earlier result's folder, relative to the results folder
    segmenter: str
    segmenter_sha256: str
    renumbering: Renumbering


def renumber(
    session: Session,
    study_uid: str,
    levels: Mapping[str, str],
    *,
    reason: str,
    actor: str,
    now: datetime,
    peer_address: str | None = None,
) -> int:
    """Queue the result in force to be measured under these names, as a new revision; the job's id.

    `levels` maps each name to the right one; the old result stands until the new one.
    """
    study = locks.study(session, study_uid)
    if study is None:
        raise NotRenumberable("there is no such study")
    if study.state != StudyState.SCREENED.value:
        raise NotRenumberable(f"the study is {study.state}: its levels are renumbered once it is screened")
    reason = reason.strip()
    if not reason:
        raise NotRenumberable("say why the levels are renumbered")
    result = _in_force(session, study.id)
    if result is None or not renumberable(session, result):
        raise NotRenumberable("no outlined vertebra was kept with the result")
    told = Renumbering(levels, actor, now.isoformat(), reason, result.id)
    earlier = session.get_one(JobRow, result.job_id)
    count = session.scalar(select(func.count()).select_from(JobRow).where(JobRow.study_id == study.id)) or 0
    study.revision += 1
    job = JobRow(
        kind=earlier.kind,
        key=hashlib.sha256(f"renumbering {count} of {earlier.key}".encode()).hexdigest(),
        study_id=study.id,
        series_id=earlier.series_id,
        segmentation_id=earlier.segmentation_id,
        rerun_of_id=earlier.id,
        renumbering=told.as_dict(),
        revision=study.revision,
        created_at=now,
    )
    session.add(job)
    study.state = StudyState.QUEUED.value
    session.flush()
    changed = {old: new for old, new in levels.items() if old != new}
    detail = {"job": job.id, "of": result.id, "reason": reason, "levels": changed}
    session.add(
        AuditRow(at=now, actor=actor, action="renumber", subject=study_uid, detail=detail, peer_address=peer_address)
    )
    return job.id


def renumberable(session: Session, result: ResultRow) -> bool:
    """Whether outlines were kept with a result: their segmentation was promised then."""
    wanted = select(ReportRow.id).where(ReportRow.result_id == result.id, ReportRow.kind == SEGMENTATION)
    return result.artefacts is not None and session.scalars(wanted.limit(1)).first() is not None


def kept(session: Session, job_id: int) -> Kept | None:
    """What a job measures instead of segmenting; None where it segments."""
    job = session.get_one(JobRow, job_id)
    if job.renumbering is None:
        return None
    told = Renumbering.from_dict(job.renumbering)
    result = session.get_one(ResultRow, told.result_id)
    made = result.document["provenance"]
    return Kept(result.artefacts or "", str(made["segmenter"]), str(made["segmenter_sha256"]), told)


def _in_force(session: Session, study_id: int) -> ResultRow | None:
    statement = select(ResultRow).where(ResultRow.study_id == study_id, ResultRow.superseded.is_(False))
    return session.scalars(statement.order_by(ResultRow.id.desc()).limit(1)).first()
