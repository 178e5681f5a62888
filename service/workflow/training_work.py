"""The life of a training run at the worker: claimed, beaten for, watched, finished; and taken up again.

As with screening jobs (`service.workflow.work`) the database is the truth: a claim raises the fencing token, every
later write is conditional on it, and a run whose worker is gone waits for the next one. What a run has done lies in
its folder, so that another attempt goes on instead of beginning anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto
from typing import Any

from sqlalchemy import Update, case, or_, select, update
from sqlalchemy.orm import Session

from service.domain.states import RunStage, RunState
from service.store.moves import moved
from service.store.tables import AuditRow, TrainingEpochRow, TrainingRunRow
from service.store.upsert import insert_missing
from service.workflow import training
from service.workflow.training import Lost, Outcome
from service.workflow.work import SLOWEST_RERING, StaleToken, kept

ACTOR = "osteogate"
TIME_LIMIT = "the time limit passed (OSTEOGATE_TRAINING_DEADLINE_SECONDS); a person may resume the run"


@dataclass(frozen=True, slots=True)
class RunClaim:
    """One worker's right to one run until the lease runs out; `token` fences every write."""

    run_id: int
    token: int
    attempt: int
    worker: str
    manifest: Mapping[str, Any]
    manifest_sha256: str
    created_at: datetime
    deadline_at: datetime


class Grip(Enum):
    """What a heartbeat learns."""

    HELD = auto()
    CANCEL = auto()  # held, and a person wants it to stop
    LOST = auto()


def claim(
    session: Session,
    run_id: int,
    *,
    worker: str,
    now: datetime,
    lease_seconds: float,
    deadline_seconds: float,
    max_attempts: int,
) -> RunClaim | None:
    """Take a waiting run, or None: another worker has it, or it has ended. The first claim sets the time limit."""
    first = now + timedelta(seconds=deadline_seconds)
    taken = moved(
        session,
        update(TrainingRunRow)
        .where(
            TrainingRunRow.id == run_id,
            TrainingRunRow.state == RunState.WAITING.value,
            TrainingRunRow.attempts < max_attempts,
        )
        .values(
            state=RunState.RUNNING.value,
            attempts=TrainingRunRow.attempts + 1,
            token=TrainingRunRow.token + 1,
            worker=worker[:128],
            lease_until=now + timedelta(seconds=lease_seconds),
            deadline_at=case((TrainingRunRow.deadline_at.is_(None), first), else_=TrainingRunRow.deadline_at),
            started_at=case((TrainingRunRow.started_at.is_(None), now), else_=TrainingRunRow.started_at),
            last_error=None,
        ),
    )
    if not taken:
        return None
    row = _fresh(session, run_id)
    assert row.deadline_at is not None
    return RunClaim(
        row.id,
        row.token,
        row.attempts,
        worker,
        row.manifest,
        row.manifest_sha256,
        row.created_at,
        row.deadline_at,
    )


def heartbeat(session: Session, held: RunClaim, now: datetime, lease_seconds: float) -> Grip:
    """Lengthen the lease, and hear whether the run shall stop."""
    if not moved(session, _owned(held).values(lease_until=now + timedelta(seconds=lease_seconds))):
        return Grip.LOST
    asked = session.scalar(select(TrainingRunRow.cancel_asked_at).where(TrainingRunRow.id == held.run_id))
    return Grip.HELD if asked is None else Grip.CANCEL


