"""The segmentation and the report: validated by dicom3tools and dcmtk, and read back to the same values."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as public

from models.phantom.study import make_study
from service.dicom.headers import read_facts
from service.dicom.reports import codes, is_ours
from service.dicom.reports.seg import make_segmentation, segment_numbers
from service.dicom.reports.source import ReportError
from service.dicom.reports.sr import DIGITS, make_structured_report
from service.dicom.reports.uids import DISCLAIMER, MANUFACTURER
from service.domain.reasons import Code, Reason
from service.domain.result import (
    Anatomy,
    Category,
    Decision,
    Driver,
    LevelMeasurement,
    Measurements,
    Numbering,
    PatientValues,
    Provenance,
    result_document,
    unmeasured,
)
from tests.read_back import dsrdump, errors_of_dciodvfy, groups, numbers, texts

AT = datetime(2026, 11, 23, 14, 5, 6)
IDS = {32: "T12", 31: "L1", 30: "L2", 29: "L3", 28: "L4", 27: "L5", 126: "L6"}
JAPANESE = "Yamada^Tarou=山田^太郎=やまだ^たろう"
METAL = Reason(Code.METAL, "L3: metal beside the body, 2600 HU.")
HIDDEN = Reason(Code.LEVEL_OUT_OF_VIEW, "L1 is not wholly in view.")
LOW = Reason(Code.BMD_OSTEOPOROSIS_RANGE, "62.1 % of young adults, below 70 %: consider DXA.")
REFERENCE = "young-f-l1l4: digital women of 20 to 44 years"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digital patient in thick slices; L1 and L5 are out of view or cut off."""
    return make_study(4711, tmp_path_factory.mktemp("reports"), {"slice_mm": "5", "coverage": "L2-L4"})


@pytest.fixture
def source(study: Path) -> list[Dataset]:
    return [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted((study / "dicom").iterdir())]


@pytest.fixture(scope="module")
def labels(study: Path) -> np.ndarray:
    return np.asarray(nib.load(study / "labels.nii.gz").dataobj).transpose(2, 1, 0).astype(np.uint8)


@pytest.fixture
def result(source: list[Dataset]) -> dict[str, Any]:
    return document(source)


@pytest.fixture
def segmentation(source: list[Dataset], labels: np.ndarray, result: dict[str, Any]) -> Dataset:
    made = make_segmentation(source, labels, IDS, result["provenance"], at=AT)
    assert made is not None
    return made


def document(source: Sequence[Dataset], **decided: Any) -> dict[str, Any]:
    """L2 and L4 measured, L3 excluded for metal but with values, L1 out of view."""
    levels = {
        "L1": LevelMeasurement("L1", False, (HIDDEN,)),
        "L2": LevelMeasurement(
            "L2", True, (), 0.7312, (0.6372, 0.8252), 1.2345, (1.0195, 1.4495), 98.25, 125.0, (92.5, 104.75)
        ),
        "L3": LevelMeasurement("L3", True, (METAL,), 0.9999, (0.9, 1.1), 1.5, (1.4, 1.6), 250.0, 125.0, (240.0, 260.0)),
        "L4": LevelMeasurement("L4", True, (), 0.7512, (0.6572, 0.8452), None, None, 101.5, 125.0, None),
    }
    measurements = Measurements(
        levels=levels,
        anatomy=Anatomy({}, Numbering.CERTAIN, 5, notes=("five lumbar vertebrae ± 0",)),
        provenance=Provenance("osteogate 0.1.0", "reference-0.1.0", "ab" * 32, "built-in", "cd" * 32, "cpu"),
    )
    patient = PatientValues(True, 0.7412, (0.6525, 0.8299), 1.2345, None, 99.875, 62.1, None, ("L2", "L4"))
    decision = Decision(Category.REFER, (LOW,), Driver.NETWORK, "YOSHIDA_2023 v1")
    return result_document(
        study_uid=str(source[0].StudyInstanceUID),
        series_uid=str(source[0].SeriesInstanceUID),
        revision=decided.get("revision", 1),
        eligible=decided.get("eligible", True),
        verdict_reasons=decided.get("verdict_reasons", ()),
        measurements=decided.get("measurements", measurements),
        patient=decided.get("patient", patient),
        decision=decided.get("decision", decision),
    )


