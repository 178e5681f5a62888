"""Digital patients whose outlines are judged with the truth at hand: good ones, strained ones and spoilt ones.

Each patient is scanned once, on its scanner's field at half the usual matrix (256 x 256, the networks see 2 and 6 mm),
and gives four outlines: our networks' on that CT, our networks' on the same CT spoilt (noise, blur, streaks, a shift of
HU), and two made of the truth: gently imperfect, and badly so (too tight, too wide, moved, a part missing).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from models.crop import Vertebra, VertebraError, locate
from models.phantom.cohort import imperfect_labels
from models.phantom.patient import Patient, draw
from models.phantom.render import Rendered, native_grid, render
from models.phantom.scanner import scan, scanner_rng
from models.phantom.settings import Setting
from service.domain.result import LEVELS
from worker.anatomy import measure_shapes
from worker.segmentation import Segmentation, Segmenter
from worker.segmentation.base import LEVEL_IDS, LabelArray
from worker.segmentation.quality import Traits, traits
from worker.volume import Volume

MATRIX = 256
STRAINS = ("noise", "blur", "streaks", "shift")
SPOILS = ("tight", "wide", "moved", "part")
AILMENTS: tuple[dict[str, Setting], ...] = (
    {}, {"fracture": "L2:35"}, {}, {"cobb_deg": 25.0}, {}, {"sclerosis": "L3"}, {"contrast_phase": "portal"},
    {"slice_mm": 5}, {}, {"fracture": "L3:45:crush"}, {"contrast_phase": "arterial"}, {"metal": "L4"},
)  # fmt: skip
FloatImage = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One outlined level: what it shows, and how good it is."""

    seed: int
    source: str  # "network", "strained" (network on a spoilt CT), "imperfect", "spoilt"
    how: str  # by what it was strained or spoilt
    level: str
    traits: Traits
    dice: float  # against the vertebra of the truth that it overlaps most: its name is the level checks' business
    weights_sha256: str | None  # None: made of the truth


def cases_of(seed: int, segmenter: Segmenter) -> Iterator[Case]:
    """Every outlined level of one patient."""
    rng = np.random.default_rng([seed, 77])
    patient = draw(seed, **{"slice_mm": float(rng.choice((1.5, 3.0, 3.0))), **AILMENTS[seed % len(AILMENTS)]})
    rendered = render(patient, _grid(patient))
    hu = scan(rendered, patient, scanner_rng(patient)).astype(np.float32)
    volume = Volume(hu, rendered.affine)
    yield from _levels(seed, "network", "", volume, segmenter.segment(volume), rendered.labels)
    strain = STRAINS[int(rng.integers(len(STRAINS)))]
    strained = Volume(_strained(hu, volume, strain, rng), rendered.affine)
    yield from _levels(seed, "strained", strain, strained, segmenter.segment(strained), rendered.labels)
    gently = Segmentation(imperfect_labels(rendered, rng), "made", "")
    yield from _levels(seed, "imperfect", "", volume, gently, rendered.labels)
    spoil = SPOILS[int(rng.integers(len(SPOILS)))]
    badly = Segmentation(_spoilt(rendered, spoil, rng), "made", "")
    yield from _levels(seed, "spoilt", spoil, volume, badly, rendered.labels)


def _grid(patient: Patient) -> Any:
    """The CT's own field and slices, at half the matrix."""
    grid = native_grid(patient)
    slices, rows, columns = grid.shape_kji
    step = grid.spacing_kji_mm
    halved = (step[0], step[1] * rows / MATRIX, step[2] * columns / MATRIX)
    return replace(grid, shape_kji=(slices, MATRIX, MATRIX), spacing_kji_mm=halved)


def _strained(hu: FloatImage, volume: Volume, how: str, rng: np.random.Generator) -> FloatImage:
    """The CT as a network would rather not see it."""
    if how == "noise":
        return hu + rng.normal(0.0, rng.uniform(40, 160), hu.shape).astype(np.float32)
    if how == "blur":
        return np.asarray(ndimage.gaussian_filter(hu, rng.uniform(1.0, 3.5) / np.array(volume.spacing_mm)))
    if how == "streaks":
        rows = ndimage.gaussian_filter1d(rng.standard_normal((hu.shape[0], 1, hu.shape[2])), 1.5, axis=2)
        return np.asarray(hu + rng.uniform(60, 300) * rows / rows.std(), dtype=np.float32)
    return np.asarray(hu * rng.uniform(0.6, 1.3) + rng.uniform(-80, 150), dtype=np.float32)


