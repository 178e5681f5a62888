"""Evaluation reports to order: one that passes the gate, and copies with single figures changed."""

from __future__ import annotations

import copy
from typing import Any

CANDIDATE, CHAMPION = "c" * 64, "0" * 64


def _agreement(mae: float, error: float = 0.001) -> dict[str, Any]:
    ends = [mae - 0.004, mae + 0.004]
    return {"n": 240, "r": 0.9, "mean_error": error, "mean_absolute_error": mae, "mean_absolute_error_ci_patient": ends}


def _group(patients: int) -> dict[str, Any]:
    return {"n_patients": patients, "bmd": _agreement(0.05), "tbs": _agreement(0.06)}


def passing(model: str = CANDIDATE, **changes: Any) -> dict[str, Any]:
    """As `osteogate evaluate` writes it, of people; `a__b=1` sets the figure b in a (None: not known)."""
    detected = {
        "n": 60, "n_positive": 24, "auc": 0.95,
        "defined": {
            "sensitivity": 0.9, "sensitivity_ci": [0.74, 0.97], "specificity": 0.9, "specificity_ci": [0.76, 0.96],
        },
    }  # fmt: skip
    report: dict[str, Any] = {
        "model": "site-1",
        "model_sha256": model,
        "synthetic_only": False,
        "cohort": {"provenance": "site", "seed": None, "sha256": "d" * 64, "folds": [9]},
        "n_patients_real": 60,
        "n_patients_synthetic": 0,
        "n_patients": 60,
        "n_vertebrae": 240,
        "per_vertebra": {"bmd": _agreement(0.05), "tbs": _agreement(0.06), "hu_bmd": {"r": 0.6}},
        "per_patient": {"osteopenia": detected, "osteoporosis": copy.deepcopy(detected)},
        "subgroups": {
            "vendor": {"canon": _group(45), "ge": _group(15)},
            "sex": {"F": _group(40), "M": _group(20)},
        },
        "calibration": {"bmd": {"slope": 1.02, "intercept": -0.02}},
        "intervals": {"level": 0.9, "patient_bmd_coverage": 0.9, "patient_tbs_coverage": 0.88},
    }
    for path, value in changes.items():
        *where, name = path.split("__")
        part = report
        for one in where:
            part = part[one]
        part[name] = value
    return report
