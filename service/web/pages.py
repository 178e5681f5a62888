"""The pages: worklist, study, intake. Each route reads, renders, and leaves rules to the workflow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Form, HTTPException, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, RedirectResponse
from fastapi.templating import Jinja2Templates
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from service.domain.access import Right
from service.domain.renumber import mapped, shifted
from service.domain.result import LEVELS
from service.domain.states import DeliveryState, ReferralState, ReportState, StudyState
from service.web import words
from service.web.addresses import worklist_path
from service.web.bands import axes
from service.web.csrf import Forms
from service.web.desk import MAX_ID, NO_STUDY, Desk, Needs, inside, is_refresh, principal
from service.workflow import reading
from service.workflow.reading import Filter, Order, Page, ReportLine, Stage, StudyDetail
from service.workflow.referral import Action, allowed
from service.workflow.watching import Lookout

HERE = Path(__file__).resolve().parent
STATIC = HERE / "static"
OVERLAYS = ("overlay-sagittal.png", "overlay-coronal.png")
PICTURES = frozenset([*(f"crop-{name}.png" for name in LEVELS), *OVERLAYS])
PAGE_SIZE = 50

Item = TypeVar("Item")
RowId = Annotated[int, PathParameter(ge=1, le=MAX_ID)]
PageNumber = Annotated[int, Query(ge=1, le=100_000)]
Words = Annotated[str, Query(max_length=200)]
Who = Annotated[str, Query(pattern="^(all|real|digital)$")]
Sort = Annotated[str, Query(pattern="^-?[a-z-]+$", max_length=20)]

READ, REFER = Depends(Needs(Right.READ)), Depends(Needs(Right.REFER))
OPERATE, AUDIT = Depends(Needs(Right.OPERATE)), Depends(Needs(Right.AUDIT))

# What a row of the worklist offers; the study page offers everything that the workflow allows.
QUICK_STEPS: Mapping[ReferralState, tuple[Action, ...]] = {
    ReferralState.OPEN: (Action.REVIEW, Action.ORDER),
    ReferralState.REVIEWED: (Action.ORDER,),
    ReferralState.ORDERED: (Action.DXA_DONE,),
}


def templates(desk: Desk) -> Jinja2Templates:
    """The templates with everything they may call; undefined names fail, everything is escaped."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        words=words,
        now=desk.clock,
        policy=desk.policy,
        settings=desk.settings,
        max_attempts=desk.settings.max_attempts,
        levels=LEVELS,
        Stage=Stage,
        StudyState=StudyState,
        quick_steps=QUICK_STEPS,
        allowed=allowed,
        outgoing=lambda reports: reading.outgoing(reports, desk.settings.destinations),
    )
    environment.filters["sentence"] = words.sentence
    return Jinja2Templates(env=environment)


