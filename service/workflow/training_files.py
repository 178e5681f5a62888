"""What a training run leaves on disk, and when the most of it goes.

What tells what the run was stays for good: manifest, package and reports (a few dozen MiB), and its row. What only a
worker needs that goes on with it (crops of patients' CTs, checkpoints: gigabytes) goes as soon as the run has
finished, or when one that failed or was cancelled can no longer be resumed.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from service.domain.splits import Part
from service.domain.states import RunState
from service.store.tables import AuditRow, TrainingRunRow

ACTOR = "osteogate"
COHORTS: Mapping[Part, str] = {part: f"cohort-{part.value}" for part in Part}
CUT = "cut.json"  # beside the cohorts, when all of them are complete: what was lost (the run's row tells it too)
PASSING = (CUT, *COHORTS.values(), "package.run", ".package.draft")  # the first makes a worker believe the next two
MARGIN = timedelta(hours=1)  # between the last resume and the end of its files: clocks differ


def leftovers(training_dir: Path) -> dict[int, Path]:
    """The folders of runs, by the run's number, that hold more than the record."""
    found = training_dir.iterdir() if training_dir.is_dir() else ()
    return {
        int(folder.name): folder
        for folder in found
        if folder.name.isascii() and folder.name.isdigit() and any((folder / name).exists() for name in PASSING)
    }


def spent(session: Session, run_ids: Collection[int], now: datetime, keep_seconds: float) -> list[int]:
    """Those of the runs that nothing will go on with: finished, or stopped so long ago that nobody can resume them."""
    stopped = TrainingRunRow.state.in_([RunState.FAILED.value, RunState.CANCELLED.value])
    long_ago = TrainingRunRow.finished_at < now - timedelta(seconds=keep_seconds) - MARGIN
    done = or_(TrainingRunRow.state == RunState.FINISHED.value, and_(stopped, long_ago))
    return list(session.scalars(select(TrainingRunRow.id).where(TrainingRunRow.id.in_(list(run_ids)), done)))


def tidy(folder: Path) -> list[str]:
    """Remove all but the record; what was removed. What is half removed counts as there, until it is gone."""
    there = [name for name in PASSING if (folder / name).exists()]
    for name in there:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return there


def note(session: Session, run_id: int, removed: Collection[str], now: datetime) -> None:
    """Tell the audit: crops of patients' CTs are gone."""
    detail = {"removed": sorted(removed)}
    session.add(AuditRow(at=now, actor=ACTOR, action="training.tidy", subject=f"training-run:{run_id}", detail=detail))
