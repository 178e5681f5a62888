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

from models.package import scanner_name
from service.domain.completeness import closing
from service.domain.eligibility import Verdict, assess_series, choose, patients_of, vendor_of
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
from service.domain.supplied import Candidate, Target, choose_supplied, is_segmentation, not_used
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
from service.workflow import intake, locks, model, report_verdicts, reporting, shadow, work

SCREEN = "screen"
ACTOR = "osteogate"  # stands in the audit where no person acted


def job_key(
    series_uid: str,
    instances: Iterable[tuple[str, str]],
    model_key: str,
    segmentation: tuple[str, str] | None = None,
) -> str:
    """SHA-256 over the series, its set of (SOP instance UID, SHA-256), the model and the supplied segmentation's pair.

    The order of the instances plays no part.
    """
    return _digest([SCREEN, series_uid, sorted(set(instances)), model_key, segmentation])


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
    chosen, segmentation = _judge(session, study, facts, rules.policy)
    if chosen is None:
        _supersede(session, study, keep_job=None)
        study.state = StudyState.NOT_SCREENED.value
    else:
        _queue(session, study, chosen, segmentation, rules.model_key, now)
    session.flush()
    return True


def instance_paths(session: Session, series_id: int) -> list[str]:
    """The series' files, relative to the spool, in the order of their UIDs (never of arrival)."""
    statement = select(InstanceRow.path).where(InstanceRow.series_id == series_id)
    return list(session.scalars(statement.order_by(InstanceRow.sop_instance_uid)))


def segmentation_path(session: Session, job_id: int) -> str | None:
    """The supplied segmentation that a job measures with, relative to the spool; None: our own networks."""
    statement = select(InstanceRow.path).join(JobRow, JobRow.segmentation_id == InstanceRow.id)
    return session.scalar(statement.where(JobRow.id == job_id))


def record(
    session: Session,
    held: work.Claim,
    measurements: Measurements,
    *,
    artefacts: PurePosixPath | str | None,
    labelled: bool,
    policy: Policy,
    now: datetime,
) -> ResultRow:
    """Decide on what the worker measured and keep everything, or nothing: StaleToken when the job was lost.

    `artefacts` is the folder of the pictures, relative to the results folder; `labelled` says whether the outlined
    vertebrae lie in it. The DICOM objects of the result are promised in the same transaction.
    """
    study = locks.study(session, held.study_uid)
    work.finish(session, held, now)  # first: a stale worker is stopped before it reads or writes anything else
    assert study is not None
    series = session.get_one(SeriesRow, held.series_id)
    verdict = _verdict(series)
    facts = _facts(session, series.id)
    gate = model.gate_passed(  # whatever the worker believes
        session,
        measurements.provenance.model_sha256,
        gate=policy.gate_label,
        scanner=scanner_name(vendor_of(facts[0].manufacturer), facts[0].model_name),
    )
    measurements = replace(measurements, model_gate_passed=gate)
    if measurements.provenance.segmenter is None:  # no volume at all: say only why, not which levels it lacks
        verdict = replace(verdict, eligible=False)
    outcome = decide(measurements, _patient(facts), verdict, policy)
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
        run=_results_of_revision(session, study, held.revision),
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
        renumbered = session.get_one(JobRow, held.job_id).renumbering is not None
        _open_referral(session, study, now, new_images=earlier < held.revision and not renumbered)
    if study.state == StudyState.QUEUED.value:  # a study that receives again stays so; its next close decides
        study.state = StudyState.SCREENED.value
    _correct_segmentation(session, held.job_id, document)
    session.add(_decision_audit(study, outcome.decision, held, now))
    session.flush()
    shadow.keep(session, result, measurements.shadow, outcome.patient, now)
    reporting.promise(session, result, labelled=labelled, now=now)
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
) -> tuple[SeriesRow | None, InstanceRow | None]:
    """Give every series its verdict; the chosen one, if any is eligible, and the supplied segmentation for it."""
    conflicts = _conflicts(session, study)
    everything = [one for some in facts.values() for one in some]
    patients = patients_of(everything)
    _name_as_the_ct_does(study, everything)
    judged: dict[str, tuple[Sequence[InstanceFacts], Verdict]] = {}
    supplied: list[SeriesRow] = []
    for series in study.series:
        instances = facts[series.series_uid]
        verdict = assess_series(instances, policy, conflicts=conflicts.get(series.id, 0), patients=patients)
        _give(series, report_verdicts.verdict(session, series) or verdict)
        if not is_segmentation(instances):
            judged[series.series_uid] = (instances, verdict)
        elif not all(one.own_output for one in instances):
            supplied.append(series)
    choice = choose(judged, policy)
    study.choice = report_verdicts.NOTHING_BUT_REPORTS if report_verdicts.are_reports(study.series) else choice.text
    for series in study.series:
        series.chosen = series.series_uid == choice.series_uid
    chosen = next((series for series in study.series if series.chosen), None)
    frame = None if chosen is None else facts[chosen.series_uid][0].frame_of_reference_uid
    target = None if chosen is None else Target(chosen.series_uid, frame)
    return chosen, _choose_segmentation(session, supplied, target)


