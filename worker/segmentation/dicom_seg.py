"""A DICOM Segmentation (PS3.3 A.51, A.90) that someone else made -> labels on the CT's own grid.

    header = read_header(path)            # what it is, who made it, which vertebrae; no pixels
    labels = read_labels(path, volume)    # uint8 [k, j, i] on the volume's grid, TotalSegmentator's class ids

Segments are matched by the code of their property type alone: categories differ between writers (TotalSegmentator
writes 123037004 where the Standard's context group has 91723000), and labels are only for people. Only the frames
of vertebrae are decoded, so an object with a hundred organs costs what its spine costs.

What cannot be trusted is refused with a sentence for people: another frame of reference, frames that are no
evenly spaced stack, two vertebrae that claim the same voxels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import pixel_array
from scipy import ndimage

from service.dicom.part10 import BoundedFile
from service.dicom.segments import SOP_CLASSES
from service.domain.supplied import SUPPLIED
from service.domain.vertebrae import BY_CODE
from service.domain.vertebrae import VERTEBRAE as KNOWN
from worker.segmentation.base import S1, SACRUM, LabelArray, SegmentationError
from worker.volume import LOSSLESS_SYNTAXES, MAX_SLICE_PIXELS, MAX_VOXELS, STEP_TOLERANCE, Volume, codestream_size

Affine = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

MAX_FRAMES = 100_000
MAX_OVERLAP_VOXELS = 10  # that two vertebrae may both claim: rounding at a shared surface, not a mistake
SAME_PLACE_MM = 0.01  # frames of several segments at one position differ by rounding only
SIDEWAYS_PIXELS = 0.25  # how far frames may be shifted within their plane and still be one stack

# Code of the property type -> class id of TotalSegmentator's `total`
VERTEBRAE: Mapping[tuple[str, str], int] = {
    (value, scheme): one.class_id for one in KNOWN for scheme, value in [one.code.split(":")]
}


class SuppliedError(SegmentationError):
    """A supplied segmentation cannot be used on this CT; the text is for people."""


@dataclass(frozen=True)
class SegHeader:
    """What a DICOM SEG says of itself, read without its pixels."""

    sop_instance_uid: str
    kind: str  # BINARY or LABELMAP
    made_by: str  # algorithm and manufacturer, no person's name
    frame_of_reference_uid: str
    source_uids: frozenset[str]  # instances that it says it was made from; may be empty
    vertebrae: Mapping[int, int]  # segment number (in a label map the pixel value) -> class id
    shape: tuple[int, int, int]  # frames, rows, columns

    @property
    def name(self) -> str:
        """How the provenance names it."""
        return f"{SUPPLIED} DICOM SEG by {self.made_by} ({self.sop_instance_uid})"


@dataclass(frozen=True)
class _Plane:
    """One frame: where it lies, and whose mask it is."""

    frame: int
    segment: int  # 0 in a label map, whose frames hold all segments
    position: Vector  # LPS mm, centre of the first voxel
    orientation: Vector  # six cosines: along a row, along a column
    spacing: Vector  # mm between rows, between columns
    step: float | None  # mm between frames as the header claims; checked against the positions


@dataclass(frozen=True)
class _Stack:
    """The regular grid [n, row, column] that the frames lie on; slices without a frame are empty."""

    affine: Affine  # (n, row, column, 1) -> LPS mm
    shape: tuple[int, int, int]
    index: Mapping[int, int]  # frame -> n


def is_dicom(path: Path) -> bool:
    """Whether the file is a DICOM Part 10 file (PS3.10 7.1), whatever its name ends with."""
    with path.open("rb") as file:
        file.seek(128)
        return file.read(4) == b"DICM"


def read_header(path: Path) -> SegHeader:
    """What the file is and which vertebrae it holds.

    Raises:
        SuppliedError: not a DICOM SEG, of a kind that is not read, or without any coded vertebra.
    """
    return _header(_read(path, header_only=True), path)


def read_labels(path: Path, volume: Volume) -> LabelArray:
    """The vertebrae of a DICOM SEG as uint8 [k, j, i] on the volume's own grid, nearest voxel.

    Raises:
        SuppliedError: it is not readable, of another patient's space, no regular stack, self-contradictory or
            outside of the CT; the text says which.
    """
    dataset = _read(path)
    header = _header(dataset, path)
    _check_space(header, volume, path)
    _check_pixels(dataset, header, path)
    planes = _planes(dataset, header, path)
    stack = _stack(planes, header.shape, path)
    labels = _paint(dataset, header, planes, stack, path)
    return _onto(labels, stack.affine, volume, path)


# ----------------------------------------------------------------------------------------------------- header


def _read(path: Path, *, header_only: bool = False) -> Dataset:
    try:
        with BoundedFile(path) as file:
            return pydicom.dcmread(file, stop_before_pixels=header_only)
    except (Exception, RecursionError) as error:  # deeply nested sequences exhaust pydicom's recursion
        raise SuppliedError(f"{path.name}: not readable as DICOM ({type(error).__name__}).") from error


def _header(dataset: Dataset, path: Path) -> SegHeader:
    if str(dataset.get("SOPClassUID", "")) not in SOP_CLASSES:
        what = getattr(dataset.get("SOPClassUID", ""), "name", "") or "without a SOP class"
        raise SuppliedError(f"{path.name}: this is {what}, not a DICOM SEG.")
    kind = _kind(dataset, path)
    try:
        return SegHeader(
            sop_instance_uid=str(dataset.SOPInstanceUID),
            kind=kind,
            made_by=_made_by(dataset),
            frame_of_reference_uid=str(dataset.get("FrameOfReferenceUID", "") or ""),
            source_uids=_source_uids(dataset),
            vertebrae=_vertebrae(dataset, path),
            shape=(int(dataset.get("NumberOfFrames", None) or 1), int(dataset.Rows), int(dataset.Columns)),
        )
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise SuppliedError(f"{path.name}: the segmentation's header is incomplete ({error}).") from error


def _kind(dataset: Dataset, path: Path) -> str:
    kind = str(dataset.get("SegmentationType", "") or "absent")
    if kind == "FRACTIONAL":
        text = "holds fractions (SegmentationType FRACTIONAL), and where a vertebra ends would be our guess"
        raise SuppliedError(f"{path.name}: it {text}; BINARY and LABELMAP are read.")
    if kind not in ("BINARY", "LABELMAP"):
        raise SuppliedError(f"{path.name}: SegmentationType is {kind}; BINARY and LABELMAP are read.")
    return kind


def _made_by(dataset: Dataset) -> str:
    """Algorithm and manufacturer of the first segment that names one; ContentCreatorName is a person's: left out."""
    names = (str(item.get("SegmentAlgorithmName", "") or "") for item in dataset.get("SegmentSequence", None) or ())
    parts = (next(filter(None, names), ""), str(dataset.get("Manufacturer", "") or ""))
    return ", ".join(dict.fromkeys(filter(None, parts))) or "an unnamed maker"


