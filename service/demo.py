"""`osteogate demo`: a whole installation in a fresh folder, fed with digital patients over the network.

Nothing is short-cut: the same processes as `osteogate up`, the patients made by `osteogate phantom study`, sent by
C-STORE over TCP, and the results read back through the HTTP API, as a PACS and a clinician would meet it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.dicom.send import send_files
from service.domain.criteria import Scale, cuts_on
from service.domain.errors import OsteogateError
from service.domain.figures import figure_beside
from service.settings import Settings
from service.store.engine import upgrade
from service.supervise import Installation

CALLING = "DEMO-PACS"
TIMEOUT_SECONDS = 900.0
INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended
PIPE_COLUMNS = 120  # where nobody tells how wide the screen is
DECISION_STYLE = {"refer": "bold red", "no-flag": "green", "indeterminate": "yellow", "not-assessable": "dim"}
DECISION_WORDS = {
    "refer": "consider DXA",
    "no-flag": "no flag",
    "indeterminate": "indeterminate",
    "not-assessable": "not assessable",
}


class DemoFailed(OsteogateError):
    """The demo could not show what it is there to show."""


@dataclass(frozen=True)
class Role:
    """One digital patient of the demo: what it is there to show, and how it is made."""

    title: str
    settings: Mapping[str, str]


ROLES = (
    Role("low bone density", {"bmd_g_cm2": "0.66", "sex": "F", "age": "74"}),
    Role("middling bone density", {"bmd_g_cm2": "1.00", "sex": "F", "age": "63"}),
    Role("high bone density", {"bmd_g_cm2": "1.30", "sex": "M", "age": "52"}),
    Role("contrast-enhanced", {"contrast_phase": "portal"}),
    Role("scanned at 140 kVp", {"kvp": "140"}),
    Role("only L2-L5 in view", {"coverage": "L2-L5"}),
    Role("a slice is missing", {"drop_slice": "true"}),
)


@dataclass
class Patient:
    """A digital patient on its way through the demo."""

    seed: int
    role: Role
    folder: Path
    task: TaskID
    truth: dict[str, Any] | None = None
    result: dict[str, Any] | None = None

    @property
    def study_uid(self) -> str:
        """The study's UID as its truth tells it."""
        if self.truth is None:
            raise DemoFailed("the patient has not been made yet")
        return str(self.truth["study_uid"])


def run(*, patients: int, seed: int, json_file: Path | None, stay: bool) -> int:
    """Run the demo; returns the exit status: 0 when every patient got its result, 130 when it was interrupted.

    Args:
        patients: how many digital patients; the first seven play the roles above, the rest are drawn freely.
        seed: of the first patient; each further one takes the next.
        json_file: where truth, results, addresses and timings are written.
        stay: keep the installation running until Ctrl-C.
    """
    if patients < 1:
        raise ValueError("--patients takes a number from 1 up")
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_COLUMNS)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="osteogate-demo-") as folder, _signals() as stopped:
        settings = _settings(Path(folder))
        upgrade(settings.sqlalchemy_url)
        console.print("[bold]Osteogate demo[/]: digital patients only. Investigational, not a medical device.")
        with _installation(settings, console, stopped):
            _until(lambda: _answers(settings), 60.0, stopped, "the pages did not come up")
            started = time.monotonic()
            people = _screen_everybody(settings, Path(folder), patients, seed, console, stopped)
            if not all(person.result for person in people):
                console.print("Stopped before every patient had a result.")
                return INTERRUPTED
            finished = time.monotonic()
            console.print(_worklist(people))
            urls = _urls(settings)
            console.print(f"Worklist page: [bold]{urls['worklist']}[/]" + ("" if stay else "  (use --stay to keep it)"))
            timings = {"start": started - start, "patients": finished - started, "total": finished - start}
            console.print(f"{len(people)} patients in {timings['patients']:.0f} s, {timings['total']:.0f} s in all")
            if json_file:
                _write_json(json_file, people, urls, timings)
            if stay:
                console.print("Ctrl-C ends the demo.")
                stopped.wait()
    return 0


