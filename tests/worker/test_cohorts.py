"""A stored CT and its kept outlines become a cohort by the code that prediction uses; what is gone is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.crop import VertebraError
from models.inputs import InputConfig, network_input
from models.package import scanner_name
from models.phantom.cohort import FIELD_PX as PHANTOM_FIELD_PX
from models.training import Cohort
from models.training.cohort import FIELD_PX
from service.dicom.headers import read_facts
from service.domain.eligibility import vendor_of
from service.domain.splits import Part
from service.settings import Settings
from service.workflow import artefacts
from worker import cohorts
from worker.cohorts import cohort_dir, cut_study, make_cohorts
from worker.located import Located
from worker.pipeline import LABEL_IDS, cut_level
from worker.segmentation import SuppliedLabels
from worker.volume import Volume, load_dicom

TRUTH = {"L1": {"bmd_g_cm2": 0.9, "tbs": 1.3}, "L3": {"bmd_g_cm2": 1.0, "tbs": 1.2}}


@pytest.fixture(scope="module")
def volume(digital_study: Path) -> Volume:
    return load_dicom(sorted((digital_study / "dicom").glob("*.dcm")))


@pytest.fixture(scope="module")
def labels(digital_study: Path, volume: Volume) -> np.ndarray:
    return SuppliedLabels(digital_study / "labels.nii.gz").segment(volume).labels


@pytest.fixture
def site(tmp_path: Path, digital_study: Path, labels: np.ndarray) -> Settings:
    """The study received, and its outlines kept with result 7."""
    settings = Settings(data_dir=tmp_path)
    (settings.spool_dir / "ab").mkdir(parents=True)
    names = []
    for file in sorted((digital_study / "dicom").glob("*.dcm"), reverse=True):
        (settings.spool_dir / "ab" / file.name).symlink_to(file)
        names.append(f"ab/{file.name}")
    folder = settings.results_dir / "7-1"
    folder.mkdir(parents=True)
    artefacts.keep_sources(folder, names)
    assert artefacts.keep_labels(folder, labels, LABEL_IDS.values())
    return settings


def test_a_scanner_has_one_name_in_training_and_in_prediction(digital_study: Path, volume: Volume) -> None:
    facts = read_facts(next((digital_study / "dicom").glob("*.dcm")))
    manifest = {
        "vendor": vendor_of(facts.manufacturer) or "unknown",
        "scanner": facts.model_name,
    }  # as a run freezes it
    assert scanner_name(manifest["vendor"], manifest["scanner"]) == volume.scanner.name == "siemens SOMATOM Force"


def pair(number: int, **changes: Any) -> dict[str, Any]:
    told = {
        "patient": f"p{number:05d}", "part": "training", "tenth": number % 10, "provenance": "patient",
        "study_uid": f"1.2.{number}", "artefacts": "7-1", "days": -3, "sex": "F", "age": None, "vendor": "canon",
        "scanner": None, "kernel": "FC18", "slice_mm": 3.0, "dxa_device": "GE Lunar Prodigy", "levels": TRUTH,
    }  # fmt: skip
    return {**told, **changes}


def manifest(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"run": 3, "seed": 1, "people": "patients", "young_adult_bmd": {"F": 1.2}, "pairs": pairs}


def test_what_is_learned_from_is_what_is_predicted_from(
    site: Settings, volume: Volume, labels: np.ndarray, tmp_path: Path
) -> None:
    file = tmp_path / "run" / "slabs" / "00001.npz"
    told = cut_study(pair(1), file, site)
    stored = np.load(file)["hu"]
    assert stored.shape == (2, 1, 9, FIELD_PX, FIELD_PX)
    assert FIELD_PX == PHANTOM_FIELD_PX
    assert told["lost"] == []
    step = 1 / InputConfig().grey_levels
    for index, level in enumerate(TRUTH):
        found = cut_level(volume, Located(labels, volume.affine), level, LABEL_IDS[level])
        seen = network_input(found.slabs.hu[None], InputConfig())
        learned = network_input(stored[index], InputConfig())
        assert np.abs(seen - learned).max() <= step * 1.001  # whole HU are kept: at most a grey step apart
        assert (seen > 0).sum() > 1000
        assert told["hu"][level] == round(found.attenuation.hu_mean, 2)
    shutil.rmtree(site.spool_dir)
    assert cut_study(pair(1), file, site) == told  # done before: not done again


def test_attenuation_is_never_read_outside_the_outline(volume: Volume, labels: np.ndarray) -> None:
    """An outline with a hole where the disc lies: the figure that decides for people would be of something else."""
    whole = cut_level(volume, Located(labels, volume.affine), "L3", LABEL_IDS["L3"])
    assert whole.attenuation.inside == 1.0
    index = np.linalg.inv(volume.affine) @ [*whole.attenuation.centre_lps, 1.0]
    grid = np.indices(labels.shape).T @ volume.affine[:3, :3].T
    away = np.linalg.norm(grid - volume.affine[:3, :3] @ index[:3], axis=-1).T
    hollow = np.where((away < 6.0) & (labels == LABEL_IDS["L3"]), 0, labels)
    with pytest.raises(VertebraError, match=r"\d+% of the disc that measures attenuation lies in its outline"):
        cut_level(volume, Located(hollow, volume.affine), "L3", LABEL_IDS["L3"])


def test_a_study_that_an_earlier_release_cut_has_no_fat_told(site: Settings, tmp_path: Path) -> None:
    """A run that was paused over an update goes on with what lies there."""
    asked = pair(1)
    told = cut_study(asked, tmp_path / "00001.npz", site)
    rows = cohorts._rows(asked, told["hu"], told["fat"], "x")
    assert all(isinstance(row["fat_over_spine_cm"], float) for row in rows)
    assert [row["fat_over_spine_cm"] for row in cohorts._rows(asked, told["hu"], {}, "x")] == ["", ""]


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda site: next(site.spool_dir.glob("ab/*")).unlink(), "TRAINING_CT_GONE"),
        (lambda site: (site.results_dir / "7-1" / "labels.npz").unlink(), "TRAINING_LABELS_GONE"),
        (lambda site: (site.results_dir / "7-1" / "labels.npz").write_bytes(b"PK\x03\x04"), "TRAINING_LABELS_GONE"),
        (lambda site: shutil.rmtree(site.results_dir), "TRAINING_LABELS_GONE"),
        (
            lambda site: artefacts.keep_labels(site.results_dir / "7-1", np.full((2, 3, 4), 31, np.uint8), [31]),
            "TRAINING_CT_UNUSABLE",
        ),
    ],
)
def test_a_study_that_cannot_be_cut_is_told_by_name_and_reason(
    site: Settings, tmp_path: Path, damage: Callable[[Settings], Any], code: str
) -> None:
    damage(site)
    file = tmp_path / "run" / "00001.npz"
    (lost,) = cut_study(pair(1), file, site)["lost"]
    assert (lost["study_uid"], lost["level"], lost["code"]) == ("1.2.1", None, code)
    assert lost["text"]
    assert not file.exists()


def test_both_cohorts_are_made_once_whatever_stops_them(
    site: Settings, volume: Volume, labels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wiped = labels.copy()
    wiped[wiped == LABEL_IDS["L3"]] = 0
    monkeypatch.setattr(cohorts, "_stored", lambda *_: (volume, wiped))
    pairs = [pair(number) for number in range(1, 12)]
    pairs += [pair(number, part="locked", tenth=None) for number in (12, 13)]

    def stop(done: int, _: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    straight, parts = tmp_path / "straight", tmp_path / "parts"
    lost = make_cohorts(manifest(pairs), "5e" * 32, site, straight)
    with pytest.raises(KeyboardInterrupt):
        make_cohorts(manifest(pairs), "5e" * 32, site, parts, stop)
    heard: list[int] = []
    assert make_cohorts(manifest(pairs), "5e" * 32, site, parts, lambda done, _: heard.append(done)) == lost
    assert heard == list(range(1, 14))
    assert [(one.study_uid, one.level, one.code) for one in lost[:1]] == [("1.2.1", "L3", "TRAINING_LEVEL_LOST")]
    assert len(lost) == 13
    training, locked = (Cohort.read(cohort_dir(parts, part)) for part in Part)
    assert training.sha256 == Cohort.read(cohort_dir(straight, Part.TRAINING)).sha256
    assert (len(training.rows), len(locked.rows)) == (11, 2)  # L1 of each
    assert not set(training.patients) & set(locked.patients)
    assert set(training.folds) == set(range(10))
    assert training.facts["provenance"] == "site"
    assert (training.facts["training_run"], training.facts["manifest_sha256"]) == (3, "5e" * 32)
    row = training.rows[0]
    assert (row["interval_days"], row["age"], row["bmi"], row["provenance"]) == ("3", "", "", "patient")
    assert make_cohorts(manifest(pairs), "5e" * 32, site, parts) == lost  # complete: nothing is cut again


def test_too_little_that_is_left_is_told(tmp_path: Path) -> None:
    site = Settings(data_dir=tmp_path)
    pairs = [pair(number) for number in range(1, 11)]
    with pytest.raises(ValueError, match="nothing could judge"):
        make_cohorts(manifest(pairs), "", site, tmp_path / "run")
