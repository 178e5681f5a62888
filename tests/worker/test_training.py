"""A training run at the worker: a package and two reports, the same whatever stopped it on the way."""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import shutil
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from sqlalchemy import select, update

from models.package import ModelPackage
from models.training import Run
from service.cli import main
from service.domain.reasons import Code
from service.domain.states import RunStage, RunState
from service.store.tables import AuditRow, TrainingRunRow
from service.workflow import model, models, training_files, training_work
from service.workflow import training as runs
from service.workflow.clock import utc_now
from service.workflow.packages import Library
from service.workflow.training import RunLine
from service.workflow.training_work import RunClaim
from tests.service.workflow import workbench
from tests.service.workflow.pairs import BY, ask, fill
from tests.worker.training_site import Site, drawn, killed_at, run
from worker import cohorts, training
from worker.runner import EXIT_ENDED, EXIT_RELEASED
from worker.trainer import DiskLow, Ended, RunWatch

STEPS = 6  # 2 epochs of 3 batches of 8 vertebrae


@functools.cache
def _asked_once() -> Path:
    """A database with 14 digital patients and run 1, made once."""
    folder = Path(tempfile.mkdtemp(prefix="osteogate-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with workbench.fresh_store("sqlite", folder) as store:
        fill(store)
        assert ask(store).id == 1
    return folder / "osteogate.sqlite3"


def asked(folder: Path) -> Site:
    """A site with 14 digital patients and run 1."""
    folder.mkdir()
    shutil.copyfile(_asked_once(), folder / "osteogate.sqlite3")
    return Site.at(folder)


def line(site: Site) -> RunLine:
    with site.store.reading() as session:
        found = runs.run(session, 1)
    assert found is not None
    return found


def no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judging takes longer than training here, and is shown by the straight run."""

    def told(judged: ModelPackage, _: Path, out: Path, **__: Any) -> None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps({"model_sha256": judged.sha256}), encoding="utf-8")

    monkeypatch.setattr(training, "evaluate", told)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A run that nothing stopped until its package stood."""
    site, stopping = asked(tmp_path_factory.mktemp("straight") / "data"), threading.Event()
    told = RunWatch.progress

    def stop_before_judging(watch: RunWatch, stage: RunStage, *more: Any) -> None:
        told(watch, stage, *more)
        if stage is RunStage.JUDGING:
            stopping.set()

    with patch.object(RunWatch, "progress", stop_before_judging):
        assert run(site, 1, stopping=stopping) is Ended.RELEASED
    return site


@pytest.fixture(scope="module")
def straight(trained: Site) -> Site:
    """The same run, judged: its package is taken as it stands."""
    before = made(trained)
    assert run(trained, 1) is Ended.FINISHED
    assert made(trained) == before
    return trained


def made(site: Site) -> str:
    """The hash of a run's package."""
    return ModelPackage.load(site.settings.training_dir / "1" / "package").sha256


def test_a_run_ends_with_a_package_and_both_reports(straight: Site) -> None:
    done = line(straight)
    assert (done.state, done.lost, done.last_error) == (RunState.FINISHED, (), None)
    package = ModelPackage.load(straight.folder / str(done.package_path))
    assert package.sha256 == done.package_sha256
    assert (package.name, package.manifest.synthetic_only) == ("site-1", True)
    facts = package.manifest.training["cohort"]
    assert (facts["training_run"], facts["manifest_sha256"]) == (1, done.manifest_sha256)
    reports = {
        name: json.loads((straight.folder / str(path) / "report.json").read_text())
        for name, path in (("candidate", done.candidate_report), ("champion", done.champion_report))
    }
    assert reports["candidate"]["model_sha256"] == package.sha256
    assert reports["champion"]["model"] == done.champion
    for report in reports.values():
        assert report["n_patients"] == done.locked
        assert report["per_vertebra"]["hu_bmd"]["r"] > 0.9  # brightness is the BMD here
        assert "another cohort" in report["comparators"]["fitted_on"]
    with straight.store.reading() as session:
        points = runs.curve(session, 1)
    assert [(one.network, one.epoch) for one in points] == [("fold0", 1), ("fold0", 2)]
    assert done.share is None  # it judged last


RECORD = {"manifest.json", "package", "report"}


def left(site: Site) -> set[str]:
    """What lies in the run's folder."""
    return {path.name for path in (site.settings.training_dir / "1").iterdir()}


def test_a_finished_run_leaves_its_record_and_no_crop_or_checkpoint(straight: Site) -> None:
    assert left(straight) == RECORD
    assert training_files.leftovers(straight.settings.training_dir) == {}
    with straight.store.reading() as session:
        rows = session.scalars(select(AuditRow).where(AuditRow.action == "training.tidy")).all()
    assert [row.subject for row in rows] == ["training-run:1"]
    assert rows[0].detail["removed"] == ["cohort-locked", "cohort-training", "cut.json", "package.run"]


def test_the_candidate_stands_in_the_registry_and_the_gate_counts_people_only(straight: Site) -> None:
    with straight.store.reading() as session:
        candidate = models.show(session, models.find(session, made(straight)))
        assert model.in_force(session, straight.settings.models_dir).sha256 == model.shipped_in_force().sha256
    assert (candidate.sha256, candidate.run_id) == (made(straight), "1")
    assert candidate.verdict is not None
    assert not candidate.verdict.passed
    assert {Code.GATE_SYNTHETIC, Code.GATE_FEW_PATIENTS} <= {reason.code for reason in candidate.verdict.reasons}


def test_it_is_judged_anew_on_its_locked_patients_at_the_command_line(
    straight: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a site does it when another model has come in force meanwhile; the cohorts were removed with the run's end."""
    monkeypatch.setenv("OSTEOGATE_DATA_DIR", str(straight.folder))
    monkeypatch.setattr(cohorts, "_levels", drawn)
    with straight.store.reading() as session:
        before = models.show(session, models.find(session, "site-1"))
    assert main(["models", "judge", "site-1", "--run", "1"]) == 1
    told = capsys.readouterr().out
    assert "BAD GATE_SYNTHETIC: 0 people" in told
    assert "ok  GATE_OTHER_TEST_SET" in told
    with straight.store.reading() as session:
        after = models.show(session, before.id)
    assert before.judged_at is not None
    assert after.judged_at is not None
    assert after.judged_at > before.judged_at
    assert after.verdict is not None
    assert before.verdict is not None
    assert [check.code for check in after.verdict.checks] == [check.code for check in before.verdict.checks]
    kept = Library.of(straight.settings).reports(after.sha256)
    first = json.loads((straight.folder / str(line(straight).candidate_report) / "report.json").read_text())
    for report in kept.values():  # of exactly the run's own patients: the same hash over slabs and labels
        assert report["cohort"]["sha256"] == first["cohort"]["sha256"]
    assert kept["candidate"]["per_vertebra"]["bmd"] == first["per_vertebra"]["bmd"]
    (now, then) = (one["per_patient"]["osteopenia"] for one in (kept["candidate"], first))
    assert {**now, "comparators": None} == {**then, "comparators": None}  # there is no cohort left to fit boosting on
    assert left(straight) == RECORD
    assert main(["models", "judge", "site-1", "--run", "7"]) == 1
    assert "no training run 7" in capsys.readouterr().err


def test_package_and_reports_hold_no_patient_data(straight: Site) -> None:
    """The manifest and the cohorts stay in the house; what can leave it names nobody."""
    done, looked = line(straight), 0
    for path in (done.package_path, done.candidate_report, done.champion_report):
        for file in (straight.folder / str(path)).iterdir():
            content = file.read_bytes()
            for told in (b"1.2.826.", b"Phantom^", b"P00001", b"p00001", str(straight.folder).encode()):
                assert told not in content, f"{told!r} in {file.name}"
            looked += 1
    assert looked > 10
    assert "1.2.826." in json.dumps(_manifest(straight))  # the look would see it


def _manifest(site: Site) -> Any:
    with site.store.reading() as session:
        return runs.manifest(session, 1)


@pytest.mark.timeout(1200)  # a fresh interpreter loads torch; on a busy machine that alone takes minutes
def test_killed_in_the_middle_and_taken_up_again_it_is_the_same_package(
    trained: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = asked(tmp_path / "data")
    process = multiprocessing.get_context("spawn").Process(target=killed_at, args=(site.folder, 1, 5))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert (line(site).state, line(site).stage) == (RunState.RUNNING, RunStage.TRAINING)
    with site.store.transaction() as session:
        assert training_work.reconcile(session, utc_now() + timedelta(seconds=10), 3) == [1]
    no_reports(monkeypatch)
    seen: list[int] = []
    assert run(site, 1, hook=lambda one: seen.append(one.step)) is Ended.FINISHED
    assert seen == [5, 6]  # step 4 was the last that a checkpoint held
    assert line(site).attempts == 2
    assert line(site).package_sha256 == made(site) == made(trained)


def test_told_to_stop_then_cancelled_then_resumed_it_is_the_same_package(
    trained: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, stopping = asked(tmp_path / "data"), threading.Event()
    no_reports(monkeypatch)

    def at_two(one: Run) -> None:
        if one.step == 2:
            stopping.set()

    assert run(site, 1, hook=at_two, stopping=stopping) is Ended.RELEASED
    assert (line(site).state, line(site).attempts) == (RunState.WAITING, 0)  # a shutdown costs no attempt
    seen: list[int] = []

    def at_four(one: Run) -> None:
        seen.append(one.step)
        if one.step == 4:
            with site.store.transaction() as session:
                runs.cancel(session, 1, BY)
            workbench.eventually(lambda: watches[-1].cancelled, "the cancellation is heard")

    watches = _remembered(monkeypatch)
    assert run(site, 1, hook=at_four) is Ended.CANCELLED
    assert seen == [3, 4]  # within a step
    assert line(site).state is RunState.CANCELLED
    assert {"cut.json", "cohort-training", "cohort-locked", "package.run"} <= left(site)  # all that a resume needs
    with site.store.transaction() as session:
        runs.resume(session, 1, BY)
    assert run(site, 1, hook=lambda one: seen.append(one.step)) is Ended.FINISHED
    assert seen == list(range(3, STEPS + 1))
    assert left(site) == RECORD
    assert line(site).package_sha256 == made(site) == made(trained)


def _remembered(monkeypatch: pytest.MonkeyPatch) -> list[RunWatch]:
    """The watches that are made from now on."""
    made: list[RunWatch] = []
    begin = RunWatch.__init__

    def remember(watch: RunWatch, *arguments: Any) -> None:
        begin(watch, *arguments)
        made.append(watch)

    monkeypatch.setattr(RunWatch, "__init__", remember)
    return made


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_an_altered_manifest_is_never_trained_on(tmp_path: Path) -> None:
    site = asked(tmp_path / "data")
    altered = _manifest(site) | {"seed": 2}
    with site.store.transaction() as session:
        session.execute(update(TrainingRunRow).values(manifest=altered))
    assert run(site, 1) is Ended.FAILED
    assert (line(site).state, line(site).attempts) == (RunState.FAILED, 1)  # another attempt would say the same
    assert "its hash differs" in str(line(site).last_error)


def working(monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any]) -> None:
    monkeypatch.setattr(training, "train_run", work)


def test_what_may_pass_costs_an_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = asked(tmp_path / "data")

    def disk_full(*_: object) -> None:
        raise DiskLow("3 MiB are free")

    working(monkeypatch, disk_full)
    for attempt in (1, 2, 3):
        assert run(site, 1) is Ended.FAILED
        assert line(site).state is (RunState.FAILED if attempt == 3 else RunState.WAITING)
    assert line(site).last_error == "attempt 3 on bench: DiskLow: 3 MiB are free"
    assert run(site, 1) is Ended.NOT_CLAIMED


def test_without_room_a_run_does_not_begin_and_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = asked(tmp_path / "data")
    site.settings = site.settings.model_copy(update={"training_disk_bytes": 2**62})
    assert run(site, 1) is Ended.FAILED
    assert "a run needs" in str(line(site).last_error)
    site.settings = site.settings.model_copy(update={"training_disk_bytes": 0, "disk_floor_bytes": 2**62})
    assert run(site, 1) is Ended.FAILED
    assert "below the floor" in str(line(site).last_error)


@pytest.mark.parametrize(("late", "code"), [(False, EXIT_RELEASED), (True, EXIT_ENDED)])
def test_what_hangs_is_given_back_and_the_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool, code: int
) -> None:
    """Told to stop, or past its time limit, and no step comes to its end."""
    site, exits, stopping = asked(tmp_path / "data"), [], threading.Event()

    def hangs(*_: object) -> None:
        if not late:
            stopping.set()
        workbench.eventually(lambda: exits, "the process ends")

    working(monkeypatch, hangs)
    if late:
        site.settings = site.settings.model_copy(update={"training_deadline_seconds": 0.01})
    trainer = site.trainer(stopping=stopping, grace_seconds=0.05, exit_process=exits.append)
    assert trainer.run(1) is Ended.LOST  # in truth the process is gone by now
    assert exits == [code]
    assert line(site).state is (RunState.FAILED if late else RunState.WAITING)


def test_a_step_that_hangs_for_ever_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease then runs out, the attempt counts, and the next one goes on from the last checkpoint."""
    site, exits = asked(tmp_path / "data"), []
    working(monkeypatch, lambda *_: workbench.eventually(lambda: exits, "the process ends"))
    site.settings = site.settings.model_copy(update={"job_deadline_seconds": 0.05})
    site.trainer(exit_process=exits.append).run(1)
    assert exits == [EXIT_ENDED]


def test_a_run_that_was_taken_away_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = asked(tmp_path / "data")

    def overtaken(*arguments: Any) -> Any:
        watch: RunWatch = arguments[-1]
        with site.store.transaction() as session:
            training_work.reconcile(session, utc_now() + timedelta(seconds=10), 3)
        watch.progress(RunStage.TRAINING, {"steps_done": 1})
        assert not watch.go_on()
        raise training.Halted

    working(monkeypatch, overtaken)
    assert run(site, 1) is Ended.LOST
    assert (line(site).state, line(site).progress) == (RunState.WAITING, {})


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    site = asked(tmp_path / "data")

    def diverge(one: Run) -> None:
        one.losses.append(float("nan"))

    assert run(site, 1, hook=diverge) is Ended.FAILED
    assert "no longer a number at step 1" in str(line(site).last_error)


def test_the_package_to_start_with_is_found_by_its_hash(tmp_path: Path) -> None:
    site, origin = asked(tmp_path / "data"), runs.shelf().origin
    assert origin is not None
    assert training._package(origin.sha256, site.settings).name == origin.name
    assert training.package_path("active").name == origin.name  # service and worker mean the same model
    with pytest.raises(ValueError, match="is not here any more"):
        training._package("00" * 32, site.settings)


def test_a_database_that_is_away_costs_the_picture_and_not_the_run(tmp_path: Path) -> None:
    site = asked(tmp_path / "data")
    held = RunClaim(1, 1, 1, "w", {}, "", utc_now(), utc_now() + timedelta(days=1))
    watch = RunWatch(site.trainer(), held)
    site.store.close()
    (site.folder / "osteogate.sqlite3").rename(site.folder / "away")
    watch.progress(RunStage.TRAINING, {"steps_done": 1})
    assert watch.go_on()