def progress(
    session: Session,
    held: RunClaim,
    stage: RunStage,
    values: Mapping[str, Any],
    epochs: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Tell how far the run is; epochs that are known already change nothing. StaleToken when it is not ours."""
    _must_move(session, held, _owned(held).values(stage=stage.value, progress=dict(values)))
    rows = [{"run_id": held.run_id, **epoch} for epoch in epochs]
    if rows:
        insert_missing(session, TrainingEpochRow, rows, ("run_id", "network", "epoch"))


def note_lost(session: Session, held: RunClaim, lost: Sequence[Lost]) -> None:
    """Tell which studies and levels of the manifest could not be cut out. StaleToken when the run is not ours."""
    told = [{"study_uid": one.study_uid, "level": one.level, "code": one.code, "text": one.text} for one in lost]
    _must_move(session, held, _owned(held).values(lost=told))


def finish(session: Session, held: RunClaim, outcome: Outcome, now: datetime) -> None:
    """The run has its package and its reports. StaleToken when it is not ours."""
    _must_move(
        session,
        held,
        _owned(held).values(
            **_ended(RunState.FINISHED, now),
            stage=None,
            package_path=outcome.package_path,
            package_sha256=outcome.package_sha256,
            candidate_report=outcome.candidate_report,
            champion_report=outcome.champion_report,
            champion=outcome.champion,
            champion_sha256=outcome.champion_sha256,
        ),
    )
    training.hand_over(session, held.run_id, outcome)


def stop(session: Session, held: RunClaim, now: datetime) -> None:
    """The run stopped because a person asked for it. StaleToken when it is not ours."""
    _must_move(session, held, _owned(held).values(**_ended(RunState.CANCELLED, now)))


def fail(session: Session, held: RunClaim, error: str, now: datetime, max_attempts: int) -> RunState:
    """Give the run back after an error: it waits for its next attempt, or has failed after the last one."""
    if held.attempt < max_attempts:
        again = {"state": RunState.WAITING.value, "token": TrainingRunRow.token + 1, "lease_until": None}
        _must_move(session, held, _owned(held).values(**again, last_error=kept(error), rung_at=now))
        return RunState.WAITING
    give_up(session, held, error, now)
    return RunState.FAILED


def give_up(session: Session, held: RunClaim, error: str, now: datetime) -> None:
    """The run has failed, and another attempt would say the same. StaleToken when it is not ours."""
    _must_move(session, held, _owned(held).values(**_ended(RunState.FAILED, now), last_error=kept(error)))
    _audit_failed(session, held.run_id, now, error)


def release(session: Session, held: RunClaim) -> None:
    """Give an unfinished run back at a shutdown: it waits at once, and the attempt does not count."""
    _must_move(
        session,
        held,
        _owned(held).values(
            state=RunState.WAITING.value,
            token=TrainingRunRow.token + 1,
            attempts=TrainingRunRow.attempts - 1,
            lease_until=None,
            rung_at=None,
        ),
    )


def reconcile(session: Session, now: datetime, max_attempts: int) -> list[int]:
    """Take back every run whose lease or time limit has passed; the ids of those runs.

    One that a person wanted to stop has stopped; one past its time limit or its last attempt has failed.
    """
    overdue = or_(TrainingRunRow.lease_until < now, TrainingRunRow.deadline_at < now)
    running = TrainingRunRow.state == RunState.RUNNING.value
    taken = []
    for run_id in session.scalars(select(TrainingRunRow.id).where(running, overdue)).all():
        back = update(TrainingRunRow).where(TrainingRunRow.id == run_id, running, overdue)
        if moved(session, back.values(token=TrainingRunRow.token + 1, lease_until=None, rung_at=None)):
            _put_back(session, _fresh(session, run_id), now, max_attempts)
            taken.append(run_id)
    return taken


def _put_back(session: Session, row: TrainingRunRow, now: datetime, max_attempts: int) -> None:
    late = row.deadline_at is not None and row.deadline_at < now
    gone = f"attempt {row.attempts} on {row.worker}: its lease ran out (the worker died, hung or was cut off)"
    row.last_error = TIME_LIMIT if late else gone
    if row.cancel_asked_at is not None:
        state = RunState.CANCELLED
    elif late or row.attempts >= max_attempts:
        state = RunState.FAILED
        _audit_failed(session, row.id, now, row.last_error)
    else:
        row.state = RunState.WAITING.value
        session.flush()
        return
    for name, value in _ended(state, now).items():
        setattr(row, name, value)
    session.flush()


def due_for_bell(session: Session, now: datetime, rering_seconds: float) -> list[int]:
    """Waiting runs that the bell must be rung for: never rung yet, or too long ago.

    A run that nobody takes (where no trainer runs, say) is rung for ever more rarely: the messages would pile up.
    """
    waiting = select(TrainingRunRow.id, TrainingRunRow.created_at, TrainingRunRow.rung_at)
    due = []
    for run_id, created_at, rung_at in session.execute(waiting.where(TrainingRunRow.state == RunState.WAITING.value)):
        if rung_at is not None:
            age = (rung_at - created_at).total_seconds()
            pause = min(max(rering_seconds, age), SLOWEST_RERING * rering_seconds)
            if rung_at > now - timedelta(seconds=pause):
                continue
        due.append(run_id)
    return due


def rung(session: Session, run_id: int, now: datetime) -> None:
    """Note that the bell was rung for a waiting run."""
    waiting = update(TrainingRunRow).where(TrainingRunRow.id == run_id, TrainingRunRow.state == RunState.WAITING.value)
    moved(session, waiting.values(rung_at=now))


def unheard(session: Session, *, since: datetime) -> bool:
    """Whether a run still waits that was rung for since then: nobody heard the bell yet."""
    waiting = TrainingRunRow.state == RunState.WAITING.value
    return session.scalar(select(TrainingRunRow.id).where(waiting, TrainingRunRow.rung_at > since).limit(1)) is not None


def _ended(state: RunState, now: datetime) -> dict[str, Any]:
    return {"state": state.value, "going": None, "lease_until": None, "finished_at": now}


def _audit_failed(session: Session, run_id: int, now: datetime, error: str) -> None:
    detail = {"error": kept(error)[:500]}
    session.add(AuditRow(at=now, actor=ACTOR, action="training.fail", subject=f"training-run:{run_id}", detail=detail))


def _owned(held: RunClaim) -> Update:
    return update(TrainingRunRow).where(
        TrainingRunRow.id == held.run_id,
        TrainingRunRow.token == held.token,
        TrainingRunRow.state == RunState.RUNNING.value,
    )


def _fresh(session: Session, run_id: int) -> TrainingRunRow:
    statement = select(TrainingRunRow).where(TrainingRunRow.id == run_id)
    return session.scalars(statement.execution_options(populate_existing=True)).one()


def _must_move(session: Session, held: RunClaim, statement: Update) -> None:
    if not moved(session, statement):
        raise StaleToken(f"training run {held.run_id}: token {held.token} of {held.worker} is stale")
