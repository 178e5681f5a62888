"""Every rule of eligibility: what it accepts, what it refuses, and what it says."""

from __future__ import annotations

import math
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.domain import eligibility
from service.domain.eligibility import Verdict, assess_series, choose, patients_of, vendor_of
from service.domain.facts import InstanceFacts
from service.domain.policy import DEFAULT_POLICY, load_policy
from service.domain.reasons import Code

from .helpers import GOOD, enhanced, series


def codes(verdict: Verdict) -> list[Code]:
    return [reason.code for reason in verdict.reasons]


def test_a_good_series_is_eligible_without_a_word() -> None:
    assert assess_series(series(), DEFAULT_POLICY) == Verdict(True, (), ())


SPOILT: list[tuple[dict[str, Any], Code, str]] = [
    ({"modality": "MR"}, Code.NOT_CT, "Modality MR; CT is required."),
    ({"modality": None}, Code.NOT_CT, "Modality missing"),
    ({"has_pixels": False}, Code.NO_PIXELS, "all 160 images"),
    ({"position_lps_mm": None}, Code.NO_GEOMETRY, "all 160 images"),
    ({"pixel_spacing_mm": None}, Code.NO_GEOMETRY, "pixel spacing"),
    ({"row_cosine": (1.0, 1.0, 0.0)}, Code.NO_GEOMETRY, "orientation"),
    ({"rows": None}, Code.NO_GEOMETRY, "matrix"),
    ({"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, Code.LOCALIZER, "all 160 images"),
    ({"image_type": ("DERIVED", "PRIMARY", "AXIAL")}, Code.DERIVED, "DERIVED\\PRIMARY\\AXIAL"),
    ({"image_type": ("ORIGINAL", "SECONDARY", "OTHER")}, Code.DERIVED, "ORIGINAL\\PRIMARY is required"),
    ({"image_type": ()}, Code.DERIVED, "Image type missing"),
    ({"image_type": ("ORIGINAL", "PRIMARY", "AXIAL", "MONO_70")}, Code.MONOENERGETIC, "MONO"),
    ({"image_type": ("ORIGINAL", "PRIMARY", "AXIAL", "VMI")}, Code.MONOENERGETIC, "VMI"),
    ({"multienergy": True}, Code.MONOENERGETIC, "MultienergyCTAcquisition"),
    ({"series_description": "L-Spine MonoE 70 keV"}, Code.MONOENERGETIC, "70 keV"),
    ({"kvp": None}, Code.KVP_MISSING, "120 kVp is required."),
    ({"kvp": math.nan}, Code.KVP_MISSING, "120 kVp is required."),
    ({"kvp": 140.0}, Code.KVP_NOT_120, "140 kVp; 120 kVp is required."),
    ({"contrast_bolus": ("ContrastBolusAgent=APPLIED",)}, Code.CONTRAST_TAGGED, "ContrastBolusAgent=APPLIED"),
    ({"contrast_bolus": ("ContrastBolusVolume=100",)}, Code.CONTRAST_TAGGED, "ContrastBolusVolume=100"),
    ({"patient_age_years": None}, Code.AGE_UNKNOWN, "20 years or more is required."),
    ({"patient_age_years": 19.9}, Code.AGE_BELOW_MINIMUM, "Age 19.9 years; 20 years"),
    ({"slice_thickness_mm": 5.0}, Code.SLICES_TOO_THICK, "5 mm thick; at most 3 mm"),
    ({"slice_thickness_mm": None}, Code.THICKNESS_UNKNOWN, "missing"),
    ({"manufacturer": "ACME"}, Code.VENDOR_UNKNOWN, "ACME"),
    ({"manufacturer": None}, Code.VENDOR_UNKNOWN, "missing"),
    ({"convolution_kernel": ()}, Code.KERNEL_UNKNOWN, "missing"),
    ({"convolution_kernel": ("Br64f", "3")}, Code.KERNEL_NOT_ALLOWED, "Kernel Br64f; allowed for siemens: Br40"),
    ({"lossy": True}, Code.LOSSY, "all 160 images"),
    ({"gantry_tilt_deg": -12.0}, Code.GANTRY_TILT, "12.0 deg; at most 0.5 deg"),
    ({"gantry_tilt_deg": 0.54}, Code.GANTRY_TILT, "0.54 deg; at most 0.5 deg"),
    ({"rescale_slope": None}, Code.NO_RESCALE, "all 160 images"),
    ({"rescale_slope": 0.0}, Code.NO_RESCALE, "all 160 images"),
    ({"rescale_type": "OD"}, Code.NOT_HU, "OD"),
    ({"samples_per_pixel": 3}, Code.NOT_HU, "Colour"),
    ({"row_cosine": (0.0, 1.0, 0.0), "column_cosine": (0.0, 0.0, -1.0)}, Code.NOT_AXIAL, "90.0 deg off axial"),
    ({"row_cosine": (0.0, -1.0, 0.0), "column_cosine": (1.0, 0.0, 0.0)}, Code.NOT_AXIAL, "lies on the side"),
]


@pytest.mark.parametrize(("changes", "code", "words"), SPOILT, ids=lambda value: str(value)[:60])
def test_each_spoilt_value_is_refused_with_its_reason(changes: dict[str, Any], code: Code, words: str) -> None:
    verdict = assess_series(series(**changes), DEFAULT_POLICY)
    assert not verdict.eligible
    assert words in {reason.code: reason.text for reason in verdict.reasons}[code]
    assert verdict.cautions == ()


@pytest.mark.parametrize(("changes", "code", "words"), SPOILT, ids=lambda value: str(value)[:60])
def test_one_spoilt_image_of_many_is_enough(changes: dict[str, Any], code: Code, words: str) -> None:
    images = series()
    images[7] = replace(images[7], **changes)
    verdict = assess_series(images, DEFAULT_POLICY)
    if code is Code.AGE_UNKNOWN:  # one patient: the other images tell the age
        assert verdict.eligible
    elif code is Code.NOT_AXIAL:  # one turned slice is two geometries in one series as well
        assert {Code.NOT_AXIAL, Code.MIXED_GEOMETRY} <= set(codes(verdict))
    else:
        assert code in codes(verdict)


@pytest.mark.parametrize(
    ("sop_class", "expected"),
    [
        ("1.2.840.10008.5.1.4.1.1.7", [Code.SOP_CLASS_UNSUPPORTED]),
        ("1.2.840.10008.5.1.4.1.1.4.1", [Code.SOP_CLASS_UNSUPPORTED]),
    ],
)
def test_other_objects_get_only_the_rules_that_ask_what_they_are(sop_class: str, expected: list[Code]) -> None:
    verdict = assess_series(series(1, sop_class_uid=sop_class, kvp=None), DEFAULT_POLICY)
    assert codes(verdict) == expected


def test_a_report_is_no_ct_and_has_no_pixels() -> None:
    report = InstanceFacts("1", "1.1", "1.1.1", "1.2.840.10008.5.1.4.1.1.88.11", "1.2.840.10008.1.2.1", modality="SR")
    expected = [Code.NOT_CT, Code.SOP_CLASS_UNSUPPORTED, Code.NO_PIXELS]
    assert codes(assess_series([report], DEFAULT_POLICY)) == expected


def test_our_own_output_is_told_as_that_and_nothing_else() -> None:
    report = InstanceFacts("1", "1.1", "1.1.1", "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.1.2.1", modality="SR")
    ours = replace(report, own_output=True)
    assert codes(assess_series([ours], DEFAULT_POLICY)) == [Code.OWN_OUTPUT]
    foreign = replace(report, sop_instance_uid="1.1.2")
    assert Code.OWN_OUTPUT not in codes(assess_series([ours, foreign], DEFAULT_POLICY))


def test_several_frames_under_a_single_frame_class() -> None:
    assert codes(assess_series(series(1, frames=12), DEFAULT_POLICY)) == [Code.MULTIFRAME_UNSUPPORTED]


# Enhanced CT: one object, judged as the slices that it holds


@pytest.mark.parametrize("sop_class", sorted(eligibility.ENHANCED_CT))
def test_an_enhanced_ct_is_judged_as_the_series_of_its_frames(sop_class: str) -> None:
    assert assess_series([enhanced(series(), sop_class_uid=sop_class)], DEFAULT_POLICY) == Verdict(True, (), ())
    thick = series(80, step_mm=2.0, slice_thickness_mm=2.0)
    assert assess_series([enhanced(thick)], DEFAULT_POLICY) == assess_series(thick, DEFAULT_POLICY)


@pytest.mark.parametrize(("changes", "code", "words"), SPOILT, ids=lambda value: str(value)[:60])
def test_each_spoilt_value_of_an_enhanced_ct_is_refused(changes: dict[str, Any], code: Code, words: str) -> None:
    verdict = assess_series([enhanced(series(**changes))], DEFAULT_POLICY)
    words = words.replace("all 160 images", "the only image") if "position_lps_mm" in changes else words
    assert words in {reason.code: reason.text for reason in verdict.reasons}[code]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"kvp": 80.0}, Code.KVP_NOT_120, "80, 120 kVp"),
        ({"kvp": None}, Code.KVP_MISSING, "1 of 160 images"),
        ({"convolution_kernel": ("Br64f", "3")}, Code.KERNEL_NOT_ALLOWED, "Br64f"),
        ({"image_type": ("DERIVED", "PRIMARY", "VOLUME", "MEAN")}, Code.DERIVED, "DERIVED"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER", "NONE")}, Code.LOCALIZER, "1 of 160 images"),
        ({"slice_thickness_mm": 5.0}, Code.SLICES_TOO_THICK, "5 mm thick"),
        ({"pixel_spacing_mm": (0.9, 0.9)}, Code.MIXED_GEOMETRY, "pixel spacing"),
        ({"pixel_spacing_mm": None}, Code.NO_GEOMETRY, "1 of 160 images"),
        ({"row_cosine": (0.0, 1.0, 0.0), "column_cosine": (-1.0, 0.0, 0.0)}, Code.MIXED_GEOMETRY, "orientation"),
        ({"gantry_tilt_deg": 9.0}, Code.GANTRY_TILT, "9.0 deg"),
        ({"rescale_intercept": None}, Code.NO_RESCALE, "1 of 160 images"),
        ({"rescale_type": "OD"}, Code.NOT_HU, "OD"),
        ({"multienergy": True}, Code.MONOENERGETIC, "MultienergyCTAcquisition"),
    ],
)
def test_one_frame_that_differs_is_enough(changes: dict[str, Any], code: Code, words: str) -> None:
    frames = series()
    frames[7] = replace(frames[7], **changes)
    verdict = assess_series([enhanced(frames)], DEFAULT_POLICY)
    assert words in {reason.code: reason.text for reason in verdict.reasons}[code]