def refused(source: Sequence[Dataset]) -> dict[str, Any]:
    contrast = Reason(Code.CONTRAST_TAGGED, "Contrast medium was given: ContrastBolusAgent=IOHEXOL.")
    return document(
        source,
        eligible=False,
        verdict_reasons=(contrast,),
        measurements=unmeasured("osteogate 0.1.0"),
        patient=PatientValues(synthetic=True),
        decision=Decision(Category.NOT_ASSESSABLE, (contrast,), Driver.NONE, "YOSHIDA_2023 v1"),
    )


def written(dataset: Dataset, folder: Path) -> Path:
    path = folder / f"{dataset.Modality}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_the_segmentation_holds_the_labels_on_the_source_slices(
    source: list[Dataset], labels: np.ndarray, segmentation: Dataset, tmp_path: Path
) -> None:
    read = hd.seg.segread(written(segmentation, tmp_path))
    assert {"L2", "L3", "L4"} <= set(segment_numbers(read))
    uids = [one.SOPInstanceUID for one in source]
    for level, number in segment_numbers(read).items():
        described = read.get_segment_description(number)
        assert described.segmented_property_type == codes.VERTEBRAE[level]
        assert described.segmented_property_category == public.SCT.AnatomicalStructure
        assert described.algorithm_type.value == "AUTOMATIC"
        stack = read.get_pixels_by_source_instance(uids, [number], assert_missing_frames_are_empty=True)
        value = next(key for key, name in IDS.items() if name == level)
        np.testing.assert_array_equal(stack[..., 0] == 1, labels == value)


def test_the_same_result_makes_the_same_bytes_however_the_slices_come(
    source: list[Dataset], labels: np.ndarray, segmentation: Dataset, result: dict[str, Any], tmp_path: Path
) -> None:
    again = make_segmentation(source[::-1], labels, IDS, result["provenance"], at=AT)
    assert again is not None
    first = written(segmentation, tmp_path).read_bytes()
    assert written(again, tmp_path).read_bytes() == first
    report = written(make_structured_report(source, segmentation, result, at=AT), tmp_path).read_bytes()
    assert written(make_structured_report(source, again, result, at=AT), tmp_path).read_bytes() == report


def test_a_sixth_lumbar_vertebra_takes_our_own_code(
    source: list[Dataset], labels: np.ndarray, result: dict[str, Any], tmp_path: Path
) -> None:
    made = make_segmentation(source, np.where(labels == 27, 126, labels), IDS, result["provenance"], at=AT)
    assert made is not None
    assert "L6" in segment_numbers(made)
    assert "L5" not in segment_numbers(made)
    assert made.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == codes.SCHEME
    assert errors_of_dciodvfy(written(made, tmp_path), "Segmentation") == []


def test_the_report_holds_the_values_of_the_result(
    source: list[Dataset], segmentation: Dataset, result: dict[str, Any], tmp_path: Path
) -> None:
    made = make_structured_report(source, segmentation, result, at=AT, reference=REFERENCE)
    rois, patient = groups(written(made, tmp_path))
    l2 = result["levels"]["L2"]
    told = {codes.MEAN_ATTENUATION: l2["hu_mean"], codes.BMD: l2["bmd_g_cm2"], codes.TBS: l2["tbs"]}
    assert numbers(rois["L2"]) == {name: round(value, DIGITS[name]) for name, value in told.items()}
    assert numbers(rois["L4"]) == {codes.MEAN_ATTENUATION: 101.5, codes.BMD: 0.751}
    assert numbers(patient) == {
        codes.MEAN_ATTENUATION: 99.9,
        codes.BMD: 0.741,
        codes.TBS: round(1.2345, 3),
        codes.PERCENT_YAM: 62.1,
    }
    bmd = rois["L2"].get_measurements(codes.BMD)[0]
    assert bmd.unit == codes.G_CM2
    bounds = {item.name: item.value for item in bmd[0].ContentSequence if item.ValueType == "NUM"}
    assert bmd.value + bounds[codes.UPPER_UNCERTAINTY] == pytest.approx(0.825, abs=1e-6)
    assert bmd.value - bounds[codes.LOWER_UNCERTAINTY] == pytest.approx(0.637, abs=1e-6)
    yam = patient.get_measurements(codes.PERCENT_YAM)[0]
    assert REFERENCE in texts(yam[0])
    segment = rois["L2"].referenced_segment
    assert segment.referenced_sop_instance_uid == segmentation.SOPInstanceUID
    assert segment.referenced_segment_numbers == [segment_numbers(segmentation)["L2"]]


