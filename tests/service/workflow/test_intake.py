"""Instances become rows: once, in their own study, whoever sends them and however often."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

from sqlalchemy import func, select

from service.dicom.received import Stored
from service.domain.states import StudyState
from service.store.engine import Store
from service.store.tables import ConflictRow, InstanceRow, RefusalRow, SeriesRow, StudyRow
from service.workflow import intake
from tests.service.workflow import workbench
from tests.service.workflow.workbench import Clock, deliver, slices


def count(store: Store, table: type) -> int:
    with store.reading() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def study(store: Store, uid: str = "1.2.3") -> StudyRow:
    with store.reading() as session:
        return session.scalars(select(StudyRow).where(StudyRow.study_uid == uid)).one()


def test_a_batch_makes_a_study_its_series_and_its_instances(store: Store, clock: Clock) -> None:
    facts = slices(n=3) + slices(series="1.2.3.5", n=2) + slices("9.9", "9.9.1", n=1)
    assert deliver(store, facts, clock.now) == [Stored.NEW] * 6
    assert [count(store, table) for table in (StudyRow, SeriesRow, InstanceRow)] == [2, 3, 6]
    with store.reading() as session:
        counts = dict(session.execute(select(SeriesRow.series_uid, SeriesRow.instance_count)).all())
        kept = session.scalars(select(InstanceRow.facts).order_by(InstanceRow.id)).first()
    assert counts == {"1.2.3.4": 3, "1.2.3.5": 2, "9.9.1": 1}
    assert kept is not None
    assert type(facts[0]).from_json(kept) in facts
    assert study(store).state == StudyState.RECEIVING.value


def test_same_bytes_again_make_no_second_row(store: Store, clock: Clock) -> None:
    """Fault 13, first half; also twice in one batch."""
    one = slices(n=1)
    assert deliver(store, one * 2, clock.now) == [Stored.NEW, Stored.DUPLICATE]
    assert deliver(store, one, clock.advance(1)) == [Stored.DUPLICATE]
    assert count(store, InstanceRow) == 1
    assert count(store, ConflictRow) == 0


def test_other_bytes_under_the_same_uid_are_kept_and_shown_never_silent(store: Store, clock: Clock) -> None:
    """Fault 13, second half: the first copy stays, the other is a row of its own, once."""
    one = slices(n=1)
    deliver(store, one, clock.now, content="first")
    for _ in range(2):
        assert deliver(store, one, clock.advance(1), content="second") == [Stored.CONFLICT]
    assert deliver(store, one, clock.now, content="first") == [Stored.DUPLICATE]
    with store.reading() as session:
        conflict = session.scalars(select(ConflictRow)).one()
        instance = session.scalars(select(InstanceRow)).one()
    assert conflict.sha256 != instance.sha256
    assert (conflict.sop_instance_uid, conflict.study_uid) == (one[0].sop_instance_uid, "1.2.3")
    assert conflict.path != instance.path


def test_a_series_claimed_by_a_second_study_is_refused_and_leaves_no_row(store: Store, clock: Clock) -> None:
    deliver(store, slices(n=2), clock.now)
    stranger = [replace(one, study_uid="6.6.6", sop_instance_uid="6.6.6.1") for one in slices(n=1)]
    assert deliver(store, stranger, clock.now) == [Stored.SERIES_MISMATCH]
    assert count(store, StudyRow) == 1
    both = slices("7.7", "7.7.1", n=1) + [
        replace(one, study_uid="8.8", sop_instance_uid="8.8.1") for one in slices("7.7", "7.7.1", n=1)
    ]
    assert deliver(store, both, clock.now) == [Stored.NEW, Stored.SERIES_MISMATCH]
    assert count(store, StudyRow) == 2


def test_an_image_of_another_study_is_refused_whatever_its_series_and_leaves_no_row(store: Store, clock: Clock) -> None:
    """A copied study that kept its images' UIDs: it must neither seem empty nor spoil the first one."""
    deliver(store, slices(n=2), clock.now)
    copies = [replace(one, study_uid="6.6", series_uid="6.6.1") for one in slices(n=2)]
    assert deliver(store, copies, clock.advance(1), content="other") == [Stored.INSTANCE_MISMATCH] * 2
    assert (count(store, StudyRow), count(store, SeriesRow), count(store, ConflictRow)) == (1, 1, 0)
    fresh = slices("7.7", "7.7.1", n=1)
    both = fresh + [replace(one, study_uid="8.8", series_uid="8.8.1") for one in fresh]
    assert deliver(store, both, clock.now) == [Stored.NEW, Stored.INSTANCE_MISMATCH]


