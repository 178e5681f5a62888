"""A training run's manifest -> cohort folders: every stored CT cut again by the code that prediction uses.

Labels are those that were kept with the result, so what is learned from is what was measured. A study or a level that
cannot be cut is told by name and reason. Study by study on the disk: a run that was killed goes on with the next one.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.crop import VertebraError
from models.training import stored_field, write_cohort
from service.domain.errors import OsteogateError
from service.domain.reasons import Code
from service.domain.splits import Part
from service.settings import Settings
from service.workflow import artefacts
from service.workflow.training import Lost
from service.workflow.training_files import COHORTS, CUT
from worker.located import Located
from worker.pipeline import LABEL_IDS, Found, cut_level
from worker.volume import Volume, VolumeError, load_dicom

SLABS = "slabs"


class Unusable(OsteogateError):
    """A study of the manifest that cannot be cut."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def cohort_dir(folder: Path, part: Part) -> Path:
    """Where a run keeps the cohort that trains, or the one that judges."""
    return folder / COHORTS[part]


def make_cohorts(
    manifest: Mapping[str, Any],
    manifest_sha256: str,
    settings: Settings,
    folder: Path,
    on_study: Callable[[int, int], None] = lambda done, of: None,
) -> list[Lost]:
    """Write both cohorts of a run into its folder; what is there already is taken as it is.

    `on_study` hears after each study how many of all are done; what it raises ends the work. Returns what was lost.

    Raises:
        ValueError: nothing is left that could train, or judge.
    """
    if (folder / CUT).is_file():
        return [Lost(**one) for one in json.loads((folder / CUT).read_text(encoding="utf-8"))]
    rows, lost = _cut(manifest, tuple(Part), settings, folder, on_study)
    _require_judges(rows[Part.LOCKED])
    missing = set(range(10)) - {row["fold"] for row in rows[Part.TRAINING]}
    if missing:
        raise ValueError(f"no study of the tenth {min(missing)} could be cut: too little is left to train on")
    for part in Part:
        write_cohort(cohort_dir(folder, part), rows[part], _facts(manifest, manifest_sha256, part, rows[part]))
    _write(folder / CUT, [_lost_as_dict(one) for one in lost])
    return lost


def make_judges(manifest: Mapping[str, Any], manifest_sha256: str, settings: Settings, folder: Path) -> list[Lost]:
    """Write the locked cohort of a run alone, cut anew from the stored CTs (its own was removed when it finished).

    Raises:
        ValueError: nothing is left that could judge.
    """
    rows, lost = _cut(manifest, (Part.LOCKED,), settings, folder, lambda done, of: None)
    judges = rows[Part.LOCKED]
    _require_judges(judges)
    write_cohort(cohort_dir(folder, Part.LOCKED), judges, _facts(manifest, manifest_sha256, Part.LOCKED, judges))
    return lost


def _cut(
    manifest: Mapping[str, Any],
    parts: Sequence[Part],
    settings: Settings,
    folder: Path,
    on_study: Callable[[int, int], None],
) -> tuple[dict[Part, list[dict[str, object]]], list[Lost]]:
    """The rows of these parts, whose slabs lie in the folder then, and what was lost."""
    rows: dict[Part, list[dict[str, object]]] = {part: [] for part in parts}
    lost: list[Lost] = []
    pairs: Sequence[Mapping[str, Any]] = manifest["pairs"]
    for number, pair in enumerate(pairs, start=1):
        part = Part(pair["part"])
        if part in rows:
            told = cut_study(pair, cohort_dir(folder, part) / SLABS / f"{number:05d}.npz", settings)
            rows[part] += _rows(pair, told["hu"], told.get("fat", {}), f"{SLABS}/{number:05d}.npz")
            lost += [Lost(**one) for one in told["lost"]]
            on_study(number, len(pairs))
    return rows, lost


def _require_judges(rows: Sequence[Mapping[str, object]]) -> None:
    if not rows:
        raise ValueError("no study of the locked test set could be cut: nothing could judge the model")


def _facts(
    manifest: Mapping[str, Any], sha256: str, part: Part, rows: Sequence[Mapping[str, object]]
) -> dict[str, object]:
    digital = manifest["people"] == "digital"
    facts: dict[str, object] = {
        "provenance": "digital" if digital else "site",
        "training_run": manifest["run"],
        "manifest_sha256": sha256,
        "part": part.value,
        "seed": manifest["seed"],
        "patients": len({row["patient_id"] for row in rows}),
        "vertebrae": len(rows),
    }
    if digital and "tbs" in manifest["targets"]:
        facts["tbs_kind"] = "simulated"
    for name in ("densitometer", "definitions", "young_adult_bmd"):  # the last in the manifests of earlier releases
        if manifest.get(name):
            facts[name] = manifest[name]
    return facts


