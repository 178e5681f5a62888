"""Tolerant header reading: made headers for the rules, real ones for the world."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from service.dicom import syntaxes
from service.dicom.headers import HeaderError, read_facts
from service.dicom.part10 import encode_file_meta
from service.domain.facts import InstanceFacts
from tests.service.dicom.harness import CT, EXPLICIT, ct_slice, encoded, slice_file


def facts_of(syntax: str = EXPLICIT, **changes: Any) -> InstanceFacts:
    return read_facts(BytesIO(encoded(ct_slice(**changes), syntax)), syntax)


def raw_element(group: int, element: int, vr: bytes, value: bytes) -> bytes:
    """One explicit VR little endian element."""
    return group.to_bytes(2, "little") + element.to_bytes(2, "little") + vr + len(value).to_bytes(2, "little") + value


MINIMUM = raw_element(0x08, 0x16, b"UI", CT.encode() + b"\x00") + raw_element(0x08, 0x18, b"UI", b"1.2.34")


def facts_with(*elements: bytes) -> InstanceFacts:
    """Facts of a header made of raw bytes that pydicom itself would refuse to write."""
    return read_facts(BytesIO(MINIMUM + b"".join(elements)), EXPLICIT)


@pytest.mark.parametrize("syntax", syntaxes.UNCOMPRESSED)
def test_plain_values_in_every_uncompressed_syntax(syntax: str) -> None:
    facts = facts_of(syntax, number=7)
    assert facts.sop_instance_uid == "1.2.3.4.7"
    assert (facts.kvp, facts.patient_age_years, facts.rows, facts.frames) == (120.0, 65.0, 8, 1)
    assert facts.position_lps_mm == (0.0, 0.0, 7.0)
    assert facts.column_cosine == (0.0, 1.0, 0.0)
    assert facts.has_pixels
    assert facts.transfer_syntax_uid == syntax


@pytest.mark.parametrize(
    ("age", "birth", "study", "years"),
    [
        ("065Y", None, None, 65.0),
        ("720M", None, None, 60.0),
        ("012W", None, None, pytest.approx(0.23, abs=0.01)),
        ("", "19600615", "20250614", 64.0),
        (None, "19600615", "20250615", 65.0),
        ("000Y", "19600615", "20250615", 65.0),
        ("000Y", None, "20250615", None),
        (None, "20260101", "20250615", None),
        (None, "19600230", "20250615", None),
        (None, None, "20250615", None),
        ("999Y", None, None, None),
    ],
)
def test_age(age: str | None, birth: str | None, study: str | None, years: float | None) -> None:
    elements = (
        raw_element(0x08, 0x20, b"DA", (study or "").encode()),
        raw_element(0x10, 0x30, b"DA", (birth or "").encode()),
        raw_element(0x10, 0x1010, b"AS", (age or "").encode()),
    )
    assert facts_with(*elements).patient_age_years == years


def test_garbage_is_none_not_a_guess() -> None:
    facts = facts_with(
        raw_element(0x10, 0x1010, b"AS", b"65"),
        raw_element(0x18, 0x50, b"DS", b"2,5 mm"),
        raw_element(0x18, 0x60, b"DS", b"abc "),
        raw_element(0x18, 0x1120, b"DS", b""),
        raw_element(0x20, 0x32, b"DS", b"1\\2 "),
        raw_element(0x28, 0x10, b"US", b"\x01"),
        raw_element(0x28, 0x30, b"DS", b"0\\0 "),
        raw_element(0x28, 0x1053, b"DS", b"NaN "),
    )
    assert (facts.patient_age_years, facts.slice_thickness_mm, facts.kvp) == (None, None, None)
    assert (facts.gantry_tilt_deg, facts.position_lps_mm, facts.rows) == (None, None, None)
    assert (facts.pixel_spacing_mm, facts.rescale_slope) == (None, None)


def test_two_values_where_one_belongs() -> None:
    facts = facts_with(raw_element(0x18, 0x60, b"DS", b"120\\140 "), raw_element(0x08, 0x60, b"CS", b"CT\\MR "))
    assert (facts.kvp, facts.modality) == (120.0, "CT")


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"ContrastBolusAgent": "APPLIED"}, ("ContrastBolusAgent=APPLIED",)),
        ({"ContrastBolusAgent": ""}, ()),
        ({"ContrastBolusVolume": 0}, ()),
        ({"ContrastBolusVolume": 90}, ("ContrastBolusVolume=90.0",)),
        ({"ContrastBolusRoute": "IV"}, ("ContrastBolusRoute=IV",)),
        ({"ContrastBolusStartTime": "101500"}, ("ContrastBolusStartTime=101500",)),
        ({"ContrastFlowRate": [0, 3]}, ("ContrastFlowRate=0.0, 3.0",)),
        ({"ContrastBolusAgentSequence": Sequence([])}, ()),
    ],
)
def test_contrast_tags(elements: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert facts_of(**elements).contrast_bolus == expected


def test_contrast_sequences() -> None:
    agent = Dataset()
    agent.CodeMeaning = "Iohexol"
    assert facts_of(ContrastBolusAgentSequence=Sequence([agent])).contrast_bolus == (
        "ContrastBolusAgentSequence=Iohexol",
    )
    usage = Dataset()
    usage.ContrastBolusAgentAdministered = "NO"
    assert facts_of(ContrastBolusUsageSequence=Sequence([usage])).contrast_bolus == ()
    usage.ContrastBolusAgentAdministered = "YES"
    assert facts_of(ContrastBolusUsageSequence=Sequence([usage])).contrast_bolus == (
        "ContrastBolusUsageSequence=present",
    )


def test_an_unreadable_contrast_sequence_still_speaks_of_contrast() -> None:
    broken = b"\x18\x00\x12\x00SQ\x00\x00" + (6).to_bytes(4, "little") + b"\xff\xff\xff\xff\xff\xff"
    assert facts_with(broken).contrast_bolus == ("ContrastBolusAgentSequence=unreadable",)


def test_japanese_names_are_decoded() -> None:
    name = b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B"
    facts = facts_with(
        raw_element(0x08, 0x05, b"CS", b"\\ISO 2022 IR 87"),
        raw_element(0x10, 0x10, b"PN", name + b" " * (len(name) % 2)),
    )
    assert facts.patient_name == "Yamada^Tarou=山田^太郎=やまだ^たろう"


@pytest.mark.parametrize(
    ("charset", "encoding"),
    [(None, "utf-8"), (b"ISO_IR 6", "utf-8"), (None, "latin-1"), (b"ISO_IR 100", "latin-1"), (b"ISO_IR 192", "utf-8")],
)
def test_umlauts_are_read_whatever_the_sender_declares(charset: bytes | None, encoding: str) -> None:
    """Beyond ASCII the default repertoire holds nothing: senders that declare it mean UTF-8, or Latin 1."""
    name = "Müller^Jö".encode(encoding)
    declared = [] if charset is None else [raw_element(0x08, 0x05, b"CS", charset)]
    facts = facts_with(*declared, raw_element(0x10, 0x10, b"PN", name + b" " * (len(name) % 2)))
    assert facts.patient_name == "Müller^Jö"


def test_control_characters_and_length_are_tamed() -> None:
    facts = facts_with(raw_element(0x10, 0x20, b"LO", b"A\x00B" + b"x" * 5001))
    assert facts.patient_id is not None
    assert facts.patient_id.startswith("A Bx")
    assert len(facts.patient_id) == 255


@pytest.mark.parametrize(
    ("syntax", "tag", "lossy"),
    [
        (EXPLICIT, None, False),
        (EXPLICIT, "01", True),
        ("1.2.840.10008.1.2.4.70", None, False),
        ("1.2.840.10008.1.2.4.50", "00", True),
        ("1.2.840.10008.1.2.4.51", None, True),
        ("1.2.840.10008.1.2.4.91", None, True),
        ("1.2.840.10008.1.2.4.91", "00", False),
        ("1.2.840.10008.1.2.4.81", "01", True),
        ("1.2.840.10008.1.2.4.203", "00", False),
    ],
)
def test_lossy(syntax: str, tag: str | None, lossy: bool) -> None:
    content = encoded(ct_slice(LossyImageCompression=tag, PixelData=None))
    assert read_facts(BytesIO(content), syntax).lossy is lossy


def test_enhanced_ct_keeps_its_values_in_functional_groups() -> None:
    detail, measures, frame, shared = Dataset(), Dataset(), Dataset(), Dataset()
    detail.KVP = 120.0
    measures.PixelSpacing = [0.7, 0.8]
    measures.SliceThickness = 1.0
    shared.CTXRayDetailsSequence = Sequence([detail])
    shared.PixelMeasuresSequence = Sequence([measures])
    position = Dataset()
    position.ImagePositionPatient = [1, 2, 3]
    frame.PlanePositionSequence = Sequence([position])
    facts = facts_of(
        KVP=None,
        ImagePositionPatient=None,
        NumberOfFrames=2,
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence([frame, Dataset()]),
    )
    assert (facts.kvp, facts.pixel_spacing_mm, facts.slice_thickness_mm) == (120.0, (0.7, 0.8), 1.0)
    assert (facts.position_lps_mm, facts.frames) == ((1.0, 2.0, 3.0), 2)


def test_synthetic_data() -> None:
    assert facts_of(SyntheticData="YES").synthetic
    assert not facts_of().synthetic


@pytest.mark.parametrize(
    "content", [b"", b"hello", bytes(128) + b"DICM", bytes(128) + b"DICM" + bytes(20), bytes(4096)]
)
def test_no_dicom_is_a_header_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(HeaderError):
        read_facts(path)


def test_deeply_nested_sequences_are_a_header_error_or_harmless() -> None:
    """pydicom parses undefined-length sequences recursively and raises RecursionError."""
    opening = b"\x08\x00\x15\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    with pytest.raises(HeaderError, match="nested"):
        facts_with(opening * 3000)


def test_cut_off_headers_never_escape(tmp_path: Path) -> None:
    """Every prefix of a slice gives facts or HeaderError, and nothing else."""
    whole = slice_file(tmp_path).read_bytes()
    outcomes = set()
    for length in range(0, len(whole), 7):
        try:
            outcomes.add(type(read_facts(BytesIO(whole[:length]))))
        except HeaderError:
            outcomes.add(HeaderError)
    assert outcomes == {InstanceFacts, HeaderError}


def test_facts_survive_json() -> None:
    facts = facts_of(ContrastBolusAgent="X")
    assert InstanceFacts.from_json(facts.as_json()) == facts


def test_deflated_is_never_expanded(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(encode_file_meta(CT, "1.2", syntaxes.DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN) + b"\x00" * 100)
    with pytest.raises(HeaderError, match="deflated"):
        read_facts(path)


# Real headers


def test_real_transfer_syntaxes(real_data: Path) -> None:
    folder = real_data / "ct-transfer-syntaxes" / "cornerstone3D"
    lossy = {path.name.rsplit("_", 1)[1]: read_facts(path).lossy for path in sorted(folder.glob("CTImage.dcm_*"))
             if "Deflated" not in path.name}  # fmt: skip
    assert {name for name, value in lossy.items() if value} == {
        f"1.2.840.10008.1.2.4.{number}.dcm" for number in (50, 51, 53, 55, 81, 91)
    }
    assert len(lossy) == 14


def test_real_j2k_series(real_data: Path) -> None:
    folder = real_data / "totalsegmentator-example-dicom-j2k" / "example_ct_dicom"
    facts = [read_facts(path) for path in sorted(folder.iterdir())]
    assert len(facts) == 20
    assert {one.kvp for one in facts} == {120.0}
    assert {one.patient_age_years for one in facts} == {None}
    assert all("ContrastBolusAgent=APPLIED" in one.contrast_bolus for one in facts)
    assert len({one.position_lps_mm for one in facts}) == 20
    assert not any(one.lossy for one in facts)


def test_real_multiframe_and_segmentation(real_data: Path) -> None:
    folder = real_data / "dcmqi-ct3slice" / "23x38x3"
    multiframe = read_facts(folder / "multiframe" / "mf.dcm")
    assert multiframe.sop_class_uid == syntaxes.LEGACY_CONVERTED_ENHANCED_CT_IMAGE_STORAGE
    assert (multiframe.frames, multiframe.pixel_spacing_mm) == (3, (0.7, 0.7))
    assert read_facts(folder / "seg" / "label.seg").modality == "SEG"


def test_real_files_without_pixels_or_spacing(real_data: Path) -> None:
    folder = real_data / "ct-transfer-syntaxes" / "cornerstone3D"
    assert not read_facts(folder / "no-pixel-data.dcm").has_pixels
    assert read_facts(folder / "no-pixel-spacing.dcm").pixel_spacing_mm is None
