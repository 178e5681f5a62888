"""Level safety: are these the right vertebrae, all of them, whole, and named beyond doubt?

Everything downstream stands on the right vertebra being named, and a misnamed level looks perfectly healthy.
So the names of a segmentation are held against anatomy: order, spacing, size, contiguity, the count between
sacrum and thorax. Two anchors fix them, each independent of the other: the sacrum right below L5, by the outlines,
and the last ribs at T12, seen in the image itself (`worker.ribs`). Numbering is "certain" only when both hold and
nothing contradicts them, the coarse network's second opinion included, which is no anchor: it learned its names where
the fine one did. Otherwise it is "uncertain", with the reason in words and the names by the other anchor. Truncated
views never guess. A person who renumbered has decided which names are right; what no names can cure still counts.

Thresholds are approximations from general anatomy (Panjabi 1992, Berry 1987 for sizes), wide on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from service.domain.policy import FindingsPolicy
from service.domain.reasons import Code, Reason
from service.domain.result import LEVELS, Anatomy, Heights, LevelAnatomy, Numbering, Renumbering
from worker.findings import Findings, find
from worker.located import Located
from worker.ribs import Sides, find_ribs
from worker.segmentation.base import (
    L1,
    L5,
    L6,
    LEVEL_IDS,
    S1,
    SACRUM,
    T10,
    T12,
    LabelArray,
    Point,
    Segmentation,
)
from worker.segmentation.quality import Quality, shipped, traits
from worker.volume import Volume

FloatArray = npt.NDArray[np.float64]

# A vertebra with its processes, ml. L1-L4 of adults lie between about 25 and 80.
VOLUME_ML = (12.0, 130.0)
VOLUME_JUMP = 1.8  # between neighbours
SPECK_ML = 4.0  # less than this of a vertebra above T12 says nothing
# Distance between the centroids of neighbouring lumbar vertebrae (body height + disc), mm
SPACING_MM = (20.0, 52.0)
SPACING_JUMP = 1.45  # between neighbouring distances
BODY_HEIGHT_MM = (10.0, 45.0)
OPINION_MM = 20.0  # a level's centroid by the coarse network may lie this far off: less than half a level
TOUCH_MM = 16.0  # neighbouring vertebrae are no further apart than a tall disc
SOFT_HU = 30.0  # a vertebra whose mean lies below this is not bone
BULK_SIGMA_MM = 6.0  # blur whose maximum is the body
STUMP_MM = 5.0  # how near to the end of the CT a low vertebra counts as cut
NAMES: Mapping[int, str] = {
    SACRUM: "sacrum", S1: "S1", L5: "L5", 28: "L4", 29: "L3", 30: "L2", L1: "L1", T12: "T12", 33: "T11", T10: "T10",
    L6: "L6",
}  # fmt: skip
LUMBAR = (L1, 30, 29, 28, L5)  # from the top down
MEASURED = (33, T12, *LUMBAR, L6)  # whose bodies are measured: L1-L4 and their neighbours


@dataclass(frozen=True)
class Shape:
    """What one label looks like: lengths in mm, positions in LPS mm."""

    label: int
    centroid: FloatArray
    body_centre: FloatArray
    volume_ml: float
    lowest: float  # along the patient's long axis
    highest: float
    cut: bool  # touches the first or last slice, or the side of the CT
    hu_mean: float


@dataclass(frozen=True)
class Doubts:
    """Why the numbering is not certain; and which anchors held."""

    outlines: tuple[str, ...]  # what no other names would cure
    names: tuple[str, ...]
    anchors: tuple[str, ...]

    def against(self, renumbered: Renumbering | None) -> tuple[str, ...]:
        """Everything that speaks against being certain; whoever renumbered has weighed the names."""
        if renumbered is not None:
            return self.outlines
        held = " and ".join(self.anchors) or "none"
        few = () if len(self.anchors) >= 2 else (f"Fewer than two anchors for the numbering ({held}).",)
        return (*self.outlines, *self.names, *few)


def assess(
    volume: Volume,
    segmentation: Segmentation,
    policy: FindingsPolicy | None = None,
    renumbered: Renumbering | None = None,
    located: Located | None = None,
) -> Anatomy:
    """Level checks and findings of one segmented CT; never raises for odd anatomy.

    `renumbered`: whoever gave the labels these names, where a person did. `located`: these labels' vertebrae, for a
    caller that needs them again.
    """
    shapes = measure_shapes(segmentation.labels, volume)
    lumbar = [label for label in shapes if label in LUMBAR or label == L6]
    if not lumbar:
        return replace(_no_spine(shapes), renumbered=renumbered)
    ribs = _ribs(volume, segmentation.labels, shapes)
    doubts = _doubts(shapes, segmentation, ribs)
    against = doubts.against(renumbered)
    certain = not against
    alternative = None if certain else _alternative(shapes, ribs)
    notes = [*_whose_names(renumbered), *(against or doubts.names), *_alternative_notes(alternative)]
    numbering = Numbering.CERTAIN if certain else Numbering.UNCERTAIN
    whole = [label for label, shape in shapes.items() if label in MEASURED and not shape.cut]
    located = located or Located(segmentation.labels, volume.affine)
    findings = find(volume, located, whole, policy or FindingsPolicy())
    notes += findings.notes
    qualities = _qualities(volume, segmentation, shapes, findings)
    levels = _levels(shapes, findings, qualities, policy or FindingsPolicy())
    refusals = []
    outside = [name for name in LEVELS if not levels[name].in_view]
    if outside:
        refusals.append(Reason(Code.LEVEL_OUT_OF_VIEW, f"{', '.join(outside)} not wholly in the field of view."))
    if not certain:
        refusals.append(Reason(Code.LEVELS_UNCERTAIN, "The numbering of the levels is not certain: " + against[0]))
    refusals += findings.refusals
    return Anatomy(
        levels=levels,
        numbering=numbering,
        lumbar_count=_lumbar_count(shapes),
        cobb_deg=findings.cobb_deg,
        contrast=findings.contrast,
        reference_hu=findings.reference_hu,
        notes=tuple(notes),
        refusals=tuple(refusals),
        alternative=alternative,
        renumbered=renumbered,
        quality_basis=next((quality.basis for quality in qualities.values()), None),
    )


def _no_spine(shapes: Mapping[int, Shape]) -> Anatomy:
    seen = ", ".join(NAMES.get(label, str(label)) for label in shapes)
    text = f"No lumbar vertebra was found ({seen} only)." if seen else "No vertebra was found."
    refusals = (
        Reason(Code.NO_SPINE_FOUND, text),
        Reason(Code.LEVEL_OUT_OF_VIEW, "L1-L4 are not in the field of view."),
    )
    levels = {name: LevelAnatomy(name, in_view=False) for name in LEVELS}
    return Anatomy(levels, Numbering.UNCERTAIN, lumbar_count=None, notes=(text,), refusals=refusals)


# -------------------------------------------------------------------------------------------------- numbering


def _ribs(volume: Volume, labels: LabelArray, shapes: Mapping[int, Shape]) -> dict[int, Sides]:
    free = {label: shape for label, shape in shapes.items() if label not in (SACRUM, S1)}
    middles = {label: shape.body_centre for label, shape in free.items()}
    return find_ribs(volume, labels, middles, [label for label, shape in free.items() if not shape.cut])


def last_ribs(volume: Volume, labels: LabelArray, shapes: Mapping[int, Shape]) -> str | None:
    """The name of the lowest vertebra that carries a rib; None where no rib is seen."""
    last = _last_ribbed(_from_the_top(shapes), _ribs(volume, labels, shapes))
    return None if last is None else _name(last.label)


def _doubts(shapes: Mapping[int, Shape], segmentation: Segmentation, ribs: Mapping[int, Sides]) -> Doubts:
    spine = _from_the_top(shapes)
    outlines = [
        *_order_doubts(shapes, spine),
        *_gap_doubts(spine),
        *_spacing_doubts(spine),
        *_size_doubts(spine),
    ]
    names = [
        *_count_doubts(shapes, spine),
        *_rib_doubts(spine, ribs),
        *_opinion_doubts(shapes, segmentation.second_opinion),
    ]
    return Doubts(tuple(outlines), tuple(names), _anchors(shapes, spine, ribs))


def _from_the_top(shapes: Mapping[int, Shape]) -> list[Shape]:
    """Free vertebrae (no sacrum, no S1) from head to feet, by position.

    Of the one that the CT's upper end cuts there may be no more than the process, which hangs beside the next one's
    body: it lies where it is cut.
    """
    free = [shape for label, shape in shapes.items() if label not in (SACRUM, S1)]
    top = max((shape.highest for shape in free), default=0.0)
    ends = {shape.label for shape in free if shape.cut and shape.highest >= top}
    return sorted(free, key=lambda shape: (shape.label not in ends, -float(shape.body_centre[2])))


def _rank(label: int) -> int:
    """Anatomical order from the feet up; a sixth lumbar body lies below L5."""
    return {SACRUM: 0, S1: 1, L6: 2}.get(label, label - L5 + 3)


def _order_doubts(shapes: Mapping[int, Shape], spine: list[Shape]) -> list[str]:
    found = [shape.label for shape in spine]
    doubts = []
    if found != sorted(found, key=_rank, reverse=True):
        names = " ".join(_name(label) for label in found)
        doubts.append(f"The levels are not in anatomical order: {names}.")
    backwards = [shape for shape in spine if not shape.cut and shape.body_centre[1] > shape.centroid[1]]
    if len(backwards) > len(spine) / 2:
        doubts.append("The spinous processes point forward: the CT may be turned or mirrored.")
    high = [label for label in (SACRUM, S1) if label in shapes and spine]
    high = [label for label in high if shapes[label].centroid[2] > spine[-1].body_centre[2]]
    doubts.extend(f"The {_name(label)} does not lie below the lumbar spine." for label in high)
    return doubts


def _gap_doubts(spine: list[Shape]) -> list[str]:
    ranks = [_rank(shape.label) for shape in spine if shape.label != L6]
    missing = sorted(set(range(min(ranks, default=0), max(ranks, default=-1) + 1)) - set(ranks))
    if not missing:
        return []
    return ["Between the levels found, these are missing: " + ", ".join(_name(rank - 3 + L5) for rank in missing) + "."]


def _count_doubts(shapes: Mapping[int, Shape], spine: list[Shape]) -> list[str]:
    doubts = []
    if L6 in shapes:
        doubts.append("There is a sixth lumbar body: the levels may be numbered from the top or from the bottom.")
    elif _bounded(shapes) and (count := _lumbar_count(shapes)) is not None and count != 5:
        doubts.append(
            f"{count} lumbar bodies between thorax and sacrum instead of 5: a transitional vertebra is possible."
        )
    if _has_sacrum(shapes) and spine and (gap := _gap_to_sacrum(shapes, spine[-1])) > TOUCH_MM:
        doubts.append(f"{gap:.0f} mm between the lowest vertebra found and the sacrum: one may be missing.")
    if _has_sacrum(shapes) and spine and spine[-1].label not in (L5, L6):
        doubts.append(f"Right above the sacrum lies {_name(spine[-1].label)}, not L5.")
    return doubts


def _rib_doubts(spine: list[Shape], ribs: Mapping[int, Sides]) -> list[str]:
    last = _last_ribbed(spine, ribs)
    if last is not None and last.label != T12:
        return [f"The last ribs belong to {_name(last.label)}, not to T12."]
    if T12 in ribs and not ribs[T12].ribbed:
        return ["T12 carries no rib."]
    return []


def _last_ribbed(spine: list[Shape], ribs: Mapping[int, Sides]) -> Shape | None:
    """The lowest vertebra that carries a rib; None where no rib was seen."""
    ribbed = [shape for shape in spine if shape.label in ribs and ribs[shape.label].ribbed]
    return ribbed[-1] if ribbed else None


def _spacing_doubts(spine: list[Shape]) -> list[str]:
    doubts = []
    whole = _judged(spine)
    steps = [float(np.linalg.norm(a.body_centre - b.body_centre)) for a, b in pairwise(whole)]
    for (upper, lower), step in zip(pairwise(whole), steps, strict=True):
        if not SPACING_MM[0] <= step <= SPACING_MM[1]:
            doubts.append(f"{_name(upper.label)} and {_name(lower.label)} are {step:.0f} mm apart.")
    for one, two in pairwise(steps):
        if max(one, two) > SPACING_JUMP * min(one, two):
            doubts.append(
                f"Neighbouring levels are unevenly spaced ({one:.0f} and {two:.0f} mm): one may be missing or split."
            )
    return doubts


def _size_doubts(spine: list[Shape]) -> list[str]:
    doubts: list[str] = []
    whole = _judged(spine)
    for shape in whole:
        if not VOLUME_ML[0] <= shape.volume_ml <= VOLUME_ML[1]:
            doubts.append(f"{_name(shape.label)} has an implausible volume ({shape.volume_ml:.0f} ml).")
        if shape.hu_mean < SOFT_HU:
            doubts.append(f"{_name(shape.label)} is not bone (mean {shape.hu_mean:.0f} HU).")
    for upper, lower in pairwise(whole):
        small, large = sorted((upper.volume_ml, lower.volume_ml))
        if large > VOLUME_JUMP * small:
            doubts.append(
                f"{_name(upper.label)} and {_name(lower.label)} differ too much in volume "
                f"({small:.0f} and {large:.0f} ml)."
            )
    return doubts


def _judged(spine: list[Shape]) -> list[Shape]:
    """Whole vertebrae from T12 down: above it a network may be unsure without harm to L1-L4."""
    return [shape for shape in spine if not shape.cut and _rank(shape.label) <= _rank(T12)]


def _opinion_doubts(shapes: Mapping[int, Shape], opinion: Mapping[int, Point] | None) -> list[str]:
    if opinion is None:
        return []
    doubts = []
    for label in LUMBAR:
        if label in shapes and not shapes[label].cut:
            distance = _distance(shapes[label], opinion.get(label))
            if distance is None:
                doubts.append(f"The coarse network does not see {_name(label)}.")
            elif distance > OPINION_MM:
                doubts.append(f"The coarse network places {_name(label)} {distance:.0f} mm away.")
    if L6 in opinion and L6 not in shapes:
        doubts.append("The coarse network sees a sixth lumbar body.")
    return doubts


def _anchors(shapes: Mapping[int, Shape], spine: list[Shape], ribs: Mapping[int, Sides]) -> tuple[str, ...]:
    """The facts that fix the numbering, each on its own; both are needed."""
    anchors = []
    if _has_sacrum(shapes) and L5 in shapes and _gap_to_sacrum(shapes, shapes[L5]) <= TOUCH_MM:
        anchors.append("the sacrum right below L5")
    last = _last_ribbed(spine, ribs)
    if last is not None and last.label == T12 and L1 in ribs and not ribs[L1].ribbed:
        anchors.append("the last ribs at T12")
    return tuple(anchors)


def _alternative(shapes: Mapping[int, Shape], ribs: Mapping[int, Sides]) -> dict[str, str] | None:
    """What each free vertebra in view would be called by the anchor that the names do not follow.

    None where there is no such anchor, where it says the same, or where a vertebra may be missing in between: counting
    would be a guess.
    """
    spine = _from_the_top(shapes)
    if _spacing_doubts(spine):
        return None
    found = [shape.label for shape in spine]
    others = [names for names in (_by_sacrum(shapes, spine), _by_ribs(spine, ribs)) if names not in (None, found)]
    if not others or others[0] is None:
        return None
    return {_name(old): _name(new) for old, new in zip(found, others[0], strict=True)}


def _by_sacrum(shapes: Mapping[int, Shape], spine: list[Shape]) -> list[int] | None:
    """The labels from the top, counted up from L5 at the sacrum."""
    if not _has_sacrum(shapes) or _gap_to_sacrum(shapes, spine[-1]) > TOUCH_MM:
        return None
    return [L5 + place for place in range(len(spine))][::-1]


def _by_ribs(spine: list[Shape], ribs: Mapping[int, Sides]) -> list[int] | None:
    """The labels from the top, counted down from T12 at the last ribs."""
    last = _last_ribbed(spine, ribs)
    if last is None:
        return None
    above, below = spine.index(last), len(spine) - 1 - spine.index(last)
    if below > len(LUMBAR) + 1:
        return None
    return [T12 + place for place in range(above, 0, -1)] + [T12, *LUMBAR, L6][: below + 1]


def _whose_names(renumbered: Renumbering | None) -> list[str]:
    if renumbered is None:
        return []
    changed = ", ".join(f"{old} is {new}" for old, new in renumbered.levels.items() if old != new)
    return [f"The levels were named by {renumbered.by}: {changed or 'confirmed as they were'} ({renumbered.reason})."]


def _alternative_notes(alternative: Mapping[str, str] | None) -> list[str]:
    if alternative is None:
        return []
    told = ", ".join(f"{old} would be {new}" for old, new in alternative.items())
    return [f"Counted from the other end: {told}."]


def _distance(shape: Shape, point: Point | None) -> float | None:
    return None if point is None else float(np.linalg.norm(shape.centroid - np.array(point)))


def _has_sacrum(shapes: Mapping[int, Shape]) -> bool:
    return SACRUM in shapes or S1 in shapes


def _gap_to_sacrum(shapes: Mapping[int, Shape], shape: Shape) -> float:
    """From the lower end of a vertebra to the top of the sacrum, mm along the patient; negative where they
    interlock.
    """
    top = max(shapes[label].highest for label in (SACRUM, S1) if label in shapes)
    return shape.lowest - top


def _bounded(shapes: Mapping[int, Shape]) -> bool:
    """Both ends of the lumbar spine are seen: a thoracic vertebra above, the sacrum below."""
    return _has_sacrum(shapes) and any(T12 <= label <= T10 for label in shapes)


def _lumbar_count(shapes: Mapping[int, Shape]) -> int | None:
    """Lumbar bodies found; None where an end of the lumbar spine is out of view or the names are out of order."""
    if not _bounded(shapes) or _order_doubts(shapes, _from_the_top(shapes)):
        return None
    return sum(label in LUMBAR or label == L6 for label in shapes)


def _name(label: int) -> str:
    return NAMES.get(label, f"label {label}")


# ----------------------------------------------------------------------------------------------------- levels


def _qualities(
    volume: Volume, segmentation: Segmentation, shapes: Mapping[int, Shape], findings: Findings
) -> dict[str, Quality]:
    """What the outline of each level is worth, of those whose body was found."""
    whole = {label: shape.volume_ml for label, shape in shapes.items() if not shape.cut}
    overlaps = segmentation.overlaps or {}
    found = {}
    for name, label in LEVEL_IDS.items():
        body = findings.bodies.get(label)
        if body is None:
            continue
        seen = traits(volume, segmentation.labels, body.vertebra, whole, overlaps.get(label))
        quality = shipped().judge(seen, segmentation.sha256)
        if quality is not None:
            found[name] = quality
    return found


def _levels(
    shapes: Mapping[int, Shape], findings: Findings, qualities: Mapping[str, Quality], policy: FindingsPolicy
) -> dict[str, LevelAnatomy]:
    """Each of L1-L4 with its heights, exclusions and quality."""
    levels = {}
    for name, label in LEVEL_IDS.items():
        seen = label in shapes and not shapes[label].cut
        heights = findings.heights.get(name)
        exclusions = list(findings.exclusions.get(name, ()))
        if seen and (implausible := _implausible(name, shapes[label], heights, exclusions)) is not None:
            exclusions.append(implausible)
        quality = None if name not in qualities else round(qualities[name].value, 2)
        if quality is not None and quality < policy.quality_minimum:
            told = f"The outline of {name} is of low quality: {quality:.2f}; {policy.quality_minimum:g} is required."
            exclusions.append(Reason(Code.LOW_QUALITY, told))
        levels[name] = LevelAnatomy(name, seen, tuple(exclusions), heights, quality)
    return levels


def _implausible(name: str, shape: Shape, heights: Heights | None, found: Sequence[Reason]) -> Reason | None:
    """An outline that is no vertebra; a body that a fracture explains is one."""
    if not VOLUME_ML[0] <= shape.volume_ml <= VOLUME_ML[1]:
        return Reason(Code.IMPLAUSIBLE_SHAPE, f"{name} has an implausible volume ({shape.volume_ml:.0f} ml).")
    broken = Code.FRACTURE in {reason.code for reason in found}
    if heights is None or (not broken and not BODY_HEIGHT_MM[0] <= _mean_height(heights) <= BODY_HEIGHT_MM[1]):
        return Reason(Code.IMPLAUSIBLE_SHAPE, f"No plausible vertebral body was found in {name}.")
    return None


def _mean_height(heights: Heights) -> float:
    return sum(h or 0.0 for h in (heights.anterior, heights.middle, heights.posterior)) / 3


def measure_shapes(labels: LabelArray, volume: Volume) -> dict[int, Shape]:
    """Position, size and heights of every vertebra in a label map."""
    shapes = {}
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None or not (SACRUM <= label <= 50 or label == L6):
            continue
        mask = labels[box] == label
        shape = _shape(label, mask, box, volume)
        if label <= T12 or label == L6 or shape.volume_ml >= SPECK_ML:
            shapes[label] = shape
    return _with_stumps(shapes, labels, volume)


def _with_stumps(shapes: dict[int, Shape], labels: LabelArray, volume: Volume) -> dict[int, Shape]:
    """Mark vertebrae that end just short of the CT's end and are much lower than the others: they are cut too."""
    along = int(np.argmax(np.abs(volume.affine[2, :3])))
    ends = [_lps(volume, _on_axis(along, index, np.zeros(3)))[2] for index in (0, labels.shape[along] - 1)]
    low, high = sorted(float(end) for end in ends)
    near = max(STUMP_MM, 2.0 * volume.spacing_mm[along])
    extents = [shape.highest - shape.lowest for label, shape in shapes.items() if label not in (SACRUM, S1)]
    usual = float(np.median(extents)) if extents else 0.0
    marked = {}
    for label, shape in shapes.items():
        at_end = shape.highest > high - near or shape.lowest < low + near
        marked[label] = replace(shape, cut=shape.cut or (at_end and shape.highest - shape.lowest < 0.8 * usual))
    return marked


