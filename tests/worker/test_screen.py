"""`osteogate screen` on a DICOM folder: the same answer as JSON and as DICOM objects that the validators take."""

from __future__ import annotations

import shutil
import subprocess
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
from tests.conftest import absent
from worker.screen import screen_path
from worker.start import make_pipeline

AT = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


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
    dciodvfy = shutil.which("dciodvfy") or absent("dicom3tools' dciodvfy")
    for name in ("sr.dcm", "seg.dcm"):
        done = subprocess.run([dciodvfy, str(screened[1] / name)], capture_output=True, text=True, check=False)
        errors = [line for line in done.stderr.splitlines() if line.startswith("Error")]
        # Its dictionary is older than SyntheticData (0008,001C).
        assert [line for line in errors if "0x0008,0x001c" not in line.lower()] == []


def test_a_refused_series_is_reported_with_its_reasons(digital_study: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for file in sorted((digital_study / "dicom").iterdir())[:20]:
        shutil.copy(file, half)

    def never() -> Any:
        raise AssertionError("nothing eligible: the networks must not be loaded")

    document = screen_path(half, tmp_path / "out", never, DEFAULT_POLICY, at=AT)
    assert document["decision"]["category"] == "not-assessable"
    assert not (tmp_path / "out" / "seg.dcm").exists()
    assert "COVERAGE" in {reason["code"].split("_")[0] for reason in document["verdict"]["reasons"]}
    assert "Not assessable" in str(dcmread(tmp_path / "out" / "sr.dcm"))
