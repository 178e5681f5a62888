"""Digital patients: what is asked for comes out, the truth is the map's own, seeds repeat."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from models.phantom import dicom, dxa
from models.phantom.anatomy import LABELS, LEVELS
from models.phantom.grid import Grid
from models.phantom.patient import draw
from models.phantom.render import Rendered, body_grid, coverage_z, lumbar_grid, native_grid, render
from models.phantom.scanner import scan, scanner_rng
from models.phantom.settings import parse_assignments
from models.phantom.study import in_view, make_study

SEED = 4


@pytest.fixture(scope="module")
def coarse() -> Rendered:
    """The whole torso on a 4 mm grid."""
    patient = draw(SEED)
    return render(patient, body_grid(patient, 4.0))


def body_mean_hu(rendered: Rendered, center: tuple[float, float, float]) -> float:
    """Mean noise-free HU within 7 mm of a point, the way the paper's ROI samples a body's spongy middle."""
    z, y, x = rendered.grid.axes()
    r2 = (z[:, None, None] - center[2]) ** 2 + (y[None, :, None] - center[1]) ** 2 + (x - center[0]) ** 2
    return float(rendered.hu_noise_free[r2 < 49].mean())


def test_equal_seeds_give_equal_patients_and_images(coarse: Rendered) -> None:
    again = render(draw(SEED), coarse.grid)
    assert draw(SEED) == draw(SEED)
    assert np.array_equal(again.hu_noise_free, coarse.hu_noise_free)
    assert np.array_equal(again.labels, coarse.labels)
    first, second = (scan(again, draw(SEED), scanner_rng(draw(SEED))) for _ in range(2))
    assert np.array_equal(first, second)
    assert draw(SEED) != draw(SEED + 1)


def test_settings_do_not_disturb_the_anatomy() -> None:
    plain, enhanced = draw(SEED), draw(SEED, kvp=140, contrast_phase="portal", vendor="ge", slice_mm="2")
    assert plain.vertebrae == enhanced.vertebrae
    assert plain.bone == enhanced.bone


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_labels_are_present_and_in_anatomical_order(seed: int) -> None:
    patient = draw(seed)
    rendered = render(patient, body_grid(patient, 3.0))
    z = rendered.grid.axes()[0]
    heights = []
    for name in ("sacrum", "S1", "L5", "L4", "L3", "L2", "L1", "T12", "T11"):
        seen = rendered.labels == LABELS[name]
        assert seen.any(), name
        heights.append(float((seen.sum(axis=(1, 2)) * z).sum() / seen.sum()))
    assert heights == sorted(heights)


def test_labels_enclose_the_bodies_they_name(coarse: Rendered) -> None:
    patient = draw(SEED)
    inverse = np.linalg.inv(coarse.affine)
    for v in patient.vertebrae[:6]:
        k, j, i = np.rint(inverse @ [*v.frame.center, 1.0])[:3].astype(int)
        assert coarse.labels[k, j, i] == v.label, v.name


def test_proportions_of_l3_are_those_of_a_lumbar_vertebra() -> None:
    sizes = np.array([(v.width, v.depth, v.height) for s in range(40) for v in [draw(s).vertebra("L3")]])
    assert np.abs(sizes.mean(axis=0) - [45.0, 33.5, 27.0]).max() < 2.0
    assert (sizes.std(axis=0) > 1.0).all()


@pytest.mark.parametrize("target", [0.65, 0.95, 1.3])
def test_a_set_density_is_reached(target: float) -> None:
    assert dxa.measure(draw(SEED, bmd_g_cm2=target)).bmd_g_cm2 == pytest.approx(target, abs=0.01)


def test_projection_conserves_mineral_on_any_grid() -> None:
    patient = draw(SEED)
    grams = []
    for spacing in (1.0, 2.0):
        rendered = render(patient, lumbar_grid(patient, spacing, "L2", "L3"))
        own = np.isin(rendered.labels, (LABELS["L2"], LABELS["L3"])) | (rendered.mineral_mg_cm3 > 0)
        grams.append(float(rendered.mineral_mg_cm3[own].sum(dtype=np.float64)) * spacing**3 / 1e6)
    assert grams[1] == pytest.approx(grams[0], rel=0.06)


def test_drawn_patients_resemble_the_papers() -> None:
    measured = [dxa.measure(draw(s)) for s in range(200, 230)]
    bmd = np.array([m.bmd_g_cm2 for m in measured])
    assert 0.88 < bmd.mean() < 1.14
    assert 0.11 < bmd.std() < 0.28
    assert 1.25 < np.mean([m.tbs for m in measured]) < 1.48


def test_a_higher_tube_voltage_lowers_the_bone_and_contrast_brightens_the_aorta() -> None:
    means = {}
    for kvp in (100, 120, 140):
        patient = draw(SEED, kvp=kvp)
        center = patient.vertebra("L2").frame.center
        means[kvp] = body_mean_hu(render(patient, lumbar_grid(patient, 3.0, "L2", "L2")), center)
    assert means[100] > means[120] + 3 > means[140] + 6
    native, arterial = draw(SEED), draw(SEED, contrast_phase="arterial")
    grid = lumbar_grid(native, 3.0, "L2", "L2", 40.0)
    rise = render(arterial, grid).hu_noise_free - render(native, grid).hu_noise_free
    assert (rise > 200).sum() * 27 > 2000  # mm3


def test_coverage_leaves_the_level_above_out_of_view() -> None:
    full, partial = draw(SEED, slice_mm=4), draw(SEED, slice_mm=4, coverage="L2-L5")
    grid = native_grid(partial)
    small = Grid(
        (grid.shape_kji[0], 128, 128),
        (4.0, grid.spacing_kji_mm[1] * 4, grid.spacing_kji_mm[2] * 4),
        grid.origin_lps,
    )
    rendered = render(partial, small)
    assert not in_view(rendered, LABELS["L1"])
    assert all(in_view(rendered, LABELS[n]) for n in ("L2", "L3", "L4", "L5"))
    assert coverage_z(full)[1] > coverage_z(partial)[1] + 40
    assert native_grid(full).shape_kji[0] <= 120


def test_noise_is_as_strong_as_asked(coarse: Rendered) -> None:
    patient = draw(SEED, noise_hu=15, vendor="siemens")
    grid = Grid((6, 128, 128), (3.0, 0.75, 0.75), (0.0, 0.0, 0.0))
    flat = np.full(grid.shape_kji, 40.0, np.float32)
    hu = scan(Rendered(grid, flat * 0, flat, flat.astype(np.uint8)), patient, np.random.default_rng(1))
    assert hu.dtype == np.int16
    assert float(hu.std()) == pytest.approx(15, abs=1.5)
    assert float(hu.mean()) == pytest.approx(40, abs=1.0)
    loud = scan(replace(coarse, hu_noise_free=coarse.hu_noise_free + 9000), patient, np.random.default_rng(1))
    assert loud.max() == 3071


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("colour", "red", "unknown setting"),
        ("age", "12", "age must be 20 to 100"),
        ("sex", "X", "one of F, M"),
        ("kvp", "130", "kvp must be one of"),
        ("bmi", "thin", "must be a number"),
        ("bmi", "nan", "bmi must be"),
        ("coverage", "L5-L2", "coverage must be like"),
        ("drop_slice", "maybe", "drop_slice must be"),
        ("vendor", "acme", "vendor must be one of"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(key: str, value: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        draw(1, **{key: value})


def test_assignments_are_parsed_or_refused() -> None:
    assert parse_assignments(["sex=F", "coverage = L2-L5"]) == {"sex": "F", "coverage": "L2-L5"}
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_assignments(["sex"])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short enhanced study with a missing slice."""
    settings = {
        "coverage": "L3-L4",
        "slice_mm": "5",
        "drop_slice": "true",
        "contrast_phase": "portal",
        "kvp": "140",
    }
    return make_study(SEED, tmp_path_factory.mktemp("study") / "one", settings | {"bmd_g_cm2": "0.8"})


