"""The outbox's rows: claimed by one, never lost, never sent twice after success, sent again when a person asks."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import select

from service.store.engine import Store
from service.store.tables import AuditRow, DeliveryRow, ReportRow
from service.workflow import delivery
from service.workflow.delivery import NotResendable, Parcel
from tests.service.workflow.outbox import STUDY, Outbox
from tests.service.workflow.workbench import Clock

LEASE = 100.0
RETRY = {"retry_seconds": 10.0, "ceiling_seconds": 3600.0}


@pytest.fixture
def outbox(store: Store, tmp_path: Path, clock: Clock) -> Outbox:
    """Two results for two destinations; their objects only claim to be made: their bytes play no part here."""
    outbox = Outbox(store, tmp_path, clock)
    for study in ("1.1", STUDY):
        outbox.result(study)
        addressed(outbox)
    return outbox


def addressed(outbox: Outbox) -> None:
    with outbox.store.transaction() as session:
        for row in session.scalars(select(ReportRow).where(ReportRow.state == "waiting").order_by(ReportRow.id)):
            row.state, row.path = "made", f"{row.result_id}/{row.kind.lower()}.dcm"
            row.sop_instance_uid, row.sha256 = f"9.{row.id}", "0" * 64
            delivery.open_deliveries(session, row, ["pacs", "web"], outbox.clock.now)


def claim(outbox: Outbox, destination: str = "pacs", limit: int = delivery.BATCH) -> list[Parcel]:
    with outbox.store.transaction() as session:
        return delivery.claim(session, destination, now=outbox.clock.now, lease_seconds=LEASE, limit=limit)


def deliver(outbox: Outbox, parcel: Parcel, remark: str | None = None) -> bool:
    with outbox.store.transaction() as session:
        return delivery.delivered(session, parcel, outbox.clock.now, remark)


def fail(outbox: Outbox, parcel: Parcel, error: str = "no association") -> bool:
    with outbox.store.transaction() as session:
        return delivery.failed(session, parcel, error, outbox.clock.now, **RETRY)


def row(outbox: Outbox, parcel: Parcel) -> DeliveryRow:
    with outbox.store.reading() as session:
        return session.get_one(DeliveryRow, parcel.delivery_id)


def is_due(outbox: Outbox, destination: str = "pacs") -> bool:
    with outbox.store.reading() as session:
        return delivery.is_due(session, destination, outbox.clock.now)


# One courier at a time


def test_a_claim_takes_one_destinations_objects_oldest_first_segmentation_first(outbox: Outbox) -> None:
    taken = claim(outbox)
    assert [parcel.kind for parcel in taken] == ["SEG", "SR", "SEG", "SR"]
    results = [int(parcel.path.partition("/")[0]) for parcel in taken]
    assert results == sorted(results)
    assert [parcel.attempt for parcel in taken] == [1, 1, 1, 1]
    assert outbox.states("pacs") == ["sending"] * 4
    assert outbox.states("web") == ["waiting"] * 4
    assert claim(outbox) == []
    assert not is_due(outbox)
    assert is_due(outbox, "web")


def test_two_at_once_never_take_the_same(outbox: Outbox) -> None:
    taken: list[list[Parcel]] = []
    start = threading.Barrier(4)

    def take() -> None:
        start.wait()
        taken.append(claim(outbox))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [parcel.delivery_id for batch in taken for parcel in batch]
    assert len(taken) == 4
    assert len(ids) == len(set(ids)) == 4


def test_a_dead_couriers_objects_are_due_when_its_lease_runs_out(outbox: Outbox) -> None:
    dead = claim(outbox)
    outbox.clock.advance(LEASE - 1)
    assert not is_due(outbox)
    outbox.clock.advance(1)
    assert is_due(outbox)
    again = claim(outbox)
    assert [parcel.delivery_id for parcel in again] == [parcel.delivery_id for parcel in dead]
    assert [parcel.attempt for parcel in again] == [2, 2, 2, 2]
    assert not deliver(outbox, dead[0])  # it was only slow: its word no longer counts
    assert not fail(outbox, dead[1])
    assert outbox.states("pacs") == ["sending"] * 4
    assert deliver(outbox, again[0])


def test_a_renewed_lease_holds(outbox: Outbox) -> None:
    first, *rest = claim(outbox)
    outbox.clock.advance(LEASE - 1)
    with outbox.store.transaction() as session:
        assert delivery.delivered(session, first, outbox.clock.now)
        delivery.renew(session, rest, outbox.clock.now, LEASE)
    outbox.clock.advance(LEASE - 1)
    assert claim(outbox) == []


# Success and failure


def test_what_was_delivered_is_never_sent_again(outbox: Outbox) -> None:
    for parcel in claim(outbox):
        assert deliver(outbox, parcel)
    assert outbox.states("pacs") == ["delivered"] * 4
    outbox.clock.advance(10 * 365 * 24 * 3600)
    assert not is_due(outbox)
    assert claim(outbox) == []


def test_a_remark_is_kept_where_errors_stand(outbox: Outbox) -> None:
    first, second, *_ = claim(outbox)
    fail(outbox, second)
    assert deliver(outbox, first, "stored with warning 0xB000: coerced")
    found = row(outbox, first)
    assert (found.state, found.last_error, found.attempts) == (
        "delivered",
        "stored with warning 0xB000: coerced",
        0,
    )
    assert found.delivered_at == outbox.clock.now


def test_the_back_off_doubles_up_to_the_ceiling_and_never_ends(outbox: Outbox) -> None:
    pauses = []
    parcel = claim(outbox, limit=1)[0]
    for _ in range(40):
        assert fail(outbox, parcel)
        waiting = row(outbox, parcel)
        assert waiting.state == "waiting"
        pauses.append((waiting.due_at - outbox.clock.now).total_seconds())
        outbox.clock.now = waiting.due_at
        (parcel,) = (one for one in claim(outbox) if one.delivery_id == parcel.delivery_id)
    assert pauses[:10] == [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600]
    assert set(pauses[9:]) == {3600}
    assert deliver(outbox, parcel)
    assert row(outbox, parcel).last_error is None


def test_an_error_is_kept_printable_and_short(outbox: Outbox) -> None:
    first, second, *_ = claim(outbox)
    fail(outbox, first, "no\x00 way\r\n\x1b[31m red" + "x" * 4000)
    fail(outbox, second, "")
    text = row(outbox, first).last_error or ""
    assert text.startswith("no way [31m redxxx")
    assert text.isprintable()
    assert len(text) == 500
    assert row(outbox, second).last_error == ""


def test_one_that_is_refused_holds_up_no_other(outbox: Outbox) -> None:
    bad, *_ = claim(outbox, limit=1)
    fail(outbox, bad, "refused with status 0xA900")
    others = claim(outbox)
    assert len(others) == 3 + 1  # its report takes it along once, as its reader needs it
    for parcel in others:
        if parcel.delivery_id == bad.delivery_id:
            fail(outbox, parcel, "refused with status 0xA900")
        else:
            deliver(outbox, parcel)
    assert sorted(outbox.states("pacs")) == ["delivered", "delivered", "delivered", "waiting"]


def test_many_that_are_refused_do_not_crowd_out_a_new_one(outbox: Outbox) -> None:
    """The longest waiting come first, so what was just refused stands behind what was not tried yet."""
    for _ in range(3):
        for parcel in claim(outbox, limit=2):
            fail(outbox, parcel)
        outbox.clock.advance(3600)
    assert min(found.attempts for _, found in outbox.deliveries("pacs")) >= 1


def test_a_report_takes_its_waiting_segmentation_along(outbox: Outbox) -> None:
    """While a destination was down both failed, at different times; when it is back they go together, in order."""
    seg, *_ = claim(outbox, limit=1)
    fail(outbox, seg)
    outbox.clock.advance(1)
    taken = claim(outbox, limit=1)
    assert [parcel.kind for parcel in taken] == ["SEG", "SR"]
    assert taken[0].delivery_id == seg.delivery_id


def test_what_was_not_tried_is_given_back_at_once(outbox: Outbox) -> None:
    with outbox.store.transaction() as session:
        parcels = delivery.claim(session, "pacs", now=outbox.clock.now, lease_seconds=LEASE)
        delivery.release(session, parcels, outbox.clock.now)
    assert outbox.states("pacs") == ["waiting"] * 4
    assert [parcel.attempt for parcel in claim(outbox)] == [1, 1, 1, 1]


# When a person asks


@pytest.mark.parametrize("state", ["delivered", "waiting"])
def test_a_person_sends_it_again(outbox: Outbox, state: str) -> None:
    parcel = claim(outbox, limit=1)[0]
    for _ in range(3):
        fail(outbox, parcel)
        outbox.clock.advance(3600)
        (parcel,) = (one for one in claim(outbox) if one.delivery_id == parcel.delivery_id)
    assert deliver(outbox, parcel) if state == "delivered" else fail(outbox, parcel)
    with outbox.store.transaction() as session:
        delivery.resend(session, parcel.delivery_id, actor="Dr. A", now=outbox.clock.now, peer_address="10.0.0.9")
    found = row(outbox, parcel)
    assert (found.state, found.attempts, found.due_at) == ("waiting", 0, outbox.clock.now)
    assert (found.last_error, found.delivered_at) == (None, None)
    assert parcel.delivery_id in [one.delivery_id for one in claim(outbox)]
    with outbox.store.reading() as session:
        noted = session.scalars(select(AuditRow).where(AuditRow.action == "delivery.resend")).one()
    assert (noted.actor, noted.subject, noted.peer_address) == ("Dr. A", "1.1", "10.0.0.9")
    assert noted.detail == {
        "delivery": parcel.delivery_id,
        "destination": "pacs",
        "kind": "SEG",
        "sop_instance_uid": parcel.sop_instance_uid,
    }


def test_what_is_being_sent_cannot_be_sent_again(outbox: Outbox) -> None:
    parcel = claim(outbox, limit=1)[0]
    with outbox.store.transaction() as session:
        with pytest.raises(NotResendable, match="at this moment"):
            delivery.resend(session, parcel.delivery_id, actor="Dr. A", now=outbox.clock.now)
        with pytest.raises(NotResendable, match="no such delivery"):
            delivery.resend(session, 10_000, actor="Dr. A", now=outbox.clock.now)
    with outbox.store.reading() as session:
        assert session.scalars(select(AuditRow).where(AuditRow.action == "delivery.resend")).all() == []
    outbox.clock.advance(LEASE)  # its courier has died
    with outbox.store.transaction() as session:
        delivery.resend(session, parcel.delivery_id, actor="Dr. A", now=outbox.clock.now)
    assert not deliver(outbox, parcel)
    assert row(outbox, parcel).state == "waiting"


def test_a_destination_of_later_gets_what_a_person_sends_it(outbox: Outbox) -> None:
    made = row(outbox, claim(outbox, limit=1)[0]).report_id
    assert not is_due(outbox, "new")
    with outbox.store.transaction() as session:
        opened = delivery.send_to(session, made, "new", actor="Dr. A", now=outbox.clock.now)
    (parcel,) = claim(outbox, "new")
    assert parcel.delivery_id == opened
    assert deliver(outbox, parcel)
    with outbox.store.transaction() as session:
        assert delivery.send_to(session, made, "new", actor="Dr. A", now=outbox.clock.now) == opened
    assert [one.delivery_id for one in claim(outbox, "new")] == [opened]
    with outbox.store.reading() as session:
        actions = session.scalars(select(AuditRow.action).where(AuditRow.actor == "Dr. A")).all()
    assert sorted(actions) == ["delivery.resend", "delivery.send"]


def test_only_what_was_made_can_be_sent(outbox: Outbox) -> None:
    outbox.result("7.7")
    with outbox.store.transaction() as session:
        for report_id in (outbox.report("SR").id, 10_000):
            with pytest.raises(NotResendable, match="has not been made"):
                delivery.send_to(session, report_id, "pacs", actor="Dr. A", now=outbox.clock.now)
