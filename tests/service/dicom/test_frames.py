"""An enhanced CT's header: frame by frame what the slices' headers say, and nothing of one frame for all."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from service.dicom import frames as frames_module
from service.dicom import headers, syntaxes
from service.dicom.headers import HeaderError, read_facts
from service.domain.eligibility import assess_series
from service.domain.facts import InstanceFacts
from service.domain.policy import DEFAULT_POLICY
from tests.conftest import absent
from tests.enhanced import as_file, enhanced, slices_of
from tests.service.dicom.harness import EXPLICIT, ct_slice, encoded

OF_AN_OBJECT = {"sop_instance_uid", "sop_class_uid", "series_uid", "instance_number", "series_number", "image_type"}


@pytest.fixture(scope="module")
def slices(digital_study: Path) -> list[Dataset]:
    return slices_of(digital_study / "dicom", first=40, count=8, size=32)


def told(one: InstanceFacts) -> dict[str, Any]:
    """All that a frame and a slice should say alike."""
    return {field.name: getattr(one, field.name) for field in fields(one) if field.name not in OF_AN_OBJECT}


def facts_of(dataset: Dataset) -> InstanceFacts:
    return read_facts(BytesIO(as_file(dataset)))


def frame(made: Dataset, number: int) -> Dataset:
    item: Dataset = made.PerFrameFunctionalGroupsSequence[number]
    return item


def macro(made: Dataset, keyword: str) -> Dataset:
    item: Dataset = made.SharedFunctionalGroupsSequence[0][keyword].value[0]
    return item


def own(made: Dataset, number: int, keyword: str, **values: Any) -> None:
    """Give one frame a functional group of its own, a copy of the shared one with other values; the others keep it."""
    shared = macro(made, keyword)
    for k in range(int(made.NumberOfFrames)):
        mine = copy.deepcopy(shared)
        for name, value in values.items() if k == number else ():
            setattr(mine, name, value)
        setattr(frame(made, k), keyword, Sequence([mine]))
    del made.SharedFunctionalGroupsSequence[0][keyword]


def test_the_object_made_for_these_tests_is_one_by_the_standard(digital_study: Path, tmp_path: Path) -> None:
    path = tmp_path / "enhanced.dcm"
    path.write_bytes(as_file(enhanced(slices_of(digital_study / "dicom", count=5))))
    program = shutil.which("dciodvfy") or absent("dicom3tools' dciodvfy")
    lines = subprocess.run([program, str(path)], capture_output=True, text=True, check=False).stderr.splitlines()
    assert "EnhancedCTImage" in lines
    assert [line for line in lines if line.startswith("Error") and "(0x0008,0x001c)" not in line] == []


def test_the_frames_say_what_the_slices_say(slices: list[Dataset]) -> None:
    facts = facts_of(enhanced(slices))
    assert facts.sop_class_uid == syntaxes.ENHANCED_CT_IMAGE_STORAGE
    assert (facts.frames, len(facts.frame_positions_lps_mm), facts.frame_values) == (8, 8, ())
    assert facts.position_lps_mm is None, "no frame's place is the object's"
    assert facts.image_type == ("ORIGINAL", "PRIMARY", "VOLUME", "NONE")
    assert [told(one) for one in facts.per_frame()] == [told(facts_of(one)) for one in slices]
    assert {one.sop_instance_uid for one in facts.per_frame()} == {facts.sop_instance_uid}


def test_so_do_those_of_a_legacy_converted_ct(slices: list[Dataset]) -> None:
    facts = facts_of(LegacyConvertedEnhancedCTImage(slices, generate_uid(), 7, generate_uid(), 1))
    assert facts.sop_class_uid == syntaxes.LEGACY_CONVERTED_ENHANCED_CT_IMAGE_STORAGE
    frames = sorted(facts.per_frame(), key=lambda one: one.position_lps_mm or ())
    for one, plain in zip(frames, (facts_of(one) for one in slices), strict=True):
        changed = {
            "acquisition_number",
            "series_description",
        }  # highdicom keeps the one elsewhere, and adds to the other
        wanted = {name: value for name, value in told(plain).items() if name not in changed}
        assert {name: getattr(one, name) for name in wanted} == wanted
        assert one.image_type[:3] == ("ORIGINAL", "PRIMARY", "AXIAL")


def test_a_real_legacy_converted_ct_lies_where_its_slices_lay(real_data: Path) -> None:
    for folder in ("23x38x3", "24x38x3"):
        case = real_data / "dcmqi-ct3slice" / folder
        facts = read_facts(case / "multiframe" / "mf.dcm")
        plain = [read_facts(path) for path in (case / "image").glob("*.dcm")]
        assert sorted(facts.frame_positions_lps_mm) == sorted(one.position_lps_mm or () for one in plain)
        for one in facts.per_frame():
            assert (one.pixel_spacing_mm, one.row_cosine, one.rows) == (
                plain[0].pixel_spacing_mm,
                plain[0].row_cosine,
                plain[0].rows,
            )
            assert (one.rescale_slope, one.rescale_intercept) == (plain[0].rescale_slope, plain[0].rescale_intercept)


@pytest.mark.parametrize("undefined", [False, True], ids=["explicit length", "undefined length"])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_however_it_is_encoded(syntax: str, undefined: bool, slices: list[Dataset]) -> None:
    made = enhanced(slices)
    expected = facts_of(made)
    _with_lengths(made, undefined)
    del made.PixelData
    stream = BytesIO()
    made.file_meta.TransferSyntaxUID = syntax
    dcmwrite(stream, made, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=syntax != ExplicitVRBigEndian,
             enforce_file_format=True, overwrite=True)  # fmt: skip
    facts = read_facts(stream)
    assert facts.frame_positions_lps_mm == expected.frame_positions_lps_mm
    assert (facts.kvp, facts.convolution_kernel, facts.pixel_spacing_mm) == (
        expected.kvp,
        expected.convolution_kernel,
        expected.pixel_spacing_mm,
    )
    assert facts.transfer_syntax_uid == syntax


def _with_lengths(dataset: Dataset, undefined: bool) -> None:
    for element in dataset:
        if element.VR == "SQ":
            element.is_undefined_length = undefined
            for item in element.value:
                item.is_undefined_length_sequence_item = undefined
                _with_lengths(item, undefined)


def test_a_parsed_data_set_says_the_same(slices: list[Dataset]) -> None:
    made = enhanced(slices)
    assert read_facts(made) == facts_of(made)


def test_what_differs_between_frames_is_nobodys_alone(slices: list[Dataset]) -> None:
    def edit(made: Dataset) -> None:
        own(made, 3, "CTXRayDetailsSequence", KVP=80.0)
        own(made, 4, "PixelMeasuresSequence", SliceThickness=5.0)

    facts = facts_of(enhanced(slices, edit))
    assert (facts.kvp, facts.slice_thickness_mm) == (None, None)
    assert [one.kvp for one in facts.per_frame()] == [120.0] * 3 + [80.0] + [120.0] * 4
    assert [one.slice_thickness_mm for one in facts.per_frame()].index(5.0) == 4
    assert {name for name, _ in facts.frame_values} == {"kvp", "slice_thickness_mm"}
    assert InstanceFacts.from_json(json.loads(json.dumps(facts.as_json()))) == facts


def test_a_value_at_the_top_level_does_not_stand_for_the_frames(slices: list[Dataset]) -> None:
    """A careless converter leaves the first slice's own values there."""

    def edit(made: Dataset) -> None:
        made.ImagePositionPatient, made.KVP, made.SliceThickness = slices[0].ImagePositionPatient, "80", "9"

    facts = facts_of(enhanced(slices, edit))
    assert [told(one) for one in facts.per_frame()] == [told(facts_of(one)) for one in slices]


