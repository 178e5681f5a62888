"""Faults 1, 4, 5, 6 and 23 with real processes: a Celery worker, a broker, SQLite or PostgreSQL.

Only the screen function is a stand-in (tests/service/workflow/fake_worker.py). A lease lasts long enough for a
worker that gets little of a busy machine, and not at all where a test must wait until it has run out.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.workflow.bell import Bell
from tests.faults.doomed_steward import Doom, DoomedSteward
from tests.faults.site import running_site, standing_site
from tests.service.workflow import workbench
from tests.service.workflow.workbench import DATABASES, eventually


@pytest.mark.parametrize(("kind", "tcp"), [("sqlite", False), ("postgresql", True)])
def test_a_real_worker_measures_what_the_bell_names(tmp_path: Path, kind: str, tcp: bool) -> None:
    """Both sizes of the one path, and fault 5 on each: the broker forgets everything, then is restarted."""
    with running_site(tmp_path, kind, tcp=tcp) as site:
        site.receive("1.1")  # rung, and lost with all of the broker's memory before any worker is there
        eventually(lambda: site.broker.messages() > 0, what="the bell is rung")
        site.broker.command(b"FLUSHALL")
        with site.supervised_worker("at_once") as worker:
            eventually(lambda: len(site.results()) == 1, what="the first study is measured")
            site.broker.stop()
            site.receive("2.2")  # intake goes on without the broker
            eventually(lambda: site.study_state("2.2") == "queued", what="queued without a broker")
            assert len(site.results()) == 1
            site.broker.start()
            eventually(lambda: len(site.results()) == 2, what="measured after the broker is back")
        assert worker.last_code == 0  # an idle worker ends cleanly on SIGTERM
        assert [(row.attempt, row.category) for row in site.results()] == [(1, "refer")] * 2


def test_kill_9_in_the_midst_gives_one_rerun_and_one_result(tmp_path: Path) -> None:
    """Fault 1."""
    with running_site(tmp_path) as site:
        site.receive()
        with site.worker("first_time_hangs") as worker:
            eventually((tmp_path / "results" / "hung-once").exists, what="the first attempt runs")
            [first] = site.jobs()
            eventually(lambda: site.jobs()[0].lease_until > first.lease_until, what="the heart beats")
            assert (site.jobs()[0].state, site.jobs()[0].attempts) == ("running", 1)
            worker.signal(signal.SIGKILL)
            worker.wait()
        with site.worker("first_time_hangs"):
            eventually(site.results, what="the second attempt is recorded")
        [result], [job] = site.results(), site.jobs()
        assert (result.attempt, job.attempts, job.state) == (2, 2, "done")


def test_sigterm_in_the_midst_gives_the_job_back_within_the_grace_period(tmp_path: Path) -> None:
    """Fault 23, with a lease so long that only giving back explains the second attempt."""
    with running_site(tmp_path, lease_seconds=1e4, job_deadline_seconds=1e4) as site:
        site.receive()
        with site.worker("first_time_hangs") as worker:
            eventually((tmp_path / "results" / "hung-once").exists, what="the first attempt runs")
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 0  # while the measuring goes on for ever: the guard has ended the process
            assert (site.jobs()[0].state, site.jobs()[0].attempts) == ("waiting", 0)
        with site.worker("first_time_hangs"):
            eventually(site.results, what="another worker has it")


def test_a_study_that_always_kills_the_worker_is_quarantined_and_the_queue_flows(tmp_path: Path) -> None:
    """Fault 4: no error is ever reported, the process is simply gone; a supervisor restarts it."""
    with running_site(tmp_path, max_attempts=2) as site:
        site.receive("6.6.6", n=61)
        site.receive("7.7.7")
        with site.supervised_worker("crashes_on_one") as worker:
            eventually(lambda: site.study_state("6.6.6") == "quarantined", what="quarantine")
            eventually(lambda: site.study_state("7.7.7") == "screened", what="the queue flows")
        assert worker.deaths == [139, 139]
        bad = next(job for job in site.jobs() if job.state == "quarantined")
        assert bad.attempts == 2
        assert "lease ran out" in (bad.last_error or "")


@pytest.mark.parametrize("kind", DATABASES)
@pytest.mark.parametrize("doom", Doom)
def test_a_steward_killed_between_commit_and_publish(tmp_path: Path, kind: str, doom: Doom) -> None:
    """Fault 6: the job is committed, the bell not rung, or rung and not noted: published once in effect."""
    with standing_site(tmp_path, kind, rering_seconds=600.0, lease_seconds=600.0) as site:
        site.receive()
        with DoomedSteward(site.settings, doom, tmp_path / "steward.log") as steward:
            assert steward.wait() == -signal.SIGKILL
        [job] = site.jobs()
        assert (job.state, job.rung_at, site.study_state()) == ("waiting", None, "queued")  # committed, not noted
        assert site.broker.messages() == (1 if doom is Doom.AFTER_PUBLISHING else 0)
        with site.worker("at_once"):
            site.work_until(lambda: len(site.results()) == 1, "the next steward rings")
            site.receive("9.9.9")
            site.work_until(lambda: len(site.results()) == 2, "whatever stood in the queue before has been heard")
        assert [(row.attempts, row.state) for row in site.jobs()] == [(1, "done")] * 2
        assert site.measured() == ["60", "60"]


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


def test_ringing_a_half_open_broker_fails(silent_peer: int) -> None:
    """Fault 5: without socket time-outs this waits for ever."""
    bell = Bell(f"redis://127.0.0.1:{silent_peer}/0")
    for _ in range(2):
        with pytest.raises(Exception, match=r"(?i)time"):
            bell.ring(1)
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
        with pytest.raises(Exception, match=r"(?i)time"):
            bell.ring(2)
        broker.process.send_signal(signal.SIGCONT)
        broker.stop()
        with pytest.raises(Exception, match=r"(?i)refused|no such file|connect"):
            bell.ring(3)
        broker.start()
        bell.ring(4)
        assert broker.messages() == 1
        bell.close()
