"""Pairs of CT and DXA, as a query: no table of pairs needs keeping in step with what comes in and what is remeasured.

A pair closes the referral loop: a DXA that was made on the day of the CT or after it is the one that was asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session, selectinload

from service.domain.dxa import Validity
from service.domain.pairing import Ct, Dxa, Pair, Pairing, Unpaired, pair, tally
from service.domain.reasons import Code
from service.domain.result import LEVELS, Numbering
from service.store.tables import DxaScanRow, ReferralRow, ResultRow, StudyRow
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

    @property
    def vertebrae(self) -> int:
        """Levels that count on both sides, of all pairs together."""
        return sum(len(one.levels) for one in self.pairs)

    @property
    def synthetic(self) -> int:
        """Pairs of digital patients: nothing about people is learned from them."""
        return sum(one.ct.synthetic for one in self.pairs)


def overview(session: Session, window_days: int) -> Overview:
    """All that is stored, paired."""
    with_dxa = select(DxaScanRow.patient_id).distinct()
    found = _pairing(session, list(session.scalars(with_dxa)), window_days)
    without = select(func.count()).select_from(StudyRow).where(~report_verdicts.only_reports)
    alone = session.scalar(without.where(or_(StudyRow.patient_id.is_(None), StudyRow.patient_id.not_in(with_dxa)))) or 0
    why = dict(tally(found))
    if alone:
        why[Code.PAIR_NO_DXA] = why.get(Code.PAIR_NO_DXA, 0) + alone
    pairs = tuple(sorted(found.pairs, key=lambda one: (one.dxa.scan_date, one.ct.study_uid), reverse=True))
    return Overview(pairs, found.unpaired, found.unused, why, window_days)


def close_referrals(session: Session, patient_ids: Collection[str], window_days: int, by: By) -> int:
    """Mark the referrals of these patients as done where a paired DXA followed the CT; how many that were."""
    found = _pairing(session, sorted(set(patient_ids)), window_days)
    followed = sorted(one.ct.study_uid for one in found.pairs if one.days >= 0)
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


def _pairing(session: Session, patient_ids: list[str], window_days: int) -> Pairing:
    cts: list[Ct] = []
    results: list[Dxa] = []
    for start in range(0, len(patient_ids), _CHUNK):
        some = patient_ids[start : start + _CHUNK]
        cts += _cts(session, some)
        results += _results(session, some)
    return pair(cts, results, window_days)


def _cts(session: Session, patient_ids: list[str]) -> list[Ct]:
    in_force = (ResultRow.study_id == StudyRow.id) & ResultRow.superseded.is_(False)
    columns = (StudyRow.study_uid, StudyRow.patient_id, StudyRow.study_date, StudyRow.synthetic, ResultRow.document)
    wanted = select(*columns).outerjoin(ResultRow, in_force).where(StudyRow.patient_id.in_(patient_ids))
    wanted = wanted.where(~report_verdicts.only_reports)  # a densitometer's study is no CT
    latest: dict[str, Ct] = {}
    for study_uid, patient_id, study_date, synthetic, document in session.execute(wanted.order_by(ResultRow.id)):
        latest[study_uid] = Ct(study_uid, patient_id, _day(study_date), _valid(document), synthetic)
    return list(latest.values())


def _results(session: Session, patient_ids: list[str]) -> list[Dxa]:
    wanted = select(DxaScanRow).where(DxaScanRow.patient_id.in_(patient_ids)).options(selectinload(DxaScanRow.levels))
    return [
        Dxa(
            row.id,
            row.patient_id,
            row.scan_date,
            frozenset(
                one.level for one in row.levels if one.validity == Validity.VALID.value and one.bmd_g_cm2 is not None
            ),
            row.synthetic,
        )
        for row in session.scalars(wanted.order_by(DxaScanRow.id))
    ]


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
