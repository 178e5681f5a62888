"""Segmentation of one study: ours, resident, beside TotalSegmentator's own program, with the same weights, in one run.

    python -m tests.bench.bench_segment [equal] [published] [memory]

`equal`: the built-in networks in TotalSegmentator's class order and layout. Its program runs in a process of its own;
its start-up, its studies and the part of them that is inference are told apart, and its labels are held against ours.
`published`: networks of the published size (6 stages of 32-320 channels, tiles of 128^3). Random weights serve for the
time and find nothing, so the lumbar box is taken from the digital patient's truth.
`memory`: the peak of a process that segments 2000 slices of 512 x 512.

The machine may be busy: CPU seconds and the ratio of one run say more than seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from models.phantom.patient import draw
from models.phantom.render import body_grid, render
from models.phantom.scanner import scan, scanner_rng
from tests.totalseg import TOTAL, built_in_in_their_layout, published_size
from worker.segmentation.base import L5, LabelArray
from worker.segmentation.cascade import MARGIN_ALONG_MM, MARGIN_MM, Cascade, lumbar_box
from worker.segmentation.evaluate import dice
from worker.segmentation.network import load_network
from worker.segmentation.theirs import class_map, environment, folder_name
from worker.segmentation.weights import network_folder
from worker.volume import Volume

SEED = 880_000_001  # of no training cohort
SPACING_MM = 1.5  # of the digital CT
EQUAL = 0.995  # Dice per level
ROIS = [f"vertebrae_L{number}" for number in range(1, 6)]
THEIR_PROGRAM = ("totalsegmentator.python_api", "totalsegmentator.nnunet", "nnunetv2.inference.predict_from_raw_data")
SLICES, ROWS = 2000, 512
GIB = 1024**3


def main() -> None:
    """Run the parts that were named; all of them where none was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["equal", "published", "memory"])
    parser.add_argument("--api", nargs=3, type=Path, metavar=("CT", "OUT", "TOLD"), help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=("int16", "float32"), help=argparse.SUPPRESS)
    parser.add_argument("--slices", type=int, default=SLICES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.api:
        run_their_program(*arguments.api)
    elif arguments.peak:
        peak(arguments.peak, arguments.slices)
    else:
        run(arguments.parts)


def run(parts: list[str]) -> None:
    """Measure and print."""
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as temporary:
        if {"equal", "published"} & set(parts):
            volume, truth = digital_ct()
        if "equal" in parts:
            console.print(equal(Path(temporary), volume))
        if "published" in parts:
            console.print(published(Path(temporary), volume, truth))
    if "memory" in parts:
        console.print(memory())


def digital_ct() -> tuple[Volume, LabelArray]:
    """A digital patient from T11 to below S1, whole HU, and its true labels."""
    drawn = draw(SEED)
    rendered = render(drawn, body_grid(drawn, SPACING_MM, first="T11", last="S1", margin_mm=20.0))
    hu = np.round(scan(rendered, drawn, scanner_rng(drawn))).astype(np.float32)
    return Volume(hu, rendered.affine), rendered.labels


# -------------------------------------------------------------------------------------------- the same weights


def equal(folder: Path, volume: Volume) -> Table:
    """Both on one CT, and how far their labels agree."""
    weights = built_in_in_their_layout(folder / "weights")
    for number in (291, 293, 294, 295):  # its other parts: it asks only whether the folders exist
        (weights / folder_name(number)).mkdir()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine[:, [2, 1, 0, 3]]
    nib.save(nib.Nifti1Image(volume.hu.transpose(2, 1, 0).astype(np.int16), affine), folder / "ct.nii.gz")
    command = [sys.executable, "-m", "tests.bench.bench_segment", "--api"]
    told_file = folder / "told.json"
    subprocess.run(
        [*command, str(folder / "ct.nii.gz"), str(folder / "labels.nii.gz"), str(told_file)],
        check=True,
        env={**os.environ, **environment(folder / "home", weights)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    told = json.loads(told_file.read_text())
    theirs = np.asarray(nib.load(folder / "labels.nii.gz").dataobj).transpose(2, 1, 0).astype(np.uint8)
    loaded = timed(lambda: cascade(weights))
    ours = loaded.value
    first, warm = timed(lambda: ours.segment(volume)), timed(lambda: ours.segment(volume))
    table = Table(title=f"one study, {volume.hu.shape}, the same weights, {torch.get_num_threads()} threads")
    for heading in ("", "s", "CPU s"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("TotalSegmentator: start-up (imports, without PyTorch's own)", *cells(told["start"]))
    for name, one in zip(("first", "warm"), told["studies"], strict=True):
        table.add_row(f"TotalSegmentator: {name} study", *cells(one))
        table.add_row("  of it inference", *cells(one["inference"]))
    table.add_row("ours: networks loaded, once per worker", *loaded.cells)
    table.add_row("ours: first study", *first.cells)
    table.add_row(f"ours: warm study ({engine(ours)})", *warm.cells)
    their_warm = told["studies"][1]
    ratio = f"{their_warm['wall'] / warm.wall:.1f}", f"{their_warm['cpu'] / warm.cpu:.1f}"
    table.add_row("TotalSegmentator / ours, warm", *ratio)
    agreement = {f"L{6 - n}": dice(warm.value.labels, theirs, L5 + n - 1) for n in range(1, 6)}
    table.caption = "Dice ours / theirs: " + ", ".join(
        f"{name} {value:.4f}" for name, value in sorted(agreement.items())
    )
    if not theirs.any() or min(agreement.values()) < EQUAL:
        raise SystemExit(f"ours and TotalSegmentator's labels differ: {agreement}")
    return table


def cascade(weights: Path) -> Cascade:
    """Both networks used as TotalSegmentator uses them."""
    coarse, fine = (
        load_network(network_folder(weights, number), torch.device("cpu"), class_map(TOTAL, number)).fastest()
        for number in TOTAL.datasets
    )
    return Cascade("bench", "", coarse, fine, TOTAL)


def run_their_program(ct: Path, out: Path, told_file: Path) -> None:
    """The process that is measured: TotalSegmentator's Python API, two studies."""
    start = timed(lambda: [import_module(name) for name in THEIR_PROGRAM])
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from totalsegmentator.python_api import totalsegmentator

    inference: list[Timed] = []
    real = nnUNetPredictor.predict_sliding_window_return_logits

    def measured(self: Any, image: Any) -> Any:
        inference.append(timed(lambda: real(self, image)))
        return inference[-1].value

    nnUNetPredictor.predict_sliding_window_return_logits = measured
    studies = []
    for _ in range(2):
        inference.clear()
        image = nib.load(ct)
        one = timed(
            lambda image=image: totalsegmentator(
                image, None, ml=True, roi_subset=ROIS, device="cpu", quiet=True, nr_thr_saving=1
            )
        )
        tiles = {"wall": sum(part.wall for part in inference), "cpu": sum(part.cpu for part in inference)}
        studies.append({"wall": one.wall, "cpu": one.cpu, "inference": tiles})
    nib.save(one.value, out)
    told_file.write_text(json.dumps({"start": {"wall": start.wall, "cpu": start.cpu}, "studies": studies}))


# ------------------------------------------------------------------------------------------ the published size


def published(folder: Path, volume: Volume, truth: LabelArray) -> Table:
    """Ours with networks as large as the published ones; and one tile in eager PyTorch."""
    ours = cascade(published_size(TOTAL, folder / "published"))
    box, core = (lumbar_box(truth, volume, along) for along in (MARGIN_ALONG_MM, MARGIN_MM))
    assert box is not None
    assert core is not None
    coarse = timed(lambda: ours._coarse_labels(volume))
    theirs = timed(lambda: ours._as_theirs(volume, core, TOTAL, ours.fine))
    fine = timed(lambda: ours.labels_in(volume, box, core))
    patch = torch.randn(ours.fine.tile, generator=torch.Generator().manual_seed(0))
    compiled = timed(lambda: ours.fine.logits_of(patch))
    plain = dataclasses.replace(ours.fine, compiled=None, precision=torch.float32)
    eager = timed(lambda: plain.logits_of(patch))
    agree = float((compiled.value.argmax(0) == eager.value.argmax(0)).float().mean())
    sizes = " x ".join(str(round((part.stop - part.start) * SPACING_MM)) for part in core)
    table = Table(title=f"networks of the published size, lumbar box {sizes} mm, {torch.get_num_threads()} threads")
    for heading in ("", "s", "CPU s", "CPU s / threads"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = {
        f"coarse network ({engine(ours)})": coarse,
        "fine network: TotalSegmentator's box": theirs,
        "fine network: the box and the neighbours for the level checks": fine,
        f"one tile of {ours.fine.tile[0]}^3 ({engine(ours)})": compiled,
        "one tile, eager fp32 PyTorch": eager,
    }
    for name, one in rows.items():
        table.add_row(name, *one.cells, f"{one.cpu / torch.get_num_threads():.1f}")
    whole = coarse.cpu + fine.cpu
    table.add_row(
        "whole study", f"{coarse.wall + fine.wall:.2f}", f"{whole:.2f}", f"{whole / torch.get_num_threads():.1f}"
    )
    table.caption = (
        f"PyTorch / ours {eager.cpu / compiled.cpu:.1f} (CPU), the same class in {100 * agree:.3f} % of voxels"
    )
    return table


# ---------------------------------------------------------------------------------------------------- memory


def memory() -> Table:
    """The peak of each kind of volume in a process of its own."""
    table = Table(title=f"{SLICES} slices of {ROWS} x {ROWS}, built-in networks")
    for heading in ("HU kept as", "volume GiB", "peak RSS GiB", "of it before segmenting", "s"):
        table.add_column(heading, justify="right")
    for kind in ("int16", "float32"):
        command = [sys.executable, "-m", "tests.bench.bench_segment", "--peak", kind]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        cells_ = (f"{told[name]:.2f}" for name in ("volume", "peak", "before", "seconds"))
        table.add_row(kind, *cells_)
    return table


def peak(kind: str, slices: int) -> None:
    """The process that is measured: one digital patient on that many slices, segmented once."""
    from worker.segmentation import load_segmenter

    segmenter = load_segmenter(None, "cpu")
    small = coarse_ct()
    segmenter.segment(small)  # what the engines take for themselves is no matter of the CT's length
    volume = long_volume(small, slices, ROWS, np.dtype(kind))
    before = rss()
    segmentation = timed(lambda: segmenter.segment(volume))
    told = {"volume": volume.hu.nbytes / GIB, "before": before, "peak": rss(), "seconds": segmentation.wall}
    assert segmentation.value.labels.any()
    print(json.dumps(told))


def coarse_ct() -> Volume:
    """A digital patient in voxels of 4 mm."""
    drawn = draw(SEED)
    rendered = render(drawn, body_grid(drawn, 4.0, first="T11", last="S1", margin_mm=20.0))
    return Volume(np.round(scan(rendered, drawn, scanner_rng(drawn))).astype(np.float32), rendered.affine)


def long_volume(small: Volume, slices: int, rows: int, kind: np.dtype[Any]) -> Volume:
    """The same patient on slices of `rows` x `rows`, half a millimetre apart; its ends go on to both sides."""
    length, *others = small.hu.shape
    step = np.array([0.5 / 4.0, *(n / rows for n in others)])  # of the coarse voxels
    k = np.clip(np.arange(slices) * step[0] - (slices * step[0] - length) / 2, 0, length - 1).astype(np.intp)
    j, i = ((np.arange(rows) * one).astype(np.intp) for one in step[1:])
    hu = np.empty((slices, rows, rows), dtype=kind)
    for to, one in enumerate(k):
        hu[to] = small.hu[one][np.ix_(j, i)]
    return Volume(hu, small.affine @ np.diag([*step, 1.0]))


def rss() -> float:
    """Peak of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


# ----------------------------------------------------------------------------------------------- what they share


@dataclasses.dataclass(frozen=True)
class Timed:
    """What something gave, and its seconds: on the clock, and of this process and its finished children."""

    value: Any
    wall: float
    cpu: float

    @property
    def cells(self) -> tuple[str, str]:
        """For a row of a table."""
        return f"{self.wall:.2f}", f"{self.cpu:.2f}"


def cells(told: dict[str, float]) -> tuple[str, str]:
    """The same, of a child's JSON."""
    return f"{told['wall']:.2f}", f"{told['cpu']:.2f}"


def timed(what: Callable[[], Any]) -> Timed:
    """Run it once."""
    wall, used = time.perf_counter(), cpu_seconds()
    value = what()
    return Timed(value, time.perf_counter() - wall, cpu_seconds() - used)


def cpu_seconds() -> float:
    """Of this process and its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def engine(ours: Cascade) -> str:
    """What computes the convolutions."""
    if ours.fine.compiled:
        return ours.fine.compiled.name
    return f"PyTorch {torch.__version__} {str(ours.fine.precision).removeprefix('torch.')}"


if __name__ == "__main__":
    main()
