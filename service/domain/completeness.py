"""Is a series whole? The positions of its slices say so; quiet time only proposes.

A stack is built from ImagePositionPatient along the slice normal, never from SliceThickness,
SpacingBetweenSlices or the order of arrival. A study is closed when nothing came for a while *and* every CT
series is geometrically whole, or when patience is exhausted: then the hole stays visible as a reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from statistics import median

from service.domain.facts import InstanceFacts, Vector
from service.domain.policy import DEFAULT_POLICY, EligibilityPolicy, Policy

CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"

_UNIT_TOLERANCE = 0.01  # of a direction cosine's length, and of the cosine between row and column


@dataclass(frozen=True, slots=True)
class Gap:
    """The distance between two neighbouring slices, with their places along the normal in mm."""

    below_mm: float
    above_mm: float

    @property
    def size_mm(self) -> float:
        """From centre to centre."""
        return self.above_mm - self.below_mm

    def __str__(self) -> str:
        return f"between {self.below_mm:.1f} and {self.above_mm:.1f} mm"


@dataclass(frozen=True, slots=True)
class Stack:
    """The slices of one series along their common normal, turned towards the head (or left, or back)."""

    normal: Vector
    offsets_mm: tuple[float, ...]  # ascending
    spacing_mm: float | None  # median gap between different positions; None for a single position
    duplicates: tuple[Gap, ...]  # two slices at one place
    missing: tuple[Gap, ...]  # holes of about a whole multiple of the spacing
    uneven: tuple[Gap, ...]  # any other gap that differs from the spacing
    shear_deg: float  # angle between the normal and the line through the slices' corners

    @property
    def extent_mm(self) -> float:
        """From the lower face of the first slice to the upper face of the last."""
        return self.offsets_mm[-1] - self.offsets_mm[0] + (self.spacing_mm or 0.0)

    @property
    def whole(self) -> bool:
        """No hole and no odd gap; a series of one position is as whole as it can be."""
        return not self.missing and not self.uneven

    def slices_missing_in(self, gap: Gap) -> int:
        """How many slices a hole has room for."""
        return max(1, round(gap.size_mm / self.spacing_mm) - 1) if self.spacing_mm else 0


def normal_of(facts: InstanceFacts) -> Vector | None:
    """Unit normal of one slice's plane; None where row and column are no unit vectors at 90 deg."""
    row, column = facts.row_cosine, facts.column_cosine
    if row is None or column is None or not (_is_vector(row) and _is_vector(column)):
        return None
    lengths = (math.sqrt(dot(row, row)), math.sqrt(dot(column, column)))
    if any(not abs(length - 1) <= _UNIT_TOLERANCE for length in lengths):
        return None
    if not abs(dot(row, column)) <= _UNIT_TOLERANCE:
        return None
    normal = (
        row[1] * column[2] - row[2] * column[1],
        row[2] * column[0] - row[0] * column[2],
        row[0] * column[1] - row[1] * column[0],
    )
    return _unit(normal)


def has_geometry(facts: InstanceFacts) -> bool:
    """Position, orientation, pixel spacing and matrix are all there and usable."""
    spacing = facts.pixel_spacing_mm
    return (
        _is_vector(facts.position_lps_mm)
        and normal_of(facts) is not None
        and spacing is not None
        and len(spacing) == 2
        and all(math.isfinite(step) and step > 0 for step in spacing)
        and (facts.rows or 0) > 0
        and (facts.columns or 0) > 0
    )


def stack_of(instances: Sequence[InstanceFacts], policy: EligibilityPolicy) -> Stack | None:
    """The stack of one series; None where any slice lacks its place or the slices are not parallel."""
    normals = [normal_of(facts) for facts in instances]
    positions = [facts.position_lps_mm for facts in instances if _is_vector(facts.position_lps_mm)]
    if not instances or None in normals or len(positions) < len(instances):
        return None
    planes = [normal for normal in normals if normal is not None]
    # The smallest normal, not the first: the result must not depend on the order of arrival.
    common = min(planes)
    if any(not angle_deg(common, other) <= policy.orientation_tolerance_deg for other in planes):
        return None
    normal = _headward(common)
    placed = sorted((dot(position, normal), position) for position in positions if position is not None)
    if not all(math.isfinite(offset) for offset, _ in placed):
        return None
    return _stack(normal, [offset for offset, _ in placed], _shear_deg(placed, normal), policy)


