"""What every route of pages and API works with: settings, store, policy and the clock, joined once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request
from sqlalchemy.orm import Session

from service.domain.access import LOCAL, Principal, Right
from service.domain.policy import Policy
from service.domain.training import Wanted
from service.settings import Settings
from service.store.engine import Store
from service.workflow import delivery, model, reading, referral, renumber, reporting, rerun, training
from service.workflow.clock import Clock, utc_now
from service.workflow.people import By, SessionRules

NO_STUDY = "There is no such study."
NO_RESULT = "There is no such study, or it has no such result."
NO_REPORT = "There is no such report."
NO_DELIVERY = "There is no such delivery."
NO_RUN = "There is no such training run."
MAX_ID = 2**31 - 1  # the largest key of a row on every database
VIEWING = timedelta(minutes=10)  # pictures that are fetched this long after a page was looked at belong to that view
PRINCIPAL_KEY = "osteogate.principal"  # in a request's scope: who asks, None on the few open pages


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
            actor=actor(request),
            action=action,
            subject=subject,
            detail=detail,
            peer_address=peer_address(request),
        )

    def study(
        self, request: Request, study_uid: str, *, seen_as: str, result_id: int | None = None
    ) -> reading.StudyDetail:
        """One study (as one of its results has it), its view audited; 404 where there is none."""
        with self.store.transaction() as session:
            detail = _detail(session, study_uid, result_id)
            self._note_seen(session, request, seen_as, detail)
        return detail

    def document(self, request: Request, study_uid: str, *, result_id: int | None = None) -> Mapping[str, Any]:
        """result.json of a study, its view audited.

        404 where there is none yet, and then no row in the audit: nothing was seen, and whoever waits for a result
        asks often.
        """
        with self.store.transaction() as session:
            detail = _detail(session, study_uid, result_id)
            if detail.document is None:
                raise HTTPException(404, f"No result yet: the study is {detail.intake.state.value}.")
            self._note_seen(session, request, "result.view", detail)
        return detail.document

    def picture_seen(self, request: Request, study_uid: str, result_id: int, name: str) -> None:
        """A picture leaves its line in the audit, unless a view of its study by the same person just did.

        A page with its pictures is one viewing and one line; a picture asked for by itself is one, too.
        """
        since, who, where = self.clock() - VIEWING, actor(request), peer_address(request)
        with self.store.transaction() as session:
            if not reading.seen_since(session, study_uid, since, actor=who, peer_address=where):
                self.note(session, request, reading.PICTURE_VIEW, study_uid, result=result_id, picture=name)

    def act(self, request: Request, study_uid: str, action: str, reason: str | None) -> None:
        """Move the referral of a study on; an illegal move raises a `ReferralError`."""
        if action == referral.Action.DISMISS and not reason:
            raise HTTPException(422, "Say why the referral is dismissed.")
        with self.store.transaction() as session:
            if not reading.knows(session, study_uid):
                raise HTTPException(404, NO_STUDY)
            referral.act(session, study_uid, action, reason=reason, **self._by(request))

    def rerun(self, request: Request, study_uid: str) -> None:
        """Queue a study's work again; `NotRerunnable` says why not."""
        with self.store.transaction() as session:
            if not reading.knows(session, study_uid):
                raise HTTPException(404, NO_STUDY)
            rerun.rerun(session, study_uid, **self._by(request))

    def renumber(self, request: Request, study_uid: str, levels: Mapping[str, str], reason: str) -> None:
        """Have a study measured under other names of its levels; `NotRenumberable` says why not."""
        with self.store.transaction() as session:
            if not reading.knows(session, study_uid):
                raise HTTPException(404, NO_STUDY)
            renumber.renumber(session, study_uid, levels, reason=reason, **self._by(request))

    def resend(self, request: Request, delivery_id: int) -> str:
        """Send one object to its destination again, now; the UID of its study."""
        with self.store.transaction() as session:
            line = reading.delivery(session, delivery_id)
            study_uid = reading.study_of_delivery(session, delivery_id)
            if line is None or study_uid is None:
                raise HTTPException(404, NO_DELIVERY)
            self._require_configured(line.destination)
            delivery.resend(session, delivery_id, **self._by(request))
        return study_uid

    def send(self, request: Request, report_id: int, destination: str) -> tuple[str, int]:
        """Send one object to a destination that it was never addressed to; its study's UID and the delivery's id."""
        with self.store.transaction() as session:
            file = self._report(session, report_id)
            self._require_configured(destination)
            delivery_id = delivery.send_to(session, report_id, destination, **self._by(request))
        return file.study_uid, delivery_id

    def remake(self, request: Request, report_id: int) -> str:
        """Have one object that could not be made tried again; the UID of its study."""
        with self.store.transaction() as session:
            file = self._report(session, report_id)
            reporting.remake(session, report_id, **self._by(request))
        return file.study_uid

    def retry(self, request: Request, destination: str) -> int:
        """Make everything that waits for a destination due now; how many objects that is."""
        self._require_configured(destination)
        with self.store.transaction() as session:
            return delivery.retry_now(session, destination, **self._by(request))

    def report_file(self, request: Request, report_id: int) -> tuple[Path, reading.ReportFile]:
        """Where a made object lies, its export audited; 404 where it does not lie in the results folder."""
        with self.store.transaction() as session:
            file = self._report(session, report_id)
            path = None if file.path is None else inside(self.settings.results_dir, file.path)
            if path is None:
                raise HTTPException(404, "This object has not been made, or its file is gone.")
            detail = {"report": report_id, "kind": file.kind, "sop_instance_uid": file.sop_instance_uid}
            self.note(session, request, "report.export", file.study_uid, **detail)
        return path, file

    def _note_seen(self, session: Session, request: Request, action: str, detail: reading.StudyDetail) -> None:
        shown = detail.earlier.revision if detail.earlier else detail.intake.revision
        self.note(session, request, action, detail.intake.study_uid, revision=shown)

    def train(self, request: Request, wanted: Wanted) -> training.Created:
        """Ask for a training run."""
        with self.store.transaction() as session:
            return training.create(
                session,
                wanted,
                by(request, self.clock),
                policy=self.policy,
                shelf=training.shelf(model.in_force(session, self.settings.models_dir)),
                room=training.room(self.settings),
            )

    def cancel_training(self, request: Request, run_id: int) -> None:
        """Stop a run; `NotChangeable` says why not."""
        self._change_run(training.cancel, request, run_id)

    def resume_training(self, request: Request, run_id: int) -> None:
        """Let a run that stopped go on; `NotChangeable` says why not."""
        change = partial(training.resume, keep_seconds=self.settings.training_keep_seconds)
        self._change_run(change, request, run_id)

    def _change_run(self, change: Callable[[Session, int, By], object], request: Request, run_id: int) -> None:
        try:
            with self.store.transaction() as session:
                change(session, run_id, by(request, self.clock))
        except LookupError:
            raise HTTPException(404, NO_RUN) from None

    def _report(self, session: Session, report_id: int) -> reading.ReportFile:
        found = reading.report_file(session, report_id)
        if found is None:
            raise HTTPException(404, NO_REPORT)
        return found

    def _require_configured(self, destination: str) -> None:
        if destination not in {one.name for one in self.settings.destinations}:
            raise delivery.NotResendable("nothing is sent to a destination that OSTEOGATE_DESTINATIONS does not name")

    def _by(self, request: Request) -> dict[str, Any]:
        return {"actor": actor(request), "now": self.clock(), "peer_address": peer_address(request)}


