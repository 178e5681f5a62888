"""Received instances become rows. The bytes are durable in the spool before anything here is called.

`record_instances` takes a batch, so that a listener can commit many associations' instances at once (a group
commit); two listener processes may record the same study at the same moment.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.dicom import syntaxes
from service.dicom.received import Received, Stored
from service.domain.eligibility import assess_series
from service.domain.facts import InstanceFacts
from service.domain.policy import DEFAULT_POLICY
from service.domain.states import DxaReportState, StudyState
from service.settings import Settings
from service.store.engine import Store
from service.store.tables import ConflictRow, DxaReportRow, InstanceRow, RefusalRow, SeriesRow, StudyRow
from service.store.upsert import insert_missing

Text = TypeVar("Text", str, str | None)

REPORT_CLASSES = frozenset(
    {syntaxes.ENHANCED_SR_STORAGE, syntaxes.COMPREHENSIVE_SR_STORAGE, syntaxes.COMPREHENSIVE_3D_SR_STORAGE}
)


class Door:
    """What the listener is given: two callables that keep what came in, each call one transaction."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._limit = settings.max_instances_per_study

    def commit(self, batch: Sequence[Received]) -> list[Stored]:
        """Record a batch; raises when nothing was committed."""
        with self._store.transaction() as session:
            return record_instances(session, batch, max_instances_per_study=self._limit)

    def refuse(
        self,
        *,
        at: datetime,
        kind: str,
        code: str,
        text: str,
        calling_ae: str | None,
        peer_address: str | None,
        sop_class_uid: str | None,
        status: int | None,
    ) -> None:
        """Record what was turned away."""
        with self._store.transaction() as session:
            record_refusal(
                session,
                at=at,
                kind=kind,
                code=code,
                text=text,
                calling_ae=calling_ae,
                peer_address=peer_address,
                sop_class_uid=sop_class_uid,
                status=status,
            )


def record_instances(session: Session, batch: Sequence[Received], *, max_instances_per_study: int) -> list[Stored]:
    """Record a batch; one answer per instance, in the batch's order. A refused instance leaves no row."""
    intake = _Intake(session, batch, max_instances_per_study)
    intake.claim_series()
    intake.claim_instances()
    intake.lock_studies()
    intake.lock_series()
    intake.sort_out()
    intake.insert()
    intake.touch_studies()
    return [intake.answers[index] for index in range(len(batch))]


def record_refusal(
    session: Session,
    *,
    at: datetime,
    kind: str,
    code: str,
    text: str,
    calling_ae: str | None = None,
    peer_address: str | None = None,
    sop_class_uid: str | None = None,
    status: int | None = None,
) -> None:
    """Keep what was turned away (an association, a context, an instance) so that /intake can show it."""
    session.add(
        RefusalRow(
            at=at,
            kind=_fit(kind, 16),
            code=_fit(code, 40),
            text=_fit(text, 4000),
            calling_ae=_fit(calling_ae, 64),
            peer_address=_fit(peer_address, 64),
            sop_class_uid=_fit(sop_class_uid, 64),
            status=status,
        )
    )


REFUSED = (Stored.SERIES_MISMATCH, Stored.INSTANCE_MISMATCH, Stored.STUDY_FULL)


