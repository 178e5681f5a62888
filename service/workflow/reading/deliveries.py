"""The outbox: every DICOM object of a result, and how far each destination has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import ColumnElement, and_, case, func, select
from sqlalchemy.orm import Session

from service.domain.states import DeliveryState, ReportState
from service.settings import Destination
from service.store.tables import DeliveryRow, ReportRow, ResultRow, StudyRow


class Outgoing(StrEnum):
    """How far the objects of one result have come; the worst of them counts."""

    NOT_MADE = "not-made"  # one of them cannot be made
    FAILING = "failing"  # one of them was tried and did not arrive yet
    TO_MAKE = "to-make"  # one of them is still to be made
    ON_ITS_WAY = "on-its-way"  # one of them waits for its first try, or is being sent
    DELIVERED = "delivered"  # every configured destination that they were addressed to holds them
    KEPT = "kept"  # made, and addressed to nobody who is configured


class Flow(StrEnum):
    """How a destination takes what is sent to it."""

    FAILING = "failing"  # nothing has arrived since the oldest of the failures
    REFUSING = "refusing"  # some objects do not arrive, later ones did
    BUSY = "busy"  # objects wait for their first try
    CLEAR = "clear"  # it holds everything that was addressed to it
    UNUSED = "unused"  # nothing was ever addressed to it


@dataclass(frozen=True, slots=True)
class DeliveryLine:
    """One object on its way to one destination."""

    id: int
    destination: str
    state: DeliveryState
    attempts: int
    due_at: datetime
    last_error: str | None
    created_at: datetime
    delivered_at: datetime | None

    @property
    def failing(self) -> bool:
        """It was tried, and has not arrived."""
        return self.state is not DeliveryState.DELIVERED and self.last_error is not None


@dataclass(frozen=True, slots=True)
class ReportLine:
    """One DICOM object of one result, with everywhere it was addressed to."""

    id: int
    result_id: int
    kind: str
    state: ReportState
    attempts: int
    due_at: datetime
    last_error: str | None
    sop_instance_uid: str | None
    created_at: datetime
    made_at: datetime | None
    deliveries: tuple[DeliveryLine, ...]


@dataclass(frozen=True, slots=True)
class Address:
    """One destination as it stands beside one object; no delivery: the object was never addressed to it."""

    name: str
    address: str | None  # None: no longer configured
    delivery: DeliveryLine | None


@dataclass(frozen=True, slots=True)
class DestinationLine:
    """One destination and what waits for it; `address` is None where it is no longer configured."""

    name: str
    address: str | None
    waiting: int = 0  # objects that it does not hold yet
    failing: int = 0  # those of them that were tried already
    delivered: int = 0
    oldest_waiting_at: datetime | None = None
    next_try_at: datetime | None = None
    failing_since: datetime | None = None  # when the oldest failure after the last success was addressed to it
    last_success_at: datetime | None = None
    last_error: str | None = None

    @property
    def flow(self) -> Flow:
        """How it takes what is sent to it."""
        if self.failing_since is not None:
            return Flow.FAILING
        if self.failing:
            return Flow.REFUSING
        if self.waiting:
            return Flow.BUSY
        return Flow.CLEAR if self.delivered else Flow.UNUSED


@dataclass(frozen=True, slots=True)
class Outbox:
    """Every destination, and the objects that cannot be on their way yet because they are not made."""

    destinations: tuple[DestinationLine, ...]
    to_make: int
    not_made: int


@dataclass(frozen=True, slots=True)
class ReportFile:
    """Where a made object lies, and of which study it is."""

    study_uid: str
    kind: str
    sop_instance_uid: str | None
    path: str | None  # relative to the results folder


def outgoing(reports: Iterable[ReportLine], destinations: Iterable[Destination]) -> Outgoing | None:
    """How far these objects have come on their way to what is configured; None where none was promised."""
    known, names = tuple(reports), {one.name for one in destinations}
    deliveries = [line for report in known for line in report.deliveries if line.destination in names]
    if not known:
        return None
    if any(report.state is ReportState.FAILED for report in known):
        return Outgoing.NOT_MADE
    if any(delivery.failing for delivery in deliveries):
        return Outgoing.FAILING
    if any(report.state is ReportState.WAITING for report in known):
        return Outgoing.TO_MAKE
    if any(delivery.state is not DeliveryState.DELIVERED for delivery in deliveries):
        return Outgoing.ON_ITS_WAY
    return Outgoing.DELIVERED if deliveries else Outgoing.KEPT


def addresses(report: ReportLine, destinations: Sequence[Destination]) -> tuple[Address, ...]:
    """Every configured destination, and those that the object was addressed to before they were removed."""
    addressed = {delivery.destination: delivery for delivery in report.deliveries}
    configured = tuple(Address(one.name, one.address, addressed.pop(one.name, None)) for one in destinations)
    return configured + tuple(Address(name, None, delivery) for name, delivery in addressed.items())


def outbox(session: Session, destinations: Sequence[Destination]) -> Outbox:
    """Every configured destination in the settings' order, then those removed while objects still wait for them."""
    found = {line.name: line for line in _destination_lines(session, {one.name: one.address for one in destinations})}
    configured = [found.pop(one.name, DestinationLine(one.name, one.address)) for one in destinations]
    removed = [line for line in found.values() if line.waiting]
    made = reports_by_state(session)
    return Outbox(
        destinations=(*configured, *removed),
        to_make=made.get(ReportState.WAITING.value, 0),
        not_made=made.get(ReportState.FAILED.value, 0),
    )


