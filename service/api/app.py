"""The web application, joined in one place."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles

from service.api import problems
from service.api.guard import Guard
from service.api.operations import operations_router
from service.api.password import Gate
from service.api.routes import CSV_ROWS, api_router, csv_response
from service.domain.policy import Policy
from service.settings import Settings
from service.store.engine import Store
from service.web.csrf import Forms
from service.web.desk import ACTOR, Desk, software
from service.web.pages import STATIC, page_router, templates
from service.workflow import reading
from service.workflow.clock import Clock, utc_now

SUMMARY = "Opportunistic osteoporosis screening. Investigational. Not a medical device. Confirm with DXA."


def create_app(settings: Settings, store: Store, policy: Policy, *, clock: Clock = utc_now) -> FastAPI:
    """Pages and API of one installation; opens nothing until the first request."""
    desk = Desk(settings, store, policy, clock)
    pages = templates(desk)
    app = FastAPI(
        title="Osteogate",
        summary=SUMMARY,
        version=software().removeprefix("osteogate").strip() or "0",
        openapi_url="/api/openapi.json",
        docs_url=None,  # FastAPI's own page loads from a CDN; ours is vendored
        redoc_url=None,
    )
    app.include_router(api_router(desk))
    app.include_router(operations_router(desk))
    app.include_router(page_router(desk, Forms()))

    @app.get("/api/docs", include_in_schema=False)
    def docs(request: Request) -> Response:
        """The OpenAPI document, readable, from files of our own."""
        return pages.TemplateResponse(request, "docs.html", {"here": "/api/docs"})

    @app.get("/worklist.csv", include_in_schema=False)
    def export(request: Request) -> Response:
        """The whole worklist for a spreadsheet."""
        with store.transaction() as session:
            found = reading.worklist(session, reading.Filter(), size=CSV_ROWS)
            desk.note(session, request, "worklist.export", "worklist", rows=len(found.items))
        return csv_response(found.items, byte_order_mark=True)

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    problems.install(app, pages)

    def note(event: str, address: str) -> None:
        with store.transaction() as session:
            reading.note(session, at=clock(), actor=ACTOR, action=event, subject="web", detail={}, peer_address=address)

    gate = Gate(settings.web_password) if settings.web_password is not None else None
    app.add_middleware(Guard, gate=gate, note=note)
    return app
