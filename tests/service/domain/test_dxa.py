"""DXA results: what is taken, what is refused and by which code, and how CSV layouts are read."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

import pytest

from service.domain.dxa import (
    DxaScan,
    Figures,
    Level,
    Validity,
    included_in,
    manufacturer_named,
    recompute,
    refusals,
)
from service.domain.dxa_csv import Defaults, read_csv
from service.domain.reasons import Code

TODAY = date(2026, 11, 28)
AREAS = {"L1": 11.0, "L2": 12.0, "L3": 14.0, "L4": 16.0}
DENSITIES = {"L1": 0.90, "L2": 0.95, "L3": 1.00, "L4": 1.05}


def figures(bmd: float, area: float, **more: float) -> Figures:
    return Figures(bmd_g_cm2=bmd, bmc_g=round(bmd * area, 2), area_cm2=area, **more)


def scan(**changes: Any) -> DxaScan:
    levels = {name: Level(figures(DENSITIES[name], AREAS[name])) for name in AREAS}
    content = sum(DENSITIES[name] * AREAS[name] for name in AREAS)
    total = Figures(round(content / sum(AREAS.values()), 3), round(content, 2), sum(AREAS.values()))
    told: dict[str, Any] = {"patient_id": "P1", "scan_date": date(2026, 3, 4), "manufacturer": "GE Lunar"}
    return DxaScan(**{**told, "model": "Prodigy", "levels": levels, "total": total, **changes})


def codes(one: DxaScan) -> list[Code]:
    return [reason.code for reason in refusals(one, TODAY)]


def with_level(name: str, level: Level, **changes: Any) -> DxaScan:
    known = scan()
    return replace(known, levels={**known.levels, name: level}, **changes)


def test_a_sound_result_is_taken_and_its_total_recomputed_both_ways() -> None:
    assert codes(scan()) == []
    found = recompute(scan())
    assert found.by_area_g_cm2 == pytest.approx(52.1 / 53, abs=1e-4)  # sum BMC / sum area, not the mean of the levels
    assert found.mean_g_cm2 == pytest.approx(0.975)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"patient_id": " "}, Code.DXA_PATIENT_MISSING),
        ({"patient_id": "x" * 65}, Code.DXA_VALUE),
        ({"patient_id": "a\nb"}, Code.DXA_VALUE),
        ({"scan_date": date(2026, 11, 29)}, Code.DXA_DATE),
        ({"scan_date": date(1986, 12, 31)}, Code.DXA_DATE),
        ({"manufacturer": ""}, Code.DXA_DEVICE_MISSING),
        ({"model": ""}, Code.DXA_DEVICE_MISSING),
        ({"region": "hip"}, Code.DXA_REGION),
        ({"sex": "W"}, Code.DXA_VALUE),
        ({"levels": {}}, Code.DXA_NO_LEVEL),
        ({"total": Figures(bmd_g_cm2=1.10)}, Code.DXA_TOTAL_MISMATCH),
        ({"total": Figures(bmc_g=60.0)}, Code.DXA_TOTAL_MISMATCH),
        ({"total": Figures(area_cm2=42.0)}, Code.DXA_TOTAL_MISMATCH),
        ({"total": Figures(tbs=2.1)}, Code.DXA_RANGE),
    ],
)
def test_what_is_refused_has_its_code(changes: dict[str, Any], code: Code) -> None:
    assert codes(scan(**changes)) == [code]


@pytest.mark.parametrize(
    ("level", "code"),
    [
        (Level(Figures(bmd_g_cm2=950.0)), Code.DXA_UNIT),
        (Level(Figures(bmd_g_cm2=0.95, area_cm2=1200.0)), Code.DXA_UNIT),
        (Level(Figures(bmd_g_cm2=3.0)), Code.DXA_RANGE),
        (Level(Figures(bmd_g_cm2=float("nan"))), Code.DXA_VALUE),
        (Level(Figures(bmd_g_cm2=0.95, bmc_g=14.0, area_cm2=12.0)), Code.DXA_INCONSISTENT),
        (Level(Figures(bmc_g=11.4, area_cm2=12.0)), Code.DXA_VALUE),
    ],
)
def test_a_level_with_wrong_figures_is_refused(level: Level, code: Code) -> None:
    assert code in codes(with_level("L2", level, total=Figures()))


def test_an_excluded_level_counts_neither_in_its_range_nor_in_the_total() -> None:
    implant = Level(Figures(bmd_g_cm2=4.0, bmc_g=48.0, area_cm2=12.0), Validity.IMPLANT)
    rest = [name for name in AREAS if name != "L2"]
    content, area = sum(DENSITIES[name] * AREAS[name] for name in rest), sum(AREAS[name] for name in rest)
    sound = with_level("L2", implant, total=Figures(round(content / area, 3), round(content, 2), area))
    assert codes(sound) == []
    assert sound.included == ("L1", "L3", "L4")
    assert codes(with_level("L2", implant)) == [Code.DXA_TOTAL_MISMATCH] * 2  # the total still holds L2


def test_without_areas_the_total_lies_between_the_levels() -> None:
    levels = {name: Level(Figures(bmd_g_cm2=bmd)) for name, bmd in DENSITIES.items()}
    assert codes(scan(levels=levels, total=Figures(bmd_g_cm2=1.04))) == []
    assert codes(scan(levels=levels, total=Figures(bmd_g_cm2=1.07))) == [Code.DXA_TOTAL_MISMATCH]


def test_a_repetition_is_known_and_another_scan_of_the_day_too() -> None:
    assert scan().identity == scan(model="other").identity
    assert scan().content != scan(model="other").content
    assert scan().identity != scan(scan_id="2").identity
    assert scan().content == scan().content


@pytest.mark.parametrize(
    ("region", "levels"),
    [
        ("L1", ("L1",)),
        ("L1-L4", ("L1", "L2", "L3", "L4")),
        ("l1, L3 - L4", ("L1", "L3", "L4")),
        ("L1-L2 & L4", ("L1", "L2", "L4")),
        ("L2–L4", ("L2", "L3", "L4")),
        ("Neck", None),
        ("L5", None),
        ("L4-L1", None),
        ("", None),
    ],
)
def test_regions_name_their_levels(region: str, levels: tuple[str, ...] | None) -> None:
    assert included_in(region) == levels


def test_makers_have_one_name() -> None:
    assert {manufacturer_named(told) for told in ("GE", "ge Medical Systems", "LUNAR")} == {"GE Lunar"}
    assert manufacturer_named("Hologic, Inc.") == "Hologic"
    assert manufacturer_named("Stratos") == "Stratos"


# --- CSV -----------------------------------------------------------------------------------------------------------

PRODIGY = Defaults(model="Prodigy")
GE = """Patients_ID,Patients_Visit,Scan_Date,Region,Area_cm2,BMC_g,BMD_g/cm2,T_score,Z_score
P1,1,2026-03-04,L1,11.00,9.90,0.900,-1.9,-0.8
P1,1,2026-03-04,L2,12.00,11.40,0.950,-2.0,-0.9
P1,1,2026-03-04,L3,14.00,14.00,1.000,-1.7,-0.6
P1,1,2026-03-04,L4,16.00,16.80,1.050,-1.3,-0.2
P1,1,2026-03-04,L1-L4,53.00,52.10,0.983,-1.7,-0.6
P1,1,2026-03-04,L2-L4,42.00,42.20,1.005,-1.6,-0.5
P1,1,2026-03-04,Neck,5.00,4.00,0.800,-1.6,-0.5
"""
APEX = (
    "PATIENT_KEY,IDENTIFIER1,SCANID,SCAN_DATE,L1_INCLUDED,L1_AREA,L1_BMC,L1_BMD,L2_INCLUDED,L2_AREA,L2_BMC,L2_BMD,"
    "L3_INCLUDED,L3_AREA,L3_BMC,L3_BMD,L4_INCLUDED,L4_AREA,L4_BMC,L4_BMD,TOT_AREA,TOT_BMC,TOT_BMD\n"
    "K1,P1,A01,20260304,1,11.0,9.9,0.9,0,0,0,0,-1,14.0,14.0,1.0,True,16.0,16.8,1.05,41.0,40.7,0.993\n"
)
NHANES = (
    "SEQN,DXASPNST,DXXL1BCC,DXXL2BCC,DXXL3BCC,DXXL4BCC,DXXOSBMD,DXXOSBMC,DXXOSA,DXXL1BMD,DXXL1BMC,DXXL1A,DXXL2BMD,"
    "DXXL2BMC,DXXL2A,DXXL3BMD,DXXL3BMC,DXXL3A,DXXL4BMD,DXXL4BMC,DXXL4A,DXXL1TQA,DXXL1TBS\n"
    "41475.0,1.0,5.397605346934028e-79,0,0,0,0.983,52.1,53,0.9,9.9,11,0.95,11.4,12,1,14,14,1.05,16.8,16,0,1.31\n"
    "41476,2,0,2,0,0,,,,0.9,9.9,11,,,,1,14,14,1.05,16.8,16,6,1.31\n"
    "41477,3,,,,,,,,,,,,,,,,,,,,,\n"
)


def read(text: str, defaults: Defaults = PRODIGY, columns: dict[str, str] | None = None) -> Any:
    return read_csv(text, defaults, columns)


def told(table: Any) -> list[tuple[int, Code]]:
    return [(row.line, row.reason.code) for row in table.refused]


def test_ge_lunar_rows_become_one_scan() -> None:
    table = read(GE)
    assert (table.layout, table.rows, table.passed_over, table.refused) == ("ge-lunar", 7, 1, ())
    ((line, found),) = table.scans
    assert line == 2
    assert (found.manufacturer, found.model, found.scan_date) == ("GE Lunar", "Prodigy", date(2026, 3, 4))
    assert found.included == ("L1", "L2", "L3", "L4")
    assert found.total.bmd_g_cm2 == 0.983
    assert found.levels["L3"].figures.t_score == -1.7
    assert refusals(found, TODAY) == ()


def test_ge_lunar_levels_left_out_of_every_sum_are_excluded() -> None:
    without_l1 = "".join(line for line in GE.splitlines(keepends=True) if "L1-L4" not in line)
    ((_, found),) = read(without_l1).scans
    assert found.included == ("L2", "L3", "L4")
    assert found.levels["L1"].validity is Validity.OTHER
    assert refusals(found, TODAY) == ()


def test_ge_lunar_every_sum_is_checked_against_its_levels() -> None:
    table = read(GE.replace("42.20,1.005", "42.20,1.105"))
    assert told(table) == [(7, Code.DXA_TOTAL_MISMATCH)]
    assert table.scans == ()


def test_ge_lunar_visits_are_no_dates() -> None:
    without = "\n".join(",".join(part for n, part in enumerate(line.split(",")) if n != 2) for line in GE.splitlines())
    assert [row.reason.code for row in read(without).refused] == [Code.DXA_DATE]
    ((_, found),) = read(without, Defaults(model="Prodigy", scan_date=date(2026, 1, 2))).scans
    assert found.scan_date == date(2026, 1, 2)


def test_hologic_apex_includes_what_is_included() -> None:
    table = read(APEX, Defaults(model="Horizon A"))
    ((line, found),) = table.scans
    assert (table.layout, line, found.patient_id, found.scan_id) == ("hologic-apex", 2, "P1", "A01")
    assert found.manufacturer == "Hologic"
    assert found.included == ("L1", "L3", "L4")  # 0 is: not measured
    assert refusals(found, TODAY) == ()
    assert told(read(APEX.replace(",True,", ",perhaps,"))) == [(2, Code.DXA_VALUE)]


def test_nhanes_codes_validity_and_sas_zeros() -> None:
    table = read(NHANES, Defaults(model="Discovery A", scan_date=date(2008, 6, 1)))
    assert (table.layout, table.passed_over, table.refused) == ("nhanes", 1, ())
    (_, first), (line, second) = table.scans
    assert first.patient_id == "41475"
    assert first.levels["L1"].figures.tbs == 1.31
    assert refusals(first, TODAY) == refusals(second, TODAY) == ()
    assert line == 3
    assert second.included == ("L1", "L3", "L4")
    assert second.levels["L1"].figures.tbs is None  # its own validity code says 6


def test_a_mapping_reads_other_layouts_with_semicolons_and_commas() -> None:
    text = "PID;Datum;BMD 1;BMD 2;Gesamt\nP9;04.03.2026;0,91;0,95;0,93\n"
    columns = {"patient_id": "PID", "scan_date": "Datum", "L1.bmd": "BMD 1", "L2.bmd": "BMD 2", "total.bmd": "Gesamt"}
    table = read(text, Defaults(manufacturer="Norland XR", model="XR-46"), columns)
    ((_, found),) = table.scans
    assert (found.manufacturer, found.scan_date) == ("Norland", date(2026, 3, 4))
    assert found.levels["L1"].figures.bmd_g_cm2 == 0.91
    assert refusals(found, TODAY) == ()
    for wrong in ({"patient_id": "PID"}, {**columns, "L9.bmd": "BMD 1"}, {**columns, "sex": "nowhere"}):
        assert told(read(text, PRODIGY, wrong)) == [(1, Code.DXA_LAYOUT)]


@pytest.mark.parametrize(
    ("text", "line", "code"),
    [
        ("a,b\n1,2\n", 1, Code.DXA_LAYOUT),
        ("", 1, Code.DXA_LAYOUT),
        (GE + "P2,1\n", 9, Code.DXA_ROW),
        (GE + "P1,1,2026-03-04,L3,1,1,1,1,1\n", 9, Code.DXA_ROW),
        (GE + '"P2,1\n', 9, Code.DXA_ROW),
        (GE.replace("0.950", "0.95O"), 3, Code.DXA_VALUE),
        (GE.replace("0.950", "١"), 3, Code.DXA_VALUE),
        (GE.replace("0.950", "1e999"), 3, Code.DXA_VALUE),
        (GE.replace("2026-03-04", "03/04/2026"), 2, Code.DXA_DATE),
        (GE.replace("2026-03-04", "2026-13-04"), 2, Code.DXA_DATE),
        (GE.replace("T_score", "Region"), 1, Code.DXA_LAYOUT),
    ],
)
def test_a_row_that_cannot_be_taken_is_told_with_its_line(text: str, line: int, code: Code) -> None:
    assert (line, code) in told(read(text))


def test_a_date_that_reads_two_ways_needs_its_format() -> None:
    text = GE.replace("2026-03-04", "03/04/2026 10:15")
    ((_, found),) = read(text, Defaults(model="Prodigy", date_format="%m/%d/%Y %H:%M")).scans
    assert found.scan_date == date(2026, 3, 4)


@pytest.mark.parametrize("no", ["0", "False", "no"])
def test_hologic_apex_leaves_out_a_level_that_was_measured_but_not_included(no: str) -> None:
    """Its figures stand in the table all the same; they count neither as a level nor in the total."""
    text = APEX.replace(",0,0,0,0,-1,", f",{no},12.0,18.0,1.5,-1,")
    assert text != APEX
    ((_, found),) = read(text, Defaults(model="Horizon A")).scans
    assert found.included == ("L1", "L3", "L4")
    assert found.levels["L2"] == Level(Figures(bmd_g_cm2=1.5, bmc_g=18.0, area_cm2=12.0), Validity.OTHER)
    assert refusals(found, TODAY) == ()


def test_one_maker_has_one_name_however_it_is_written() -> None:
    for told in ("GE", "ge Medical Systems", "GE_Healthcare", "GEHC", "General Electric", "Lunar", "GE-Lunar", "GEMS"):
        assert manufacturer_named(told) == "GE Lunar"
    assert [manufacturer_named(told) for told in ("HOLOGIC, Inc.", "Norland XR", "DMS ", "Geneva")] == [
        "Hologic", "Norland", "DMS", "Geneva",
    ]  # fmt: skip
