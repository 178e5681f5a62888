"""The paper's exclusions on digital patients whose ailments are known: found where they are, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from models.phantom.patient import draw
from models.phantom.render import render
from models.phantom.scanner import scan, scanner_rng
from models.phantom.settings import Setting
from service.domain.policy import FindingsPolicy
from service.domain.reasons import Code
from service.domain.result import LEVELS, Anatomy
from worker.anatomy import assess
from worker.findings.evaluate import lumbar_box, true_cobb_deg, wholly_seen
from worker.segmentation import Segmentation
from worker.segmentation.base import LEVEL_IDS, T12, LabelArray
from worker.volume import Volume

THICK_MM = 3.0  # slices of a plain abdominal CT: the hard case


@cache
def patient_ct(seed: int, settings: tuple[tuple[str, Setting], ...]) -> tuple[Volume, LabelArray, float]:
    """The lumbar part of a digital patient's CT, its true labels, and its true Cobb angle."""
    patient = draw(seed, slice_mm=THICK_MM, **dict(settings))
    rendered = render(patient, lumbar_box(patient))
    hu = scan(rendered, patient, scanner_rng(patient)).astype(np.float32)
    volume = Volume(hu, rendered.affine)
    seen = wholly_seen(volume, Segmentation(rendered.labels, "true", "0" * 64))
    return volume, rendered.labels, true_cobb_deg(patient, seen)


def look(seed: int, policy: FindingsPolicy | None = None, **settings: Setting) -> Anatomy:
    volume, labels, _ = patient_ct(seed, tuple(settings.items()))
    return assess(volume, Segmentation(labels, "true", "0" * 64), policy)


def excluded(anatomy: Anatomy) -> dict[str, list[Code]]:
    found = {name: [reason.code for reason in anatomy.levels[name].exclusions] for name in LEVELS}
    return {name: codes for name, codes in found.items() if codes}


@pytest.mark.parametrize("seed", [610100, 610101])
@pytest.mark.parametrize("kind", ["wedge", "biconcave", "crush"])
def test_forty_five_per_cent_are_found_at_thick_slices_and_nothing_else(seed: int, kind: str) -> None:
    anatomy = look(seed, fracture=f"L2:45:{kind}")
    assert excluded(anatomy) == {"L2": [Code.FRACTURE]}


def test_neighbours_that_both_gave_way_do_not_hide_each_other() -> None:
    assert excluded(look(610102, fracture="L2:50:crush,L3:50:crush")) == {"L2": [Code.FRACTURE], "L3": [Code.FRACTURE]}


def test_an_outline_that_gave_way_is_no_curve() -> None:
    """Of T11 at the CT's end a network left a slanting rest: its endplates are no end vertebra's."""
    volume, labels, truth = patient_ct(610104, ())
    k, _, i = np.nonzero(labels == T12 + 1)
    rest = labels.copy()
    gone = (k - k.mean()) * volume.spacing_mm[0] > 0.8 * (i - i.mean()) * volume.spacing_mm[2] - 6.0
    rest[labels == T12 + 1] = np.where(gone, 0, T12 + 1)
    anatomy = assess(volume, Segmentation(rest, "made", "0" * 64))
    assert anatomy.cobb_deg == pytest.approx(truth, abs=4.0)
    assert Code.SCOLIOSIS not in {reason.code for reason in anatomy.refusals}


def test_a_small_loss_is_no_exclusion() -> None:
    assert excluded(look(610103, fracture="L3:15:wedge")) == {}


def test_a_spine_without_ailment_is_left_alone() -> None:
    anatomy = look(610104)
    assert excluded(anatomy) == {}
    assert anatomy.refusals == ()
    assert anatomy.contrast == "native"


@pytest.mark.parametrize(
    ("ailment", "code"), [("metal", Code.METAL), ("cement", Code.CEMENT), ("sclerosis", Code.SCLEROSIS)]
)
def test_what_is_denser_than_bone_is_named(ailment: str, code: Code) -> None:
    found = excluded(look(610105, **{ailment: "L2"}))
    assert found["L2"] == [code]
    assert "L4" not in found  # two levels away


def test_cement_hides_the_endplates_and_is_no_fracture() -> None:
    """Beside an endplate its lump is the brightest place: in this patient it read as a loss of height."""
    found = look(700517, cement="L2", contrast_phase="arterial")
    assert excluded(found) == {"L2": [Code.CEMENT]}


def test_metal_leaves_out_the_neighbour_that_its_rods_reach() -> None:
    anatomy = look(610105, metal="L2")
    assert Code.METAL in excluded(anatomy)["L1"]
    assert any("earlier surgery" in note for note in anatomy.notes)


