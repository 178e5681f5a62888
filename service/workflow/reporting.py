"""A result as DICOM objects: promised with the result, made by the steward, then addressed to the destinations.

`promise` runs in the transaction that writes the result, so no result is without its report. Making takes seconds
and holds no transaction: `begin` claims the row (its count of attempts is the fence, so of two makers the slower
writes nothing), `make` works on files alone, `finish` publishes the file and the row together. A maker that dies
anywhere leaves a row that is due again when its lease ends; made again, the object has the same UID.

A report is made only while its result stands. One that was superseded before its turn is not made (FAILED, and
says so): its slices are known (`sources.json`), but nobody should receive a report that is already outdated, and the
newer result's report could not name it.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session, aliased

from service.domain.bone import reference_words
from service.domain.states import ReportState
from service.settings import Settings
from service.store.engine import Store
from service.store.moves import moved
from service.store.tables import AuditRow, ReportRow, ResultRow
from service.workflow import artefacts, delivery, locks
from service.workflow.clock import Clock
from service.workflow.delivery import NotResendable

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["NotResendable", "make_reports", "promise", "remake"]

log = logging.getLogger(__name__)

SEGMENTATION, REPORT = "SEG", "SR"
FILES = {SEGMENTATION: "seg.dcm", REPORT: "sr.dcm"}
MAX_ATTEMPTS = 5
RETRY_SECONDS = 10.0  # after the first failure; four times as long after each further one
LEASE_SECONDS = 300.0  # a segmentation of a thousand slices takes a minute on a busy machine
SUPERSEDED = "superseded before it was made"
_ERROR_LENGTH = 1000
_OFFSET = re.compile(r"([+-])(\d{2})(\d{2})")  # TimezoneOffsetFromUTC (PS3.3 C.12.1.1.8)

Published = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Order:
    """One object that this maker may make until its lease runs out, and everything that it is made of."""

    report_id: int
    kind: str
    attempt: int  # fences every write
    study_uid: str
    artefacts: str  # the result's folder, relative to the results folder
    document: Mapping[str, Any]
    run: int
    at: datetime  # when the result was made
    segmentation: str | None = None  # the result's SEG, relative to the results folder
    replaces: str | None = None  # SOP instance UID of the report that this one supersedes


@dataclass(frozen=True, slots=True)
class Unmakeable:
    """An object that can never be made, and why."""

    why: str


def promise(session: Session, result: ResultRow, *, labelled: bool, now: datetime) -> None:
    """Promise the report of a new result, and the segmentation where vertebrae were labelled."""
    for kind in (SEGMENTATION, REPORT) if labelled else (REPORT,):
        session.add(ReportRow(result_id=result.id, kind=kind, due_at=now, created_at=now))
    session.flush()


def remake(session: Session, report_id: int, *, actor: str, now: datetime, peer_address: str | None = None) -> None:
    """A person has an object made that could not be made before.

    Raises:
        NotResendable: there is no such object, it did not fail, or its result no longer stands.
    """
    report = session.get(ReportRow, report_id)
    if report is None:
        raise NotResendable("there is no such object")
    if report.result.superseded:
        raise NotResendable("its result has been superseded")
    again = {"state": ReportState.WAITING.value, "attempts": 0, "due_at": now, "last_error": None}
    failed = update(ReportRow).where(ReportRow.id == report_id, ReportRow.state == ReportState.FAILED.value)
    if not moved(session, failed.values(**again)):
        raise NotResendable("only an object that could not be made is made again")
    session.add(
        AuditRow(
            at=now,
            actor=actor,
            action="report.remake",
            subject=report.result.study.study_uid,
            detail={"report": report_id, "kind": report.kind},
            peer_address=peer_address,
        )
    )


def make_reports(
    store: Store,
    settings: Settings,
    clock: Clock,
    *,
    going_on: Callable[[], bool] = lambda: True,
) -> int:
    """Make everything that is due now, each object for itself; how many were made.

    Destinations are those of the settings at this moment.
    """
    made, tried = 0, set[int]()
    while going_on():
        with store.reading() as session:
            report_id = next_due(session, clock(), passing_over=tried)
        if report_id is None:
            break
        tried.add(report_id)
        made += _make_one(store, settings, clock, report_id)
    return made


def next_due(session: Session, now: datetime, passing_over: Iterable[int] = ()) -> int | None:
    """The object to be made next, the oldest result first; a report waits until its segmentation is settled."""
    segmentation = aliased(ReportRow)
    unsettled = (
        select(segmentation.id)
        .where(
            segmentation.result_id == ReportRow.result_id,
            segmentation.kind == SEGMENTATION,
            segmentation.state == ReportState.WAITING.value,
        )
        .exists()
    )
    statement = (
        select(ReportRow.id)
        .where(
            ReportRow.state == ReportState.WAITING.value,
            ReportRow.due_at <= now,
            ReportRow.id.not_in(list(passing_over)),
            (ReportRow.kind == SEGMENTATION) | ~unsettled,
        )
        .order_by(ReportRow.result_id, ReportRow.kind)
    )
    return session.scalars(statement.limit(1)).first()


def begin(session: Session, report_id: int, now: datetime) -> Order | None:
    """Claim one object for a lease; None: it is not due (any more), or it has just been given up."""
    report = session.get(ReportRow, report_id)
    if report is None or report.due_at > now:
        return None
    why = _why_not(report)
    if why is not None:
        _settle(session, report_id, report.attempts, state=ReportState.FAILED.value, last_error=why)
        return None
    mine = update(ReportRow).where(
        ReportRow.id == report_id,
        ReportRow.state == ReportState.WAITING.value,
        ReportRow.attempts == report.attempts,
        ReportRow.due_at <= now,
    )
    attempt = report.attempts + 1
    if not moved(session, mine.values(attempts=attempt, due_at=now + timedelta(seconds=LEASE_SECONDS))):
        return None
    result = report.result
    return Order(
        report_id=report_id,
        kind=report.kind,
        attempt=attempt,
        study_uid=result.study.study_uid,
        artefacts=result.artefacts or "",
        document=result.document,
        run=result.run,
        at=result.created_at,
        segmentation=_segmentation_of(session, result) if report.kind == REPORT else None,
        replaces=_replaced_by(session, result) if report.kind == REPORT else None,
    )


def make(order: Order, *, spool_dir: Path, results_dir: Path) -> Dataset | Unmakeable:
    """Build the object from files alone; no transaction is held meanwhile.

    Raises:
        Exception: whatever the files or a library raise; another attempt may fare better.
    """
    # highdicom loads slowly, and only the steward needs it
    from service.dicom.reports.source import ReportError, read_source

    folder = results_dir / order.artefacts
    try:
        headers = read_source([spool_dir / name for name in artefacts.sources(folder)])
        made = _segmentation(order, headers, folder) if order.kind == SEGMENTATION else None
        if order.kind == REPORT:
            made = _report(order, headers, results_dir)
    except ReportError as error:
        return Unmakeable(str(error))
    return Unmakeable("no vertebra was labelled") if made is None else made


def finish(
    session: Session,
    order: Order,
    *,
    sop_instance_uid: str,
    sha256: str,
    publish: Published,
    destinations: Iterable[str],
    now: datetime,
) -> bool:
    """Publish the file, mark the object made and address it, all while the study is held.

    False: it is no longer this maker's, or its result was superseded meanwhile; nothing was published. A crash
    between the file and the commit leaves the row due again.
    """
    locks.study(session, order.study_uid)  # a newer result waits until this one's report stands, or is seen here
    superseded = session.scalar(
        select(ResultRow.superseded)
        .join(ReportRow, ReportRow.result_id == ResultRow.id)
        .where(ReportRow.id == order.report_id)
    )
    if superseded:
        _settle(session, order.report_id, order.attempt, state=ReportState.FAILED.value, last_error=SUPERSEDED)
        return False
    values = {
        "state": ReportState.MADE.value,
        "made_at": now,
        "sop_instance_uid": sop_instance_uid,
        "sha256": sha256,
        "path": f"{order.artefacts}/{FILES[order.kind]}",
        "last_error": None,
    }
    if not _settle(session, order.report_id, order.attempt, **values):
        return False
    publish()
    report = session.get_one(ReportRow, order.report_id)
    delivery.open_deliveries(session, report, destinations, now)
    return True


def fail(session: Session, order: Order, error: str, now: datetime) -> bool:
    """An attempt failed: due again after a back-off, or given up after the last one."""
    values: dict[str, Any] = {"last_error": error.replace("\x00", " ")[:_ERROR_LENGTH]}
    if order.attempt >= MAX_ATTEMPTS:
        values["state"] = ReportState.FAILED.value
    else:
        values["due_at"] = now + timedelta(seconds=RETRY_SECONDS * 4 ** (order.attempt - 1))
    return _settle(session, order.report_id, order.attempt, **values)


def give_up(session: Session, order: Order, why: str) -> bool:
    """No further attempt would fare better."""
    return _settle(session, order.report_id, order.attempt, state=ReportState.FAILED.value, last_error=why)


# One object


def _make_one(store: Store, settings: Settings, clock: Clock, report_id: int) -> bool:
    with store.transaction() as session:
        order = begin(session, report_id, clock())
    if order is None:
        return False
    try:
        made = make(order, spool_dir=settings.spool_dir, results_dir=settings.results_dir)
        if not isinstance(made, Unmakeable):
            return _publish(store, settings, clock, order, made)
    except Exception as error:
        log.exception("study %s: %s, attempt %d failed", order.study_uid, order.kind, order.attempt)
        with store.transaction() as session:
            fail(session, order, f"{type(error).__name__}: {error}", clock())
        return False
    log.warning("study %s: no %s can be made: %s", order.study_uid, order.kind, made.why)
    with store.transaction() as session:
        give_up(session, order, made.why)
    return False


def _publish(store: Store, settings: Settings, clock: Clock, order: Order, made: Dataset) -> bool:
    content = io.BytesIO()
    made.save_as(content, enforce_file_format=True)
    path = settings.results_dir / order.artefacts / FILES[order.kind]
    sha256 = hashlib.sha256(content.getbuffer()).hexdigest()
    with artefacts.pending(path, content.getbuffer()) as publish, store.transaction() as session:
        done = finish(
            session,
            order,
            sop_instance_uid=str(made.SOPInstanceUID),
            sha256=sha256,
            publish=publish,
            destinations=[destination.name for destination in settings.destinations],
            now=clock(),
        )
    if done:
        log.info("study %s: %s made (%s)", order.study_uid, order.kind, made.SOPInstanceUID)
    return done


def _segmentation(order: Order, headers: Sequence[Dataset], folder: Path) -> Dataset | None:
    from service.dicom.reports.codes import LEVEL_NAMES
    from service.dicom.reports.seg import make_segmentation

    return make_segmentation(
        headers,
        artefacts.labels(folder),
        LEVEL_NAMES,
        order.document["provenance"],
        at=_local(order.at, headers),
        revision=order.document["revision"] or 1,
        run=order.run,
    )


def _report(order: Order, headers: Sequence[Dataset], results_dir: Path) -> Dataset:
    from pydicom import dcmread

    from service.dicom.reports.sr import make_structured_report

    path = None if order.segmentation is None else results_dir / order.segmentation
    return make_structured_report(
        headers,
        None if path is None else dcmread(path, stop_before_pixels=True),
        order.document,
        at=_local(order.at, headers),
        run=order.run,
        reference=reference_words(order.document),
        replaces=[] if order.replaces is None else [_predecessor(order.study_uid, order.replaces)],
    )


def _predecessor(study_uid: str, sop_instance_uid: str) -> Dataset:
    """What PS3.3 C.17.2.4 wants to know of an earlier report; its series follows from the study."""
    from pydicom.dataset import Dataset

    from service.dicom.reports.uids import COMPREHENSIVE_3D_SR_STORAGE, Kind, series_uid

    earlier = Dataset()
    earlier.SOPClassUID = COMPREHENSIVE_3D_SR_STORAGE
    earlier.SOPInstanceUID = sop_instance_uid
    earlier.StudyInstanceUID = study_uid
    earlier.SeriesInstanceUID = series_uid(Kind.REPORT, study_uid, None)
    return earlier


def _local(at: datetime, headers: Sequence[Dataset]) -> datetime:
    """The site's time: in the source's offset from UTC, which the object carries over; without one, this machine's."""
    found = _OFFSET.fullmatch(str(headers[0].get("TimezoneOffsetFromUTC", "")).strip()) if headers else None
    if found is None:
        return at.astimezone()
    offset = timedelta(hours=int(found[2]), minutes=int(found[3]))
    return at.astimezone(timezone(-offset if found[1] == "-" else offset))


