"""Digital patients with something the matter: it is there, only there, and nobody else changes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from models.phantom import dicom, dxa
from models.phantom.anatomy import LABELS, LEVELS, Patient, Vertebra
from models.phantom.grid import Grid, Vec3
from models.phantom.patient import LORDOSIS, SIZES, draw
from models.phantom.render import Rendered, lumbar_grid, render
from models.phantom.scanner import scan, scanner_rng
from models.phantom.study import make_study

SEED = 4


def at(rendered: Rendered, v: Vertebra, local: Vec3) -> tuple[int, int, int]:
    """The voxel at a local point of a vertebra."""
    k, j, i = np.rint(np.linalg.inv(rendered.affine) @ [*v.frame.to_lps(local), 1.0])[:3].astype(int)
    return int(k), int(j), int(i)


def height_at(rendered: Rendered, v: Vertebra, y: float) -> float:
    """How tall the label stands at a local y in the middle of the body, mm."""
    steps = np.arange(-25, 25, 0.25)
    return 0.25 * sum(int(rendered.labels[at(rendered, v, (0.0, y, float(z)))] == v.label) for z in steps)


@pytest.mark.parametrize(
    "settings", [{"metal": "L3"}, {"cement": "L2,L4"}, {"sclerosis": "L4"}, {"ribs": "no"}, {"tilt_deg": 10}]
)
def test_what_lies_in_the_bone_or_the_scan_leaves_the_anatomy(settings: dict[str, str]) -> None:
    plain, ill = draw(SEED), draw(SEED, **settings)
    assert ill != plain
    assert (ill.vertebrae, ill.sacrum, ill.bone, ill.vessels) == (
        plain.vertebrae,
        plain.sacrum,
        plain.bone,
        plain.vessels,
    )


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("lumbar_count", "7", "lumbar_count must be 4 to 6"),
        ("lumbar_count", "4.5", "lumbar_count must be a whole number"),
        ("fracture", "", "fracture must be LEVEL:PERCENT"),
        ("fracture", "L2", "fracture must be LEVEL:PERCENT"),
        ("fracture", "L2:much", "fracture must be LEVEL:PERCENT"),
        ("fracture", "L2:nan", "fracture must be LEVEL:PERCENT"),
        ("fracture", "L2:90", "5 to 70 % of height"),
        ("fracture", "C2:30", "fracture must be LEVEL:PERCENT"),
        ("fracture", "L2:30:burst", "wedge or biconcave or crush"),
        ("fracture", "L2:30:wedge:old", "fracture must be LEVEL:PERCENT"),
        ("fracture", "L2:30,L2:40", "each level once"),
        ("fracture", "L6:30", "fracture must name levels of this spine"),
        ("metal", "", "metal must be levels like L2,L3"),
        ("metal", "hip", "metal must be levels like L2,L3"),
        ("cement", "L2,L2", "each once"),
        ("sclerosis", "4", "sclerosis must be levels"),
        ("sclerosis", "L6", "sclerosis must name levels of this spine"),
        ("coverage", "L2-L6", "coverage must name levels of this spine"),
        ("tilt_deg", "45", "tilt_deg must be -30 to 30"),
        ("tbs", "high", "tbs must be a number"),
        ("ribs", "13", "ribs must be yes or no"),
        ("t13_ribs", "maybe", "t13_ribs must be yes or no"),
    ],
)
def test_what_cannot_be_is_refused_by_name(key: str, value: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        draw(1, **{key: value})


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="metal must name levels of this spine"):
        draw(1, lumbar_count=4, metal="L5")
    with pytest.raises(ValueError, match="t13_ribs must be no where ribs is no"):
        draw(1, ribs="no", t13_ribs="yes")


# how spines are built


@pytest.mark.parametrize(("count", "lowest", "absent"), [(4, "L4", "L5"), (5, "L5", "L6"), (6, "L6", "")])
def test_four_five_or_six_lumbar_vertebrae_stand_in_order(count: int, lowest: str, absent: str) -> None:
    patient = draw(SEED, lumbar_count=count)
    rendered = render(patient, lumbar_grid(patient, 3.0, "T12", "S1"))
    z = rendered.grid.axes()[0]
    names = ["S1", *(v.name for v in patient.vertebrae if v.name not in ("T10", "T11"))]
    heights = []
    for name in names:
        seen = (rendered.labels == LABELS[name]).sum(axis=(1, 2))
        heights.append(float((seen * z).sum() / seen.sum()))
    assert (names[1], patient.lumbar_count) == (lowest, count)
    assert heights == sorted(heights)
    assert not absent or not (rendered.labels == LABELS[absent]).any()
    assert LABELS["L6"] == 126
    measured = dxa.measure(patient)
    assert all(0.4 < measured.levels[name].bmd_g_cm2 < 2.2 for name in LEVELS)


@pytest.mark.parametrize("count", [4, 6])
def test_other_counts_share_out_the_whole_lordosis(count: int) -> None:
    assert len(LORDOSIS[count]) == count
    assert sum(LORDOSIS[count]) == pytest.approx(sum(SIZES[f"L{n}"].lordosis for n in range(1, 6)))


def test_ribs_can_be_absent_or_one_pair_too_many() -> None:
    without, plain, more = draw(SEED, ribs="no"), draw(SEED), draw(SEED, t13_ribs="yes")
    v = plain.vertebra("L1")
    x, y, z = v.frame.center
    grid = Grid.covering((x - 80, y - 30, z - 25), (x + 80, y + 60, z + 25), (2.5, 2.5, 2.5))
    unnamed = []
    for patient in (without, plain, more):
        rendered = render(patient, grid)
        unnamed.append(int(((rendered.mineral_mg_cm3 > 150) & (rendered.labels == 0)).sum()))
    assert unnamed[2] > unnamed[1] + 50
    whole = lumbar_grid(plain, 4.0, "T11", "T12", 40.0)
    assert render(plain, whole).mineral_mg_cm3.sum() > 1.1 * render(without, whole).mineral_mg_cm3.sum()


# fractures


@pytest.mark.parametrize("kind", ["wedge", "biconcave", "crush"])
def test_a_broken_body_has_lost_what_was_asked_where_its_kind_says(kind: str) -> None:
    whole = draw(SEED).vertebra("L2")
    patient = draw(SEED, fracture=f"L2:40:{kind}")
    v = patient.vertebra("L2")
    rest = [
        v.height_anterior / whole.height_anterior,
        v.height_middle / whole.height_middle,
        v.height_posterior / whole.height_posterior,
    ]
    kept = {"wedge": [0.6, None, 1.0], "biconcave": [1.0, 0.6, 1.0], "crush": [0.6, 0.6, 0.6]}[kind]
    for got, expected in zip(rest, kept, strict=True):
        assert expected is None or got == pytest.approx(expected, abs=1e-9)
    rendered = render(patient, lumbar_grid(patient, 1.25, "L2", "L2", 2.0))
    assert height_at(rendered, v, 0.0) == pytest.approx(v.height_middle, abs=1.5)
    slope = (v.height_posterior - v.height_anterior) / v.depth
    dish = 2 * v.endplate_hollow * (1 - 0.7**4) + 2 * v.dent * (1 - 0.7**2)
    assert height_at(rendered, v, -0.35 * v.depth) == pytest.approx(v.height - slope * 0.35 * v.depth - dish, abs=1.8)


def test_the_spine_above_comes_down_and_leans_forward_over_a_wedge() -> None:
    plain, wedge, crush = draw(SEED), draw(SEED, fracture="L2:40"), draw(SEED, fracture="L2:40:crush")
    lost = 0.4 * plain.vertebra("L2").height
    assert wedge.vertebrae[:3] == plain.vertebrae[:3]  # L5 to L3 stay
    assert wedge.sacrum == plain.sacrum
    turned = wedge.vertebra("L1").frame.angles_rad[0] - plain.vertebra("L1").frame.angles_rad[0]
    assert 5 < np.degrees(turned) < 20
    upright = [p.vertebra("T12").frame for p in (plain, crush)]
    assert upright[0].angles_rad == upright[1].angles_rad
    moved = np.subtract(upright[0].center, upright[1].center)
    assert np.linalg.norm(moved) == pytest.approx(lost, abs=0.5)


def test_several_levels_can_break_and_the_density_is_met_all_the_same() -> None:
    patient = draw(SEED, fracture="L2:30, T12:45:crush", bmd_g_cm2=0.7)
    assert [(f.level, f.percent, f.kind) for f in patient.lesions.fractures] == [
        ("L2", 30, "wedge"),
        ("T12", 45, "crush"),
    ]
    assert dxa.measure(patient).bmd_g_cm2 == pytest.approx(0.7, abs=0.005)


# what lies in the bone


def spongy_hu(patient: Patient, level: str, share_of_height: float, grid: Grid) -> float:
    """Mean noise-free HU of the middle of a body between +- that share of its half height, its ends left out."""
    rendered, v = render(patient, grid), patient.vertebra(level)
    points = [
        at(rendered, v, (x, y, 0.5 * v.height_middle * share_of_height * side))
        for x in (-8.0, -4.0, 0.0, 4.0, 8.0)
        for y in (-6.0, -2.0, 2.0)
        for side in (-1, 1)
    ]
    return float(np.mean([rendered.hu_noise_free[p] for p in points]))


def test_sclerosis_is_dense_under_the_endplates_and_the_densitometer_sees_it() -> None:
    plain, ill = draw(SEED), draw(SEED, sclerosis="L4")
    grid = lumbar_grid(plain, 1.5, "L4", "L4")
    edge, middle = (spongy_hu(ill, "L4", s, grid) - spongy_hu(plain, "L4", s, grid) for s in (0.75, 0.0))
    assert edge > 200
    assert middle < 0.5 * edge
    before, after = dxa.measure(plain), dxa.measure(ill)
    assert after.levels["L4"].bmd_g_cm2 > before.levels["L4"].bmd_g_cm2 + 0.1
    assert after.levels["L1"] == before.levels["L1"]


def test_cement_fills_a_part_of_the_body_and_nothing_else() -> None:
    plain, ill = draw(SEED), draw(SEED, cement="L2")
    grid = lumbar_grid(plain, 1.5, "L2", "L3")
    before, after = render(plain, grid), render(ill, grid)
    changed = after.hu_noise_free - before.hu_noise_free > 100
    assert set(np.unique(after.labels[changed])) == {LABELS["L2"]}
    assert 800 < np.median(after.hu_noise_free[changed]) < 1500
    assert 2000 < changed.sum() * 1.5**3 < 12_000  # mm3
    assert dxa.measure(ill) == dxa.measure(plain)  # no bone


def test_screws_saturate_and_throw_bright_and_dark_streaks() -> None:
    plain, ill = draw(SEED), draw(SEED, metal="L3")
    v = plain.vertebra("L3")
    grid = lumbar_grid(plain, 2.0, "L3", "L3", 40.0)
    before, after = render(plain, grid), render(ill, grid)
    hu = scan(after, ill, scanner_rng(ill))
    for side in (-1, 1):  # each pedicle
        assert hu[at(after, v, (side * v.pedicle_x, v.back_wall_y, 0.17 * v.height))] == 3071
    added = after.hu_noise_free - before.hu_noise_free
    outside = np.abs(added) < 700  # neither metal nor its edge
    assert (added[outside] > 60).sum() > 500
    assert (added[outside] < -60).sum() > 500
    far = grid.axes()[0] < v.frame.center[2] - 45
    assert not added[far].any()
    assert np.array_equal(before.labels, after.labels)
    assert dxa.measure(ill) == dxa.measure(plain)


def test_rods_join_the_screws_of_neighbouring_levels() -> None:
    plain, ill = draw(SEED), draw(SEED, metal="L3,L4")
    grid = lumbar_grid(plain, 2.0, "L3", "L4")
    metal = render(ill, grid).hu_noise_free - render(plain, grid).hu_noise_free > 2500
    z = grid.axes()[0]
    low, high = plain.vertebra("L4").frame.center[2], plain.vertebra("L3").frame.center[2]
    assert metal[(z > low) & (z < high)].any(axis=(1, 2)).all()


# the densitometer's answer


@pytest.mark.parametrize("target", [1.3, 1.4])
def test_a_set_tbs_is_reached_beside_a_set_density(target: float) -> None:
    measured = dxa.measure(draw(SEED, tbs=target, bmd_g_cm2=0.8))
    assert measured.tbs == pytest.approx(target, abs=0.01)
    assert measured.bmd_g_cm2 == pytest.approx(0.8, abs=0.005)


def test_a_tbs_out_of_reach_is_refused_with_what_is_within() -> None:
    with pytest.raises(
        ValueError, match=r"tbs must be \d\.\d\d to \d\.\d\d in this patient \(seed 4\), not 1\.9"
    ) as why:
        draw(SEED, tbs=1.9)
    low, high = (float(word) for word in str(why.value).split(" be ")[1].split(" in ")[0].split(" to "))
    assert dxa.measure(draw(SEED, tbs=low + 0.02)).tbs == pytest.approx(low + 0.02, abs=0.01)
    assert low < high < 1.9


# a tilted gantry


def test_tilted_slices_show_what_lies_on_their_planes() -> None:
    patient = draw(SEED)
    v = patient.vertebra("L3")
    x, y, z = v.frame.center
    tilted = Grid((16, 40, 30), (3.0, 2.0, 2.0), (x - 30, y - 35, z - 10), 15.0)
    leaning = render(patient, tilted)
    straight = render(patient, lumbar_grid(patient, 2.0, "L2", "L4"))
    assert leaning.labels[at(leaning, v, (0.0, 0.0, 0.0))] == v.label
    points = [(float(a), float(b), float(c)) for a in (-8, 0, 8) for b in (-10, 0, 10, 30) for c in (-12, 0, 12)]
    named = [(int(leaning.labels[at(leaning, v, p)]), int(straight.labels[at(straight, v, p)])) for p in points]
    assert sum(a == b for a, b in named) >= 0.8 * len(named)
    with pytest.raises(ValueError, match="tilted gantry"):
        tilted.axes()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short tilted study of a patient who has it all."""
    settings = {"coverage": "L2-L4", "slice_mm": "5", "tilt_deg": "12", "lumbar_count": "6"}
    ailments = {"fracture": "L2:30:crush,T12:20", "cement": "L2", "metal": "L4", "sclerosis": "L3", "t13_ribs": "yes"}
    return make_study(SEED, tmp_path_factory.mktemp("study") / "ill", settings | ailments)