class _Intake:
    """The steps of recording one batch, in the lock order: studies, series, instances, each sorted."""

    def __init__(self, session: Session, batch: Sequence[Received], limit: int) -> None:
        self.session = session
        self.batch = batch
        self.limit = limit
        self.answers: dict[int, Stored] = {}
        self.studies: dict[str, StudyRow] = {}
        self.series: dict[str, SeriesRow] = {}
        self.made: set[str] = set()  # UIDs of the studies that this batch is the first to bring
        self.new: dict[str, int] = {}  # SOP instance UID -> index in the batch
        self.conflicts: list[Received] = []
        self.contradicted: set[str] = set()  # SOP instance UIDs of which this batch brought bytes never seen before

    def open(self) -> Iterable[tuple[int, Received]]:
        """The instances that have no answer yet."""
        return [(index, item) for index, item in enumerate(self.batch) if index not in self.answers]

    def claim_series(self) -> None:
        """Refuse what names a series of another study, before a study row is made for it."""
        uids = {item.facts.series_uid for item in self.batch}
        known = select(SeriesRow.series_uid, StudyRow.study_uid).join(StudyRow)
        found = self.session.execute(known.where(SeriesRow.series_uid.in_(uids)))
        owner: dict[str, str] = dict(found.all())
        for index, item in enumerate(self.batch):
            if owner.setdefault(item.facts.series_uid, item.facts.study_uid) != item.facts.study_uid:
                self.answers[index] = Stored.SERIES_MISMATCH

    def claim_instances(self) -> None:
        """Refuse what is known under another study: copies of it say nothing of either (PS3.5 9.1, a UID is one)."""
        uids = [item.facts.sop_instance_uid for item in self.batch]
        known = select(InstanceRow.sop_instance_uid, StudyRow.study_uid)
        known = known.join(SeriesRow, InstanceRow.series_id == SeriesRow.id).join(StudyRow)
        owner: dict[str, str] = dict(self.session.execute(known.where(InstanceRow.sop_instance_uid.in_(uids))).all())
        for index, item in self.open():
            if owner.setdefault(item.facts.sop_instance_uid, item.facts.study_uid) != item.facts.study_uid:
                self.answers[index] = Stored.INSTANCE_MISMATCH

    def lock_studies(self) -> None:
        """Make missing study rows; hold every study of the batch until the commit."""
        first: dict[str, Received] = {}
        for _, item in self.open():
            first.setdefault(item.facts.study_uid, item)
        rows = [_study_values(item) for item in first.values()]
        self.made = set(insert_missing(self.session, StudyRow, rows, ["study_uid"]))
        statement = select(StudyRow).where(StudyRow.study_uid.in_(list(first))).order_by(StudyRow.study_uid)
        locked = statement.with_for_update().execution_options(populate_existing=True)
        self.studies = {row.study_uid: row for row in self.session.scalars(locked)}

    def lock_series(self) -> None:
        """Make missing series rows; another process may have claimed a series UID meanwhile."""
        first: dict[str, Received] = {}
        for _, item in self.open():
            first.setdefault(item.facts.series_uid, item)
        rows = [_series_values(item, self.studies[item.facts.study_uid].id) for item in first.values()]
        insert_missing(self.session, SeriesRow, rows, ["series_uid"])
        statement = select(SeriesRow).where(SeriesRow.series_uid.in_(list(first)))
        loaded = self.session.scalars(statement.execution_options(populate_existing=True))
        self.series = {row.series_uid: row for row in loaded}
        for index, item in self.open():
            if self.series[item.facts.series_uid].study_id != self.studies[item.facts.study_uid].id:
                self.answers[index] = Stored.SERIES_MISMATCH

    def sort_out(self) -> None:
        """Known or new, within the study's limit."""
        known = self._known([item.facts.sop_instance_uid for _, item in self.open()])
        counts = self._counts()
        for index, item in self.open():
            uid, study_uid = item.facts.sop_instance_uid, item.facts.study_uid
            if uid in known:
                self._repeated(index, item, known[uid])
            elif counts[study_uid] >= self.limit:
                self.answers[index] = Stored.STUDY_FULL
            else:
                known[uid] = item.sha256
                counts[study_uid] += 1
                self.new[uid] = index
                self.answers[index] = Stored.NEW

    def insert(self) -> None:
        """Insert what is new; a SOP instance that another process inserted first is a repeat after all."""
        rows = [
            _instance_values(self.batch[index], self.series[self.batch[index].facts.series_uid].id)
            for index in self.new.values()
        ]
        inserted = insert_missing(self.session, InstanceRow, rows, ["sop_instance_uid"])
        late = [uid for uid in self.new if uid not in inserted]
        for uid, sha256 in self._known(late).items():
            index = self.new.pop(uid)
            self._repeated(index, self.batch[index], sha256)
        self._promise_to_read()
        rows = [_conflict_values(item) for item in self.conflicts]
        self.contradicted = insert_missing(self.session, ConflictRow, rows, ["sop_instance_uid", "sha256"])

    def _promise_to_read(self) -> None:
        """A report by others may hold a DXA result: the steward reads it, never the door (RULES 2)."""
        uids = [uid for uid, index in self.new.items() if _may_hold_dxa(self.batch[index])]
        if not uids:
            return
        ids = self.session.scalars(select(InstanceRow.id).where(InstanceRow.sop_instance_uid.in_(uids)))
        rows = [{"instance_id": id_, "state": DxaReportState.WAITING.value, "reasons": []} for id_ in sorted(ids)]
        insert_missing(self.session, DxaReportRow, rows, ["instance_id"])

    def touch_studies(self) -> None:
        """Count; a new image or segmentation reopens a closed study (its next close raises the revision).

        So does a copy of a known one with other content, a corrected patient for one: the next close refuses what is
        no longer certain, and what was measured before is superseded in sight.
        A report changes nothing that was measured, and our own output least of all: it does not even keep a
        study from closing.
        """
        for index in self.new.values():
            self.series[self.batch[index].facts.series_uid].instance_count += 1
        contradicting = [item for item in self.conflicts if item.facts.sop_instance_uid in self.contradicted]
        fresh = [*(self.batch[index] for index in self.new.values()), *contradicting]
        grown = {item.facts.study_uid for item in fresh if self._reopens(item)}
        for index, item in enumerate(self.batch):
            study = self.studies.get(item.facts.study_uid)
            if study is None or self.answers[index] in REFUSED:
                continue
            if item.facts.study_uid in grown:
                study.state = StudyState.RECEIVING.value
            if study.state == StudyState.RECEIVING.value and not item.facts.own_output:
                study.last_received_at = max(study.last_received_at, item.received_at)
        self._close_studies_of_our_own()
        self._judge_what_no_close_will()
        self.session.flush()

    def _reopens(self, item: Received) -> bool:
        """Whether a new instance can change the result; one in the measured series always may, whatever it is."""
        if self.series[item.facts.series_uid].chosen:
            return True
        return not (item.facts.own_output or item.facts.sop_class_uid in REPORT_CLASSES)

    def _close_studies_of_our_own(self) -> None:
        """A study of which nothing but our own output came (an archive's move) is not waited for."""
        came: dict[str, list[InstanceFacts]] = {}
        for index in self.new.values():
            came.setdefault(self.batch[index].facts.study_uid, []).append(self.batch[index].facts)
        for uid in self.made & came.keys():
            if all(facts.own_output for facts in came[uid]):
                study = self.studies[uid]
                study.state = StudyState.NOT_SCREENED.value
                study.choice = "Nothing but Osteogate's own reports or segmentations came of this study."
                study.closed_at = study.last_received_at

    def _judge_what_no_close_will(self) -> None:
        """A fresh series in a study that stays closed gets its verdict now; so does our own output, always."""
        came: dict[str, list[InstanceFacts]] = {}
        for index in self.new.values():
            came.setdefault(self.batch[index].facts.series_uid, []).append(self.batch[index].facts)
        for uid, instances in came.items():
            series = self.series[uid]
            closed = self.studies[instances[0].study_uid].state != StudyState.RECEIVING.value
            if series.eligible is not None or not (closed or all(facts.own_output for facts in instances)):
                continue
            verdict = assess_series(instances, DEFAULT_POLICY)  # no threshold plays a part in what an object is
            series.eligible = verdict.eligible
            series.reasons = [reason.as_dict() for reason in verdict.reasons]

    def _repeated(self, index: int, item: Received, sha256: str) -> None:
        if item.sha256 == sha256:
            self.answers[index] = Stored.DUPLICATE
        else:
            self.answers[index] = Stored.CONFLICT
            self.conflicts.append(item)

    def _known(self, sop_uids: Sequence[str]) -> dict[str, str]:
        if not sop_uids:
            return {}
        statement = select(InstanceRow.sop_instance_uid, InstanceRow.sha256)
        found = self.session.execute(statement.where(InstanceRow.sop_instance_uid.in_(sop_uids)))
        return dict(found.all())

    def _counts(self) -> Counter[str]:
        statement = select(StudyRow.study_uid, func.sum(SeriesRow.instance_count)).join(SeriesRow)
        grouped = statement.where(StudyRow.study_uid.in_(list(self.studies))).group_by(StudyRow.study_uid)
        return Counter({uid: int(count) for uid, count in self.session.execute(grouped)})


