"""Prediction of one study, everything after the crop: ours against eager fp32 PyTorch, same trunk evaluations.

Both sides are timed in turn in one process on the same slabs. What one trunk for both targets saves (the paper has a
network for each) is printed apart: it is no part of the ratio. The row of the matrix product is the yardstick: as many
multiplications as the network's in one product of large matrices, about as fast as fp32 gets. A pause goes before
every run: PyTorch's threads spin for a while after their work and would take a core from whoever comes next. On a busy
machine they wait for each other at every layer and its figure grows out of all proportion, CPU time included: trust
`OMP_NUM_THREADS=1` there. How far the values lie apart is told over ten patients, or over all of a cohort's:

    python -m tests.bench.bench_predict [COHORT]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from models.inputs import network_input
from models.phantom.cohort import draw_member, patient_slabs
from models.readout import LEVELS
from models.resnet50 import BonePredictor, Floats, NetworkConfig, has_bf16, load_tensors
from models.training.cohort import Cohort
from worker.compiled import compile_for_cpu
from worker.predict import Predictor
from worker.start import package_path

RUNS = 9
PATIENTS = 10  # whose results are compared; the first is timed
FIRST_SEED = 880_000_001  # of no training cohort
FULL_FIELD = 256  # pixels; the largest field, with random weights
YARDSTICK = "one fp32 matrix product of as many multiplications"
SIDE = 1024  # of the matrices: large enough that only arithmetic counts
PAUSE_SECONDS = 0.03  # before every run: nobody's threads spin any more


def main(cohort: Path | None = None) -> None:
    """Time the shipped package on digital patients, then an untrained ResNet50 on the full field."""
    predictor = Predictor(package_path("active"), "cpu")
    manifest, channels = predictor.package.manifest, predictor.input.channels
    plain = BonePredictor(NetworkConfig(manifest.architecture, manifest.targets, channels))
    load_tensors(plain, predictor.package.weights())
    plain.eval()
    studies = drawn() if cohort is None else stored(cohort)
    pictures = [network_input(study, predictor.input) for study in studies]
    fast = Predictor(package_path("active"), "cpu", "bf16") if has_bf16(torch.device("cpu")) else None
    table = Table(title=f"prediction of one study, {torch.get_num_threads()} threads, {RUNS} runs in turn")
    for heading in ("", "median s", "min s", "CPU s", "ratio of medians, of CPU"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows, columns = pictures[0].shape[-2:]
    sides: dict[str, Callable[[], object]] = {
        f"ours ({predictor.engine})": lambda: predictor.answers(studies[0]),
        "ours, measures and readout too": lambda: predictor.predict(studies[0], LEVELS),
        "eager fp32 PyTorch": lambda: eager(plain, network_input(studies[0], predictor.input)),
        YARDSTICK: product_of_as_many(plain, pictures[0]),
        "ours, a network per target": lambda: (predictor.answers(studies[0]), predictor.answers(studies[0])),
    }
    if fast is not None:
        sides[f"ours, asked for ({fast.engine})"] = lambda: fast.answers(studies[0])
        sides["ours so, measures and readout too"] = lambda: fast.predict(studies[0], LEVELS)
    add(table, f"{len(studies[0])} vertebrae, {channels} x {rows} x {columns}", sides)
    full = np.random.default_rng(0).random((len(studies[0]), channels, FULL_FIELD, FULL_FIELD), dtype=np.float32)
    if predictor.engine.startswith("OpenVINO"):
        compiled = compile_for_cpu(plain, torch.get_num_threads())
        whole = {compiled.name: lambda: compiled(full), "eager fp32 PyTorch": lambda: eager(plain, full)}
        whole[YARDSTICK] = product_of_as_many(plain, full)
        add(table, f"{len(full)} pictures, {FULL_FIELD} x {FULL_FIELD}", whole, runs=3)
    console = Console(width=120)
    console.print(table)
    weigh = predictor.readout or (lambda answers, _slabs, _levels: answers)
    peers = np.concatenate([
        weigh(eager(plain, seen), list(study), LEVELS) for seen, study in zip(pictures, studies, strict=True)
    ])  # fmt: skip
    for ours in (predictor, fast):
        if ours is not None:
            off = np.abs(results(ours, studies) - peers)
            (bmd, tbs), (usual_bmd, usual_tbs) = off.max(axis=0), np.percentile(off, 99, axis=0)
            console.print(f"{ours.engine}: over {len(peers)} vertebrae at most {bmd:.1e} g/cm2, {tbs:.1e} TBS off")
            console.print(f"  99 of 100 within {usual_bmd:.1e} g/cm2, {usual_tbs:.1e} TBS")


def drawn() -> list[Floats]:
    """The slabs [4, slabs, size, size] HU of a few digital patients."""
    patients = (draw_member(FIRST_SEED + one, {}, enriched=False) for one in range(PATIENTS))
    return [patient_slabs(patient, 1).slabs[:, 0] for patient in patients]


def stored(folder: Path) -> list[Floats]:
    """The same of every patient of a cohort."""
    cohort = Cohort.read(folder)
    return [cohort.slabs[cohort.patients == one, 0].astype(np.float32) for one in dict.fromkeys(cohort.patients)]


def results(predictor: Predictor, studies: Sequence[Floats]) -> np.ndarray:
    """What a result would say of every vertebra: [vertebrae, 2] BMD g/cm2 and TBS."""
    told = [one for study in studies for one in predictor.predict(study, LEVELS)]
    return np.array([(one.bmd_g_cm2, one.tbs) for one in told])


def eager(network: BonePredictor, pictures: Floats) -> Floats:
    """The peer: PyTorch as it comes, fp32, without gradients."""
    with torch.no_grad():
        return network(torch.from_numpy(pictures)).numpy()  # type: ignore[no-any-return]


def product_of_as_many(network: BonePredictor, pictures: Floats) -> Callable[[], object]:
    """One product of large matrices with as many multiplications as the network does for these pictures."""
    with FlopCounterMode(display=False) as counted:
        eager(network, pictures)
    left, right = torch.randn(counted.get_total_flops() // (2 * SIDE * SIDE), SIDE), torch.randn(SIDE, SIDE)
    return lambda: left @ right


def add(table: Table, title: str, sides: dict[str, Callable[[], object]], runs: int = RUNS) -> None:
    """Run the sides in turn; one row each, its ratio the peer's time over its own."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs + 1):
        for name, side in sides.items():
            time.sleep(PAUSE_SECONDS)
            start, used = time.perf_counter(), time.process_time()
            side()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
    median = {name: statistics.median(wall[name][1:]) for name in sides}  # the first run warms up
    work = {name: statistics.median(cpu[name][1:]) for name in sides}
    peer = next(name for name in sides if name.startswith("eager"))
    table.add_section()
    table.add_row(title)
    for name in sides:
        ratios = f"{median[peer] / median[name]:.1f} x, {work[peer] / work[name]:.1f} x"
        table.add_row(f"  {name}", f"{median[name]:.3f}", f"{min(wall[name][1:]):.3f}", f"{work[name]:.3f}", ratios)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
