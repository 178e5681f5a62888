"""Live performance over stored rows: which pairs count, for which model and scanner; and when a retraining is due."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from service.domain.drift import TISSUES
from service.domain.policy import DEFAULT_POLICY, Policy
from service.domain.states import RunState
from service.store.engine import Store
from service.store.tables import TrainingRunRow
from service.workflow import pairing, performance
from service.workflow.watching import Lookout, watched
from tests.service.workflow import hospital
from tests.service.workflow.hospital import BEGIN, CANON, FIRST, SECOND, SIEMENS

LATER = BEGIN + timedelta(days=60)
POLICY = replace(DEFAULT_POLICY, monitoring=replace(DEFAULT_POLICY.monitoring, pairs_minimum=8, retraining_pairs=12))


def overview(store: Store, policy: Policy = POLICY) -> performance.Overview:
    with store.reading() as session:
        return performance.overview(session, policy)


def test_without_results_there_is_nothing_to_tell(store: Store) -> None:
    found = overview(store)
    assert found.models == ()
    assert (found.reminder.since, found.reminder.people, found.reminder.due) == (None, 0, False)


def test_each_model_and_scanner_has_its_own_figures(store: Store) -> None:
    with store.transaction() as session:
        biased = hospital.months(session, 12, scanner=SIEMENS)
        sound = hospital.months(session, 9, scanner=CANON, seed=5)
        few = hospital.months(session, 3, scanner=SIEMENS, synthetic=True)
        hospital.pairs(session, biased, bias=0.12, at=LATER)
        hospital.pairs(session, sound, bias=0.0, at=LATER)
        hospital.pairs(session, few, bias=0.0, at=LATER)
    (model,) = overview(store).models
    assert (model.model.name, model.model.sha256, model.model.in_force) == ("model-a", FIRST, True)
    told = {(one.synthetic, one.scanner and one.scanner.manufacturer): one.performance for one in model.groups}
    assert {key: one.n for key, one in told.items()} == {
        (False, None): 21, (False, "SIEMENS"): 12, (False, "CANON"): 9, (True, None): 3, (True, "SIEMENS"): 3,
    }  # fmt: skip
    assert told[True, None].figures is None  # too few
    first, second = told[False, "SIEMENS"].figures, told[False, "CANON"].figures
    assert first is not None
    assert second is not None
    assert first.mean_error.low > 0.05
    assert first.mean_error.value == pytest.approx(0.12, abs=0.04)
    assert abs(second.mean_error.value) < 0.05
    assert first.flags.flagged + first.flags.unflagged <= 12
    assert first.flags.without_t_score == 0


def test_a_pair_that_the_model_may_have_been_trained_on_does_not_count(store: Store) -> None:
    with store.transaction() as session:
        studies = hospital.months(session, 10)
        hospital.pairs(session, studies[:4], bias=0.0, at=BEGIN - timedelta(days=1), days=-7)
        hospital.pairs(session, studies[4:], bias=0.0, at=LATER)
    (model,) = overview(store).models
    assert model.groups[0].performance.n == 6


def test_a_newer_model_is_in_force_and_the_reminder_counts_from_it(store: Store) -> None:
    with store.transaction() as session:
        old = hospital.months(session, 14)
        new = hospital.months(session, 14, scanner=CANON, model=SECOND)
        digital = hospital.months(session, 2, scanner=CANON, model=SECOND, synthetic=True)
        hospital.pairs(session, old, bias=0.0, at=BEGIN - timedelta(hours=1), days=-7)
    found = overview(store)
    assert [(one.model.sha256, one.model.in_force) for one in found.models] == [(SECOND, True), (FIRST, False)]
    assert (found.reminder.since, found.reminder.people, found.reminder.due) == (BEGIN, 0, False)
    with store.transaction() as session:
        hospital.pairs(session, new[:11], bias=0.0, at=LATER)
        hospital.pairs(session, digital, bias=0.0, at=LATER)
    reminder = overview(store).reminder
    assert (reminder.people, reminder.digital, reminder.needed, reminder.due) == (11, 2, 12, False)
    with store.transaction() as session:
        hospital.pairs(session, new[11:12], bias=0.0, at=LATER)
    assert overview(store).reminder.due


def a_run(store: Store, state: RunState, studies: list[str]) -> int:
    """A training run that learned from these studies' pairs."""
    with store.transaction() as session:
        found = pairing.overview(session, POLICY.pairing).pairs
        taken = [{"study_uid": one.ct.study_uid, "dxa_id": one.dxa.id} for one in found if one.ct.study_uid in studies]
        assert len(taken) == len(studies)
        row = TrainingRunRow(
            state=state.value, going=1 if state.going else None, reason="r", created_at=LATER, created_by="lena",
            configuration="osteogate", start="scratch", people="patients", patients=1, locked=1, vertebrae=4,
            manifest={"pairs": taken, "targets": ["bmd_g_cm2"]}, manifest_sha256="",
        )  # fmt: skip
        session.add(row)
        session.flush()
        return row.id