def _may_hold_dxa(item: Received) -> bool:
    return item.facts.sop_class_uid in REPORT_CLASSES and not item.facts.own_output


def _study_values(item: Received) -> dict[str, Any]:
    facts = item.facts
    return {
        "study_uid": facts.study_uid,
        **patient_values(facts),
        "study_date": _fit(facts.study_date, 8),
        "description": _fit(facts.study_description, 1000),
        "accession_number": _fit(facts.accession_number, 64),
        "synthetic": facts.synthetic,
        "state": StudyState.RECEIVING.value,
        "revision": 0,
        "calling_ae": _fit(item.calling_ae, 16),
        "first_received_at": item.received_at,
        "last_received_at": item.received_at,
    }


def patient_values(facts: InstanceFacts) -> dict[str, Any]:
    """What a study's row tells of its patient, as one instance has it."""
    return {
        "patient_id": _fit(facts.patient_id, 255),
        "patient_name": _fit(facts.patient_name, 1000),
        "patient_sex": _fit(facts.patient_sex, 16),
        "patient_birth_date": _fit(facts.patient_birth_date, 8),
        "patient_age_years": _finite(facts.patient_age_years),
    }


def _series_values(item: Received, study_id: int) -> dict[str, Any]:
    facts = item.facts
    return {
        "study_id": study_id,
        "series_uid": facts.series_uid,
        "modality": _fit(facts.modality, 16),
        "description": _fit(facts.series_description, 1000),
        "number": facts.series_number if _is_int32(facts.series_number) else None,
        "instance_count": 0,
        "reasons": [],
        "cautions": [],
        "chosen": False,
    }