def test_frames_may_have_intercepts_of_their_own() -> None:
    frames = [replace(one, rescale_intercept=-1024.0 + k) for k, one in enumerate(series())]
    assert assess_series([enhanced(frames)], DEFAULT_POLICY).eligible


def test_two_phases_in_one_object_lie_at_the_same_places() -> None:
    assert codes(assess_series([enhanced([*series(), *series()])], DEFAULT_POLICY)) == [Code.DUPLICATE_POSITION]


def test_a_frame_is_missing_in_an_enhanced_ct() -> None:
    frames = series()
    assert codes(assess_series([enhanced(frames[:80] + frames[81:])], DEFAULT_POLICY)) == [Code.MISSING_SLICE]


def test_one_series_holds_one_enhanced_object() -> None:
    half = [enhanced(series()[:80], sop_instance_uid="1.1"), enhanced(series()[80:], sop_instance_uid="1.2")]
    verdict = assess_series(half, DEFAULT_POLICY)
    assert codes(verdict) == [Code.MULTIFRAME_UNSUPPORTED]
    assert verdict.reasons[0].text.startswith("2 enhanced CT objects in one series")
    mixed = assess_series([half[0], *series()[80:]], DEFAULT_POLICY)
    assert codes(mixed) == [Code.MULTIFRAME_UNSUPPORTED]
    assert mixed.reasons[0].text.startswith("1 enhanced CT object and 80 other objects")


