"""One digital patient on disk: the CT as DICOM, its exact labels, and the truth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from models.phantom import dicom, dxa
from models.phantom.anatomy import LABELS, LEVELS, Patient
from models.phantom.densitometer import PRODIGY, Densitometer
from models.phantom.grid import Grid
from models.phantom.patient import draw
from models.phantom.render import Rendered, native_grid, render
from models.phantom.scanner import scan, scanner_rng
from models.phantom.settings import Setting, dials_of
from models.phantom.young_adults import t_score

DICOM_FOLDER, LABEL_FILE, TRUTH_FILE = "dicom", "labels.nii.gz", "truth.json"


def make_study(seed: int, out: Path, settings: Mapping[str, str]) -> Path:
    """Write `out/dicom/*.dcm`, `out/labels.nii.gz` and `out/truth.json`; returns `out`."""
    patient = draw(seed, **settings)
    rendered = write_ct(patient, out, dials_of(settings).blur)
    save_labels(rendered.labels, rendered.grid, out / LABEL_FILE)
    save_truth(patient, rendered, out, settings)
    return out


def write_ct(patient: Patient, out: Path, blur: float = 1.0) -> Rendered:
    """Render, scan (`blur` times as wide as usual), and write `out/dicom/*.dcm`."""
    grid = native_grid(patient)
    dicom.dropped_slice(patient, grid.shape_kji[0])  # refuse before rendering
    rendered = render(patient, grid)
    dicom.write_series(patient, out / DICOM_FOLDER, scan(rendered, patient, scanner_rng(patient), blur), grid)
    return rendered


def save_truth(patient: Patient, rendered: Rendered, out: Path, settings: Mapping[str, Setting]) -> None:
    """Write `out/truth.json`."""
    dropped = dicom.dropped_slice(patient, rendered.grid.shape_kji[0])
    facts = truth(patient, rendered, dials_of(settings).densitometer) | {
        "settings": dict(settings),
        "dropped_slice": dropped,
    }
    draft = out / f"{TRUTH_FILE}.draft"
    draft.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    draft.replace(out / TRUTH_FILE)


def save_labels(labels: NDArray[np.uint8], grid: Grid, path: Path) -> None:
    """NIfTI in the CT's own grid: axes i, j, k, and the affine in RAS (LPS with x and y turned)."""
    nib.save(nib.Nifti1Image(labels.transpose(2, 1, 0), nifti_affine(grid)), path)


def nifti_affine(grid: Grid) -> NDArray[np.float64]:
    """4x4, maps (i, j, k, 1) to RAS mm."""
    to_kji = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
    return np.asarray(np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine @ to_kji, dtype=np.float64)


def truth(patient: Patient, rendered: Rendered, device: Densitometer = PRODIGY) -> dict[str, object]:
    """What is known about this patient, for `truth.json` (JSON types only)."""
    measured = dxa.measure(patient, device=device)
    who = dicom.identity(patient)
    present = {int(v) for v in np.unique(rendered.labels)} - {0}
    return {
        "synthetic": True,
        "seed": patient.seed,
        "patient_id": patient.patient_id,
        "study_uid": who.study_uid,
        "series_uid": who.series_uid,
        "sex": patient.sex,
        "age": patient.age,
        "bmi": round(patient.bmi, 2),
        "height_m": round(patient.height_m, 3),
        "acquisition": asdict(patient.acquisition),
        "bone": asdict(patient.bone),
        "patient": {
            "bmd_g_cm2": measured.bmd_g_cm2,
            "bmd_device_g_cm2": measured.bmd_device_g_cm2,
            "t_score": t_score(measured.bmd_g_cm2, patient.sex),
            "tbs": measured.tbs,
            "tbs_kind": "simulated",
        },
        "anatomy": {
            "lumbar_count": patient.lumbar_count,
            "ribs": patient.torso.ribs,
            "t13_ribs": patient.torso.lumbar_ribs,
        },
        "lesions": asdict(patient.lesions),
        "levels": {name: _level(patient, measured, rendered, name) for name in LEVELS},
        "labels": {name: value for name, value in LABELS.items() if value in present},
    }


def _level(patient: Patient, measured: dxa.Dxa, rendered: Rendered, name: str) -> dict[str, object]:
    v, fracture = patient.vertebra(name), patient.lesions.fracture(name)
    return asdict(measured.levels[name]) | {
        "t_score": t_score(measured.levels[name].bmd_g_cm2, patient.sex),
        "trabecular_mg_cm3": v.trabecular_mg_cm3 * patient.bone.scale,
        "center_lps_mm": list(v.frame.center),
        "heights_mm": {"anterior": v.height_anterior, "middle": v.height_middle, "posterior": v.height_posterior},
        "fracture": None if fracture is None else {"percent": fracture.percent, "kind": fracture.kind},
        "lesions": patient.lesions.at(name),
        "in_view": in_view(rendered, v.label),
    }


def in_view(rendered: Rendered, label: int) -> bool:
    """Whether a structure is seen and does not run out of the first or the last slice."""
    seen = (rendered.labels == label).any(axis=(1, 2))
    return bool(seen.any() and not seen[0] and not seen[-1])
