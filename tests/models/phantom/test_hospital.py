"""A digital hospital: its scanner, its people, its CSV, and what is mixed up in it."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pydicom
import pytest

from models.phantom import hospital
from models.phantom.dxa import Dxa, DxaLevel
from models.phantom.hospital import (
    AGES,
    BETWEEN_SCANNERS,
    DXA_FILE,
    HOSPITAL_FILE,
    SCANNER,
    Exam,
    make_hospital,
    mixed_up,
    resident,
    scanners_of,
)
from models.phantom.patient import draw
from models.phantom.settings import VENDORS
from service.domain.dxa_csv import Defaults, read_csv

FEW_SLICES = {"coverage": "L3-L3", "slice_mm": "5"}


def exams(count: int) -> list[Exam]:
    levels = [DxaLevel(1.0 + 0.01 * number, 14.0, 14.0, 1.3) for number in range(count)]
    return [
        Exam(f"P{number}", date(2026, 5, 1 + number), Dxa(dict.fromkeys(("L1", "L2", "L3", "L4"), level)))
        for number, level in enumerate(levels)
    ]


def test_a_scanner_that_shows_mineral_stronger_changes_nothing_else() -> None:
    usual, strong = draw(5), draw(5, mineral_gain=1.1)
    drift = usual.acquisition.drift
    assert strong.acquisition.drift == pytest.approx((1 + drift) * 1.1 - 1)
    assert replace(strong, acquisition=replace(strong.acquisition, drift=drift)) == usual
    with pytest.raises(ValueError, match=r"mineral_gain must be 0\.7 to 1\.3"):
        draw(5, mineral_gain=2)


def test_its_people_are_its_own_and_their_dxa_came_first() -> None:
    people = [resident(seed, {}) for seed in range(100)]
    assert AGES[0] <= min(one.age for one in people) < max(one.age for one in people) <= AGES[1]
    assert 70 <= sum(one.sex == "F" for one in people) <= 90
    assert {one.acquisition.vendor for one in people} == {"ge"}
    assert max(one.interval.days for one in people) <= 0
    assert resident(7, {"sex": "M", "vendor": "canon"}).sex == "M"


def test_several_scanners_are_of_several_makers_and_read_differently(tmp_path: Path) -> None:
    assert scanners_of(3, 1) == [SCANNER]
    four = scanners_of(3, 4)
    assert scanners_of(3, 4) == four != scanners_of(4, 4)
    assert {str(one["vendor"]) for one in four} == set(VENDORS)
    gains = [float(one["mineral_gain"]) for seed in range(100) for one in scanners_of(seed, 3)]
    assert np.mean(gains) == pytest.approx(1.0, abs=0.02)
    assert np.std(gains) == pytest.approx(BETWEEN_SCANNERS, abs=0.015)
    for count in (0, 5):
        with pytest.raises(ValueError, match="1 to 4 scanners, one of each maker"):
            make_hospital(3, 2, tmp_path / "none", scanners=count)
    out = make_hospital(3, 3, tmp_path / "three", FEW_SLICES, scanners=3, processes=1)
    there = json.loads((out / HOSPITAL_FILE).read_text())["scanners"]
    for folder, scanner in zip(sorted((out / "patients").iterdir()), there, strict=True):
        assert json.loads((folder / "truth.json").read_text())["acquisition"]["vendor"] == scanner["vendor"]
    with pytest.raises(ValueError, match="differs in scanners"):
        make_hospital(3, 3, out, FEW_SLICES, processes=1)


def test_a_mix_up_gives_a_share_of_the_results_to_others() -> None:
    before = exams(10)
    assert mixed_up(before, 0.0, 1) == (before, 0)
    mixed, count = mixed_up(before, 0.4, 1)
    moved = [new.result is not old.result for new, old in zip(mixed, before, strict=True)]
    assert (count, sum(moved)) == (4, 4)
    assert [(one.patient_id, one.date) for one in mixed] == [(one.patient_id, one.date) for one in before]
    assert {id(one.result) for one in mixed} == {id(one.result) for one in before}  # nobody's is lost
    for share, told in ((1.5, "a share, 0 to 1"), (0.1, "nobody to mix up with")):
        with pytest.raises(ValueError, match=told):
            mixed_up(before, share, 1)


def test_a_hospital_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CTs that can be sent and a CSV that can be imported; who stands is not made again."""
    out = make_hospital(3, 2, tmp_path / "hospital", FEW_SLICES, processes=1)
    folders = sorted((out / "patients").iterdir())
    assert [folder.name for folder in folders] == ["OSG-030000", "OSG-030001"]
    first = pydicom.dcmread(next(iter(sorted(folders[0].rglob("*.dcm")))))
    assert (first.PatientID, first.SyntheticData) == ("OSG-030000", "YES")
    table = read_csv((out / DXA_FILE).read_text(encoding="utf-8"), Defaults())
    assert (table.layout, table.refused, len(table.scans)) == ("ge-lunar", (), 2)
    scans = [scan for _, scan in table.scans]
    for folder, scan in zip(folders, scans, strict=True):
        truth = json.loads((folder / "truth.json").read_text())
        assert scan.patient_id == folder.name == truth["patient_id"]
        assert scan.levels["L2"].figures.bmd_g_cm2 == pytest.approx(truth["levels"]["L2"]["bmd_g_cm2"], abs=1e-5)
        assert scan.levels["L2"].figures.tbs == pytest.approx(truth["levels"]["L2"]["tbs"], abs=1e-4)
        assert scan.scan_date.strftime("%Y%m%d") <= str(first.StudyDate) or folder != folders[0]

    def never(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(hospital, "write_ct", never)
    make_hospital(3, 2, out, FEW_SLICES, mix_up=1.0, processes=1)
    swapped = read_csv((out / DXA_FILE).read_text(encoding="utf-8"), Defaults())
    assert [scan.levels for _, scan in swapped.scans] == [scan.levels for scan in reversed(scans)]
    assert json.loads((out / HOSPITAL_FILE).read_text())["mixed_up"] == 2
    with pytest.raises(ValueError, match="holds another hospital: it differs in seed"):
        make_hospital(4, 2, out, FEW_SLICES, processes=1)
