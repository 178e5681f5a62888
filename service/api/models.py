"""/api/v1/models: the models known here, which one is in force, promotion, rollback, packages in and out."""

from __future__ import annotations

import tempfile
from datetime import datetime
from pathlib import Path
from typing import IO, Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from service.api.problems import problem_response
from service.api.routes import RowId, require_json
from service.api.schemas import ReasonShape, Shape
from service.domain.access import MAX_NAME_LENGTH, Right
from service.web.desk import Desk, Needs
from service.web.modeldesk import ModelDesk
from service.workflow import models
from service.workflow.packages import PackageRefused

READ, MODELS = Depends(Needs(Right.READ)), Depends(Needs(Right.MODELS))
ZIP = "application/zip"
SPOOLED_BYTES = 1024 * 1024  # of an import, before it goes to the disk


class CheckShape(Shape):
    """One question of the gate."""

    code: str
    passed: bool
    text: str


class VerdictShape(Shape):
    """What this site's gate says of a model."""

    passed: bool
    gate: str = Field(description="version of the gate, with a fingerprint where the site changed a limit")
    candidate_sha256: str | None
    champion_sha256: str | None = Field(description="of the model that it was held against")
    checks: tuple[CheckShape, ...]


class ModelShape(Shape):
    """One model."""

    id: int
    name: str = Field(description="with its version")
    sha256: str = Field(description="of the package's manifest, which holds the hashes of everything else")
    origin: str = Field(description="shipped, trained or imported")
    run_id: str | None = Field(description="of the training run")
    synthetic_only: bool = Field(description="it has learned from digital patients alone, and never drives")
    finished: bool
    in_force: bool
    promotable: bool = Field(description="a person could promote it now")
    against: tuple[ReasonShape, ...] = Field(description="why it could not be promoted now")
    verdict: VerdictShape | None = Field(description="null: not judged at this site")
    judged_at: datetime | None
    shadow_since: datetime | None = Field(description="it sees live studies, and decides nothing")
    provenance: dict[str, Any]
    signature: str | None = Field(description="HMAC-SHA256 of this site over all hashes; null: it ships")
    created_at: datetime
    created_by: str


class DifferenceShape(Shape):
    """Shadow minus in force, over so many studies."""

    n: int
    mean: float
    limits: tuple[float, float] | None = Field(description="of agreement (mean -+ 1.96 SD); null for one study")


class AgreementShape(Shape):
    """How a model that is or was in shadow agrees with the one in force on the same live studies."""

    since: datetime | None
    bmd_g_cm2: DifferenceShape | None
    tbs: DifferenceShape | None


class ModelDetail(ModelShape):
    """One model with its agreement in shadow."""

    agreement: AgreementShape


class Shadow(BaseModel):
    """Whether a candidate sees live studies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shadow: bool = True


class MoveShape(Shape):
    """One move of the pointer to the model in force."""

    number: int
    model_id: int
    name: str
    sha256: str
    action: str = Field(description="shipped, promote or rollback")
    reason: str | None
    at: datetime
    by: str


class ModelsShape(Shape):
    """Every model and the pointer's history."""

    in_force: ModelShape
    models: tuple[ModelShape, ...] = Field(description="the one in force first, then the newest")
    history: tuple[MoveShape, ...] = Field(description="the latest move first")
    rollback_to: ModelShape | None


class Decision(BaseModel):
    """A promotion or a rollback: why, and who stands for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str = Field(min_length=1, max_length=models.MAX_REASON)
    person: Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)] | None = Field(
        default=None, description="who stands for it, where that is not who asks (a program's key)"
    )


def models_router(desk: Desk) -> APIRouter:
    """The routes of models."""
    router = APIRouter(prefix="/api/v1/models", tags=["models"])
    work = ModelDesk(desk)

    @router.get("", response_model=ModelsShape, dependencies=[READ])
    def everything(request: Request) -> ModelsShape:
        """Every model, which one is in force, and how it came to be."""
        return ModelsShape.model_validate(work.registry(request))

    @router.get("/{model_id}", response_model=ModelDetail, dependencies=[READ])
    def one(request: Request, model_id: RowId) -> ModelDetail:
        """One model with every answer of the gate, and how it agrees in shadow."""
        shape = ModelShape.model_validate(work.show(request, model_id))
        agreement = AgreementShape.model_validate(work.agreement(model_id))
        return ModelDetail(**shape.model_dump(), agreement=agreement)

    @router.post("/{model_id}/shadow", response_model=ModelShape, dependencies=[MODELS])
    def shadow(request: Request, model_id: RowId, wanted: Shadow) -> ModelShape:
        """Let a candidate see live studies beside the model in force (one at a time), or no more (`shadow`: false)."""
        require_json(request)
        step = work.begin_shadow if wanted.shadow else work.end_shadow
        return ModelShape.model_validate(step(request, model_id))

    @router.post("/{model_id}/promote", response_model=ModelShape, dependencies=[MODELS])
    def promote(request: Request, model_id: RowId, decision: Decision) -> Any:
        """Put a model that passed the gate in force; 409 with every reason where it did not."""
        require_json(request)
        try:
            found = work.promote(request, model_id, decision.reason, decision.person)
        except models.NotPromotable as shut:
            told = [reason.as_dict() for reason in shut.reasons]
            return problem_response(409, "The gate is shut.", instance=request.url.path, reasons=told)
        return ModelShape.model_validate(found)

    @router.post("/rollback", response_model=ModelShape, dependencies=[MODELS])
    def rollback(request: Request, decision: Decision) -> ModelShape:
        """Bring back the model that was in force before."""
        require_json(request)
        return ModelShape.model_validate(work.rollback(request, decision.reason, decision.person))

    @router.get(
        "/{model_id}/export",
        response_class=FileResponse,
        responses={200: {"content": {ZIP: {"schema": {"type": "string", "format": "binary"}}}}},
        dependencies=[MODELS],
    )
    def export(request: Request, model_id: RowId) -> Response:
        """The package with its reports for another site; nothing of any patient is in it."""
        path, name = work.export(request, model_id)
        return FileResponse(path, media_type=ZIP, filename=name, background=BackgroundTask(Path.unlink, path))

    @router.post(
        "/import",
        response_model=ModelShape,
        status_code=201,
        dependencies=[MODELS],
        openapi_extra={
            "requestBody": {"required": True, "content": {ZIP: {"schema": {"type": "string", "format": "binary"}}}}
        },
    )
    async def take(request: Request) -> ModelShape:
        """A package that another site exported (application/zip); it waits for this site's own gate."""
        told = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if told != ZIP:
            raise HTTPException(415, f"Send {ZIP}.")
        with tempfile.SpooledTemporaryFile(max_size=SPOOLED_BYTES) as file:
            async for chunk in request.stream():
                await run_in_threadpool(file.write, chunk)
            return ModelShape.model_validate(await run_in_threadpool(_received, request, file))

    def _received(request: Request, file: IO[bytes]) -> models.ModelLine:
        try:
            return work.receive(request, file)
        except PackageRefused as refused:
            raise HTTPException(422, f"Not taken: {refused}.") from refused

    return router