def test_numbers_are_as_long_as_people_read_them_and_cross_no_cut(source: list[Dataset], tmp_path: Path) -> None:
    third = 1 / 3
    patient = PatientValues(
        True, 0.7 + third / 100, (0.6 + third / 100, 0.8 + third / 100), 1.3096, None, 110.04, 79.98, -1.004, ("L2",)
    )
    made = make_structured_report(source, None, document(source, patient=patient), at=AT, reference=REFERENCE)
    path = written(made, tmp_path)
    assert errors_of_dciodvfy(path, "Comprehensive3DSR") == []
    _, group = groups(path)
    assert numbers(group) == {
        codes.MEAN_ATTENUATION: 110.04,
        codes.BMD: 0.703,
        codes.TBS: 1.3096,
        codes.PERCENT_YAM: 79.98,
        codes.T_SCORE: -1.004,
    }
    assert len(numerals(made)) > 10
    assert max(map(len, numerals(made))) <= 7


def numerals(item: Dataset) -> list[str]:
    """Every Numeric Value (0040,A30A) below an item, as it is written."""
    own = [str(one.NumericValue) for one in item.get("MeasuredValueSequence", ())]
    return own + [text for child in item.get("ContentSequence", ()) for text in numerals(child)]


@pytest.mark.parametrize("category", list(Category))
def test_a_report_without_a_flag_says_that_it_rules_nothing_out(
    source: list[Dataset], segmentation: Dataset, category: Category
) -> None:
    decision = Decision(category, (LOW,), Driver.NETWORK, "YOSHIDA_2023 v1")
    said = texts(make_structured_report(source, segmentation, document(source, decision=decision), at=AT))
    assert ("No flag does not rule out low bone density." in said) is (category is not Category.REFER)
    assert ("The uncertainty of a predicted value is the model's 90 % prediction interval." in said) is (
        category is not Category.NOT_ASSESSABLE
    )
    assert not any("model card" in text for text in said)


def test_an_excluded_level_says_why_and_holds_no_number(
    source: list[Dataset], segmentation: Dataset, result: dict[str, Any], tmp_path: Path
) -> None:
    made = make_structured_report(source, segmentation, result, at=AT)
    rois, _ = groups(written(made, tmp_path))
    l3 = rois["L3"]
    assert numbers(l3) == {}
    said = {item.name: item.value for item in l3.get_qualitative_evaluations()}
    assert said[codes.VALIDITY] == codes.EXCLUDED
    assert said[codes.EXCLUSION].value == "METAL"
    assert f"METAL: {METAL.text}" in texts(l3[0])
    l1 = rois["L1"].get_qualitative_evaluations(codes.EXCLUSION)[0]
    assert l1.value.value == "LEVEL_OUT_OF_VIEW"  # longer than a Code Value may be: Long Code Value


def test_vertebrae_that_others_outlined_are_not_claimed_as_ours(
    source: list[Dataset], labels: np.ndarray, result: dict[str, Any], tmp_path: Path
) -> None:
    name = "supplied DICOM SEG by Spine model, A foreign maker (1.2.826.0.1.3680043.8.498.123456789)"
    result["provenance"]["segmenter"] = name
    made = make_segmentation(source, labels, IDS, result["provenance"], at=AT)
    assert made is not None
    for segment in made.SegmentSequence:
        assert "AlgorithmSource" not in segment.SegmentationAlgorithmIdentificationSequence[0]
    path = written(make_structured_report(source, made, result, at=AT), tmp_path)
    assert errors_of_dciodvfy(path, "Comprehensive3DSR") == []
    assert errors_of_dciodvfy(written(made, tmp_path), "Segmentation") == []
    rois, _ = groups(path)
    for group in rois.values():
        said = [text for item in group for text in texts(item)]
        begin = said.index(name)  # then its version and its parameters, and no manufacturer among them
        assert said[begin + 1 : begin + 3] == ["cd" * 6, "sha256=" + "cd" * 32]
        assert said[begin - 1] != MANUFACTURER != said[begin + 3]


def test_the_report_recommends_and_never_decides_alone(
    source: list[Dataset], segmentation: Dataset, result: dict[str, Any], tmp_path: Path
) -> None:
    made = make_structured_report(source, segmentation, result, at=AT)
    assert (made.CompletionFlag, made.VerificationFlag) == ("PARTIAL", "UNVERIFIED")
    assert made.PreliminaryFlag == "PRELIMINARY"
    _, patient = groups(written(made, tmp_path))
    said = {item.name: item.value for item in patient.get_qualitative_evaluations()}
    assert said[codes.RECOMMENDATION].meaning == "Consider DXA"
    assert said[codes.DRIVER] == codes.DRIVERS["network"]
    everything = texts(made)
    assert DISCLAIMER in everything
    assert "YOSHIDA_2023 v1" in everything
    assert any("reference" in text for text in everything)
    assert f"sha256={'ab' * 32}" in everything
    assert not any("normal" in text.lower() for text in everything)


