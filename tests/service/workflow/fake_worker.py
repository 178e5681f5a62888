"""A worker process for the tests: the real Celery worker, job runner and database.

Only the screen function says what the test wants.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from service.domain.policy import DEFAULT_POLICY
from service.domain.result import Measurements
from service.settings import Settings
from service.store.engine import Store, make_engine
from tests.service.workflow.workbench import measured
from worker.app import serve, serve_training
from worker.jobs import ScreenRequest

Behaviour = Callable[[ScreenRequest], Measurements]


def at_once(request: ScreenRequest) -> Measurements:
    """Measure at once."""
    return measured()


def first_time_hangs(request: ScreenRequest) -> Measurements:
    """Hang in the first process; a file remembers that there was one."""
    once = request.artefacts_dir.parent / "hung-once"
    if not once.exists():
        once.touch()
        time.sleep(1e6)
    return measured()


def crashes(request: ScreenRequest) -> Measurements:
    """Take the whole process down, as a segmentation fault would."""
    os._exit(139)


def crashes_on_one(request: ScreenRequest) -> Measurements:
    """Take the process down for the study that has 61 slices; measure every other."""
    return crashes(request) if len(request.paths) == 61 else measured()


def at_the_gate(request: ScreenRequest) -> Measurements:
    """Measure for as long as there is no file `gate`; `at-the-gate` tells that it has begun."""
    (request.artefacts_dir.parent / "at-the-gate").touch()
    while not (request.artefacts_dir.parent / "gate").exists():
        time.sleep(0.05)
    return measured()


def loads(request: ScreenRequest) -> Measurements:
    """Read the images as the real pipeline does, with a gigabyte to do it in, then measure at once."""
    from worker.volume import load_dicom

    spent_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with _memory_limit(spent_bytes + 1024**3):
        volume = load_dicom(request.paths)
    assert volume.hu.shape[0] == len(request.paths)
    return measured()


@contextmanager
def _memory_limit(size_bytes: int) -> Iterator[None]:
    """Whatever allocates beyond this gets a MemoryError, which fails the job."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _told(behaviour: Behaviour) -> Behaviour:
    """The behaviour, each call of it told by a line in the file `measured`: the number of its slices."""

    def screen(request: ScreenRequest) -> Measurements:
        with (request.artefacts_dir.parent / "measured").open("a") as calls:
            calls.write(f"{len(request.paths)}\n")
        return behaviour(request)

    return screen


BEHAVIOURS: dict[str, Behaviour] = {
    function.__name__: function for function in (at_once, first_time_hangs, crashes, crashes_on_one, at_the_gate, loads)
}


TRAINS = "trains"  # the real trainer, on its own queue


def main(settings: Settings, behaviour: str, log: Path) -> None:
    """The process; everything that it says goes to `log`."""
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=2)
    logging.basicConfig(level=logging.INFO)
    store = Store(make_engine(settings.sqlalchemy_url))
    if behaviour == TRAINS:
        serve_training(settings, store)
        return
    serve(settings, store, DEFAULT_POLICY, _told(BEHAVIOURS[behaviour]))
