"""The measurement counts what it says: truth beside findings, Wilson's intervals, and cases that read back."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from models.phantom.patient import draw
from models.phantom.render import render
from worker.findings.evaluate import (
    AILMENTS,
    Case,
    LevelCase,
    judged,
    lumbar_box,
    read,
    rows,
    seeds_with,
    settings_of,
    share,
    table,
    true_cobb_deg,
    wholly_seen,
)
from worker.segmentation import Segmentation
from worker.volume import Volume


def level(
    name: str, *ailments: str, percent: float = 0.0, excluded: tuple[str, ...] = (), noted: bool = False
) -> LevelCase:
    return LevelCase(name, ailments, percent, "wedge" if percent else "", False, excluded, noted)


CASE = Case(
    seed=1,
    slice_mm=3.0,
    labels="true",
    ailment="fracture",
    phase="portal",
    found_phase="native",
    cobb_deg=41.0,
    found_cobb_deg=38.5,
    refusals=(),
    levels=(
        level("L1", "fracture", percent=45.0, excluded=("FRACTURE",)),
        level("L2", "fracture", percent=28.0, noted=True),
        level("L3", "fracture", percent=15.0, excluded=("FRACTURE",)),
        level("L4", excluded=("METAL",)),
    ),
)


def test_each_finding_is_counted_against_its_own_truth() -> None:
    counted = {row.finding: (row.found, row.positives, row.false, row.negatives) for row in rows([CASE])}
    assert counted["fracture, grade 2-3: excluded"] == (1, 2, 0, 1)  # L3's 15 % count neither way
    assert counted["fracture, grade 2-3: excluded or noted"] == (2, 2, 0, 1)
    assert counted["fracture, grade 3 (40 % and more): excluded"] == (1, 1, 0, 1)
    assert counted["metal"] == (0, 0, 1, 4)
    assert counted["contrast medium (CTs)"] == (0, 1, 0, 0)
    assert counted["scoliosis of 40 degrees and more (CTs)"] == (0, 1, 0, 0)


def test_a_neighbour_of_metal_counts_neither_way() -> None:
    beside = replace(CASE.levels[3], beside_metal=True)
    counted = {row.finding: row for row in rows([replace(CASE, levels=(*CASE.levels[:3], beside))])}
    assert (counted["metal"].positives, counted["metal"].negatives) == (0, 3)
    assert counted["metal at a neighbour"].found == 1


def test_the_interval_is_wilsons() -> None:
    assert share(95, 100) == "95.0 (88.8-97.8)"  # Wilson 1927, by hand
    assert share(0, 0) == "-"


def test_patients_with_one_ailment_alone() -> None:
    assert list(islice(seeds_with(None, 700), 3)) == [700, 701, 702]
    chosen = list(islice(seeds_with("fracture", 700), 6))
    assert len(chosen) == 6
    assert all("fracture" in settings_of(seed)[1] for seed in chosen)
    left_out = set(range(700, chosen[-1])) - set(chosen)
    assert left_out
    assert not any("fracture" in settings_of(seed)[1] for seed in left_out)


def test_cases_read_back(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps(asdict(CASE)) + "\n", encoding="utf-8")
    assert read([file]) == [CASE]
    assert "| 3 | true | 1 | -2.5 | 0.0 | 2.5 | 100.0" in table([CASE])


def test_patients_are_drawn_from_their_seed_alone() -> None:
    drawn = [settings_of(seed) for seed in range(700_000, 700_008)]
    assert [ailment for ailment, _ in drawn] == list(AILMENTS)
    assert drawn == [settings_of(seed) for seed in range(700_000, 700_008)]
    for seed, (_, given) in enumerate(drawn, start=700_000):
        draw(seed, **given)  # every setting is one that the phantom knows


def test_the_true_angle_follows_the_setting() -> None:
    lumbar = ("L1", "L2", "L3", "L4", "L5")
    curved = draw(3, cobb_deg=40.0)
    assert true_cobb_deg(curved, lumbar) == pytest.approx(40.0, abs=5.0)
    assert true_cobb_deg(curved, ("T11", "T12", *lumbar)) > 45.0  # the curve goes on above
    assert true_cobb_deg(draw(3, cobb_deg=0.0), lumbar) < 8.0


@pytest.mark.parametrize("seed", [611_010, 611_074])
def test_of_a_strong_curve_the_bodies_that_the_ct_holds_are_measured(seed: int) -> None:
    """T11 is wholly in these CTs, and tilted furthest: the angle is with it."""
    rng = np.random.default_rng([seed, 55])
    patient = draw(seed, slice_mm=3.0, cobb_deg=float(rng.choice((-1, 1)) * rng.uniform(40, 60)))
    rendered = render(patient, lumbar_box(patient))
    volume = Volume(rendered.hu_noise_free, rendered.affine)
    true = Segmentation(rendered.labels, "true", "0" * 64)
    case = judged(patient, volume, true, "scoliosis", wholly_seen(volume, true))
    assert "T11" in wholly_seen(volume, true)
    assert case.found_cobb_deg == pytest.approx(case.cobb_deg, abs=2.0)
    assert case.cobb_deg > true_cobb_deg(patient, ("T12", "L1", "L2", "L3", "L4", "L5"))
