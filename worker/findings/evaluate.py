"""How often the findings are right, measured on digital patients whose ailments are known.

    python -m worker.findings.evaluate measure --patients 40 --first-seed 700000 --slice-mm 3 --out cases-3mm.jsonl
    python -m worker.findings.evaluate table cases-3mm.jsonl cases-1mm.jsonl

`measure` draws patients in turn without ailment, with a fracture, scoliosis, screws, cement, sclerotic endplates; half
of them got contrast medium. Only the box around the lumbar spine is rendered, on the very voxels that a CT would have.
The worker's own code (`worker.anatomy.assess`) looks at each three times: with the true labels, with imperfect ones
(blurred, rough, a little too tight or too wide), and with the outlines of the built-in networks (`--weights DIR`: of
others). `--ailment fracture` leaves out all other patients. One line of JSON a case, so that a run that was stopped is
a smaller run. `table` counts: sensitivity and specificity with Wilson's 95 % intervals.

Thresholds were chosen on seeds from 610000 on; figures are reported on seeds from 700000 on.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from statsmodels.stats.proportion import proportion_confint

from models.phantom.anatomy import LEVELS, Patient
from models.phantom.cohort import imperfect_labels
from models.phantom.grid import Grid
from models.phantom.patient import draw
from models.phantom.render import render
from models.phantom.scanner import scan, scanner_rng
from models.phantom.settings import Setting
from models.phantom.spine import spine_bounds
from service.domain.reasons import Code
from service.domain.result import Anatomy
from worker.anatomy import MEASURED, NAMES, assess, measure_shapes
from worker.findings.fractures import GRADES
from worker.segmentation import Segmentation, Segmenter, load_segmenter
from worker.volume import Volume

AILMENTS = ("none", "fracture", "scoliosis", "metal", "fracture", "cement", "fracture", "sclerosis")
KINDS = ("wedge", "biconcave", "crush")
PHASES = ("native", "arterial", "native", "portal")
FRACTURE_PERCENT, COBB_DEG = (10, 65), (10.0, 60.0)
BESIDE_MM, AHEAD_MM, MARGIN_MM = 55.0, 50.0, 8.0  # of the rendered box: kidneys and vessels are in it


@dataclass(frozen=True)
class LevelCase:
    """One vertebra: what ails it, and what was found."""

    level: str
    ailments: tuple[str, ...]
    fracture_percent: float
    fracture_kind: str
    beside_metal: bool  # a neighbour carries screws
    excluded: tuple[str, ...]  # codes
    height_noted: bool


@dataclass(frozen=True)
class Case:
    """One CT seen with one kind of labels."""

    seed: int
    slice_mm: float
    labels: str  # "true", "imperfect" or "network"
    ailment: str
    phase: str
    found_phase: str | None
    cobb_deg: float
    found_cobb_deg: float | None
    refusals: tuple[str, ...]
    levels: tuple[LevelCase, ...]


def settings_of(seed: int) -> tuple[str, dict[str, Setting]]:
    """Which ailment a patient has, and the phantom's settings for it: a function of the seed alone."""
    rng = np.random.default_rng([seed, 55])
    ailment = AILMENTS[seed % len(AILMENTS)]
    given: dict[str, Setting] = {"contrast_phase": PHASES[int(rng.integers(len(PHASES)))]}
    level = LEVELS[int(rng.integers(len(LEVELS)))]
    if ailment == "fracture":
        percent, kind = rng.uniform(*FRACTURE_PERCENT), KINDS[int(rng.integers(len(KINDS)))]
        given["fracture"] = f"{level}:{percent:.0f}:{kind}"
    elif ailment == "scoliosis":
        given["cobb_deg"] = float(rng.choice((-1, 1)) * rng.uniform(*COBB_DEG))
    elif ailment != "none":
        given[ailment] = level
    return ailment, given


def seeds_with(ailment: str | None, first: int) -> Iterator[int]:
    """The patients from this one on that have the ailment; None: whatever they have."""
    return (seed for seed in itertools.count(first) if ailment in (None, settings_of(seed)[0]))


def measure(seed: int, slice_mm: float, segmenter: Segmenter) -> Iterator[Case]:
    """Render one patient and look at it with true labels, with imperfect ones, and with the networks' outlines."""
    ailment, given = settings_of(seed)
    patient = draw(seed, slice_mm=slice_mm, **given)
    rendered = render(patient, lumbar_box(patient))
    volume = Volume(scan(rendered, patient, scanner_rng(patient)).astype(np.float32), rendered.affine)
    true = Segmentation(rendered.labels, "true", "0" * 64)
    few = Segmentation(imperfect_labels(rendered, np.random.default_rng([seed, 4])), "imperfect", "0" * 64)
    yield judged(patient, volume, true, ailment, wholly_seen(volume, true))
    yield judged(patient, volume, few, ailment, wholly_seen(volume, few))  # these hold T12 to L5 and no others
    found = replace(segmenter.segment(volume), segmenter="network")
    yield judged(patient, volume, found, ailment, wholly_seen(volume, true))


