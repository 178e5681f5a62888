"""Pairs of CT and DXA, as a query: no table of pairs needs keeping in step with what comes in and what is remeasured.

A DXA that was made on the day of the CT or after it closes the referral: it is the one that was asked for, whether or
not it is the one that the CT is compared with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session, selectinload

from service.domain.dxa import Validity, manufacturer_named
from service.domain.pairing import Ct, Dxa, Pair, Unpaired, answered, cut_ids, pair, tally
from service.domain.policy import PairingPolicy
from service.domain.reasons import Code
from service.domain.result import LEVELS, Numbering
from service.store.tables import DxaScanRow, InstanceRow, ReferralRow, ResultRow, SeriesRow, StudyRow
from service.workflow import referral, report_verdicts
from service.workflow.people import By

_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Overview:
    """Every pair, every CT that stays alone, and the counts."""

    pairs: tuple[Pair, ...]
    unpaired: tuple[Unpaired, ...]  # of patients who have a DXA result; the others are counted in `why`
    unused: tuple[Dxa, ...]
    why: Mapping[Code, int]
    window_days: int
    cut_ids: tuple[tuple[str, str], ...] = ()  # of a DXA result without any CT, and of a CT: apart by leading zeros

    @property
    def vertebrae(self) -> int:
        """Levels that count on both sides, of all pairs together."""
        return sum(len(one.levels) for one in self.pairs)

    @property
    def synthetic(self) -> int:
        """Pairs of digital patients: nothing about people is learned from them."""
        return sum(one.ct.synthetic for one in self.pairs)


def overview(session: Session, policy: PairingPolicy) -> Overview:
    """All that is stored, paired."""
    with_dxa = select(DxaScanRow.patient_id).distinct()
    cts, results = _stored(session, list(session.scalars(with_dxa)))
    found = pair(cts, results, policy.window_days, policy.densitometer)
    without = select(func.count()).select_from(StudyRow).where(~report_verdicts.only_reports)
    alone = session.scalar(without.where(or_(StudyRow.patient_id.is_(None), StudyRow.patient_id.not_in(with_dxa)))) or 0
    why = dict(tally(found))
    if alone:
        why[Code.PAIR_NO_DXA] = why.get(Code.PAIR_NO_DXA, 0) + alone
    pairs = tuple(sorted(found.pairs, key=lambda one: (one.dxa.scan_date, one.ct.study_uid), reverse=True))
    return Overview(pairs, found.unpaired, found.unused, why, policy.window_days, _cut_ids(session))


def _cut_ids(session: Session) -> tuple[tuple[str, str], ...]:
    known = select(StudyRow.patient_id).where(StudyRow.patient_id.is_not(None)).distinct()
    alone = list(session.scalars(select(DxaScanRow.patient_id).where(DxaScanRow.patient_id.not_in(known)).distinct()))
    return cut_ids(alone, (told for told in session.scalars(known) if told)) if alone else ()


def close_referrals(session: Session, patient_ids: Collection[str], window_days: int, by: By) -> int:
    """Mark the referrals of these patients as done where a DXA followed the CT; how many that were."""
    followed = sorted(answered(*_stored(session, sorted(set(patient_ids))), window_days))
    waiting = {state.value for state, after in referral.MOVES[referral.Action.DXA_DONE].items() if after}
    closed = 0
    for start in range(0, len(followed), _CHUNK):
        wanted = (
            select(StudyRow.study_uid)
            .join(ReferralRow)
            .where(StudyRow.study_uid.in_(followed[start : start + _CHUNK]), ReferralRow.state.in_(waiting))
        )
        for study_uid in session.scalars(wanted.order_by(StudyRow.study_uid)).all():
            referral.act(
                session,
                study_uid,
                referral.Action.DXA_DONE,
                actor=by.actor,
                now=by.now,
                peer_address=by.peer_address,
            )
            closed += 1
    return closed


def _stored(session: Session, patient_ids: list[str]) -> tuple[list[Ct], list[Dxa]]:
    """The CTs and the DXA results of these patients."""
    cts: list[Ct] = []
    results: list[Dxa] = []
    for start in range(0, len(patient_ids), _CHUNK):
        some = patient_ids[start : start + _CHUNK]
        cts += _cts(session, some)
        results += _results(session, some)
    return cts, results


def _cts(session: Session, patient_ids: list[str]) -> list[Ct]:
    in_force = (ResultRow.study_id == StudyRow.id) & ResultRow.superseded.is_(False)
    who = (StudyRow.study_uid, StudyRow.patient_id, StudyRow.patient_sex)
    wanted = select(*who, StudyRow.study_date, StudyRow.synthetic, ResultRow.document)
    wanted = wanted.outerjoin(ResultRow, in_force).where(StudyRow.patient_id.in_(patient_ids))
    wanted = wanted.where(~report_verdicts.only_reports)  # a densitometer's study is no CT
    issuers = _issuers(session, patient_ids)
    latest: dict[str, Ct] = {}
    for study_uid, patient_id, sex, study_date, synthetic, document in session.execute(wanted.order_by(ResultRow.id)):
        told = (_day(study_date), _valid(document), synthetic, sex or "", issuers.get(patient_id, ()))
        latest[study_uid] = Ct(study_uid, patient_id, *told)
    return list(latest.values())


def _issuers(session: Session, patient_ids: list[str]) -> dict[str, tuple[str, ...]]:
    """Who has given a patient ID, of those that more than one issuer gave; an unnamed issuer contradicts none."""
    issuer = InstanceRow.facts["issuer_of_patient_id"].as_string()
    own = select(SeriesRow.id).join(StudyRow).where(StudyRow.patient_id.in_(patient_ids))
    first = select(func.min(InstanceRow.id)).where(InstanceRow.series_id.in_(own)).group_by(InstanceRow.series_id)
    wanted = (
        select(StudyRow.patient_id, issuer)
        .join(SeriesRow, SeriesRow.study_id == StudyRow.id)
        .join(InstanceRow, InstanceRow.series_id == SeriesRow.id)
        .where(InstanceRow.id.in_(first), issuer.is_not(None))
        .distinct()
    )
    found: dict[str, set[str]] = {}
    for patient_id, told in session.execute(wanted):
        if told.strip():
            found.setdefault(patient_id, set()).add(told.strip())
    return {patient_id: tuple(sorted(some)) for patient_id, some in found.items() if len(some) > 1}


def _results(session: Session, patient_ids: list[str]) -> list[Dxa]:
    wanted = select(DxaScanRow).where(DxaScanRow.patient_id.in_(patient_ids)).options(selectinload(DxaScanRow.levels))
    return [_result(row) for row in session.scalars(wanted.order_by(DxaScanRow.id))]


def _result(row: DxaScanRow) -> Dxa:
    figures = {
        one.level: (one.bmd_g_cm2, one.tbs)
        for one in row.levels
        if one.validity == Validity.VALID.value and one.bmd_g_cm2 is not None
    }
    who = (row.id, row.patient_id, row.scan_date, frozenset(figures), row.synthetic)
    return Dxa(*who, row.sex, manufacturer_named(row.manufacturer), figures)


def _valid(document: Mapping[str, Any] | None) -> frozenset[str]:
    """The levels that count; none where it is not certain which they are, for they would stand beside another's DXA."""
    told = document or {}
    if (told.get("anatomy") or {}).get("numbering") == Numbering.UNCERTAIN:
        return frozenset()
    levels = told.get("levels") or {}
    return frozenset(name for name in LEVELS if (levels.get(name) or {}).get("valid"))


def _day(told: str | None) -> date | None:
    """A DICOM DA."""
    try:
        return None if told is None else datetime.strptime(told, "%Y%m%d").date()
    except ValueError:
        return None
