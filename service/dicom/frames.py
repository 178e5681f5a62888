"""What a header says of how its images were made and where they lie, frame by frame where there are several.

An enhanced image keeps such values in functional groups: in the shared one what holds for all frames, in the per-frame
ones what does not (PS3.3 C.7.6.16). A value that differs between frames is never taken from one of them for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from pydicom.datadict import tag_for_keyword

from service.dicom import contrast
from service.dicom.elements import ITEM, Budget, Element, Encoding, WalkError, elements, items
from service.dicom.values import MAX_SEQUENCE_BYTES, Header
from service.domain.facts import Vector

SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
GROUPS = (SHARED, PER_FRAME)
KEYWORDS = (
    "ImageType", "FrameType", "SliceThickness", "KVP", "ReconstructionDiameter", "GantryDetectorTilt",
    "ConvolutionKernel", "MultienergyCTAcquisition", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "RescaleIntercept", "RescaleSlope", "RescaleType",
)  # fmt: skip
MAX_FRAMES = 5000  # read one by one; an object of more is kept, and refused for its number of slices
MAX_GROUPS_BYTES = 64 * 1024 * 1024  # 2000 real frames take about 8 MB
MAX_CONTRAST = 32  # different signs that are kept of one object
MAX_VALUES = 16  # of one text in one frame

_WANTED = frozenset(tag for tag in map(tag_for_keyword, KEYWORDS + contrast.KEYWORDS) if tag is not None)
_CONTRAST_SEQUENCES = frozenset(map(tag_for_keyword, contrast.SEQUENCES))
_X_RAY_DETAILS = tag_for_keyword("CTXRayDetailsSequence")
_ABSENT: dict[str, Any] = {  # what may differ between frames, and how InstanceFacts says that it is not there
    "position_lps_mm": None,
    "row_cosine": None,
    "column_cosine": None,
    "pixel_spacing_mm": None,
    "slice_thickness_mm": None,
    "kvp": None,
    "convolution_kernel": (),
    "image_type": (),
    "gantry_tilt_deg": None,
    "reconstruction_diameter_mm": None,
    "rescale_slope": None,
    "rescale_intercept": None,
    "rescale_type": None,
    "multienergy": False,
}


@dataclass(frozen=True, slots=True)
class Frames:
    """Facts of one object: those of all its frames, and in `positions` and `columns` those that differ."""

    common: Mapping[str, Any]  # by the names of InstanceFacts; what differs is absent here
    positions: tuple[Vector, ...] = ()  # LPS mm; () where a frame has none
    columns: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    contrast: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Group:
    """What one functional group, or one macro of it, says."""

    values: Mapping[str, Any] = field(default_factory=dict)
    contrast: tuple[str, ...] = ()


def read_frames(top: Header, frames: int, budget: Budget, *, enhanced: bool) -> Frames:
    """The facts at the top level and in the functional groups.

    In an enhanced CT (`enhanced`) a functional group goes before the top level, where its attributes do not belong.
    In any other object the top level goes first, and of the frames only the first one is looked at.
    """
    reader = _Reader(top, budget)
    own = _Group(values_of(top), tuple(contrast.signs(top)))
    shared = reader.groups(SHARED, 1)
    per_frame = reader.groups(PER_FRAME, MAX_FRAMES + 1 if enhanced else 1)
    signs = _signs([own, *shared, *per_frame])
    if not enhanced:
        return Frames(_layered([own, *shared, *per_frame]), contrast=signs)
    if len(per_frame) != frames or frames > MAX_FRAMES:
        common = _layered([*shared, own])
        return Frames({name: common[name] for name in common if name != "position_lps_mm"}, contrast=signs)
    return _compared([_framed(_layered([group, *shared, own]), own.values) for group in per_frame], signs)


def values_of(header: Header) -> dict[str, Any]:
    """The facts of one data set that may differ between frames; an absent one is absent."""
    orientation = header.numbers("ImageOrientationPatient")
    spacing = header.numbers("PixelSpacing")
    found = {
        "position_lps_mm": _vector(header.numbers("ImagePositionPatient")),
        "row_cosine": orientation[:3] if orientation and len(orientation) == 6 else None,
        "column_cosine": orientation[3:] if orientation and len(orientation) == 6 else None,
        "pixel_spacing_mm": spacing if spacing and len(spacing) == 2 and min(spacing) > 0 else None,
        "slice_thickness_mm": _positive(header.number("SliceThickness")),
        "kvp": header.number("KVP"),
        "convolution_kernel": tuple(part for part in header.texts("ConvolutionKernel") if part)[:MAX_VALUES] or None,
        "image_type": (header.texts("FrameType") or header.texts("ImageType"))[:MAX_VALUES] or None,
        "gantry_tilt_deg": header.number("GantryDetectorTilt"),
        "reconstruction_diameter_mm": _positive(header.number("ReconstructionDiameter")),
        "rescale_slope": header.number("RescaleSlope"),
        "rescale_intercept": header.number("RescaleIntercept"),
        "rescale_type": header.text("RescaleType"),
        "multienergy": True if header.text("MultienergyCTAcquisition") == "YES" else None,
    }
    return {name: value for name, value in found.items() if value is not None}


class _Reader:
    """Reads functional groups; a macro that stands in every frame with the same bytes is read once."""

    def __init__(self, top: Header, budget: Budget) -> None:
        self._top = top
        self._budget = budget
        self._known: dict[tuple[Element, bytes], _Group] = {}

    def groups(self, keyword: str, most: int) -> list[_Group]:
        """The first `most` items of one of the two sequences."""
        found = self._top.raw(keyword)
        if found is None:
            return []
        value, encoding = found
        if len(value) > MAX_GROUPS_BYTES:
            raise WalkError(f"more than {MAX_GROUPS_BYTES} bytes of functional groups")
        return [self._group(content, encoding) for content in islice(items(value, encoding, self._budget), most)]

    def _group(self, content: bytes, encoding: Encoding) -> _Group:
        macros = []
        for element, value in elements(content, encoding, self._budget):
            if element.vr in (b"SQ", b"UN", None) and _begins_with_item(value, encoding.inside(element.vr)):
                known = self._known.get((element, value))
                if known is None:
                    known = self._known[element, value] = self._macro(element, value, encoding)
                macros.append(known)
        return _Group(_layered(macros), _signs(macros))

    def _macro(self, element: Element, value: bytes, encoding: Encoding) -> _Group:
        inner = encoding.inside(element.vr)
        if element.tag in _CONTRAST_SEQUENCES:
            header = self._top.holding(element, value, encoding)
            return _Group(contrast=tuple(contrast.signs(header)))
        found = list(islice(items(value, inner, self._budget), 2))
        if not found or len(found[0]) > MAX_SEQUENCE_BYTES:
            return _Group()
        header = self._top.inside(found[0], inner, self._budget, _WANTED)
        values = values_of(header)
        if element.tag == _X_RAY_DETAILS and len(found) > 1:  # one item for each of the tubes' voltages
            values["multienergy"] = True
        return _Group(values, tuple(contrast.signs(header)))


def _begins_with_item(value: bytes, encoding: Encoding) -> bool:
    return value[:4] == (ITEM >> 16).to_bytes(2, _order(encoding)) + (ITEM & 0xFFFF).to_bytes(2, _order(encoding))


def _order(encoding: Encoding) -> Literal["little", "big"]:
    return "little" if encoding.little else "big"


def _layered(groups: Iterable[_Group]) -> dict[str, Any]:
    """Every value that is given, by the first group that gives it."""
    values: dict[str, Any] = {}
    for group in groups:
        values = {**group.values, **values}
    return values


def _signs(groups: Iterable[_Group]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(sign for group in groups for sign in group.contrast))[:MAX_CONTRAST]


def _framed(values: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """A frame of a derived image is derived, whatever its own type says."""
    if top.get("image_type", ("",))[0] == "DERIVED":
        values["image_type"] = top["image_type"]
    return values


def _compared(frames: Sequence[Mapping[str, Any]], signs: tuple[str, ...]) -> Frames:
    """What is the same in all frames, and what differs, frame by frame."""
    common: dict[str, Any] = {}
    columns: dict[str, tuple[Any, ...]] = {}
    for name, absent in _ABSENT.items():
        column = tuple(frame.get(name, absent) for frame in frames)
        if any(value != column[0] for value in column):
            columns[name] = column
        elif column:
            common[name] = column[0]
    positions = tuple(frame.get("position_lps_mm") for frame in frames)
    columns.pop("position_lps_mm", None)
    known = tuple(position for position in positions if position is not None)
    if len(known) < len(frames):
        common.pop("position_lps_mm", None)
        return Frames(common, contrast=signs)
    return Frames(common, known, tuple(columns.items()), signs)


def _positive(value: float | None) -> float | None:
    return value if value is not None and value > 0 else None


def _vector(values: tuple[float, ...] | None) -> Vector | None:
    return (values[0], values[1], values[2]) if values is not None and len(values) == 3 else None
