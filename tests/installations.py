"""A whole installation for a test, of either size: real processes, real servers, one interface.

`embedded` is `osteogate up` as it comes: SQLite and the bundled Valkey. `postgresql-redis` is `osteogate up` on a
PostgreSQL database and a `redis-server` of its own. A test that takes the fixture `installation` (tests/conftest.py)
runs on both, skipped visibly where a server is absent:

    @pytest.mark.timeout(installations.TIMEOUT_SECONDS)
    def test_a_study_comes_home(installation: Installation, digital_study: Path) -> None:
        installation.start(OSTEOGATE_DESTINATIONS=f"pacs=dicom://ORTHANC@127.0.0.1:{port}")
        assert installation.send([digital_study]) == 150
        result = installation.result(study_uid)                                   # waits until there is one
        study = installation.wait_for(study_uid, lambda study: study["revision"] == 2)

Before `start` the ports, the data folder and the settings are known already (an Orthanc needs our port before we
need its). Every wait ends as soon as what it waits for is there, fails at once when it cannot come any more (the
installation has died, the study lies in quarantine), has a deadline that only a hung installation meets, and shows
the processes' logs when it fails.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from service.dicom.send import send_files
from service.settings import Settings
from service.store.engine import Store, make_engine
from tests.conftest import absent
from tests.service.workflow import workbench

KINDS = ("embedded", "postgresql-redis")
WAIT_SECONDS = 480.0  # of one wait: a study on two cores that others use too takes a minute
TIMEOUT_SECONDS = 1500  # for pytest.mark.timeout: above the sum of a test's waits, so that the logs are shown
STOP_SECONDS = 120.0  # the supervisor gives every process 30 s
POLL_SECONDS = 0.25
LOG_LINES = 40

Document = dict[str, Any]


class Installation:
    """One `osteogate up` on a folder, ports, a database and a broker of its own.

    Attributes:
        kind: one of `KINDS`.
        data_dir: its data folder (spool, results, logs).
        dicom_port, web_port: chosen before `start`, and the same after every restart.
        environment: the variables it runs with; `start` and `restart` add to them.
    """

    def __init__(self, kind: str, data_dir: Path, environment: dict[str, str]) -> None:
        self.kind = kind
        self.data_dir = data_dir
        self.dicom_port, self.web_port = workbench.free_port(), workbench.free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = {
            "OSTEOGATE_DATA_DIR": str(data_dir),
            "OSTEOGATE_DICOM_PORT": str(self.dicom_port),
            "OSTEOGATE_WEB_PORT": str(self.web_port),
            "OSTEOGATE_QUIET_SECONDS": "4",
            "OSTEOGATE_INCOMPLETE_PATIENCE_SECONDS": "600",
            "OSTEOGATE_STEWARD_INTERVAL_SECONDS": "0.5",
            "OSTEOGATE_LEASE_SECONDS": "30",  # longer than a busy machine keeps a thread waiting
            "OSTEOGATE_DISK_FLOOR_BYTES": str(64 * 1024 * 1024),
            **environment,
        }

    # What it is

    @property
    def settings(self) -> Settings:
        """The settings that its processes build from their environment."""
        values = {name.removeprefix("OSTEOGATE_").lower(): value for name, value in self.environment.items()}
        return Settings(**values)  # type: ignore[arg-type]  # texts, as the environment gives them

    @property
    def web_url(self) -> str:
        """The address of its pages, without a slash at the end."""
        return f"http://127.0.0.1:{self.web_port}"

    @property
    def dicom_address(self) -> tuple[str, int]:
        """Host and port of its listener, which is called OSTEOGATE."""
        return "127.0.0.1", self.dicom_port

    @contextmanager
    def store(self) -> Iterator[Store]:
        """Its database, to look into."""
        store = Store(make_engine(self.settings.sqlalchemy_url))
        try:
            yield store
        finally:
            store.close()

    # Its life

    def start(self, **environment: str) -> None:
        """Start it, with more variables if wanted, and wait until listener and pages answer."""
        assert self.process is None, "it runs already"
        self.environment.update(environment)
        self.data_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "service.cli", "up"]
        with self._up_log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.until(self.is_ready, "the installation comes up")

    def is_ready(self) -> bool:
        """Whether the API says that everything works and the listener takes connections."""
        import socket

        try:
            self.api("/api/v1/health/ready")
            with socket.create_connection(self.dicom_address, timeout=10):
                return True
        except OSError:  # urllib's errors are OSErrors
            return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it in order (SIGTERM, or SIGINT for Ctrl-C); its exit status. No process is left."""
        process = self._running()
        process.send_signal(number)
        status = self._wait_for_end(process)
        self.until(lambda: not self.pids(), "every process of it ends", alive=False)
        return status

    def kill(self) -> None:
        """`kill -9` of the supervisor; its children, told by the kernel, end by themselves."""
        process = self._running()
        process.kill()
        self._wait_for_end(process)
        self.until(lambda: not self.pids(), "no child outlives its supervisor", alive=False)

    def restart(self, **environment: str) -> None:
        """Stop it in order and start it again, with more variables if wanted."""
        assert self.stop() == 0, self.logs()
        self.start(**environment)

    def pids(self) -> list[int]:
        """Every process of this installation, found by the data folder in its environment (Linux's /proc)."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (entry / "environ").read_bytes() + b"\0" + (entry / "cmdline").read_bytes()
                if b"OSTEOGATE_DATA_DIR=" + os.fsencode(self.data_dir) in words.split(b"\0"):
                    found.append(int(entry.name))
        return found

    # What people and programs do with it

    def send(self, paths: Sequence[Path], *, calling: str = "PACS") -> int:
        """C-STORE files or folders to it with our own sender; how many it has taken."""
        host, port = self.dicom_address
        report = send_files(paths, host=host, port=port, called="OSTEOGATE", calling=calling, timeout_seconds=120.0)
        assert not report.failed or report.sent, f"{report.failed[0][1]}\n{self.logs()}"
        return len(report.sent)

    def api(self, path: str, *, method: str = "GET", body: object = None, accept: str = "application/json") -> Any:
        """What the API (or a page) answers at `path`: JSON as values, everything else as text.

        Raises:
            urllib.error.HTTPError: the answer is no success; its body is a problem document.
            OSError: nobody answers.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"accept": accept, "content-type": "application/json", "origin": self.web_url}
        request = urllib.request.Request(f"{self.web_url}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                content = answer.read()
                is_json = "json" in answer.headers.get("content-type", "")
        except urllib.error.HTTPError as error:
            error.close()
            raise
        return json.loads(content) if is_json else content.decode()

    def study(self, study_uid: str) -> Document | None:
        """`GET /api/v1/studies/{study_uid}`, or None where there is no such study (or nobody answers)."""
        return self._document(f"/api/v1/studies/{study_uid}")

    def wait_for(
        self, study_uid: str, holds: Callable[[Document], Any], what: str = "", *, seconds: float = WAIT_SECONDS
    ) -> Document:
        """The study's document (as `study`), as soon as `holds` of it is true."""
        seen: list[Document] = []

        def check() -> bool:
            study = self.study(study_uid)
            seen[:] = [study] if study else seen
            return bool(study and holds(study))

        self.until(check, lambda: f"{what or 'the study is as awaited'}; it is {seen}", seconds=seconds)
        return seen[0]

    def result(self, study_uid: str, revision: int = 1) -> Document:
        """result.json of the study, as soon as a result of this revision (or a newer one) is in force.

        A study that is not screened (no eligible series) is answered by its document of reasons. One in quarantine
        fails the test at once.
        """

        def has_ended(study: Document) -> bool:
            assert study["state"] != "quarantined", f"quarantined: {study['jobs']}\n{self.logs()}"
            return study["state"] in ("screened", "not-screened") and study["revision"] >= revision

        self.wait_for(study_uid, has_ended, f"revision {revision} is screened")
        document: Document = self.api(f"/api/v1/studies/{study_uid}/result")
        return document

    def until(
        self,
        holds: Callable[[], Any],
        what: str | Callable[[], str],
        *,
        seconds: float = WAIT_SECONDS,
        alive: bool = True,
    ) -> None:
        """Wait until `holds()`; fails, with the logs, at the deadline or (where `alive` is wanted) when it has died."""
        deadline = time.monotonic() + seconds
        while not holds():
            died = alive and (self.process is None or self.process.poll() is not None)
            if died or time.monotonic() > deadline:
                text = what if isinstance(what, str) else what()
                pytest.fail(f"{'it has died' if died else f'not within {seconds:g} s'}: {text}\n{self.logs()}")
            time.sleep(POLL_SECONDS)

    def logs(self) -> str:
        """The last lines of every process's log."""
        files = [self._up_log, *sorted((self.data_dir / "logs").glob("*.log"))]
        tails = [(file, file.read_text(errors="replace").splitlines()[-LOG_LINES:]) for file in files if file.exists()]
        return "\n".join(line for file, tail in tails for line in (f"--- {self.kind}: {file.name}", *tail))

    # Inside

    @property
    def _up_log(self) -> Path:
        return self.data_dir.parent / f"{self.data_dir.name}-up.log"

    def _environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("OSTEOGATE_")}
        return {**ours, **self.environment}

    def _running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None, "it does not run"
        return self.process

    def _wait_for_end(self, process: subprocess.Popen[bytes]) -> int:
        try:
            status = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {STOP_SECONDS:g} s\n{self.logs()}")
        self.process = None
        return status

    def _document(self, path: str) -> Document | None:
        try:
            document: Document = self.api(path)
        except OSError:
            return None
        return document

    def clear_away(self) -> None:
        """End whatever is left of it, by force."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def installed(kind: str, folder: Path, **environment: str) -> Iterator[Installation]:
    """An installation of this kind in `folder`, not yet started; everything of it is gone afterwards."""
    if sys.platform != "linux":
        absent("Linux (its /proc tells which processes are an installation's)")
    with _servers(kind, folder) as servers:
        installation = Installation(kind, folder / "data", {**servers, **environment})
        try:
            yield installation
        finally:
            installation.clear_away()


@contextmanager
def _servers(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    """The database and the broker of this kind, as the environment that names them."""
    if kind == "embedded":
        yield {}
        return
    program = shutil.which("redis-server") or absent("redis-server")
    database = workbench.new_postgresql_database()
    with workbench.broker(folder / "redis", tcp=True, program=program, keeps=True) as broker:
        yield {"OSTEOGATE_DATABASE_URL": database, "OSTEOGATE_BROKER_URL": broker.url}