def _source_uids(dataset: Dataset) -> frozenset[str]:
    series = dataset.get("ReferencedSeriesSequence", None) or ()
    instances = (item for one in series for item in one.get("ReferencedInstanceSequence", None) or ())
    return frozenset(str(item.ReferencedSOPInstanceUID) for item in instances)


def _vertebrae(dataset: Dataset, path: Path) -> dict[int, int]:
    """Segment number -> class id of every segment whose type code is a vertebra's."""
    found: dict[int, int] = {}
    for segment in dataset.SegmentSequence:
        number, label = int(segment.SegmentNumber), _class_id(segment)
        if label is None:
            continue
        if label in found.values():
            text = f"segments {_number_of(found, label)} and {number} carry the same vertebra's code"
            raise SuppliedError(f"{path.name}: {text}; which of them is meant cannot be known.")
        found[number] = label
    if not found:
        raise SuppliedError(f"{path.name}: no segment is coded as a vertebra (it holds {_contents(dataset)}).")
    return found


def _number_of(found: Mapping[int, int], label: int) -> int:
    return next(number for number, other in found.items() if other == label)


def _class_id(segment: Dataset) -> int | None:
    types = segment.get("SegmentedPropertyTypeCodeSequence", None) or ()
    if not types:
        return None
    known = BY_CODE.get(f"{types[0].get('CodingSchemeDesignator', '')}:{types[0].get('CodeValue', '')}")
    return None if known is None else known.class_id