# Rows


def _why_not(report: ReportRow) -> str | None:
    """Why a waiting object is not even begun."""
    if report.result.superseded:
        return SUPERSEDED
    if report.result.artefacts is None:
        return "its result has no folder"
    if report.attempts >= MAX_ATTEMPTS:
        return f"given up after {report.attempts} attempts: {report.last_error or 'the maker died each time'}"
    return None


def _segmentation_of(session: Session, result: ResultRow) -> str | None:
    statement = select(ReportRow.path).where(
        ReportRow.result_id == result.id,
        ReportRow.kind == SEGMENTATION,
        ReportRow.state == ReportState.MADE.value,
    )
    return session.scalar(statement)


def _replaced_by(session: Session, result: ResultRow) -> str | None:
    """The newest report made of another result of this study: that one is superseded, since this one stands."""
    statement = (
        select(ReportRow.sop_instance_uid)
        .join(ResultRow, ReportRow.result_id == ResultRow.id)
        .where(
            ResultRow.study_id == result.study_id,
            ResultRow.id != result.id,
            ReportRow.kind == REPORT,
            ReportRow.state == ReportState.MADE.value,
        )
        .order_by(ReportRow.made_at.desc(), ResultRow.id.desc())
    )
    return session.scalars(statement.limit(1)).first()


def _settle(session: Session, report_id: int, attempt: int, **values: Any) -> bool:
    mine = update(ReportRow).where(
        ReportRow.id == report_id, ReportRow.state == ReportState.WAITING.value, ReportRow.attempts == attempt
    )
    return moved(session, mine.values(**values))
