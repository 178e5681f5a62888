"""A real Orthanc (https://www.orthanc-server.com) for tests: a PACS that receives, stores and sends on.

It listens on free ports of this machine, answers REST without a password from the loopback address only, and keeps
its storage in a folder of the test's, so that it can be killed and started again as if nothing had happened.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import absent
from tests.service.workflow.workbench import free_port

PLUGIN_FOLDERS = ("/usr/share/orthanc/plugins", "/usr/local/share/orthanc/plugins")
START_SECONDS = 60.0  # generous: the machine may be busy with other tests
STOP_SECONDS = 20.0
CONVERSION_TRIES = 5


class Orthanc:
    """One Orthanc of a test; use `running` to get one that surely ends with the test."""

    def __init__(
        self,
        folder: Path,
        *,
        ae_title: str = "ORTHANC",
        plugins: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """`plugins` are names as `libOrthancDicomWeb.so`, or paths; `settings` go into Orthanc's configuration."""
        self.folder = folder
        self.ae_title = ae_title
        self.http_port = 0
        self.dicom_port = 0
        self._program = shutil.which("Orthanc") or absent("Orthanc")
        self._plugins = [_plugin(name) for name in plugins]
        self._settings = dict(settings or {})
        self._modalities: dict[str, dict[str, Any]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._was_up = False
        self._http = httpx.Client(trust_env=False, timeout=120.0)

    # Life

    def start(self) -> None:
        """Start it (again) and wait until REST and DICOM answer; the ports stay those of the first start."""
        assert self._process is None, "it is running"
        deadline = time.monotonic() + START_SECONDS
        while not self._try_to_start(deadline):
            assert time.monotonic() < deadline, f"Orthanc does not start:\n{self.log()[-2000:]}"
            if not self._was_up:
                self.http_port = self.dicom_port = 0  # somebody was faster: take others
            time.sleep(0.2)

    def kill(self) -> None:
        """kill -9: what it had acknowledged must still be there after `start`."""
        self._end(graceful=False)

    def die(self) -> None:
        """Let it crash: nobody has told this harness."""
        assert self._process is not None
        self._process.kill()

    def stop(self) -> None:
        """End it as its service manager does (SIGTERM)."""
        self._end(graceful=True)

    def close(self) -> None:
        """End it, if it still runs, and close the connections to it."""
        self.kill()  # SIGTERM takes seconds, and nobody needs its storage any more
        self._http.close()

    @property
    def url(self) -> str:
        """The root of its REST interface, without a slash at the end."""
        return f"http://127.0.0.1:{self.http_port}"

    def log(self) -> str:
        """What it wrote to its standard error so far."""
        path = self.folder / "orthanc.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    # Who it knows

    def add_modality(self, name: str, ae_title: str, port: int, **options: Any) -> None:
        """Make a DICOM peer on this machine known under `name`; stays known after a restart."""
        self._modalities[name] = {"AET": ae_title, "Host": "127.0.0.1", "Port": port, **options}
        if self._process is not None:
            self._ask("PUT", f"/modalities/{name}", json=self._modalities[name])

    # What it holds

    def instances(self) -> list[str]:
        """The SOP instance UIDs that it holds."""
        found = self._ask("GET", "/instances?expand").json()
        return sorted(one["MainDicomTags"]["SOPInstanceUID"] for one in found)

    def series(self) -> list[str]:
        """Orthanc's own ids of the series that it holds."""
        return [str(one) for one in self._ask("GET", "/series").json()]

    def find(self, sop_uid: str) -> str | None:
        """Orthanc's own id of an instance; None where it does not hold it."""
        found = self._ask("POST", "/tools/lookup", content=sop_uid).json()
        return next((str(one["ID"]) for one in found if one["Type"] == "Instance"), None)

    def arrivals(self, sop_uid: str) -> int:
        """How often an instance came in and was stored, also over its like."""
        identifier = self.find(sop_uid)
        changes, since, done = 0, 0, False
        while not done:
            page = self._ask("GET", f"/changes?since={since}&limit=1000").json()
            changes += sum(one["ChangeType"] == "NewInstance" and one["ID"] == identifier for one in page["Changes"])
            since, done = page["Last"], page["Done"]
        return changes

    def file(self, sop_uid: str) -> bytes:
        """One instance as a DICOM file."""
        identifier = self.find(sop_uid)
        assert identifier is not None, f"Orthanc does not hold {sop_uid}"
        return self._ask("GET", f"/instances/{identifier}/file").content

    def upload(self, content: bytes) -> str:
        """Put one DICOM file into it by REST; its own id of the instance."""
        return str(self._ask("POST", "/instances", content=content).json()["ID"])

    def transcoded(self, sop_uid: str, transfer_syntax_uid: str) -> bytes | None:
        """One instance in another transfer syntax, its UID kept; None where Orthanc cannot convert to it.

        Debian's Orthanc 1.10 with its GDCM plugin dies now and then while it converts. It is started again and asked
        again: what it converts is the subject of no test of ours, what it sends is.
        """
        names = ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"]  # others would be drawn anew
        wanted = {"Transcode": transfer_syntax_uid, "Keep": names, "Force": True}
        for _ in range(CONVERSION_TRIES):
            try:
                answer = self._http.post(f"{self.url}/instances/{self.find(sop_uid)}/modify", json=wanted)
            except httpx.TransportError:
                self._start_again_if_it_died()
            else:
                return answer.content if answer.is_success else None
        raise AssertionError(f"Orthanc died {CONVERSION_TRIES} times converting to {transfer_syntax_uid}")

    def store_to(self, modality: str, ids: Sequence[str]) -> dict[str, Any]:
        """Send resources (Orthanc's ids of instances, series or studies) by C-STORE; raises where one fails."""
        wanted = {"Resources": list(ids), "Synchronous": True}
        answer: dict[str, Any] = self._ask("POST", f"/modalities/{modality}/store", json=wanted).json()
        return answer

    # Inside

    def _start_again_if_it_died(self) -> None:
        """Start it again on its storage.

        Raises:
            subprocess.TimeoutExpired: it still runs, so its death is not why it did not answer.
        """
        assert self._process is not None
        self._process.wait(STOP_SECONDS)
        self._process = None
        self.start()

    def _ask(self, method: str, path: str, **content: Any) -> httpx.Response:
        answer = self._http.request(method, f"{self.url}{path}", **content)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        return answer

    def _try_to_start(self, deadline: float) -> bool:
        self.http_port = self.http_port or free_port()
        self.dicom_port = self.dicom_port or free_port()
        configuration = self.folder / "orthanc.json"
        configuration.write_text(json.dumps(self._configuration(), indent=1), encoding="utf-8")
        with (self.folder / "orthanc.log").open("ab") as log:
            command = [self._program, "--verbose", str(configuration)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._answers():
                self._was_up = True
                return True
            time.sleep(0.05)
        self.kill()
        return False

    def _answers(self) -> bool:
        with suppress(httpx.HTTPError, OSError):
            system = self._http.get(f"{self.url}/system", timeout=5.0)
            if system.is_success and system.json().get("DicomPort") == self.dicom_port:
                socket.create_connection(("127.0.0.1", self.dicom_port), timeout=5.0).close()
                return True
        return False

    def _end(self, *, graceful: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if graceful:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        process.kill()
        process.wait()

    def _configuration(self) -> dict[str, Any]:
        storage = str(self.folder / "storage")
        return {
            "Name": self.ae_title,
            "StorageDirectory": storage,
            "IndexDirectory": storage,
            "Plugins": self._plugins,
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAet": self.ae_title,
            "DicomPort": self.dicom_port,
            "DicomAlwaysAllowEcho": True,
            "DicomAlwaysAllowStore": True,
            "DicomScuTimeout": 60,
            "DicomModalities": self._modalities,
            "OverwriteInstances": True,
            "StableAge": 1,
            "SaveJobs": False,
            "ConcurrentJobs": 1,
            "HttpThreadsCount": 8,
            **self._settings,
        }


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Orthanc]:
    """An Orthanc with its files in `folder` (made when absent), started, and ended whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    orthanc = Orthanc(folder, **options)
    try:
        orthanc.start()
        yield orthanc
    finally:
        orthanc.close()


def _plugin(name: str) -> str:
    """The path of a plugin's library; skipped, visibly, where it is absent and not required."""
    found = (folder / name for folder in map(Path, ("/", *PLUGIN_FOLDERS)) if (folder / name).is_file())
    return str(next(found, None) or absent(f"Orthanc's plugin {name}"))
