"""Digital patients made side by side, each by itself: nothing is shared, so any number of processes gives the same."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import threadpoolctl

Item = TypeVar("Item")
Made = TypeVar("Made")


def side_by_side(make: Callable[[Item], Made], items: Sequence[Item], processes: int | None = None) -> Iterator[Made]:
    """What `make` makes of each, in order, in so many processes (None: one for each core)."""
    workers = min(processes or os.cpu_count() or 1, len(items))
    if workers == 1:
        yield from map(make, items)
        return
    # spawned, not forked: the caller may hold threads (a progress bar, torch)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        yield from pool.map(make, items)


def _one_thread() -> None:
    """Each process has a core to itself; a numerical library's own threads would only get in the way."""
    threadpoolctl.threadpool_limits(1)