def _contents(dataset: Dataset) -> str:
    """The first segments' labels, for the text of a refusal."""
    labels = [str(one.get("SegmentLabel", "") or "unnamed") for one in dataset.SegmentSequence]
    return ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")


# --------------------------------------------------------------------------------------------------- geometry


def _check_space(header: SegHeader, volume: Volume, path: Path) -> None:
    """The segmentation must lie in the CT's own coordinates: the same frame of reference (PS3.3 C.7.4.1).

    Where the volume does not know its frame, a segmentation that names its source images must name one of the
    CT's; where neither is known (a NIfTI has no UIDs), that it lies on the CT is all that can be checked.
    """
    frame = volume.frame_of_reference_uid
    if frame and header.frame_of_reference_uid:
        if frame != header.frame_of_reference_uid:
            raise SuppliedError(f"{path.name}: its frame of reference is not the CT's: it was made on another scan.")
        return
    if volume.slice_uids and header.source_uids and not header.source_uids.intersection(volume.slice_uids):
        raise SuppliedError(f"{path.name}: none of the images that it was made from belongs to this CT.")


def _planes(dataset: Dataset, header: SegHeader, path: Path) -> list[_Plane]:
    """The frames that can hold a vertebra, with the geometry of each."""
    try:
        shared = (dataset.get("SharedFunctionalGroupsSequence", None) or [Dataset()])[0]
        frames: Sequence[Dataset] = dataset.PerFrameFunctionalGroupsSequence
        if len(frames) != header.shape[0]:
            raise SuppliedError(f"{path.name}: {header.shape[0]} frames, but {len(frames)} descriptions of frames.")
        segments = [_segment(frame, shared, header.kind) for frame in frames]
        wanted = [n for n, number in enumerate(segments) if header.kind == "LABELMAP" or number in header.vertebrae]
        planes = [_plane(n, segments[n], frames[n], shared) for n in wanted]
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise SuppliedError(f"{path.name}: it does not say where its frames lie ({error}).") from error
    if not planes:
        raise SuppliedError(f"{path.name}: its vertebrae are named, but no frame shows one.")
    return planes


def _segment(frame: Dataset, shared: Dataset, kind: str) -> int:
    """Whose mask a frame is; 0 in a label map, whose frames hold all segments."""
    if kind == "LABELMAP":
        return 0
    return int(_macro(frame, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)


def _plane(n: int, segment: int, frame: Dataset, shared: Dataset) -> _Plane:
    measures = _macro(frame, shared, "PixelMeasuresSequence")
    step = measures.get("SpacingBetweenSlices", None) or measures.get("SliceThickness", None)
    plane = _Plane(
        frame=n,
        segment=segment,
        position=_vector(_macro(frame, shared, "PlanePositionSequence").ImagePositionPatient, 3),
        orientation=_vector(_macro(frame, shared, "PlaneOrientationSequence").ImageOrientationPatient, 6),
        spacing=_vector(measures.PixelSpacing, 2),
        step=abs(float(step)) if step else None,
    )
    row, column = plane.orientation[:3], plane.orientation[3:]
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=0.02) or plane.spacing.min() <= 0:
        raise ValueError(f"orientation or spacing of frame {n + 1} makes no sense")
    return plane


