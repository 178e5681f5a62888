"""`phantom report`: a cohort beside the paper's figures, and the shipped phantom meets those that cost nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from models.phantom.calibration import report, rows
from models.phantom.cohort import COLUMNS
from models.phantom.patient import draw


def table(patients: int = 30, hu_by_bmd: float = 160.0) -> list[dict[str, str]]:
    """A made-up cohort whose attenuation follows its BMD."""
    rng = np.random.default_rng(1)
    found = []
    for number in range(patients):
        bmd = rng.normal(1.02, 0.22, 4)
        for level in range(4):
            row = dict.fromkeys(COLUMNS, "0") | {
                "patient_id": f"P{number}", "sex": "FM"[number % 4 == 0], "age": str(40 + number), "bmi": "22",
                "vendor": ("canon", "siemens", "philips")[number % 3], "interval_days": str(3 * number),
                "bmd_g_cm2": str(bmd[level]), "tbs": str(rng.normal(1.36, 0.13)),
                "hu": str(hu_by_bmd * bmd[level] + rng.normal(0, 1)),
            }  # fmt: skip
            found.append(row)
    return found


def folder(path: Path, found: list[dict[str, str]]) -> Path:
    with (path / "cohort.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(found)
    (path / "cohort.json").write_text(json.dumps({"provenance": "digital", "seed": 5, "phantom_sha256": "ab" * 32}))
    return path


def test_a_figure_that_is_apart_is_said_to_be(tmp_path: Path) -> None:
    document = report(folder(tmp_path, table()), tmp_path / "out")
    found = {row["name"]: row for row in document["rows"]}
    assert found["BMD, mean per vertebra"]["within"] is True
    assert found["r of CT attenuation with BMD"]["within"] is False  # nearly 1 where 0.60 is asked for
    assert found["BMD, SD per patient"]["within"] is None
    page = (tmp_path / "out" / "calibration.html").read_text()
    assert "apart" in page
    assert "as asked" in page
    assert "<script" not in page
    assert json.loads((tmp_path / "out" / "calibration.json").read_text()) == document
    assert (tmp_path / "out" / "calibration.png").stat().st_size > 10_000


def test_a_handful_of_patients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few"):
        report(folder(tmp_path, table(5)), tmp_path / "out")


def test_every_asked_figure_has_the_papers_value() -> None:
    """PAPER.md, "Results on the 52 test patients": BMD, TBS and HU; r of the comparator."""
    printed = {row.name: row.printed for row in rows(table()) if row.tolerance is not None}
    assert printed["BMD, SD per vertebra"] == 0.22
    assert printed["CT attenuation, SD per vertebra"] == 58
    assert printed["r of CT attenuation with TBS"] == 0.25


def test_drawn_people_are_the_papers() -> None:
    """Drawing costs nothing, so a thousand: age 63 (49-71), 23 % men, BMI 21.9, 49 days (9-121), vendors' shares."""
    people = [draw(seed) for seed in range(5000, 6000)]
    assert np.percentile([one.age for one in people], [25, 50, 75]) == pytest.approx([49, 63, 71], abs=3)
    assert np.mean([one.sex == "M" for one in people]) == pytest.approx(0.23, abs=0.04)
    assert np.median([one.bmi for one in people]) == pytest.approx(21.9, abs=0.4)
    assert np.percentile([one.interval.days for one in people], [25, 50, 75]) == pytest.approx([9, 49, 121], abs=14)
    for vendor, count in (("canon", 173), ("siemens", 136), ("philips", 93)):
        assert np.mean([one.acquisition.vendor == vendor for one in people]) == pytest.approx(count / 402, abs=0.05)
