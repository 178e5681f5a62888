"""The level checks: right levels are "certain", and nothing that is cut, swapped, counted wrong or doubted is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

from models.crop import locate
from models.phantom.grid import Grid
from models.phantom.patient import draw
from models.phantom.render import render
from models.phantom.spine import spine_bounds
from service.domain.reasons import Code
from service.domain.result import LEVELS, Anatomy, Numbering, Renumbering
from service.domain.vertebrae import VERTEBRAE
from worker import anatomy as anatomy_room
from worker.anatomy import assess, measure_shapes
from worker.segmentation import Segmentation
from worker.segmentation.base import L5, L6, LEVEL_IDS, S1, SACRUM, T12, LabelArray
from worker.segmentation.cleaning import clean
from worker.segmentation.quality import Calibration, Curve
from worker.volume import Volume

Point = tuple[float, float, float]


@pytest.fixture(scope="module")
def spine() -> tuple[Volume, LabelArray]:
    """A digital patient's true labels, T11 to the sacrum, with room all round for what ribs there are."""
    return rendered_spine()


def rendered_spine(**settings: str | int | bool) -> tuple[Volume, LabelArray]:
    patient = draw(4, **settings)
    low, high = spine_bounds(patient, "T11", "S1")
    beside, around = 40.0, 15.0
    grid = Grid.covering(
        (low[0] - beside, low[1] - around, low[2] - around), (high[0] + beside, high[1] + around, high[2] + around),
        (2.5,) * 3,
    )  # fmt: skip
    rendered = render(patient, grid)
    labels = rendered.labels.copy()
    labels[labels == 34] = 0  # T10's stump at the upper end
    return Volume(rendered.hu_noise_free, rendered.affine), labels


def centroids(volume: Volume, labels: LabelArray) -> dict[int, Point]:
    """What a perfect second opinion says."""
    found = {}
    for label in np.unique(labels[labels > 0]):
        x, y, z = (volume.affine @ [*np.argwhere(labels == label).mean(axis=0), 1])[:3]
        found[int(label)] = (float(x), float(y), float(z))
    return found


def look(volume: Volume, labels: LabelArray, opinion: Mapping[int, Point] | None = None) -> Anatomy:
    return assess(volume, Segmentation(labels, "test", "0" * 64, second_opinion=opinion))


def renamed(labels: LabelArray, names: Mapping[int, int]) -> LabelArray:
    table = np.arange(256, dtype=np.uint8)
    for old, new in names.items():
        table[old] = new
    return table[labels]


def codes(anatomy: Anatomy) -> set[Code]:
    return {reason.code for reason in anatomy.refusals}


def test_right_levels_with_two_anchors_are_certain(spine: tuple[Volume, LabelArray]) -> None:
    volume, labels = spine
    for opinion in (centroids(volume, labels), None):
        anatomy = look(volume, labels, opinion)
        assert anatomy.numbering is Numbering.CERTAIN, anatomy.notes
        assert anatomy.lumbar_count == 5
        assert not anatomy.refusals
        assert all(anatomy.levels[name].in_view for name in LEVELS)
        assert not any(anatomy.levels[name].exclusions for name in LEVELS)


def test_heights_are_those_of_the_digital_patient(spine: tuple[Volume, LabelArray]) -> None:
    volume, labels = spine
    anatomy = look(volume, labels)
    patient = draw(4)
    for name in LEVELS:
        heights, truth = anatomy.levels[name].heights, patient.vertebra(name)
        assert heights is not None
        hollow = 2 * truth.endplate_hollow  # 15 % inside the rims the endplates are hollow already
        assert heights.anterior is not None
        assert heights.middle is not None
        assert heights.posterior is not None
        assert truth.height_anterior - hollow - 1.5 < heights.anterior < truth.height_anterior + 1.0
        assert truth.height_posterior - hollow - 1.5 < heights.posterior < truth.height_posterior + 1.0
        assert heights.middle == pytest.approx(truth.height - hollow, abs=2.0)


def test_without_the_sacrum_nothing_is_certain(spine: tuple[Volume, LabelArray]) -> None:
    volume, labels = spine
    rootless = renamed(labels, {SACRUM: 0, S1: 0})
    for opinion in (None, centroids(volume, rootless)):
        anatomy = look(volume, rootless, opinion)
        assert anatomy.numbering is Numbering.UNCERTAIN
        assert anatomy.lumbar_count is None
        assert Code.LEVELS_UNCERTAIN in codes(anatomy)


def test_a_cut_top_puts_its_level_out_of_view(spine: tuple[Volume, LabelArray]) -> None:
    volume, labels = spine
    middle = int(np.argwhere(labels == LEVEL_IDS["L1"])[:, 0].mean())
    cut = Volume(volume.hu[:middle], volume.affine)
    anatomy = look(cut, labels[:middle], centroids(cut, labels[:middle]))
    assert [name for name in LEVELS if not anatomy.levels[name].in_view] == ["L1"]
    assert Code.LEVEL_OUT_OF_VIEW in codes(anatomy)


