"""Fetching TotalSegmentator's published archives, on a site that has internet; never called by a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from worker.segmentation.importing import MOST_BYTES
from worker.segmentation.theirs import RELEASES, archive_url
from worker.segmentation.weights import TASKS, Task, WeightsError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
TIMEOUT_S = 30.0  # to connect, and between two pieces
MOST_ARCHIVE_BYTES = max(MOST_BYTES.values())

OnProgress = Callable[[str, int, int | None], None]  # archive, bytes so far, bytes in all if told


def task_named(name: str) -> Task:
    """`total` or `total_v3`; ValueError for another name."""
    for task in TASKS:
        if task.name == name:
            return task
    raise ValueError(f"no task {name!r}: {', '.join(task.name for task in TASKS)}")


def fetch(task: Task, folder: Path, on_progress: OnProgress, *, releases: str = RELEASES) -> list[Path]:
    """Both archives of a task, into `folder`; whole, or WeightsError with what to do instead."""
    archives = []
    for number in task.datasets:
        url = archive_url(number, releases)
        path = folder / url.rpartition("/")[2]
        _download(url, path, lambda done, total, name=path.name: on_progress(name, done, total))  # type: ignore[misc]
        archives.append(path)
    return archives


def _download(url: str, path: Path, told: Callable[[int, int | None], None]) -> None:
    unfinished = path.with_suffix(".part")
    with _answer(url) as response:
        length = response.headers.get("content-length", "")
        total = int(length) if length.isdigit() else None
        done = 0
        with unfinished.open("wb") as out:
            for piece in response.iter_raw():
                done += len(piece)
                if done > MOST_ARCHIVE_BYTES:
                    raise WeightsError(f"{url} sends more than {MOST_ARCHIVE_BYTES} bytes: that is no weights archive.")
                out.write(piece)
                told(done, total)
    if total is not None and done != total:
        raise WeightsError(f"{url} stopped after {done} of {total} bytes: try again.")
    unfinished.replace(path)


@contextmanager
def _answer(url: str) -> Iterator[httpx.Response]:
    _check_address(url)
    instead = "fetch it elsewhere and use `osteogate weights import`"
    hooks = {"request": [lambda request: _check_address(str(request.url))]}  # of redirects, too
    try:
        with (
            httpx.Client(follow_redirects=True, timeout=TIMEOUT_S, event_hooks=hooks) as client,
            client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response,
        ):
            response.raise_for_status()
            yield response
    except httpx.HTTPStatusError as error:
        raise WeightsError(f"{url} answers {error.response.status_code}; {instead}.") from error
    except httpx.HTTPError as error:
        raise WeightsError(f"{url} cannot be fetched ({error or type(error).__name__}); {instead}.") from error


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in LOOPBACK:
        raise WeightsError(f"{url} is not an https address: weights are not fetched over it.")
