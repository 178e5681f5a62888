"""`phantom cohort`: many digital patients as slabs with their truth, without writing a single DICOM file.

Only the box around L1-L4 is rendered, on the very voxels that a CT of the patient would have; the same scanner, the
same crop and the same attenuation as on a real CT make the slabs. The truth is the projection of the same mineral.

    cohort.csv          a row per vertebra: who, level, truth, HU, and where its slabs lie
    parameters.csv      a row per vertebra: what the phantom was built from, as far as the slabs show it (for an
                        oracle); columns that begin with `beside_` leave no trace in the middle one
    cohort.json         seed, settings, provenance "digital"
    slabs/OSG-*.npz     `hu` int16 [4 levels, mask variants, 9 slabs, 128, 128]: the middle 150 mm of each slab

Mask variant 0 is cut with the true labels. The others are cut with labels as automatic segmentation would give them
(blurred, rough, a little too tight or too wide), so that a network trained on them does not depend on perfect
masks. Patients go to ten folds in turn; `enriched_share` gives that share of the folds an even spread of BMD, which
a natural cohort lacks at both ends. Only training should use those folds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from scipy import ndimage

from models.attenuation import disc_attenuation
from models.crop import SIZE_PX, SLABS, Floats, Vector, locate, sagittal_slabs
from models.phantom import dxa
from models.phantom.anatomy import LABELS, LEVELS, Patient
from models.phantom.dials import FROZEN, Dials
from models.phantom.freeze import fingerprint
from models.phantom.grid import Grid
from models.phantom.patient import draw
from models.phantom.render import Rendered, render
from models.phantom.scanner import BIAS, scan, scanner_rng
from models.phantom.settings import Setting, dials_of
from models.phantom.side_by_side import side_by_side
from models.phantom.spine import spine_bounds
from models.soft_tissue import fat_over_spine_cm

FOLDS = 10
FIELD_PX = 128  # kept of the 256: all that a vertebra can fill
SLICES_MM = (1.0, 2.0, 2.5, 3.0)  # drawn where slice_mm is not set
MARGIN_MM = 6.0
FAT_GRID_MM, FAT_HALF_WIDTH_MM, FAT_MARGIN_MM = (3.0, 2.0, 2.0), 90.0, 14.0
ENRICHED_BMD = (0.55, 1.45)  # g/cm2
SEED_STEP = 10_000  # patient seeds of cohort s: s * 10,000 onwards, so that cohorts share no patient
COLUMNS = (
    "patient_id", "seed", "fold", "enriched", "level", "sex", "age", "bmi", "vendor", "kernel", "slice_mm",
    "interval_days", "bmd_g_cm2", "tbs", "hu", "fat_over_spine_cm", "slabs", "index",
)  # fmt: skip
SHAPE = (
    "trabecular_mg_cm3", "cortex", "endplate", "posterior_cortex", "depth", "height_anterior", "height_posterior",
    "waist", "posterior_hollow", "endplate_hollow", "lipping", "canal_depth", "spinous_length", "spinous_height",
    "spinous_drop",
)  # fmt: skip
# of the whole vertebra: what lies beside the midsagittal slab, of which that slab shows nothing
BESIDE = "beside_"
LATERAL = ("lateral_cortex", "facet_size", "pedicle_width", "pedicle_height", "canal_width", "width")

PARAMETERS = (
    "patient_id", "level", *SHAPE, *(f"{BESIDE}{name}" for name in LATERAL),
    "mineral_scale", "cortical_mg_cm3", "marrow_fat", "grain_amplitude",
    "grain_scale_mm", "coarse_amplitude",
)  # fmt: skip

Labels = npt.NDArray[np.uint8]
Row = dict[str, object]


@dataclass(frozen=True)
class PatientSlabs:
    """One digital patient as training sees it."""

    slabs: npt.NDArray[np.int16]  # [4, variants, 9, 128, 128] HU
    hu: tuple[float, ...]  # per level, by the attenuation disc
    fat_over_spine_cm: tuple[float, ...]  # per level
    truth: dxa.Dxa


@dataclass(frozen=True)
class Member:
    """Who is to be made, and where it goes."""

    seed: int
    fold: int
    enriched: bool
    variants: int
    settings: tuple[tuple[str, Setting], ...]
    out: Path


def make_cohort(
    seed: int,
    patients: int,
    out: Path,
    settings: Mapping[str, Setting] | None = None,
    *,
    variants: int = 2,
    enriched_share: float = 0.0,
    processes: int | None = None,
    console: Console | None = None,
) -> Path:
    """Write a cohort into `out`; every patient is a function of `seed`, its number and the settings.

    Patients are rendered side by side in `processes` processes (by default one for each core).
    """
    if variants < 1:
        raise ValueError("a cohort needs at least one cut of every vertebra")
    if patients < 1 or patients > SEED_STEP:
        raise ValueError(f"a cohort has 1 to {SEED_STEP} patients, not {patients}")
    given = dict(settings or {})
    (out / "slabs").mkdir(parents=True, exist_ok=True)
    members = [
        Member(
            seed=seed * SEED_STEP + number,
            fold=number % FOLDS,
            enriched=number % FOLDS < round(FOLDS * enriched_share) and "bmd_g_cm2" not in given,
            variants=variants,
            settings=tuple(given.items()),
            out=out,
        )
        for number in range(patients)
    ]
    facts = {
        "provenance": "digital",
        "seed": seed,
        "patients": patients,
        "phantom_sha256": fingerprint(),
        "settings": given,
        "variants": variants,
        "enriched_share": enriched_share,
        "tbs_kind": "simulated",
    }
    (out / "cohort.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    made = side_by_side(make_member, members, processes)
    told = track(made, "rendering", len(members), console=console or Console(stderr=True))
    with (
        (out / "cohort.csv").open("w", newline="", encoding="utf-8") as table,
        (out / "parameters.csv").open("w", newline="", encoding="utf-8") as shapes,
    ):
        _write(told, csv.DictWriter(table, COLUMNS), csv.DictWriter(shapes, PARAMETERS))
    return out


def _write(
    made: Iterable[tuple[list[Row], list[Row]]], table: csv.DictWriter[str], shapes: csv.DictWriter[str]
) -> None:
    """Patient by patient: where a long run is stopped, what is there can be looked at, and is no cohort to train on."""
    table.writeheader()
    shapes.writeheader()
    for rows, parameters in made:
        table.writerows(rows)
        shapes.writerows(parameters)


def make_member(member: Member) -> tuple[list[Row], list[Row]]:
    """Draw, render and store one patient; its rows of cohort.csv and of parameters.csv."""
    patient = draw_member(member.seed, dict(member.settings), enriched=member.enriched)
    made = patient_slabs(patient, member.variants, dials_of(dict(member.settings)))
    name = f"slabs/{patient.patient_id}.npz"
    np.savez_compressed(member.out / name, hu=made.slabs)
    rows = [_row(patient, made, level, member, name) for level in range(len(LEVELS))]
    return rows, [_parameters(patient, level) for level in LEVELS]


def draw_member(seed: int, settings: Mapping[str, Setting], *, enriched: bool) -> Patient:
    """A patient with its slice thickness (and, where enriched, its BMD) drawn as well."""
    rng = np.random.default_rng([seed, 3])
    own: dict[str, Setting] = {"slice_mm": float(rng.choice(SLICES_MM))}
    if enriched:
        own["bmd_g_cm2"] = float(rng.uniform(*ENRICHED_BMD))
    return draw(seed, **(own | dict(settings)))


def patient_slabs(patient: Patient, variants: int, dials: Dials = FROZEN) -> PatientSlabs:
    """Render, scan, and cut L1-L4 with true and with imperfect labels; and the patient's DXA."""
    rendered = render(patient, lumbar_box(patient))
    hu = scan(rendered, patient, scanner_rng(patient), dials.blur).astype(np.float32)
    rng = np.random.default_rng([patient.seed, 4])
    maps = [rendered.labels]
    maps += [imperfect_labels(rendered, rng) for _ in range(variants - 1)]
    slabs = [[_field(hu, rendered.affine, labels, LABELS[level]) for labels in maps] for level in LEVELS]
    attenuation = (disc_attenuation(hu, rendered.affine, rendered.labels, LABELS[level]).hu_mean for level in LEVELS)
    truth = dxa.measure(patient, device=dials.densitometer)
    return PatientSlabs(np.array(slabs), tuple(attenuation), fat_of(patient), truth)