def test_every_file_says_that_it_is_synthetic_and_how_it_was_made(study: Path) -> None:
    files = sorted((study / "dicom").glob("*.dcm"))
    assert files[0].name == "0001.dcm"
    for path in files:
        ds = pydicom.dcmread(path)
        assert ds.SyntheticData == "YES"
        assert (ds.PatientID, ds.PatientAge[-1], float(ds.KVP)) == (f"OSG-{SEED:06d}", "Y", 140.0)
        assert ds.ContrastBolusAgent
        assert list(ds.ImageType) == ["ORIGINAL", "PRIMARY", "AXIAL"]
        age = int(ds.StudyDate[:4]) - int(ds.PatientBirthDate[:4])
        age -= ds.StudyDate[4:] < ds.PatientBirthDate[4:]
        assert age == int(ds.PatientAge[:3])


def test_exactly_one_middle_slice_is_missing(study: Path) -> None:
    headers = [pydicom.dcmread(p, stop_before_pixels=True) for p in sorted((study / "dicom").glob("*.dcm"))]
    z = np.array([float(h.ImagePositionPatient[2]) for h in headers])
    steps = np.diff(z)
    assert sorted(np.rint(steps / 5.0)) == [1.0] * (len(steps) - 1) + [2.0]
    assert 0 < int(np.argmax(steps)) < len(steps) - 1