def judged(patient: Patient, volume: Volume, segmentation: Segmentation, ailment: str, seen: Sequence[str]) -> Case:
    """The worker's findings beside the truth; `seen`: the vertebrae between which there may be an angle."""
    anatomy = assess(volume, segmentation)
    return Case(
        seed=patient.seed,
        slice_mm=patient.acquisition.slice_mm,
        labels=segmentation.segmenter,
        ailment=ailment,
        phase=patient.acquisition.contrast_phase,
        found_phase=anatomy.contrast,
        cobb_deg=round(true_cobb_deg(patient, seen), 2),
        found_cobb_deg=anatomy.cobb_deg,
        refusals=tuple(reason.code.value for reason in anatomy.refusals),
        levels=tuple(_level(patient, anatomy, name) for name in LEVELS),
    )


def wholly_seen(volume: Volume, segmentation: Segmentation) -> tuple[str, ...]:
    """The vertebrae whose bodies the CT holds, by these labels."""
    shapes = measure_shapes(segmentation.labels, volume)
    return tuple(NAMES[label] for label, shape in shapes.items() if label in MEASURED and not shape.cut)


def true_cobb_deg(patient: Patient, seen: Sequence[str]) -> float:
    """The largest angle between two of these bodies in the coronal plane: a phantom's endplates are parallel."""
    ups = [vertebra.frame.matrix[:, 2] for vertebra in patient.vertebrae if vertebra.name in seen]
    tilts = [float(np.degrees(np.arctan2(up[0], up[2]))) for up in ups]
    return max(tilts) - min(tilts)


def lumbar_box(patient: Patient) -> Grid:
    """The CT's own voxels around T12 to S1, with room for vessels and kidneys."""
    low, high = spine_bounds(patient, "T12", "S1")
    pixel = patient.acquisition.fov_mm / 512
    return Grid.covering(
        (low[0] - BESIDE_MM, low[1] - AHEAD_MM, low[2] - MARGIN_MM),
        (high[0] + BESIDE_MM, high[1] + 4.0, high[2] + MARGIN_MM),
        (patient.acquisition.slice_mm, pixel, pixel),
    )


def _level(patient: Patient, anatomy: Anatomy, name: str) -> LevelCase:
    fracture = patient.lesions.fracture(name)
    screws = [LEVELS.index(one.level) for one in patient.lesions.hardware if one.level in LEVELS]
    return LevelCase(
        level=name,
        ailments=tuple(patient.lesions.at(name)),
        fracture_percent=0.0 if fracture is None else fracture.percent,
        fracture_kind="" if fracture is None else fracture.kind,
        beside_metal=any(abs(LEVELS.index(name) - other) == 1 for other in screws),
        excluded=tuple(reason.code.value for reason in anatomy.levels[name].exclusions),
        height_noted=any(note.startswith(f"{name}: ") and "less height" in note for note in anatomy.notes),
    )


# ------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Row:
    """One line of the table: counts of what should be found and was, and of what should not and was."""

    finding: str
    slice_mm: float
    labels: str
    positives: int
    found: int
    negatives: int
    false: int

    @property
    def text(self) -> str:
        """As Markdown."""
        sensitivity, specificity = share(self.found, self.positives), share(self.negatives - self.false, self.negatives)
        counts = f"{self.found}/{self.positives} | {sensitivity} | {self.negatives - self.false}/{self.negatives}"
        return f"| {self.finding} | {self.slice_mm:g} | {self.labels} | {counts} | {specificity} |"


def share(count: int, total: int) -> str:
    """A share with Wilson's 95 % interval, in per cent."""
    if not total:
        return "-"
    low, high = proportion_confint(count, total, alpha=0.05, method="wilson")
    return f"{100 * count / total:.1f} ({100 * low:.1f}-{100 * high:.1f})"


Judge = Callable[[LevelCase], "bool | None"]  # None: counts neither way


def _fracture_from(low: float, high: float) -> Judge:
    def ill(one: LevelCase) -> bool | None:
        if "fracture" not in one.ailments:
            return False
        return True if low <= one.fracture_percent < high else None

    return ill


def _metal(one: LevelCase) -> bool | None:
    return None if one.beside_metal and "metal" not in one.ailments else "metal" in one.ailments


def _with(code: Code) -> Callable[[LevelCase], bool]:
    return lambda one: code.value in one.excluded


def _noted(one: LevelCase) -> bool:
    return one.height_noted or Code.FRACTURE.value in one.excluded