def test_a_level_cut_short_of_the_edge_is_still_out_of_view(spine: tuple[Volume, LabelArray]) -> None:
    """A network may stop one slice before the end of the CT: half a vertebra there is not a small one."""
    volume, labels = spine
    middle = int(np.argwhere(labels == LEVEL_IDS["L1"])[:, 0].mean())
    short = labels[: middle + 1].copy()
    short[-1] = 0
    anatomy = look(Volume(volume.hu[: middle + 1], volume.affine), short)
    assert not anatomy.levels["L1"].in_view


def test_swapped_levels_are_uncertain(spine: tuple[Volume, LabelArray]) -> None:
    volume, labels = spine
    swapped = renamed(labels, {LEVEL_IDS["L2"]: LEVEL_IDS["L3"], LEVEL_IDS["L3"]: LEVEL_IDS["L2"]})
    anatomy = look(volume, swapped, centroids(volume, swapped))
    assert anatomy.numbering is Numbering.UNCERTAIN
    assert any("order" in note for note in anatomy.notes)


@pytest.mark.parametrize(("reaches_the_end", "numbering"), [(True, Numbering.CERTAIN), (False, Numbering.UNCERTAIN)])
def test_a_process_that_hangs_from_above_the_ct_is_not_out_of_order(
    spine: tuple[Volume, LabelArray], reaches_the_end: bool, numbering: Numbering
) -> None:
    """T10 is cut; its process, all that there is of it, has its middle below T11's."""
    volume, labels = spine
    seen = labels.copy()
    k, _, i = np.argwhere(labels == T12 + 1).mean(axis=0).astype(int)
    last = int(np.flatnonzero((labels == T12 + 1).any(axis=(1, 2)))[-1])
    end = last + 2 if reaches_the_end else last
    behind = int(np.argwhere(labels[:, :, i] > 0)[:, 1].max()) + 1
    seen[k - 16 : end, behind : behind + 5, i - 2 : i + 3] = T12 + 2
    cut = slice(0, last + 2)
    anatomy = look(Volume(volume.hu[cut], volume.affine), seen[cut], centroids(volume, labels))
    assert anatomy.numbering is numbering, anatomy.notes


def test_an_upside_down_volume_is_uncertain(spine: tuple[Volume, LabelArray]) -> None:
    volume, labels = spine
    turned = np.ascontiguousarray(labels[::-1])
    anatomy = look(Volume(volume.hu[::-1], volume.affine), turned, centroids(volume, turned))
    assert anatomy.numbering is Numbering.UNCERTAIN


def test_left_and_right_may_be_mirrored_but_not_front_and_back(spine: tuple[Volume, LabelArray]) -> None:
    volume, labels = spine
    mirrored = np.ascontiguousarray(labels[:, :, ::-1])
    left_right = look(Volume(np.ascontiguousarray(volume.hu[:, :, ::-1]), volume.affine), mirrored)
    assert all(left_right.levels[name].in_view for name in LEVELS)  # the same levels, the same heights
    turned = np.ascontiguousarray(labels[:, ::-1])
    hu = np.ascontiguousarray(volume.hu[:, ::-1])
    front_back = look(Volume(hu, volume.affine), turned, centroids(volume, turned))
    assert front_back.numbering is Numbering.UNCERTAIN


@pytest.mark.parametrize(
    ("names", "why"),
    [
        # a sixth body, named so; the same numbered from the top; four bodies numbered from the top; one level skipped
        ({27: L6, 28: 27, 29: 28, 30: 29, 31: 30, 32: 31, 33: 32}, "sixth"),
        ({27: 28, 28: 29, 29: 30, 30: 31, 31: 32, 32: 33, 33: 34}, "not L5"),
        ({27: 28, 28: 29, 29: 30, 30: 31, 31: 32, 32: 33, 33: 0}, "not L5"),
        ({31: 32, 32: 33, 33: 34}, "missing"),
        ({29: 0}, "missing"),
    ],
)
def test_other_than_five_lumbar_bodies_are_uncertain(
    spine: tuple[Volume, LabelArray], names: Mapping[int, int], why: str
) -> None:
    volume, labels = spine
    odd = renamed(labels, names)
    anatomy = look(volume, odd, centroids(volume, odd))
    assert anatomy.numbering is Numbering.UNCERTAIN
    assert any(why in note for note in anatomy.notes), anatomy.notes