def _detail(session: Session, study_uid: str, result_id: int | None) -> reading.StudyDetail:
    detail = reading.study(session, study_uid, result_id=result_id)
    if detail is None:
        raise HTTPException(404, NO_STUDY if result_id is None else NO_RESULT)
    return detail


def inside(root: Path, relative: str) -> Path | None:
    """The file under `root`; None where there is none, or where the path leads out of it."""
    folder = root.resolve()
    path = (folder / relative).resolve()
    return path if path.is_relative_to(folder) and path.is_file() else None


def software() -> str:
    """Name and version of this program, as results carry it."""
    try:
        return f"osteogate {version('osteogate')}"
    except PackageNotFoundError:  # a checkout that was never installed
        return "osteogate"


def is_refresh(request: Request) -> bool:
    """Whether a page that a person has open asks by itself; a program has none open, whatever its headers say."""
    found = principal(request)
    return "hx-request" in request.headers and not (found is not None and found.is_key)


def principal(request: Request) -> Principal | None:
    """Who asks; None on the few pages that open to everybody."""
    found = request.scope.get(PRINCIPAL_KEY)
    return found if isinstance(found, Principal) else None


def actor(request: Request) -> str:
    """Who asks, as the audit names them."""
    return (principal(request) or LOCAL).name


def by(request: Request, clock: Clock) -> By:
    """Who asks, now, from where."""
    return By(actor(request), clock(), peer_address(request))


def session_rules(settings: Settings) -> SessionRules:
    """How long a session lives here."""
    return SessionRules(timedelta(seconds=settings.session_idle_seconds), timedelta(seconds=settings.session_seconds))


class RightMissing(HTTPException):
    """Whoever asks lacks a right."""

    def __init__(self, right: Right) -> None:
        super().__init__(403, f"This needs the right {right.value!r}, which your role does not grant.")
        self.right = right


class Needs:
    """A route's dependency: 403 for whoever lacks the right. A test finds it on every route."""

    def __init__(self, right: Right) -> None:
        self.right = right

    def __call__(self, request: Request) -> None:
        """Pass, or 403."""
        found = principal(request)
        if found is None or not found.may(self.right):
            raise RightMissing(self.right)


def peer_address(request: Request) -> str | None:
    """Where the request came from."""
    return request.client.host if request.client else None
