"""The bell: a Celery message that says "look at job n".

Losing one loses nothing: the steward rings again. Ringing never blocks for long.
"""

from __future__ import annotations

from typing import Any, Protocol

from celery import Celery

SCREEN_TASK = "osteogate.screen"
SCREEN_QUEUE = "screen"
TRAIN_TASK = "osteogate.train"
TRAIN_QUEUE = "train"  # of its own, so that a run of days never stands before a patient's study
SOCKET_TIMEOUT_SECONDS = 2.0  # a half-open broker connection would otherwise be waited on for ever


class Ring(Protocol):
    """What rings: called with a job's id; raises when the broker cannot be reached."""

    def __call__(self, job_id: int) -> None: ...


def broker_settings(broker_url: str) -> dict[str, Any]:
    """The Celery configuration that the bell and the worker share."""
    return {
        "broker_url": broker_url,
        "broker_connection_timeout": SOCKET_TIMEOUT_SECONDS,
        "broker_transport_options": {
            "socket_timeout": SOCKET_TIMEOUT_SECONDS,
            "socket_connect_timeout": SOCKET_TIMEOUT_SECONDS,
            "socket_keepalive": True,
            # No acknowledgements: the job row remembers unfinished work, so the broker need not. (And a worker that
            # lost its broker in the midst of one, with Celery 5.7, never hears again.)
            "ack_emulation": False,
        },
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_ignore_result": True,
        "task_default_queue": SCREEN_QUEUE,
    }


class Bell:
    """Rings by task name: this side knows nothing of the worker's code."""

    def __init__(self, broker_url: str) -> None:
        self._app = Celery("osteogate-bell", set_as_current=False)
        self._app.conf.update(broker_settings(broker_url), task_publish_retry=False)
        # One try, no waiting: the steward rings again by itself.
        once = {"max_retries": 0, "interval_start": 0, "interval_step": 0, "interval_max": 0}
        self._app.conf.broker_transport_options.update(once)

    def ring(self, job_id: int) -> None:
        """Send the message; raises, within a few seconds, when the broker cannot be reached."""
        self._app.send_task(SCREEN_TASK, args=[job_id], queue=SCREEN_QUEUE, retry=False, ignore_result=True)

    def ring_training(self, run_id: int) -> None:
        """The same for a training run."""
        self._app.send_task(TRAIN_TASK, args=[run_id], queue=TRAIN_QUEUE, retry=False, ignore_result=True)

    def close(self) -> None:
        """Close the broker connections."""
        self._app.close()