def test_parts_of_a_concatenation_are_refused_for_what_they_are() -> None:
    parts = [
        enhanced(series()[start : start + 40], sop_instance_uid=f"1.{start}", concatenation_uid="1.9")
        for start in range(0, 160, 40)
    ]
    verdict = assess_series(parts, DEFAULT_POLICY)
    assert codes(verdict) == [Code.CONCATENATION]
    assert verdict.reasons[0].text.startswith("4 objects are parts of a concatenation")
    assert codes(assess_series(parts[:1], DEFAULT_POLICY)) == [Code.CONCATENATION]


def test_frames_too_many_to_be_read_are_refused_for_their_number() -> None:
    verdict = assess_series([replace(enhanced(series()), frames=9000, frame_positions_lps_mm=())], DEFAULT_POLICY)
    assert {reason.code: reason.text for reason in verdict.reasons}[Code.TOO_MANY_SLICES].startswith("9000 slices")


def test_an_enhanced_ct_and_a_plain_series_are_chosen_by_the_same_rules() -> None:
    thin = [replace(enhanced(series()), series_number=9)]
    choice = _chosen(("1.a", series(80, step_mm=2.0, slice_thickness_mm=2.0)), ("1.b", thin))
    assert choice.series_uid == "1.b"
    assert "1 mm slices, kernel Br40d, 160 mm long" in choice.text


