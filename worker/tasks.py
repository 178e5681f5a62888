"""The Celery tasks: each one only says which function to call."""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery

from service.workflow.bell import SCREEN_TASK, TRAIN_TASK


def register(app: Celery, screen: Callable[[int], object]) -> None:
    """Register the screening task on an app."""

    @app.task(name=SCREEN_TASK, ignore_result=True)  # type: ignore[untyped-decorator]
    def screen_job(job_id: int) -> None:
        screen(job_id)


def register_training(app: Celery, train: Callable[[int], object]) -> None:
    """Register the training task on an app."""

    @app.task(name=TRAIN_TASK, ignore_result=True)  # type: ignore[untyped-decorator]
    def train_run(run_id: int) -> None:
        train(run_id)