def _instance_values(item: Received, series_id: int) -> dict[str, Any]:
    return {
        "series_id": series_id,
        "sop_instance_uid": item.facts.sop_instance_uid,
        "sha256": item.sha256,
        "path": item.path,
        "size_bytes": item.size_bytes,
        "transfer_syntax_uid": item.facts.transfer_syntax_uid,
        "facts": _plain(item.facts.as_json()),
        "calling_ae": _fit(item.calling_ae, 16),
        "peer_address": _fit(item.peer_address, 64),
        "received_at": item.received_at,
    }


def _conflict_values(item: Received) -> dict[str, Any]:
    return {
        "sop_instance_uid": item.facts.sop_instance_uid,
        "study_uid": item.facts.study_uid,
        "sha256": item.sha256,
        "path": item.path,
        "calling_ae": _fit(item.calling_ae, 16),
        "received_at": item.received_at,
    }


def _fit(value: Text, length: int) -> Text:
    """A text that the column takes: a header may hold NUL, half a surrogate pair or a novel."""
    if value is None:
        return value
    return value.replace("\x00", " ").encode("utf-8", "replace").decode("utf-8")[:length]


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _is_int32(value: int | None) -> bool:
    return value is not None and -(2**31) <= value < 2**31


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON that PostgreSQL takes: a NaN anywhere makes the whole value absent."""
    return {key: None if _has_nan(value) else value for key, value in facts.items()}


def _has_nan(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, list | tuple) and any(_has_nan(part) for part in value)
