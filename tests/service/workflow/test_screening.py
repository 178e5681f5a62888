"""From quiet to a decision: what is queued, what is not, what supersedes what."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from sqlalchemy import select

from service.domain.policy import DEFAULT_POLICY
from service.domain.reasons import Code, Reason
from service.domain.result import unmeasured
from service.domain.states import JobState, ReferralState, StudyState
from service.store.engine import Store
from service.store.tables import AuditRow, JobRow, ReferralRow, ResultRow, SeriesRow, StudyRow
from service.workflow import referral, screening, work
from service.workflow.screening import job_key, not_screened_document
from tests.service.workflow import workbench
from tests.service.workflow.workbench import Clock, claim, close, deliver, queued, record, slices


def jobs(store: Store) -> list[JobRow]:
    with store.reading() as session:
        return list(session.scalars(select(JobRow).order_by(JobRow.id)))


def results(store: Store) -> list[ResultRow]:
    with store.reading() as session:
        return list(session.scalars(select(ResultRow).order_by(ResultRow.id)))


def study(store: Store, uid: str = "1.2.3") -> StudyRow:
    with store.reading() as session:
        row = session.scalars(select(StudyRow).where(StudyRow.study_uid == uid)).one()
        assert row.series is not None  # loaded while the session lives
        return row


def document(store: Store) -> dict | None:
    with store.reading() as session:
        return not_screened_document(session.scalars(select(StudyRow)).one())


def measure(store: Store, clock: Clock, job_id: int, hu: float = 60.0) -> None:
    held = claim(store, job_id, clock.now)
    assert held is not None
    record(store, held, clock.advance(1), hu)


def test_the_key_knows_content_and_model_but_no_order() -> None:
    """Fault 15: shuffled slices are the same work."""
    instances = [(f"1.2.{k}", f"{k:064x}") for k in range(20)]
    shuffled = Random(1).sample(instances, len(instances))
    key = job_key("1.2", instances, "a")
    assert key == job_key("1.2", shuffled, "a") == job_key("1.2", shuffled + instances[:1], "a")
    others = {
        job_key("1.2", instances[1:], "a"),
        job_key("1.2", [(instances[0][0], "f" * 64), *instances[1:]], "a"),
        job_key("1.3", instances, "a"),
        job_key("1.2", instances, "b"),
    }
    assert len(others | {key}) == 5


def test_a_quiet_whole_study_is_queued_with_its_choice_explained(store: Store, clock: Clock) -> None:
    deliver(store, slices() + slices(series="1.2.3.5", kvp=140.0), clock.now)
    assert close(store, clock.advance(29)) == 0
    assert study(store).state == StudyState.RECEIVING.value
    assert close(store, clock.advance(2)) == 1
    assert close(store, clock.advance(2)) == 0
    closed = study(store)
    assert (closed.state, closed.revision, closed.policy) == ("queued", 1, DEFAULT_POLICY.label)
    assert closed.choice
    by_uid = {row.series_uid: row for row in closed.series}
    assert (by_uid["1.2.3.4"].eligible, by_uid["1.2.3.4"].chosen) == (True, True)
    assert (by_uid["1.2.3.5"].eligible, by_uid["1.2.3.5"].chosen) == (False, False)
    assert [reason["code"] for reason in by_uid["1.2.3.5"].reasons] == ["KVP_NOT_120"]
    [job] = jobs(store)
    assert (job.state, job.revision, job.series_id) == ("waiting", 1, by_uid["1.2.3.4"].id)
    assert document(store) is None


def test_a_hole_is_waited_for_and_then_judged(store: Store, clock: Clock) -> None:
    """Quiet only proposes: geometry disposes. Fault 17's missing slice ends as a reason, not as a result."""
    facts = slices()
    deliver(store, facts[:30] + facts[31:], clock.now)
    assert close(store, clock.advance(60)) == 0
    assert close(store, clock.advance(workbench.PATIENCE)) == 1
    assert study(store).state == StudyState.NOT_SCREENED.value
    assert jobs(store) == []
    told = document(store)
    assert told is not None
    assert "MISSING_SLICE" in [reason["code"] for reason in told["verdict"]["reasons"]]
    # the lost slice turns up after all: a new revision, and now it is screened
    deliver(store, facts, clock.now)
    assert close(store, clock.advance(31)) == 1
    assert (study(store).state, study(store).revision) == ("queued", 2)
    assert document(store) is None


