"""The registry of models: nothing gets in front of patients but through the gate, by a person, and back again."""

from __future__ import annotations

import io
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from service.domain.policy import DEFAULT_POLICY, load_policy
from service.domain.reasons import Code
from service.store.engine import Store
from service.store.tables import ActiveModelRow, AuditRow, ModelRow, StudyRow
from service.workflow import model, models
from service.workflow.packages import Library, PackageRefused
from tests.service.domain.reports import passing
from tests.service.workflow import toy_models, workbench
from tests.service.workflow.toy_models import BY, POLICY, promoted, registered

SHIPPED = f"{model.shipped_model().manifest.name}-{model.shipped_model().manifest.version}"


@pytest.fixture
def home(tmp_path: Path) -> Library:
    return toy_models.library(tmp_path)


def codes(shut: models.NotPromotable) -> set[Code]:
    return {reason.code for reason in shut.reasons}


def audit(store: Store, action: str) -> list[AuditRow]:
    with store.reading() as session:
        return list(session.scalars(select(AuditRow).where(AuditRow.action == action).order_by(AuditRow.id)))


def in_force(store: Store, at: Library) -> model.InForce:
    with store.reading() as session:
        return model.in_force(session, at.root)


def test_the_shipped_model_is_in_force_until_a_person_says_otherwise(
    store: Store, home: Library, tmp_path: Path
) -> None:
    assert in_force(store, home).name == SHIPPED == model.REFERENCE
    line = registered(store, home.keep_run(toy_models.run(tmp_path / "run")))
    assert (line.promotable, line.in_force, line.run_id) == (True, False, "r1")
    assert in_force(store, home).name == SHIPPED  # a verdict that passed promotes nothing
    with store.transaction() as session:
        found = models.registry(session, BY.now)
    assert (found.in_force.name, found.rollback_to) == (SHIPPED, None)
    assert [one.name for one in found.models] == [SHIPPED, "site-1"]
    key = shipped_key(store)
    after = promoted(store, line.id, home)
    assert after.in_force
    now = in_force(store, home)
    assert (now.sha256, now.folder, now.gate_passed) == (line.sha256, home.root / line.sha256 / "package", True)
    with store.reading() as session:
        assert model.model_key(session) == line.sha256 != key
        move = session.scalars(select(ActiveModelRow).where(ActiveModelRow.number == 2)).one()
        assert (move.action, move.reason, move.by, move.at) == ("promote", "agrees with our DXA", BY.actor, BY.now)
    [row] = audit(store, "model.promote")
    assert (row.actor, row.peer_address, row.at) == (BY.actor, BY.peer_address, BY.now)
    assert row.detail["from"] == SHIPPED
    assert row.detail["sha256"] == line.sha256


def shipped_key(store: Store) -> str:
    with store.reading() as session:
        assert model.model_key(session) == model.shipped_model_key()
    return model.shipped_model_key()


def test_a_shut_gate_changes_nothing_and_says_every_why(store: Store, home: Library, tmp_path: Path) -> None:
    spoilt = {"n_patients_real": 0, "n_patients_synthetic": 60, "calibration__bmd__slope": 0.5}
    line = registered(store, home.keep_run(toy_models.run(tmp_path / "run", **spoilt)))
    assert not line.promotable
    with pytest.raises(models.NotPromotable) as shut:
        promoted(store, line.id, home)
    assert codes(shut.value) == {Code.GATE_SYNTHETIC, Code.GATE_FEW_PATIENTS, Code.GATE_CALIBRATION}
    assert in_force(store, home).name == SHIPPED
    assert audit(store, "model.promote") == []


def test_the_gate_is_asked_again_at_the_promotion(store: Store, home: Library, tmp_path: Path) -> None:
    """Under the policy of that moment, against the model in force at that moment, from the files that were signed."""
    line = registered(store, home.keep_run(toy_models.run(tmp_path / "run")))
    stricter = load_policy("[gate]\npatients_minimum = 61\n")
    with store.transaction() as session, pytest.raises(models.NotPromotable) as shut:
        models.promote(session, line.id, "why not", BY, library=home, policy=stricter)
    assert codes(shut.value) == {Code.GATE_FEW_PATIENTS}
    other = registered(store, home.keep_run(toy_models.run(tmp_path / "other", "2")))
    promoted(store, other.id, home)
    with pytest.raises(models.NotPromotable) as late:
        promoted(store, line.id, home)
    assert codes(late.value) == {Code.GATE_OTHER_CHAMPION}
    report = home.root / line.sha256 / "report" / "candidate.json"
    report.write_text(json.dumps(passing(line.sha256, n_patients_real=100)))
    with pytest.raises(PackageRefused, match=r"candidate\.json was altered"):
        promoted(store, line.id, home)


def test_a_verdict_forged_in_the_database_promotes_nothing(store: Store, home: Library, tmp_path: Path) -> None:
    line = registered(store, home.keep_run(toy_models.run(tmp_path / "run", n_patients_real=10)))
    with store.transaction() as session:
        row = session.get_one(ModelRow, line.id)
        assert row.verdict is not None
        checks = [{**check, "passed": True} for check in row.verdict["checks"]]
        row.verdict = {**row.verdict, "passed": True, "checks": checks}
    with pytest.raises(models.NotPromotable):
        promoted(store, line.id, home)


