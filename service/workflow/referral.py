"""What people do with a referral: a table of allowed moves, each one audited in the same transaction."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.domain.errors import OsteogateError
from service.domain.states import ReferralState
from service.store.tables import AuditRow, ReferralRow
from service.workflow import locks


class Action(StrEnum):
    """What a person can do with a referral."""

    REVIEW = "review"
    ORDER = "order"
    DISMISS = "dismiss"
    REOPEN = "reopen"
    DXA_DONE = "dxa-done"


_OPEN, _REVIEWED, _ORDERED = ReferralState.OPEN, ReferralState.REVIEWED, ReferralState.ORDERED
_DONE, _DISMISSED = ReferralState.DXA_DONE, ReferralState.DISMISSED

# action -> {state it may start from: state it leads to}
MOVES: Mapping[Action, Mapping[ReferralState, ReferralState]] = {
    Action.REVIEW: {_OPEN: _REVIEWED},
    Action.ORDER: {_OPEN: _ORDERED, _REVIEWED: _ORDERED},
    Action.DISMISS: {_OPEN: _DISMISSED, _REVIEWED: _DISMISSED, _ORDERED: _DISMISSED},
    Action.REOPEN: {_REVIEWED: _OPEN, _ORDERED: _OPEN, _DONE: _OPEN, _DISMISSED: _OPEN},
    Action.DXA_DONE: {_OPEN: _DONE, _REVIEWED: _DONE, _ORDERED: _DONE},
}


class ReferralError(OsteogateError):
    """A referral action that cannot be done; the message is for people."""


class NoReferral(ReferralError):
    """The study is unknown or has no referral."""


class NotAllowed(ReferralError):
    """The referral's state does not allow this action."""


class ReasonRequired(ReferralError):
    """A dismissal needs its reason."""


def act(
    session: Session,
    study_uid: str,
    action: Action | str,
    *,
    reason: str | None = None,
    actor: str,
    now: datetime,
    peer_address: str | None = None,
) -> ReferralState:
    """Do one action on a study's referral and return its new state; change and audit row go together."""
    action = Action(action)
    reason = (reason or "").strip() or None
    if action is Action.DISMISS and reason is None:
        raise ReasonRequired("say why the referral is dismissed")
    study = locks.study(session, study_uid)
    statement = select(ReferralRow).where(ReferralRow.study_id == (study.id if study else 0))
    referral = session.scalars(statement.execution_options(populate_existing=True)).one_or_none()
    if referral is None:
        raise NoReferral("this study has no referral")
    before = ReferralState(referral.state)
    after = MOVES[action].get(before)
    if after is None:
        raise NotAllowed(_why_not(action, before, referral.changed_by))
    referral.state = after.value
    referral.reason = reason if action is Action.DISMISS else None
    referral.changed_at = now
    referral.changed_by = actor
    session.add(
        AuditRow(
            at=now,
            actor=actor,
            action=f"referral.{action.value}",
            subject=study_uid,
            detail={"from": before.value, "to": after.value, "reason": reason},
            peer_address=peer_address,
        )
    )
    session.flush()
    return after


_NOW = {
    _OPEN: "is open",
    _REVIEWED: "is marked reviewed",
    _ORDERED: "is marked as ordered",
    _DONE: "is marked as done",
    _DISMISSED: "is dismissed",
}


def _why_not(action: Action, state: ReferralState, by: str) -> str:
    """In words, for the person whose colleague (or second press) was there before."""
    if state in MOVES[action].values():
        return f"this referral {_NOW[state]} already (by {by})"
    return f"this referral {_NOW[state]} by now (by {by}), and this step does not follow from there"


def allowed(state: ReferralState) -> tuple[Action, ...]:
    """The actions that a referral in this state offers."""
    return tuple(action for action, moves in MOVES.items() if state in moves)