def cut_study(pair: Mapping[str, Any], file: Path, settings: Settings) -> dict[str, Any]:
    """{"hu": by level, "fat": by level, "lost": [...]} of one study; its slabs lie in `file`.

    Done before, it is not done again.
    """
    told_at = file.with_suffix(".json")
    if told_at.is_file():
        told: dict[str, Any] = json.loads(told_at.read_text(encoding="utf-8"))
        return told
    file.parent.mkdir(parents=True, exist_ok=True)
    hu: dict[str, float] = {}
    fat: dict[str, float | None] = {}
    lost: list[Lost] = []
    try:
        slabs = []
        for level, found in _levels(pair, settings):
            if isinstance(found, Found):
                hu[level] = round(found.attenuation.hu_mean, 2)
                fat[level] = None if math.isnan(found.fat_over_spine_cm) else round(found.fat_over_spine_cm, 3)
                slabs.append(stored_field(found.slabs.hu))
            else:
                told_text = f"{level} could not be cut: {found}"
                lost.append(Lost(pair["study_uid"], level, Code.TRAINING_LEVEL_LOST.value, told_text))
        if slabs:
            _save(file, np.stack(slabs)[:, None])  # [levels, 1 mask, slabs, 128, 128]
    except Unusable as error:
        lost.append(Lost(pair["study_uid"], None, error.code.value, error.text))
    told = {"hu": hu, "fat": fat, "lost": [_lost_as_dict(one) for one in lost]}
    _write(told_at, told)
    return told


def _levels(pair: Mapping[str, Any], settings: Settings) -> Iterator[tuple[str, Found | VertebraError]]:
    """Each level that counts, cut, or why it cannot be.

    Raises:
        Unusable: the study cannot be read.
    """
    volume, labels = _stored(settings.results_dir / str(pair["artefacts"]), settings.spool_dir)
    located = Located(labels, volume.affine)
    for level in pair["levels"]:
        try:
            yield level, cut_level(volume, located, level, LABEL_IDS[level])
        except VertebraError as error:
            yield level, error


def _stored(result: Path, spool: Path) -> tuple[Volume, npt.NDArray[np.uint8]]:
    """The CT of a result and the labels that were kept with it.

    Raises:
        Unusable: one of them is gone, or damaged, or they do not fit each other.
    """
    try:
        paths = [spool / name for name in artefacts.sources(result)]
        labels = artefacts.labels(result)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        told = f"the outlines that were kept with the result are gone or damaged ({type(error).__name__})"
        raise Unusable(Code.TRAINING_LABELS_GONE, told) from error
    gone = sum(not path.is_file() for path in paths)
    if gone:
        raise Unusable(Code.TRAINING_CT_GONE, f"{gone} of {len(paths)} files of the CT are gone from the spool")
    try:
        volume = load_dicom(paths)
    except VolumeError as error:
        raise Unusable(Code.TRAINING_CT_UNUSABLE, f"{error.code}: {error.text}") from error
    if volume.hu.shape != labels.shape:
        told = f"the outlines have the shape {list(labels.shape)}, the CT {list(volume.hu.shape)}"
        raise Unusable(Code.TRAINING_CT_UNUSABLE, told)
    return volume, labels


def _rows(
    pair: Mapping[str, Any], hu: Mapping[str, float], fat: Mapping[str, float | None], slabs: str
) -> list[dict[str, object]]:
    """A row for each level that was cut, in the order of the slabs."""
    return [
        {
            "patient_id": pair["patient"],
            "fold": pair["tenth"] or 0,  # the locked set has no tenths
            "level": level,
            "provenance": pair["provenance"],
            "sex": pair["sex"],
            "age": "" if pair["age"] is None else pair["age"],
            "vendor": pair["vendor"],
            "scanner": pair["scanner"] or "",
            "kernel": pair["kernel"] or "",
            "slice_mm": "" if pair["slice_mm"] is None else pair["slice_mm"],
            "dxa_device": pair["dxa_device"],
            "interval_days": abs(pair["days"]),
            **pair["levels"][level],
            "hu": value,
            "fat_over_spine_cm": "" if fat.get(level) is None else fat[level],
            "slabs": slabs,
            "index": index,
        }
        for index, (level, value) in enumerate(hu.items())
    ]


def _lost_as_dict(one: Lost) -> dict[str, str | None]:
    return {"study_uid": one.study_uid, "level": one.level, "code": one.code, "text": one.text}


def _save(file: Path, hu: npt.NDArray[np.int16]) -> None:
    draft = file.with_suffix(".draft")
    with draft.open("wb") as stream:
        np.savez_compressed(stream, hu=hu)
    draft.replace(file)


def _write(file: Path, content: object) -> None:
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(content), encoding="utf-8")
    draft.replace(file)
