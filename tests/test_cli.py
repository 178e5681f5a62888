"""The command line as a person meets it: answers on success, one clear line and a status on failure."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import pytest

from models.package import ModelPackage
from service.cli import main, training
from service.domain.policy import DEFAULT_POLICY
from tests.conftest import ROOT
from tests.models.tiny import tiny_cohort, tiny_config
from worker.start import REFERENCE


@pytest.fixture(autouse=True)
def in_a_fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTEOGATE_DATA_DIR", str(tmp_path / "data"))


def test_models_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list"]) == 0
    assert REFERENCE in capsys.readouterr().out
    assert main(["models", "show", "active"]) == 0
    assert "digital patients only" in capsys.readouterr().out.lower()
    assert main(["models", "show", "no-such-model"]) == 1
    assert "no model package" in capsys.readouterr().err


def test_weights_status_names_the_sum(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "status"]) == 0
    out = capsys.readouterr().out
    assert "built in" in out
    assert "sha256" in out


def test_doctor_says_what_is_amiss_and_then_that_it_is_mended(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "no schema yet" in out
    assert "is the installation running?" in out
    assert DEFAULT_POLICY.label in out
    assert main(["db", "upgrade"]) == 0
    main(["doctor"])
    assert "no schema yet" not in capsys.readouterr().out


def test_phantom_reference_is_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped reference names its command; a shorter run of it makes the same kind of table."""
    assert main(["phantom", "reference", "--seed", "44000", "--patients", "3"]) == 0
    out = capsys.readouterr().out
    shipped = (ROOT / "service" / "domain" / "references" / "digital.toml").read_text()
    for line in ("[digital.young-f-l1l4]", "[digital.young-m-l1l4]", 'population = "'):
        assert line in out
        assert line in shipped


def test_a_training_run_that_is_told_to_stop_keeps_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(tiny_config().to_dict()))
    cohort, out, told = tiny_cohort(tmp_path / "cohort"), tmp_path / "tiny-0.1", threading.Event()
    monkeypatch.setattr(training, "until_signalled", lambda: told)
    command = ["train", "--cohort", str(cohort), "--config", str(config), "--out", str(out)]
    told.set()
    assert main(command) == 128 + signal.SIGINT
    assert "fold0 was stopped after step 1 of 12; every step is kept, --resume goes on" in capsys.readouterr().err
    assert not out.exists()
    told.clear()
    assert main([*command, "--resume"]) == 0
    assert ModelPackage.load(out).manifest.finished


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["screen", "no-such-path", "--out", "out"], "does not exist"),
        (["send", "x.dcm", "--to", "nowhere", "--called", "A"], "HOST:PORT"),
        (["phantom", "study", "--seed", "1", "--out", "p", "--set", "age"], "KEY=VALUE"),
        (["phantom", "study", "--seed", "1", "--out", "p", "--set", "age=7"], "age"),
    ],
)
def test_a_mistake_gets_one_clear_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


def test_a_folder_is_sent_and_what_is_no_dicom_in_it_is_passed_over(tmp_path: Path) -> None:
    from service.dicom.send import send_files

    (tmp_path / "truth.json").write_text("{}")
    peer = {"host": "127.0.0.1", "called": "X"}
    in_a_folder = send_files([tmp_path], port=9, **peer)
    assert [path.name for path, _ in in_a_folder.passed_over] == ["truth.json"]
    assert in_a_folder.failed == []
    named = send_files([tmp_path / "truth.json"], port=9, **peer)
    assert "not a DICOM file" in named.failed[0][1]