def test_all_reasons_are_given_not_only_the_first() -> None:
    images = series(20, kvp=140.0, patient_age_years=None, contrast_bolus=("ContrastBolusAgent=APPLIED",))
    expected = {Code.KVP_NOT_120, Code.AGE_UNKNOWN, Code.CONTRAST_TAGGED, Code.COVERAGE_TOO_SHORT}
    assert set(codes(assess_series(images, DEFAULT_POLICY))) == expected


def test_one_file_with_everything_missing_gets_a_verdict() -> None:
    bare = InstanceFacts("1", "1.1", "1.1.1", "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2")
    found = codes(assess_series([bare], DEFAULT_POLICY))
    assert {Code.NO_PIXELS, Code.NO_GEOMETRY, Code.KVP_MISSING, Code.AGE_UNKNOWN, Code.KERNEL_UNKNOWN} <= set(found)


def test_a_series_without_an_image_is_unreadable() -> None:
    assert codes(assess_series([], DEFAULT_POLICY)) == [Code.UNREADABLE]


@pytest.mark.parametrize(
    "tag", ["ContrastBolusAgent=", "ContrastBolusAgent=None", "ContrastBolusAgent= NO ", "ContrastBolusVolume=0.0", ""]
)
def test_a_tag_that_denies_contrast_is_no_contrast(tag: str) -> None:
    assert assess_series(series(contrast_bolus=(tag,)), DEFAULT_POLICY).eligible