FROM_BELOW = {  # names by a network that knows five lumbar bodies and counts up from the sacrum
    6: {L6: 27, 27: 28, 28: 29, 29: 30, 30: 31, 31: 32, 32: 33, 33: 34},
    4: {28: 27, 29: 28, 30: 29, 31: 30, 32: 31, 33: 32},
}


@pytest.mark.parametrize(
    ("count", "why", "offered"),
    [
        (6, "The last ribs belong to T11, not to T12.", {"T11": "T12", "T12": "L1", "L1": "L2", "L5": "L6"}),
        (4, "The last ribs belong to L1, not to T12.", {"T12": "T11", "L1": "T12", "L2": "L1", "L5": "L4"}),
    ],
)
def test_four_and_six_lumbar_bodies_are_seen_by_their_ribs(count: int, why: str, offered: dict[str, str]) -> None:
    """Both ends of the numbering are in view and every name is in order: only the image can contradict them."""
    volume, truth = rendered_spine(lumbar_count=count)
    named = renamed(truth, FROM_BELOW[count])
    anatomy = look(volume, named, centroids(volume, named))
    assert anatomy.numbering is Numbering.UNCERTAIN
    assert why in anatomy.notes
    assert codes(anatomy) >= {Code.LEVELS_UNCERTAIN}
    assert anatomy.alternative is not None
    assert offered.items() <= anatomy.alternative.items()
    right = renamed(named, {_id(old): _id(new) for old, new in anatomy.alternative.items()})
    assert np.array_equal(right[truth > S1], truth[truth > S1])
    decided = assess(volume, Segmentation(right, "test", "0" * 64), renumbered=BY_A_PERSON)
    assert decided.numbering is Numbering.CERTAIN, decided.notes
    assert decided.renumbered == BY_A_PERSON
    assert decided.alternative is None
    assert "dr" in decided.notes[0]
    assert not decided.refusals


BY_A_PERSON = Renumbering({"L1": "L2"}, by="dr", at="2026-11-28T07:00:00+00:00", reason="ribs on the scout")


def _id(name: str) -> int:
    return next(one.class_id for one in VERTEBRAE if one.name == name)


def test_a_persons_word_does_not_cure_bad_outlines(spine: tuple[Volume, LabelArray]) -> None:
    volume, labels = spine
    swapped = renamed(labels, {LEVEL_IDS["L2"]: LEVEL_IDS["L3"], LEVEL_IDS["L3"]: LEVEL_IDS["L2"]})
    anatomy = assess(volume, Segmentation(swapped, "test", "0" * 64), renumbered=BY_A_PERSON)
    assert anatomy.numbering is Numbering.UNCERTAIN
    assert "anatomical order" in anatomy.refusals[0].text


def curve(coefficient: float) -> Calibration:
    """A calibration that calls every outline good (or, below 0, bad), by its edge."""
    return Calibration(None, Curve("outline", None, (0.0, 0.0), (1.0, 1.0), (0.0, coefficient), 0.0, limit=0.5))


