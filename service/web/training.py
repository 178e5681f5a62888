"""The pages of training runs: what there is to train on, every run, and one with its live curves."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, HTTPException, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import StringConstraints

from service.domain.access import Right
from service.domain.reasons import Reason
from service.domain.training import AS_IN_FORCE, BMD_ALONE, FOLDS, MAX_SEED, TARGETS, People, Start, Wanted
from service.web import words
from service.web.curves import charts
from service.web.desk import NO_RUN, Desk, Needs, is_refresh
from service.web.pages import Pages, RowId
from service.workflow import model, models, training

TRAIN = Depends(Needs(Right.TRAIN))
SHOWN_LOST = 200
BOTH = "+".join(TARGETS)  # as the form sends them
LEARNED = {"+".join(some): words.targets(some) for some in (TARGETS, BMD_ALONE)}
Word = Annotated[str, Form(max_length=64)]


def training_page_router(desk: Desk, pages: Pages) -> APIRouter:
    """The pages, and the answers to their forms."""
    router = APIRouter(include_in_schema=False)

    def overview(request: Request, reasons: tuple[Reason, ...], told: dict[str, Any]) -> Response:
        with desk.store.transaction() as session:
            found = training.surveys(session, desk.policy)
            shelf = training.shelf(model.in_force(session, desk.settings.models_dir))
            context = {
                "runs": training.runs(session),
                "surveys": [(people, [one for one in found if one.people is people]) for people in People],
                "configurations": sorted(shelf.configurations),
                "origin": shelf.origin,
                "folds": FOLDS,
                "learned": LEARNED,
                "reasons": reasons,
                "told": told,
            }
            desk.note(session, request, "training.view", "training")
        return pages.render(request, "training.html", context, 422 if reasons else 200)

    @router.get("/training", dependencies=[TRAIN])
    def show(request: Request) -> Response:
        """Every run, and what there is to train on now."""
        return overview(request, (), asdict(Wanted("", "osteogate")) | {"epochs": ""})

    @router.post("/training", dependencies=[TRAIN])
    def ask(
        request: Request,
        reason: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000), Form()],
        configuration: Word = "osteogate",
        start: Annotated[Start, Form()] = Start.SCRATCH,
        people: Annotated[People, Form()] = People.PATIENTS,
        targets: Word = BOTH,
        epochs: Annotated[str, Form(max_length=6)] = "",
        folds: Annotated[str, Form(max_length=2)] = "",
        seed: Annotated[int, Form(ge=0, le=MAX_SEED)] = 1,
        csrf: Annotated[str, Form(max_length=100)] = "",
    ) -> Response:
        """Ask for a run; where none can start, the page says why."""
        pages.forms.check(request, csrf)
        settings = {"epochs": _number(epochs)} if epochs.strip() else {}
        wanted = Wanted(
            reason=reason,
            configuration=AS_IN_FORCE if start is Start.REFIT else configuration,
            settings=settings,
            start=start,
            folds=_number(folds) if folds.strip() else None,
            seed=seed,
            people=people,
            targets=tuple(targets.split("+")),
        )
        created = desk.train(request, wanted)
        if created.id is None:
            return overview(request, created.reasons, asdict(wanted) | {"epochs": epochs})
        return RedirectResponse(f"/training/{created.id}", 303)

    @router.get("/training/{run_id}", dependencies=[TRAIN])
    def one(request: Request, run_id: RowId) -> Response:
        """One run; a request of htmx gets the part that moves alone, and is a refresh, not a new view."""
        refresh = is_refresh(request)
        with desk.store.reading() as session:
            run = training.run(session, run_id)
            curve = training.curve(session, run_id)
            candidate = models.made_by(session, run.package_sha256) if run is not None else None
        if run is None:
            raise HTTPException(404, NO_RUN)
        if not refresh:
            with desk.store.transaction() as session:
                desk.note(session, request, "training.view", f"training-run:{run_id}", state=run.state.value)
        resumable = training.resumable(run, desk.clock(), desk.settings.training_keep_seconds)
        context = {
            "run": run,
            "candidate": candidate,
            "charts": charts(curve),
            "resumable": resumable,
            "most": SHOWN_LOST,
        }
        return pages.render(request, "training_live.html" if refresh else "training_run.html", context)

    @router.post("/training/{run_id}/cancel", dependencies=[TRAIN])
    def cancel(request: Request, run_id: RowId, csrf: Annotated[str, Form(max_length=100)] = "") -> Response:
        """Stop a run."""
        pages.forms.check(request, csrf)
        desk.cancel_training(request, run_id)
        return RedirectResponse(f"/training/{run_id}", 303)

    @router.post("/training/{run_id}/resume", dependencies=[TRAIN])
    def resume(request: Request, run_id: RowId, csrf: Annotated[str, Form(max_length=100)] = "") -> Response:
        """Let a run that stopped go on."""
        pages.forms.check(request, csrf)
        desk.resume_training(request, run_id)
        return RedirectResponse(f"/training/{run_id}", 303)

    return router


def _number(told: str) -> int:
    try:
        return int(told)
    except ValueError:
        raise HTTPException(422, "Epochs and folds are whole numbers.") from None
