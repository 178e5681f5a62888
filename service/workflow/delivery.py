"""The outbox: every made object on its way to every destination, until the destination says that it holds it.

A delivery is claimed by one conditional UPDATE that raises its token, so two stewards never send the same object
at the same time; whoever dies while sending loses its lease, and the object is due again. Between the peer's
"stored" and our row lies the only gap: a crash there sends the same bytes under the same UID once more, which a
peer may drop. A delivery is never given up and never repeated after success, unless a person asks.

A destination that is added to the settings later gets what is made from then on; of what was made before, a person
sends what is wanted (`send_to`): an archive that is new here is not flooded with years of reports.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Update, and_, case, literal, or_, select, update
from sqlalchemy.orm import Session, aliased

from service.domain.errors import OsteogateError
from service.domain.states import DeliveryState, ReportState
from service.store.moves import moved
from service.store.tables import AuditRow, DeliveryRow, ReportRow, ResultRow, StudyRow, UtcDateTime

BATCH = 20  # objects that one courier takes at a time
_ERROR_LENGTH = 500  # characters of an error's or a remark's text that are kept
_MOST_DOUBLINGS = 30  # beyond it every ceiling has been reached


class NotResendable(OsteogateError):
    """The object cannot be sent or made again now; the message says why."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """One courier's right to one delivery until its lease runs out; `token` fences every write."""

    delivery_id: int
    token: int
    attempt: int  # this one included; 1 is the first
    kind: str
    sop_instance_uid: str
    path: str  # relative to the results folder
    sha256: str


def open_deliveries(session: Session, report: ReportRow, destinations: Iterable[str], now: datetime) -> None:
    """Address a freshly made object to every destination, in the transaction that marks it made."""
    for destination in destinations:
        session.add(DeliveryRow(report_id=report.id, destination=destination, due_at=now, created_at=now))
    session.flush()


def is_due(session: Session, destination: str, now: datetime) -> bool:
    """Whether anything waits for this destination now (a look that takes no lock)."""
    return session.scalars(select(DeliveryRow.id).where(*_due(destination, now)).limit(1)).first() is not None


def claim(
    session: Session, destination: str, *, now: datetime, lease_seconds: float, limit: int = BATCH
) -> list[Parcel]:
    """Take what is due, the longest waiting first, and of one result the segmentation before its report.

    A report takes its segmentation along while that waits for another try: the report refers to it, so it should
    not arrive alone. It is not held up by one that the peer keeps refusing.
    """
    due = session.scalars(
        select(DeliveryRow.id)
        .where(*_due(destination, now))
        .order_by(DeliveryRow.due_at, DeliveryRow.report_id)
        .limit(limit)
    ).all()
    wanted = {*due, *_segmentations_of(session, due)}
    for delivery_id in sorted(wanted):  # in one order, so that two claimers cannot wait for each other
        taken = update(DeliveryRow).where(DeliveryRow.id == delivery_id, _free(now))
        taken_now = moved(
            session,
            taken.values(
                state=DeliveryState.SENDING.value,
                token=DeliveryRow.token + 1,
                attempts=DeliveryRow.attempts + 1,
                due_at=now + timedelta(seconds=lease_seconds),
            ),
        )
        if not taken_now:
            wanted.discard(delivery_id)
    return _parcels(session, wanted)


def delivered(session: Session, parcel: Parcel, now: datetime, remark: str | None = None) -> bool:
    """The destination holds it. A remark (a warning status is a success) is kept where errors stand.

    False: the lease had run out and another courier has it, so it may arrive twice.
    """
    values = {"state": DeliveryState.DELIVERED.value, "attempts": 0, "delivered_at": now, "due_at": now}
    return moved(session, _owned(parcel).values(**values, last_error=None if remark is None else _kept(remark)))