class Pages:
    """Renders: every page knows who looks at it, and carries the token that its forms send back."""

    def __init__(self, desk: Desk, forms: Forms) -> None:
        self.forms = forms
        self._templates = templates(desk)

    def render(
        self,
        request: Request,
        name: str,
        context: Mapping[str, Any],
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """One page as a response."""
        nonce = self.forms.nonce(request)
        known = {
            "csrf": self.forms.token(nonce),
            "here": str(request.url.path),
            "me": principal(request),
            "may": lambda right: (found := principal(request)) is not None and found.may(right),
        }
        response = self._templates.TemplateResponse(request, name, {**known, **context}, status, headers)
        self.forms.remember(request, response, nonce)
        return response


def page_router(desk: Desk, pages: Pages, lookout: Lookout) -> APIRouter:
    """All pages of the clinician."""
    router = APIRouter(include_in_schema=False)
    render, forms = pages.render, pages.forms

    @router.get("/", dependencies=[READ])
    def worklist(
        request: Request,
        tab: Stage | None = None,
        q: Words = "",
        patients: Who = "all",
        sort: Sort = "priority",
        page: PageNumber = 1,
    ) -> Response:
        """The worklist; a request of htmx gets the table alone, and is a refresh, not a new view."""
        wanted = worklist_filter(tab, q, patients)
        order, descending = sorting(sort)
        refresh = is_refresh(request)
        with desk.store.reading() as session:
            read = partial(reading.worklist, session, wanted, order=order, descending=descending, size=PAGE_SIZE)
            found = at_most_last(lambda number: read(number=number), page)
            counts = reading.worklist_counts(session, wanted)
        if not refresh:
            with desk.store.transaction() as session:
                desk.note(session, request, "worklist.view", "worklist", tab=tab or "all", q=q)
        chosen = {"tab": tab.value if tab else "", "q": q, "patients": patients, "sort": sort}
        context = {
            "page": found,
            "counts": counts,
            "total": sum(counts.values()),
            "chosen": chosen,
            "link": lambda **changes: link("/", {**chosen, **changes}),
            "export": link("/worklist.csv", chosen),
        }
        return render(request, "worklist_table.html" if refresh else "worklist.html", context)

    @router.get("/studies/{study_uid}", dependencies=[READ])
    def study(request: Request, study_uid: str) -> Response:
        """One study: the decision and why, values, pictures, provenance, every series."""
        if is_refresh(request):  # a refresh while work goes on
            with desk.store.reading() as session:
                detail = reading.study(session, study_uid)
        else:
            detail = desk.study(request, study_uid, seen_as="study.view")
        if detail is None:
            raise HTTPException(404, NO_STUDY)
        return render(request, "study.html", study_context(detail, desk))

    @router.get("/studies/{study_uid}/results/{result_id}", dependencies=[READ])
    def result(request: Request, study_uid: str, result_id: RowId) -> Response:
        """One study as an earlier result had it; the one in force has the study's own address."""
        detail = desk.study(request, study_uid, seen_as="result.view", result_id=result_id)
        if detail.earlier is None:
            return RedirectResponse(f"/studies/{study_uid}", 303)
        return render(request, "study.html", study_context(detail, desk))

    @router.get("/studies/{study_uid}/pictures/{result_id}/{name}", dependencies=[READ])
    def picture(request: Request, study_uid: str, result_id: RowId, name: str) -> Response:
        """One of the known pictures of a result, and nothing else from the disk; who sees it stands in the audit."""
        if name not in PICTURES:
            raise HTTPException(404, "No such picture.")
        with desk.store.reading() as session:
            folder = reading.result_folder(session, study_uid, result_id)
        path = picture_path(desk.settings.results_dir, folder, name)
        if path is None:
            raise HTTPException(404, "No such picture.")
        desk.picture_seen(request, study_uid, result_id, name)
        return FileResponse(path, media_type="image/png")

    @router.post("/studies/{study_uid}/referral", dependencies=[REFER])
    def act(
        request: Request,
        study_uid: str,
        action: Annotated[Action, Form()],
        reason: Annotated[str, Form(max_length=1000)] = "",
        back: Annotated[str, Form(max_length=4000)] = "",
        csrf: Annotated[str, Form(max_length=100)] = "",
    ) -> Response:
        """A step of the referral loop, then back to where the button was: the study, or the worklist as it stood."""
        forms.check(request, csrf)
        desk.act(request, study_uid, action, reason.strip() or None)
        return RedirectResponse(worklist_path(back) if back else f"/studies/{study_uid}", 303)

    @router.post("/studies/{study_uid}/rerun", dependencies=[OPERATE])
    def rerun(request: Request, study_uid: str, csrf: Annotated[str, Form(max_length=100)] = "") -> Response:
        """Try a quarantined study again."""
        forms.check(request, csrf)
        desk.rerun(request, study_uid)
        return RedirectResponse(f"/studies/{study_uid}", 303)

    @router.post("/studies/{study_uid}/renumber", dependencies=[REFER])
    def renumber(
        request: Request,
        study_uid: str,
        names: Annotated[str, Form(pattern="^(alternative|-?[0-2])$")],
        reason: Annotated[str, Form(max_length=1000)] = "",
        csrf: Annotated[str, Form(max_length=100)] = "",
    ) -> Response:
        """Measure the study again under other names of its levels."""
        forms.check(request, csrf)
        if not reason.strip():
            raise HTTPException(422, "Say why the levels are renumbered.")
        levels = _alternative(desk, study_uid) if names == "alternative" else shifted(int(names))
        desk.renumber(request, study_uid, levels, reason)
        return RedirectResponse(f"/studies/{study_uid}", 303)

    @router.post("/deliveries/{delivery_id}/resend", dependencies=[OPERATE])
    def resend(request: Request, delivery_id: RowId, csrf: Annotated[str, Form(max_length=100)] = "") -> Response:
        """Send one object to its destination again."""
        forms.check(request, csrf)
        return _back_to_sent(desk.resend(request, delivery_id))

    @router.post("/reports/{report_id}/send", dependencies=[OPERATE])
    def send(
        request: Request,
        report_id: RowId,
        destination: Annotated[str, Form(max_length=64)],
        csrf: Annotated[str, Form(max_length=100)] = "",
    ) -> Response:
        """Send one object to a destination that was configured after it was made."""
        forms.check(request, csrf)
        study_uid, _ = desk.send(request, report_id, destination)
        return _back_to_sent(study_uid)

    @router.post("/reports/{report_id}/remake", dependencies=[OPERATE])
    def remake(request: Request, report_id: RowId, csrf: Annotated[str, Form(max_length=100)] = "") -> Response:
        """Try to make an object that could not be made."""
        forms.check(request, csrf)
        return _back_to_sent(desk.remake(request, report_id))

    @router.post("/outbox/{destination}/retry", dependencies=[OPERATE])
    def retry(request: Request, destination: str, csrf: Annotated[str, Form(max_length=100)] = "") -> Response:
        """Try everything that waits for a destination now."""
        forms.check(request, csrf)
        desk.retry(request, destination)
        return RedirectResponse("/intake", 303)

    @router.get("/intake", dependencies=[READ])
    def intake(
        request: Request,
        q: Words = "",
        page: PageNumber = 1,
    ) -> Response:
        """Every study and series with its verdict, and everything that was turned away."""
        refresh = is_refresh(request)
        text = q.strip() or None
        with desk.store.reading() as session:
            context = {
                "page": at_most_last(lambda number: reading.intake(session, words=text, number=number), page),
                "outbox": reading.outbox(session, desk.settings.destinations),
                "refusals": reading.refusals(session, words=text),
                "conflicts": reading.conflicts(session, words=text),
                "alerts": lookout.alerts(session),
                "q": q,
                "link": lambda **changes: link("/intake", {"q": q, **changes}),
            }
        if not refresh:
            with desk.store.transaction() as session:
                desk.note(session, request, "intake.view", "intake", q=q)
        return render(request, "intake_table.html" if refresh else "intake.html", context)

    @router.get("/audit", dependencies=[AUDIT])
    def audit(
        request: Request,
        subject: Annotated[str, Query(max_length=128)] = "",
        page: PageNumber = 1,
    ) -> Response:
        """Who looked at, took out or changed what, the latest first."""
        about = subject.strip() or None
        with desk.store.transaction() as session:
            read = partial(reading.audit, session, subject=about, size=PAGE_SIZE)
            found = at_most_last(lambda number: read(number=number), page)
            desk.note(session, request, "audit.view", "audit", about=about)
        context = {
            "page": found,
            "subject": subject,
            "link": lambda **changes: link("/audit", {"subject": subject, **changes}),
        }
        return render(request, "audit.html", context)

    return router


def _alternative(desk: Desk, study_uid: str) -> dict[str, str]:
    """The names that the result in force offers."""
    with desk.store.reading() as session:
        detail = reading.study(session, study_uid)
    document = None if detail is None else detail.document
    offered = None if document is None else document["anatomy"].get("alternative")
    if offered is None:
        raise HTTPException(409, "The result offers no other names any more.")
    return mapped(offered)


def _back_to_sent(study_uid: str) -> Response:
    return RedirectResponse(f"/studies/{study_uid}#sent", 303)


def worklist_filter(tab: Stage | None, q: str, patients: str) -> Filter:
    """What the worklist and its export show."""
    return Filter(stage=tab, synthetic={"real": False, "digital": True}.get(patients), text=q.strip() or None)


def at_most_last(read: Callable[[int], Page[Item]], number: int) -> Page[Item]:
    """This page, or the last one where the list has become shorter: it must not seem to be empty."""
    found = read(number)
    return read(found.last) if number > found.last else found


def sorting(sort: str) -> tuple[Order, bool]:
    """ "-bmd" -> (BMD, descending); 422 for an unknown order."""
    try:
        return Order(sort.removeprefix("-")), sort.startswith("-")
    except ValueError:
        known = ", ".join(order.value for order in Order)
        raise HTTPException(422, f"Unknown sort; known are {known}, each also with a leading minus.") from None


def link(path: str, query: Mapping[str, Any]) -> str:
    """A link of this page with other filters; what is at its default is left out."""
    defaults = {"tab": "", "q": "", "subject": "", "patient": "", "patients": "all", "sort": "priority", "page": 1}
    told = {key: value for key, value in query.items() if value != defaults.get(key)}
    return f"{path}?{urlencode(told)}" if told else path


def picture_path(results_dir: Path, folder: str | None, name: str) -> Path | None:
    """Where a picture lies; None where there is none, or where the folder leads out of the results."""
    return None if folder is None else inside(results_dir, f"{folder}/{name}")


def study_context(detail: StudyDetail, desk: Desk) -> dict[str, Any]:
    """What the study page shows."""
    result = detail.result
    shown: list[str] = []
    if result is not None:
        root = desk.settings.results_dir
        shown = [name for name in sorted(PICTURES) if picture_path(root, result.artefacts, name)]
    return {
        "detail": detail,
        "entry": detail.entry,
        "intake": detail.intake,
        "result": result,
        "document": detail.document,
        "axes": axes(result.document, desk.policy.referral) if result is not None else [],
        "supplied": result.supplied if result is not None else None,
        "sent": sent_context(detail, desk),
        "crops": [name for name in shown if name.startswith("crop-")],
        "overlays": [name for name in OVERLAYS if name in shown],
    }


def sent_context(detail: StudyDetail, desk: Desk) -> dict[str, Any]:
    """What the panel "Sent to" shows: the objects of the result, and those of the results that it replaced."""
    result, destinations = detail.result, desk.settings.destinations
    reports = result.reports if result is not None else ()
    older = () if detail.earlier else tuple(line for line in detail.results if line is not result and line.reports)
    everything = [*reports, *(one for line in older for one in line.reports)]
    return {
        "reports": reports,
        "older": older,
        "moving": any(_moving(report) for report in everything),
        "destinations": destinations,
        "addresses": {report.id: reading.addresses(report, destinations) for report in everything},
    }


def _moving(report: ReportLine) -> bool:
    """Whether the panel will change by itself."""
    unfinished = (delivery.state is not DeliveryState.DELIVERED for delivery in report.deliveries)
    return report.state is ReportState.WAITING or any(unfinished)