def test_an_outline_of_low_quality_costs_its_level(
    spine: tuple[Volume, LabelArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, labels = spine
    for coefficient, expected in ((30.0, []), (-30.0, [Code.LOW_QUALITY])):
        monkeypatch.setattr(anatomy_room, "shipped", partial(curve, coefficient))
        anatomy = look(volume, labels)
        assert anatomy.quality_basis == "outline"
        for name in LEVELS:
            assert [reason.code for reason in anatomy.levels[name].exclusions] == expected
            quality = anatomy.levels[name].quality
            assert quality is not None
            assert (quality < 0.5) == bool(expected)
        assert anatomy.numbering is Numbering.CERTAIN  # names are another matter


def test_a_t12_without_ribs_is_uncertain() -> None:
    volume, labels = rendered_spine(ribs=False)
    anatomy = look(volume, labels, centroids(volume, labels))
    assert anatomy.numbering is Numbering.UNCERTAIN
    assert "T12 carries no rib." in anatomy.notes
    assert anatomy.alternative is None  # nothing to count from


def test_ribs_on_l1_are_uncertain() -> None:
    volume, labels = rendered_spine(t13_ribs=True)
    anatomy = look(volume, labels, centroids(volume, labels))
    assert anatomy.numbering is Numbering.UNCERTAIN
    assert "The last ribs belong to L1, not to T12." in anatomy.notes


@pytest.mark.parametrize("cut", ["the top", "the sides"])
def test_a_truncated_view_never_guesses(spine: tuple[Volume, LabelArray], cut: str) -> None:
    """L1 to the sacrum are there, whole, rightly named and agreed on; the ribs that would prove it are not."""
    volume, labels = spine
    if cut == "the top":
        end = int(np.argwhere(labels == LEVEL_IDS["L1"])[:, 0].max()) + 2
        box = (slice(0, end), slice(None), slice(None))
    else:
        across = np.argwhere(np.isin(labels, list(LEVEL_IDS.values())))[:, 2]
        box = (slice(None), slice(None), slice(int(across.min()) - 2, int(across.max()) + 3))
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [float(side.start or 0) for side in box]
    part, seen = Volume(np.ascontiguousarray(volume.hu[box]), affine), np.ascontiguousarray(labels[box])
    anatomy = look(part, seen, centroids(part, seen))
    assert all(anatomy.levels[name].in_view for name in LEVELS)
    assert anatomy.numbering is Numbering.UNCERTAIN
    assert "Fewer than two anchors for the numbering (the sacrum right below L5)." in anatomy.notes


def test_a_second_opinion_one_level_off_is_uncertain(spine: tuple[Volume, LabelArray]) -> None:
    volume, labels = spine
    shifted = centroids(volume, renamed(labels, {label: label + 1 for label in range(L5, T12)}))
    anatomy = look(volume, labels, shifted)
    assert anatomy.numbering is Numbering.UNCERTAIN
    assert any("coarse network" in note for note in anatomy.notes)


def test_what_is_not_bone_is_doubted(spine: tuple[Volume, LabelArray]) -> None:
    volume, labels = spine
    anatomy = look(replace(volume, hu=np.zeros_like(volume.hu)), labels, centroids(volume, labels))
    assert anatomy.numbering is Numbering.UNCERTAIN


def test_no_spine_and_no_lumbar_spine(spine: tuple[Volume, LabelArray]) -> None:
    volume, labels = spine
    for empty in (np.zeros_like(labels), np.where(labels >= T12, labels, 0).astype(np.uint8)):
        anatomy = look(volume, empty, {})
        assert codes(anatomy) == {Code.NO_SPINE_FOUND, Code.LEVEL_OUT_OF_VIEW}
        assert anatomy.numbering is Numbering.UNCERTAIN
        assert not any(anatomy.levels[name].in_view for name in LEVELS)


def test_a_wedge_fracture_beyond_the_error_is_excluded(spine: tuple[Volume, LabelArray]) -> None:
    volume, labels = spine
    broken = wedged(volume, labels, LEVEL_IDS["L2"])
    anatomy = look(volume, broken)
    assert [reason.code for reason in anatomy.levels["L2"].exclusions] == [Code.FRACTURE]
    assert not anatomy.levels["L3"].exclusions
    thick = replace(volume, affine=volume.affine @ np.diag([4.0, 1.0, 1.0, 1.0]))
    coarse = look(Volume(volume.hu[::4], thick.affine), np.ascontiguousarray(broken[::4]))
    assert Code.FRACTURE not in {reason.code for reason in coarse.levels["L3"].exclusions}


def wedged(volume: Volume, labels: LabelArray, label: int) -> LabelArray:
    """One body with its upper endplate sloping down to the front."""
    vertebra = locate(labels, volume.affine, label)
    voxels = np.argwhere(labels == label)
    lps = voxels @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    local = vertebra.frame.from_lps(lps)
    gone = (local[:, 1] < 8) & (local[:, 2] > 0.8 * local[:, 1] + 8) & (np.abs(local[:, 0]) < 30)
    broken: npt.NDArray[np.uint8] = labels.copy()
    broken[tuple(voxels[gone].T)] = 0
    return broken


def test_islands_join_the_vertebra_that_they_touch_or_go() -> None:
    labels = np.zeros((30, 12, 12), dtype=np.uint8)
    labels[2:10, 2:10, 2:10] = 28
    labels[12:20, 2:10, 2:10] = 29
    labels[18:20, 2:10, 2:10] = 28  # L4's name on top of L3
    labels[25:27, 5:7, 5:7] = 29  # L3's name in the air
    labels[0, 0, 0] = 31  # a speck
    cleaned = clean(labels, voxel_ml=0.01)
    assert not (cleaned == 31).any()
    assert (cleaned[12:20, 2:10, 2:10] == 29).all()
    assert not cleaned[21:].any()
    assert (cleaned[2:10, 2:10, 2:10] == 28).all()
    assert not clean(np.zeros_like(labels), 1.0).any()


def test_shapes_are_in_millimetres_and_millilitres() -> None:
    labels = np.zeros((30, 40, 40), dtype=np.uint8)
    labels[5:15, 10:30, 10:30] = 29
    affine = np.array([[0, 0, 1.0, 0], [0, 1.0, 0, 0], [3.0, 0, 0, -90], [0, 0, 0, 1]])
    shape = measure_shapes(labels, Volume(np.full(labels.shape, 100, np.float32), affine))[29]
    assert shape.volume_ml == pytest.approx(12.0)
    assert (shape.lowest, shape.highest) == pytest.approx((-76.5, -46.5))
    assert shape.centroid == pytest.approx([19.5, 19.5, -61.5])
    assert not shape.cut