def _settings(folder: Path) -> Settings:
    return Settings(
        data_dir=folder / "data",
        database_url="",
        broker_url="",
        dicom_port=_free_port(),
        web_port=_free_port(),
        quiet_seconds=3.0,
        incomplete_patience_seconds=12.0,
        steward_interval_seconds=0.5,
        disk_floor_bytes=64 * 1024 * 1024,
    )


@contextmanager
def _installation(settings: Settings, console: Console, stopped: threading.Event) -> Iterator[None]:
    """The processes of `osteogate up`, watched from a thread while the demo feeds them."""
    done = threading.Event()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    installation = Installation.of(settings, lambda text: console.print(f"[yellow]{text}[/]"))
    watcher = threading.Thread(target=installation.run, args=(done.is_set,), name="supervisor")
    watcher.start()
    try:
        yield
    except Exception:
        _show_logs(settings.data_dir / "logs", console)  # they go with the folder
        raise
    finally:
        done.set()
        watcher.join()


def _show_logs(folder: Path, console: Console, lines: int = 15) -> None:
    for log in sorted(folder.glob("*.log")):
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        console.print("\n".join([f"--- {log.name}", *tail]), markup=False, highlight=False)


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM end the demo in order: every process stopped, the folder removed."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _screen_everybody(
    settings: Settings, folder: Path, patients: int, seed: int, console: Console, stopped: threading.Event
) -> list[Patient]:
    """Make, send and await every patient, showing where each one is."""
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(20),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        people = [_patient(index, seed, folder, progress) for index in range(patients)]
        with ThreadPoolExecutor(max_workers=max(1, min(2, os.cpu_count() or 1))) as makers:
            made = [makers.submit(_make_and_send, person, settings, progress, stopped) for person in people]
            _await_results(people, made, settings, progress, stopped)
    return people


def _patient(index: int, seed: int, folder: Path, progress: Progress) -> Patient:
    role = ROLES[index] if index < len(ROLES) else Role("drawn at random", {})
    task = progress.add_task(role.title, total=3, state="waiting")
    return Patient(seed + index, role, folder / f"patient-{index + 1}", task)