def test_labels_lie_on_the_ct_in_patient_space(study: Path) -> None:
    image = nib.load(study / "labels.nii.gz")
    labels = np.asarray(image.dataobj)
    truth = json.loads((study / "truth.json").read_text())
    for name in ("L3", "L4"):
        lps = np.array(truth["levels"][name]["center_lps_mm"])
        ijk = np.linalg.inv(image.affine) @ [-lps[0], -lps[1], lps[2], 1.0]
        assert labels[tuple(np.rint(ijk[:3]).astype(int))] == LABELS[name]
        number = round(ijk[2]) + 1
        if number - 1 != truth["dropped_slice"]:
            ds = pydicom.dcmread(study / "dicom" / f"{number:04d}.dcm")
            row = (lps[1] - ds.ImagePositionPatient[1]) / ds.PixelSpacing[0]
            assert row == pytest.approx(ijk[1], abs=0.01)


def test_truth_holds_what_was_measured(study: Path) -> None:
    truth = json.loads((study / "truth.json").read_text())
    assert truth["patient"]["bmd_g_cm2"] == pytest.approx(0.8, abs=0.01)
    assert truth["patient"]["tbs_kind"] == "simulated"
    assert set(truth["levels"]) == set(LEVELS)
    assert truth["levels"]["L3"]["in_view"]
    assert not truth["levels"]["L1"]["in_view"]


def test_pixels_survive_the_file(study: Path) -> None:
    ds = pydicom.dcmread(study / "dicom" / "0003.dcm")
    hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    assert hu.min() < -900
    assert hu.max() > 250


def test_a_slice_that_cannot_be_dropped_is_refused() -> None:
    with pytest.raises(ValueError, match="drop_slice must be 1 to"):
        dicom.dropped_slice(draw(1, drop_slice=400), 80)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
@pytest.mark.parametrize("vendor", ["canon", "siemens", "philips", "ge"])
def test_dciodvfy_finds_no_error(tmp_path: Path, vendor: str) -> None:
    patient = draw(SEED, vendor=vendor, contrast_phase="portal" if vendor == "ge" else "native")
    grid = Grid((2, 16, 16), (3.0, 0.7, 0.7), (-100.5, -80.25, -312.5))
    paths = dicom.write_series(patient, tmp_path, np.zeros(grid.shape_kji, np.int16), grid)
    report = subprocess.run(["dciodvfy", str(paths[0])], capture_output=True, text=True, check=False)
    lines = (report.stdout + report.stderr).splitlines()
    assert any("CTImage" in line for line in lines)
    # releases older than DICOM 2022e do not know SyntheticData
    assert [line for line in lines if line.startswith("Error") and "(0x0008,0x001c)" not in line] == []