def test_what_a_run_has_taken_is_not_new(store: Store) -> None:
    """Finished, or still going; what failed or was cancelled gave nothing, so its pairs are as new as before."""
    with store.transaction() as session:
        studies = hospital.months(session, 14)
        digital = hospital.months(session, 2, scanner=CANON, synthetic=True)
        hospital.pairs(session, [*studies, *digital], bias=0.0, at=LATER)
        uids = [study.study_uid for study in studies]
    before = overview(store).reminder
    assert (before.people, before.digital, before.due, before.run) == (14, 2, True, None)
    for state in (RunState.FAILED, RunState.CANCELLED):
        a_run(store, state, uids)
    assert overview(store).reminder == before
    first = a_run(store, RunState.FINISHED, uids[:3])
    told = overview(store).reminder
    assert (told.people, told.digital, told.due, told.run) == (11, 2, False, first)
    going = a_run(store, RunState.RUNNING, uids[2:6])  # one of them for the second time
    told = overview(store).reminder
    assert (told.people, told.run) == (8, going)
    (model,) = overview(store).models
    assert model.groups[0].performance.n == 14  # how the model does is another question


def test_a_shifted_scanner_is_told_and_its_neighbour_is_not(store: Store) -> None:
    with store.transaction() as session:
        hospital.months(session, 75, scanner=SIEMENS, shift_from=50)
        hospital.months(session, 60, scanner=CANON, seed=3)
    with store.reading() as session:
        bad, good = watched(session, DEFAULT_POLICY.monitoring)
    assert (bad.scanner.label, bad.n, good.scanner.label) == (
        "SIEMENS SOMATOM, kernel Br40d",
        75,
        "CANON Aquilion, kernel FC18",
    )
    assert bad.alerts
    assert {alert.reason.code for alert in bad.alerts} <= {*TISSUES.values()}
    assert all(alert.since >= (BEGIN + timedelta(days=50 // hospital.A_DAY)).date() for alert in bad.alerts)
    assert good.alerts == ()
    assert sum(week.n for week in good.weeks) == 60


def test_the_lookout_looks_again_only_when_a_result_came(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lookout, looked = Lookout(DEFAULT_POLICY.monitoring), []
    monkeypatch.setattr("service.workflow.watching.watched", lambda *_: looked.append(1) or ())
    for expected in (1, 1):
        with store.reading() as session:
            assert lookout.scanners(session) == ()
        assert len(looked) == expected
    with store.transaction() as session:
        hospital.ct(session, 0)
    with store.reading() as session:
        lookout.alerts(session)
    assert len(looked) == 2


def test_results_of_earlier_versions_without_reference_tissues_are_counted_all_the_same(store: Store) -> None:
    with store.transaction() as session:
        study = hospital.ct(session, 0)
        document = {**study.results[0].document}
        document["anatomy"] = {key: value for key, value in document["anatomy"].items() if key != "reference_hu"}
        study.results[0].document = document
    with store.reading() as session:
        (one,) = watched(session, DEFAULT_POLICY.monitoring)
    assert one.n == 1
    assert all(chart.n == 0 for chart in one.charts)