def _make_and_send(person: Patient, settings: Settings, progress: Progress, stopped: threading.Event) -> None:
    if stopped.is_set():
        return
    progress.update(person.task, state="being made")
    assignments = [f"--set={key}={value}" for key, value in person.role.settings.items()]
    command = [
        sys.executable,
        "-m",
        "service.cli",
        "phantom",
        "study",
        f"--seed={person.seed}",
        f"--out={person.folder}",
    ]
    subprocess.run(
        [*command, *assignments],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    person.truth = json.loads((person.folder / "truth.json").read_text(encoding="utf-8"))
    progress.update(person.task, state="being sent", completed=1)
    report = send_files(
        sorted(person.folder.rglob("*.dcm")),
        host=settings.dicom_host,
        port=settings.dicom_port,
        called=settings.ae_title,
        calling=CALLING,
        on_progress=lambda done, total: progress.update(person.task, state=f"sent {done} of {total}"),
    )
    if report.failed:
        raise DemoFailed(f"{person.role.title}: {len(report.failed)} instances were not stored: {report.failed[0]}")
    progress.update(person.task, state="being screened", completed=2)


def _await_results(
    people: Sequence[Patient],
    made: Sequence[Future[None]],
    settings: Settings,
    progress: Progress,
    stopped: threading.Event,
) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    waiting = dict(zip(range(len(people)), made, strict=True))
    while waiting and not stopped.is_set():
        if time.monotonic() > deadline:
            raise DemoFailed(f"no result within {TIMEOUT_SECONDS:.0f} s for {[people[i].role.title for i in waiting]}")
        for index in [i for i, future in waiting.items() if future.done()]:
            waiting[index].result()
            person = people[index]
            person.result = _fetch_result(settings, person.study_uid)
            if person.result is not None:
                category = person.result["decision"]["category"]
                progress.update(person.task, state=DECISION_WORDS[category], completed=3)
                del waiting[index]
        time.sleep(0.5)


def _fetch_result(settings: Settings, study_uid: str) -> dict[str, Any] | None:
    """The result through the API; None while there is none yet."""
    try:
        return _get(settings, f"/api/v1/studies/{study_uid}/result")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            return None
        raise


def _answers(settings: Settings) -> bool:
    try:
        _get(settings, "/api/v1/health/ready")
        with socket.create_connection((settings.dicom_host, settings.dicom_port), timeout=1):
            return True
    except OSError:
        return False


def _get(settings: Settings, path: str) -> dict[str, Any]:
    url = f"http://{settings.web_host}:{settings.web_port}{path}"
    with urllib.request.urlopen(url, timeout=10) as response:
        document: dict[str, Any] = json.load(response)
    return document


def _until(holds: Callable[[], bool], seconds: float, stopped: threading.Event, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise DemoFailed(otherwise)
        if stopped.wait(0.25):
            return


def _worklist(people: Sequence[Patient]) -> Table:
    table = Table(title="Worklist (digital patients)", title_style="bold", show_lines=True)
    table.add_column("Patient", min_width=14)
    table.add_column("Decision", min_width=14)
    table.add_column("Measured", min_width=18)
    table.add_column("Why", min_width=24)
    for person in people:
        if person.result is not None and person.truth is not None:
            table.add_row(*_row(person, person.result, person.truth))
    return table


def _row(person: Patient, result: Mapping[str, Any], truth: Mapping[str, Any]) -> tuple[str, str, str, str]:
    decision, patient = result["decision"], result["patient"]
    category = decision["category"]
    measured = (
        f"BMD {_figure(patient['bmd_g_cm2'], 2)} g/cm²\n"
        f"[dim]truth {_true_bmd(truth)}[/]\n"
        f"{_percent_yam(patient['percent_yam'])} % YAM\n"
        f"TBS {_figure(patient['tbs'], 2)}  HU {_figure(patient['hu_mean'], 0)}"
    )
    return (
        f"[bold]{truth['patient_id']}[/]\n{person.role.title}",
        f"[{DECISION_STYLE[category]}]{DECISION_WORDS[category]}[/]\n[dim]by {decision['driver']}[/]",
        measured if patient["bmd_g_cm2"] is not None else f"[dim]not measured\ntruth {_true_bmd(truth)}[/]",
        "\n".join(f"[dim]{reason['code']}[/] {escape(reason['text'])}" for reason in decision["reasons"]),
    )


def _true_bmd(truth: Mapping[str, Any]) -> str:
    return _figure(truth["patient"]["bmd_g_cm2"], 2)


def _percent_yam(value: float | None) -> str:
    return "-" if value is None else figure_beside(value, cuts_on(Scale.PERCENT_YAM), 0)


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _urls(settings: Settings) -> dict[str, str]:
    base = f"http://{settings.web_host}:{settings.web_port}"
    return {
        "worklist": f"{base}/",
        "intake": f"{base}/intake",
        "api": f"{base}/api/v1",
        "dicom": f"{settings.ae_title}@{settings.dicom_host}:{settings.dicom_port}",
    }


def _write_json(file: Path, people: Sequence[Patient], urls: Mapping[str, str], timings: Mapping[str, float]) -> None:
    document = {
        "patients": [
            {
                "patient_id": (p.truth or {}).get("patient_id"),
                "shows": p.role.title,
                "truth": p.truth,
                "result": p.result,
            }
            for p in people
        ],
        "urls": dict(urls),
        "timings_s": {name: round(seconds, 2) for name, seconds in timings.items()},
    }
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
