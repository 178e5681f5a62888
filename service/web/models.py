"""The pages of models: which one is in force, what the gate says of the others, promotion and rollback."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, File, Form, HTTPException, Request, Response, UploadFile
from fastapi.responses import RedirectResponse

from service.domain.access import Right
from service.web.desk import Desk, Needs
from service.web.modeldesk import NO_MODEL, ModelDesk
from service.web.pages import Pages, RowId
from service.workflow import models
from service.workflow.packages import PackageRefused

READ, MODELS = Depends(Needs(Right.READ)), Depends(Needs(Right.MODELS))
Why = Annotated[str, Form(max_length=models.MAX_REASON)]
Token = Annotated[str, Form(max_length=100)]


def models_page_router(desk: Desk, pages: Pages) -> APIRouter:
    """The pages, and what their forms do."""
    router = APIRouter(include_in_schema=False)
    work = ModelDesk(desk)

    @router.get("/models", dependencies=[READ])
    def everything(request: Request) -> Response:
        """The model in force, every other, and the pointer's history."""
        return pages.render(request, "models.html", {"found": work.registry(request)})

    @router.get("/models/{model_id}", dependencies=[READ])
    def one(request: Request, model_id: RowId) -> Response:
        """One model with every answer of the gate."""
        found = work.registry(request)
        model = next((line for line in found.models if line.id == model_id), None)
        if model is None:
            raise HTTPException(404, NO_MODEL)
        context = {"found": found, "model": model, "agreement": work.agreement(model_id)}
        return pages.render(request, "model.html", context)

    @router.post("/models/{model_id}/promote", dependencies=[MODELS])
    def promote(request: Request, model_id: RowId, reason: Why = "", csrf: Token = "") -> Response:
        """Put a model in force, then back to the list."""
        pages.forms.check(request, csrf)
        work.promote(request, model_id, _reason(reason), None)
        return RedirectResponse("/models", 303)

    @router.post("/models/{model_id}/shadow", dependencies=[MODELS])
    def shadow(
        request: Request, model_id: RowId, wanted: Annotated[Literal["begin", "end"], Form()], csrf: Token = ""
    ) -> Response:
        """Let a candidate see live studies, or no more, then back to its page."""
        pages.forms.check(request, csrf)
        (work.begin_shadow if wanted == "begin" else work.end_shadow)(request, model_id)
        return RedirectResponse(f"/models/{model_id}", 303)

    @router.post("/models/rollback", dependencies=[MODELS])
    def rollback(request: Request, reason: Why = "", csrf: Token = "") -> Response:
        """Bring back the model that was in force before, then back to the list."""
        pages.forms.check(request, csrf)
        work.rollback(request, _reason(reason), None)
        return RedirectResponse("/models", 303)

    @router.post("/models/import", dependencies=[MODELS])
    def take(request: Request, file: Annotated[UploadFile, File()], csrf: Token = "") -> Response:
        """Take a package of another site, then to its page."""
        pages.forms.check(request, csrf)
        try:
            model = work.receive(request, file.file)
        except PackageRefused as refused:
            raise HTTPException(422, f"Not taken: {refused}.") from refused
        return RedirectResponse(f"/models/{model.id}", 303)

    return router


def _reason(told: str) -> str:
    if not told.strip():
        raise HTTPException(422, "Say why.")
    return told.strip()
