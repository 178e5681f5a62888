"""DXA results in structured reports: recognised by what they say, read without a guess, refused with reasons."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain.content import CODE, CONTAINER, DATE, NUM, TEXT, Concept, Item
from service.domain.dxa import DxaScan, Validity, refusals
from service.domain.dxa_sr import NoDxa, read_report
from service.domain.facts import InstanceFacts
from service.domain.reasons import Code, Reason

FACTS = InstanceFacts(
    "1.2", "1.2.3", "1.2.3.4", "1.2.840.10008.5.1.4.1.1.88.22", "1.2.840.10008.1.2.1", "SR",
    patient_id="P1", patient_sex="F", study_date="20260304", manufacturer="GE Healthcare", model_name="Lunar Prodigy",
)  # fmt: skip
AREAS = {"L1": 11.0, "L2": 12.0, "L3": 14.0, "L4": 16.0}
DENSITIES = {"L1": 0.9, "L2": 0.95, "L3": 1.0, "L4": 1.05}


def named(meaning: str, value: str = "X", scheme: str = "99TEST") -> Concept:
    return Concept(value, scheme, meaning)


def num(meaning: str, value: object, unit: str = "", *below: Item) -> Item:
    return Item(NUM, named(meaning), number=str(value), unit=Concept(unit, "UCUM", unit), items=below)


def box(meaning: str, *items: Item) -> Item:
    return Item(CONTAINER, named(meaning), items=items)


def region(name: str, bmd: float, area: float, *more: Item) -> Item:
    figures = (num("BMD", bmd, "g/cm2"), num("BMC", round(bmd * area, 3), "g"), num("Area", area, "cm2"))
    return box("Region", Item(TEXT, named("Region"), text=name), *figures, *more)


def levels() -> list[Item]:
    return [region(name, DENSITIES[name], AREAS[name]) for name in AREAS]


def spine(*more: Item) -> Item:
    return box("Bone Densitometry Report", box("AP Spine", *levels(), *more))


def scan(root: Item, **facts: Any) -> DxaScan:
    found = read_report(root, replace(FACTS, **facts))
    assert isinstance(found, DxaScan), found
    return found


def codes(root: Item, **facts: Any) -> list[Code]:
    found = read_report(root, replace(FACTS, **facts))
    assert isinstance(found, tuple), found
    return [reason.code for reason in found]


def test_a_report_in_words_gives_every_figure() -> None:
    found = scan(spine(region("L1-L4", 0.983, 53.0, num("Young Adult T-score", -1.4), num("TBS", 1.31, "1"))))
    assert refusals(found, date(2026, 11, 28)) == ()
    assert {name: level.figures.bmd_g_cm2 for name, level in found.levels.items()} == DENSITIES
    assert found.levels["L2"].figures.area_cm2 == 12.0
    assert (found.total.bmd_g_cm2, found.total.t_score, found.total.tbs) == (0.983, -1.4, 1.31)
    assert (found.manufacturer, found.model, found.scan_date) == ("GE Lunar", "Lunar Prodigy", date(2026, 3, 4))
    assert (found.patient_id, found.sex, found.scan_id, found.synthetic) == ("P1", "F", "", False)


def test_codes_alone_are_enough() -> None:
    site = Item(CODE, Concept("G-C0E3", "SRT", "?"), code=Concept("T-11920", "SRT", "?"))
    density = Item(NUM, Concept("24966-4", "LN", "?"), number="0.95", unit=Concept("g/cm2", "UCUM", ""), items=(site,))
    score = Item(NUM, Concept("38267-1", "LN", "?"), number="-1.6", unit=Concept("{T-score}", "UCUM"), items=(site,))
    found = scan(box("?", density, score), manufacturer="A maker", model_name="A device")
    assert list(found.levels) == ["L2"]
    assert (found.levels["L2"].figures.bmd_g_cm2, found.levels["L2"].figures.t_score) == (0.95, -1.6)


@pytest.mark.parametrize(
    ("told", "bmd", "area"), [("L1-L4(L3)", 0.977, 39.0), ("L1,L2,L4", 0.977, 39.0), ("L2-4", 1.007, 42.0)]
)
def test_a_level_that_the_total_leaves_out_does_not_count(told: str, bmd: float, area: float) -> None:
    found = scan(spine(region(told, bmd, area)))
    out = "L1" if told == "L2-4" else "L3"
    assert found.levels[out].validity is Validity.OTHER
    assert refusals(found, date(2026, 11, 28)) == ()


def test_a_total_without_levels_in_its_name_belongs_to_the_spine() -> None:
    assert scan(spine(region("Total", 0.983, 53.0))).total.bmd_g_cm2 == 0.983
    report = box("DXA", box("AP Spine", *levels()), box("Left Hip", region("Total", 0.8, 30.0)))
    assert scan(report).total.bmd_g_cm2 is None


def test_other_parts_of_the_body_are_passed_over_and_a_report_of_nothing_else_says_so() -> None:
    hip = box("Left Femur", region("Neck", 0.8, 5.0), region("Total", 0.85, 33.0))
    lateral = box("Lateral Spine", region("L2", 0.6, 9.0))
    found = scan(box("DXA of spine and hip", box("AP Spine", *levels()), hip, lateral))
    assert found.levels["L2"].figures.bmd_g_cm2 == 0.95
    assert codes(box("DXA", hip)) == [Code.DXA_REGION]
    assert codes(box("DXA", num("BMD", 0.9, "g/cm2"))) == [Code.DXA_REGION]  # of which part, nobody knows
    assert codes(box("DXA", region("L5", 0.9, 17.0))) == [Code.DXA_REGION]


@pytest.mark.parametrize(("unit", "value"), [("mg/cm2", 900), ("gm/cm²", 0.9), ("g / cm^2", 0.9)])
def test_units_are_read_and_not_guessed(unit: str, value: float) -> None:
    found = scan(box("DXA", box("L1", num("BMD", value, unit))))
    assert found.levels["L1"].figures.bmd_g_cm2 == pytest.approx(0.9)


@pytest.mark.parametrize(("name", "unit"), [("BMD", "mg/cm3"), ("BMD", ""), ("T-score", "%"), ("Area", "g")])
def test_a_wrong_unit_refuses_the_report(name: str, unit: str) -> None:
    assert codes(box("DXA", box("L1", num("BMD", 0.9, "g/cm2")), box("L2", num(name, 1.0, unit)))) == [Code.DXA_UNIT]


def test_figures_about_a_figure_are_not_that_figure() -> None:
    around = [num(f"BMD {about}", 0.5, "g/cm2") for about in ("change", "of previous scan", "Young Adult Reference")]
    found = scan(box("DXA", box("L1", num("BMD", 0.9, "g/cm2"), num("T-score change", 0.3), *around)))
    assert (found.levels["L1"].figures.bmd_g_cm2, found.levels["L1"].figures.t_score) == (0.9, None)


def test_two_scans_in_one_report_are_not_mixed() -> None:
    twice = box("DXA", box("L1", num("BMD", 0.9, "g/cm2")), box("L1", num("BMD", 0.8, "g/cm2")))
    assert codes(twice) == [Code.DXA_ROW]
    same = box("DXA", box("L1", num("BMD", 0.9, "g/cm2")), box("L1", num("BMD", 0.9, "g/cm2")))
    assert scan(same).levels["L1"].figures.bmd_g_cm2 == 0.9


def test_zero_means_not_measured_and_rubbish_is_told() -> None:
    assert scan(box("DXA", box("L1", num("BMD", 0.9, "g/cm2")), box("L2", num("BMD", 0, "g/cm2")))).included == ("L1",)
    for rubbish in ("nan", "1e999", "a lot"):
        assert codes(box("DXA", box("L1", num("BMD", rubbish, "g/cm2")))) == [Code.DXA_VALUE]


def test_what_is_no_dxa_result_is_left_alone() -> None:
    assert read_report(box("Chest CAD", num("Diameter", 3, "mm")), FACTS) == NoDxa()
    assert read_report(Item(""), FACTS) == NoDxa()


@pytest.mark.parametrize(
    "evidence",
    [
        Item(CODE, named("Procedure"), code=Concept("77477000", "SCT", "Computerized tomography")),
        Item(TEXT, Concept("111001", "DCM", "Algorithm Name"), text="Bone from CT"),
    ],
)
def test_a_density_from_a_ct_is_never_taken_for_dxa(evidence: Item) -> None:
    found = read_report(box("Bone densitometry", evidence, *levels()), FACTS)
    assert isinstance(found, NoDxa)
    assert found.reason is not None
    assert found.reason.code is Code.DXA_METHOD


def test_a_density_of_an_unnamed_method_is_not_taken_either() -> None:
    root, unknown = box("Report", *levels()), {"manufacturer": "A maker", "model_name": "X1"}
    found = read_report(root, replace(FACTS, **unknown))
    assert isinstance(found, NoDxa)
    assert found.reason is not None
    method = Item(CODE, named("Procedure"), code=Concept("241686001", "SCT", "Dual energy X-Ray absorptiometry"))
    assert scan(box("Report", method, *levels()), **unknown).model == "X1"


def test_the_day_is_what_the_report_says_it_is() -> None:
    def told(*days: str) -> Item:
        return spine(*(Item(DATE, named("Scan Date"), text=day) for day in days))

    assert scan(told("20260301")).scan_date == date(2026, 3, 1)
    assert scan(told("20260301", "20260304")).scan_date == date(2026, 3, 4)  # one of them is the study's
    assert codes(told("20260301", "20260302")) == [Code.DXA_DATE]
    assert codes(spine(), study_date=None) == [Code.DXA_DATE]


def test_an_earlier_scan_in_the_report_gives_neither_day_nor_figures() -> None:
    for name in ("Previous Scan Date", "Baseline Exam Date", "Date of the last scan"):
        told = spine(Item(DATE, named(name), text="20240105"))
        assert scan(told).scan_date == date(2026, 3, 4)
    before = box("Prior Exam", Item(DATE, named("Scan Date"), text="20240105"), region("L1", 0.5, 11.0))
    found = scan(spine(before))
    assert found.scan_date == date(2026, 3, 4)
    assert found.levels["L1"].figures.bmd_g_cm2 != 0.5


def test_a_first_examination_is_called_baseline_and_read_all_the_same() -> None:
    for title in ("Bone Densitometry Baseline Examination", "Bone Densitometry Report with Comparison to Prior"):
        found = scan(box(title, box("AP Spine", *levels(), Item(DATE, named("Scan Date"), text="20260301"))))
        assert len(found.levels) == len(AREAS)
        assert found.scan_date == date(2026, 3, 1)


def test_the_observing_device_stands_before_the_one_that_wrote_the_report() -> None:
    observer = (
        Item(TEXT, Concept("121014", "DCM", "Device Observer Manufacturer"), text="Hologic"),
        Item(TEXT, Concept("121015", "DCM", "Device Observer Model Name"), text="Horizon A"),
    )
    found = scan(box("Report", *observer, *levels()), manufacturer="A report server", model_name="1")
    assert (found.manufacturer, found.model) == ("Hologic", "Horizon A")


WORDS = st.sampled_from(
    ["BMD", "bone density", "T-score", "Z-score", "Area", "BMC", "TBS", "L1", "L2-L4", "L1-L4(L3)", "L4-L1", "Femur",
     "Lumbar spine", "Scan Date", "Region", "(L1", "L1-", "", "DXA", "\x00", "L1,,L2", "%", "Lateral"]
)  # fmt: skip
CONCEPTS = st.builds(Concept, WORDS, st.sampled_from(["LN", "SCT", "DCM", ""]), WORDS)
LEAVES = st.builds(
    Item,
    st.sampled_from([NUM, TEXT, CODE, DATE, CONTAINER, ""]),
    CONCEPTS,
    WORDS,
    CONCEPTS,
    st.sampled_from(["0.9", "-1", "nan", "1e400", "x", "", "1_0"]),
    st.builds(Concept, st.sampled_from(["g/cm2", "g", "cm2", "1", "%", ""])),
)
TREES = st.recursive(LEAVES, lambda below: st.builds(
    lambda item, items: replace(item, items=tuple(items)), LEAVES, st.lists(below, max_size=4)
), max_leaves=12)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_no_content_however_odd_breaks_the_reading(root: Item) -> None:
    found = read_report(root, FACTS)
    if isinstance(found, DxaScan):
        refusals(found, date(2026, 11, 28))
    else:
        assert isinstance(found, NoDxa) or all(isinstance(reason, Reason) for reason in found)
        assert isinstance(found, NoDxa) or found
