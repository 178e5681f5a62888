"""What every route of pages and API works with: settings, store, policy and the clock, joined once."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import HTTPException, Request
from sqlalchemy.orm import Session

from service.domain.policy import Policy
from service.settings import Settings
from service.store.engine import Store
from service.workflow import reading, referral, rerun
from service.workflow.clock import Clock, utc_now

NO_STUDY = "There is no such study."
ACTOR = "local"  # until users exist, whoever sits at this machine


@dataclass(frozen=True, slots=True)
class Desk:
    """The dependencies of every route; nothing is global."""

    settings: Settings
    store: Store
    policy: Policy
    clock: Clock = utc_now

    def note(self, session: Session, request: Request, action: str, subject: str, **detail: Any) -> None:
        """Write that this request looked at, or took out, `subject`."""
        reading.note(
            session,
            at=self.clock(),
            actor=ACTOR,
            action=action,
            subject=subject,
            detail=detail,
            peer_address=peer_address(request),
        )

    def study(self, request: Request, study_uid: str, *, seen_as: str) -> reading.StudyDetail:
        """One study, its view audited; 404 where there is none."""
        with self.store.transaction() as session:
            detail = reading.study(session, study_uid)
            if detail is None:
                raise HTTPException(404, NO_STUDY)
            self.note(session, request, seen_as, study_uid, revision=detail.intake.revision)
        return detail

    def act(self, request: Request, study_uid: str, action: str, reason: str | None) -> None:
        """Move the referral of a study on; an illegal move raises a `ReferralError`."""
        if action == referral.Action.DISMISS and not reason:
            raise HTTPException(422, "Say why the referral is dismissed.")
        with self.store.transaction() as session:
            if not reading.knows(session, study_uid):
                raise HTTPException(404, NO_STUDY)
            referral.act(
                session,
                study_uid,
                action,
                reason=reason,
                actor=ACTOR,
                now=self.clock(),
                peer_address=peer_address(request),
            )

    def rerun(self, request: Request, study_uid: str) -> None:
        """Queue a study's work again; `NotRerunnable` says why not."""
        with self.store.transaction() as session:
            if not reading.knows(session, study_uid):
                raise HTTPException(404, NO_STUDY)
            rerun.rerun(session, study_uid, actor=ACTOR, now=self.clock(), peer_address=peer_address(request))


def software() -> str:
    """Name and version of this program, as results carry it."""
    try:
        return f"osteogate {version('osteogate')}"
    except PackageNotFoundError:  # a checkout that was never installed
        return "osteogate"


def peer_address(request: Request) -> str | None:
    """Where the request came from."""
    return request.client.host if request.client else None