def test_a_study_that_cannot_be_measured_has_a_result_document(store: Store, clock: Clock) -> None:
    deliver(store, slices(kvp=140.0, patient_age_years=None, synthetic=True), clock.now)
    assert document(store) is None  # still receiving
    close(store, clock.advance(31))
    told = document(store)
    assert told is not None
    codes = [reason["code"] for reason in told["verdict"]["reasons"]]
    assert codes == ["NO_ELIGIBLE_SERIES", "KVP_NOT_120", "AGE_UNKNOWN"]
    assert told["verdict"]["eligible"] is False
    assert told["decision"] == {
        "category": "not-assessable",
        "driver": "none",
        "reasons": told["verdict"]["reasons"],
        "policy": DEFAULT_POLICY.label,
        "criteria": None,
    }
    assert (told["study_uid"], told["series_uid"], told["revision"]) == ("1.2.3", None, 1)
    assert told["patient"]["synthetic"] is True
    assert told["patient"]["bmd_g_cm2"] is None
    assert told["levels"]["L4"]["hu_mean"] is None
    assert told["provenance"]["model"] is None


def test_conflicting_copies_reach_the_verdict(store: Store, clock: Clock) -> None:
    deliver(store, slices(), clock.now)
    deliver(store, slices(n=2), clock.now, content="other")
    close(store, clock.advance(31))
    [series] = study(store).series
    assert [reason["code"] for reason in series.reasons] == ["CONFLICTING_COPIES"]


def test_a_correction_after_the_result_reopens_the_study_once_and_supersedes_what_was_told(
    store: Store, clock: Clock
) -> None:
    """A PACS that corrects the patient sends the same images again: the first name must not stand unflagged."""
    job_id = queued(store, clock)
    measure(store, clock, job_id)
    corrected = [replace(one, patient_id="CORRECTED") for one in slices()]
    deliver(store, corrected, clock.advance(600), content="corrected")
    assert study(store).state == StudyState.RECEIVING.value
    assert close(store, clock.advance(31)) == 1
    assert study(store).state == StudyState.NOT_SCREENED.value
    assert [reason["code"] for reason in study(store).series[0].reasons] == ["CONFLICTING_COPIES"]
    assert [result.superseded for result in results(store)] == [True]
    deliver(store, corrected, clock.advance(1), content="corrected")  # the same correction says nothing new
    assert study(store).state == StudyState.NOT_SCREENED.value


@pytest.mark.parametrize("change", [{"patient_id": "P2"}, {"patient_sex": "M"}, {"patient_birth_date": "19011231"}])
def test_a_study_of_two_patients_is_measured_for_neither(store: Store, clock: Clock, change: dict[str, str]) -> None:
    first = [replace(one, patient_id="P1", patient_sex="F", patient_birth_date="19500101") for one in slices(n=3)]
    second = [
        replace(one, **{"patient_id": "P1", "patient_sex": "F", "patient_birth_date": "19500101", **change})
        for one in slices("1.2.3", "1.2.3.9")
    ]
    deliver(store, first, clock.now)
    deliver(store, second, clock.now)
    close(store, clock.advance(31))
    assert (study(store).state, jobs(store)) == (StudyState.NOT_SCREENED.value, [])
    for series in study(store).series:
        (reason,) = [one for one in series.reasons if one["code"] == "PATIENT_MISMATCH"]
        assert "2 " in reason["text"]
        assert "P2" not in reason["text"]