@pytest.mark.parametrize(
    ("manufacturer", "vendor"),
    [
        ("SIEMENS", "siemens"),
        ("Siemens Healthineers", "siemens"),
        ("TOSHIBA", "canon"),
        ("Canon Medical Systems", "canon"),
        ("CANON_MEC", "canon"),
        ("Philips", "philips"),
        ("Philips Medical Systems", "philips"),
        ("GE MEDICAL SYSTEMS", "ge"),
        ("GE Healthcare", "ge"),
        ("General Electric", "ge"),
        ("Genoray", None),
        ("", None),
    ],
)
def test_makers_as_they_write_themselves(manufacturer: str, vendor: str | None) -> None:
    assert vendor_of(manufacturer) == vendor


@pytest.mark.parametrize(
    ("manufacturer", "kernel", "allowed"),
    [
        ("TOSHIBA", ("FC03",), True),
        ("CANON_MEC", ("fc18",), True),
        ("TOSHIBA", ("FC30",), False),
        ("TOSHIBA", ("FC03f",), False),
        ("SIEMENS", ("Br38f", "3"), True),
        ("SIEMENS", ("B30f",), True),
        ("SIEMENS", ("b31s",), True),
        ("SIEMENS", ("Qr40d", "2"), True),
        ("SIEMENS", ("B50f",), False),
        ("SIEMENS", ("3", "Br38f"), False),
        ("SIEMENS", ("Br450",), False),
        ("Philips", ("B",), True),
        ("Philips", ("D",), False),
        ("Philips", ("YA",), False),
        ("GE MEDICAL SYSTEMS", ("STANDARD",), True),
        ("GE MEDICAL SYSTEMS", ("BONEPLUS",), False),
    ],
)
def test_kernels(manufacturer: str, kernel: tuple[str, ...], allowed: bool) -> None:
    verdict = assess_series(series(manufacturer=manufacturer, convolution_kernel=kernel), DEFAULT_POLICY)
    assert codes(verdict) == ([] if allowed else [Code.KERNEL_NOT_ALLOWED])


@pytest.mark.parametrize(
    ("thickness", "eligible", "cautions"),
    [(0.5, True, []), (1.0, True, []), (1.25, True, [Code.SLICES_THICK]), (3.0, True, [Code.SLICES_THICK])],
)
def test_thickness_bands(thickness: float, eligible: bool, cautions: list[Code]) -> None:
    verdict = assess_series(series(slice_thickness_mm=thickness), DEFAULT_POLICY)
    assert (verdict.eligible, [caution.code for caution in verdict.cautions]) == (eligible, cautions)


def test_thin_slices_far_apart_are_as_coarse_as_thick_ones() -> None:
    verdict = assess_series(series(40, step_mm=5.0), DEFAULT_POLICY)
    assert codes(verdict) == [Code.SLICES_TOO_THICK]
    assert "5 mm apart" in verdict.reasons[0].text


@pytest.mark.parametrize("row", [(1.0, 0.0, 0.0), (-1.0, 0.0, 0.0)])
@pytest.mark.parametrize("column", [(0.0, 1.0, 0.0), (0.0, -1.0, 0.0)])
def test_supine_prone_head_first_and_feet_first_are_axial(row: Any, column: Any) -> None:
    assert assess_series(series(row_cosine=row, column_cosine=column), DEFAULT_POLICY).eligible


@pytest.mark.parametrize(("lean_deg", "axial"), [(4.0, True), (6.0, False)])
def test_a_slightly_rotated_patient_is_still_axial(lean_deg: float, axial: bool) -> None:
    cos, sin = math.cos(math.radians(lean_deg)), math.sin(math.radians(lean_deg))
    images = series(row_cosine=(cos, sin, 0.0), column_cosine=(-sin, cos, 0.0))
    assert (Code.NOT_AXIAL not in codes(assess_series(images, DEFAULT_POLICY))) is axial


def test_tilt_is_seen_in_the_positions_even_without_its_tag() -> None:
    lean = math.radians(10)
    images = series(gantry_tilt_deg=None, column_cosine=(0.0, math.cos(lean), math.sin(lean)))
    verdict = assess_series(images, DEFAULT_POLICY)
    assert Code.GANTRY_TILT in codes(verdict)
    assert any("10.0 deg off their normal" in reason.text for reason in verdict.reasons)


