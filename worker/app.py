"""The worker process: a Celery worker of one solo process that waits for the bell.

`-P solo` because prefork children are daemonic (nnU-Net's pools fail) and a forked CUDA context is broken; a
site's parallelism is its number of worker processes.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from typing import Any

from celery import Celery
from celery.signals import worker_ready, worker_shutting_down

from service.domain.policy import Policy
from service.settings import Settings
from service.store.engine import Store
from service.workflow.bell import SCREEN_QUEUE, TRAIN_QUEUE, broker_settings
from service.workflow.pulse import Pulse
from worker import tasks
from worker.jobs import JobRunner, ScreenFunction
from worker.runner import Ears
from worker.trainer import TrainingRunner

MAX_MESSAGES_AHEAD = 1
TRAIN_NICENESS = 10  # screening, intake and pages go first


def make_app(broker_url: str) -> Celery:
    """The Celery application: JSON only, no result backend, reconnecting; `redis://` or `redis+socket://`."""
    app = Celery("osteogate", set_as_current=False)
    app.conf.update(
        broker_settings(broker_url),
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # a broker that is away for a day costs a day, not the worker
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_prefetch_multiplier=MAX_MESSAGES_AHEAD,
        task_acks_late=False,
        worker_enable_remote_control=False,  # solo answers nothing while it works
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        timezone="UTC",
    )
    return app


def run_worker(settings: Settings, store: Store, policy: Policy, queue: str = SCREEN_QUEUE) -> None:
    """Serve a queue until SIGTERM; for `screen` load the pipeline first (which refuses altered weights)."""
    if queue == TRAIN_QUEUE:
        os.nice(TRAIN_NICENESS)
        serve_training(settings, store)
        return
    from worker.start import make_screen  # here: it loads torch

    serve(settings, store, policy, make_screen(settings, policy))


def serve_training(settings: Settings, store: Store) -> None:
    """Take training runs in this process, in its main thread, until SIGTERM or SIGINT.

    A queue of its own, so that a training run of days never stands before a patient's study.
    """
    stopping = threading.Event()
    beat = Pulse(settings.pulses, "worker").beat
    runner = TrainingRunner(store, settings, worker=_name(), stopping=stopping, beat=beat)
    app = make_app(settings.celery_url)
    tasks.register_training(app, runner.run)
    _listen(app, TRAIN_QUEUE, runner, stopping)


def serve(
    settings: Settings,
    store: Store,
    policy: Policy,
    screen: ScreenFunction,
) -> None:
    """Run a solo Celery worker in this process, in its main thread, until SIGTERM or SIGINT."""
    stopping = threading.Event()
    beat = Pulse(settings.pulses, "worker").beat
    runner = JobRunner(store, settings, policy, screen, worker=_name(), stopping=stopping, beat=beat)
    app = make_app(settings.celery_url)
    tasks.register(app, runner.run)
    _listen(app, SCREEN_QUEUE, runner, stopping)


def _name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _listen(app: Celery, queue: str, runner: JobRunner | TrainingRunner, stopping: threading.Event) -> None:
    """Run the app's worker on a queue; `stopping` is set when it shuts down."""

    def note_shutdown(**_: Any) -> None:
        stopping.set()

    def note_ready(**_: Any) -> None:
        runner.listening()

    worker_ready.connect(note_ready, weak=False)
    worker_shutting_down.connect(note_shutdown, weak=False)
    try:
        with Ears(runner):
            app.worker_main(_arguments((queue,)))
    finally:
        worker_ready.disconnect(note_ready)
        worker_shutting_down.disconnect(note_shutdown)
        app.close()


def _arguments(queues: Sequence[str]) -> list[str]:
    return [
        "worker",
        "--pool=solo",
        "--concurrency=1",
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
        f"--queues={','.join(queues)}",
        f"--hostname=osteogate-{os.getpid()}@%h",
        "--loglevel=INFO",
    ]
