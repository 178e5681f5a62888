"""`osteogate listen | steward | web | worker`: the processes of an installation."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

from service.cli.shared import Handler, add_command, open_store, require_lock, site_policy, until_signalled
from service.settings import Settings

WEB_GRACE_SECONDS = 10  # for the requests in hand at a shutdown


def add_commands(commands: Any) -> None:
    """Add them to the command line."""
    add_command(commands, "listen", run_listen, "the DICOM C-STORE listener")
    add_command(commands, "steward", run_steward, "closes quiet studies and rings the bell for waiting work")
    add_command(commands, "web", run_web, "the pages and the API")
    worker = add_command(commands, "worker", run_worker, "a Celery worker that screens studies, or one that trains")
    worker.add_argument(
        "--queue",
        choices=("screen", "train"),
        default="screen",
        help="'train' takes training runs, niced, and no study",
    )


def run_listen(_: argparse.Namespace) -> int:
    """`osteogate listen`."""
    from service.dicom.listener import Listener
    from service.workflow.intake import Door

    settings, store = Settings(), None
    stopping = until_signalled()
    store = open_store(settings)
    door = Door(store, settings)
    listener = Listener(settings, door.commit, door.refuse)
    listener.start()
    try:
        stopping.wait()
    finally:
        listener.stop()
    return 0


def run_steward(_: argparse.Namespace) -> int:
    """`osteogate steward`."""
    from service.steward import Steward, serve
    from service.workflow.bell import Bell
    from service.workflow.pulse import Pulse

    settings = Settings()
    stopping = until_signalled()
    bell = Bell(settings.celery_url)
    beat = Pulse(settings.pulses, "steward").beat
    store = open_store(settings)
    steward = Steward(store, settings, site_policy(settings), bell.ring, beat=beat, ring_training=bell.ring_training)
    if not serve(steward, store, settings, stopping):
        logging.shutdown()
        os._exit(0)  # pynetdicom's threads would hold the process for as long as a peer hangs
    return 0


def run_web(_: argparse.Namespace) -> int:
    """`osteogate web`."""
    import uvicorn

    from service.api.app import create_app

    settings = Settings()
    require_lock(settings)
    app = create_app(settings, open_store(settings), site_policy(settings))
    uvicorn.run(
        app,
        host=settings.web_host,
        port=settings.web_port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=WEB_GRACE_SECONDS,
    )
    return 0


def run_worker(options: argparse.Namespace) -> int:
    """`osteogate worker`."""
    from worker.app import run_worker

    settings = Settings()
    run_worker(settings, open_store(settings), site_policy(settings), options.queue)
    return 0


PROCESSES: tuple[Handler, ...] = (run_listen, run_steward, run_web, run_worker)