def _name_as_the_ct_does(study: StudyRow, everything: Sequence[InstanceFacts]) -> None:
    """The study is shown under the CT's patient, whatever arrived first; by UID, so that no order matters."""
    cts = [facts for facts in everything if facts.modality == "CT" and not facts.own_output]
    if cts:
        first = min(cts, key=lambda facts: facts.sop_instance_uid)
        for name, value in intake.patient_values(first).items():
            setattr(study, name, value)


def _give(series: SeriesRow, verdict: Verdict) -> None:
    series.eligible = verdict.eligible
    series.reasons = [reason.as_dict() for reason in verdict.reasons]
    series.cautions = [reason.as_dict() for reason in verdict.cautions]


def _choose_segmentation(session: Session, supplied: Sequence[SeriesRow], target: Target | None) -> InstanceRow | None:
    """Give every series of supplied segmentations its verdict; the one that is used, if any."""
    statement = select(InstanceRow).where(InstanceRow.series_id.in_([series.id for series in supplied]))
    rows = {row.sop_instance_uid: row for row in session.scalars(statement)}
    read = {uid: InstanceFacts.from_json(row.facts) for uid, row in rows.items()}
    twice = set(session.scalars(select(ConflictRow.sop_instance_uid).where(ConflictRow.sop_instance_uid.in_(rows))))
    foreign = (Candidate(read[uid], rows[uid].received_at, uid in twice) for uid in rows if not read[uid].own_output)
    choice = choose_supplied(foreign, target)
    for series in supplied:
        _give(series, choice.verdicts[series.series_uid])
    return None if choice.sop_instance_uid is None else rows[choice.sop_instance_uid]


def _correct_segmentation(session: Session, job_id: int, document: Mapping[str, Any]) -> None:
    """Where the pixels did not keep what the header promised, our own networks measured: its series says so."""
    used = select(InstanceRow).join(JobRow, JobRow.segmentation_id == InstanceRow.id).where(JobRow.id == job_id)
    segmentation = session.scalars(used).one_or_none()
    if segmentation is None or document["provenance"]["segmenter_sha256"] in (segmentation.sha256, None):
        return
    _give(segmentation.series, not_used("It could not be used on this CT; the notes of the result say why."))


def _queue(
    session: Session,
    study: StudyRow,
    chosen: SeriesRow,
    segmentation: InstanceRow | None,
    model_key: str,
    now: datetime,
) -> None:
    """Queue the chosen series, unless exactly this work has been queued or done before."""
    statement = select(InstanceRow.sop_instance_uid, InstanceRow.sha256)
    instances = session.execute(statement.where(InstanceRow.series_id == chosen.id))
    pair = None if segmentation is None else (segmentation.sop_instance_uid, segmentation.sha256)
    key = job_key(chosen.series_uid, ((uid, sha256) for uid, sha256 in instances), model_key, pair)
    job = session.scalars(select(JobRow).where(JobRow.key == key)).one_or_none()
    if job is None:
        job = JobRow(
            kind=SCREEN,
            key=key,
            study_id=study.id,
            series_id=chosen.id,
            segmentation_id=None if segmentation is None else segmentation.id,
            revision=study.revision,
            created_at=now,
        )
        session.add(job)
        session.flush()
        study.state = StudyState.QUEUED.value
    else:
        job = _run_in_force(session, job)
        study.state = _resume(session, study, job).value
    _supersede(session, study, keep_job=job.id)


def _run_in_force(session: Session, job: JobRow) -> JobRow:
    """The job itself, or the last of its reruns; one that failed for good does not hide the run before it."""
    runs = [job]
    newest = select(JobRow).order_by(JobRow.id.desc()).limit(1)
    while (rerun := session.scalars(newest.where(JobRow.rerun_of_id == runs[-1].id)).one_or_none()) is not None:
        runs.append(rerun)
    while len(runs) > 1 and runs[-1].state == JobState.QUARANTINED.value:
        runs.pop()
    return runs[-1]


def _resume(session: Session, study: StudyRow, job: JobRow) -> StudyState:
    """The same images and model as before: what was done stands, what was waiting goes on."""
    result = session.scalars(select(ResultRow).where(ResultRow.job_id == job.id)).one_or_none()
    if result is not None:
        result.superseded = False
        _correct_segmentation(session, job.id, result.document)
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


def _results_of_revision(session: Session, study: StudyRow, revision: int) -> int:
    """How often this revision has been measured before: its reports need names of their own."""
    same = (ResultRow.study_id == study.id, ResultRow.revision == revision)
    return session.scalar(select(func.count()).select_from(ResultRow).where(*same)) or 0


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