LEVEL_ROWS: tuple[tuple[str, Judge, Callable[[LevelCase], bool]], ...] = (
    ("fracture, grade 2-3: excluded", _fracture_from(100 * GRADES[1], 101), _with(Code.FRACTURE)),
    ("fracture, grade 2-3: excluded or noted", _fracture_from(100 * GRADES[1], 101), _noted),
    ("fracture, grade 2 (25-40 %): excluded", _fracture_from(100 * GRADES[1], 100 * GRADES[2]), _with(Code.FRACTURE)),
    ("fracture, grade 3 (40 % and more): excluded", _fracture_from(100 * GRADES[2], 101), _with(Code.FRACTURE)),
    ("metal", _metal, _with(Code.METAL)),
    ("metal at a neighbour", lambda one: one.beside_metal or None, _with(Code.METAL)),
    ("cement", lambda one: "cement" in one.ailments, _with(Code.CEMENT)),
    ("sclerosis", lambda one: "sclerosis" in one.ailments, _with(Code.SCLEROSIS)),
    ("any exclusion, of a level without ailment", lambda one: None if one.ailments or one.beside_metal else False,
     lambda one: bool(one.excluded)),
)  # fmt: skip


def rows(cases: Sequence[Case]) -> list[Row]:
    """Every line of the table for every slice thickness and kind of labels that occurs."""
    found = []
    for slice_mm, labels in sorted({(case.slice_mm, case.labels) for case in cases}, reverse=True):
        some = [case for case in cases if (case.slice_mm, case.labels) == (slice_mm, labels)]
        levels = [level for case in some for level in case.levels]
        for finding, ill, seen in LEVEL_ROWS:
            found.append(_row(finding, slice_mm, labels, [(ill(one), seen(one)) for one in levels]))
        contrast = [(case.phase != "native", case.found_phase not in (None, "native")) for case in some]
        severe = [(case.cobb_deg >= 40, Code.SCOLIOSIS.value in case.refusals) for case in some]
        found.append(_row("contrast medium (CTs)", slice_mm, labels, contrast))
        found.append(_row("scoliosis of 40 degrees and more (CTs)", slice_mm, labels, severe))
    return found


def _row(finding: str, slice_mm: float, labels: str, pairs: Iterable[tuple[bool | None, bool]]) -> Row:
    judged = [(ill, seen) for ill, seen in pairs if ill is not None]
    return Row(
        finding,
        slice_mm,
        labels,
        positives=sum(bool(ill) for ill, _ in judged),
        found=sum(seen for ill, seen in judged if ill),
        negatives=sum(not ill for ill, _ in judged),
        false=sum(seen for ill, seen in judged if not ill),
    )


def cobb_text(cases: Sequence[Case]) -> list[str]:
    """Error of the Cobb angle against the phantom's truth, as Markdown rows."""
    lines = []
    for slice_mm, labels in sorted({(case.slice_mm, case.labels) for case in cases}, reverse=True):
        some = [case for case in cases if (case.slice_mm, case.labels) == (slice_mm, labels)]
        errors = np.array([c.found_cobb_deg - c.cobb_deg for c in some if c.found_cobb_deg is not None])
        if errors.size:
            within = share(int((np.abs(errors) <= 4).sum()), len(some))
            spread = f"{errors.mean():+.1f} | {errors.std():.1f} | {np.abs(errors).max():.1f}"
            lines.append(f"| {slice_mm:g} | {labels} | {len(some)} | {spread} | {within} |")
    return lines


def table(cases: Sequence[Case]) -> str:
    """Everything as Markdown."""
    head = [
        "| finding | slice, mm | labels | found | sensitivity, % | left alone | specificity, % |",
        "|---|---|---|---|---|---|---|",
    ]
    curve = [
        "| slice, mm | labels | CTs | Cobb: mean error, deg | SD | largest | within 4 deg, % |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(row.text for row in rows(cases)), "", *curve, *cobb_text(cases)])


def read(paths: Iterable[Path]) -> list[Case]:
    """The cases that `measure` wrote."""
    stored = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [_case(one) for one in stored]


def _case(stored: dict[str, Any]) -> Case:
    levels = tuple(
        LevelCase(**{**one, "ailments": tuple(one["ailments"]), "excluded": tuple(one["excluded"])})
        for one in stored["levels"]
    )
    return Case(**{**stored, "refusals": tuple(stored["refusals"]), "levels": levels})


def main(arguments: Sequence[str] | None = None) -> None:
    """The two commands of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m worker.findings.evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--patients", type=int, default=40)
    measuring.add_argument("--first-seed", type=int, default=700_000)
    measuring.add_argument("--ailment", choices=sorted(set(AILMENTS)), help="only patients with this; default: all")
    measuring.add_argument("--slice-mm", type=float, default=3.0)
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--weights", type=Path, help="a weights folder; without it the built-in one")
    measuring.add_argument("--device", default="cpu")
    counting = commands.add_parser("table")
    counting.add_argument("cases", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    if given.command == "table":
        print(table(read(given.cases)))
        return
    segmenter = load_segmenter(given.weights, given.device)
    with given.out.open("w", encoding="utf-8") as out:
        for seed in itertools.islice(seeds_with(given.ailment, given.first_seed), given.patients):
            for case in measure(seed, given.slice_mm, segmenter):
                out.write(json.dumps(asdict(case)) + "\n")
                out.flush()
            print(f"seed {seed}", flush=True)


if __name__ == "__main__":
    main()