def test_a_missing_slice_is_named_with_its_place() -> None:
    images = series()
    del images[80]
    verdict = assess_series(images, DEFAULT_POLICY)
    assert codes(verdict) == [Code.MISSING_SLICE]
    assert verdict.reasons[0].text == "1 slice missing: between -121.0 and -119.0 mm (spacing 1 mm)."


def test_several_missing_slices_are_counted() -> None:
    images = series()
    del images[80:83], images[20]
    assert assess_series(images, DEFAULT_POLICY).reasons[0].text.startswith("4 slices missing: ")


def test_an_uneven_step_is_no_missing_slice() -> None:
    images = series()
    images = [*images[:80], *(replace(one, position_lps_mm=_moved(one, 0.5)) for one in images[80:])]
    verdict = assess_series(images, DEFAULT_POLICY)
    assert codes(verdict) == [Code.SPACING_UNEVEN]
    assert "1.5 mm instead of 1 mm" in verdict.reasons[0].text


def test_positions_rounded_to_a_tenth_are_even() -> None:
    images = [replace(one, position_lps_mm=(-150.0, -150.0, round(k * 0.625, 1))) for k, one in enumerate(series(240))]
    assert assess_series(images, DEFAULT_POLICY).eligible


def test_two_acquisitions_at_one_place_are_duplicates() -> None:
    again = [replace(one, sop_instance_uid=f"{one.sop_instance_uid}.2", acquisition_number=2) for one in series()]
    verdict = assess_series([*series(), *again], DEFAULT_POLICY)
    assert codes(verdict) == [Code.DUPLICATE_POSITION]
    assert "acquisitions 1, 2 share the series" in verdict.reasons[0].text


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rows": 256}, "matrix"),
        ({"pixel_spacing_mm": (0.8, 0.8)}, "pixel spacing"),
        ({"row_cosine": (-1.0, 0.0, 0.0)}, "orientation"),
        ({"frame_of_reference_uid": "1.9"}, "frame of reference"),
    ],
)
def test_two_geometries_in_one_series(changes: dict[str, Any], word: str) -> None:
    images = series()
    images[10] = replace(images[10], **changes)
    found = {reason.code: reason.text for reason in assess_series(images, DEFAULT_POLICY).reasons}
    assert word in found[Code.MIXED_GEOMETRY]


def test_too_short_and_too_many() -> None:
    assert codes(assess_series(series(100), DEFAULT_POLICY)) == [Code.COVERAGE_TOO_SHORT]
    assert codes(assess_series(series(1), DEFAULT_POLICY)) == [Code.COVERAGE_TOO_SHORT]
    few = load_policy("[eligibility]\nslices_maximum = 150")
    assert codes(assess_series(series(), few)) == [Code.TOO_MANY_SLICES]


def test_conflicting_copies() -> None:
    assert codes(assess_series(series(), DEFAULT_POLICY, conflicts=2)) == [Code.CONFLICTING_COPIES]


def test_a_site_may_change_its_kernels() -> None:
    policy = load_policy('[eligibility.kernels]\nsiemens = ["Bv40"]')
    assert assess_series(series(convolution_kernel=("Bv40f", "3")), policy).eligible
    assert not assess_series(series(), policy).eligible


def test_header_text_cannot_break_a_sentence() -> None:
    verdict = assess_series(series(manufacturer="A\n\x00" + "B" * 500), DEFAULT_POLICY)
    assert verdict.reasons[0].text.isprintable()
    assert len(verdict.reasons[0].text) < 200


# What holds for any facts

