"""The outbox as people may read it, on both databases."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from service.domain.states import DeliveryState, ReportState
from service.settings import Destination
from service.store.engine import Store
from service.store.tables import DeliveryRow, JobRow, ReportRow, ResultRow, SeriesRow, StudyRow
from service.workflow import delivery, reading
from service.workflow.reading import Flow, Outgoing
from tests.service.workflow.workbench import START

PACS = Destination(name="pacs", url="dicom://PACS@10.0.0.5:104")
ARCHIVE = Destination(name="archive", url="https://us:secret@archive.example/dicom-web?key=secret")
REFUSED = "0xA700: out of resources"


def at(minutes: float) -> datetime:
    return START + timedelta(minutes=minutes)


def promised(store: Store, uid: str = "1.2", *, superseded: bool = False, kinds: str = "SR") -> list[int]:
    """One result with its objects; the objects' row ids."""
    with store.transaction() as session:
        study = StudyRow(study_uid=uid, first_received_at=START, last_received_at=START)
        series = SeriesRow(series_uid=f"{uid}.1", study=study)
        session.add_all([study, series])
        session.flush()
        job = JobRow(kind="screen", key=uid, study_id=study.id, series_id=series.id, revision=1, created_at=START)
        session.add(job)
        session.flush()
        result = ResultRow(
            study_id=study.id,
            series_id=series.id,
            job_id=job.id,
            revision=1,
            attempt=1,
            superseded=superseded,
            document={},
            category="refer",
            created_at=START,
        )
        result.reports = [ReportRow(kind=kind, due_at=START, created_at=START) for kind in kinds.split()]
        session.add(result)
        session.flush()
        return [report.id for report in result.reports]


def address(store: Store, report_id: int, destination: str, created_at: datetime, **more: Any) -> int:
    """One delivery of a made object; its row id."""
    known = {"state": "waiting", "due_at": created_at, **more}
    with store.transaction() as session:
        session.get_one(ReportRow, report_id).state = ReportState.MADE.value
        row = DeliveryRow(report_id=report_id, destination=destination, created_at=created_at, **known)
        session.add(row)
        session.flush()
        return row.id


def line(store: Store, name: str = "pacs", *destinations: Destination) -> reading.DestinationLine:
    with store.reading() as session:
        found = reading.outbox(session, destinations or (PACS,)).destinations
    return next(one for one in found if one.name == name)


def test_destination_that_nothing_was_addressed_to(store: Store) -> None:
    assert line(store) == reading.DestinationLine("pacs", "dicom://PACS@10.0.0.5:104")
    assert line(store).flow is Flow.UNUSED


def test_destination_is_clear_then_busy_then_failing(store: Store) -> None:
    first, second, third = promised(store, "1.2", kinds="SR SEG OTHER")
    address(store, first, "pacs", at(0), state="delivered", delivered_at=at(1))
    assert line(store).flow is Flow.CLEAR
    address(store, second, "pacs", at(2), due_at=at(2))
    busy = line(store)
    assert (busy.flow, busy.waiting, busy.failing) == (Flow.BUSY, 1, 0)
    address(store, third, "pacs", at(3), due_at=at(9), attempts=2, last_error=REFUSED)
    failing = line(store)
    assert (failing.flow, failing.waiting, failing.failing) == (Flow.FAILING, 2, 1)
    assert (failing.oldest_waiting_at, failing.next_try_at) == (at(2), at(2))
    assert (failing.failing_since, failing.last_success_at) == (at(3), at(1))
    assert failing.last_error == REFUSED


def test_destination_that_took_later_objects_is_not_away(store: Store) -> None:
    first, second = promised(store, "1.2", kinds="SR SEG")
    address(store, first, "pacs", at(0), attempts=3, last_error=REFUSED)
    address(store, second, "pacs", at(1), state="delivered", delivered_at=at(2))
    found = line(store)
    assert (found.flow, found.failing, found.failing_since) == (Flow.REFUSING, 1, None)


def test_remark_of_a_delivered_object_is_no_failure(store: Store) -> None:
    (only,) = promised(store)
    address(store, only, "pacs", at(0), state="delivered", delivered_at=at(1), last_error="warning 0xB000")
    found = line(store)
    assert (found.flow, found.failing, found.last_error) == (Flow.CLEAR, 0, None)


