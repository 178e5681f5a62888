"""A study on its way: quiet -> judged -> queued -> measured -> decided.

Every step changes the study's state and everything that follows from it in one transaction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from service.domain.completeness import closing
from service.domain.eligibility import Verdict, assess_series, choose
from service.domain.facts import InstanceFacts
from service.domain.policy import Policy
from service.domain.reasons import Code, Reason
from service.domain.referral import PatientFacts, decide, reportable
from service.domain.result import (
    Category,
    Decision,
    Driver,
    Measurements,
    PatientValues,
    result_document,
    unmeasured,
)
from service.domain.states import JobState, ReferralState, StudyState
from service.store.tables import (
    AuditRow,
    ConflictRow,
    InstanceRow,
    JobRow,
    ReferralRow,
    ResultRow,
    SeriesRow,
    StudyRow,
)
from service.version import software_version
from service.workflow import locks, work

SCREEN = "screen"
ACTOR = "osteogate"  # stands in the audit where no person acted


def job_key(series_uid: str, instances: Iterable[tuple[str, str]], model_key: str) -> str:
    """SHA-256 over the series, its set of (SOP instance UID, SHA-256) and the model; order plays no part."""
    return _digest([SCREEN, series_uid, sorted(set(instances)), model_key])


def close_quiet_studies(
    session: Session,
    *,
    now: datetime,
    quiet_seconds: float,
    patience_seconds: float,
    policy: Policy,
    model_key: str,
) -> int:
    """Close every quiet and geometrically whole study; how many were closed."""
    rules = Closure(quiet_seconds, patience_seconds, policy, model_key)
    due = quiet_studies(session, now=now, quiet_seconds=quiet_seconds)
    return sum(close_study(session, study_uid, now=now, rules=rules) for study_uid in due)


@dataclass(frozen=True, slots=True)
class Closure:
    """By what a study is closed and judged; `model_key` names the model that would measure it."""

    quiet_seconds: float
    patience_seconds: float
    policy: Policy
    model_key: str


def quiet_studies(session: Session, *, now: datetime, quiet_seconds: float) -> list[str]:
    """UIDs of the receiving studies that have been quiet for long enough to be looked at."""
    statement = select(StudyRow.study_uid).where(
        StudyRow.state == StudyState.RECEIVING.value,
        StudyRow.last_received_at <= now - timedelta(seconds=quiet_seconds),
    )
    return list(session.scalars(statement.order_by(StudyRow.study_uid)))


def close_study(session: Session, study_uid: str, *, now: datetime, rules: Closure) -> bool:
    """Judge one study, if it may be closed now, and queue it in the same transaction; False: not yet."""
    study = locks.study(session, study_uid)
    if study is None or study.state != StudyState.RECEIVING.value:
        return False
    facts = {series.series_uid: _facts(session, series.id) for series in study.series}
    may = closing(
        now,
        study.last_received_at,
        rules.quiet_seconds,
        rules.patience_seconds,
        facts.values(),
        policy=rules.policy,
    )
    if not may.close:
        return False
    study.revision += 1
    study.closed_at = now
    study.policy = rules.policy.label[:80]
    chosen = _judge(session, study, facts, rules.policy)
    if chosen is None:
        _supersede(session, study, keep_job=None)
        study.state = StudyState.NOT_SCREENED.value
    else:
        _queue(session, study, chosen, rules.model_key, now)
    session.flush()
    return True


def instance_paths(session: Session, series_id: int) -> list[str]:
    """The series' files, relative to the spool, in the order of their UIDs (never of arrival)."""
    statement = select(InstanceRow.path).where(InstanceRow.series_id == series_id)
    return list(session.scalars(statement.order_by(InstanceRow.sop_instance_uid)))


