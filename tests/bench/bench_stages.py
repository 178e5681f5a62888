"""How long each stage of one study takes, on one digital patient, networks warm."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from models.phantom.study import make_study
from service.settings import Settings
from worker.pipeline import Stopwatch
from worker.start import make_pipeline
from worker.volume import load_dicom

RUNS = 5


def main() -> None:
    """Make one digital patient, load the networks once, screen it several times."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        study = make_study(4711, Path(folder) / "study", {})
        made = time.perf_counter() - start
        files = sorted(study.rglob("*.dcm"))
        start = time.perf_counter()
        pipeline = make_pipeline(Settings(data_dir=Path(folder)))
        loaded = time.perf_counter() - start
        runs = [_one(pipeline, files, Path(folder) / "pictures") for _ in range(RUNS + 1)][1:]
    table = Table(title=f"one study, {len(files)} slices, {RUNS} warm runs on {pipeline.device}")
    for heading in ("stage", "median s", "min s", "max s"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    table.add_row("(phantom made)", f"{made:.2f}", "", "")
    table.add_row("(networks loaded, once per worker)", f"{loaded:.2f}", "", "")
    for stage in runs[0]:
        seconds = [run[stage] for run in runs]
        table.add_row(stage, f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}", f"{max(seconds):.3f}")
    Console().print(table)


def _one(pipeline, files: list[Path], pictures: Path) -> dict[str, float]:  # type: ignore[no-untyped-def]
    watch = Stopwatch()
    start = time.perf_counter()
    with watch.stage("read"):
        volume = load_dicom(files)
    pipeline.run(volume, pictures, watch)
    return {**watch.seconds, "whole study": time.perf_counter() - start}


if __name__ == "__main__":
    main()
