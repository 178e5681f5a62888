"""Segmentation and report of an enhanced CT: they refer to its frames, and say what those of plain slices say."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pytest
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from models.phantom.study import make_study
from service.dicom.reports import codes
from service.dicom.reports.seg import make_segmentation, segment_numbers
from service.dicom.reports.source import ReportError
from service.dicom.reports.sr import make_structured_report
from tests.enhanced import enhanced, slices_of
from tests.read_back import dsrdump, errors_of_dciodvfy, groups, numbers
from tests.service.dicom.test_reports import AT, IDS, document, written
from worker.segmentation.dicom_seg import read_labels
from worker.volume import load_dicom

LEVELS = {32: "T12", 31: "L1", 30: "L2"}
ORDER = [7, 2, 0, 9, 4, 11, 1, 8, 3, 10, 6, 5]  # of the frames in the object, by their place from feet to head

Make = Callable[[list[Dataset]], Dataset]


def legacy(slices: list[Dataset]) -> Dataset:
    return LegacyConvertedEnhancedCTImage(slices, generate_uid(), 7, generate_uid(), 1)


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    """Twelve slices of a digital patient, from feet to head."""
    study = make_study(4711, tmp_path_factory.mktemp("enhanced"), {"slice_mm": "5", "coverage": "L2-L4"})
    return slices_of(study / "dicom", first=5, count=12, size=96)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """Three blocks, of which no two slices show the same."""
    made = np.zeros((12, 96, 96), dtype=np.uint8)
    for k in range(12):
        made[k, 30 + k : 50 + k, 40:60] = (0, 30, 30, 30, 31, 31, 31, 31, 32, 32, 32, 0)[k]
    return made


def shuffled(slices: list[Dataset]) -> list[Dataset]:
    return [slices[k] for k in ORDER]


def segmented(source: list[Dataset], labels: np.ndarray) -> Dataset:
    made = make_segmentation(source, labels, IDS, document(source)["provenance"], at=AT)
    assert made is not None
    return made


@pytest.mark.parametrize("make", [enhanced, legacy], ids=["enhanced", "legacy"])
def test_the_segmentation_refers_to_the_frames_that_it_was_drawn_on(
    make: Make, slices: list[Dataset], labels: np.ndarray, tmp_path: Path
) -> None:
    source = make(shuffled(slices))
    path = written(segmented([source], labels), tmp_path)
    assert errors_of_dciodvfy(path, "Segmentation") == []
    read = hd.seg.segread(path)
    places = [_place(source, frame) for frame in range(12)]
    heights = [float(one.ImagePositionPatient[2]) for one in slices]
    assert segment_numbers(read) == {"T12": 1, "L1": 2, "L2": 3}
    for level, number in segment_numbers(read).items():
        assert read.get_segment_description(number).segmented_property_type == codes.VERTEBRAE[level]
        stack = read.get_pixels_by_source_frame(
            str(source.SOPInstanceUID), list(range(1, 13)), [number], assert_missing_frames_are_empty=True
        )
        value = next(key for key, name in LEVELS.items() if name == level)
        for frame in range(12):
            np.testing.assert_array_equal(stack[frame, ..., 0] == 1, labels[heights.index(places[frame])] == value)
    referred = {
        (float(item.PlanePositionSequence[0].ImagePositionPatient[2]), _referred_frame(item))
        for item in read.PerFrameFunctionalGroupsSequence
    }
    assert referred == {(places[frame], frame + 1) for frame in range(12) if labels[heights.index(places[frame])].any()}


def _place(source: Dataset, frame: int) -> float:
    return float(source.PerFrameFunctionalGroupsSequence[frame].PlanePositionSequence[0].ImagePositionPatient[2])


def _referred_frame(item: Dataset) -> int:
    return int(item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber)


def test_it_is_read_back_onto_the_volume_of_the_enhanced_ct(
    slices: list[Dataset], labels: np.ndarray, tmp_path: Path
) -> None:
    source = enhanced(shuffled(slices))
    ct = written(source, tmp_path)
    segmentation = written(segmented([source], labels), tmp_path)
    np.testing.assert_array_equal(read_labels(segmentation, load_dicom([ct])), labels)


def test_the_report_says_what_it_says_of_plain_slices(
    slices: list[Dataset], labels: np.ndarray, tmp_path: Path
) -> None:
    found = {}
    for name, source in (("enhanced", [enhanced(shuffled(slices))]), ("plain", slices)):
        folder = tmp_path / name
        folder.mkdir()
        result = document(source)
        made = make_structured_report(source, segmented(source, labels), result, at=AT, reference="a reference")
        path = written(made, folder)
        assert errors_of_dciodvfy(path, "Comprehensive3DSR") == []
        assert dsrdump(path)
        levels, patient = groups(path)
        found[name] = ({level: numbers(group) for level, group in levels.items()}, numbers(patient))
        evidence = made.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        refers = {str(one.ReferencedSOPInstanceUID) for series in evidence for one in series.ReferencedSOPSequence}
        assert {str(one.SOPInstanceUID) for one in source} & refers
        assert made.SyntheticData == "YES"
    assert found["enhanced"] == found["plain"]
    assert "L2" in found["plain"][0]


def test_the_same_object_makes_the_same_segmentation(slices: list[Dataset], labels: np.ndarray) -> None:
    source = enhanced(shuffled(slices))
    assert segmented([source], labels) == segmented([copy.deepcopy(source)], labels)


def test_a_thickness_that_is_not_given_is_the_distance_of_the_frames(slices: list[Dataset], labels: np.ndarray) -> None:
    def strip(made: Dataset) -> None:
        del made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness

    made = segmented([enhanced(random.Random(2).sample(slices, 12), strip)], labels)
    assert float(made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness) == 5.0


def _no_place(made: Dataset) -> None:
    del made.PerFrameFunctionalGroupsSequence[4].PlanePositionSequence


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_no_place, "no place"),
        (lambda made: made.PerFrameFunctionalGroupsSequence.pop(), "no place"),
        (lambda made: setattr(made, "StudyInstanceUID", ""), "StudyInstanceUID"),
    ],
)
def test_a_source_that_cannot_be_referred_to_is_told(
    edit: Callable[[Dataset], Any], words: str, slices: list[Dataset], labels: np.ndarray
) -> None:
    with pytest.raises(ReportError, match=words):
        make_segmentation([enhanced(slices, edit)], labels, IDS, {"software": "osteogate 0"}, at=AT)


def test_an_enhanced_ct_among_others_and_labels_of_another_size(slices: list[Dataset], labels: np.ndarray) -> None:
    provenance = document(slices)["provenance"]
    with pytest.raises(ReportError, match="among other"):
        make_segmentation([enhanced(slices), slices[0]], labels, IDS, provenance, at=AT)
    with pytest.raises(ReportError, match="need uint8"):
        make_segmentation([enhanced(slices)], labels[:6], IDS, provenance, at=AT)
