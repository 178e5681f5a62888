"""The web application, joined in one place."""

from __future__ import annotations

from functools import partial
from ipaddress import ip_address

from fastapi import Depends, FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles
from sqlalchemy.exc import SQLAlchemyError

from service.api import problems
from service.api.dxa import dxa_router
from service.api.entrance import Entrance
from service.api.guard import Guard
from service.api.models import models_router
from service.api.operations import operations_router
from service.api.performance import performance_router
from service.api.routes import CSV_ROWS, api_router, csv_response
from service.api.training import training_router
from service.domain.access import NOBODY, Right
from service.domain.errors import ConfigurationError
from service.domain.policy import Policy
from service.settings import Settings
from service.store.engine import Store
from service.web.csrf import Forms
from service.web.desk import Desk, Needs, software
from service.web.dxa import dxa_page_router
from service.web.login import login_router
from service.web.models import models_page_router
from service.web.pages import STATIC, Pages, Sort, Who, Words, page_router, sorting, worklist_filter
from service.web.performance import performance_page_router
from service.web.training import training_page_router
from service.web.tries import Pace
from service.workflow import people, reading
from service.workflow.clock import Clock, utc_now
from service.workflow.watching import Lookout

SUMMARY = "Opportunistic osteoporosis screening. Investigational. Not a medical device. Confirm with DXA."


def create_app(settings: Settings, store: Store, policy: Policy, *, clock: Clock = utc_now) -> FastAPI:
    """Pages and API of one installation; opens nothing until the first request."""
    desk = Desk(settings, store, policy, clock)
    pages, lookout = Pages(desk, Forms()), Lookout(policy.monitoring)
    app = FastAPI(
        title="Osteogate",
        summary=SUMMARY,
        version=software().removeprefix("osteogate").strip() or "0",
        openapi_url="/api/openapi.json",
        docs_url=None,  # FastAPI's own page loads from a CDN; ours is vendored
        redoc_url=None,
    )
    app.include_router(api_router(desk))
    app.include_router(dxa_router(desk))
    app.include_router(models_router(desk))
    app.include_router(training_router(desk))
    app.include_router(operations_router(desk, lookout))
    app.include_router(performance_router(desk, lookout))
    app.include_router(page_router(desk, pages, lookout))
    app.include_router(dxa_page_router(desk, pages))
    app.include_router(models_page_router(desk, pages))
    app.include_router(performance_page_router(desk, pages, lookout))
    app.include_router(training_page_router(desk, pages))
    app.include_router(login_router(desk, pages))

    @app.get("/api/docs", include_in_schema=False, dependencies=[Depends(Needs(Right.READ))])
    def docs(request: Request) -> Response:
        """The OpenAPI document, readable, from files of our own."""
        return pages.render(request, "docs.html", {})

    @app.get("/worklist.csv", include_in_schema=False, dependencies=[Depends(Needs(Right.READ))])
    def export(
        request: Request,
        tab: reading.Stage | None = None,
        q: Words = "",
        patients: Who = "all",
        sort: Sort = "priority",
    ) -> Response:
        """The worklist for a spreadsheet, as the page shows it: the same filter, the same order, every page."""
        wanted, (order, descending) = worklist_filter(tab, q, patients), sorting(sort)
        with store.transaction() as session:
            found = reading.worklist(session, wanted, order=order, descending=descending, size=CSV_ROWS)
            shown = {"tab": tab.value if tab else "all", "q": q, "patients": patients}
            desk.note(session, request, "worklist.export", "worklist", rows=len(found.items), **shown)
        return csv_response(found.items, byte_order_mark=True)

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    problems.install(app, pages)

    def note(event: str, address: str) -> None:
        with store.transaction() as session:
            reading.note(
                session, at=clock(), actor=NOBODY, action=event, subject="web", detail={}, peer_address=address
            )

    app.add_middleware(
        Guard,
        entrance=Entrance(settings, store, clock),
        pace=Pace(settings.web_requests_per_minute),
        note=note,
        page=partial(problems.error_page, pages),
    )
    return app


def require_lock(settings: Settings, store: Store) -> None:
    """Without users and without a password the pages bind to loopback only.

    Raises:
        ConfigurationError: they would be open to the network.
    """
    if settings.web_password is not None or ip_address(settings.web_host).is_loopback:
        return
    try:
        with store.reading() as session:
            if people.anyone(session):
                return
    except SQLAlchemyError as error:
        raise ConfigurationError("the database does not answer, or is not migrated (`osteogate db upgrade`)") from error
    raise ConfigurationError(
        "OSTEOGATE_WEB_HOST must be a loopback address until there is a user (`osteogate user add`), or "
        "OSTEOGATE_WEB_PASSWORD_FILE names a file with a password for everybody"
    )
