"""The page of live performance: what the model told against what DXA said, scanners under watch, the reminder."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from service.domain.access import Right
from service.web.desk import Desk, Needs
from service.web.pages import Pages
from service.workflow import performance
from service.workflow.watching import Lookout

WEEKS = 12  # shown of each scanner


def performance_page_router(desk: Desk, pages: Pages, lookout: Lookout) -> APIRouter:
    """The one page."""
    router = APIRouter(include_in_schema=False)

    @router.get("/performance", dependencies=[Depends(Needs(Right.WATCH))])
    def show(request: Request) -> Response:
        """How the model does here."""
        with desk.store.transaction() as session:
            found = performance.overview(session, desk.policy)
            scanners = lookout.scanners(session)
            desk.note(session, request, "performance.view", "performance")
        context = {"found": found, "scanners": scanners, "weeks": WEEKS}
        return pages.render(request, "performance.html", context)

    return router
