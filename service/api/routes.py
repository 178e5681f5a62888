"""/api/v1: the worklist, studies, results, referrals and the audit trail."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse

from service.api import schemas
from service.api.problems import MEDIA_TYPE
from service.api.tabular import worklist_csv
from service.domain.access import Right
from service.domain.renumber import RenumberingError, mapped, shifted
from service.domain.result import Category
from service.domain.states import ReferralState, StudyState
from service.web.desk import MAX_ID, NO_DELIVERY, NO_REPORT, NO_STUDY, Desk, Needs
from service.web.pages import sorting
from service.workflow import reading
from service.workflow.reading import Filter, Stage, StudyDetail, WorklistEntry

CSV_ROWS = 10_000
DICOM = "application/dicom"  # RFC 3240

READ, REFER = Depends(Needs(Right.READ)), Depends(Needs(Right.REFER))
OPERATE, AUDIT = Depends(Needs(Right.OPERATE)), Depends(Needs(Right.AUDIT))

StudyUid = Annotated[str, Path(pattern=r"^[0-9.]{1,64}$", description="Study Instance UID")]
RowId = Annotated[int, Path(ge=1, le=MAX_ID)]
Destination = Annotated[str, Path(max_length=64, description="name of a destination, as in OSTEOGATE_DESTINATIONS")]
PageNumber = Annotated[int, Query(ge=1, le=100_000)]
PageSize = Annotated[int, Query(ge=1, le=500)]
Words = Annotated[str | None, Query(max_length=200, description="in name, id, accession, UID, description")]
Sort = Annotated[
    str,
    Query(
        pattern=r"^-?[a-z-]+$",
        max_length=20,
        description="priority, received, study-date, name, bmd, tbs or hu; a leading minus turns it round",
    ),
]


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {MEDIA_TYPE: {"schema": schemas.Problem.model_json_schema()}}
    return {status: {"description": "Problem document", "content": content} for status in statuses}


def api_router(desk: Desk) -> APIRouter:
    """All routes of version 1."""
    router = APIRouter(prefix="/api/v1", responses=_problems(401, 403, 422))

    @router.get(
        "/worklist",
        response_model=schemas.Worklist,
        responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
        tags=["worklist"],
        dependencies=[READ],
    )
    def worklist(
        request: Request,
        stage: Stage | None = None,
        category: Category | None = None,
        state: StudyState | None = None,
        referral: ReferralState | None = None,
        synthetic: bool | None = None,
        q: Words = None,
        sort: Sort = "priority",
        page: PageNumber = 1,
        page_size: PageSize = 50,
    ) -> Any:
        """Who was screened, what came of it, where the referral stands; `Accept: text/csv` exports it."""
        wanted = Filter(stage, category, state, referral, synthetic, q.strip() or None if q else None)
        order, descending = sorting(sort)
        export = "text/csv" in request.headers.get("accept", "")
        number, size = (1, CSV_ROWS) if export else (page, page_size)
        with desk.store.transaction() as session:
            found = reading.worklist(session, wanted, order=order, descending=descending, number=number, size=size)
            counts = reading.worklist_counts(session, wanted)
            action = "worklist.export" if export else "worklist.view"
            desk.note(session, request, action, "worklist", rows=len(found.items), q=q)
        if export:
            return csv_response(found.items)
        return schemas.Worklist(
            items=tuple(schemas.WorklistItem.model_validate(item) for item in found.items),
            total=found.total,
            page=found.number,
            page_size=found.size,
            counts=counts,
        )

    @router.get("/studies", response_model=schemas.Studies, tags=["studies"], dependencies=[READ])
    def studies(request: Request, q: Words = None, page: PageNumber = 1, page_size: PageSize = 50) -> schemas.Studies:
        """Every study that came in, with every series and its verdict, the latest arrival first."""
        with desk.store.transaction() as session:
            words = q.strip() or None if q else None
            found = reading.intake(session, words=words, number=page, size=page_size)
            desk.note(session, request, "intake.view", "intake", rows=len(found.items), q=q)
        return schemas.Studies(
            items=tuple(schemas.StudyShape.model_validate(item) for item in found.items),
            total=found.total,
            page=found.number,
            page_size=found.size,
        )

    @router.get(
        "/studies/{study_uid}",
        response_model=schemas.StudyDetailShape,
        responses=_problems(404),
        tags=["studies"],
        dependencies=[READ],
    )
    def study(request: Request, study_uid: StudyUid) -> schemas.StudyDetailShape:
        """One study: its series with verdicts, its work with attempts, its results, its refusals."""
        detail = desk.study(request, study_uid, seen_as="study.view")
        with desk.store.reading() as session:
            refused = reading.refusals(session, words=study_uid)
        return _study_shape(detail, refused)

    @router.get(
        "/studies/{study_uid}/result",
        response_model=schemas.ResultDocument,
        responses=_problems(404),
        tags=["studies"],
        dependencies=[READ],
    )
    def result(
        request: Request,
        study_uid: StudyUid,
        result_id: Annotated[int | None, Query(ge=1, le=MAX_ID, description="an earlier result of the study")] = None,
    ) -> JSONResponse:
        """result.json: of the screening, or the not-assessable one of a study that no series qualified."""
        document = desk.document(request, study_uid, result_id=result_id)
        return JSONResponse(dict(document))  # as stored: what a newer version added stays in

    @router.post(
        "/studies/{study_uid}/referral",
        response_model=schemas.ReferralShape,
        responses=_problems(403, 404, 409),
        tags=["referral"],
        dependencies=[REFER],
    )
    def act(request: Request, study_uid: StudyUid, step: schemas.ReferralAction) -> schemas.ReferralShape:
        """A step of the referral loop; one that its state does not allow is refused with 409."""
        require_json(request)
        reason = step.reason.strip() or None if step.reason else None
        desk.act(request, study_uid, step.action, reason)
        with desk.store.reading() as session:
            detail = reading.study(session, study_uid)
        if detail is None or detail.entry.referral is None:
            raise HTTPException(404, "This study has no referral.")
        return schemas.ReferralShape.model_validate(detail.entry.referral)

    @router.post(
        "/studies/{study_uid}/rerun",
        response_model=schemas.RerunAnswer,
        responses=_problems(403, 404, 409),
        status_code=202,
        tags=["studies"],
        dependencies=[OPERATE],
    )
    def rerun(request: Request, study_uid: StudyUid) -> schemas.RerunAnswer:
        """Let the worker try a quarantined study again."""
        require_json(request)
        desk.rerun(request, study_uid)
        with desk.store.reading() as session:
            detail = reading.study(session, study_uid)
        if detail is None:
            raise HTTPException(404, NO_STUDY)
        return schemas.RerunAnswer(study_uid=study_uid, state=detail.intake.state)

    @router.post(
        "/studies/{study_uid}/renumber",
        response_model=schemas.RenumberAnswer,
        responses=_problems(403, 404, 409),
        status_code=202,
        tags=["studies"],
        dependencies=[REFER],
    )
    def renumber(request: Request, study_uid: StudyUid, wanted: schemas.RenumberAction) -> schemas.RenumberAnswer:
        """Measure the study again under other names of its levels, with the outlines that it has, as a new revision."""
        require_json(request)
        try:
            levels = shifted(wanted.shift) if wanted.shift is not None else mapped(wanted.levels or {})
        except RenumberingError as error:
            raise HTTPException(422, f"Levels: {error}.") from error
        if not wanted.reason.strip():
            raise HTTPException(422, "Say why the levels are renumbered.")
        desk.renumber(request, study_uid, levels, wanted.reason)
        with desk.store.reading() as session:
            detail = reading.study(session, study_uid)
        if detail is None:
            raise HTTPException(404, NO_STUDY)
        return schemas.RenumberAnswer(study_uid=study_uid, state=detail.intake.state, revision=detail.intake.revision)

    @router.get("/outbox", response_model=schemas.OutboxShape, tags=["outbox"], dependencies=[READ])
    def outbox(request: Request) -> schemas.OutboxShape:
        """Where results are sent, what waits there, since when, and why."""
        with desk.store.transaction() as session:
            found = reading.outbox(session, desk.settings.destinations)
            desk.note(session, request, "outbox.view", "outbox")
        return schemas.OutboxShape.model_validate(found)

    @router.post(
        "/outbox/{destination}/retry",
        response_model=schemas.RetryAnswer,
        responses=_problems(403, 409),
        status_code=202,
        tags=["outbox"],
        dependencies=[OPERATE],
    )
    def retry(request: Request, destination: Destination) -> schemas.RetryAnswer:
        """Try everything that waits for a destination now, without waiting for its back-off."""
        require_json(request)
        return schemas.RetryAnswer(destination=destination, deliveries=desk.retry(request, destination))

    @router.post(
        "/deliveries/{delivery_id}/resend",
        response_model=schemas.DeliveryShape,
        responses=_problems(403, 404, 409),
        status_code=202,
        tags=["outbox"],
        dependencies=[OPERATE],
    )
    def resend(request: Request, delivery_id: RowId) -> schemas.DeliveryShape:
        """Send one object to its destination again, delivered or not."""
        require_json(request)
        desk.resend(request, delivery_id)
        return _delivery(delivery_id)

    @router.post(
        "/reports/{report_id}/send",
        response_model=schemas.DeliveryShape,
        responses=_problems(403, 404, 409),
        status_code=202,
        tags=["outbox"],
        dependencies=[OPERATE],
    )
    def send(request: Request, report_id: RowId, wanted: schemas.SendTo) -> schemas.DeliveryShape:
        """Send one object to a configured destination, also to one that was configured after it was made."""
        require_json(request)
        _, delivery_id = desk.send(request, report_id, wanted.destination)
        return _delivery(delivery_id)

    @router.post(
        "/reports/{report_id}/remake",
        response_model=schemas.ReportShape,
        responses=_problems(403, 404, 409),
        status_code=202,
        tags=["outbox"],
        dependencies=[OPERATE],
    )
    def remake(request: Request, report_id: RowId) -> schemas.ReportShape:
        """Try again to make an object that could not be made."""
        require_json(request)
        desk.remake(request, report_id)
        with desk.store.reading() as session:
            report = reading.report(session, report_id)
        if report is None:
            raise HTTPException(404, NO_REPORT)
        return schemas.ReportShape.model_validate(report)

    @router.get(
        "/reports/{report_id}/file",
        response_class=FileResponse,
        responses={200: {"content": {DICOM: {"schema": {"type": "string", "format": "binary"}}}}, **_problems(404)},
        tags=["outbox"],
        dependencies=[READ],
    )
    def file(request: Request, report_id: RowId) -> FileResponse:
        """The DICOM object itself, as it is sent; the download is audited as an export."""
        path, found = desk.report_file(request, report_id)
        return FileResponse(path, media_type=DICOM, filename=f"osteogate-{found.kind.lower()}-{report_id}.dcm")

    def _delivery(delivery_id: int) -> schemas.DeliveryShape:
        with desk.store.reading() as session:
            line = reading.delivery(session, delivery_id)
        if line is None:
            raise HTTPException(404, NO_DELIVERY)
        return schemas.DeliveryShape.model_validate(line)

    @router.get("/audit", response_model=schemas.Audit, tags=["audit"], dependencies=[AUDIT])
    def audit(
        request: Request,
        subject: Annotated[str | None, Query(max_length=128)] = None,
        page: PageNumber = 1,
        page_size: PageSize = 50,
    ) -> schemas.Audit:
        """Who looked at, took out or decided what, the latest first."""
        with desk.store.transaction() as session:
            found = reading.audit(session, subject=subject, number=page, size=page_size)
            desk.note(session, request, "audit.view", "audit", about=subject)
        return schemas.Audit(
            items=tuple(schemas.AuditShape.model_validate(item) for item in found.items),
            total=found.total,
            page=found.number,
            page_size=found.size,
        )

    return router


def require_json(request: Request) -> None:
    """415 unless the body is declared as JSON: no foreign page's form can declare that."""
    told = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if told not in ("", "application/json"):  # none at all: there is no body, and no form sends that
        raise HTTPException(415, "Send application/json.")