def failed(
    session: Session, parcel: Parcel, error: str, now: datetime, *, retry_seconds: float, ceiling_seconds: float
) -> bool:
    """Not delivered: due again after a back-off that doubles with every failure up to the ceiling, for ever."""
    pause = min(retry_seconds * 2 ** min(parcel.attempt - 1, _MOST_DOUBLINGS), ceiling_seconds)
    waiting = {"state": DeliveryState.WAITING.value, "due_at": now + timedelta(seconds=pause)}
    return moved(session, _owned(parcel).values(**waiting, last_error=_kept(error)))


def renew(session: Session, parcels: Iterable[Parcel], now: datetime, lease_seconds: float) -> None:
    """Lengthen the lease of what the courier has not come to yet."""
    until = now + timedelta(seconds=lease_seconds)
    for parcel in sorted(parcels, key=lambda parcel: parcel.delivery_id):
        session.execute(_owned(parcel).values(due_at=until), execution_options={"synchronize_session": False})


def release(session: Session, parcels: Iterable[Parcel], now: datetime) -> None:
    """Give back what was not tried (at a shutdown): due at once, and the attempt does not count."""
    back = {"state": DeliveryState.WAITING.value, "due_at": now, "attempts": DeliveryRow.attempts - 1}
    for parcel in sorted(parcels, key=lambda parcel: parcel.delivery_id):
        session.execute(_owned(parcel).values(**back), execution_options={"synchronize_session": False})


def resend(session: Session, delivery_id: int, *, actor: str, now: datetime, peer_address: str | None = None) -> None:
    """A person sends an object again, delivered or not: due now, with a fresh back-off.

    Raises:
        NotResendable: there is no such delivery, or a courier is sending it at this moment.
    """
    again: dict[str, Any] = {"state": DeliveryState.WAITING.value, "due_at": now, "attempts": 0, "last_error": None}
    arrived = DeliveryRow.state == DeliveryState.DELIVERED.value  # then it waits since now, not since it was made
    again["created_at"] = case((arrived, literal(now, UtcDateTime())), else_=DeliveryRow.created_at)
    back = update(DeliveryRow).where(DeliveryRow.id == delivery_id, or_(arrived, _free(now)))
    if not moved(session, back.values(**again, delivered_at=None, token=DeliveryRow.token + 1)):
        known = session.get(DeliveryRow, delivery_id) is not None
        raise NotResendable("it is being sent at this moment" if known else "there is no such delivery")
    _note(session, delivery_id, "delivery.resend", actor, now, peer_address)


def send_to(
    session: Session,
    report_id: int,
    destination: str,
    *,
    actor: str,
    now: datetime,
    peer_address: str | None = None,
) -> int:
    """A person sends a made object to a destination, also to one that was configured later; the delivery's id.

    Raises:
        NotResendable: the object has not been made, or is being sent there at this moment.
    """
    report = session.get(ReportRow, report_id)
    if report is None or report.state != ReportState.MADE.value:
        raise NotResendable("this object has not been made")
    existing = select(DeliveryRow.id).where(DeliveryRow.report_id == report_id, DeliveryRow.destination == destination)
    found = session.scalars(existing).one_or_none()
    if found is not None:
        resend(session, found, actor=actor, now=now, peer_address=peer_address)
        return found
    opened = DeliveryRow(report_id=report_id, destination=destination, due_at=now, created_at=now)
    session.add(opened)
    session.flush()
    _note(session, opened.id, "delivery.send", actor, now, peer_address)
    return opened.id


def retry_now(session: Session, destination: str, *, actor: str, now: datetime, peer_address: str | None = None) -> int:
    """A person says that the destination is back: everything that waits for it is due now; how much that is.

    The attempts stay counted, so a destination that is still away is not asked more often than before.
    """
    waiting = update(DeliveryRow).where(
        DeliveryRow.destination == destination, DeliveryRow.state == DeliveryState.WAITING.value
    )
    moved: Any = session.execute(waiting.values(due_at=now), execution_options={"synchronize_session": False})
    detail = {"deliveries": moved.rowcount}
    session.add(
        AuditRow(
            at=now, actor=actor, action="outbox.retry", subject=destination, detail=detail, peer_address=peer_address
        )
    )
    return int(moved.rowcount)