@pytest.mark.parametrize("charset", ["ISO_IR 192", ["", "ISO 2022 IR 87"]])
def test_validators_accept_both_and_the_japanese_name_survives(
    source: list[Dataset], labels: np.ndarray, result: dict[str, Any], charset: str | list[str], tmp_path: Path
) -> None:
    for one in source:
        one.SpecificCharacterSet = charset
        one.PatientName = JAPANESE
    source = [pydicom.dcmread(_copy(one, tmp_path)) for one in source]  # as bytes in that character set
    segmentation = make_segmentation(source, labels, IDS, result["provenance"], at=AT)
    assert segmentation is not None
    report = make_structured_report(source, segmentation, result, at=AT, reference=REFERENCE)
    paths = written(segmentation, tmp_path), written(report, tmp_path)
    for path, iod in zip(paths, ("Segmentation", "Comprehensive3DSR"), strict=True):
        assert errors_of_dciodvfy(path, iod) == []
        read = pydicom.dcmread(path)
        assert str(read.PatientName) == JAPANESE
        assert read.PatientName.original_string == source[0].PatientName.original_string
        assert read.SyntheticData == "YES"
        assert read.StudyInstanceUID == source[0].StudyInstanceUID
        assert read.SeriesInstanceUID != source[0].SeriesInstanceUID
    dump = dsrdump(paths[1])
    assert b"Consider DXA" in dump
    assert ("山田" if charset == "ISO_IR 192" else "Yamada").encode() in dump


def _copy(one: Dataset, folder: Path) -> Path:
    path = folder / f"{one.InstanceNumber}.dcm"
    one.save_as(path, enforce_file_format=True)
    return path


def test_a_ct_that_is_not_assessable_gets_a_report_of_reasons(source: list[Dataset], tmp_path: Path) -> None:
    made = make_structured_report(source, None, refused(source), at=AT)
    path = written(made, tmp_path)
    assert errors_of_dciodvfy(path, "Comprehensive3DSR") == []
    assert b"Not assessable" in dsrdump(path)
    rois, patient = groups(path)
    assert rois == {}
    assert numbers(patient) == {}
    said = {item.name: item.value for item in patient.get_qualitative_evaluations()}
    assert said[codes.RECOMMENDATION] == codes.CATEGORIES["not-assessable"]
    assert [text for text in texts(made) if text.startswith("CONTRAST_TAGGED: Contrast medium was given")] != []
    referenced = made.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert len(referenced) == len(source)


def test_numbers_are_withheld_when_too_few_levels_make_it_not_assessable(
    source: list[Dataset], segmentation: Dataset, tmp_path: Path
) -> None:
    few = Reason(Code.TOO_FEW_LEVELS, "One vertebra is left; two are needed.")
    decision = Decision(Category.NOT_ASSESSABLE, (few,), Driver.NONE, "YOSHIDA_2023 v1")
    made = make_structured_report(source, segmentation, document(source, decision=decision), at=AT)
    rois, patient = groups(written(made, tmp_path))
    assert [numbers(group) for group in (*rois.values(), patient)] == [{}] * (len(rois) + 1)


def test_uids_follow_from_what_was_measured(
    source: list[Dataset], labels: np.ndarray, segmentation: Dataset, result: dict[str, Any]
) -> None:
    def uids(document: dict[str, Any], run: int = 0) -> set[str]:
        seg = make_segmentation(
            source, labels, IDS, document["provenance"], at=AT, revision=document["revision"], run=run
        )
        assert seg is not None
        return {seg.SOPInstanceUID, make_structured_report(source, seg, document, at=AT, run=run).SOPInstanceUID}

    first = uids(result)
    other_model = copy.deepcopy(result)
    other_model["provenance"]["model_sha256"] = "ef" * 32
    assert len(first) == 2
    assert uids(copy.deepcopy(result)) == first
    for other in (uids({**result, "revision": 2}), uids(result, run=1), uids(other_model)):
        assert other.isdisjoint(first)
    assert all(uid.startswith("2.25.") and len(uid) <= 64 for uid in first)