def record(
    session: Session,
    held: work.Claim,
    measurements: Measurements,
    *,
    artefacts: PurePosixPath | str | None,
    policy: Policy,
    now: datetime,
) -> ResultRow:
    """Decide on what the worker measured and keep everything, or nothing: StaleToken when the job was lost.

    `artefacts` is the folder of the pictures, relative to the results folder.
    """
    study = locks.study(session, held.study_uid)
    work.finish(session, held, now)  # first: a stale worker is stopped before it reads or writes anything else
    assert study is not None
    series = session.get_one(SeriesRow, held.series_id)
    verdict = _verdict(series)
    if measurements.provenance.segmenter is None:  # no volume at all: say only why, not which levels it lacks
        verdict = replace(verdict, eligible=False)
    outcome = decide(measurements, _patient(_facts(session, series.id)), verdict, policy)
    document = result_document(
        study_uid=study.study_uid,
        series_uid=series.series_uid,
        revision=held.revision,
        eligible=outcome.eligible,
        verdict_reasons=outcome.verdict_reasons,
        measurements=reportable(measurements, outcome),
        patient=outcome.patient,
        decision=outcome.decision,
    )
    earlier = _newest_revision(session, study)
    session.execute(update(ResultRow).where(ResultRow.study_id == study.id).values(superseded=True))
    result = ResultRow(
        study_id=study.id,
        series_id=series.id,
        job_id=held.job_id,
        revision=held.revision,
        attempt=held.attempt,
        document=document,
        artefacts=None if artefacts is None else str(artefacts),
        category=outcome.decision.category.value,
        bmd_g_cm2=outcome.patient.bmd_g_cm2,
        tbs=outcome.patient.tbs,
        hu_mean=outcome.patient.hu_mean,
        created_at=now,
    )
    session.add(result)
    if outcome.decision.category is Category.REFER:
        _open_referral(session, study, now, new_images=earlier < held.revision)
    if study.state == StudyState.QUEUED.value:  # a study that receives again stays so; its next close decides
        study.state = StudyState.SCREENED.value
    session.add(_decision_audit(study, outcome.decision, held, now))
    session.flush()
    return result


def not_screened_document(study: StudyRow) -> dict[str, Any] | None:
    """result.json of a study that was never measured, with the reasons; None while it is still on its way.

    A study that has a result (of whatever category) is answered by that result, not by this.
    """
    if study.state == StudyState.NOT_SCREENED.value:
        text = study.choice or "No series of this study can be measured."
        reasons = (Reason(Code.NO_ELIGIBLE_SERIES, text), *_series_reasons(study.series))
    elif study.state == StudyState.QUARANTINED.value:
        text = "Measuring failed as often as allowed; the study waits for a person to retry it."
        reasons = (Reason(Code.QUARANTINED, text),)
    else:
        return None
    return result_document(
        study_uid=study.study_uid,
        series_uid=None,
        revision=study.revision,
        eligible=False,
        verdict_reasons=reasons,
        measurements=unmeasured(software_version()),
        patient=PatientValues(synthetic=study.synthetic),
        decision=Decision(Category.NOT_ASSESSABLE, reasons, Driver.NONE, study.policy or ""),
    )


def _judge(
    session: Session, study: StudyRow, facts: Mapping[str, Sequence[InstanceFacts]], policy: Policy
) -> SeriesRow | None:
    """Give every series its verdict; the chosen one, if any is eligible."""
    conflicts = _conflicts(session, study)
    judged: dict[str, tuple[Sequence[InstanceFacts], Verdict]] = {}
    for series in study.series:
        verdict = assess_series(facts[series.series_uid], policy, conflicts=conflicts.get(series.id, 0))
        judged[series.series_uid] = (facts[series.series_uid], verdict)
        series.eligible = verdict.eligible
        series.reasons = [reason.as_dict() for reason in verdict.reasons]
        series.cautions = [reason.as_dict() for reason in verdict.cautions]
    choice = choose(judged, policy)
    study.choice = choice.text
    for series in study.series:
        series.chosen = series.series_uid == choice.series_uid
    return next((series for series in study.series if series.chosen), None)


def _queue(session: Session, study: StudyRow, chosen: SeriesRow, model_key: str, now: datetime) -> None:
    """Queue the chosen series, unless exactly this work has been queued or done before."""
    statement = select(InstanceRow.sop_instance_uid, InstanceRow.sha256)
    instances = session.execute(statement.where(InstanceRow.series_id == chosen.id))
    key = job_key(chosen.series_uid, ((uid, sha256) for uid, sha256 in instances), model_key)
    job = session.scalars(select(JobRow).where(JobRow.key == key)).one_or_none()
    if job is None:
        job = JobRow(
            kind=SCREEN,
            key=key,
            study_id=study.id,
            series_id=chosen.id,
            revision=study.revision,
            created_at=now,
        )
        session.add(job)
        session.flush()
        study.state = StudyState.QUEUED.value
    else:
        study.state = _resume(session, study, job).value
    _supersede(session, study, keep_job=job.id)


def _resume(session: Session, study: StudyRow, job: JobRow) -> StudyState:
    """The same images and model as before: what was done stands, what was waiting goes on."""
    result = session.scalars(select(ResultRow).where(ResultRow.job_id == job.id)).one_or_none()
    if result is not None:
        result.superseded = False
        return StudyState.SCREENED
    job.revision = study.revision
    if job.state == JobState.QUARANTINED.value:
        return StudyState.QUARANTINED
    if job.state == JobState.SUPERSEDED.value:
        job.state = JobState.WAITING.value
        job.attempts = 0
        job.rung_at = None
        job.finished_at = None
    return StudyState.QUEUED