@pytest.mark.parametrize("reason", ["", "  \n", "x" * 1001])
def test_a_reason_is_needed(store: Store, home: Library, tmp_path: Path, reason: str) -> None:
    line = registered(store, home.keep_run(toy_models.run(tmp_path / "run")))
    with pytest.raises(models.ReasonMissing):
        promoted(store, line.id, home, reason)
    with store.transaction() as session, pytest.raises(models.ReasonMissing):
        models.rollback(session, reason, BY)


def test_a_report_about_another_package_is_refused(store: Store, home: Library, tmp_path: Path) -> None:
    kept = home.keep_run(toy_models.run(tmp_path / "run", model_sha256="f" * 64))
    with pytest.raises(PackageRefused, match="another package"):
        registered(store, kept)
    with pytest.raises(PackageRefused, match="no report"):
        registered(store, replace(kept, reports={}))
    with store.reading() as session:
        assert session.scalar(select(func.count()).select_from(ModelRow)) == 0


def test_rollback_goes_one_back_each_time_and_then_no_further(store: Store, home: Library, tmp_path: Path) -> None:
    first = registered(store, home.keep_run(toy_models.run(tmp_path / "a", "1")))
    promoted(store, first.id, home)
    second = registered(store, home.keep_run(toy_models.run(tmp_path / "b", "2", champion=first.sha256)))
    promoted(store, second.id, home)
    names = []
    for reason in ("too many flags", "still"):
        with store.transaction() as session:
            names.append(models.rollback(session, reason, BY, person="Dr. Ito").name)
    assert names == ["site-1", SHIPPED]
    assert in_force(store, home).sha256 == model.shipped_model().sha256
    with store.transaction() as session, pytest.raises(models.NothingBefore):
        models.rollback(session, "and again", BY)
    lines = audit(store, "model.rollback")
    assert [(line.detail["from"], line.detail["model"], line.detail["person"]) for line in lines] == [
        ("site-2", "site-1", "Dr. Ito"),
        ("site-1", SHIPPED, "Dr. Ito"),
    ]
    with store.transaction() as session:
        history = models.registry(session, BY.now).history
    assert [move.number for move in history] == [5, 4, 3, 2, 1]
    assert promoted(store, first.id, home).in_force  # against the shipped one again, as it was judged


