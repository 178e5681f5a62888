"""/api/v1/training-runs: ask for a run, watch it, stop it, let it go on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from service.api.problems import problem_response
from service.api.routes import require_json
from service.api.schemas import Problem, ReasonShape, Shape
from service.domain.access import Right
from service.domain.reasons import Code, Reason
from service.domain.states import RunStage, RunState
from service.domain.training import AS_IN_FORCE, MAX_SEED, TARGETS, People, Start, Wanted
from service.web.desk import MAX_ID, NO_RUN, Desk, Needs
from service.workflow import training
from service.workflow.training import EpochLine, RunLine, Survey

TRAIN = Depends(Needs(Right.TRAIN))
DEFAULT_CONFIGURATION = {
    Start.SCRATCH: "osteogate",
    Start.FINE_TUNE: "osteogate-fine-tune",
    Start.REFIT: AS_IN_FORCE,
}
UNFIT = frozenset({Code.TRAINING_TARGETS, Code.TRAINING_CONFIGURATION, Code.TRAINING_START})  # the request itself
EVENT_STREAM = "text/event-stream"
LOOK_SECONDS = 1.0
SILENCE_SECONDS = 15.0  # then a comment, so that proxies do not close the stream
STREAM_SECONDS = 300.0  # then it ends; a browser asks again by itself, and is let in again or not

RunId = Annotated[int, Path(ge=1, le=MAX_ID)]


class TrainingRequest(BaseModel):
    """A training run."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    reason: str = Field(min_length=1, max_length=1000, description="why; stands in the audit")
    configuration: str | None = Field(
        default=None,
        max_length=64,
        description="a shipped one; by default osteogate, or osteogate-fine-tune; none for a refit",
    )
    settings: dict[str, Any] = Field(default_factory=dict, max_length=20, examples=[{"epochs": 30}])
    targets: tuple[str, ...] = Field(
        default=TARGETS, max_length=4, description="both, or bmd_g_cm2 alone where the site's DXA tells no TBS"
    )
    start: Start = Field(
        default=Start.SCRATCH,
        description="scratch; or fine-tune: the model in force goes on learning; or refit: it keeps its networks, and "
        "only its readout and intervals are fitted",
    )
    folds: int | None = Field(default=None, description="1, 2, 5 or 10; by default as the configuration has it")
    seed: int = Field(default=1, ge=0, le=MAX_SEED)
    people: People = Field(default=People.PATIENTS, description="whose pairs; never both")

    def wanted(self) -> Wanted:
        """As the rules take it."""
        return Wanted(
            reason=self.reason,
            configuration=self.configuration or DEFAULT_CONFIGURATION[self.start],
            targets=self.targets,
            settings=self.settings,
            start=self.start,
            folds=self.folds,
            seed=self.seed,
            people=self.people,
        )


class LostShape(Shape):
    """A study, or a level of it, that the manifest names and that could not be cut out."""

    study_uid: str
    level: str | None
    code: str
    text: str


class EpochShape(Shape):
    """One point of one network's curve."""

    network: str
    epoch: int
    step: int
    training_loss: float
    validation_loss: float
    bmd_r: float | None
    tbs_r: float | None


class RunShape(Shape):
    """One run."""

    id: int
    state: RunState
    stage: RunStage | None
    reason: str
    created_at: datetime
    created_by: str
    configuration: str
    start: Start
    people: People
    targets: tuple[str, ...] = Field(description="what it learns; without tbs, its model does not measure TBS")
    patients: int = Field(description="who train")
    locked: int = Field(description="patients who judge, and never train")
    vertebrae: int
    manifest_sha256: str
    progress: dict[str, Any]
    share: float | None = Field(description="of the steps of training, 0 to 1")
    lost: tuple[LostShape, ...]
    attempts: int
    cancel_asked: bool
    last_error: str | None
    started_at: datetime | None
    finished_at: datetime | None
    package_path: str | None = Field(description="relative to the data folder")
    package_sha256: str | None
    candidate_report: str | None
    champion_report: str | None
    champion: str | None = Field(description="the model in force that judged beside it")


class RunDetail(RunShape):
    """One run with its curves."""

    curve: tuple[EpochShape, ...]


class SurveyShape(BaseModel):
    """What a run that is asked for now would learn from; `reasons` say why none can start."""

    people: People
    targets: tuple[str, ...] = Field(description="BMD and TBS, or BMD alone")
    pairs: int
    patients: int
    locked: int
    vertebrae: int
    left_out: int
    reasons: tuple[ReasonShape, ...]
    scanners: dict[str, int] = Field(description="patients who would train on each scanner, maker and model")


class Runs(BaseModel):
    """The latest runs first, and what there is to train on now."""

    items: tuple[RunShape, ...]
    survey: tuple[SurveyShape, ...]