def csv_response(entries: tuple[WorklistEntry, ...], *, byte_order_mark: bool = False) -> Response:
    """The worklist as a CSV download; spreadsheets need the byte-order mark to read Japanese names."""
    mark = "\ufeff" if byte_order_mark else ""
    return PlainTextResponse(
        mark + worklist_csv(entries),
        media_type="text/csv",
        headers={"Content-Disposition": 'attachment; filename="osteogate-worklist.csv"'},
    )


def _study_shape(detail: StudyDetail, refused: tuple[reading.RefusalLine, ...]) -> schemas.StudyDetailShape:
    known = schemas.StudyShape.model_validate(detail.intake)
    return schemas.StudyDetailShape(
        **{name: getattr(known, name) for name in schemas.StudyShape.model_fields},
        category=detail.entry.category,
        referral=_maybe(schemas.ReferralShape, detail.entry.referral),
        jobs=tuple(schemas.JobShape.model_validate(job) for job in detail.jobs),
        reports=tuple(schemas.ReportShape.model_validate(report) for report in detail.reports),
        results=tuple(schemas.ResultSummary.model_validate(line) for line in detail.results),
        conflicts=tuple(schemas.ConflictShape.model_validate(line) for line in detail.conflicts),
        refusals=tuple(schemas.RefusalShape.model_validate(line) for line in refused),
    )


def _maybe(shape: type[schemas.ReferralShape], value: reading.Standing | None) -> schemas.ReferralShape | None:
    return None if value is None else shape.model_validate(value)
