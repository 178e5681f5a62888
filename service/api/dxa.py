"""/api/v1/dxa: DXA results come in, one or a file of them."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from service.api.problems import problem_response
from service.api.routes import PageNumber, PageSize, require_json
from service.api.schemas import ReasonShape, Shape
from service.domain.access import Right
from service.domain.dxa import REGION, DxaScan, Figures, Level, Validity, manufacturer_named
from service.domain.dxa_csv import Defaults
from service.web.desk import Desk, Needs, by
from service.workflow import dxa, pairing
from service.workflow.dxa import OnRefusal

READ, DXA = Depends(Needs(Right.READ)), Depends(Needs(Right.DXA))
CSV = "text/csv"
Text = Annotated[str, Field(max_length=64)]
Number = Annotated[float | None, Field(allow_inf_nan=False)]
LevelName = Literal["L1", "L2", "L3", "L4"]


class DxaFigures(BaseModel):
    """What the densitometer says about one level, or about the total."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bmd_g_cm2: Number = None
    bmc_g: Number = None
    area_cm2: Number = None
    t_score: Number = None
    z_score: Number = None
    tbs: Number = None

    def figures(self) -> Figures:
        """As the rules take it."""
        return Figures(**{name: getattr(self, name) for name in DxaFigures.model_fields})


class DxaLevel(DxaFigures):
    """One vertebra; what is not `valid` is kept and never compared with a CT."""

    validity: Validity = Validity.VALID


class DxaResult(BaseModel):
    """One DXA result of the lumbar spine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patient_id: Text = Field(min_length=1, description="as in the CT's DICOM header (0010,0020)")
    scan_date: date
    manufacturer: Text = Field(min_length=1)
    model: Text = Field(min_length=1)
    region: Literal["lumbar-spine"] = REGION
    levels: dict[LevelName, DxaLevel] = Field(min_length=1)
    total: DxaFigures = Field(default=DxaFigures(), description="as the device tells it; recomputed and compared")
    scan_id: Text = Field(default="", description="the device's number: tells two scans of one day apart")
    sex: Literal["F", "M", ""] = ""
    synthetic: bool = Field(default=False, description="of a digital patient")

    def scan(self) -> DxaScan:
        """As the rules take it."""
        return DxaScan(
            patient_id=self.patient_id.strip(),
            scan_date=self.scan_date,
            manufacturer=manufacturer_named(self.manufacturer),
            model=self.model.strip(),
            levels={name: Level(level.figures(), level.validity) for name, level in self.levels.items()},
            total=self.total.figures(),
            region=self.region,
            scan_id=self.scan_id.strip(),
            sex=self.sex,
            synthetic=self.synthetic,
        )


class DxaAnswer(Shape):
    """The result is stored; a duplicate was stored before."""

    id: int
    duplicate: bool
    by_area_g_cm2: float | None = Field(description="recomputed: sum of BMC / sum of area of the included levels")
    mean_g_cm2: float | None = Field(description="recomputed: mean of the included levels")


class DxaFile(BaseModel):
    """A CSV with what it does not say; `columns` maps our fields to its headings where the layout is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    csv: str
    columns: dict[str, str] | None = Field(default=None, examples=[{"patient_id": "PID", "L1.bmd": "BMD L1"}])
    manufacturer: Text = ""
    model: Text = ""
    scan_date: date | None = Field(default=None, description="where the file has no dates: of every row")
    date_format: Text = Field(default="", description="of strptime, %m/%d/%Y say")
    synthetic: bool = False
    refused: OnRefusal = Field(default=OnRefusal.STOP, description="stop: one refused row, and nothing is imported")
    name: str | None = Field(default=None, max_length=255)

    @property
    def defaults(self) -> Defaults:
        """What the file does not say."""
        return Defaults(self.manufacturer, self.model, self.scan_date, self.date_format, self.synthetic)


class RefusedRowShape(Shape):
    """One row that is not taken; the heading is line 1."""

    line: int
    reason: ReasonShape


class DxaReport(Shape):
    """What came of a file."""

    layout: str
    rows: int
    accepted: int
    duplicates: int
    passed_over: int
    refused: tuple[RefusedRowShape, ...]
    imported: bool
    import_id: int | None


class DxaLevelShape(Shape):
    """One vertebra of a stored result."""

    level: str
    validity: Validity
    bmd_g_cm2: float | None
    bmc_g: float | None
    area_cm2: float | None
    t_score: float | None
    z_score: float | None
    tbs: float | None


class DxaScanShape(Shape):
    """One stored result."""

    id: int
    patient_id: str
    scan_date: date
    manufacturer: str
    model: str
    synthetic: bool
    total_bmd_g_cm2: float | None
    by_area_g_cm2: float | None
    mean_g_cm2: float
    total_tbs: float | None
    levels: tuple[DxaLevelShape, ...]


class DxaScans(Shape):
    """One page of stored results, the latest scan first."""

    items: tuple[DxaScanShape, ...]
    total: int
    page: int
    page_size: int


class PairShape(BaseModel):
    """A CT and its DXA result."""

    study_uid: str
    patient_id: str
    dxa_id: int
    levels: tuple[str, ...] = Field(description="that count on both sides")
    days: int = Field(description="from the CT to the DXA; negative: the DXA came first")
    synthetic: bool


class UnpairedShape(BaseModel):
    """A CT without a DXA result, of a patient who has one."""

    study_uid: str
    patient_id: str
    reason: ReasonShape
    rivals: tuple[int, ...] = Field(description="DXA results between which nothing decides")