def test_users_and_keys_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["db", "upgrade"]) == 0
    monkeypatch.setenv("OSTEOGATE_WEB_HOST", "0.0.0.0")
    assert main(["web"]) == 1  # off loopback only with users
    assert "osteogate user add" in capsys.readouterr().err
    file = tmp_path / "password"
    file.write_text("correct horse battery\n")
    add = ["user", "add", "Dr. Tanabe", "--role", "clinician", "--role", "pacs-admin", "--password-file", str(file)]
    assert main(add) == 0
    assert main(add) == 1
    assert "already" in capsys.readouterr().err
    assert main(["user", "add", "x", "--role", "root", "--password-file", str(file)]) == 1
    assert "roles are" in capsys.readouterr().err
    assert main(["user", "roles", "dr. tanabe", "--role", "viewer"]) == 0
    assert main(["user", "disable", "dr. tanabe"]) == 0
    assert main(["user", "list"]) == 0
    assert "Dr. Tanabe  viewer  disabled" in capsys.readouterr().out
    assert main(["user", "enable", "dr. tanabe"]) == 0
    assert main(["user", "password", "nobody-here", "--password-file", str(file)]) == 1
    capsys.readouterr()

    assert main(["key", "create", "--role", "ml-admin", "--name", "lab", "--days", "30"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("osteogate_")
    assert told.out.strip() not in told.err
    assert main(["key", "list"]) == 0
    assert "lab  ml-admin  in force, until" in capsys.readouterr().out
    assert main(["key", "revoke", "lab"]) == 0
    assert main(["key", "revoke", "lab"]) == 1
    assert main(["key", "create", "--role", "viewer", "--days", "0"]) == 1


def test_dxa_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.service.domain.test_dxa import GE

    assert main(["db", "upgrade"]) == 0
    file = tmp_path / "spine.csv"
    file.write_text("\ufeff" + GE, encoding="utf-8")
    assert main(["dxa", "import", str(file)]) == 1
    told = capsys.readouterr()
    assert "line 2: DXA_DEVICE_MISSING" in told.err
    assert "0 new" in told.out
    assert main(["dxa", "import", str(file), "--model", "Prodigy"]) == 0
    assert "ge-lunar, 7 rows: 1 new, 0 known before, 1 passed over, 0 refused" in capsys.readouterr().out
    mapping = tmp_path / "mapping.toml"
    mapping.write_text('patient_id = "ID"\nscan_date = "D"\n"L1.bmd" = "B"\n')
    file.write_text("ID,D,B\nP2,04/03/26,0.9\nP3,04/03/26,x\n")
    more = ["--mapping", str(mapping), "--manufacturer", "Norland", "--model", "XR-46", "--date-format", "%d/%m/%y"]
    assert main(["dxa", "import", str(file), *more]) == 1
    assert main(["dxa", "import", str(file), *more, "--skip-refused"]) == 0
    assert "mapped, 2 rows: 1 new, 0 known before, 0 passed over, 1 refused" in capsys.readouterr().out


def test_models_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another site's package comes in, is judged here beside the model in force, promoted, and rolled back."""
    import models.evaluation
    from tests.models.tiny import tiny_cohort
    from tests.service.domain.reports import passing
    from tests.service.workflow import toy_models

    away = toy_models.library(tmp_path / "away")
    kept = away.keep_run(toy_models.run(tmp_path / "run"))
    file = tmp_path / "site-1.zip"
    with file.open("wb") as out:
        away.export(kept.path, kept.hashes, kept.signature, out)
    cohort = tiny_cohort(tmp_path / "cohort", patients=1)
    people = [60]
    asked = []

    def evaluate(package: ModelPackage, cohort_dir: Path, out: Path, **options: object) -> None:
        asked.append((package.name, options))
        out.mkdir()
        (out / "report.json").write_text(json.dumps(passing(package.sha256, n_patients_real=people[0])))

    monkeypatch.setattr(models.evaluation, "evaluate", evaluate)
    assert main(["db", "upgrade"]) == 0
    assert main(["models", "list"]) == 0
    assert f"{REFERENCE}  " in capsys.readouterr().out
    assert main(["models", "import", str(file)]) == 0
    assert "signature: foreign" in capsys.readouterr().out
    assert main(["models", "import", str(cohort / "cohort.csv")]) == 1
    assert "no ZIP" in capsys.readouterr().err
    promote = ["models", "promote", "site-1", "--reason", "agrees with our DXA", "--person", "Dr. Ito"]
    assert main(promote) == 1
    assert "GATE_NOT_JUDGED" in capsys.readouterr().err
    assert main(["models", "show", "2"]) == 0
    assert "site-1" in capsys.readouterr().out
    assert main(["models", "show", "nothing"]) == 1
    assert "no model package 'nothing'" in capsys.readouterr().err
    judge = ["models", "judge", "2", "--cohort", str(cohort), "--folds", "9"]
    people[0] = 10
    assert main(judge) == 1
    assert "BAD GATE_FEW_PATIENTS: 10 people" in capsys.readouterr().out
    assert main(promote) == 1
    people[0] = 60
    assert main(judge) == 0
    assert [name for name, _ in asked[-2:]] == ["site-1", REFERENCE]
    assert asked[-1][1]["folds"] == (9,)
    judged_by = asked[-1][1]["definitions"]["osteopenia"]  # type: ignore[index]
    assert judged_by.words == "YOSHIDA_2023: < 80 % YAM"
    assert set(judged_by.cut_g_cm2) == {"F", "M"}  # digital patients
    assert main(promote) == 0
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].endswith("in force")
    assert main(["models", "show", "active"]) == 0
    assert "ok  GATE_SENSITIVITY" in capsys.readouterr().out
    out = tmp_path / "out.zip"
    assert main(["models", "export", "site-1", "--out", str(out)]) == 0
    assert out.stat().st_size > 1000
    assert main(["models", "export", REFERENCE, "--out", str(tmp_path / "none.zip")]) == 1
    assert not list(tmp_path.glob("*none.zip*"))
    assert main(["models", "rollback", "--reason", "too many flags"]) == 0
    assert f"{REFERENCE} is in force" in capsys.readouterr().out
    assert main(["models", "rollback", "--reason", "too many flags"]) == 1