def test_the_limit_refuses_new_instances_only(store: Store, clock: Clock) -> None:
    facts = slices(n=4)
    answers = deliver(store, facts, clock.now, limit=3)
    assert answers == [Stored.NEW] * 3 + [Stored.STUDY_FULL]
    assert deliver(store, facts, clock.now, limit=3) == [Stored.DUPLICATE] * 3 + [Stored.STUDY_FULL]
    other = slices("9.9", "9.9.1", n=1)
    assert deliver(store, other, clock.now, limit=3) == [Stored.NEW]  # another study has its own limit
    assert count(store, InstanceRow) == 4


def test_a_new_instance_reopens_a_closed_study_and_a_duplicate_does_not(store: Store, clock: Clock) -> None:
    facts = slices(n=61)
    deliver(store, facts[:60], clock.now)
    workbench.close(store, clock.advance(31))
    assert study(store).state == StudyState.QUEUED.value
    deliver(store, facts[:60], clock.advance(1))
    assert study(store).state == StudyState.QUEUED.value
    late = clock.advance(1)
    deliver(store, facts, late)
    assert study(store).state == StudyState.RECEIVING.value
    assert study(store).last_received_at == late
    assert study(store).revision == 1


def test_two_listeners_may_receive_one_study_at_once(store: Store, clock: Clock) -> None:
    """Fault 14: every instance is there once, whoever was first; nobody deadlocks, nobody fails."""
    facts = slices(n=24)
    answers: list[Stored] = []
    errors: list[BaseException] = []
    start = threading.Barrier(3)

    def listener(own: list) -> None:
        try:
            start.wait()
            for at in range(0, len(own), 4):
                answers.extend(deliver(store, own[at : at + 4], clock.now))
        except BaseException as error:
            errors.append(error)

    orders = (facts, facts[::-1], facts[12:] + facts[:12])
    threads = [threading.Thread(target=listener, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(answers) == sorted([Stored.NEW] * 24 + [Stored.DUPLICATE] * 48)
    assert count(store, StudyRow) == 1
    with store.reading() as session:
        assert session.scalars(select(SeriesRow.instance_count)).all() == [24]


def test_hostile_text_and_numbers_do_not_break_the_batch(store: Store, clock: Clock) -> None:
    """NUL, half a surrogate pair, a novel and a NaN: PostgreSQL takes none of them as they are."""
    [plain] = slices(n=1)
    hostile = replace(
        plain,
        patient_name="DOE\x00JOHN\ud800",
        patient_id="x" * 5000,
        study_description="a\x00b",
        series_number=2**40,
        kvp=math.nan,
        position_lps_mm=(0.0, math.inf, 1.0),
        patient_age_years=math.nan,
    )
    assert deliver(store, [hostile], clock.now) == [Stored.NEW]
    kept = study(store)
    assert kept.patient_name is not None
    assert kept.patient_name.startswith("DOE JOHN")
    assert len(kept.patient_id or "") == 255
    with store.reading() as session:
        stored = session.scalars(select(InstanceRow.facts)).one()
    read = type(plain).from_json(stored)
    assert (read.kvp, read.position_lps_mm, read.patient_age_years) == (None, None, None)
    assert read.convolution_kernel == plain.convolution_kernel


def test_the_door_commits_and_keeps_refusals(store: Store, clock: Clock) -> None:
    settings = workbench.settings(workbench.ROOT, max_instances_per_study=1)
    door = intake.Door(store, settings)
    batch = [workbench.received(one, clock.now) for one in slices(n=2)]
    assert door.commit(batch) == [Stored.NEW, Stored.STUDY_FULL]
    door.refuse(
        at=clock.now,
        kind="instance",
        code="STUDY_FULL",
        text="more than 1 instance\x00",
        calling_ae="A" * 100,
        peer_address="10.0.0.1",
        sop_class_uid=None,
        status=0xA700,
    )
    with store.reading() as session:
        row = session.scalars(select(RefusalRow)).one()
    assert (row.code, row.status, len(row.calling_ae or "")) == ("STUDY_FULL", 0xA700, 64)