def test_what_others_put_beside_a_ct_costs_it_nothing_and_names_nobody(store: Store, clock: Clock) -> None:
    """A scanned sheet under another patient's ID came first: the CT is measured, and shown under its own patient."""
    sheet = [
        replace(one, modality="OT", patient_id="SOMEBODY", patient_name="Other")
        for one in slices("1.2.3", "1.2.3.9", n=1)
    ]
    deliver(store, sheet, clock.now)
    deliver(store, slices(), clock.advance(1))
    assert study(store).patient_id == "SOMEBODY"
    close(store, clock.advance(31))
    assert (study(store).state, study(store).patient_id) == (StudyState.QUEUED.value, "P1")


def test_the_same_study_resent_makes_no_new_work(store: Store, clock: Clock) -> None:
    """Fault 14: before, while and after it is measured."""
    job_id = queued(store, clock)
    deliver(store, slices()[::-1], clock.advance(1))
    assert close(store, clock.advance(60)) == 0
    measure(store, clock, job_id)
    deliver(store, slices(), clock.advance(1))
    assert close(store, clock.advance(60)) == 0
    assert len(jobs(store)) == 1
    assert len(results(store)) == 1
    assert study(store).state == StudyState.SCREENED.value


def test_a_result_is_one_transaction_decision_referral_and_audit(store: Store, clock: Clock) -> None:
    job_id = queued(store, clock)
    measure(store, clock, job_id, hu=60.0)
    [result] = results(store)
    assert (result.category, result.revision, result.attempt, result.superseded) == ("refer", 1, 1, False)
    assert result.document["decision"]["driver"] == "ct-attenuation"  # a real patient, a digital model
    assert result.document["verdict"]["eligible"] is True
    assert (result.document["study_uid"], result.document["series_uid"]) == ("1.2.3", "1.2.3.4")
    assert result.hu_mean == pytest.approx(60.0)
    with store.reading() as session:
        assert session.scalars(select(ReferralRow.state)).all() == ["open"]
        [audit] = session.scalars(select(AuditRow)).all()
    assert (audit.action, audit.subject, audit.detail["category"]) == ("decision", "1.2.3", "refer")
    assert study(store).state == StudyState.SCREENED.value
    assert (jobs(store)[0].state, jobs(store)[0].lease_until) == ("done", None)
    assert document(store) is None  # the result answers


def test_no_flag_opens_no_referral(store: Store, clock: Clock) -> None:
    measure(store, clock, queued(store, clock), hu=220.0)
    assert results(store)[0].category == "no-flag"
    with store.reading() as session:
        assert session.scalars(select(ReferralRow)).all() == []


def test_a_refusal_found_in_the_pixels_is_a_result_without_values(store: Store, clock: Clock) -> None:
    held = claim(store, queued(store, clock), clock.now)
    assert held is not None
    reason = Reason(Code.PIXELS_UNREADABLE, "slice 7 is truncated")
    broken = replace(unmeasured("osteogate test"), refusals=(reason,))
    with store.transaction() as session:
        screening.record(session, held, broken, artefacts=None, labelled=False, policy=DEFAULT_POLICY, now=clock.now)
    [result] = results(store)
    assert (result.category, result.bmd_g_cm2, result.artefacts) == ("not-assessable", None, None)
    assert result.document["decision"]["reasons"] == [reason.as_dict()]
    assert result.document["verdict"]["eligible"] is False
    assert study(store).state == StudyState.SCREENED.value


def test_a_late_slice_after_the_result_supersedes_it_visibly(store: Store, clock: Clock) -> None:
    """Fault 16, second half."""
    measure(store, clock, queued(store, clock))
    deliver(store, slices(n=61), clock.advance(5))
    assert not results(store)[0].superseded  # until the study is judged anew, the old result stands
    close(store, clock.advance(31))
    assert results(store)[0].superseded
    assert (study(store).state, study(store).revision) == ("queued", 2)
    first, second = jobs(store)
    assert (first.state, second.state, second.revision) == ("done", "waiting", 2)
    measure(store, clock, second.id, hu=220.0)
    assert [(row.revision, row.superseded, row.category) for row in results(store)] == [
        (1, True, "refer"),
        (2, False, "no-flag"),
    ]
    with store.reading() as session:  # opened by the first result: only a person closes it
        assert session.scalars(select(ReferralRow.state)).all() == ["open"]