def training_router(desk: Desk) -> APIRouter:
    """The routes of training runs; every one is for an ml-admin."""
    router = APIRouter(prefix="/api/v1/training-runs", tags=["training"])

    @router.get("", response_model=Runs, dependencies=[TRAIN])
    def listed(request: Request) -> Runs:
        """Every run, and what there is to train on now."""
        with desk.store.transaction() as session:
            found = training.runs(session)
            surveys = training.surveys(session, desk.policy)
            desk.note(session, request, "training.view", "training", rows=len(found))
        items = tuple(RunShape.model_validate(one) for one in found)
        return Runs(items=items, survey=tuple(_survey_shape(one) for one in surveys))

    @router.post(
        "",
        response_model=RunDetail,
        status_code=201,
        dependencies=[TRAIN],
        responses={
            409: {"model": Problem, "description": "Too few patients, or another run goes."},
            422: {"model": Problem, "description": "The request cannot be met; `reasons` say why."},
            507: {"model": Problem, "description": "Too little room on the disk."},
        },
    )
    def ask(request: Request, response: Response, wanted: TrainingRequest) -> Any:
        """Ask for a run: what it learns from is frozen now, and it waits for the trainer."""
        require_json(request)
        created = desk.train(request, wanted.wanted())
        if created.id is None:
            told = [reason.as_dict() for reason in created.reasons]
            status = _status(created.reasons)
            return problem_response(status, created.reasons[0].text, instance=request.url.path, reasons=told)
        response.headers["Location"] = f"{request.url.path}/{created.id}"
        return _detail(desk, created.id)

    @router.get("/{run_id}", response_model=RunDetail, dependencies=[TRAIN])
    def one(request: Request, run_id: RunId) -> RunDetail:
        """One run with its curves."""
        found = _detail(desk, run_id)
        with desk.store.transaction() as session:
            desk.note(session, request, "training.view", f"training-run:{run_id}", state=found.state.value)
        return found

    @router.get("/{run_id}/manifest", response_model=dict[str, Any], dependencies=[TRAIN])
    def manifest(request: Request, run_id: RunId) -> Mapping[str, Any]:
        """What the run was frozen to: studies, labels, folds, configuration. It names studies: keep it in the house."""
        with desk.store.transaction() as session:
            found = training.manifest(session, run_id)
            if found is None:
                raise HTTPException(404, NO_RUN)
            desk.note(session, request, "training.export", f"training-run:{run_id}", pairs=len(found["pairs"]))
        return found

    @router.post("/{run_id}/cancel", response_model=RunDetail, dependencies=[TRAIN])
    def cancel(request: Request, run_id: RunId) -> RunDetail:
        """Stop it: a waiting run at once, a running one after its next step."""
        require_json(request)
        desk.cancel_training(request, run_id)
        return _detail(desk, run_id)

    @router.post("/{run_id}/resume", response_model=RunDetail, dependencies=[TRAIN])
    def resume(request: Request, run_id: RunId) -> RunDetail:
        """Let a run that failed or was cancelled go on where it stopped."""
        require_json(request)
        desk.resume_training(request, run_id)
        return _detail(desk, run_id)

    @router.get(
        "/{run_id}/events",
        dependencies=[TRAIN],
        response_class=StreamingResponse,
        responses={200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}}},
    )
    async def events(request: Request, run_id: RunId) -> StreamingResponse:
        """Server-sent events while the run goes: `epoch` (a point of a curve), `progress`, and `end`."""
        after = request.headers.get("last-event-id", "")
        known = int(after) if after.isascii() and after.isdigit() and len(after) < 10 else 0
        if (await run_in_threadpool(_look, desk, run_id, known))[0] is None:
            raise HTTPException(404, NO_RUN)
        stream = _stream(desk, request, run_id, known)
        return StreamingResponse(stream, media_type=EVENT_STREAM, headers={"X-Accel-Buffering": "no"})

    return router


def _status(reasons: tuple[Reason, ...]) -> int:
    codes = {reason.code for reason in reasons}
    if codes & UNFIT:
        return 422
    return 507 if codes == {Code.TRAINING_DISK} else 409


def _detail(desk: Desk, run_id: int) -> RunDetail:
    with desk.store.reading() as session:
        found = training.run(session, run_id)
        if found is None:
            raise HTTPException(404, NO_RUN)
        curve = tuple(EpochShape.model_validate(one) for one in training.curve(session, run_id))
    return RunDetail(**RunShape.model_validate(found).model_dump(), curve=curve)


def _survey_shape(found: Survey) -> SurveyShape:
    return SurveyShape(
        people=found.people,
        targets=found.targets,
        pairs=found.pairs,
        patients=found.patients,
        locked=found.locked,
        vertebrae=found.vertebrae,
        left_out=len(found.left_out),
        reasons=tuple(ReasonShape(code=one.code.value, text=one.text) for one in found.reasons),
        scanners=dict(found.scanners),
    )


# --- server-sent events ---------------------------------------------------------------------------------------------


def _look(desk: Desk, run_id: int, after: int) -> tuple[RunLine | None, tuple[EpochLine, ...]]:
    with desk.store.reading() as session:
        return training.run(session, run_id), training.curve(session, run_id, after=after)


async def _stream(desk: Desk, request: Request, run_id: int, after: int) -> AsyncIterator[str]:
    """What is new, once a second, until the run has ended, the reader is gone or the stream is old."""
    began = said_at = time.monotonic()
    said = ""
    while time.monotonic() - began < STREAM_SECONDS and not await request.is_disconnected():
        run, epochs = await run_in_threadpool(_look, desk, run_id, after)
        if run is None:
            return
        for epoch in epochs:
            after = epoch.id
            yield _event("epoch", EpochShape.model_validate(epoch).model_dump(mode="json"), epoch.id)
        progress = _event("progress", _progress(run))
        if progress != said:
            said, said_at = progress, time.monotonic()
            yield progress
        elif time.monotonic() - said_at > SILENCE_SECONDS:
            said_at = time.monotonic()
            yield ": still here\n\n"
        if not run.state.going:
            yield _event("end", {"state": run.state.value})
            return
        await asyncio.sleep(LOOK_SECONDS)


def _progress(run: RunLine) -> dict[str, Any]:
    return {
        "state": run.state.value,
        "stage": None if run.stage is None else run.stage.value,
        "share": run.share,
        **run.progress,
    }


def _event(name: str, data: Mapping[str, Any], number: int | None = None) -> str:
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {name}\ndata: {json.dumps(data)}\n\n"
