"""The phantom stands still while networks are judged on it: a fingerprint of everything that makes a digital patient.

`frozen.json` is the state on which the shipped network was trained (what came before it stands in
`models/REFERENCE.md`). A change to the phantom changes the fingerprint;
a test then fails until networks, comparators and tables have been made anew with the new one (`models/REFERENCE.md`).

The fingerprint covers the dials of densitometer and scanner and every drawn parameter of a few hundred patients, to
six significant digits (the last bits of an exponential differ between processors). The witnesses, a few patients'
DXA and attenuation, cover what happens between parameters and pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from models.attenuation import disc_attenuation
from models.phantom import densitometer, dxa, render, scanner
from models.phantom.anatomy import LABELS, LEVELS
from models.phantom.patient import draw

FROZEN = Path(__file__).parent / "frozen.json"
PATIENTS = 200
FIRST_SEED = 90_000_000  # of no cohort
WITNESSES = ({"vendor": "canon"}, {"vendor": "siemens", "sex": "M"}, {"vendor": "philips"}, {"vendor": "ge"})
WITNESS_GRID_MM = 1.5


@cache
def fingerprint() -> str:
    """SHA-256 of all dials and of the parameters of PATIENTS patients."""
    digest = hashlib.sha256(json.dumps(_plain(dials()), sort_keys=True).encode())
    for seed in range(FIRST_SEED, FIRST_SEED + PATIENTS):
        digest.update(json.dumps(_plain(draw(seed)), sort_keys=True).encode())
    return digest.hexdigest()


def dials() -> dict[str, Any]:
    """The settings of densitometer, scanner and tissue that no patient's parameters hold."""
    return {
        "densitometer": densitometer.PRODIGY,
        "kernels": scanner.KERNELS,
        "bias": scanner.BIAS,
        "size_loss": scanner.SIZE_LOSS,
        "hu_per_mg_cm3": render.HU_PER_MG_CM3,
        "marrow_hu": (render.WATERY_MARROW_HU, render.FATTY_MARROW_HU),
    }


def witnesses() -> list[dict[str, float]]:
    """BMD, simulated TBS and HU of L1-L4 of a few patients, rendered on a coarse grid without noise."""
    found = []
    for number, settings in enumerate(WITNESSES):
        patient = draw(FIRST_SEED + number, noise_hu=0, **settings)
        truth = dxa.measure(patient)
        rendered = render.render(patient, render.lumbar_grid(patient, WITNESS_GRID_MM, "L1", "L4"))
        hu = scanner.scan(rendered, patient, scanner.scanner_rng(patient)).astype(np.float32)
        one: dict[str, float] = {}
        for level in LEVELS:
            one[f"{level}_bmd_g_cm2"] = truth.levels[level].bmd_g_cm2
            one[f"{level}_tbs"] = truth.levels[level].tbs
            one[f"{level}_hu"] = disc_attenuation(hu, rendered.affine, rendered.labels, LABELS[level]).hu_mean
        found.append({name: round(value, 4) for name, value in one.items()})
    return found


def freeze(path: Path = FROZEN) -> None:
    """Write the present phantom's fingerprint and witnesses."""
    state = {"fingerprint": fingerprint(), "witnesses": witnesses()}
    path.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and floats as JSON with six significant digits."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain({one.name: getattr(value, one.name) for one in fields(value)})
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{float(value):.6g}")
    if isinstance(value, np.integer):
        return int(value)
    return value


if __name__ == "__main__":
    freeze()