def test_a_late_slice_while_the_worker_measures_fences_it_off(store: Store, clock: Clock) -> None:
    """Fault 16, first half: the worker of the old revision writes nothing once the new one is queued."""
    held = claim(store, queued(store, clock), clock.now)
    assert held is not None
    deliver(store, slices(n=61), clock.advance(5))
    close(store, clock.advance(31))
    first, second = jobs(store)
    assert (first.state, second.state) == ("superseded", "waiting")
    with store.transaction() as session:
        assert not work.heartbeat(session, held, clock.now, 60)
    with pytest.raises(work.StaleToken):
        record(store, held, clock.now)
    assert results(store) == []
    measure(store, clock, second.id)
    assert [row.revision for row in results(store)] == [2]


def test_a_result_that_comes_while_the_study_receives_again_does_not_close_it(store: Store, clock: Clock) -> None:
    held = claim(store, queued(store, clock), clock.now)
    assert held is not None
    deliver(store, slices(n=61), clock.advance(5))
    record(store, held, clock.advance(1))
    assert study(store).state == StudyState.RECEIVING.value
    close(store, clock.advance(31))
    assert study(store).state == StudyState.QUEUED.value
    assert results(store)[0].superseded


def test_a_job_is_not_claimed_while_its_study_receives_again(store: Store, clock: Clock) -> None:
    job_id = queued(store, clock)
    deliver(store, slices(n=61), clock.now)
    assert claim(store, job_id, clock.now) is None
    with store.reading() as session:
        assert work.due_for_bell(session, clock.advance(3600), 30) == []


