"""`osteogate screen` on a DICOM folder: the same answer as JSON and as DICOM objects that the validators take."""

from __future__ import annotations

import random
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from highdicom.seg import segread
from pydicom import dcmread

from service.domain.policy import DEFAULT_POLICY
from service.settings import Settings
from tests.enhanced import as_file, enhanced, slices_of
from tests.read_back import errors_of_dciodvfy
from worker.screen import screen_path
from worker.segmentation.dicom_seg import read_labels
from worker.start import make_pipeline
from worker.volume import load_dicom

AT = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
OBJECTS = {"sr.dcm": "Comprehensive3DSR", "seg.dcm": "Segmentation"}  # as dciodvfy calls them


@pytest.fixture(scope="module")
def screened(digital_study: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("screened")
    settings = Settings(data_dir=out / "data")
    labels = digital_study / "labels.nii.gz"
    document = screen_path(digital_study / "dicom", out, lambda: make_pipeline(settings, labels), DEFAULT_POLICY, at=AT)
    return document, out


def test_a_digital_patient_is_measured_and_reported(screened: tuple[dict[str, Any], Path]) -> None:
    document, out = screened
    assert document["patient"]["levels_used"] == ["L1", "L2", "L3", "L4"]
    report, segmentation = dcmread(out / "sr.dcm"), dcmread(out / "seg.dcm")
    assert report.StudyInstanceUID == segmentation.StudyInstanceUID == document["study_uid"]
    assert report.SyntheticData == segmentation.SyntheticData == "YES"
    assert report.CompletionFlag == "PARTIAL"
    assert report.VerificationFlag == "UNVERIFIED"


def test_the_segments_lie_where_the_labels_lie(screened: tuple[dict[str, Any], Path]) -> None:
    _, out = screened
    segmentation = segread(out / "seg.dcm")
    labels = np.asarray(nibabel.load(out / "labels.nii.gz").dataobj)
    numbers = {segmentation.get_segment_description(n).segment_label: n for n in segmentation.segment_numbers}
    frames = segmentation.pixel_array
    segments = np.array(
        [
            int(item.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
            for item in segmentation.PerFrameFunctionalGroupsSequence
        ]
    )
    for name, label in (("L1", 31), ("L4", 28)):
        number = next(number for text, number in numbers.items() if name in text)
        assert int(frames[segments == number].sum()) == int((labels == label).sum())


def test_the_validator_finds_no_error(screened: tuple[dict[str, Any], Path]) -> None:
    for name, iod in OBJECTS.items():
        assert errors_of_dciodvfy(screened[1] / name, iod) == []


def test_an_enhanced_ct_gives_the_same_answer(
    screened: tuple[dict[str, Any], Path], digital_study: Path, tmp_path: Path
) -> None:
    """The same slices in one object, frames in any order: every value of result.json but its names and times."""
    slices = slices_of(digital_study / "dicom")
    source = tmp_path / "enhanced.dcm"
    made = enhanced(random.Random(8).sample(slices, len(slices)))
    source.write_bytes(as_file(made))
    out, settings = tmp_path / "out", Settings(data_dir=tmp_path / "data")
    labels = digital_study / "labels.nii.gz"
    document = screen_path(source, out, lambda: make_pipeline(settings, labels), DEFAULT_POLICY, at=AT)
    assert document["series_uid"] == made.SeriesInstanceUID
    own = ("series_uid", "timings_s")
    plain = {key: value for key, value in screened[0].items() if key not in own}
    assert {key: value for key, value in document.items() if key not in own} == plain
    one, other = (np.asarray(nibabel.load(folder / "labels.nii.gz").dataobj) for folder in (out, screened[1]))
    assert np.array_equal(one, other)
    for name, iod in OBJECTS.items():
        assert errors_of_dciodvfy(out / name, iod) == []
    volume = load_dicom([source])
    assert np.array_equal(read_labels(out / "seg.dcm", volume), read_labels(screened[1] / "seg.dcm", volume))


def test_a_part_of_a_concatenation_is_refused_with_its_reason(digital_study: Path, tmp_path: Path) -> None:
    part = enhanced(slices_of(digital_study / "dicom", count=3), lambda made: setattr(made, "ConcatenationUID", "1.2"))
    (tmp_path / "part.dcm").write_bytes(as_file(part))
    document = screen_path(tmp_path / "part.dcm", tmp_path / "out", _never, DEFAULT_POLICY, at=AT)
    assert [reason["code"] for reason in document["verdict"]["reasons"]] == ["CONCATENATION"]
    assert document["decision"]["category"] == "not-assessable"
    assert errors_of_dciodvfy(tmp_path / "out" / "sr.dcm", OBJECTS["sr.dcm"]) == []


def test_a_refused_series_is_reported_with_its_reasons(digital_study: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for file in sorted((digital_study / "dicom").iterdir())[:20]:
        shutil.copy(file, half)

    document = screen_path(half, tmp_path / "out", _never, DEFAULT_POLICY, at=AT)
    assert document["decision"]["category"] == "not-assessable"
    assert not (tmp_path / "out" / "seg.dcm").exists()
    assert "COVERAGE" in {reason["code"].split("_")[0] for reason in document["verdict"]["reasons"]}
    assert "Not assessable" in str(dcmread(tmp_path / "out" / "sr.dcm"))


def _never() -> Any:
    raise AssertionError("nothing eligible: the networks must not be loaded")
