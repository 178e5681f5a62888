"""`osteogate up` survives a kill of everything with nothing lost, and ends cleanly on Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from service.dicom.send import send_files
from tests.real_ct import write_dicom_series


class Installation:
    """An `osteogate up` process on a folder and free ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dicom_port, self.web_port = _free_port(), _free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {
            **os.environ,
            "OSTEOGATE_DICOM_PORT": str(self.dicom_port),
            "OSTEOGATE_WEB_PORT": str(self.web_port),
            "OSTEOGATE_QUIET_SECONDS": "4",
            "OSTEOGATE_INCOMPLETE_PATIENCE_SECONDS": "600",
            "OSTEOGATE_STEWARD_INTERVAL_SECONDS": "0.5",
            "OSTEOGATE_LEASE_SECONDS": "5",
        }
        command = [sys.executable, "-m", "service.cli", "up", "--data", str(self.folder)]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        _until(self.ready, 60, "the installation did not come up")

    def ready(self) -> bool:
        try:
            self.get("/api/v1/health/ready")
            with socket.create_connection(("127.0.0.1", self.dicom_port), timeout=1):
                return True
        except OSError:
            return False

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.web_port}{path}", timeout=10) as response:
            document: dict[str, Any] = json.load(response)
        return document

    def result(self, study_uid: str) -> dict[str, Any] | None:
        try:
            return self.get(f"/api/v1/studies/{study_uid}/result")
        except urllib.error.HTTPError as error:
            error.close()
            return None
        except OSError:
            return None

    def send(self, files: list[Path]) -> int:
        report = send_files(files, host="127.0.0.1", port=self.dicom_port, called="OSTEOGATE", calling="PACS")
        return len(report.sent)

    def signal(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(90)

    def pids(self) -> list[int]:
        """Every process of this installation, found by the data folder in its environment or command line."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if os.fsencode(self.folder) in words:
                found.append(int(entry.name))
        return found


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    installation = Installation(tmp_path / "data")
    installation.start()
    yield installation
    for pid in installation.pids():
        os.kill(pid, signal.SIGKILL)
    if installation.process is not None:
        installation.process.wait(30)


@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_in_the_middle_nothing_is_lost(installation: Installation, digital_study: Path) -> None:
    truth = json.loads((digital_study / "truth.json").read_text())
    files = sorted(digital_study.rglob("*.dcm"))
    half = len(files) // 2
    assert installation.send(files[:half]) == half

    installation.signal(signal.SIGKILL)  # the supervisor dies with no chance to tell anybody
    _until(lambda: not installation.pids(), 60, "the children outlived their supervisor")

    installation.start()
    assert installation.send(files[half:]) == len(files) - half
    _until(lambda: installation.result(truth["study_uid"]) is not None, 240, "no result after the restart")
    result = installation.result(truth["study_uid"])
    assert result is not None
    assert result["patient"]["levels_used"] == ["L1", "L2", "L3", "L4"]

    assert installation.signal(signal.SIGINT) == 0  # Ctrl-C
    _until(lambda: not installation.pids(), 10, "Ctrl-C left processes behind")
    installation.start()
    assert installation.result(truth["study_uid"]) == result
    assert installation.signal(signal.SIGTERM) == 0


@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_spine_sent_by_storescu_gets_an_honest_answer(
    installation: Installation, storescu: str, real_data: Path, tmp_path: Path
) -> None:
    """Right levels decided by CT attenuation, or not assessable with the reason; the network never drives."""
    files = write_dicom_series(real_data / "totalsegmentator-example-ct" / "example_ct.nii.gz", tmp_path / "ct")
    study_uid = str(dcmread(files[0], stop_before_pixels=True).StudyInstanceUID)
    address = ["127.0.0.1", str(installation.dicom_port)]
    command = [storescu, "-aec", "OSTEOGATE", "-aet", "REALPACS", "+sd", *address, str(tmp_path / "ct")]
    assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0
    _until(lambda: installation.result(study_uid) is not None, 240, "no result for the real spine")
    result = installation.result(study_uid)
    assert result is not None
    assert result["patient"]["synthetic"] is False
    assert result["decision"]["driver"] in {"ct-attenuation", "none"}
    if result["decision"]["category"] == "not-assessable":
        assert result["decision"]["reasons"]
    else:  # the reference's own figures: L1 reads 105-108 HU at the body's centroid (see the real case's labels)
        assert result["anatomy"]["numbering"] == "certain"
        assert result["levels"]["L1"]["hu_mean"] == pytest.approx(108, abs=25)


def test_a_second_up_on_one_folder_is_refused(tmp_path: Path) -> None:
    from service.supervise import AlreadyRunning, sole_owner

    with sole_owner(tmp_path), pytest.raises(AlreadyRunning), sole_owner(tmp_path):
        pass
    with sole_owner(tmp_path):
        pass


def _until(holds: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.25)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