@pytest.mark.parametrize("measured_before", [True, False])
def test_another_series_that_changes_nothing_keeps_the_work_done(
    store: Store, clock: Clock, measured_before: bool
) -> None:
    """A late localizer makes a revision, but the same images and model are not measured twice."""
    job_id = queued(store, clock)
    if measured_before:
        measure(store, clock, job_id)
    scout = slices(series="1.2.3.9", n=1, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    deliver(store, scout, clock.advance(5))
    close(store, clock.advance(31))
    assert len(jobs(store)) == 1
    assert study(store).revision == 2
    assert study(store).state == ("screened" if measured_before else "queued")
    if measured_before:
        assert not results(store)[0].superseded
    else:
        measure(store, clock, job_id)
        assert results(store)[0].revision == 2


def test_what_is_no_longer_eligible_loses_its_result(store: Store, clock: Clock) -> None:
    measure(store, clock, queued(store, clock))
    late = replace(slices(n=61)[60], position_lps_mm=(-150.0, -150.0, -300.0 + 3.0 * 70))
    deliver(store, [late], clock.now)
    close(store, clock.advance(workbench.PATIENCE + 31))
    assert study(store).state == StudyState.NOT_SCREENED.value
    assert results(store)[0].superseded
    assert document(store) is not None


def test_a_referral_that_was_dismissed_reopens_for_new_images_only(store: Store, clock: Clock) -> None:
    from service.workflow import rerun

    measure(store, clock, queued(store, clock))
    act(store, clock, "dismiss", "known osteoporosis")
    with store.transaction() as session:
        again = rerun.rerun(session, "1.2.3", actor="dr", now=clock.now)
    measure(store, clock, again)
    assert referral_state(store) == ReferralState.DISMISSED.value
    deliver(store, slices(n=61), clock.now)
    close(store, clock.advance(31))
    measure(store, clock, jobs(store)[-1].id)
    assert referral_state(store) == ReferralState.OPEN.value


def test_a_rerun_is_new_work_and_the_old_result_stands_until_it_is_done(store: Store, clock: Clock) -> None:
    from service.workflow import rerun

    first = queued(store, clock)
    with pytest.raises(rerun.NotRerunnable), store.transaction() as session:
        rerun.rerun(session, "1.2.3", actor="dr", now=clock.now)
    measure(store, clock, first)
    for number in (2, 3):
        with store.transaction() as session:
            job_id = rerun.rerun(session, "1.2.3", actor="dr", now=clock.now, peer_address="127.0.0.1")
        assert len(jobs(store)) == number
        assert not results(store)[-1].superseded
        with pytest.raises(rerun.NotRerunnable), store.transaction() as session:
            rerun.rerun(session, "1.2.3", actor="dr", now=clock.now)
        measure(store, clock, job_id)
    assert [row.superseded for row in results(store)] == [True, True, False]
    assert len({job.key for job in jobs(store)}) == 3
    assert {job.state for job in jobs(store)} == {JobState.DONE.value}
    with pytest.raises(rerun.NotRerunnable), store.transaction() as session:
        rerun.rerun(session, "no.such", actor="dr", now=clock.now)


def act(store: Store, clock: Clock, action: str, reason: str | None = None) -> ReferralState:
    with store.transaction() as session:
        return referral.act(session, "1.2.3", action, reason=reason, actor="dr", now=clock.now, peer_address="10.0.0.1")


def referral_state(store: Store) -> str:
    with store.reading() as session:
        return session.scalars(select(ReferralRow.state)).one()


def test_the_referral_goes_round_its_loop_and_every_step_is_audited(store: Store, clock: Clock) -> None:
    measure(store, clock, queued(store, clock))
    steps = [
        ("review", "reviewed"),
        ("order", "ordered"),
        ("dxa-done", "dxa-done"),
        ("reopen", "open"),
        ("dismiss", "dismissed"),
        ("reopen", "open"),
    ]
    for action, expected in steps:
        assert act(store, clock, action, "seen before" if action == "dismiss" else None).value == expected
    with store.reading() as session:
        rows = session.scalars(select(AuditRow).where(AuditRow.actor == "dr").order_by(AuditRow.id)).all()
    assert [row.action for row in rows] == [f"referral.{action}" for action, _ in steps]
    assert rows[4].detail == {"from": "open", "to": "dismissed", "reason": "seen before"}
    assert rows[0].peer_address == "10.0.0.1"
    assert all(a.detail["to"] == b.detail["from"] for a, b in pairwise(rows))


def test_what_a_referral_refuses(store: Store, clock: Clock) -> None:
    with pytest.raises(referral.NoReferral):
        act(store, clock, "review")
    measure(store, clock, queued(store, clock))
    with pytest.raises(referral.ReasonRequired):
        act(store, clock, "dismiss", "  ")
    with pytest.raises(referral.NotAllowed):
        act(store, clock, "reopen")
    with pytest.raises(ValueError, match="explode"):
        act(store, clock, "explode")
    assert referral_state(store) == "open"
    assert referral.allowed(ReferralState.DISMISSED) == (referral.Action.REOPEN,)
    with store.reading() as session:
        assert session.scalars(select(AuditRow).where(AuditRow.actor == "dr")).all() == []


def test_every_series_gets_its_verdict_even_where_nothing_is_eligible(store: Store, clock: Clock) -> None:
    report = replace(slices(series="1.2.3.8", n=1)[0], modality="SR", sop_class_uid="1.2.840.10008.5.1.4.1.1.88.33")
    deliver(store, [report, *slices(kvp=80.0)], clock.now)
    close(store, clock.advance(31))
    with store.reading() as session:
        rows = session.scalars(select(SeriesRow).order_by(SeriesRow.series_uid)).all()
    assert [row.eligible for row in rows] == [False, False]
    assert all(row.reasons for row in rows)