def _supersede(session: Session, study: StudyRow, keep_job: int | None) -> None:
    """Everything older than the kept job is superseded; a worker that still runs it loses its token."""
    session.flush()
    others = (JobRow.study_id == study.id, JobRow.id != (keep_job or 0))
    unfinished = [JobState.WAITING.value, JobState.RUNNING.value, JobState.QUARANTINED.value]
    session.execute(
        update(JobRow)
        .where(*others, JobRow.state.in_(unfinished))
        .values(state=JobState.SUPERSEDED.value, token=JobRow.token + 1, lease_until=None)
    )
    old = (ResultRow.study_id == study.id, ResultRow.job_id != (keep_job or 0))
    session.execute(update(ResultRow).where(*old).values(superseded=True))


def _open_referral(session: Session, study: StudyRow, now: datetime, *, new_images: bool) -> None:
    """Open the study's referral. One that a person dismissed reopens only for new images.

    Nothing here ever closes a referral: that is for people.
    """
    referral = session.scalars(select(ReferralRow).where(ReferralRow.study_id == study.id)).one_or_none()
    if referral is None:
        session.add(ReferralRow(study_id=study.id, changed_at=now, changed_by=ACTOR))
    elif referral.state == ReferralState.DISMISSED.value and new_images:
        detail = {"from": referral.state, "to": ReferralState.OPEN.value, "reason": "new images"}
        referral.state = ReferralState.OPEN.value
        referral.reason = None
        referral.changed_at = now
        referral.changed_by = ACTOR
        session.add(AuditRow(at=now, actor=ACTOR, action="referral.reopen", subject=study.study_uid, detail=detail))


def _newest_revision(session: Session, study: StudyRow) -> int:
    newest = select(func.max(ResultRow.revision)).where(ResultRow.study_id == study.id)
    return session.scalar(newest) or 0


def _decision_audit(study: StudyRow, decision: Decision, held: work.Claim, now: datetime) -> AuditRow:
    return AuditRow(
        at=now,
        actor=ACTOR,
        action="decision",
        subject=study.study_uid,
        detail={
            "category": decision.category.value,
            "driver": decision.driver.value,
            "policy": decision.policy,
            "revision": held.revision,
            "job": held.job_id,
            "attempt": held.attempt,
            "worker": held.worker,
        },
    )


def _conflicts(session: Session, study: StudyRow) -> dict[int, int]:
    """How many instances of each series (by row id) also arrived with other bytes."""
    statement = (
        select(InstanceRow.series_id, func.count(func.distinct(ConflictRow.sop_instance_uid)))
        .join(ConflictRow, ConflictRow.sop_instance_uid == InstanceRow.sop_instance_uid)
        .join(SeriesRow, InstanceRow.series_id == SeriesRow.id)
        .where(SeriesRow.study_id == study.id)
        .group_by(InstanceRow.series_id)
    )
    return dict(session.execute(statement).all())


def _facts(session: Session, series_id: int) -> list[InstanceFacts]:
    """The facts of a series' instances, in the order of their UIDs (never of arrival)."""
    statement = select(InstanceRow.facts).where(InstanceRow.series_id == series_id)
    stored = session.scalars(statement.order_by(InstanceRow.sop_instance_uid))
    return [InstanceFacts.from_json(facts) for facts in stored]


def _verdict(series: SeriesRow) -> Verdict:
    """The verdict as it was given when the study closed."""
    return Verdict(
        eligible=bool(series.eligible),
        reasons=tuple(Reason.from_dict(reason) for reason in series.reasons),
        cautions=tuple(Reason.from_dict(reason) for reason in series.cautions),
    )


def _patient(instances: Sequence[InstanceFacts]) -> PatientFacts:
    """The patient as the series tells; digital only when every instance says so."""
    first = instances[0]
    return PatientFacts(
        synthetic=all(facts.synthetic for facts in instances),
        sex=first.patient_sex,
        age_years=first.patient_age_years,
        manufacturer=first.manufacturer,
    )


def _series_reasons(series: Iterable[SeriesRow]) -> tuple[Reason, ...]:
    """The refusals of every series, the largest series first, each code once."""
    reasons: dict[str, Reason] = {}
    for row in sorted(series, key=lambda row: -row.instance_count):
        for stored in row.reasons:
            reasons.setdefault(stored["code"], Reason.from_dict(stored))
    return tuple(reasons.values())


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()
