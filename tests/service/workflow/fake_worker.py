"""A worker process for the tests: the real Celery worker, job runner and database.

Only the screen function says what the test wants.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from service.domain.policy import DEFAULT_POLICY
from service.domain.result import Measurements
from service.settings import Settings
from service.store.engine import Store, make_engine
from tests.service.workflow.workbench import measured
from worker.app import serve
from worker.jobs import ScreenRequest


def at_once(request: ScreenRequest) -> Measurements:
    """Measure at once."""
    return measured()


def first_time_hangs(request: ScreenRequest) -> Measurements:
    """Hang in the first process; a file remembers that there was one."""
    once = request.artefacts_dir.parent / "hung-once"
    if not once.exists():
        once.touch()
        time.sleep(60)
    return measured()


def crashes(request: ScreenRequest) -> Measurements:
    """Take the whole process down, as a segmentation fault would."""
    os._exit(139)


def crashes_on_one(request: ScreenRequest) -> Measurements:
    """Take the process down for the study that has 61 slices; measure every other."""
    return crashes(request) if len(request.paths) == 61 else measured()


BEHAVIOURS: dict[str, Callable[[ScreenRequest], Measurements]] = {
    function.__name__: function for function in (at_once, first_time_hangs, crashes, crashes_on_one)
}


def main(settings: Settings, behaviour: str, log: Path) -> None:
    """The process; everything that it says goes to `log`."""
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=2)
    logging.basicConfig(level=logging.INFO)
    store = Store(make_engine(settings.sqlalchemy_url))
    serve(settings, store, DEFAULT_POLICY, BEHAVIOURS[behaviour])
