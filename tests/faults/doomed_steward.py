"""A steward process that dies by kill -9 around its first ring of the bell (fault 6)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from enum import StrEnum
from pathlib import Path

from service.domain.policy import DEFAULT_POLICY
from service.settings import Settings
from service.steward import Steward
from service.store.engine import Store, make_engine
from service.workflow.bell import Bell
from tests.service.workflow.workbench import PATIENCE_SECONDS


class Doom(StrEnum):
    """When it dies: the job is committed either way."""

    BEFORE_PUBLISHING = "before publishing"
    AFTER_PUBLISHING = "after publishing, before that is noted"


class DoomedSteward:
    """The process; a context manager."""

    def __init__(self, settings: Settings, doom: Doom, log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=main, args=(settings, doom, log))
        self.process.start()

    def wait(self) -> int | None:
        """Wait for its end; its exit code, minus the signal that killed it."""
        self.process.join(PATIENCE_SECONDS)
        return self.process.exitcode

    def __enter__(self) -> DoomedSteward:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()


def main(settings: Settings, doom: Doom, log: Path) -> None:
    """Steward on, as `osteogate steward` does, until the first ring."""
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    bell = Bell(settings.celery_url)

    def ring(job_id: int) -> None:
        if doom is Doom.AFTER_PUBLISHING:
            bell.ring(job_id)
        os.kill(os.getpid(), signal.SIGKILL)

    store = Store(make_engine(settings.sqlalchemy_url))
    Steward(store, settings, DEFAULT_POLICY, ring).run(threading.Event())