class PairingShape(BaseModel):
    """Every pair, and every CT that stays alone."""

    window_days: int
    pairs: tuple[PairShape, ...]
    unpaired: tuple[UnpairedShape, ...]
    unused_dxa: tuple[int, ...]
    why: dict[str, int] = Field(description="how many CTs have no DXA result, by reason code")
    cut_ids: tuple[tuple[str, str], ...] = Field(
        description="IDs of a DXA result and of a CT that differ by leading zeros alone; nothing is paired by them"
    )


def dxa_router(desk: Desk) -> APIRouter:
    """The routes of DXA results."""
    router = APIRouter(prefix="/api/v1/dxa", tags=["dxa"])
    window_days = desk.policy.pairing.window_days

    @router.get("", response_model=DxaScans, dependencies=[READ])
    def stored(
        request: Request,
        patient_id: Annotated[str | None, Query(max_length=64)] = None,
        page: PageNumber = 1,
        page_size: PageSize = 50,
    ) -> DxaScans:
        """The stored results."""
        with desk.store.transaction() as session:
            found = dxa.scans(session, patient_id=patient_id, number=page, size=page_size)
            desk.note(session, request, "dxa.view", "dxa", rows=len(found.items), patient_id=patient_id)
        return DxaScans(
            items=tuple(DxaScanShape.model_validate(one) for one in found.items),
            total=found.total,
            page=found.number,
            page_size=found.size,
        )

    @router.get("/pairing", response_model=PairingShape, dependencies=[READ])
    def pairs(request: Request) -> PairingShape:
        """Which CT has which DXA result, and why others have none."""
        with desk.store.transaction() as session:
            found = pairing.overview(session, desk.policy.pairing)
            desk.note(session, request, "pairing.view", "dxa", pairs=len(found.pairs))
        return _pairing_shape(found)

    @router.post(
        "",
        response_model=DxaAnswer,
        status_code=201,
        responses={200: {"model": DxaAnswer, "description": "It was stored before: nothing changed."}},
        dependencies=[DXA],
    )
    def take(request: Request, response: Response, result: DxaResult) -> Any:
        """One result: 201 stored, 200 stored before, 422 refused with reasons, 409 it contradicts a stored one."""
        require_json(request)
        with desk.store.transaction() as session:
            found = dxa.accept(session, result.scan(), by(request, desk.clock), window_days=window_days)
        if found.id is None:
            told = [reason.as_dict() for reason in found.reasons]
            status = 409 if found.contradicts else 422
            return problem_response(status, found.reasons[0].text, instance=request.url.path, reasons=told)
        response.status_code = 200 if found.duplicate else 201
        recomputed = found.recomputed
        return DxaAnswer(
            id=found.id,
            duplicate=found.duplicate,
            by_area_g_cm2=recomputed.by_area_g_cm2 if recomputed else None,
            mean_g_cm2=recomputed.mean_g_cm2 if recomputed else None,
        )

    @router.post(
        "/import",
        response_model=DxaReport,
        dependencies=[DXA],
        responses={422: {"model": DxaReport, "description": "Rows were refused and nothing was imported."}},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    CSV: {"schema": {"type": "string"}},
                    "application/json": {"schema": DxaFile.model_json_schema()},
                },
            }
        },
    )
    async def take_file(
        request: Request,
        manufacturer: Annotated[str, Query(max_length=64)] = "",
        model: Annotated[str, Query(max_length=64)] = "",
        scan_date: date | None = None,
        date_format: Annotated[str, Query(max_length=64)] = "",
        synthetic: bool = False,
        refused: OnRefusal = OnRefusal.STOP,
        name: Annotated[str | None, Query(max_length=255)] = None,
    ) -> Response:
        """A CSV of GE Lunar, Hologic APEX or NHANES as it is (text/csv, what it does not say in the query), or JSON."""
        body = await request.body()
        if _media_type(request) == CSV:
            file = DxaFile(
                csv=_text(body),
                manufacturer=manufacturer,
                model=model,
                scan_date=scan_date,
                date_format=date_format,
                synthetic=synthetic,
                refused=refused,
                name=name,
            )
        else:
            require_json(request)
            file = _parsed(body)
        report = await run_in_threadpool(_imported, request, file)
        document = DxaReport.model_validate(report).model_dump(mode="json")
        if report.imported:
            return JSONResponse(document)
        detail = f"{len(report.refused)} refused; nothing was imported."
        return problem_response(422, detail, instance=request.url.path, **document)

    def _imported(request: Request, file: DxaFile) -> dxa.Report:
        with desk.store.transaction() as session:
            return dxa.import_csv(
                session,
                file.csv,
                file.defaults,
                by(request, desk.clock),
                window_days=window_days,
                columns=file.columns,
                on_refusal=file.refused,
                name=file.name,
            )

    return router


def _pairing_shape(found: pairing.Overview) -> PairingShape:
    pairs = (
        PairShape(
            study_uid=one.ct.study_uid,
            patient_id=one.ct.patient_id,
            dxa_id=one.dxa.id,
            levels=one.levels,
            days=one.days,
            synthetic=one.ct.synthetic,
        )
        for one in found.pairs
    )
    unpaired = (
        UnpairedShape(
            study_uid=one.ct.study_uid,
            patient_id=one.ct.patient_id,
            reason=ReasonShape(code=one.reason.code.value, text=one.reason.text),
            rivals=tuple(rival.id for rival in one.rivals),
        )
        for one in found.unpaired
    )
    return PairingShape(
        window_days=found.window_days,
        pairs=tuple(pairs),
        unpaired=tuple(unpaired),
        unused_dxa=tuple(one.id for one in found.unused),
        why={code.value: count for code, count in found.why.items()},
        cut_ids=found.cut_ids,
    )


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise HTTPException(422, "The file is not UTF-8: save it as CSV UTF-8.") from None


def _parsed(body: bytes) -> DxaFile:
    try:
        return DxaFile.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise HTTPException(422, f"{where or 'body'}: {first['msg']}") from None