def reports_by_state(session: Session) -> dict[str, int]:
    """How many objects of the results in force stand in each state; a superseded result owes nobody an object."""
    in_force = select(ReportRow.state, func.count()).join(ResultRow, ResultRow.id == ReportRow.result_id)
    return dict(session.execute(in_force.where(ResultRow.superseded.is_(False)).group_by(ReportRow.state)).all())


def report_file(session: Session, report_id: int) -> ReportFile | None:
    """Where the object lies; None where there is no such report."""
    found = session.execute(
        select(StudyRow.study_uid, ReportRow.kind, ReportRow.sop_instance_uid, ReportRow.path)
        .join(ResultRow, ResultRow.id == ReportRow.result_id)
        .join(StudyRow, StudyRow.id == ResultRow.study_id)
        .where(ReportRow.id == report_id)
    ).one_or_none()
    return None if found is None else ReportFile(*found)


def delivery(session: Session, delivery_id: int) -> DeliveryLine | None:
    """One object on its way to one destination; None where there is no such delivery."""
    found = session.get(DeliveryRow, delivery_id)
    return None if found is None else _delivery_line(found)


def study_of_delivery(session: Session, delivery_id: int) -> str | None:
    """UID of the study whose object this delivery carries; None where there is no such delivery."""
    report_id = session.scalar(select(DeliveryRow.report_id).where(DeliveryRow.id == delivery_id))
    found = None if report_id is None else report_file(session, report_id)
    return None if found is None else found.study_uid


def report(session: Session, report_id: int) -> ReportLine | None:
    """One object with its deliveries; None where there is none."""
    found = session.get(ReportRow, report_id)
    return None if found is None else report_line(found)


def report_line(row: ReportRow) -> ReportLine:
    """The row as people may read it."""
    return ReportLine(
        id=row.id,
        result_id=row.result_id,
        kind=row.kind,
        state=ReportState(row.state),
        attempts=row.attempts,
        due_at=row.due_at,
        last_error=row.last_error,
        sop_instance_uid=row.sop_instance_uid,
        created_at=row.created_at,
        made_at=row.made_at,
        deliveries=tuple(_delivery_line(one) for one in row.deliveries),
    )


def _delivery_line(row: DeliveryRow) -> DeliveryLine:
    return DeliveryLine(
        id=row.id,
        destination=row.destination,
        state=DeliveryState(row.state),
        attempts=row.attempts,
        due_at=row.due_at,
        last_error=row.last_error,
        created_at=row.created_at,
        delivered_at=row.delivered_at,
    )


def _destination_lines(session: Session, known: dict[str, str]) -> list[DestinationLine]:
    """One line per destination that anything was ever addressed to."""
    waits = DeliveryRow.state != DeliveryState.DELIVERED.value
    fails = and_(waits, DeliveryRow.last_error.is_not(None))
    counted = session.execute(
        select(
            DeliveryRow.destination,
            _count(waits),
            _count(fails),
            _count(DeliveryRow.state == DeliveryState.DELIVERED.value),
            func.min(case((waits, DeliveryRow.created_at))),
            func.min(case((waits, DeliveryRow.due_at))),
            func.max(DeliveryRow.delivered_at),
        )
        .group_by(DeliveryRow.destination)
        .order_by(DeliveryRow.destination)
    )
    errors = _last_errors(session, fails)
    since = _failing_since(session, fails)
    return [
        DestinationLine(
            name=name,
            address=known.get(name),
            waiting=waiting,
            failing=failing,
            delivered=delivered,
            oldest_waiting_at=oldest,
            next_try_at=next_try,
            failing_since=since.get(name),
            last_success_at=success,
            last_error=errors.get(name),
        )
        for name, waiting, failing, delivered, oldest, next_try, success in counted
    ]


def _count(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.count(case((condition, 1)))


def _last_errors(session: Session, fails: ColumnElement[bool]) -> dict[str, str]:
    """What each destination answered to the newest object that it failed: the shortest back-off, the latest try."""
    newest = select(func.max(DeliveryRow.id)).where(fails).group_by(DeliveryRow.destination)
    query = select(DeliveryRow.destination, DeliveryRow.last_error).where(DeliveryRow.id.in_(newest))
    return {name: error or "" for name, error in session.execute(query)}


def _failing_since(session: Session, fails: ColumnElement[bool]) -> dict[str, datetime]:
    """For each destination, the oldest failure that no later success has followed."""
    success = (
        select(DeliveryRow.destination, func.max(DeliveryRow.delivered_at).label("at"))
        .group_by(DeliveryRow.destination)
        .subquery()
    )
    query = (
        select(DeliveryRow.destination, func.min(DeliveryRow.created_at))
        .join(success, success.c.destination == DeliveryRow.destination)
        .where(fails, success.c.at.is_(None) | (DeliveryRow.created_at > success.c.at))
        .group_by(DeliveryRow.destination)
    )
    return dict(session.execute(query).all())