def fat_of(patient: Patient) -> tuple[float, ...]:
    """What the CT shows of the fat over L1 to L4, cm: read off the whole trunk, without noise and on a coarser grid."""
    middles = [np.array(patient.vertebra(level).frame.center) for level in LEVELS]
    (x, y, _), deep = patient.torso.center, patient.torso.half_depth + FAT_MARGIN_MM
    low, high = min(middle[2] for middle in middles), max(middle[2] for middle in middles)
    box = Grid.covering(
        (x - FAT_HALF_WIDTH_MM, y - deep, low - FAT_MARGIN_MM), (x + FAT_HALF_WIDTH_MM, y + deep, high + FAT_MARGIN_MM),
        FAT_GRID_MM,
    )  # fmt: skip
    rendered = render(patient, box)
    hu = rendered.hu_noise_free + np.float32(BIAS[patient.acquisition.vendor].offset_hu)
    return tuple(fat_over_spine_cm(hu, rendered.affine, middle) for middle in middles)


def lumbar_box(patient: Patient) -> Grid:
    """The CT's own voxels, only around L1-L4."""
    low, high = spine_bounds(patient, "L1", "L4")
    pixel = patient.acquisition.fov_mm / 512
    return Grid.covering(
        (low[0] - MARGIN_MM, low[1] - MARGIN_MM, low[2] - MARGIN_MM),
        (high[0] + MARGIN_MM, high[1] + MARGIN_MM, high[2] + MARGIN_MM),
        (patient.acquisition.slice_mm, pixel, pixel),
    )