def test_the_type_of_a_frame_is_its_own_unless_the_object_is_derived(slices: list[Dataset]) -> None:
    def mixed(made: Dataset) -> None:
        made.ImageType = ["MIXED", "PRIMARY", "VOLUME", "NONE"]
        own(made, 2, "CTImageFrameTypeSequence", FrameType=["DERIVED", "PRIMARY", "VOLUME", "MAXIMUM"])

    found = [one.image_type[0] for one in facts_of(enhanced(slices, mixed)).per_frame()]
    assert found == ["ORIGINAL"] * 2 + ["DERIVED"] + ["ORIGINAL"] * 5

    def derived(made: Dataset) -> None:
        made.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "NONE"]

    assert {one.image_type[0] for one in facts_of(enhanced(slices, derived)).per_frame()} == {"DERIVED"}


def test_two_tubes_are_multienergy(slices: list[Dataset]) -> None:
    def edit(made: Dataset) -> None:
        details = made.SharedFunctionalGroupsSequence[0].CTXRayDetailsSequence
        details.append(copy.deepcopy(details[0]))
        details[1].KVP = 80.0

    assert facts_of(enhanced(slices, edit)).multienergy
    assert not facts_of(enhanced(slices)).multienergy


def _usage(administered: str) -> Dataset:
    usage = Dataset()
    usage.ContrastBolusAgentNumber, usage.ContrastBolusAgentAdministered = 1, administered
    return usage


@pytest.mark.parametrize(("administered", "given"), [("YES", True), ("NO", False)])
def test_contrast_medium_in_one_frame_is_contrast_medium(administered: str, given: bool, slices: list[Dataset]) -> None:
    def edit(made: Dataset) -> None:
        frame(made, 5).ContrastBolusUsageSequence = Sequence([_usage(administered)])

    signs = facts_of(enhanced(slices, edit)).contrast_bolus
    assert (signs == ("ContrastBolusUsageSequence=present",)) is given
    assert bool(signs) is given


