"""A real spine, labelled by others, through `osteogate screen`: measured right, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pytest

from service.domain.policy import DEFAULT_POLICY
from service.settings import Settings
from tests.real_ct import independent_hu, write_dicom_series
from worker.pipeline import LABEL_IDS, Pipeline
from worker.screen import NothingToScreen, screen_path
from worker.start import make_pipeline

AT = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
LEVEL_NAMES = {number: name for name, number in LABEL_IDS.items()}


@pytest.fixture(scope="module")
def case(real_data: Path) -> Path:
    return real_data / "totalsegmentator-example-ct"


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Pipeline]:
    pipeline = make_pipeline(Settings(data_dir=tmp_path_factory.mktemp("settings")))
    return lambda: pipeline


@pytest.fixture(scope="module")
def supplied(case: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("supplied")
    labels = case / "spine_report" / "example_ct_report" / "totalseg.nii.gz"
    settings = Settings(data_dir=out / "data")
    document = screen_path(
        case / "example_ct.nii.gz", out, lambda: make_pipeline(settings, labels), DEFAULT_POLICY, at=AT
    )
    return document, out


def test_all_four_levels_are_measured(supplied: tuple[dict[str, Any], Path]) -> None:
    document, out = supplied
    assert json.loads((out / "result.json").read_text()) == document
    assert document["patient"]["levels_used"] == ["L1", "L2", "L3", "L4"]
    assert document["anatomy"]["numbering"] == "certain"
    assert document["decision"]["driver"] == "ct-attenuation"
    assert "TAGS_NOT_CHECKED" in {reason["code"] for reason in document["verdict"]["reasons"]}


@pytest.mark.parametrize("label", [31, 30, 29, 28])
def test_attenuation_agrees_with_an_independent_computation(
    supplied: tuple[dict[str, Any], Path], case: Path, label: int
) -> None:
    measured = supplied[0]["levels"][LEVEL_NAMES[label]]["hu_mean"]
    assert measured == pytest.approx(independent_hu(case, label), abs=8.0)


def test_pictures_are_there_to_be_looked_at(supplied: tuple[dict[str, Any], Path]) -> None:
    for name in ("crop-L1", "crop-L2", "crop-L3", "crop-L4", "overlay-sagittal", "overlay-coronal"):
        picture = cv2.imread(str(supplied[1] / f"{name}.png"))
        assert picture is not None
        assert picture.std() > 10


def test_the_label_map_comes_back_in_the_cts_own_grid(supplied: tuple[dict[str, Any], Path], case: Path) -> None:
    ours = nibabel.load(supplied[1] / "labels.nii.gz")
    theirs = nibabel.load(case / "spine_report" / "example_ct_report" / "totalseg.nii.gz")
    assert ours.shape == theirs.shape
    assert np.allclose(ours.affine, theirs.affine, atol=1e-3)
    assert np.mean((np.asarray(ours.dataobj) == 31) == (np.asarray(theirs.dataobj) == 31)) > 0.9999


def _honest(document: dict[str, Any], labels: Path, case: Path) -> None:
    """Right levels, or not assessable with a reason: never wrong levels called certain."""
    if document["decision"]["category"] == "not-assessable":
        assert document["decision"]["reasons"]
        return
    assert document["anatomy"]["numbering"] == "certain"
    ours = np.asarray(nibabel.as_closest_canonical(nibabel.load(labels)).dataobj)
    reference = case / "spine_report" / "example_ct_report" / "totalseg.nii.gz"
    theirs = np.asarray(nibabel.as_closest_canonical(nibabel.load(reference)).dataobj)
    for label in LABEL_IDS.values():
        overlap = 2 * np.sum((ours == label) & (theirs == label)) / np.sum((ours == label) + 0 + (theirs == label))
        assert overlap > 0.5, f"label {label} is on another vertebra"


def test_the_built_in_networks_are_honest_on_a_real_spine(
    case: Path, built_in: Callable[[], Pipeline], tmp_path: Path
) -> None:
    write_dicom_series(case / "example_ct.nii.gz", tmp_path / "ct")
    document = screen_path(tmp_path / "ct", tmp_path / "out", built_in, DEFAULT_POLICY, at=AT)
    assert document["patient"]["synthetic"] is False
    assert document["decision"]["driver"] != "network"
    _honest(document, tmp_path / "out" / "labels.nii.gz", case)


def test_a_truncated_real_spine_is_not_assessable(case: Path, built_in: Callable[[], Pipeline], tmp_path: Path) -> None:
    document = screen_path(case / "example_ct_sm.nii.gz", tmp_path, built_in, DEFAULT_POLICY, at=AT)
    assert document["decision"]["category"] == "not-assessable"
    assert document["decision"]["reasons"]


def test_an_mr_is_refused(case: Path, built_in: Callable[[], Pipeline], tmp_path: Path) -> None:
    document = screen_path(case / "neg-mr" / "example_mr_sm.nii.gz", tmp_path, built_in, DEFAULT_POLICY, at=AT)
    assert document["decision"]["category"] == "not-assessable"
    assert "NOT_HU" in {reason["code"] for reason in document["verdict"]["reasons"]}


def test_the_real_j2k_series_is_refused_with_its_reasons(real_data: Path, tmp_path: Path) -> None:
    def never() -> Pipeline:
        raise AssertionError("an ineligible series must not reach the networks")

    document = screen_path(real_data / "totalsegmentator-example-dicom-j2k", tmp_path, never, DEFAULT_POLICY, at=AT)
    codes = {reason["code"] for reason in document["verdict"]["reasons"]}
    assert {"CONTRAST_TAGGED", "AGE_UNKNOWN", "COVERAGE_TOO_SHORT"} <= codes
    assert document["decision"]["category"] == "not-assessable"


def test_odd_files_each_get_a_clear_verdict(real_data: Path, tmp_path: Path) -> None:
    files = sorted(file for file in (real_data / "ct-transfer-syntaxes").rglob("*") if file.is_file())
    assert len(files) > 20
    answers = {}
    for number, file in enumerate(files):
        try:
            document = screen_path(file, tmp_path / str(number), _unreachable, DEFAULT_POLICY, at=AT)
        except NothingToScreen:
            continue
        assert document["decision"]["category"] == "not-assessable", file.name
        answers[file.name] = {reason["code"] for reason in document["verdict"]["reasons"]}
        assert answers[file.name], file.name
    assert any("LOSSY" in codes for codes in answers.values())
    assert any("NO_PIXELS" in codes for name, codes in answers.items() if "no-pixel-data" in name)
    assert any({"NOT_CT", "NO_GEOMETRY"} & codes for name, codes in answers.items() if "no-pixel-spacing" in name)


def _unreachable() -> Pipeline:
    raise AssertionError("an ineligible file must not reach the networks")
