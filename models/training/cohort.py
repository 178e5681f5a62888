"""Vertebrae with their truth, as a folder holds them."""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from models.package import BMD_ALONE, TARGETS, scanner_name
from models.resnet50 import Floats

Ints = npt.NDArray[np.int64]
TENTHS = 10  # a cohort's `fold` column: tenths of its patients
FIELD_PX = 128  # kept of a slab's 256: all that a vertebra can fill
COLUMNS = (
    "patient_id", "fold", "level", "provenance", "sex", "age", "bmi", "vendor", "scanner", "kernel", "slice_mm",
    "dxa_device", "interval_days", "bmd_g_cm2", "tbs", "hu", "fat_over_spine_cm", "slabs", "index",
)  # fmt: skip


@dataclass(frozen=True)
class Cohort:
    """Vertebrae with their truth, read from a folder that `phantom cohort` (or a hospital's store) wrote.

    cohort.csv has a row per vertebra; its columns `slabs` and `index` say which array of which npz file.
    """

    slabs: npt.NDArray[np.int16]  # [vertebrae, mask variants, slabs, size, size] HU
    targets: Floats  # [vertebrae, 2]: BMD g/cm2, TBS (NaN where the DXA told none)
    hu: Floats  # [vertebrae] the comparator
    patients: npt.NDArray[np.str_]  # [vertebrae]
    folds: Ints  # [vertebrae], 0..9, one per patient
    rows: tuple[Mapping[str, str], ...]
    facts: Mapping[str, Any]  # cohort.json: at least `provenance`, "digital" or "site"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Everything in the folder.

        Raises:
            ValueError: it holds no vertebra, or fewer patients than cohort.json tells of.
        """
        with (folder / "cohort.csv").open(newline="", encoding="utf-8") as stream:
            rows = tuple(csv.DictReader(stream))
        if not rows:
            raise ValueError(f"{folder / 'cohort.csv'} holds no vertebra")
        facts = json.loads((folder / "cohort.json").read_text(encoding="utf-8"))
        there = len({row["patient_id"] for row in rows})
        if facts.get("patients", there) != there:
            told = f"{folder} holds {there} of its {facts['patients']} patients"
            raise ValueError(f"{told}: it is being made, or its making was stopped and has to be run again")
        arrays: dict[str, npt.NDArray[np.int16]] = {}
        for name in dict.fromkeys(row["slabs"] for row in rows):
            with np.load(folder / name, allow_pickle=False) as stored:
                arrays[name] = stored["hu"]
        return cls(
            slabs=np.stack([arrays[row["slabs"]][int(row["index"])] for row in rows]),
            targets=np.stack([_column(rows, "bmd_g_cm2"), _column(rows, "tbs", absent=np.nan)], axis=1),
            hu=_column(rows, "hu"),
            patients=np.array([row["patient_id"] for row in rows]),
            folds=np.array([int(row["fold"]) for row in rows]),
            rows=rows,
            facts={"provenance": str(facts.pop("provenance")), **facts},
        )

    @property
    def provenance(self) -> str:
        """Where the pairs come from: digital or site."""
        return str(self.facts["provenance"])

    @cached_property
    def scanners(self) -> npt.NDArray[np.str_]:
        """[vertebrae] by `scanner_name`; "" where it is not told, as in `phantom cohort`."""
        return np.array([scanner_name(row.get("vendor"), row.get("scanner")) for row in self.rows])

    @cached_property
    def fat_over_spine_cm(self) -> Floats:
        """[vertebrae]; NaN where it is not told."""
        return np.array([float(row.get("fat_over_spine_cm") or "nan") for row in self.rows], np.float32)

    @cached_property
    def sha256(self) -> str:
        """Of everything that training sees: slabs, truth, patients and folds."""
        digest = hashlib.sha256()
        for array in (self.slabs, self.targets, self.folds):
            digest.update(np.ascontiguousarray(array).data)
        digest.update("\n".join(self.patients).encode())
        return digest.hexdigest()

    def truth(self, targets: tuple[str, ...], chosen: Ints | slice = slice(None)) -> Floats:
        """[chosen, targets] of these targets alone.

        Raises:
            ValueError: a chosen vertebra has no value of one of them.
        """
        found: Floats = self.targets[chosen][:, [TARGETS.index(target) for target in targets]]
        missing = int(np.isnan(found).any(axis=1).sum())
        if missing:
            told = f"{missing} of {len(found)} vertebrae of the cohort have no {' and '.join(targets)}"
            raise ValueError(f"{told}: a configuration may take {BMD_ALONE[0]} alone as its targets")
        return found

    def where(self, folds: tuple[int, ...]) -> Ints:
        """Indices of the vertebrae whose patients are in these folds."""
        return np.flatnonzero(np.isin(self.folds, folds))

    def patients_in(self, folds: tuple[int, ...]) -> int:
        """How many patients are in these folds."""
        return len(set(self.patients[self.where(folds)]))


def stored_field(slabs: npt.NDArray[Any]) -> npt.NDArray[np.int16]:
    """The middle of each slab [slabs, size, size] HU, as a cohort keeps it: [slabs, 128, 128] whole HU."""
    edge = (slabs.shape[-1] - FIELD_PX) // 2
    field = slabs[..., edge : edge + FIELD_PX, edge : edge + FIELD_PX]
    rounded: npt.NDArray[np.int16] = np.rint(field).astype(np.int16)
    return rounded


def write_cohort(folder: Path, rows: Sequence[Mapping[str, object]], facts: Mapping[str, object]) -> None:
    """The tables of a hospital's cohort, whose slabs lie in `folder` already; what a row doesn't know stays empty.

    cohort.json comes last and in one step: a folder that holds it is complete.
    """
    with (folder / "cohort.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, COLUMNS, restval="")
        table.writeheader()
        table.writerows(rows)
    draft = folder / "cohort.json.draft"
    draft.write_text(json.dumps(dict(facts), indent=2) + "\n", encoding="utf-8")
    draft.replace(folder / "cohort.json")


def _column(rows: tuple[Mapping[str, str], ...], name: str, absent: float | None = None) -> Floats:
    """The numbers of a column; `absent` stands for an empty cell, which else is no number."""
    return np.array(
        [absent if row[name] == "" and absent is not None else float(row[name]) for row in rows], np.float32
    )
