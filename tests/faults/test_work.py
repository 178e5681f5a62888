"""Faults 1, 4, 5, 6 and 23 with real processes: a Celery worker, a broker, SQLite or PostgreSQL.

Only the screen function is a stand-in (tests/service/workflow/fake_worker.py); leases last half a second.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import select

from service.domain.policy import DEFAULT_POLICY
from service.settings import Settings
from service.steward import Steward
from service.store.engine import Store, make_engine
from service.store.tables import JobRow, ResultRow, StudyRow
from service.workflow.bell import Bell
from service.workflow.clock import utc_now
from tests.service.workflow import workbench
from tests.service.workflow.workbench import Broker, WorkerProcess, deliver, eventually, slices


@dataclass
class Site:
    """A small installation: broker, database and a steward that runs in a thread."""

    settings: Settings
    store: Store
    broker: Broker
    log: Path

    def receive(self, study: str = "1.2.3", n: int = 60) -> None:
        deliver(self.store, slices(study, f"{study}.4", n), utc_now())

    def results(self) -> list[ResultRow]:
        with self.store.reading() as session:
            return list(session.scalars(select(ResultRow).order_by(ResultRow.id)))

    def jobs(self) -> list[JobRow]:
        with self.store.reading() as session:
            return list(session.scalars(select(JobRow).order_by(JobRow.id)))

    def study_state(self, uid: str = "1.2.3") -> str:
        with self.store.reading() as session:
            return session.scalars(select(StudyRow.state).where(StudyRow.study_uid == uid)).one()

    def worker(self, behaviour: str) -> WorkerProcess:
        return WorkerProcess(self.settings, behaviour, self.log)


@contextmanager
def running_site(folder: Path, kind: str = "sqlite", *, tcp: bool = False, **changes: object) -> Iterator[Site]:
    with workbench.broker(folder / "broker", tcp=tcp) as broker:
        url = workbench.fresh_url(kind, folder)
        settings = workbench.settings(folder, database_url=url, broker_url=broker.url, **changes)
        store = Store(make_engine(url))
        bell = Bell(broker.url)
        stop = threading.Event()
        steward = Steward(store, settings, DEFAULT_POLICY, bell.ring)
        thread = threading.Thread(target=steward.run, args=(stop,))
        thread.start()
        try:
            yield Site(settings, store, broker, folder / "worker.log")
        finally:
            stop.set()
            thread.join()
            bell.close()
            store.close()


@pytest.mark.parametrize(("kind", "tcp"), [("sqlite", False), ("postgresql", True)])
def test_a_real_worker_measures_what_the_bell_names(tmp_path: Path, kind: str, tcp: bool) -> None:
    """Both sizes of the one path, and fault 5 on each: the broker forgets everything, then is restarted."""
    with running_site(tmp_path, kind, tcp=tcp) as site:
        site.receive("1.1")  # rung, and lost with all of the broker's memory before any worker is there
        eventually(lambda: site.broker.messages() > 0, what="the bell is rung")
        site.broker.command(b"FLUSHALL")
        with site.worker("at_once") as worker:
            eventually(lambda: len(site.results()) == 1, what="the first study is measured")
            site.broker.stop()
            site.receive("2.2")  # intake goes on without the broker
            eventually(lambda: site.study_state("2.2") == "queued", what="queued without a broker")
            assert len(site.results()) == 1
            site.broker.start()
            eventually(lambda: len(site.results()) == 2, 30, what="measured after the broker is back")
            worker.signal(signal.SIGTERM)
            assert worker.wait(10) == 0  # an idle worker ends cleanly
        assert [(row.attempt, row.category) for row in site.results()] == [(1, "refer")] * 2


def test_kill_9_in_the_midst_gives_one_rerun_and_one_result(tmp_path: Path) -> None:
    """Fault 1."""
    with running_site(tmp_path) as site:
        site.receive()
        with site.worker("first_time_hangs") as worker:
            eventually((tmp_path / "results" / "hung-once").exists, what="the first attempt runs")
            time.sleep(0.8)  # longer than a lease: the heart beats
            assert (site.jobs()[0].state, site.jobs()[0].attempts) == ("running", 1)
            worker.signal(signal.SIGKILL)
            worker.wait()
        with site.worker("first_time_hangs"):
            eventually(site.results, what="the second attempt is recorded")
        [result], [job] = site.results(), site.jobs()
        assert (result.attempt, job.attempts, job.state) == (2, 2, "done")


def test_sigterm_in_the_midst_gives_the_job_back_within_the_grace_period(tmp_path: Path) -> None:
    """Fault 23, with a lease so long that only giving back explains the second attempt."""
    with running_site(tmp_path, lease_seconds=300.0) as site:
        site.receive()
        with site.worker("first_time_hangs") as worker:
            eventually((tmp_path / "results" / "hung-once").exists, what="the first attempt runs")
            worker.signal(signal.SIGTERM)
            assert worker.wait(9) == 0  # docker's ten seconds
            assert (site.jobs()[0].state, site.jobs()[0].attempts) == ("waiting", 0)
        with site.worker("first_time_hangs"):
            eventually(site.results, what="another worker has it")


def test_a_study_that_always_kills_the_worker_is_quarantined_and_the_queue_flows(tmp_path: Path) -> None:
    """Fault 4: no error is ever reported, the process is simply gone; a supervisor restarts it."""
    with running_site(tmp_path, max_attempts=2) as site:
        site.receive("6.6.6", n=61)
        site.receive("7.7.7")
        stop = threading.Event()
        deaths: list[int] = []

        def supervisor() -> None:
            while not stop.is_set():
                with site.worker("crashes_on_one") as worker:
                    while worker.process.is_alive() and not stop.wait(0.05):
                        pass
                    if worker.process.exitcode is not None:
                        deaths.append(worker.process.exitcode)

        thread = threading.Thread(target=supervisor)
        thread.start()
        try:
            eventually(lambda: site.study_state("6.6.6") == "quarantined", 40, what="quarantine")
            eventually(lambda: site.study_state("7.7.7") == "screened", 20, what="the queue flows")
        finally:
            stop.set()
            thread.join()
        assert deaths == [139, 139]
        bad = next(job for job in site.jobs() if job.state == "quarantined")
        assert bad.attempts == 2
        assert "lease ran out" in (bad.last_error or "")


@pytest.fixture
def silent_peer() -> Iterator[int]:
    """A half-open broker: it accepts connections and never answers."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        stop = threading.Event()

        def accept() -> None:
            while not stop.is_set():
                try:
                    held.append(server.accept()[0])
                except TimeoutError:
                    continue

        thread = threading.Thread(target=accept)
        thread.start()
        yield server.getsockname()[1]
        stop.set()
        thread.join()
        for peer in held:
            peer.close()


def test_ringing_a_half_open_broker_fails_soon(silent_peer: int) -> None:
    """Fault 5: without socket time-outs this waits for ever."""
    bell = Bell(f"redis://127.0.0.1:{silent_peer}/0")
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(Exception, match=r"(?i)time"):
            bell.ring(1)
        assert time.monotonic() - began < 8
    bell.close()


@pytest.mark.parametrize("tcp", [False, True])
def test_a_broker_that_stops_answering_is_survived_by_the_same_bell(tmp_path: Path, tcp: bool) -> None:
    """Fault 5: frozen in mid-connection, gone, and back again."""
    with workbench.broker(tmp_path, tcp=tcp) as broker:
        bell = Bell(broker.url)
        bell.ring(1)
        assert broker.messages() == 1
        assert broker.process is not None
        broker.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(Exception, match=r"(?i)time"):
            bell.ring(2)
        assert time.monotonic() - began < 8
        broker.process.send_signal(signal.SIGCONT)
        broker.stop()
        began = time.monotonic()
        with pytest.raises(Exception, match=r"(?i)refused|no such file|connect"):
            bell.ring(3)
        assert time.monotonic() - began < 8
        broker.start()
        bell.ring(4)
        assert broker.messages() == 1
        bell.close()