def test_contrast_medium_survives_a_legacy_conversion(slices: list[Dataset]) -> None:
    given = copy.deepcopy(slices)
    for one in given:
        one.ContrastBolusAgent, one.ContrastBolusVolume = "IOHEXOL 300", "95"
    facts = facts_of(LegacyConvertedEnhancedCTImage(given, generate_uid(), 7, generate_uid(), 1))
    assert {"ContrastBolusAgent=IOHEXOL 300", "ContrastBolusVolume=95"} <= set(facts.contrast_bolus)


def test_parts_of_a_concatenation_are_known(slices: list[Dataset]) -> None:
    assert facts_of(enhanced(slices)).concatenation_uid is None
    made = enhanced(slices, lambda made: setattr(made, "ConcatenationUID", "1.2.3.4"))
    assert facts_of(made).concatenation_uid == "1.2.3.4"


def _no_position(made: Dataset) -> None:
    del frame(made, 6).PlanePositionSequence


def _no_groups(made: Dataset) -> None:
    del made.PerFrameFunctionalGroupsSequence


def _frame_too_few(made: Dataset) -> None:
    made.PerFrameFunctionalGroupsSequence.pop()


@pytest.mark.parametrize("edit", [_no_position, _no_groups, _frame_too_few])
def test_frames_without_a_place_each_have_none(edit: Callable[[Dataset], None], slices: list[Dataset]) -> None:
    facts = facts_of(enhanced(slices, edit))
    assert (facts.frame_positions_lps_mm, facts.position_lps_mm) == ((), None)
    assert facts.per_frame() == (facts,)
    reasons = {reason.code for reason in assess_series([facts], DEFAULT_POLICY).reasons}
    assert "NO_GEOMETRY" in reasons


# However much it is


def test_two_thousand_frames(slices: list[Dataset]) -> None:
    made = _many(slices, 2000)
    facts = facts_of(made)
    assert len(facts.frame_positions_lps_mm) == len(facts.per_frame()) == 2000
    assert facts.frame_values == ()


def test_more_frames_than_are_read(slices: list[Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames_module, "MAX_FRAMES", 100)
    facts = facts_of(_many(slices, 101))
    assert (facts.frames, facts.frame_positions_lps_mm) == (101, ())
    assert len(facts_of(_many(slices, 100)).frame_positions_lps_mm) == 100


def _many(slices: list[Dataset], count: int) -> Dataset:
    made = enhanced(slices)
    items = list(made.PerFrameFunctionalGroupsSequence)
    made.PerFrameFunctionalGroupsSequence = Sequence([items[k % len(items)] for k in range(count)])
    made.NumberOfFrames, made.PixelData = count, b"\x00\x00"
    return made


@pytest.mark.parametrize("vr", [b"SQ", b"UN"])
@pytest.mark.parametrize("tag", [0x00081115, 0x52009229, 0x52009230, 0x00186011])
def test_millions_of_empty_items_are_never_built(tag: int, vr: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "MAX_ELEMENTS", 1000)
    item = struct.pack("<HHL", 0xFFFE, 0xE000, 0)
    for length, end in ((0xFFFFFFFF, struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)), (8 * 1001, b"")):
        bomb = struct.pack("<HH2s2xL", tag >> 16, tag & 0xFFFF, vr, length) + item * 1001 + end
        content = encoded(ct_slice(SOPClassUID=syntaxes.ENHANCED_CT_IMAGE_STORAGE, PixelData=None))
        before, behind = content[: content.index(_head(0x00100020))], content[content.index(_head(0x00100020)) :]
        source = BytesIO(before + bomb + behind if tag < 0x00100020 else before + behind + bomb)
        if length == 0xFFFFFFFF or tag == 0x52009230:
            with pytest.raises(HeaderError, match="too many elements"):
                read_facts(source, EXPLICIT)
        else:
            assert read_facts(source, EXPLICIT).patient_id == "P1"


def _head(tag: int) -> bytes:
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF)


def test_functional_groups_of_any_size_are_not_kept(slices: list[Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames_module, "MAX_GROUPS_BYTES", 500)
    for undefined in (False, True):
        made = enhanced(slices)
        _with_lengths(made, undefined)
        with pytest.raises(HeaderError, match="more than 500 bytes"):
            facts_of(made)


def test_every_prefix_gives_facts_or_a_header_error(slices: list[Dataset]) -> None:
    made = enhanced(slices)
    made["SharedFunctionalGroupsSequence"].is_undefined_length = True
    whole = as_file(made)
    end = whole.index(struct.pack("<HH", 0x7FE0, 0x0010))
    outcomes = set()
    for length in range(400, end, 97):
        try:
            outcomes.add(type(read_facts(BytesIO(whole[:length]))))
        except HeaderError:
            outcomes.add(HeaderError)
    assert outcomes == {InstanceFacts, HeaderError}
