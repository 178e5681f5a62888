"""A job's life by the clock: lease, token, attempts, quarantine, bell."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from sqlalchemy import select

from service.domain.states import JobState, StudyState
from service.store.engine import Store
from service.store.tables import AuditRow, JobRow, StudyRow
from service.workflow import rerun, work
from service.workflow.work import Claim
from tests.service.workflow.workbench import Clock, claim, queued, record


def job(store: Store, job_id: int) -> JobRow:
    with store.reading() as session:
        return session.get_one(JobRow, job_id)


def study_state(store: Store) -> str:
    with store.reading() as session:
        return session.scalars(select(StudyRow.state)).one()


def fail(store: Store, held: Claim, clock: Clock, attempts: int = 3) -> JobState:
    with store.transaction() as session:
        return work.fail(session, held, "it broke\x00", clock.now, attempts)


def reconcile(store: Store, clock: Clock, attempts: int = 3) -> list[int]:
    with store.transaction() as session:
        return work.reconcile(session, clock.now, attempts)


def due(store: Store, clock: Clock) -> list[int]:
    with store.reading() as session:
        return work.due_for_bell(session, clock.now, 30)


def beat(store: Store, held: Claim, clock: Clock) -> bool:
    with store.transaction() as session:
        return work.heartbeat(session, held, clock.now, 60)


def claimed(store: Store, job_id: int, clock: Clock, worker: str = "w1") -> Claim:
    held = claim(store, job_id, clock.now, worker)
    assert held is not None
    return held


def test_a_second_copy_of_the_message_is_refused_by_the_lease(store: Store, clock: Clock) -> None:
    """Fault 2."""
    job_id = queued(store, clock)
    held = claimed(store, job_id, clock)
    assert (held.attempt, held.study_uid, held.series_uid, held.revision) == (1, "1.2.3", "1.2.3.4", 1)
    assert claim(store, job_id, clock.now, "w2") is None
    clock.advance(59)
    assert beat(store, held, clock)
    clock.advance(59)  # longer than the first lease: the heartbeat holds it
    assert reconcile(store, clock) == []
    assert claim(store, job_id, clock.now, "w2") is None
    record(store, held, clock.now)
    assert claim(store, job_id, clock.now, "w2") is None
    assert claim(store, 4711, clock.now) is None


def test_of_many_workers_one_gets_the_job(store: Store, clock: Clock) -> None:
    job_id = queued(store, clock)
    start = threading.Barrier(4)
    won: list[Claim | None] = []

    def worker(name: str) -> None:
        start.wait()
        won.append(claim(store, job_id, clock.now, name))

    threads = [threading.Thread(target=worker, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([held for held in won if held]) == 1
    assert job(store, job_id).attempts == 1


@pytest.mark.parametrize("write", ["record", "fail", "release", "finish", "heartbeat"])
def test_a_worker_paused_past_its_lease_writes_nothing(store: Store, clock: Clock, write: str) -> None:
    """Fault 3: whatever it tries when it wakes; even before anyone else has taken the job."""
    job_id = queued(store, clock)
    stale = claimed(store, job_id, clock)
    clock.advance(61)
    assert reconcile(store, clock) == [job_id]
    for taken_over in (False, True):
        if taken_over:
            claimed(store, job_id, clock, "w2")
        before = job(store, job_id)
        attempts: dict[str, Callable[[], object]] = {
            "record": lambda: record(store, stale, clock.now),
            "fail": lambda: fail(store, stale, clock),
            "release": lambda: _release(store, stale),
            "finish": lambda: _finish(store, stale, clock),
        }
        if write == "heartbeat":
            assert not beat(store, stale, clock)
        else:
            with pytest.raises(work.StaleToken):
                attempts[write]()
        after = job(store, job_id)
        assert (after.state, after.token, after.attempts, after.worker) == (
            before.state,
            before.token,
            before.attempts,
            before.worker,
        )


def test_an_expired_lease_gives_the_job_its_next_attempt(store: Store, clock: Clock) -> None:
    job_id = queued(store, clock)
    claimed(store, job_id, clock)
    clock.advance(61)
    assert reconcile(store, clock) == [job_id]
    waiting = job(store, job_id)
    assert (waiting.state, waiting.attempts, waiting.lease_until) == ("waiting", 1, None)
    assert "lease ran out" in (waiting.last_error or "")
    assert due(store, clock) == [job_id]  # rung at once
    assert claimed(store, job_id, clock, "w2").attempt == 2


def test_a_deadline_ends_a_job_whose_heart_still_beats(store: Store, clock: Clock) -> None:
    job_id = queued(store, clock)
    held = claimed(store, job_id, clock)
    for _ in range(12):
        clock.advance(50)
        assert beat(store, held, clock)
    clock.advance(1)
    assert reconcile(store, clock) == [job_id]
    assert not beat(store, held, clock)
    assert "deadline" in (job(store, job_id).last_error or "")


@pytest.mark.parametrize("how", ["error", "crash"])
def test_after_n_attempts_the_study_is_quarantined_and_a_person_may_retry(store: Store, clock: Clock, how: str) -> None:
    """Fault 4, by the clock: with its reason, visible, retryable."""
    job_id = queued(store, clock)
    other = queued(store, clock, "9.9.9")
    for attempt in (1, 2, 3):
        held = claimed(store, job_id, clock)
        assert held.attempt == attempt
        if how == "error":
            expected = JobState.WAITING if attempt < 3 else JobState.QUARANTINED
            assert fail(store, held, clock) is expected
        else:
            clock.advance(61)
            reconcile(store, clock)
    assert claim(store, job_id, clock.now) is None
    ended = job(store, job_id)
    assert (ended.state, ended.attempts) == ("quarantined", 3)
    assert ended.last_error
    with store.reading() as session:
        states = dict(session.execute(select(StudyRow.study_uid, StudyRow.state)).all())
    assert states == {"1.2.3": StudyState.QUARANTINED.value, "9.9.9": StudyState.QUEUED.value}
    assert job_id not in due(store, clock)
    record(store, claimed(store, other, clock), clock.now)  # the queue flows
    with store.transaction() as session:
        assert rerun.rerun(session, "1.2.3", actor="dr", now=clock.now, peer_address="10.0.0.1") == job_id
    assert due(store, clock) == [job_id]
    assert claimed(store, job_id, clock).attempt == 1
    with store.reading() as session:
        audit = session.scalars(select(AuditRow).where(AuditRow.action == "retry")).one()
    assert (audit.actor, audit.subject, audit.peer_address) == ("dr", "1.2.3", "10.0.0.1")


def test_only_quarantine_can_be_retried(store: Store, clock: Clock) -> None:
    job_id = queued(store, clock)
    with pytest.raises(work.NotRetryable), store.transaction() as session:
        work.retry(session, job_id, actor="dr", now=clock.now)


def test_a_released_job_waits_at_once_and_the_attempt_does_not_count(store: Store, clock: Clock) -> None:
    job_id = queued(store, clock)
    for _ in range(5):  # more often than there are attempts
        held = claimed(store, job_id, clock)
        assert held.attempt == 1
        _release(store, held)
        assert due(store, clock) == [job_id]
    assert job(store, job_id).token > 5


def test_an_error_waits_a_while_before_the_next_ring(store: Store, clock: Clock) -> None:
    job_id = queued(store, clock)
    fail(store, claimed(store, job_id, clock), clock)
    assert due(store, clock) == []
    clock.advance(62)
    assert due(store, clock) == [job_id]
    assert job(store, job_id).last_error == "it broke "


def test_the_bell_is_due_until_rung_and_again_ever_more_rarely(store: Store, clock: Clock) -> None:
    """Fault 6: what was committed and never published is found; and a long queue does not flood the broker."""
    job_id = queued(store, clock)
    rings = 0
    for _ in range(3600):
        if due(store, clock):
            rings += 1
            with store.transaction() as session:
                work.rung(session, job_id, clock.now)
            assert due(store, clock) == []
        clock.advance(1)
    assert 3600 / (8 * 30) <= rings <= 3600 / (8 * 30) + 6
    claimed(store, job_id, clock)
    clock.advance(59)
    assert due(store, clock) == []


def _release(store: Store, held: Claim) -> None:
    with store.transaction() as session:
        work.release(session, held)


def _finish(store: Store, held: Claim, clock: Clock) -> None:
    with store.transaction() as session:
        work.finish(session, held, clock.now)
