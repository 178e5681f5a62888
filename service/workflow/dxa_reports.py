"""DXA results that come as structured reports by C-STORE: read after the door has answered, taken like any other.

The door only keeps a report and promises that it will be read. Here each is read once, in a transaction of its own:
its result is stored, or every reason why not stands beside its series and on the page of DXA results.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.dicom.headers import HeaderError
from service.dicom.structured import read_content
from service.domain.dxa import DxaScan
from service.domain.dxa_sr import NoDxa, read_report
from service.domain.facts import InstanceFacts
from service.domain.reasons import Code, Reason
from service.domain.states import DxaReportState
from service.store.engine import Store
from service.store.tables import DxaReportRow, InstanceRow, SeriesRow, StudyRow
from service.workflow import dxa, report_verdicts
from service.workflow.clock import Clock
from service.workflow.people import By
from service.workflow.reading.values import Told, told

log = logging.getLogger(__name__)

LAYOUT = "dicom-sr"
AT_ONCE = 200
Found = DxaScan | NoDxa | tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class ReportLine:
    """One received report that holds, or might hold, a DXA result, for people."""

    sop_instance_uid: str
    study_uid: str
    patient_id: str | None
    received_at: datetime
    calling_ae: str | None
    state: DxaReportState
    reasons: tuple[Told, ...]


def read_waiting(store: Store, spool: Path, clock: Clock, window_days: int) -> int:
    """Read every report that waits; how many were read. One that cannot be kept is tried again in the next round."""
    wanted = select(DxaReportRow.id).where(DxaReportRow.state == DxaReportState.WAITING.value)
    with store.reading() as session:
        waiting = session.scalars(wanted.order_by(DxaReportRow.id).limit(AT_ONCE)).all()
    done = 0
    for report_id in waiting:
        try:
            done += _read_one(store, spool, report_id, clock, window_days)
        except OSError as error:
            log.warning("report %d waits, for its file cannot be read: %s", report_id, error)
        except Exception:
            log.exception("report %d could not be read now; tried again in the next round", report_id)
    return done


def _read_one(store: Store, spool: Path, report_id: int, clock: Clock, window_days: int) -> bool:
    with store.reading() as session:
        instance = session.get_one(DxaReportRow, report_id).instance
        path, facts = spool / instance.path, InstanceFacts.from_json(instance.facts)
    found = look(path, facts)
    with store.transaction() as session:
        return settle(session, report_id, found, clock(), window_days)


def look(path: Path, facts: InstanceFacts) -> Found:
    """What the report in this file says; a file that cannot be read holds no DXA result, and says why.

    Raises:
        OSError: the file is not there, or the disk does not answer.
    """
    try:
        return read_report(read_content(path), facts)
    except HeaderError as error:
        return NoDxa(Reason(Code.UNREADABLE, f"The report could not be read: {error}."))


def settle(session: Session, report_id: int, found: Found, now: datetime, window_days: int) -> bool:
    """Keep what became of a report, with its result; False: it was settled before."""
    row = session.scalars(select(DxaReportRow).where(DxaReportRow.id == report_id).with_for_update()).one()
    if row.state != DxaReportState.WAITING.value:
        return False
    instance = row.instance
    by = By(f"dicom:{instance.calling_ae or 'unknown'}"[:64], now, instance.peer_address)
    source = dxa.Source(LAYOUT, instance.sop_instance_uid, instance.sha256)
    state, reasons = DxaReportState.NO_DXA, tuple[Reason, ...]()
    if isinstance(found, NoDxa):
        reasons = reasons if found.reason is None else (found.reason,)
    elif isinstance(found, DxaScan):
        state, reasons, row.scan_id = _accepted(session, found, by, window_days, source)
    else:
        state, reasons = DxaReportState.REFUSED, found
        dxa.note_refused(session, by, source, found)
    row.state, row.read_at = state.value, now
    row.reasons = [reason.as_dict() for reason in reasons]
    session.flush()
    _tell_series(session, instance.series)
    return True


def _accepted(
    session: Session, scan: DxaScan, by: By, window_days: int, source: dxa.Source
) -> tuple[DxaReportState, tuple[Reason, ...], int | None]:
    taken = dxa.accept(session, scan, by, window_days=window_days, source=source)
    if taken.id is None:
        return DxaReportState.REFUSED, taken.reasons, None
    if taken.duplicate:
        text = "The same DXA result was stored before: nothing changed."
        return DxaReportState.DUPLICATE, (Reason(Code.DXA_DUPLICATE, text),), taken.id
    text = f"DXA of {', '.join(scan.included)} on {scan.scan_date} ({scan.manufacturer}, {scan.model}): stored."
    return DxaReportState.ACCEPTED, (Reason(Code.DXA_ACCEPTED, text),), taken.id


def _tell_series(session: Session, series: SeriesRow) -> None:
    verdict = report_verdicts.verdict(session, series)
    if verdict is not None:
        series.eligible = verdict.eligible
        series.reasons = [reason.as_dict() for reason in verdict.reasons]


def lines(session: Session, *, size: int = 20) -> tuple[ReportLine, ...]:
    """The latest reports that spoke of bone density, or could not be read."""
    wanted = (
        select(DxaReportRow, InstanceRow, StudyRow.study_uid, StudyRow.patient_id)
        .join(InstanceRow, DxaReportRow.instance_id == InstanceRow.id)
        .join(SeriesRow, InstanceRow.series_id == SeriesRow.id)
        .join(StudyRow, SeriesRow.study_id == StudyRow.id)
        .where(DxaReportRow.state != DxaReportState.NO_DXA.value)
        .order_by(DxaReportRow.id.desc())
        .limit(size)
    )
    return tuple(
        ReportLine(
            instance.sop_instance_uid,
            study_uid,
            patient_id,
            instance.received_at,
            instance.calling_ae,
            DxaReportState(row.state),
            told(row.reasons),
        )
        for row, instance, study_uid, patient_id in session.execute(wanted)
    )


def counts(session: Session) -> dict[str, int]:
    """How many reports stand in each state."""
    return dict(session.execute(select(DxaReportRow.state, func.count()).group_by(DxaReportRow.state)).all())