def _shape(label: int, mask: npt.NDArray[np.bool_], box: tuple[slice, ...], volume: Volume) -> Shape:
    start = np.array([part.start for part in box])
    voxels = np.argwhere(mask)
    centroid = _lps(volume, voxels.mean(axis=0) + start)
    along = int(np.argmax(np.abs(volume.affine[2, :3])))  # the array axis that runs feet to head
    step = volume.spacing_mm[along]
    ends = [box[along].start, box[along].stop - 1]
    height = sorted(float(_lps(volume, _on_axis(along, end, voxels.mean(axis=0) + start))[2]) for end in ends)
    voxel_ml = float(abs(np.linalg.det(volume.affine[:3, :3]))) / 1000.0
    return Shape(
        label=label,
        centroid=centroid,
        body_centre=_lps(volume, _bulk(mask, volume.spacing_mm) + start),
        volume_ml=len(voxels) * voxel_ml,
        lowest=height[0] - step / 2,
        highest=height[1] + step / 2,
        cut=_touches_edge(box, volume.hu.shape),
        hu_mean=float(volume.hu[tuple(box)][mask].mean()),
    )


def _on_axis(axis: int, index: float, voxel: FloatArray) -> FloatArray:
    moved = voxel.copy()
    moved[axis] = index
    return moved


def _lps(volume: Volume, voxel: FloatArray) -> FloatArray:
    """(k, j, i) -> LPS mm."""
    point: FloatArray = (volume.affine @ np.append(voxel, 1.0))[:3]
    return point


def _bulk(mask: npt.NDArray[np.bool_], spacing_mm: Sequence[float]) -> FloatArray:
    """The bulkiest spot of a vertebra, which lies in its body: arches and processes are thin. (k, j, i) in
    voxels.
    """
    padded = np.pad(mask.astype(np.float32), 2)
    blurred = ndimage.gaussian_filter(padded, [BULK_SIGMA_MM / step for step in spacing_mm], mode="constant")
    spot: FloatArray = np.argwhere(blurred > 0.9 * blurred.max()).mean(axis=0) - 2
    return spot


def _touches_edge(box: Sequence[slice], shape: Sequence[int]) -> bool:
    return any(part.start <= 0 or part.stop >= length for part, length in zip(box, shape, strict=True))
