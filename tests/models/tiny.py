"""A cohort of small hand-made slabs whose brightness is their BMD: enough to see a network learn."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from models.inputs import InputConfig
from models.training import TrainingConfig

SIZE_PX = 48
INPUT = InputConfig(rows=32, columns=32, posterior_shift_px=0, slabs=3)


def tiny_config(**changes: object) -> TrainingConfig:
    """A run of a second or two."""
    values = {
        "architecture": "resnet18",
        "epochs": 3,
        "ema_decay": 0.0,
        "batch": 8,
        "precision": "fp32",
        "keep": "best",
        "validation_folds": [8],
        "calibration_folds": [9],
        "input": INPUT.to_dict(),
    }
    return TrainingConfig.from_dict(values | changes)


def tiny_cohort(
    folder: Path, patients: int = 10, brighter_hu: float = 0.0, gains: Mapping[str, float] | None = None
) -> Path:
    """`patients` of four vertebrae each, in the layout that `phantom cohort` writes.

    `gains` are those of the scanners, by model, which take the patients in turn; without them no scanner is told.
    """
    draw = np.random.default_rng(5)
    (folder / "slabs").mkdir(parents=True)
    rows = []
    for number in range(patients):
        bmd = draw.uniform(0.6, 1.4, size=4)
        hu = np.full((4, 2, 3, SIZE_PX, SIZE_PX), -1024, dtype=np.int16)
        scanner, gain = list(gains.items())[number % len(gains)] if gains else ("", 1.0)
        hu[..., 16:32, 14:34] = (300 * gain * bmd + brighter_hu)[:, None, None, None, None] + draw.normal(
            0, 5, (4, 2, 3, 16, 20)
        )
        name = f"slabs/P{number}.npz"
        np.savez_compressed(folder / name, hu=hu)
        rows += [
            {
                "patient_id": f"P{number}", "seed": number, "fold": number % 10, "enriched": 0,
                "level": f"L{level + 1}", "sex": "FM"[number % 2], "age": 40 + 3 * number, "bmi": 20 + number,
                "vendor": "canon", "scanner": scanner, "kernel": "FC18", "slice_mm": 3.0, "bmd_g_cm2": bmd[level],
                "tbs": 1.0 + 0.3 * bmd[level], "hu": 150 + 100 * draw.random(), "slabs": name, "index": level,
            }
            for level in range(4)
        ]  # fmt: skip
    with (folder / "cohort.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "cohort.json").write_text(json.dumps({"provenance": "digital", "seed": 0}), encoding="utf-8")
    return folder
