"""`osteogate up`, on SQLite and Valkey and on PostgreSQL and Redis: killed with nothing lost, ended cleanly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread

from tests.installations import KINDS, TIMEOUT_SECONDS, Installation, installed
from tests.real_ct import write_dicom_series


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_killed_in_the_middle_nothing_is_lost(installation: Installation, digital_study: Path) -> None:
    truth = json.loads((digital_study / "truth.json").read_text())
    files = sorted(digital_study.rglob("*.dcm"))
    half = len(files) // 2
    installation.start()
    assert installation.send(files[:half]) == half

    installation.kill()  # the supervisor dies with no chance to tell anybody

    installation.start()
    assert installation.send(files[half:]) == len(files) - half
    result = installation.result(truth["study_uid"])
    assert result["patient"]["levels_used"] == ["L1", "L2", "L3", "L4"]

    assert installation.stop(signal.SIGINT) == 0  # Ctrl-C
    installation.start()
    assert installation.result(truth["study_uid"]) == result
    assert installation.stop() == 0


@pytest.fixture(scope="module", params=KINDS)
def standing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """An installation of either size that runs, for the tests that leave it as it is."""
    with installed(request.param, tmp_path_factory.mktemp("standing")) as found:
        found.start(OSTEOGATE_INCOMPLETE_PATIENCE_SECONDS="12")
        yield found


@pytest.fixture(scope="module")
def low_and_gap(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from models.phantom.study import make_study

    folder = tmp_path_factory.mktemp("patients")
    low = make_study(1, folder / "low", {"bmd_g_cm2": "0.66", "sex": "F", "age": "74"})
    return low, make_study(2, folder / "gap", {"drop_slice": "true"})


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_what_the_demo_shows_is_true_of_both_installations(
    standing: Installation, low_and_gap: tuple[Path, Path]
) -> None:
    """A digital patient with low bone density is referred, one whose scan has a gap is not assessable."""
    low, gap = low_and_gap
    uids = [json.loads((folder / "truth.json").read_text())["study_uid"] for folder in (low, gap)]
    assert standing.send(sorted(low.rglob("*.dcm")))
    assert standing.send(sorted(gap.rglob("*.dcm")))
    referred, refused = (standing.result(uid) for uid in uids)
    assert (referred["decision"]["category"], referred["decision"]["driver"]) == ("refer", "network")
    assert referred["patient"]["synthetic"] is True
    assert refused["decision"]["category"] == "not-assessable"
    assert "MISSING_SLICE" in {reason["code"] for reason in refused["verdict"]["reasons"]}
    assert refused["patient"]["bmd_g_cm2"] is None
    worklist = standing.api("/api/v1/worklist")
    assert {entry["study_uid"]: entry["category"] for entry in worklist["items"]}[uids[0]] == "refer"
    assert "Consider DXA" in standing.api("/", accept="text/html")


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_a_real_spine_sent_by_storescu_gets_an_honest_answer(
    standing: Installation, storescu: str, real_data: Path, tmp_path: Path
) -> None:
    """Right levels decided by CT attenuation, or not assessable with the reason; the network never drives."""
    files = write_dicom_series(real_data / "totalsegmentator-example-ct" / "example_ct.nii.gz", tmp_path / "ct")
    study_uid = str(dcmread(files[0], stop_before_pixels=True).StudyInstanceUID)
    host, port = standing.dicom_address
    command = [storescu, "-aec", "OSTEOGATE", "-aet", "REALPACS", "+sd", host, str(port), str(tmp_path / "ct")]
    assert subprocess.run(command, capture_output=True, timeout=600, check=False).returncode == 0
    result = standing.result(study_uid)
    assert result["patient"]["synthetic"] is False
    assert result["decision"]["driver"] in {"ct-attenuation", "none"}
    if result["decision"]["category"] == "not-assessable":
        assert result["decision"]["reasons"]
    else:  # the reference's own figures: L1 reads 105-108 HU at the body's centroid (see the real case's labels)
        assert result["anatomy"]["numbering"] == "certain"
        assert result["levels"]["L1"]["hu_mean"] == pytest.approx(108, abs=25)


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_a_second_up_on_one_folder_is_refused(standing: Installation) -> None:
    command = [sys.executable, "-m", "service.cli", "up", "--data", str(standing.data_dir)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert second.returncode != 0
    assert "another osteogate is running" in second.stderr + second.stdout
    assert standing.is_ready()


def test_the_folder_of_a_dead_owner_is_free(tmp_path: Path) -> None:
    from service.supervise import AlreadyRunning, sole_owner

    with sole_owner(tmp_path), pytest.raises(AlreadyRunning), sole_owner(tmp_path):
        pass
    with sole_owner(tmp_path):
        pass