def test_a_tilted_series_is_written_as_scanners_do(study: Path) -> None:
    """The planes lean by GantryDetectorTilt while the table moves along z: eligibility refuses both by name."""
    headers = [pydicom.dcmread(p, stop_before_pixels=True) for p in sorted((study / "dicom").glob("*.dcm"))]
    row, column = np.array(headers[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    normal = np.cross(row, column)
    steps = np.diff([np.array(h.ImagePositionPatient, dtype=float) for h in headers], axis=0)
    assert np.allclose(steps, [0, 0, 5], atol=1e-3)
    assert np.degrees(np.arccos(normal[2])) == pytest.approx(12, abs=1e-4)
    assert {float(h.GantryDetectorTilt) for h in headers} == {12.0}
    assert np.linalg.norm(column) == pytest.approx(1, abs=1e-6)


def test_truth_tells_what_ails_which_level(study: Path) -> None:
    truth = json.loads((study / "truth.json").read_text())
    level = truth["levels"]
    assert level["L2"]["fracture"] == {"kind": "crush", "percent": 30.0}
    assert level["L2"]["lesions"] == ["fracture", "cement"]
    assert (level["L1"]["lesions"], level["L3"]["lesions"], level["L4"]["lesions"]) == ([], ["sclerosis"], ["metal"])
    assert level["L1"]["fracture"] is None
    assert set(level["L2"]["heights_mm"]) == {"anterior", "middle", "posterior"}
    assert level["L2"]["heights_mm"]["posterior"] < 0.8 * level["L3"]["heights_mm"]["posterior"]
    assert truth["anatomy"] == {"lumbar_count": 6, "ribs": True, "t13_ribs": True}
    assert [f["level"] for f in truth["lesions"]["fractures"]] == ["L2", "T12"]
    assert truth["acquisition"]["tilt_deg"] == 12.0


def test_labels_follow_the_tilt(study: Path) -> None:
    image = nib.load(study / "labels.nii.gz")
    labels, truth = np.asarray(image.dataobj), json.loads((study / "truth.json").read_text())
    for name in ("L2", "L3", "L4"):
        x, y, z = truth["levels"][name]["center_lps_mm"]
        ijk = np.rint(np.linalg.inv(image.affine) @ [-x, -y, z, 1.0])[:3].astype(int)
        assert labels[tuple(ijk)] == LABELS[name]


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
def test_dciodvfy_accepts_a_tilted_slice(tmp_path: Path) -> None:
    grid = Grid((2, 16, 16), (3.0, 0.7, 0.7), (-100.5, -80.25, -312.5), -17.5)
    paths = dicom.write_series(draw(SEED, tilt_deg=-17.5), tmp_path, np.zeros(grid.shape_kji, np.int16), grid)
    report = subprocess.run(["dciodvfy", str(paths[0])], capture_output=True, text=True, check=False)
    lines = (report.stdout + report.stderr).splitlines()
    assert any("CTImage" in line for line in lines)
    assert [line for line in lines if line.startswith("Error") and "(0x0008,0x001c)" not in line] == []
