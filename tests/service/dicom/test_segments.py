"""What a segmentation's header says: real objects of dcmqi, coded by hand, damaged, and with thousands of frames."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from service.dicom import segments
from service.dicom.headers import HeaderError, read_facts
from service.dicom.reports.uids import MANUFACTURER, MODEL_NAME, Kind, series_uid
from service.dicom.syntaxes import COMPREHENSIVE_3D_SR_STORAGE, LABEL_MAP_SEGMENTATION_STORAGE, SEGMENTATION_STORAGE

FRAME = "1.2.9"


def item(**elements: object) -> Sequence:
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return Sequence([made])


def segment(value: str | None, scheme: str | None = "SCT") -> Dataset:
    made = Dataset()
    made.SegmentNumber = 1
    code = Dataset()
    if value is not None:
        code.CodeValue = value
    if scheme is not None:
        code.CodingSchemeDesignator = scheme
    made.SegmentedPropertyTypeCodeSequence = Sequence([code])
    return made


def seg(*found: Dataset, sop_class: str = SEGMENTATION_STORAGE, frames: int = 2) -> Dataset:
    """A segmentation's data set; its pixels are of no matter here."""
    made = Dataset()
    made.SOPClassUID, made.SOPInstanceUID = sop_class, "1.2.3.5.1"
    made.StudyInstanceUID, made.SeriesInstanceUID = "1.2.3", "1.2.3.5"
    made.Modality, made.Manufacturer, made.FrameOfReferenceUID = "SEG", "A maker", FRAME
    made.ReferencedSeriesSequence = item(SeriesInstanceUID="1.2.3.4")
    made.NumberOfFrames, made.Rows, made.Columns = frames, 8, 8
    made.SegmentSequence = Sequence(found)
    groups = [item(PlanePositionSequence=item(ImagePositionPatient=[0, 0, n]))[0] for n in range(frames)]
    made.PerFrameFunctionalGroupsSequence = Sequence(groups)
    made.PixelData = bytes(8 * frames)
    made["PixelData"].VR = "OB"
    return made


def part10(dataset: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    stream = BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("sop_class", [SEGMENTATION_STORAGE, LABEL_MAP_SEGMENTATION_STORAGE])
def test_codes_series_and_frame_are_read(sop_class: str, syntax: str) -> None:
    found = (segment("66794005"), segment("T-11920", "SRT"), segment("L6", "99OSTEOGATE"), segment("T-62000", "SRT"))
    facts = read_facts(BytesIO(part10(seg(*found, segment("66794005"), sop_class=sop_class), syntax)))
    assert facts.segments == ("SCT:66794005", "SCT:14293000", "99OSTEOGATE:L6", "SRT:T-62000")
    assert facts.referenced_series_uids == ("1.2.3.4",)
    assert (facts.frame_of_reference_uid, facts.frames, facts.own_output) == (FRAME, 2, False)
    assert type(facts).from_json(facts.as_json()) == facts


def test_a_data_set_as_it_comes_over_the_wire_is_read_alike() -> None:
    whole = part10(seg(segment("66794005")))
    start = whole.index(b"\x08\x00\x16\x00UI")  # behind the file meta information
    assert read_facts(BytesIO(whole[start:]), ExplicitVRLittleEndian) == read_facts(BytesIO(whole))


def test_the_descriptions_of_the_frames_are_never_reached() -> None:
    """A segmentation has thousands of frames: what lies behind their first byte must not matter at the door."""
    whole = part10(seg(segment("66794005"), frames=300))
    there = whole.index(b"\x00\x52\x30\x92SQ") + 12
    assert read_facts(BytesIO(whole[:there] + b"\xff" * 64)) == read_facts(BytesIO(whole))


@pytest.mark.parametrize(
    "broken",
    [
        segment(None),
        segment("66794005", None),
        segment("", ""),
        Dataset(),
    ],
)
def test_a_segment_without_a_code_is_passed_over(broken: Dataset) -> None:
    assert read_facts(seg(broken, segment("66794005"))).segments == ("SCT:66794005",)


def test_a_damaged_sequence_gives_nothing_and_raises_nothing() -> None:
    whole = part10(seg(segment("66794005")))
    at = whole.index(b"\x62\x00\x02\x00SQ") + 12
    length = int.from_bytes(whole[at - 4 : at], "little")
    facts = read_facts(BytesIO(whole[:at] + b"\xff" * length + whole[at + length :]))
    assert facts.segments == ()
    assert facts.referenced_series_uids == ("1.2.3.4",)


@pytest.mark.parametrize("cut", [200, 400, 500, 600])
def test_a_truncated_object_is_read_as_far_as_it_goes_or_refused(cut: int) -> None:
    try:
        facts = read_facts(BytesIO(part10(seg(segment("66794005")))[:cut]))
    except HeaderError:
        return
    assert facts.segments in ((), ("SCT:66794005",))


def test_the_number_of_segments_and_series_is_bounded() -> None:
    many = seg(*(segment(str(n)) for n in range(segments.MAX_SEGMENTS + 5)))
    many.ReferencedSeriesSequence = Sequence(
        [item(SeriesInstanceUID=f"1.2.{n}")[0] for n in range(segments.MAX_SERIES + 5)]
    )
    facts = read_facts(BytesIO(part10(many)))
    assert len(facts.segments) == segments.MAX_SEGMENTS
    assert len(facts.referenced_series_uids) == segments.MAX_SERIES


def test_only_segmentations_have_segments() -> None:
    assert read_facts(seg(segment("66794005"), sop_class="1.2.840.10008.5.1.4.1.1.2")).segments == ()


def test_our_own_output_is_recognised_by_its_device_or_its_series() -> None:
    ours = seg(segment("66794005"))
    ours.Manufacturer, ours.ManufacturerModelName = MANUFACTURER, MODEL_NAME
    assert read_facts(BytesIO(part10(ours))).own_output
    renamed = seg(segment("66794005"))
    renamed.SeriesInstanceUID = series_uid(Kind.SEGMENTATION, "1.2.3", FRAME)
    assert read_facts(BytesIO(part10(renamed))).own_output
    report = seg(sop_class=COMPREHENSIVE_3D_SR_STORAGE)
    assert not read_facts(report).own_output
    report.Manufacturer, report.ManufacturerModelName = MANUFACTURER, MODEL_NAME
    assert read_facts(report).own_output
    ct = seg(sop_class="1.2.840.10008.5.1.4.1.1.2")
    ct.Manufacturer, ct.ManufacturerModelName = MANUFACTURER, MODEL_NAME
    assert not read_facts(ct).own_output  # an image is never ours


def test_dcmqis_real_objects_are_read(real_data: Path) -> None:
    folder = real_data / "dcmqi-ct3slice"
    facts = read_facts(folder / "liver.dcm")
    ct = dcmread(next((folder / "ct-3slice").glob("*.dcm")), stop_before_pixels=True)
    assert facts.segments
    assert all(":" in code for code in facts.segments)
    assert facts.referenced_series_uids == (str(ct.SeriesInstanceUID),)
    assert facts.frame_of_reference_uid == str(ct.FrameOfReferenceUID)