def imperfect_labels(rendered: Rendered, rng: np.random.Generator) -> Labels:
    """Labels whose surface is blurred as by a 1.5 mm network, rough, and moved in or out by up to half a mm."""
    spacing = np.array(rendered.grid.spacing_kji_mm)
    labels = np.zeros_like(rendered.labels)
    boxes = ndimage.find_objects(rendered.labels)
    for label in (LABELS[level] for level in ("L5", *LEVELS[::-1], "T12")):
        if label > len(boxes) or boxes[label - 1] is None:
            continue
        box = tuple(
            slice(max(0, side.start - grow), side.stop + grow)
            for side, grow in zip(boxes[label - 1], np.ceil(4.0 / spacing).astype(int), strict=True)
        )
        density = ndimage.gaussian_filter((rendered.labels[box] == label).astype(np.float32), 1.0 / spacing)
        rough = ndimage.gaussian_filter(
            rng.standard_normal(density.shape, dtype=np.float32), 3.0 / spacing, truncate=2.0
        )
        level = 0.5 + rng.uniform(-0.18, 0.18) + 0.10 * rough / max(float(rough.std()), 1e-6)
        labels[box][density > level] = label
    return labels


def _field(hu: Floats, affine: Vector, labels: Labels, label_id: int) -> npt.NDArray[np.int16]:
    """The middle of each slab [9, 128, 128] HU."""
    slabs = sagittal_slabs(hu, affine, labels, label_id, n=SLABS, vertebra=locate(labels, affine, label_id))
    edge = (SIZE_PX - FIELD_PX) // 2
    field = slabs.hu[:, edge : edge + FIELD_PX, edge : edge + FIELD_PX]
    return np.rint(field).astype(np.int16)


def _row(patient: Patient, made: PatientSlabs, level: int, member: Member, name: str) -> Row:
    truth = made.truth.levels[LEVELS[level]]
    return {
        "patient_id": patient.patient_id,
        "seed": patient.seed,
        "fold": member.fold,
        "enriched": int(member.enriched),
        "level": LEVELS[level],
        "sex": patient.sex,
        "age": patient.age,
        "bmi": round(patient.bmi, 2),
        "vendor": patient.acquisition.vendor,
        "kernel": patient.acquisition.kernel,
        "slice_mm": patient.acquisition.slice_mm,
        "interval_days": patient.interval.days,
        "bmd_g_cm2": round(truth.bmd_g_cm2, 5),
        "tbs": round(truth.tbs, 5),
        "hu": round(made.hu[level], 2),
        "fat_over_spine_cm": round(made.fat_over_spine_cm[level], 3),
        "slabs": name,
        "index": level,
    }


def _parameters(patient: Patient, level: str) -> Row:
    """The vertebra's true parameters that leave a trace in its slabs, in the phantom's own units."""
    v, bone = patient.vertebra(level), patient.bone
    texture = bone.texture
    return {
        "patient_id": patient.patient_id,
        "level": level,
        **{name: round(float(getattr(v, name)), 4) for name in SHAPE},
        **{f"{BESIDE}{name}": round(float(getattr(v, name)), 4) for name in LATERAL},
        "mineral_scale": round(bone.scale, 4),
        "cortical_mg_cm3": round(bone.cortical_mg_cm3, 2),
        "marrow_fat": round(bone.marrow_fat, 4),
        "grain_amplitude": round(texture.amplitude, 4),
        "grain_scale_mm": round(texture.scale_mm, 4),
        "coarse_amplitude": round(texture.coarse_amplitude, 4),
    }
