"""Renumbering: queued with the kept outlines, a revision of its own, audited; and when it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from service.domain.policy import DEFAULT_POLICY
from service.domain.renumber import shifted
from service.domain.states import ReferralState, StudyState
from service.store.engine import Store
from service.store.tables import AuditRow, JobRow, ReferralRow, ResultRow, StudyRow
from service.workflow import referral, renumber, screening
from tests.service.workflow.workbench import Clock, claim, close, deliver, measured, queued, slices

REASON = "twelfth rib on the scout"


def measure(store: Store, clock: Clock, job_id: int, *, labelled: bool = True) -> None:
    held = claim(store, job_id, clock.now)
    assert held is not None
    kept: dict[str, Any] = {"artefacts": f"{job_id}", "labelled": labelled}
    with store.transaction() as session:
        screening.record(session, held, measured(), **kept, policy=DEFAULT_POLICY, now=clock.advance(1))


def ask(store: Store, clock: Clock, steps: int = 1, reason: str = REASON, study: str = "1.2.3") -> int:
    with store.transaction() as session:
        told = {"reason": reason, "actor": "dr", "now": clock.now, "peer_address": "10.0.0.1"}
        return renumber.renumber(session, study, shifted(steps), **told)


def results(store: Store) -> list[ResultRow]:
    with store.reading() as session:
        return list(session.scalars(select(ResultRow).order_by(ResultRow.id)))


def test_a_renumbered_study_is_measured_from_its_own_outlines_as_a_new_revision(store: Store, clock: Clock) -> None:
    first = queued(store, clock)
    measure(store, clock, first)
    job_id = ask(store, clock)
    with store.reading() as session:
        kept = renumber.kept(session, job_id)
        job = session.get_one(JobRow, job_id)
        audit = session.scalars(select(AuditRow).where(AuditRow.action == "renumber")).one()
        assert renumber.kept(session, first) is None
    assert kept is not None
    assert (kept.artefacts, kept.segmenter, kept.segmenter_sha256) == (f"{first}", "fake", "0" * 64)
    assert (kept.renumbering.by, kept.renumbering.reason, kept.renumbering.levels["L1"]) == ("dr", REASON, "L2")
    assert (job.revision, job.rerun_of_id) == (2, first)
    assert (audit.subject, audit.actor, audit.peer_address) == ("1.2.3", "dr", "10.0.0.1")
    assert audit.detail["levels"]["T12"] == "L1"
    assert [(row.revision, row.superseded) for row in results(store)] == [(1, False)]  # it stands until the new one
    measure(store, clock, job_id)
    assert [(row.revision, row.run, row.superseded) for row in results(store)] == [(1, 0, True), (2, 0, False)]


def test_the_same_images_again_leave_the_renumbered_result_in_force(store: Store, clock: Clock) -> None:
    measure(store, clock, queued(store, clock))
    measure(store, clock, ask(store, clock))
    deliver(store, slices(), clock.now)  # nothing new
    close(store, clock.advance(31))
    assert [row.superseded for row in results(store)] == [True, False]


def test_a_dismissed_referral_is_not_reopened_by_other_names(store: Store, clock: Clock) -> None:
    measure(store, clock, queued(store, clock))
    with store.transaction() as session:
        referral.act(session, "1.2.3", "dismiss", reason="known", actor="dr", now=clock.now)
    measure(store, clock, ask(store, clock))
    with store.reading() as session:
        assert session.scalars(select(ReferralRow.state)).one() == ReferralState.DISMISSED.value


def test_what_cannot_be_renumbered_says_why(store: Store, clock: Clock) -> None:
    with pytest.raises(renumber.NotRenumberable, match="no such study"):
        ask(store, clock, study="9.9")
    first = queued(store, clock)
    with pytest.raises(renumber.NotRenumberable, match="queued"):
        ask(store, clock)
    measure(store, clock, first, labelled=False)
    with pytest.raises(renumber.NotRenumberable, match="no outlined vertebra"):
        ask(store, clock)
    with pytest.raises(renumber.NotRenumberable, match="say why"):
        ask(store, clock, reason=" ")
    with store.reading() as session:
        study = session.scalars(select(StudyRow)).one()
        assert (study.state, study.revision) == (StudyState.SCREENED.value, 1)
        assert session.scalars(select(AuditRow).where(AuditRow.action == "renumber")).first() is None