def _macro(frame: Dataset, shared: Dataset, keyword: str) -> Dataset:
    """The item of a functional group, the frame's own or the one shared by all (PS3.3 C.7.6.16)."""
    for group in (frame, shared):
        items = group.get(keyword, None)
        if items:
            item: Dataset = items[0]
            return item
    raise ValueError(f"no {keyword}")


def _vector(values: Any, length: int) -> Vector:
    vector = np.array([float(value) for value in values], dtype=np.float64)
    if vector.shape != (length,) or not np.isfinite(vector).all():
        raise ValueError(f"{length} finite numbers expected, not {values}")
    return vector


def _stack(planes: Sequence[_Plane], shape: tuple[int, int, int], path: Path) -> _Stack:
    """The regular grid that the frames lie on; refuses frames that are none."""
    first = planes[0]
    for plane in planes:
        same = np.allclose(plane.orientation, first.orientation, atol=1e-3)
        if not same or not np.allclose(plane.spacing, first.spacing, rtol=1e-3):
            raise SuppliedError(f"{path.name}: its frames differ in orientation or spacing.")
    row, column = (_unit(first.orientation[:3]), _unit(first.orientation[3:]))
    normal = np.cross(row, column)
    along = np.array([plane.position @ normal for plane in planes])
    lowest = planes[int(along.argmin())].position
    shifts = np.array([plane.position - lowest - ((plane.position - lowest) @ normal) * normal for plane in planes])
    if float(np.abs(shifts).max()) > SIDEWAYS_PIXELS * float(first.spacing.min()):
        raise SuppliedError(f"{path.name}: its frames are shifted sideways against each other.")
    step, numbers = _regular(along, first.step, path)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = normal * step, column * first.spacing[0], row * first.spacing[1]
    affine[:3, 3] = lowest
    depth = int(numbers.max()) + 1
    if depth * shape[1] * shape[2] > MAX_VOXELS:
        raise SuppliedError(f"{path.name}: {depth} x {shape[1]} x {shape[2]} voxels are beyond the limit.")
    index = {plane.frame: int(n) for plane, n in zip(planes, numbers, strict=True)}
    return _Stack(affine, (depth, shape[1], shape[2]), index)


def _unit(vector: Vector) -> Vector:
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float64)


def _regular(along: Vector, claimed: float | None, path: Path) -> tuple[float, npt.NDArray[np.int64]]:
    """Step in mm and the slice number of every frame, from the positions along the normal.

    Writers leave out empty frames, so a gap may be any whole number of steps. The header's SpacingBetweenSlices
    is only a candidate: the positions decide.
    """
    order = np.argsort(along, kind="stable")
    gaps = np.diff(along[order])
    real = gaps[gaps > SAME_PLACE_MM]
    if not real.size:
        return claimed or 1.0, np.zeros(along.size, dtype=np.int64)
    for guess in filter(None, (claimed, float(np.median(real)), float(real.min()))):
        whole = np.where(gaps > SAME_PLACE_MM, np.round(gaps / guess), 0).astype(np.int64)
        places = np.concatenate([[0], np.cumsum(whole)])
        if places[-1] == 0 or (whole[gaps > SAME_PLACE_MM] == 0).any():
            continue
        step = float(along[order][-1] - along[order][0]) / int(places[-1])
        if float(np.abs(along[order] - along[order][0] - places * step).max()) <= STEP_TOLERANCE * step:
            numbers = np.empty(along.size, dtype=np.int64)
            numbers[order] = places
            return step, numbers
    raise SuppliedError(f"{path.name}: its frames are not evenly spaced ({real.min():.2f} to {real.max():.2f} mm).")


# ----------------------------------------------------------------------------------------------------- pixels