@pytest.mark.parametrize("phase", ["arterial", "portal"])
def test_contrast_medium_is_seen_in_the_pixels(phase: str) -> None:
    anatomy = look(610106, contrast_phase=phase)
    assert anatomy.contrast == phase
    assert [reason.code for reason in anatomy.refusals] == [Code.CONTRAST_IN_PIXELS]


def spine_alone(volume: Volume, labels: LabelArray) -> tuple[Volume, LabelArray]:
    """A reconstruction so narrow that all beyond 3 mm of bone is padding, as outside of a scanner's circle."""
    away = ndimage.distance_transform_edt(labels == 0, sampling=volume.spacing_mm) > 3.0
    return Volume(np.where(away, np.float32(-1024), volume.hu), volume.affine), labels


def box_around_l2_to_l4(volume: Volume, labels: LabelArray) -> tuple[Volume, LabelArray]:
    """A CT that ends at these vertebrae; a box around more of a lordotic spine has vessels in its upper front."""
    spine = np.argwhere((labels >= LEVEL_IDS["L4"]) & (labels <= LEVEL_IDS["L2"]))
    low, high = spine.min(axis=0) - 1, spine.max(axis=0) + 2
    box = tuple(slice(start, stop) for start, stop in zip(low, high, strict=True))
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    return Volume(np.ascontiguousarray(volume.hu[box]), affine), np.ascontiguousarray(labels[box])


@pytest.mark.parametrize("narrowed", [spine_alone, box_around_l2_to_l4])
def test_without_vessels_in_view_contrast_is_not_ruled_out(
    narrowed: Callable[[Volume, LabelArray], tuple[Volume, LabelArray]],
) -> None:
    volume, labels = narrowed(*patient_ct(610104, ())[:2])
    anatomy = assess(volume, Segmentation(labels, "true", "0" * 64))
    assert anatomy.levels["L3"].in_view
    assert anatomy.contrast is None
    assert any("contrast medium could not be ruled out" in note for note in anatomy.notes)


@pytest.mark.parametrize("cobb_deg", [-28.0, 50.0])
def test_the_cobb_angle_is_the_phantoms(cobb_deg: float) -> None:
    anatomy = look(610107, cobb_deg=cobb_deg)
    true = patient_ct(610107, (("cobb_deg", cobb_deg),))[2]
    assert anatomy.cobb_deg == pytest.approx(true, abs=4.0)
    refused = Code.SCOLIOSIS in {reason.code for reason in anatomy.refusals}
    assert refused is (cobb_deg == 50.0)
    assert any("curved sideways" in note for note in anatomy.notes) is not refused
    assert Code.FRACTURE not in {code for codes in excluded(anatomy).values() for code in codes}


def test_the_site_moves_the_limits() -> None:
    strict = FindingsPolicy(cobb_severe_deg=20.0, sclerosis_hu=1000.0, contrast_vessel_hu=50.0)
    curved = look(610107, strict, cobb_deg=-28.0)
    assert {Code.SCOLIOSIS, Code.CONTRAST_IN_PIXELS} <= {reason.code for reason in curved.refusals}
    assert "L2" not in excluded(look(610105, strict, sclerosis="L2"))


def test_reference_tissues_are_those_of_the_patient_and_follow_the_scanner() -> None:
    """Fat and muscle as the patient was made, to within a few HU; a scanner that reads 12 HU more shows all of it."""
    volume, labels, _ = patient_ct(610104, ())
    torso = draw(610104, slice_mm=THICK_MM).torso
    found = assess(volume, Segmentation(labels, "true", "0" * 64)).reference_hu
    assert found.fat == pytest.approx(torso.visceral_fat_hu, abs=6)
    assert found.muscle == pytest.approx(torso.muscle_hu, abs=6)
    assert found.vessel is not None
    assert 25 < found.vessel < 75
    shifted = Volume(volume.hu + np.float32(12), volume.affine)
    moved = assess(shifted, Segmentation(labels, "true", "0" * 64)).reference_hu
    for before, after in ((found.fat, moved.fat), (found.muscle, moved.muscle), (found.vessel, moved.vessel)):
        assert before is not None
        assert after == pytest.approx(before + 12, abs=0.5)


def test_what_is_not_in_view_has_no_reference_tissue() -> None:
    volume, labels, _ = patient_ct(610104, ())
    air = Volume(np.full_like(volume.hu, -1000), volume.affine)
    found = assess(air, Segmentation(labels, "true", "0" * 64)).reference_hu
    assert (found.fat, found.muscle, found.vessel) == (None, None, None)