def _stack(normal: Vector, offsets: list[float], shear_deg: float, policy: EligibilityPolicy) -> Stack:
    gaps = [Gap(below, above) for below, above in pairwise(offsets)]
    steps = [gap for gap in gaps if gap.size_mm > policy.duplicate_distance_mm]
    spacing = median(gap.size_mm for gap in steps) if steps else None
    odd = [gap for gap in steps if spacing and abs(gap.size_mm - spacing) > policy.spacing_tolerance_mm]
    missing = [gap for gap in odd if spacing and _is_hole(gap.size_mm / spacing, policy)]
    return Stack(
        normal=normal,
        offsets_mm=tuple(offsets),
        spacing_mm=spacing,
        duplicates=tuple(gap for gap in gaps if gap.size_mm <= policy.duplicate_distance_mm),
        missing=tuple(missing),
        uneven=tuple(gap for gap in odd if gap not in missing),
        shear_deg=shear_deg,
    )


def _is_hole(multiple: float, policy: EligibilityPolicy) -> bool:
    """A gap of about 2, 3, ... spacings: slices are lost there."""
    if not math.isfinite(multiple) or multiple < 1.5:
        return False
    return abs(multiple - round(multiple)) <= policy.missing_slice_tolerance


def _shear_deg(placed: list[tuple[float, Vector]], normal: Vector) -> float:
    """Angle between the slice normal and the line from the first slice's corner to the last's.

    A tilted gantry leaves it: the table moves along z while the planes lean.
    """
    (low, first), (high, last) = placed[0], placed[-1]
    if high <= low:
        return 0.0
    line = _unit((last[0] - first[0], last[1] - first[1], last[2] - first[2]))
    return angle_deg(line, normal) if line else 0.0


# When to close a study


@dataclass(frozen=True, slots=True)
class Closing:
    """Whether a study may be judged now, with the sentence that says why or why not."""

    close: bool
    text: str


def closing(
    now: datetime,
    last_received_at: datetime,
    quiet_seconds: float,
    patience_seconds: float,
    series: Iterable[Sequence[InstanceFacts]],
    *,
    policy: Policy = DEFAULT_POLICY,
) -> Closing:
    """Close a study when it is quiet and every CT series is whole, or when patience has run out."""
    quiet_for = (now - last_received_at).total_seconds()
    if quiet_for < quiet_seconds:
        return Closing(False, f"last image {quiet_for:.0f} s ago; quiet after {quiet_seconds:.0f} s")
    holes = [text for text in (_hole(instances, policy.eligibility) for instances in series) if text]
    if not holes:
        return Closing(True, f"quiet for {quiet_for:.0f} s; every CT series is geometrically whole")
    if quiet_for < patience_seconds:
        return Closing(False, f"waiting up to {patience_seconds:.0f} s for lost slices: {'; '.join(holes)}")
    return Closing(True, f"patience of {patience_seconds:.0f} s exhausted: {'; '.join(holes)}")


def _hole(instances: Sequence[InstanceFacts], policy: EligibilityPolicy) -> str | None:
    """What a series still lacks; None for a whole one, and for one that more slices would not mend.

    An enhanced CT is among the latter: it comes in one piece, and a frame that it lacks will not follow.
    """
    if not instances or any(facts.sop_class_uid != CT_IMAGE_STORAGE for facts in instances):
        return None
    stack = stack_of(instances, policy)
    if stack is None or stack.whole:
        return None
    number = min((facts.series_number for facts in instances if facts.series_number is not None), default=None)
    name = "a series" if number is None else f"series {number}"
    if stack.missing:
        return f"{name} has a hole {stack.missing[0]}"
    return f"{name} is unevenly spaced {stack.uneven[0]}"


# Small vector arithmetic; `x * x` and not `x ** 2`, which raises on overflow


def dot(a: Vector, b: Vector) -> float:
    """Scalar product."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def angle_deg(a: Vector, b: Vector) -> float:
    """Angle between two unit vectors, 0 to 180 deg."""
    return math.degrees(math.acos(max(-1.0, min(1.0, dot(a, b)))))


def _unit(vector: Vector) -> Vector | None:
    length = math.sqrt(dot(vector, vector))
    if not (math.isfinite(length) and length > 0):
        return None
    return (vector[0] / length, vector[1] / length, vector[2] / length)


def _headward(normal: Vector) -> Vector:
    """The normal or its opposite, its largest component positive: offsets of axial slices then read as z."""
    largest = max(normal, key=abs)
    return normal if largest > 0 else (-normal[0], -normal[1], -normal[2])


def _is_vector(value: Vector | None) -> bool:
    return value is not None and len(value) == 3 and all(math.isfinite(part) for part in value)