def test_two_people_at_once_move_the_pointer_once(store: Store, home: Library, tmp_path: Path) -> None:
    lines = [registered(store, home.keep_run(toy_models.run(tmp_path / name, name))) for name in ("1", "2")]
    with store.transaction() as session:
        models.enrol_shipped(session, BY.now)
    start, refused = threading.Barrier(2), []

    def press(model_id: int) -> None:
        start.wait()
        try:
            promoted(store, model_id, home)
        except (IntegrityError, models.NotPromotable) as error:  # at the same moment, or an instant later
            refused.append(error)

    threads = [threading.Thread(target=press, args=(line.id,)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    with store.reading() as session:
        assert session.scalar(select(func.max(ActiveModelRow.number))) == 2
    assert len(audit(store, "model.promote")) == 1


def test_registering_twice_is_registering_once(store: Store, home: Library, tmp_path: Path) -> None:
    run = toy_models.run(tmp_path / "run")
    first, again = registered(store, home.keep_run(run)), registered(store, home.keep_run(run))
    assert first.id == again.id
    with store.transaction() as session:
        assert len(models.registry(session, BY.now).models) == 2


# --- what may decide --------------------------------------------------------------------------------------------------


def test_only_a_promoted_model_that_knows_people_may_drive(store: Store, home: Library, tmp_path: Path) -> None:
    people = registered(store, home.keep_run(toy_models.run(tmp_path / "a", "1")))
    digital = registered(store, home.keep_run(toy_models.run(tmp_path / "b", "2", synthetic_only=True)))

    def drives(sha256: str | None, **told: str) -> bool:
        with store.reading() as session:
            return model.gate_passed(session, sha256, **told)

    assert not drives(None)
    assert not drives(model.shipped_model().sha256)
    assert not drives(people.sha256)  # passed, and promoted by nobody
    promoted(store, digital.id, home)  # judged on people, learned from none
    assert in_force(store, home).sha256 == digital.sha256
    assert not drives(digital.sha256)
    with store.transaction() as session:
        models.rollback(session, "no", BY)
    promoted(store, people.id, home)
    assert drives(people.sha256)
    assert drives(people.sha256, gate=POLICY.gate_label)
    stricter = replace(POLICY, gate=replace(POLICY.gate, bias_g_cm2=0.01))
    assert not drives(people.sha256, gate=stricter.gate_label)  # judged by other rules than are in force
    with store.reading() as session:
        for gate, passed in ((POLICY.gate_label, True), (stricter.gate_label, False)):
            assert model.in_force(session, home.root, gate=gate).gate_passed is passed
    run = toy_models.run(tmp_path / "again", "1", n_patients_real=10)
    kept = home.keep_run(run)
    with store.transaction() as session:
        assert not models.judged(session, kept, BY, policy=POLICY).promotable
    assert not drives(people.sha256)  # in force, and judged anew: it no longer decides


def test_a_result_says_whether_its_model_had_passed(store: Store, home: Library, tmp_path: Path) -> None:
    """Whatever the worker believes: the registry is asked when the decision is made."""
    from service.workflow import screening

    line = registered(store, home.keep_run(toy_models.run(tmp_path / "run")))
    documents = []
    clock = workbench.Clock()
    for number in range(2):
        if number:
            promoted(store, line.id, home)
        job = workbench.queued(store, clock, f"1.2.{number}")
        held = workbench.claim(store, job, clock.now)
        assert held is not None
        made = workbench.measured()
        by_site = replace(made.provenance, model=line.name, model_sha256=line.sha256)
        made = replace(made, provenance=by_site, model_synthetic_only=False, model_gate_passed=not number)
        with store.transaction() as session:
            result = screening.record(
                session, held, made, artefacts=None, labelled=False, policy=DEFAULT_POLICY, now=clock.now
            )
            documents.append(result.document["provenance"])
    assert [one["model_gate_passed"] for one in documents] == [False, True]
    assert {one["model"] for one in documents} == {"site-1"}


# --- between sites ----------------------------------------------------------------------------------------------------


def test_an_imported_model_waits_for_this_sites_own_gate(store: Store, home: Library, tmp_path: Path) -> None:
    away = toy_models.library(tmp_path / "away")
    kept = away.keep_run(toy_models.run(tmp_path / "run"))  # it passed there, by the report that it brings
    out = io.BytesIO()
    away.export(kept.path, kept.hashes, kept.signature, out)
    out.seek(0)
    received = home.receive(out)
    with store.transaction() as session:
        line = models.enter_imported(session, received, BY)
    assert (line.origin, line.verdict, line.promotable) == ("imported", None, False)
    with pytest.raises(models.NotPromotable) as shut:
        promoted(store, line.id, home)
    assert codes(shut.value) == {Code.GATE_NOT_JUDGED}
    with store.transaction() as session:
        ours = home.keep_run(toy_models.run(tmp_path / "ours", "1"))
        assert models.judged(session, ours, BY, policy=POLICY).promotable
        with pytest.raises(models.NoModel):
            models.judged(session, replace(ours, sha256="0" * 64), BY, policy=POLICY)
        with pytest.raises(models.ModelError, match="rollback"):
            models.judged(session, replace(ours, sha256=model.shipped_model().sha256), BY, policy=POLICY)
    assert promoted(store, line.id, home).in_force


def test_an_export_holds_nothing_that_a_patient_is_called_by(store: Store, home: Library, tmp_path: Path) -> None:
    name, study = "TANAKA^HANAKO=田中^花子", "1.2.840.55.1001"
    with store.transaction() as session:
        row = StudyRow(
            study_uid=study,
            patient_id="MRN-4711",
            patient_name=name,
            accession_number="ACC-99",
            first_received_at=BY.now,
            last_received_at=BY.now,
        )
        session.add(row)
    line = registered(store, home.keep_run(toy_models.run(tmp_path / "run")))
    out = io.BytesIO()
    with store.transaction() as session:
        told = models.export(session, line.id, out, BY, library=home)
    assert told == f"site-1-{line.sha256[:12]}.osteogate.zip"
    content = _unpacked(out)
    for identifier in ("MRN-4711", "TANAKA", "HANAKO", "田中", study, "ACC-99", str(tmp_path)):
        assert identifier.encode() not in content
    assert [row.detail["model"] for row in audit(store, "model.export")] == ["site-1"]
    for number, leak in enumerate(({"seen": ["MRN-4711"]}, {name: 1}, {"note": f"as in {study}, say"}, "ACC-99")):
        run = toy_models.run(tmp_path / f"leak{number}", "1", leak=leak)
        kept = home.keep_run(run)
        registered(store, kept)
        out = io.BytesIO()
        with store.transaction() as session, pytest.raises(models.PatientData, match=r"report/candidate\.json"):
            models.export(session, line.id, out, BY, library=home)
        assert out.getvalue() == b""


def _unpacked(file: io.BytesIO) -> bytes:
    import zipfile

    with zipfile.ZipFile(file) as archive:
        assert "signature.json" in archive.namelist()
        return b"\n".join(name.encode() + b"\n" + archive.read(name) for name in archive.namelist())


def test_what_ships_is_not_exported_and_names_find_models(store: Store, home: Library, tmp_path: Path) -> None:
    line = registered(store, home.keep_run(toy_models.run(tmp_path / "run")))
    with store.transaction() as session:
        shipped = models.find(session, "active")
        with pytest.raises(PackageRefused, match="ships"):
            models.export(session, shipped, io.BytesIO(), BY, library=home)
        for told in (str(line.id), "site-1", line.sha256[:8], line.sha256):
            assert models.find(session, told) == line.id
        for told in ("site", line.sha256[:5] + "%", "", "99", "%%%%%%"):
            with pytest.raises(models.NoModel):
                models.find(session, told)
