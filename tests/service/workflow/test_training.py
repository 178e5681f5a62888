"""A training run as rows: frozen when it is asked for, one at a time, never lost, never taken twice."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from service.domain.bone import ReferenceOrigin, load_references
from service.domain.policy import DEFAULT_POLICY
from service.domain.reasons import Code
from service.domain.result import Numbering
from service.domain.splits import Part
from service.domain.states import RunStage, RunState
from service.domain.training import BMD_ALONE, TARGETS, People, Start, Wanted
from service.store.engine import Store
from service.store.tables import (
    AuditRow,
    DxaLevelRow,
    DxaScanRow,
    InstanceRow,
    ResultRow,
    StudyRow,
    TrainingPatientRow,
    TrainingRunRow,
)
from service.workflow import pairing, training, training_work
from service.workflow.training import Lost, NotChangeable, Outcome, Room, RunLine
from service.workflow.training_work import Grip, RunClaim
from service.workflow.work import StaleToken
from tests.service.workflow.pairs import ASKED, BY, NOW, PATIENTS, QUICK, SMALL, ask, fill, pair

OUTCOME = Outcome(
    "training/1/package", "ab" * 32, "training/1/report/candidate", "training/1/report/champion", "m", "cd" * 32
)
EPOCH = {
    "network": "fold0",
    "epoch": 1,
    "step": 5,
    "training_loss": 0.5,
    "validation_loss": 0.4,
    "bmd_r": 0.7,
    "tbs_r": None,
}


def begun(store: Store, wanted: Wanted = ASKED) -> int:
    """A run that was asked for; its id (PostgreSQL's never begin at 1 again)."""
    created = ask(store, wanted)
    assert created.id is not None, created.reasons
    return created.id


def claimed(store: Store, run_id: int, *, after: float = 0.0, worker: str = "w1") -> RunClaim | None:
    with store.transaction() as session:
        return training_work.claim(
            session,
            run_id,
            worker=worker,
            now=NOW + timedelta(seconds=after),
            lease_seconds=60,
            deadline_seconds=1000,
            max_attempts=2,
        )


def held(store: Store, run_id: int, **changes: Any) -> RunClaim:
    found = claimed(store, run_id, **changes)
    assert found is not None
    return found


def line(store: Store, run_id: int) -> RunLine:
    with store.reading() as session:
        found = training.run(session, run_id)
    assert found is not None
    return found


def manifest(store: Store, run_id: int) -> dict[str, Any]:
    with store.reading() as session:
        return dict(training.manifest(session, run_id) or {})


def actions(store: Store) -> list[str]:
    with store.reading() as session:
        wanted = select(AuditRow.action).where(AuditRow.action.like("training.%")).order_by(AuditRow.id)
        return list(session.scalars(wanted))


def reconcile(store: Store, after: float) -> list[int]:
    with store.transaction() as session:
        return training_work.reconcile(session, NOW + timedelta(seconds=after), 2)


# --- asked for ----------------------------------------------------------------------------------------------------


def test_a_run_freezes_what_it_learns_from(store: Store) -> None:
    fill(store)
    run_id = begun(store)
    frozen = manifest(store, run_id)
    pairs = frozen["pairs"]
    assert len(pairs) == PATIENTS
    first = pairs[0]
    assert first["levels"].keys() == {"L1", "L2", "L3"}  # L4 is left out by the DXA
    assert (first["provenance"], first["days"], first["vendor"], first["kernel"]) == ("digital", 10, "siemens", "Br40")
    assert (first["scanner"], first["dxa_device"], first["slice_mm"]) == ("Force", "GE Lunar Prodigy", 3.0)
    assert {one["part"] for one in pairs} == {"training", "locked"}
    assert {one["tenth"] for one in pairs if one["part"] == "training"} == set(range(10))
    assert all(one["tenth"] is None for one in pairs if one["part"] == "locked")
    assert len({one["patient"] for one in pairs}) == PATIENTS
    assert "P000" not in str(frozen)  # no patient ID
    assert frozen["configuration"]["epochs"] == 2
    assert set(frozen["definitions"]["osteoporosis"]["cut_g_cm2"]) == {"F", "M"}
    assert frozen["densitometer"] == "GE Lunar"
    run = line(store, run_id)
    assert run.manifest_sha256 == training.content_hash(frozen)
    assert (run.patients + run.locked, run.vertebrae, run.state) == (PATIENTS, 3 * PATIENTS, RunState.WAITING)
    assert actions(store) == ["training.create"]
    with store.transaction() as session:  # what changes afterwards is for the next run
        session.execute(update(DxaLevelRow).values(bmd_g_cm2=9.0))
    assert manifest(store, run_id) == frozen


def test_every_refusal_has_its_code_and_leaves_a_line(store: Store) -> None:
    def codes(**changes: Any) -> list[Code]:
        created = ask(store, **changes)
        assert created.id is None
        return [reason.code for reason in created.reasons]

    assert codes() == [Code.TRAINING_TOO_FEW, Code.TRAINING_LOCKED_TOO_FEW]
    fill(store)
    assert codes(policy=DEFAULT_POLICY) == [Code.TRAINING_TOO_FEW, Code.TRAINING_LOCKED_TOO_FEW]
    assert codes(wanted=replace(ASKED, people=People.PATIENTS)) == [Code.TRAINING_TOO_FEW, Code.TRAINING_LOCKED_TOO_FEW]
    assert codes(room=Room(1, 2)) == [Code.TRAINING_DISK]
    assert codes(wanted=replace(ASKED, configuration="none", folds=4)) == [Code.TRAINING_CONFIGURATION] * 2
    begun(store)
    assert codes() == [Code.TRAINING_GOING]
    assert actions(store) == ["training.refused"] * 5 + ["training.create", "training.refused"]
    with store.reading() as session:
        assert len(session.scalars(select(TrainingRunRow)).all()) == 1


def test_people_and_digital_patients_are_never_mixed(store: Store) -> None:
    fill(store)
    fill(store, 3, first=100, synthetic=False)
    run_id = begun(store)
    assert {one["provenance"] for one in manifest(store, run_id)["pairs"]} == {"digital"}
    with store.reading() as session:
        people = training.survey(session, SMALL, People.PATIENTS)
    assert (people.pairs, people.patients + people.locked) == (3, 3)
    assert Code.TRAINING_TOO_FEW in {reason.code for reason in people.reasons}


def test_a_pair_without_tbs_is_left_out_by_name(store: Store) -> None:
    fill(store)
    fill(store, 1, first=50, tbs=None)
    run_id = begun(store)
    (left_out,) = manifest(store, run_id)["left_out"]
    assert (left_out["study_uid"], left_out["code"]) == ("1.2.826.50", "TRAINING_NO_TARGET")


def test_a_ct_whose_levels_are_uncertain_has_no_pair(store: Store) -> None:
    """Its outlines are valid, but under a wrong name each would learn its neighbour's DXA."""
    fill(store)
    fill(store, 1, first=50)
    with store.transaction() as session:
        study = StudyRow.study_uid == "1.2.826.50"
        result = session.scalars(select(ResultRow).join(StudyRow, StudyRow.id == ResultRow.study_id).where(study)).one()
        anatomy = {**result.document["anatomy"], "numbering": Numbering.UNCERTAIN.value}
        result.document = {**result.document, "anatomy": anatomy}
    with store.reading() as session:
        found = pairing.overview(session, DEFAULT_POLICY.pairing)
    (alone,) = found.unpaired
    assert (alone.ct.study_uid, alone.reason.code) == ("1.2.826.50", Code.PAIR_NOT_MEASURED)
    assert len(manifest(store, begun(store))["pairs"]) == PATIENTS == len(found.pairs)


def test_a_patient_id_of_two_issuers_pairs_with_nothing(store: Store) -> None:
    with store.transaction() as session:
        for number, issuer in ((50, "East"), (51, "West")):
            uid = pair(session, number)
            study = session.scalars(select(StudyRow).where(StudyRow.study_uid == uid)).one()
            study.patient_id = "SAME"
            for row in session.scalars(select(InstanceRow).where(InstanceRow.sop_instance_uid == f"{uid}.9")):
                row.facts = {**row.facts, "issuer_of_patient_id": issuer}
        session.execute(update(DxaScanRow).values(patient_id="SAME"))
    with store.reading() as session:
        found = pairing.overview(session, DEFAULT_POLICY.pairing)
    assert found.pairs == ()
    assert {one.reason.code for one in found.unpaired} == {Code.PAIR_ISSUERS}
    assert "East and by West" in found.unpaired[0].reason.text


def test_people_s_pairs_are_of_one_maker_and_the_run_says_which(store: Store) -> None:
    fill(store, 4, synthetic=False)
    with store.transaction() as session:
        session.execute(
            update(DxaScanRow).where(DxaScanRow.id % 2 == 0).values(manufacturer="Hologic", model="Horizon")
        )
    for maker in ("GE Lunar", "Hologic"):
        site = replace(SMALL, pairing=replace(SMALL.pairing, densitometer=maker))
        with store.reading() as session:
            assert training.survey(session, site, People.PATIENTS).pairs == 2
            why = pairing.overview(session, site.pairing).why
        assert why == {Code.PAIR_OTHER_DENSITOMETER: 2}


def test_each_patient_counts_once_in_a_run(store: Store) -> None:
    """Two CTs of a patient, each with a DXA: the one that is nearer in time stands for the patient."""
    fill(store)
    with store.transaction() as session:
        uid = pair(session, 90, scan_date=date(2026, 12, 8))
        of = {one.study_uid: one for one in session.scalars(select(StudyRow))}
        scan = session.scalars(select(DxaScanRow).where(DxaScanRow.patient_id == of[uid].patient_id)).one()
        scan.patient_id = of[uid].patient_id = of["1.2.826.1"].patient_id
        scan.sex = of[uid].patient_sex = of["1.2.826.1"].patient_sex
        of[uid].study_date = "20261207"
    frozen = manifest(store, begun(store))
    assert len({one["patient"] for one in frozen["pairs"]}) == len(frozen["pairs"]) == PATIENTS
    assert uid in {one["study_uid"] for one in frozen["pairs"]}
    assert ("1.2.826.1", "TRAINING_OTHER_PAIR") in {(one["study_uid"], one["code"]) for one in frozen["left_out"]}


def test_a_site_without_tbs_trains_on_bmd_alone(store: Store) -> None:
    """Every pair counts then, and no level carries a TBS: a cohort with some of both would be neither."""
    fill(store, PATIENTS - 1, tbs=None)
    fill(store, 1, first=50)
    with store.reading() as session:
        told = {(one.people, one.targets): one for one in training.surveys(session, SMALL)}
    assert told[People.DIGITAL, TARGETS].pairs == 1
    assert Code.TRAINING_TOO_FEW in {reason.code for reason in told[People.DIGITAL, TARGETS].reasons}
    assert (told[People.DIGITAL, BMD_ALONE].pairs, told[People.DIGITAL, BMD_ALONE].reasons) == (PATIENTS, ())
    refused = ask(store)
    assert Code.TRAINING_TOO_FEW in {reason.code for reason in refused.reasons}
    run_id = begun(store, replace(ASKED, targets=BMD_ALONE))
    frozen = manifest(store, run_id)
    assert (frozen["targets"], frozen["configuration"]["targets"]) == (["bmd_g_cm2"], ["bmd_g_cm2"])
    assert (len(frozen["pairs"]), frozen["left_out"]) == (PATIENTS, [])
    assert {name for pair in frozen["pairs"] for level in pair["levels"].values() for name in level} == {"bmd_g_cm2"}
    assert line(store, run_id).targets == BMD_ALONE


def test_who_once_judged_never_trains(store: Store) -> None:
    fill(store)
    first = begun(store)
    with store.transaction() as session:
        training.cancel(session, first, BY)
    fill(store, 30, first=200)
    second = begun(store, replace(ASKED, seed=99))

    def parts(run_id: int) -> dict[str, tuple[str, int | None]]:
        return {one["study_uid"]: (one["part"], one["tenth"]) for one in manifest(store, run_id)["pairs"]}

    before, after = parts(first), parts(second)
    assert {study: after[study] for study in before} == before
    assert len(after) == len(before) + 30
    with store.reading() as session:
        rows = session.scalars(select(TrainingPatientRow)).all()
    assert {row.run_id for row in rows if row.part == Part.LOCKED.value} == {first, second}


def test_fine_tuning_names_what_it_starts_with(store: Store) -> None:
    fill(store)
    wanted = replace(ASKED, start=Start.FINE_TUNE, configuration="osteogate-fine-tune", settings={"epochs": 2})
    frozen, origin = manifest(store, begun(store, wanted)), training.shelf().origin
    assert origin is not None
    assert frozen["start_from"] == origin.name
    assert frozen["configuration"]["start_from"] == origin.sha256
    assert frozen["configuration"]["learning_rate"] == 1e-4
    assert QUICK["architecture"] != frozen["configuration"]["architecture"] == origin.architecture


# --- worked on ----------------------------------------------------------------------------------------------------


def test_a_run_is_taken_by_one_worker_and_told_of(store: Store) -> None:
    fill(store)
    run_id = begun(store)
    first = held(store, run_id)
    assert claimed(store, run_id, worker="w2") is None
    assert first.manifest_sha256 == training.content_hash(first.manifest)
    with store.transaction() as session:
        training_work.progress(session, first, RunStage.TRAINING, {"steps_done": 5, "steps_planned": 10}, [EPOCH])
        training_work.progress(session, first, RunStage.TRAINING, {"steps_done": 6, "steps_planned": 10}, [EPOCH])
        training_work.note_lost(session, first, [Lost("1.2.826.1", "L2", "TRAINING_LEVEL_LOST", "why")])
        assert training_work.heartbeat(session, first, NOW, 60) is Grip.HELD
    run = line(store, run_id)
    assert (run.state, run.stage, run.share) == (RunState.RUNNING, RunStage.TRAINING, 0.6)
    assert run.lost == (Lost("1.2.826.1", "L2", "TRAINING_LEVEL_LOST", "why"),)
    with store.reading() as session:
        (point,) = training.curve(session, run_id)
        assert training.curve(session, run_id, after=point.id) == ()
    assert (point.network, point.epoch, point.validation_loss, point.tbs_r) == ("fold0", 1, 0.4, None)
    with store.transaction() as session:
        training_work.finish(session, first, OUTCOME, NOW)
    run = line(store, run_id)
    assert (run.state, run.package_sha256, run.champion) == (RunState.FINISHED, "ab" * 32, "m")
    assert actions(store) == ["training.create", "training.finish"]
    with pytest.raises(StaleToken), store.transaction() as session:
        training_work.finish(session, first, OUTCOME, NOW)
    assert actions(store) == ["training.create", "training.finish"]  # handed over once
    assert begun(store) > run_id  # the next one may come


def test_a_worker_that_is_gone_loses_the_run_to_the_next_one(store: Store) -> None:
    fill(store)
    run_id = begun(store)
    first = held(store, run_id)
    assert reconcile(store, 59) == []
    assert reconcile(store, 61) == [run_id]
    run = line(store, run_id)
    assert run.state is RunState.WAITING
    assert "lease ran out" in str(run.last_error)
    second = held(store, run_id, after=62, worker="w2")
    assert (second.attempt, second.deadline_at) == (2, first.deadline_at)
    for change in (training_work.release, lambda s, h: training_work.finish(s, h, OUTCOME, NOW)):
        with pytest.raises(StaleToken), store.transaction() as session:
            change(session, first)
    with store.transaction() as session:
        assert training_work.heartbeat(session, first, NOW, 60) is Grip.LOST
    assert reconcile(store, 200) == [run_id]  # the second attempt was the last
    assert line(store, run_id).state is RunState.FAILED
    assert actions(store)[-1] == "training.fail"
    with store.transaction() as session:
        training.resume(session, run_id, BY)
    assert held(store, run_id, after=300).attempt == 1


def test_a_cancelled_run_stops_at_once_or_after_its_step(store: Store) -> None:
    fill(store)
    run_id = begun(store)
    with store.transaction() as session:
        assert training.cancel(session, run_id, BY) is RunState.CANCELLED
    with pytest.raises(NotChangeable, match="nothing to cancel"), store.transaction() as session:
        training.cancel(session, run_id, BY)
    assert claimed(store, run_id) is None
    with store.transaction() as session:
        training.resume(session, run_id, BY)
    running = held(store, run_id)
    with store.transaction() as session:
        assert training.cancel(session, run_id, BY) is RunState.RUNNING
        assert training_work.heartbeat(session, running, NOW, 60) is Grip.CANCEL
        training_work.stop(session, running, NOW)
    run = line(store, run_id)
    assert (run.state, run.cancel_asked) == (RunState.CANCELLED, True)
    assert actions(store) == ["training.create", "training.cancel", "training.resume", "training.cancel"]


def test_a_run_that_stopped_long_ago_is_not_resumed(store: Store) -> None:
    """Its crops and checkpoints are gone by then."""
    fill(store)
    run_id = begun(store)
    with store.transaction() as session:
        training.cancel(session, run_id, BY)
    stopped = line(store, run_id)
    late = replace(BY, now=NOW + timedelta(seconds=101))
    assert training.resumable(stopped, NOW + timedelta(seconds=100), 100)
    assert not training.resumable(stopped, late.now, 100)
    with (
        pytest.raises(NotChangeable, match=r"stopped on 2026-11-28: .* not kept so long"),
        store.transaction() as session,
    ):
        training.resume(session, run_id, late, keep_seconds=100)
    with store.transaction() as session:
        training.resume(session, run_id, late, keep_seconds=102)
    assert not training.resumable(line(store, run_id), NOW, 100)  # it waits


def test_a_cancelled_run_whose_worker_is_gone_is_cancelled(store: Store) -> None:
    fill(store)
    run_id = begun(store)
    held(store, run_id)
    with store.transaction() as session:
        training.cancel(session, run_id, BY)
    assert reconcile(store, 61) == [run_id]
    assert line(store, run_id).state is RunState.CANCELLED


def test_the_time_limit_counts_from_the_first_claim(store: Store) -> None:
    fill(store)
    run_id = begun(store)
    first = held(store, run_id)
    with store.transaction() as session:
        training_work.release(session, first)
    second = held(store, run_id, after=900)
    assert (second.attempt, second.deadline_at) == (1, first.deadline_at)
    assert reconcile(store, 959) == []
    assert reconcile(store, 1001) == [run_id]
    run = line(store, run_id)
    assert (run.state, run.last_error) == (RunState.FAILED, training_work.TIME_LIMIT)


def test_only_what_stopped_can_be_resumed_and_only_alone(store: Store) -> None:
    fill(store)
    run_id = begun(store)
    with pytest.raises(NotChangeable, match="only one that failed or was cancelled"), store.transaction() as session:
        training.resume(session, run_id, BY)
    with store.transaction() as session:
        training.cancel(session, run_id, BY)
    other = begun(store)
    with pytest.raises(NotChangeable, match=f"run {other} waits or runs"), store.transaction() as session:
        training.resume(session, run_id, BY)
    with pytest.raises(LookupError), store.transaction() as session:
        training.cancel(session, 10**6, BY)


def test_an_error_costs_an_attempt_and_the_last_one_the_run(store: Store) -> None:
    fill(store)
    run_id = begun(store)
    with store.transaction() as session:
        assert training_work.fail(session, held_in(session, run_id), "broken\x00pipe", NOW, 2) is RunState.WAITING
    assert line(store, run_id).last_error == "broken pipe"
    with store.transaction() as session:
        assert training_work.fail(session, held_in(session, run_id), "broken", NOW, 2) is RunState.FAILED
    assert line(store, run_id).state is RunState.FAILED


def held_in(session: Any, run_id: int) -> RunClaim:
    found = training_work.claim(
        session, run_id, worker="w", now=NOW, lease_seconds=60, deadline_seconds=1000, max_attempts=2
    )
    assert found is not None
    return found


def test_the_bell_is_rung_until_somebody_hears_and_ever_more_rarely(store: Store) -> None:
    fill(store)
    run_id = begun(store)

    def due(after: float) -> list[int]:
        with store.reading() as session:
            return training_work.due_for_bell(session, NOW + timedelta(seconds=after), 30)

    def ring(after: float) -> None:
        with store.transaction() as session:
            training_work.rung(session, run_id, NOW + timedelta(seconds=after))

    assert due(0) == [run_id]
    ring(0)
    assert (due(29), due(30)) == ([], [run_id])
    ring(10_000)
    assert (due(10_100), due(10_240)) == ([], [run_id])
    with store.reading() as session:
        assert training_work.unheard(session, since=NOW)
        assert training.wanted_now(session)
    held(store, run_id)
    assert due(20_000) == []
    with store.reading() as session:
        assert not training_work.unheard(session, since=NOW)


def test_a_young_adult_mean_of_other_levels_is_not_that_of_l1_to_l4(store: Store) -> None:
    """The truth and the estimate that it is held against are means over L1-L4."""
    fill(store, synthetic=False)
    published = [one for one in load_references().entries if one.provenance is ReferenceOrigin.PUBLISHED]
    women = replace(published[0], key="women", sex="F", region="L1-L4", mean_g_cm2=1.18)
    men = replace(women, key="men", sex="M", region="L2-L4", mean_g_cm2=1.24)
    policy = replace(SMALL, references=(women, men))
    created = ask(store, replace(ASKED, people=People.PATIENTS), policy=policy)
    assert created.id is not None, created.reasons
    assert manifest(store, created.id)["definitions"]["osteopenia"]["young_adult_bmd"] == {"F": 1.18}