def _check_pixels(dataset: Dataset, header: SegHeader, path: Path) -> None:
    """Refuse what must not reach a decoder: lossy, of an odd depth, oversized, or shorter than the header says."""
    frames, rows, columns = header.shape
    if not (0 < frames <= MAX_FRAMES and min(rows, columns) > 0 and rows * columns <= MAX_SLICE_PIXELS):
        raise SuppliedError(f"{path.name}: {frames} frames of {rows} x {columns} pixels are beyond the limit.")
    syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
    if syntax is None or str(syntax) not in LOSSLESS_SYNTAXES:
        raise SuppliedError(f"{path.name}: transfer syntax {getattr(syntax, 'name', 'absent')} is not read.")
    bits = int(dataset.get("BitsAllocated", 0) or 0)
    allowed = (8, 16) if header.kind == "LABELMAP" else ((1, 8) if syntax.is_encapsulated else (1,))
    if "PixelData" not in dataset or bits not in allowed or int(dataset.get("SamplesPerPixel", 1) or 1) != 1:
        raise SuppliedError(f"{path.name}: no pixels of the depth that {header.kind} has ({bits} bits).")
    expected = (frames * rows * columns * bits + 7) // 8
    if not syntax.is_encapsulated and len(dataset.PixelData) < expected:
        raise SuppliedError(f"{path.name}: {len(dataset.PixelData)} bytes of pixels, {expected} expected.")


def _frame(dataset: Dataset, header: SegHeader, n: int, path: Path) -> npt.NDArray[Any]:
    """The stored values of frame `n` (from 0) as [row, column]."""
    frames, rows, columns = header.shape
    encapsulated = dataset.file_meta.TransferSyntaxUID.is_encapsulated
    if int(dataset.BitsAllocated) == 1 and not encapsulated:
        return _unpacked(dataset.PixelData, n * rows * columns, rows, columns)
    try:
        if encapsulated:
            size = codestream_size(get_frame(dataset.PixelData, n, number_of_frames=frames))
            if size is not None and size != (rows, columns):  # the decoder allocates by these: a bomb hides here
                raise SuppliedError(f"{path.name}: frame {n + 1} is {size[0]} x {size[1]}, not {rows} x {columns}.")
        values: npt.NDArray[Any] = pixel_array(dataset, index=n, raw=True)
    except SuppliedError:
        raise
    except Exception as error:  # every decoder raises its own kinds
        raise SuppliedError(f"{path.name}: frame {n + 1} does not decode ({error}).") from error
    if values.shape != (rows, columns):
        raise SuppliedError(f"{path.name}: frame {n + 1} is {values.shape}, not {rows} x {columns}.")
    return values