def test_a_report_names_the_one_that_it_replaces(
    source: list[Dataset], segmentation: Dataset, result: dict[str, Any]
) -> None:
    old = make_structured_report(source, segmentation, result, at=AT)
    new = make_structured_report(source, segmentation, {**result, "revision": 2}, at=AT, replaces=[old])
    series = new.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == old.SeriesInstanceUID == new.SeriesInstanceUID
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == old.SOPInstanceUID


def test_our_own_objects_are_recognised_and_no_others(
    source: list[Dataset], segmentation: Dataset, result: dict[str, Any], tmp_path: Path
) -> None:
    report = make_structured_report(source, segmentation, result, at=AT)
    for made in (segmentation, report):
        assert is_ours(read_facts(written(made, tmp_path)))
        made.Manufacturer = "Some Archive"  # the equipment rewritten: the series tells
        assert is_ours(read_facts(written(made, tmp_path)))
        made.SeriesInstanceUID = "1.2.3"
        assert not is_ours(read_facts(written(made, tmp_path)))
        made.Manufacturer = MANUFACTURER  # UIDs rewritten: the device tells
        assert is_ours(read_facts(written(made, tmp_path)))
    source[0].Manufacturer = MANUFACTURER
    assert not is_ours(read_facts(source[0]))


def test_awkward_headers_are_carried_over_as_they_are(
    source: list[Dataset], labels: np.ndarray, result: dict[str, Any], tmp_path: Path
) -> None:
    for one in source:
        one.PatientName, one.PatientID = "ANONYMOUS", "A-1"
        one.SpecificCharacterSet = None
        for keyword in ("StudyID", "AccessionNumber", "SyntheticData", "SliceThickness"):
            del one[keyword]
        one.PatientBirthDate = one.PatientSex = one.StudyTime = ""
    before = copy.deepcopy(source)
    segmentation = make_segmentation(source, labels, IDS, result["provenance"], at=AT)
    assert segmentation is not None
    report = make_structured_report(source, segmentation, result, at=AT)
    for made in (segmentation, report):
        iod = "Segmentation" if made is segmentation else "Comprehensive3DSR"
        assert errors_of_dciodvfy(written(made, tmp_path), iod) == []
        made.StudyDescription = "changed by whoever sends it"
        read = pydicom.dcmread(written(made, tmp_path))
        assert (str(read.PatientName), read.PatientID, read.PatientBirthDate) == ("ANONYMOUS", "A-1", "")
        assert "SyntheticData" not in read
    shared = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert shared.SliceThickness == pytest.approx(5.0)
    assert "five lumbar vertebrae +- 0" in texts(report)
    assert source == before


def test_slices_without_geometry_still_get_their_refusal(source: list[Dataset], tmp_path: Path) -> None:
    for one in source:
        for keyword in (
            "ImagePositionPatient",
            "ImageOrientationPatient",
            "FrameOfReferenceUID",
            "Rows",
            "PatientName",
        ):
            del one[keyword]
    made = make_structured_report(source, None, refused(source), at=AT)
    assert errors_of_dciodvfy(written(made, tmp_path), "Comprehensive3DSR") == []


def test_nothing_segmented_is_no_object_and_misfits_are_refused(
    source: list[Dataset], labels: np.ndarray, result: dict[str, Any]
) -> None:
    provenance = result["provenance"]
    assert make_segmentation(source, np.zeros_like(labels), IDS, provenance, at=AT) is None
    with pytest.raises(ReportError, match="the source slices need uint8"):
        make_segmentation(source[1:], labels, IDS, provenance, at=AT)
    with pytest.raises(ReportError, match="no code is known for C7"):
        make_segmentation(source, labels, {**IDS, 1: "C7"}, provenance, at=AT)
    with pytest.raises(ReportError, match="of another study"):
        make_structured_report(source, None, {**result, "study_uid": "1.2.3"}, at=AT)
    with pytest.raises(ReportError, match="the same SOPInstanceUID"):
        make_structured_report([*source, source[0]], None, result, at=AT)
    del source[2].ImagePositionPatient
    with pytest.raises(ReportError, match="no ImagePositionPatient"):
        make_segmentation(source, labels, IDS, provenance, at=AT)
    source[2].ImagePositionPatient = source[1].ImagePositionPatient
    source[3].StudyInstanceUID = ""
    with pytest.raises(ReportError, match="no StudyInstanceUID"):
        make_segmentation(source, labels, IDS, provenance, at=AT)
