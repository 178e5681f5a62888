"""/api/v1/performance: how each model does as DXA results arrive, whether a scanner has changed, and the reminder."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date, datetime

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from service.api.schemas import ReasonShape, Shape
from service.domain.access import Right
from service.domain.drift import Scanner, Watched
from service.web.desk import Desk, Needs
from service.workflow import performance
from service.workflow.watching import Lookout

WATCH = Depends(Needs(Right.WATCH))


class EstimateShape(Shape):
    """A figure with its 95 % interval and the number that it rests on."""

    value: float
    low: float
    high: float
    n: int


class ThirdShape(Shape):
    """A third of the patients, from the lowest predicted density up; g/cm2."""

    predicted: float
    dxa: float
    error: EstimateShape


class FlagsShape(Shape):
    """Flags against the densitometer's own T-score: confirmed and missed are T < -1.0, very low is T <= -2.5."""

    flagged: int
    confirmed: EstimateShape | None
    flagged_very_low: EstimateShape | None
    unflagged: int
    missed: EstimateShape | None
    missed_very_low: EstimateShape | None
    without_t_score: int


class FiguresShape(Shape):
    """Agreement of mean densities, g/cm2 (predicted less measured), calibration, coverage of the model's intervals."""

    mean_error: EstimateShape
    lower_limit: EstimateShape
    upper_limit: EstimateShape
    r: EstimateShape | None
    thirds: tuple[ThirdShape, ...]
    coverage: EstimateShape | None
    flags: FlagsShape


class ScannerShape(Shape):
    """What makes two CTs comparable."""

    synthetic: bool
    manufacturer: str
    model: str
    kernel: str


class GroupShape(BaseModel):
    """Pairs of people or of digital patients, of one scanner or (null) of all; no figures where there are too few."""

    synthetic: bool
    scanner: ScannerShape | None
    pairs: int
    minimum: int
    figures: FiguresShape | None


class ModelShape(BaseModel):
    """One model, by the pairs whose DXA was stored after its first use."""

    model: str
    model_sha256: str
    first_used: datetime
    in_force: bool
    groups: tuple[GroupShape, ...]


class ChartShape(Shape):
    """One tissue of one scanner; null while the scanner's beginning is being gathered."""

    tissue: str
    n: int
    needed: int
    mean_hu: float | None
    sd_hu: float | None
    now_hu: float | None
    limit_hu: float | None
    since: date | None
    studies: int
    excursions: int


class WeekShape(Shape):
    """One ISO week of one scanner."""

    monday: date
    n: int
    decided: int
    flagged: int
    means_hu: dict[str, float]
    beyond: bool


class AlertShape(BaseModel):
    """Something that a person should look at."""

    since: date
    reason: ReasonShape


class WatchedShape(BaseModel):
    """One scanner under watch."""

    scanner: ScannerShape
    n: int
    charts: tuple[ChartShape, ...]
    weeks: tuple[WeekShape, ...]
    alerts: tuple[AlertShape, ...]


class ReminderShape(Shape):
    """New pairs since the model in force was made, and how many a retraining asks for."""

    since: datetime | None
    people: int
    digital: int
    needed: int
    run: int | None = Field(description="pairs of training runs up to this one are not new")
    due: bool


class PerformanceShape(BaseModel):
    """Everything, without a single patient in it."""

    models: tuple[ModelShape, ...]
    scanners: tuple[WatchedShape, ...]
    reminder: ReminderShape


def performance_router(desk: Desk, lookout: Lookout) -> APIRouter:
    """The one route."""
    router = APIRouter(prefix="/api/v1/performance", tags=["performance"])

    @router.get("", response_model=PerformanceShape, dependencies=[WATCH])
    def show(request: Request) -> PerformanceShape:
        """Live performance by model and scanner, drift by scanner, and whether a retraining would have enough pairs."""
        with desk.store.transaction() as session:
            found = performance.overview(session, desk.policy)
            scanners = lookout.scanners(session)
            desk.note(session, request, "performance.view", "performance")
        return PerformanceShape(
            models=tuple(_model(one) for one in found.models),
            scanners=tuple(_watched(one) for one in scanners),
            reminder=ReminderShape.model_validate(found.reminder),
        )

    return router


def _model(one: performance.ModelPerformance) -> ModelShape:
    return ModelShape(
        model=one.model.name,
        model_sha256=one.model.sha256,
        first_used=one.model.first_used,
        in_force=one.model.in_force,
        groups=tuple(_group(group) for group in one.groups),
    )


def _group(group: performance.Group) -> GroupShape:
    told = group.performance
    return GroupShape(
        synthetic=group.synthetic,
        scanner=None if group.scanner is None else _scanner(group.scanner),
        pairs=told.n,
        minimum=told.minimum,
        figures=None if told.figures is None else FiguresShape.model_validate(told.figures),
    )


def _scanner(scanner: Scanner) -> ScannerShape:
    return ScannerShape.model_validate(scanner)


def _watched(one: Watched) -> WatchedShape:
    return WatchedShape(
        scanner=_scanner(one.scanner),
        n=one.n,
        charts=tuple(ChartShape.model_validate(chart) for chart in one.charts),
        weeks=tuple(WeekShape.model_validate(asdict(week)) for week in one.weeks),
        alerts=tuple(
            AlertShape(since=alert.since, reason=ReasonShape(code=alert.reason.code.value, text=alert.reason.text))
            for alert in one.alerts
        ),
    )
