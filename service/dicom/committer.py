"""Group commit: one thread writes the rows of all waiting C-STORE handlers in one transaction.

Each handler waits for its own outcome, so nothing is acknowledged early; while one transaction is being
synced to disk the next batch gathers by itself, with no timer and no added delay.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from service.dicom.received import Commit, Received, Stored

LOGGER = logging.getLogger(__name__)
MAX_BATCH = 64
Waiting = tuple[Received, "Future[Stored]"]


class CommitError(Exception):
    """The row is not known to be committed; the sender must keep the instance and may try again."""


class Committer:
    """Batches rows from many threads into few transactions."""

    def __init__(self, commit: Commit, *, max_batch: int = MAX_BATCH) -> None:
        self._commit = commit
        self._max_batch = max_batch
        self._queue: queue.Queue[Waiting | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="intake-committer", daemon=True)

    def start(self) -> None:
        """Start the committing thread."""
        self._thread.start()

    def stop(self) -> None:
        """Commit what is waiting, then end."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(timeout=30.0)

    @property
    def is_alive(self) -> bool:
        """True while rows can be committed."""
        return self._thread.is_alive()

    def store(self, received: Received, *, timeout_seconds: float) -> Stored:
        """Wait until `received` is committed. Raises CommitError."""
        outcome: Future[Stored] = Future()
        self._queue.put((received, outcome))
        try:
            return outcome.result(timeout=timeout_seconds)
        except CommitError:
            raise
        except TimeoutError as error:
            raise CommitError("the database did not answer in time") from error
        except Exception as error:
            raise CommitError(f"the database refused: {type(error).__name__}") from error

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, ended = self._gather(first)
            self._settle(batch)
            if ended:
                return

    def _gather(self, first: Waiting) -> tuple[list[Waiting], bool]:
        batch = [first]
        while len(batch) < self._max_batch:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
            if item is None:
                return batch, True
            batch.append(item)
        return batch, False

    def _settle(self, batch: Sequence[Waiting]) -> None:
        try:
            outcomes = self._commit_batch(batch)
        except Exception as error:
            LOGGER.error("commit of %d instances failed: %s", len(batch), type(error).__name__)
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            self._settle_singly(batch, error)
            return
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            future.set_result(outcome)

    def _settle_singly(self, batch: Sequence[Waiting], error: Exception) -> None:
        """One bad row must not fail its neighbours; a database that is down must not be asked for each of them."""
        failures = 0
        for received, future in batch:
            if failures >= 2:
                future.set_exception(error)
                continue
            try:
                future.set_result(self._commit_batch([(received, future)])[0])
                failures = 0
            except Exception as single_error:
                failures += 1
                future.set_exception(single_error)

    def _commit_batch(self, batch: Sequence[Waiting]) -> list[Stored]:
        outcomes = self._commit([received for received, _ in batch])
        if len(outcomes) != len(batch):
            raise CommitError(f"{len(outcomes)} outcomes for {len(batch)} instances")
        return outcomes