_ODD_FLOATS = st.none() | st.floats() | st.sampled_from([0.0, 1.0, 120.0, -1e308, 1e308])
_ODD_TEXTS = st.none() | st.text(max_size=8) | st.sampled_from(["CT", "SIEMENS", "ORIGINAL", "Br40", "HU"])
_ODD_VECTORS = st.none() | st.tuples(*[st.floats()] * 3) | st.sampled_from([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
_ODD_INTS = st.none() | st.integers(-5, 5000)
_BY_TYPE: dict[str, st.SearchStrategy[Any]] = {
    "str": st.text(max_size=8),
    "str | None": _ODD_TEXTS,
    "float | None": _ODD_FLOATS,
    "int | None": _ODD_INTS,
    "int": st.integers(-2, 3),
    "bool": st.booleans(),
    "tuple[str, ...]": st.lists(st.text(max_size=8), max_size=3).map(tuple),
    "Vector | None": _ODD_VECTORS,
    "tuple[Vector, ...]": st.lists(st.tuples(*[st.floats()] * 3), max_size=3).map(tuple),
    "tuple[tuple[str, tuple[Any, ...]], ...]": st.lists(
        st.tuples(
            st.sampled_from(["kvp", "row_cosine", "rescale_slope"]),
            st.lists(st.none(), max_size=3).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    "tuple[float, float] | None": st.none() | st.tuples(st.floats(), st.floats()),
}


@st.composite
def any_facts(draw: st.DrawFn) -> InstanceFacts:
    """A good slice of a CT with any number of its facts replaced by anything of their type."""
    spoilt = draw(st.sets(st.sampled_from([field.name for field in fields(InstanceFacts)])))
    changes = {field.name: draw(_BY_TYPE[str(field.type)]) for field in fields(GOOD) if field.name in spoilt}
    return replace(GOOD, **{"sop_instance_uid": draw(st.sampled_from(["1.1", "1.2", "1.3"])), **changes})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(images=st.lists(any_facts(), max_size=5), seed=st.integers(0, 1000), conflicts=st.integers(0, 2))
def test_no_facts_make_it_raise_and_their_order_does_not_matter(
    images: list[InstanceFacts], seed: int, conflicts: int
) -> None:
    verdict = assess_series(images, DEFAULT_POLICY, conflicts=conflicts)
    shuffled = random.Random(seed).sample(images, len(images))
    assert assess_series(shuffled, DEFAULT_POLICY, conflicts=conflicts) == verdict
    assert verdict.eligible is (not verdict.reasons)
    choice = choose({"a": (images, verdict), "b": (shuffled, verdict)}, DEFAULT_POLICY)
    assert choice.series_uid in ("a", None)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), dropped=st.sets(st.integers(0, 159), max_size=3))
def test_shuffled_slices_give_the_same_verdict(seed: int, dropped: set[int]) -> None:
    images = [one for k, one in enumerate(series()) if k not in dropped]
    shuffled = random.Random(seed).sample(images, len(images))
    assert assess_series(shuffled, DEFAULT_POLICY) == assess_series(images, DEFAULT_POLICY)


# The choice


def _moved(facts: InstanceFacts, by_mm: float) -> tuple[float, float, float]:
    assert facts.position_lps_mm is not None
    x, y, z = facts.position_lps_mm
    return (x, y, z + by_mm)


def _chosen(*candidates: tuple[str, list[InstanceFacts]]) -> eligibility.Choice:
    return choose({uid: (one, assess_series(one, DEFAULT_POLICY)) for uid, one in candidates}, DEFAULT_POLICY)


@pytest.mark.parametrize(
    ("loser", "why"),
    [
        ({"slice_thickness_mm": 2.0}, "its slices are further from the paper's"),
        ({"convolution_kernel": ("B30f",)}, "its kernel comes later on the allow-list"),
        ({"n": 150}, "it covers less"),
        ({"series_number": 9}, "it is as good, with a higher series number or UID"),
    ],
)
def test_the_better_series_is_chosen_and_the_text_says_why(loser: dict[str, Any], why: str) -> None:
    number = loser.pop("series_number", 2)
    choice = _chosen(("1.b", series(**loser, series_number=number)), ("1.a", series()))
    assert choice.series_uid == "1.a"
    assert choice.text.startswith("Series 3 was chosen (1 mm slices, kernel Br40d, 160 mm long)")
    assert f"series {number} was not: {why}" in choice.text
    assert choice.reason.code is Code.CHOSEN
    assert {uid: reason.code for uid, reason in choice.reasons.items()} == {
        "1.a": Code.CHOSEN,
        "1.b": Code.NOT_CHOSEN,
    }


def test_within_the_papers_thickness_the_kernel_decides() -> None:
    thin = series(320, step_mm=0.5, slice_thickness_mm=0.5, convolution_kernel=("B30f",))
    assert _chosen(("1.a", thin), ("1.b", series())).series_uid == "1.b"


def test_refused_series_are_named_with_their_codes() -> None:
    choice = _chosen(("1.a", series()), ("1.b", series(kvp=140.0, series_number=4)))
    assert "series 4 is not eligible (KVP_NOT_120)" in choice.text


def test_no_eligible_series() -> None:
    choice = _chosen(("1.b", series(kvp=140.0)))
    assert (choice.series_uid, choice.reason.code) == (None, Code.NO_ELIGIBLE_SERIES)
    assert choice.text == "No series is eligible; series 3 is not eligible (KVP_NOT_120)."
    assert choose({}, DEFAULT_POLICY).text == "No series is eligible."


def test_every_code_of_the_header_rules_has_a_case() -> None:
    """The table above, and the tests beside it, reach every code that this module can give."""
    source = Path(eligibility.__file__).read_text(encoding="utf-8")
    given_here = {code for code in Code if f"Code.{code}" in source}
    tests = Path(__file__).read_text(encoding="utf-8")
    assert given_here
    assert not {code for code in given_here if f"Code.{code}" not in tests}


def test_one_series_names_one_patient() -> None:
    """An ID, a birth date, a sex; what is not told contradicts nothing, nor does a sex that is neither F nor M."""
    told = series(patient_id="P1", patient_sex="F", patient_birth_date="19500101")
    assert assess_series(told, DEFAULT_POLICY).eligible
    for change in ({"patient_id": None}, {"patient_sex": "O"}, {"patient_birth_date": ""}, {"patient_id": "P1 "}):
        assert assess_series([*told[:-1], replace(told[-1], **change)], DEFAULT_POLICY).eligible
    for change, words in (
        ({"patient_id": "P2"}, "(2 patient IDs)"),
        ({"patient_sex": "M"}, "(2 sexes)"),
        ({"patient_id": "P2", "patient_birth_date": "19500102"}, "(2 patient IDs, 2 birth dates)"),
    ):
        verdict = assess_series([*told[:-1], replace(told[-1], **change)], DEFAULT_POLICY)
        assert codes(verdict) == [Code.PATIENT_MISMATCH]
        assert words in verdict.reasons[0].text
    elsewhere = patients_of([*told, replace(told[0], patient_id="P2")])
    assert codes(assess_series(told, DEFAULT_POLICY, patients=elsewhere)) == [Code.PATIENT_MISMATCH]
    own = patients_of([*told, replace(told[0], patient_id="P2", own_output=True)])
    assert assess_series(told, DEFAULT_POLICY, patients=own).eligible


def test_slices_that_are_rescaled_each_in_its_own_way_are_a_caution() -> None:
    told = series()
    mixed = [*told[:-1], replace(told[-1], rescale_intercept=0.0)]
    verdict = assess_series(mixed, DEFAULT_POLICY)
    assert verdict.eligible
    assert [one.code for one in verdict.cautions if one.code is Code.RESCALE_DIFFERS] == [Code.RESCALE_DIFFERS]
    assert Code.RESCALE_DIFFERS not in [one.code for one in assess_series(told, DEFAULT_POLICY).cautions]