def test_last_error_is_that_of_the_newest_failure(store: Store) -> None:
    first, second = promised(store, "1.2", kinds="SR SEG")
    address(store, first, "pacs", at(0), attempts=9, last_error="yesterday's")
    address(store, second, "pacs", at(5), attempts=1, last_error="today's")
    assert line(store).last_error == "today's"


def test_object_sent_again_fails_since_then_and_not_since_it_was_made(store: Store) -> None:
    (only,) = promised(store)
    sent = address(store, only, "pacs", at(0), state="delivered", delivered_at=at(1))
    with store.transaction() as session:
        delivery.resend(session, sent, actor="anna", now=at(60))
    with store.transaction() as session:
        session.get_one(DeliveryRow, sent).last_error = REFUSED
    assert line(store).failing_since == at(60)


def test_removed_destination_shows_only_while_something_waits_for_it(store: Store) -> None:
    first, second = promised(store, "1.2", kinds="SR SEG")
    address(store, first, "gone", at(0), state="delivered", delivered_at=at(1))
    with store.reading() as session:
        assert [one.name for one in reading.outbox(session, (PACS,)).destinations] == ["pacs"]
    address(store, second, "gone", at(2))
    found = line(store, "gone")
    assert (found.address, found.waiting) == (None, 1)


def test_destinations_stand_in_the_order_of_the_settings(store: Store) -> None:
    with store.reading() as session:
        found = reading.outbox(session, (PACS, ARCHIVE)).destinations
    assert [one.name for one in found] == ["pacs", "archive"]
    assert found[1].address == "https://archive.example/dicom-web"


def test_superseded_result_owes_nobody_an_object(store: Store) -> None:
    promised(store, "1.2", superseded=True, kinds="SR SEG")
    (owed,) = promised(store, "1.3")
    with store.reading() as session:
        assert reading.outbox(session, ()).to_make == 1
    with store.transaction() as session:
        session.get_one(ReportRow, owed).state = ReportState.FAILED.value
    with store.reading() as session:
        assert reading.outbox(session, ()).not_made == 1
        assert reading.gauges(session).reports == {"failed": 1}


WAITING = reading.DeliveryLine(1, "pacs", DeliveryState.WAITING, 0, START, None, START, None)
DELIVERED = replace(WAITING, state=DeliveryState.DELIVERED, delivered_at=START)
FAILING = replace(WAITING, attempts=2, last_error=REFUSED)
MADE = reading.ReportLine(1, 1, "SR", ReportState.MADE, 1, START, None, "2.25.1", START, START, ())


@pytest.mark.parametrize(
    ("reports", "told"),
    [
        ([], None),
        ([MADE], Outgoing.KEPT),
        ([replace(MADE, deliveries=(DELIVERED,))], Outgoing.DELIVERED),
        ([replace(MADE, deliveries=(DELIVERED,)), replace(MADE, deliveries=(WAITING,))], Outgoing.ON_ITS_WAY),
        ([replace(MADE, deliveries=(DELIVERED,)), replace(MADE, state=ReportState.WAITING)], Outgoing.TO_MAKE),
        ([replace(MADE, deliveries=(DELIVERED, FAILING))], Outgoing.FAILING),
        ([replace(MADE, deliveries=(replace(FAILING, state=DeliveryState.SENDING),))], Outgoing.FAILING),
        ([replace(MADE, deliveries=(FAILING,)), replace(MADE, state=ReportState.FAILED)], Outgoing.NOT_MADE),
        ([replace(MADE, deliveries=(DELIVERED, replace(FAILING, destination="gone")))], Outgoing.DELIVERED),
    ],
)
def test_how_far_a_result_has_come_is_the_worst_of_its_objects(
    reports: list[reading.ReportLine], told: Outgoing | None
) -> None:
    assert reading.outgoing(reports, (PACS,)) is told


def test_object_stands_beside_every_destination() -> None:
    report = replace(MADE, deliveries=(replace(WAITING, destination="gone"), DELIVERED))
    found = reading.addresses(report, (ARCHIVE, PACS))
    assert [(one.name, one.address is None) for one in found] == [("archive", False), ("pacs", False), ("gone", True)]
    assert [one.delivery for one in found] == [None, DELIVERED, report.deliveries[0]]