def _unpacked(data: bytes, start: int, rows: int, columns: int) -> Mask:
    """One frame of single bits, lowest bit first; frames follow without padding to whole bytes (PS3.5 8.1.1)."""
    stop = start + rows * columns
    raw = np.frombuffer(data, dtype=np.uint8, count=(stop + 7) // 8 - start // 8, offset=start // 8)
    bits = np.unpackbits(raw, bitorder="little")[start % 8 :][: rows * columns]
    return np.asarray(bits.reshape(rows, columns), dtype=np.bool_)


@dataclass
class _Canvas:
    """The labels [n, row, column] while they are painted, and the voxels that two vertebrae claim."""

    labels: LabelArray
    contested: dict[tuple[int, int], int] = field(default_factory=dict)  # two class ids -> voxels
    neither: list[tuple[int, npt.NDArray[np.intp]]] = field(default_factory=list)  # slice, flat indices in it

    def paint(self, n: int, mask: Mask, label: int) -> None:
        """Add one mask; a voxel that another vertebra holds already is nobody's, except S1 within the sacrum."""
        plane = self.labels[n]
        clash = mask & (plane != 0) & (plane != label)
        plane[mask & ~clash] = label
        if not clash.any():
            return
        for other in (int(value) for value in np.unique(plane[clash])):
            here = clash & (plane == other)
            if {label, other} == {S1, SACRUM}:  # S1 is a part of the sacrum: the finer name stands
                plane[here] = S1
                continue
            pair = (min(label, other), max(label, other))
            self.contested[pair] = self.contested.get(pair, 0) + int(np.count_nonzero(here))
            self.neither.append((n, np.flatnonzero(here)))

    def finished(self, path: Path) -> LabelArray:
        """The labels, contested voxels empty; refuses vertebrae that overlap by more than a rounding."""
        for (one, other), voxels in sorted(self.contested.items()):
            if voxels > MAX_OVERLAP_VOXELS:
                names = f"the segments of classes {_name(one)} and {_name(other)}"
                raise SuppliedError(f"{path.name}: {names} overlap in {voxels} voxels; neither can be trusted.")
        for n, indices in self.neither:
            self.labels[n].reshape(-1)[indices] = 0
        return self.labels


def _name(label: int) -> str:
    """A vertebra's usual name, for the text of a refusal."""
    return next((one.name for one in KNOWN if one.class_id == label), str(label))


def _paint(dataset: Dataset, header: SegHeader, planes: Sequence[_Plane], stack: _Stack, path: Path) -> LabelArray:
    canvas = _Canvas(np.zeros(stack.shape, dtype=np.uint8))
    for plane in planes:
        values = _frame(dataset, header, plane.frame, path)
        for label, mask in _masks(values, plane, header):
            canvas.paint(stack.index[plane.frame], mask, label)
    labels = canvas.finished(path)
    if not labels.any():
        raise SuppliedError(f"{path.name}: its vertebrae are named, but no voxel shows one.")
    return labels


def _masks(values: npt.NDArray[Any], plane: _Plane, header: SegHeader) -> Iterator[tuple[int, Mask]]:
    """The vertebrae in one frame: its own in BINARY, any of them in LABELMAP (the pixel is the segment number)."""
    if header.kind == "BINARY":
        yield header.vertebrae[plane.segment], values != 0
        return
    for number in np.unique(values[values != 0]):
        if int(number) in header.vertebrae:
            yield header.vertebrae[int(number)], values == number


# ------------------------------------------------------------------------------------------------- resampling


def _onto(labels: LabelArray, affine: Affine, volume: Volume, path: Path) -> LabelArray:
    """Labels [n, row, column] -> the volume's grid [k, j, i], nearest voxel; only the spine's box is sampled."""
    to_labels = np.linalg.inv(affine) @ volume.affine  # (k, j, i, 1) -> (n, row, column, 1)
    inside = _box(labels)
    low, high = _reach(inside, np.asarray(np.linalg.inv(to_labels), dtype=np.float64), volume.hu.shape)
    moved = np.zeros(volume.hu.shape, dtype=np.uint8)
    if (high > low).all():
        window = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        start = np.array([part.start for part in inside])
        moved[window] = ndimage.affine_transform(
            labels[inside],
            to_labels[:3, :3],
            to_labels[:3, :3] @ low + to_labels[:3, 3] - start,
            output_shape=tuple(int(n) for n in high - low),
            order=0,
            mode="grid-constant",  # `constant` would drop the outer half of every outermost voxel
            cval=0,
        )
    if not moved.any():
        raise SuppliedError(f"{path.name}: the segmentation lies outside of the CT.")
    return moved


def _box(labels: LabelArray) -> tuple[slice, slice, slice]:
    """The smallest box that holds every label."""
    box: tuple[slice, slice, slice] = ndimage.find_objects((labels > 0).view(np.uint8))[0]
    return box


def _reach(
    box: tuple[slice, slice, slice], to_volume: Affine, shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Lowest and one past the highest voxel of the volume that the box can touch."""
    edges = [(part.start - 0.5, part.stop - 0.5) for part in box]
    corners = np.array(np.meshgrid(*edges, indexing="ij")).reshape(3, -1)
    reached = to_volume[:3, :3] @ corners + to_volume[:3, 3:]
    low = np.clip(np.floor(reached.min(axis=1)), 0, shape).astype(np.int64)
    high = np.clip(np.ceil(reached.max(axis=1)) + 1, 0, shape).astype(np.int64)
    return low, high
