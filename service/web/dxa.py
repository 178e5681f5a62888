"""The page of DXA results: what is stored, what came in, and the form that takes a file."""

from __future__ import annotations

from datetime import date
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Form, HTTPException, Query, Request, Response, UploadFile

from service.domain.access import Right
from service.domain.dxa_csv import Defaults
from service.web.desk import Desk, Needs, by
from service.web.pages import PAGE_SIZE, PageNumber, Pages, at_most_last, link
from service.workflow import dxa, dxa_reports, pairing, performance
from service.workflow.dxa import OnRefusal

ASKED = (
    "manufacturer",
    "model",
    "scan_date",
    "date_format",
    "synthetic",
    "skip",
    "name",
)  # what the form asks beside the file
SHOWN_REFUSALS = 200
SHOWN_PAIRS = 200
Word = Annotated[str, Form(max_length=64)]


def dxa_page_router(desk: Desk, pages: Pages) -> APIRouter:
    """The page, and the form's answer."""
    router = APIRouter(include_in_schema=False)

    def page(request: Request, patient: str, number: int, report: dxa.Report | None, told: dict[str, Any]) -> Response:
        with desk.store.transaction() as session:
            read = partial(dxa.scans, session, patient_id=patient.strip() or None, size=PAGE_SIZE)
            found = at_most_last(lambda asked: read(number=asked), number)
            context = {
                "page": found,
                "imports": dxa.imports(session),
                "reports": dxa_reports.lines(session),
                "patient": patient,
                "report": report,
                "refused": report.refused[:SHOWN_REFUSALS] if report else (),
                "told": told,
                "link": lambda **changes: link("/dxa", {"patient": patient, **changes}),
            }
            desk.note(session, request, "dxa.view", "dxa", rows=len(found.items), patient_id=patient)
        failed = report is not None and not report.imported
        return pages.render(request, "dxa.html", context, 422 if failed else 200)

    @router.get("/dxa", dependencies=[Depends(Needs(Right.READ))])
    def show(
        request: Request,
        patient: Annotated[str, Query(max_length=64)] = "",
        page_number: Annotated[PageNumber, Query(alias="page")] = 1,
    ) -> Response:
        """The stored results, the latest scan first."""
        return page(request, patient, page_number, None, dict.fromkeys(ASKED, ""))

    @router.post("/dxa", dependencies=[Depends(Needs(Right.DXA))])
    def take(
        request: Request,
        file: Annotated[UploadFile, File()],
        manufacturer: Word = "",
        model: Word = "",
        scan_date: Word = "",
        date_format: Word = "",
        synthetic: Word = "",
        skip: Word = "",
        csrf: Annotated[str, Form(max_length=100)] = "",
    ) -> Response:
        """Take a file; what was refused of it is told by line."""
        pages.forms.check(request, csrf)
        told = dict(
            zip(ASKED, (manufacturer, model, scan_date, date_format, synthetic, skip, file.filename or ""), strict=True)
        )
        day = _day(scan_date)
        defaults = Defaults(manufacturer.strip(), model.strip(), day, date_format.strip(), bool(synthetic))
        with desk.store.transaction() as session:
            report = dxa.import_csv(
                session,
                _text(file.file.read()),
                defaults,
                by(request, desk.clock),
                window_days=desk.policy.pairing.window_days,
                on_refusal=OnRefusal.SKIP if skip else OnRefusal.STOP,
                name=(file.filename or "")[:255] or None,
            )
        return page(request, "", 1, report, told)

    @router.get("/pairing", dependencies=[Depends(Needs(Right.READ))])
    def pairs(request: Request) -> Response:
        """Which CT has which DXA result, and why others have none."""
        with desk.store.transaction() as session:
            found = pairing.overview(session, desk.policy.pairing)
            reminder = performance.reminder(session, desk.policy)
            desk.note(session, request, "pairing.view", "dxa", pairs=len(found.pairs))
        return pages.render(request, "pairing.html", {"found": found, "most": SHOWN_PAIRS, "reminder": reminder})

    return router


def _day(told: str) -> date | None:
    try:
        return date.fromisoformat(told) if told else None
    except ValueError:
        raise HTTPException(422, "The date is needed as year-month-day.") from None


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise HTTPException(422, "The file is not UTF-8: save it as CSV UTF-8.") from None