def _spoilt(rendered: Rendered, how: str, rng: np.random.Generator) -> LabelArray:
    """The true labels of T12 to the sacrum, made bad by a random measure."""
    spacing, amount = np.array(rendered.grid.spacing_kji_mm), rng.uniform(0.3, 1.0)
    true = rendered.labels
    if how == "moved":
        way = rng.normal(size=3)
        steps = np.round(9.0 * amount * way / np.linalg.norm(way) / spacing).astype(int)
        return np.asarray(ndimage.shift(true, steps, order=0))
    if how == "part":
        spoilt = true.copy()
        for label in LEVEL_IDS.values():
            places = np.argwhere(true == label)
            axis = int(rng.integers(3))
            gone = places[:, axis] > np.quantile(places[:, axis], 1 - 0.45 * amount)
            spoilt[tuple(places[gone].T)] = 0
        return spoilt
    if how == "tight":
        inside = ndimage.distance_transform_edt(true > 0, sampling=spacing)
        return np.where(inside > 3.5 * amount, true, 0).astype(np.uint8)
    far, nearest = ndimage.distance_transform_edt(true == 0, sampling=spacing, return_indices=True)
    return np.where(far <= 6.0 * amount, true[tuple(nearest)], 0).astype(np.uint8)


def _levels(seed: int, source: str, how: str, volume: Volume, found: Segmentation, truth: LabelArray) -> Iterator[Case]:
    shapes = measure_shapes(found.labels, volume)
    whole = {label: shape.volume_ml for label, shape in shapes.items() if not shape.cut}
    for level in LEVELS:
        label = LEVEL_IDS[level]
        vertebra = _located(found.labels, volume, label) if label in whole else None
        if vertebra is None:
            continue
        names = np.bincount(truth[found.labels == label], minlength=256)
        names[0] = 0
        overlap = None if found.overlaps is None else found.overlaps.get(label)
        best = int(names.argmax())
        dice = 2.0 * int(names[best]) / (int((truth == best).sum()) + int((found.labels == label).sum()))
        yield Case(
            seed=seed,
            source=source,
            how=how,
            level=level,
            traits=traits(volume, found.labels, vertebra, whole, overlap),
            dice=round(dice if names.any() else 0.0, 4),
            weights_sha256=found.sha256 or None,
        )


def _located(labels: LabelArray, volume: Volume, label: int) -> Vertebra | None:
    try:
        return locate(labels, volume.affine, label)
    except VertebraError:
        return None


def collect(path: Path, seeds: Sequence[int], segmenter: Segmenter) -> list[Case]:
    """The cases of these patients; those that `path` holds already are read, each new patient's are added to it.

    A patient whose lines were cut short, or whose CT other weights outlined, is done again.
    """
    known = read(path) if path.is_file() else []
    with path.open("a", encoding="utf-8") as out:
        out.write("\n")  # a line that was cut short ends here
        for seed in seeds:
            if _done(known, seed, segmenter.sha256):
                continue
            found = list(cases_of(seed, segmenter))
            out.write("".join(json.dumps(asdict(case)) + "\n" for case in found))
            out.flush()
            known += found
            print(f"seed {seed}: {len(found)} levels", flush=True)
    ours = [case for case in known if case.seed in seeds and case.weights_sha256 in (None, segmenter.sha256)]
    return list({(case.seed, case.source, case.level): case for case in ours}.values())


def _done(known: Sequence[Case], seed: int, weights_sha256: str) -> bool:
    """Whether a patient's last lines are there, and lines by these weights."""
    of_this = [case for case in known if case.seed == seed]
    by_these = any(case.weights_sha256 == weights_sha256 for case in of_this)
    return by_these and any(case.source == "spoilt" for case in of_this)


def read(path: Path) -> list[Case]:
    """The cases of a file; a last line that was cut short is a patient not yet done."""
    cases = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            stored: Mapping[str, Any] = json.loads(line)
        except ValueError:
            continue
        cases.append(Case(**{**stored, "traits": Traits(**stored["traits"])}))
    return cases