# Which rows


def _due(destination: str, now: datetime) -> tuple[Any, ...]:
    """Waiting and due, or left behind by a courier whose lease has run out: both say so in `due_at`."""
    unfinished = (DeliveryState.WAITING.value, DeliveryState.SENDING.value)
    return DeliveryRow.destination == destination, DeliveryRow.state.in_(unfinished), DeliveryRow.due_at <= now


def _free(now: datetime) -> Any:
    """Nobody's: waiting (due or not), or sending with a lease that has run out."""
    left_behind = and_(DeliveryRow.state == DeliveryState.SENDING.value, DeliveryRow.due_at <= now)
    return or_(DeliveryRow.state == DeliveryState.WAITING.value, left_behind)


def _segmentations_of(session: Session, deliveries: Collection[int]) -> list[int]:
    """The waiting deliveries of the segmentations that the reports among these refer to."""
    segmentation, report = aliased(ReportRow), aliased(ReportRow)
    theirs, sibling = aliased(DeliveryRow), aliased(DeliveryRow)
    statement = (
        select(sibling.id)
        .join(segmentation, sibling.report_id == segmentation.id)
        .join(report, report.result_id == segmentation.result_id)
        .join(theirs, and_(theirs.report_id == report.id, theirs.destination == sibling.destination))
        .where(
            theirs.id.in_(deliveries),
            report.kind == "SR",
            segmentation.kind == "SEG",
            sibling.state == DeliveryState.WAITING.value,
        )
    )
    return list(session.scalars(statement))


def _parcels(session: Session, deliveries: Collection[int]) -> list[Parcel]:
    statement = (
        select(DeliveryRow, ReportRow)
        .join(ReportRow, DeliveryRow.report_id == ReportRow.id)
        .where(DeliveryRow.id.in_(deliveries))
        .order_by(ReportRow.result_id, ReportRow.kind)  # "SEG" stands before "SR"
        .execution_options(populate_existing=True)
    )
    return [
        Parcel(
            delivery_id=delivery.id,
            token=delivery.token,
            attempt=delivery.attempts,
            kind=report.kind,
            sop_instance_uid=report.sop_instance_uid or "",
            path=report.path or "",
            sha256=report.sha256 or "",
        )
        for delivery, report in session.execute(statement)
    ]


def _owned(parcel: Parcel) -> Update:
    return update(DeliveryRow).where(
        DeliveryRow.id == parcel.delivery_id,
        DeliveryRow.token == parcel.token,
        DeliveryRow.state == DeliveryState.SENDING.value,
    )


def _note(session: Session, delivery_id: int, action: str, actor: str, now: datetime, peer_address: str | None) -> None:
    statement = (
        select(DeliveryRow.destination, ReportRow.kind, ReportRow.sop_instance_uid, StudyRow.study_uid)
        .join(ReportRow, DeliveryRow.report_id == ReportRow.id)
        .join(ResultRow, ReportRow.result_id == ResultRow.id)
        .join(StudyRow, ResultRow.study_id == StudyRow.id)
        .where(DeliveryRow.id == delivery_id)
    )
    destination, kind, sop_instance_uid, study_uid = session.execute(statement).one()
    detail = {
        "delivery": delivery_id,
        "destination": destination,
        "kind": kind,
        "sop_instance_uid": sop_instance_uid,
    }
    session.add(
        AuditRow(at=now, actor=actor, action=action, subject=study_uid, detail=detail, peer_address=peer_address)
    )


def _kept(text: str) -> str:
    """One printable line of bounded length, whatever a peer wrote into its answer."""
    line = " ".join("".join(mark if mark.isprintable() else " " for mark in text).split())
    return line if len(line) <= _ERROR_LENGTH else line[: _ERROR_LENGTH - 1] + "…"
