"""How good a weights folder is, measured: on unseen digital patients, and on a labelled CT.

    python -m worker.segmentation.evaluate phantoms --patients 50 --first-seed 900000
    python -m worker.segmentation.evaluate labelled --ct CT.nii.gz --labels LABELS.nii.gz

Both take --weights DIR, --device and --json FILE before the command.

A digital patient's levels are right when each of L1-L4 overlaps its own truth more than any other and every
centroid lies within 10 mm of its truth. Training seeds start at 100001; these do not meet them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.package import Scanner
from models.phantom.patient import draw
from models.phantom.render import native_grid, render
from models.phantom.scanner import scan, scanner_rng
from worker.anatomy import assess
from worker.segmentation import Segmentation, Segmenter, load_segmenter
from worker.segmentation.base import LEVEL_IDS, LabelArray
from worker.volume import Volume, load_label_map, load_nifti

RIGHT_MM = 10.0
STUMP_ML = 20.0  # of a vertebra cut by the end of the CT: less is a process or an endplate, not a level


@dataclass(frozen=True)
class Score:
    """One CT: Dice per level against the truth, whether every level is the right one, and what the level
    checks said.
    """

    case: str
    dice: dict[str, float]
    levels_right: bool
    numbering: str
    in_view: tuple[str, ...]
    lumbar_count: int | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def mean_dice(self) -> float:
        """Mean over L1-L4."""
        return float(np.mean(list(self.dice.values())))


def score(case: str, volume: Volume, truth: LabelArray, segmenter: Segmenter) -> Score:
    """Segment one volume and hold it against its true labels."""
    started = time.perf_counter()
    segmentation = segmenter.segment(volume)
    seconds = time.perf_counter() - started
    anatomy = assess(volume, segmentation)
    return Score(
        case=case,
        dice={name: dice(segmentation.labels, truth, label) for name, label in LEVEL_IDS.items()},
        levels_right=levels_right(segmentation, truth, volume),
        numbering=anatomy.numbering.value,
        in_view=tuple(name for name, level in anatomy.levels.items() if level.in_view),
        lumbar_count=anatomy.lumbar_count,
        notes=anatomy.notes,
        seconds=round(seconds, 2),
    )


def dice(labels: LabelArray, truth: LabelArray, label: int) -> float:
    """2 |A and B| / (|A| + |B|) of one label; 0 where only one of both has it, 1 where neither has."""
    found, true = labels == label, truth == label
    size = int(found.sum()) + int(true.sum())
    return 1.0 if size == 0 else 2.0 * int((found & true).sum()) / size


def levels_right(segmentation: Segmentation, truth: LabelArray, volume: Volume) -> bool:
    """Each of L1-L4 that the truth holds (more than a stump of) is found in its place under its own name."""
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000.0
    for label in LEVEL_IDS.values():
        true = truth == label
        if not true.any() or _stump(true, voxel_ml):
            continue
        found = segmentation.labels == label
        names = np.bincount(segmentation.labels[true], minlength=256)
        names[0] = 0
        if not found.any() or int(names.argmax()) != label:
            return False
        offset = volume.affine[:3, :3] @ (np.argwhere(found).mean(axis=0) - np.argwhere(true).mean(axis=0))
        if float(np.linalg.norm(offset)) > RIGHT_MM:
            return False
    return True


def _stump(true: npt.NDArray[np.bool_], voxel_ml: float) -> bool:
    cut = bool(true[0].any() or true[-1].any())
    return cut and float(true.sum()) * voxel_ml < STUMP_ML


def digital_patient(seed: int, **settings: str | float) -> tuple[Volume, LabelArray]:
    """The CT of a digital patient on its scanner's own grid, and its true labels."""
    patient = draw(seed, **settings)
    rendered = render(patient, native_grid(patient))
    hu = scan(rendered, patient, scanner_rng(patient)).astype(np.float32)
    return Volume(hu, rendered.affine, scanner=Scanner(digital=True)), rendered.labels


def evaluate_phantoms(segmenter: Segmenter, seeds: Sequence[int], **settings: str | float) -> list[Score]:
    """Score a segmenter on digital patients, printing each."""
    scores = []
    for seed in seeds:
        volume, truth = digital_patient(seed, **settings)
        scores.append(score(f"seed {seed}", volume, truth, segmenter))
        print(_line(scores[-1]), flush=True)
    return scores


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """The figures of the card."""
    return {
        "cases": len(scores),
        "mean_dice": round(float(np.mean([one.mean_dice for one in scores])), 4),
        "worst_dice": round(min(min(one.dice.values()) for one in scores), 4),
        "levels_right": sum(one.levels_right for one in scores),
        "certain": sum(one.numbering == "certain" for one in scores),
        "wrong_and_certain": sum(one.numbering == "certain" and not one.levels_right for one in scores),
        "seconds": round(float(np.mean([one.seconds for one in scores])), 2),
    }


def _line(one: Score) -> str:
    dices = " ".join(f"{name} {value:.3f}" for name, value in one.dice.items())
    right = "right" if one.levels_right else "WRONG"
    return f"{one.case}: {dices}  levels {right}, {one.numbering}, {one.seconds:.1f} s {'; '.join(one.notes)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The two commands of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m worker.segmentation.evaluate", description=__doc__)
    parser.add_argument("--weights", type=Path, help="a weights folder; without it the built-in one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    phantoms = commands.add_parser("phantoms")
    phantoms.add_argument("--patients", type=int, default=50)
    phantoms.add_argument("--first-seed", type=int, default=900_000)
    phantoms.add_argument("--coverage", default="T12-S1")
    labelled = commands.add_parser("labelled")
    labelled.add_argument("--ct", type=Path, required=True)
    labelled.add_argument("--labels", type=Path, required=True)
    given = parser.parse_args(arguments)
    segmenter = load_segmenter(given.weights, given.device)
    if given.command == "phantoms":
        seeds = range(given.first_seed, given.first_seed + given.patients)
        scores = evaluate_phantoms(segmenter, seeds, coverage=given.coverage)
    else:
        volume = load_nifti(given.ct)
        scores = [score(given.ct.name, volume, load_label_map(given.labels, volume), segmenter)]
        print(_line(scores[0]))
    report = {"weights": segmenter.name, "sha256": segmenter.sha256, **summary(scores)}
    print(json.dumps(report))
    if given.json is not None:
        given.json.write_text(json.dumps({**report, "scores": [asdict(one) for one in scores]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
