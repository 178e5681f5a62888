"""`osteogate demo`: truth and decision agree for every digital patient, with no network but loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import absent

pytestmark = pytest.mark.timeout(1500)  # whichever test comes first waits for the demo
EXPECTED_REFUSAL = {
    "contrast-enhanced": "CONTRAST_TAGGED",
    "scanned at 140 kVp": "KVP_NOT_120",
    "only L2-L5 in view": "LEVEL_OUT_OF_VIEW",
    "a slice is missing": "MISSING_SLICE",
}


def _isolated() -> list[str]:
    """A prefix that runs a command in a network namespace with loopback only; empty where that is not allowed."""
    probe = ["unshare", "--net", "sh", "-c", "ip link set lo up"]
    if shutil.which("unshare") and shutil.which("ip") and subprocess.run(probe, capture_output=True).returncode == 0:
        return ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    return []


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    temporary = tmp_path_factory.mktemp("demo")  # its own: another demo may run on this machine
    file = temporary / "demo.json"
    command = [*_isolated(), sys.executable, "-m", "service.cli", "demo", "--seed", "1", "--json", str(file)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    document: dict[str, Any] = json.loads(file.read_text())
    document["printed"] = done.stdout
    document["left_behind"] = sorted(path.name for path in temporary.glob("osteogate-demo-*"))
    return document


def _patient(demo: dict[str, Any], shows: str) -> dict[str, Any]:
    found: dict[str, Any] = next(patient for patient in demo["patients"] if patient["shows"] == shows)
    return found


def test_everybody_gets_a_result(demo: dict[str, Any]) -> None:
    assert len(demo["patients"]) >= 7
    assert all(patient["result"] for patient in demo["patients"])
    assert "Worklist" in demo["printed"]


def test_it_all_worked_with_no_network_at_all(demo: dict[str, Any]) -> None:
    """Fault 25: the demo above ran where nothing but loopback exists."""
    prefix = _isolated() or absent("a network namespace (unshare, ip)")
    reach = "import socket; socket.create_connection(('192.0.2.1', 9), timeout=2)"  # RFC 5737: never a real host
    out = subprocess.run([*prefix, sys.executable, "-c", reach], capture_output=True, text=True, check=False)
    assert "unreachable" in out.stderr
    assert all(patient["result"] for patient in demo["patients"])


def test_the_low_patient_is_referred_by_the_network(demo: dict[str, Any]) -> None:
    result = _patient(demo, "low bone density")["result"]
    assert result["decision"]["category"] == "refer"
    assert result["decision"]["driver"] == "network"
    assert result["patient"]["synthetic"] is True
    assert result["patient"]["levels_used"] == ["L1", "L2", "L3", "L4"]


def test_the_high_patient_is_not_referred(demo: dict[str, Any]) -> None:
    result = _patient(demo, "high bone density")["result"]
    assert result["decision"]["category"] == "no-flag"


@pytest.mark.parametrize("shows", sorted(EXPECTED_REFUSAL))
def test_the_bad_ones_are_not_assessable_with_the_right_reason(demo: dict[str, Any], shows: str) -> None:
    result = _patient(demo, shows)["result"]
    reasons = {reason["code"] for reason in result["verdict"]["reasons"] + result["decision"]["reasons"]}
    assert result["decision"]["category"] == "not-assessable"
    assert result["verdict"]["eligible"] is False
    assert EXPECTED_REFUSAL[shows] in reasons
    assert result["patient"]["bmd_g_cm2"] is None


def test_measured_follows_truth(demo: dict[str, Any]) -> None:
    measured = [p for p in demo["patients"] if p["result"]["patient"]["bmd_g_cm2"] is not None]
    assert len(measured) >= 3
    for patient in measured:
        truth, result = patient["truth"]["patient"]["bmd_g_cm2"], patient["result"]["patient"]["bmd_g_cm2"]
        assert abs(truth - result) < 0.15


def test_every_key_of_the_contract_is_there(demo: dict[str, Any]) -> None:
    for patient in demo["patients"]:
        result = patient["result"]
        assert set(result["levels"]) == {"L1", "L2", "L3", "L4"}
        assert {
            "study_uid",
            "series_uid",
            "revision",
            "verdict",
            "patient",
            "anatomy",
            "decision",
            "provenance",
        } <= set(result)
        assert result["anatomy"]["numbering"] in {"certain", "uncertain"}


def test_no_wording_of_a_diagnosis(demo: dict[str, Any]) -> None:
    text = json.dumps([patient["result"] for patient in demo["patients"]]).lower()
    assert "normal" not in text
    assert "diagnos" not in text


def test_the_demo_leaves_no_folder_behind(demo: dict[str, Any]) -> None:
    assert demo["left_behind"] == []
