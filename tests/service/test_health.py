"""`osteogate health`: true of a part that works, false of one that does not, and no trace left behind."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from service.cli import main
from service.health import OLDEST_BEAT_SECONDS, READY, Unhealthy, check
from service.settings import Settings
from service.steward import Steward
from service.workflow.pulse import Pulse
from tests.service.dicom.harness import Database, listening
from tests.service.workflow import workbench
from tests.service.workflow.workbench import eventually

# --- the listener ------------------------------------------------------------------------------------------------


def test_a_listener_answers_and_nothing_is_recorded(tmp_path: Path) -> None:
    database = Database()
    with listening(tmp_path, database, dicom_host="0.0.0.0", peers="PACS@10.1.2.3") as listener:
        settings = Settings(data_dir=tmp_path, dicom_host="0.0.0.0", dicom_port=listener.address[1], peers="PACS")
        for _ in range(3):
            assert "answers" in check("listener", settings)
        eventually(lambda: listener.open_associations == 0, "nobody is left inside")
    assert database.refusals == []


def test_a_closed_port_is_no_listener(tmp_path: Path) -> None:
    with pytest.raises(Unhealthy, match="does not answer"):
        check("listener", Settings(data_dir=tmp_path, dicom_port=workbench.free_port()))


def test_a_port_that_accepts_and_keeps_silent_is_no_listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel completes connections for a process that hangs."""
    monkeypatch.setattr("service.health.PATIENCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Unhealthy, match="does not answer"):
        check("listener", Settings(data_dir=tmp_path, dicom_port=silent.getsockname()[1]))


def test_another_server_is_no_listener(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with server.accept()[0] as peer:
                peer.sendall(b"SSH-2.0-example\r\n")
                peer.recv(64)

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(Unhealthy, match="no DICOM listener"):
            check("listener", Settings(data_dir=tmp_path, dicom_port=server.getsockname()[1]))
        thread.join()


# --- the pages ---------------------------------------------------------------------------------------------------


@contextmanager
def web_answering(status: int) -> Iterator[int]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == READY else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_pages_that_are_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a hospital's proxy must not stand between
    with web_answering(200) as port:
        assert "ready" in check("web", Settings(data_dir=tmp_path, web_port=port))


def test_pages_that_are_not_ready(tmp_path: Path) -> None:
    with web_answering(503) as port, pytest.raises(Unhealthy, match="503"):
        check("web", Settings(data_dir=tmp_path, web_port=port))
    with pytest.raises(Unhealthy, match="do not answer"):
        check("web", Settings(data_dir=tmp_path, web_port=workbench.free_port()))


# --- steward and worker ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["steward", "worker"])
def test_the_age_of_the_pulse_decides(tmp_path: Path, part: str) -> None:
    settings = Settings(data_dir=tmp_path, pulse_dir=tmp_path / "pulses")
    with pytest.raises(Unhealthy, match="no pulse yet"):
        check(part, settings)
    Pulse(settings.pulses, part).beat()
    assert "s old" in check(part, settings)
    old = time.time() - OLDEST_BEAT_SECONDS - 60
    os.utime(tmp_path / "pulses" / part, (old, old))
    with pytest.raises(Unhealthy, match=r"last pulse is \d+ s old"):
        check(part, settings)


def test_a_pulse_that_cannot_be_shown_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    Pulse(tmp_path / "file", "worker").beat()
    assert "cannot be shown" in caplog.text


def test_the_steward_beats_with_every_round(tmp_path: Path) -> None:
    settings = workbench.settings(tmp_path, pulse_dir=tmp_path / "pulses")
    stop = threading.Event()
    rounds = 0

    def beat() -> None:
        nonlocal rounds
        rounds += 1
        Pulse(settings.pulses, "steward").beat()
        if rounds == 3:
            stop.set()

    with workbench.fresh_store("sqlite", tmp_path) as store:
        Steward(store, settings, workbench.DEFAULT_POLICY, lambda _: None, beat=beat).run(stop)
    assert rounds == 3
    assert "s old" in check("steward", settings)


def test_a_process_whose_loop_is_not_ours_beats_while_it_runs(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, "worker")
    with pulse.beating():
        eventually(lambda: pulse.age_seconds() is not None, "the first beat")
    assert not [thread for thread in threading.enumerate() if thread.name == "pulse"]


def test_the_command_says_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OSTEOGATE_DATA_DIR", str(tmp_path))
    assert main(["health", "worker"]) == 1
    assert capsys.readouterr().err == "osteogate: the worker has shown no pulse yet\n"
    Pulse(tmp_path / "pulse", "worker").beat()
    assert main(["health", "worker"]) == 0
    assert re.fullmatch(r"the worker's last pulse is \d+ s old\n", capsys.readouterr().out)
