"""Files -> one CT volume in HU on a regular grid in LPS millimetres.

Everything downstream trusts this: slices in the order of the patient's body whatever the order of the files,
HU from each slice's own slope and intercept, padding masked, geometry in float64. What cannot be trusted is
refused with a stable code before anything large is decoded, and one bad slice fails its study alone (RULES
13).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pydicom
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from pydicom.dataset import Dataset
from pydicom.pixels import pixel_array
from scipy import ndimage

from models.package import NOT_TOLD, Scanner, scanner_name
from service.dicom.headers import HeaderError, read_facts
from service.dicom.part10 import BoundedFile
from service.domain.eligibility import ENHANCED_CT, vendor_of
from service.domain.errors import OsteogateError
from service.domain.facts import InstanceFacts
from service.domain.reasons import Code
from worker.multiframe import single_frames

FloatArray = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]
LabelArray = npt.NDArray[np.uint8]

PADDING_HU = -1024.0  # air, and the lowest value that a 12-bit CT can hold
MAX_SLICES = 3000
MAX_SLICE_PIXELS = 2048 * 2048
MAX_VOXELS = 2500 * 512 * 512  # 2.6 GB as float32
STEP_TOLERANCE = 0.1  # of the slice step; eligibility is stricter, this only guards the grid

# PS3.5 annex A: syntaxes that reproduce the stored pixels exactly. Everything else is refused, never decoded.
LOSSLESS_SYNTAXES = frozenset(
    {
        "1.2.840.10008.1.2",  # implicit VR little endian
        "1.2.840.10008.1.2.1",  # explicit VR little endian
        "1.2.840.10008.1.2.1.99",  # deflated (never accepted by the listener; files may hold it)
        "1.2.840.10008.1.2.2",  # explicit VR big endian
        "1.2.840.10008.1.2.5",  # RLE
        "1.2.840.10008.1.2.4.57",  # JPEG lossless, process 14
        "1.2.840.10008.1.2.4.70",  # JPEG lossless, process 14 SV1
        "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
        "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
        "1.2.840.10008.1.2.4.201",  # HTJ2K lossless
        "1.2.840.10008.1.2.4.202",  # HTJ2K lossless, RPCL
    }
)
SAME_GRID_MM = 0.1
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class VolumeError(OsteogateError):
    """The files do not make one CT volume; `code` is stable, `text` is for people."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(f"{code.value}: {text}")
        self.code = code
        self.text = text


@dataclass(frozen=True)
class SourceGrid:
    """The grid of the NIfTI file that a volume came from: label maps are written back onto it."""

    shape: tuple[int, int, int]  # the file's own (i, j, k)
    affine_ras: Affine  # (i, j, k, 1) -> RAS mm


@dataclass(frozen=True)
class Volume:
    """One CT: `hu` [k, j, i] = (slice, row, column) in HU; `affine` maps (k, j, i, 1) to LPS mm."""

    hu: FloatArray
    affine: Affine
    slice_uids: tuple[str, ...] = ()
    source: SourceGrid | None = None
    frame_of_reference_uid: str | None = None  # of a DICOM series: what a supplied SEG must share
    scanner: Scanner = NOT_TOLD

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along (k, j, i) in mm."""
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(lengths[0]), float(lengths[1]), float(lengths[2])


# ------------------------------------------------------------------------------------------------------ DICOM


@dataclass(frozen=True)
class _Slice:
    """Where one image lies, read without its pixels: a file's only one, or a frame of an enhanced CT."""

    name: str  # for people: the file's name, with the frame's number where it has several
    uid: str
    frame_of_reference_uid: str | None
    position: npt.NDArray[np.float64]  # LPS mm, centre of the first voxel
    row_cosine: npt.NDArray[np.float64]  # direction of increasing column index
    column_cosine: npt.NDArray[np.float64]  # direction of increasing row index
    row_step: float
    column_step: float
    rows: int
    columns: int

    @property
    def normal(self) -> npt.NDArray[np.float64]:
        return np.cross(self.row_cosine, self.column_cosine)


def load_dicom(paths: Sequence[Path]) -> Volume:
    """One axial series -> Volume; the order of `paths`, or of an enhanced CT's frames, does not matter.

    Raises VolumeError for anything that is not one evenly spaced stack of lossless CT slices in HU.
    """
    if len(paths) > MAX_SLICES:
        raise VolumeError(Code.TOO_MANY_SLICES, f"{len(paths)} slices; at most {MAX_SLICES} are read.")
    enhanced = _enhanced(paths)
    unordered = [_read_geometry(path) for path in paths] if enhanced is None else _frame_geometry(enhanced, paths[0])
    if len(unordered) < 2:
        raise VolumeError(Code.COVERAGE_TOO_SHORT, f"{len(unordered)} slice(s) do not make a volume.")
    slices = _ordered(unordered)
    first = slices[0]
    if first.rows * first.columns * len(slices) > MAX_VOXELS:
        raise VolumeError(Code.TOO_MANY_SLICES, f"More than {MAX_VOXELS} voxels in the series.")
    affine = _stack_affine(slices)
    hu = np.empty((len(slices), first.rows, first.columns), dtype=np.float32)
    place = {id(one): k for k, one in enumerate(slices)}
    pictures = map(read_slice, paths) if enhanced is None else _read_frames(paths[0], enhanced)
    for one, picture in zip(unordered, pictures, strict=True):
        hu[place[id(one)]] = picture
    frames = {one.frame_of_reference_uid for one in slices}
    return Volume(
        hu=hu,
        affine=affine,
        slice_uids=tuple(one.uid for one in slices),
        frame_of_reference_uid=frames.pop() if len(frames) == 1 else None,
        scanner=_scanner(paths[0] if enhanced is None else enhanced[0]),
    )


def _scanner(first: Path | InstanceFacts) -> Scanner:
    """What made the series, named as in a training run's cohort."""
    try:
        facts = read_facts(first) if isinstance(first, Path) else first
    except HeaderError:
        return NOT_TOLD
    return Scanner(scanner_name(vendor_of(facts.manufacturer), facts.model_name), facts.synthetic)


def read_slice(path: Path) -> FloatArray:
    """The HU of one CT slice [row, column], padding set to -1024."""
    dataset = _read(path)
    keywords = ("RescaleSlope", "RescaleIntercept", "RescaleType")
    return _decoded(dataset, tuple(dataset.get(keyword) for keyword in keywords), path.name)


def _decoded(dataset: Dataset, rescale: tuple[Any, Any, Any], name: str) -> FloatArray:
    """The HU of one image [row, column]; `rescale` is its slope, intercept and type as the header gives them."""
    _check_pixels(dataset, name)
    try:
        stored = pixel_array(dataset, raw=True)
    except Exception as error:  # every decoder raises its own kinds; one bad slice must fail alone
        raise VolumeError(Code.PIXELS_UNREADABLE, f"{name}: pixels do not decode ({error}).") from error
    if stored.shape != (int(dataset.Rows), int(dataset.Columns)):
        raise VolumeError(Code.PIXELS_UNREADABLE, f"{name}: pixels are {stored.shape}, not as the header says.")
    slope, intercept = _rescale(rescale, name)
    hu = (stored.astype(np.float64) * slope + intercept).astype(np.float32)
    hu[_padding(stored, hu, dataset)] = PADDING_HU
    clipped: FloatArray = np.maximum(hu, np.float32(PADDING_HU))
    return clipped


def _read(path: Path, *, header_only: bool = False) -> Dataset:
    try:
        with BoundedFile(path) as file:
            return pydicom.dcmread(file, stop_before_pixels=header_only)
    except (Exception, RecursionError) as error:  # deeply nested sequences exhaust pydicom's recursion
        raise VolumeError(Code.UNREADABLE, f"{path.name}: not readable as DICOM ({type(error).__name__}).") from error


def _read_geometry(path: Path) -> _Slice:
    header = _read(path, header_only=True)
    if str(header.get("Modality", "")) != "CT":
        raise VolumeError(Code.NOT_CT, f"{path.name}: modality {header.get('Modality', 'absent')!r} is not CT.")
    try:
        if int(header.get("NumberOfFrames", None) or 1) > 1:
            text = f"{path.name}: several frames; only one enhanced CT that holds the whole series is read."
            raise VolumeError(Code.MULTIFRAME_UNSUPPORTED, text)
        return _slice(
            path.name,
            str(header.SOPInstanceUID),
            str(header.get("FrameOfReferenceUID", None) or "") or None,
            orientation=np.array([float(v) for v in header.ImageOrientationPatient], dtype=np.float64),
            position=np.array([float(v) for v in header.ImagePositionPatient], dtype=np.float64),
            spacing=tuple(float(v) for v in header.PixelSpacing),
            matrix=(int(header.Rows), int(header.Columns)),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise VolumeError(Code.NO_GEOMETRY, f"{path.name}: position, orientation or spacing is missing.") from error


def _slice(
    name: str,
    uid: str,
    frame_of_reference_uid: str | None,
    *,
    orientation: npt.NDArray[np.float64],
    position: npt.NDArray[np.float64],
    spacing: tuple[float, ...],
    matrix: tuple[int, int],
) -> _Slice:
    row_step, column_step = spacing
    finite = bool(np.isfinite(orientation).all() and np.isfinite(position).all())
    if orientation.shape != (6,) or position.shape != (3,) or not finite or min(row_step, column_step) <= 0:
        raise VolumeError(Code.NO_GEOMETRY, f"{name}: position, orientation or spacing makes no sense.")
    row_cosine, column_cosine = _unit(orientation[:3], name), _unit(orientation[3:], name)
    if abs(float(row_cosine @ column_cosine)) > 1e-3:
        raise VolumeError(Code.NO_GEOMETRY, f"{name}: the image axes are not perpendicular.")
    return _Slice(
        name, uid, frame_of_reference_uid, position, row_cosine, column_cosine, row_step, column_step, *matrix
    )


def _enhanced(paths: Sequence[Path]) -> tuple[InstanceFacts, ...] | None:
    """The frames of the one enhanced CT that the series consists of; None where it consists of slices."""
    if len(paths) != 1:
        return None
    try:
        facts = read_facts(paths[0])
    except HeaderError as error:
        raise VolumeError(Code.UNREADABLE, f"{paths[0].name}: {error}.") from error
    if facts.sop_class_uid not in ENHANCED_CT:
        return None
    if facts.concatenation_uid is not None:
        raise VolumeError(Code.CONCATENATION, f"{paths[0].name}: a part of a concatenation is not read.")
    if facts.modality != "CT":
        raise VolumeError(Code.NOT_CT, f"{paths[0].name}: modality {facts.modality or 'absent'!r} is not CT.")
    if facts.frames > MAX_SLICES:
        raise VolumeError(Code.TOO_MANY_SLICES, f"{facts.frames} slices; at most {MAX_SLICES} are read.")
    return facts.per_frame()


def _frame_geometry(frames: Sequence[InstanceFacts], path: Path) -> list[_Slice]:
    """Where every frame lies, in frame order."""
    slices = []
    for number, one in enumerate(frames, start=1):
        name = f"{path.name}, frame {number}"
        needed = (one.position_lps_mm, one.row_cosine, one.column_cosine, one.pixel_spacing_mm, one.rows, one.columns)
        position, row, column, spacing, rows, columns = needed
        if position is None or row is None or column is None or spacing is None or rows is None or columns is None:
            raise VolumeError(Code.NO_GEOMETRY, f"{name}: position, orientation or spacing is missing.")
        slices.append(
            _slice(
                name,
                one.sop_instance_uid,
                one.frame_of_reference_uid,
                orientation=np.array([*row, *column], dtype=np.float64),
                position=np.array(position, dtype=np.float64),
                spacing=spacing,
                matrix=(rows, columns),
            )
        )
    return slices


def _read_frames(path: Path, frames: Sequence[InstanceFacts]) -> Iterator[FloatArray]:
    """The HU of every frame [row, column], in frame order."""
    images = _one_by_one(path)
    for number, one in enumerate(frames, start=1):
        image = next(images)
        yield _decoded(
            image, (one.rescale_slope, one.rescale_intercept, one.rescale_type), f"{path.name}, frame {number}"
        )
    next(images, None)  # a frame too many, if there is one, is found here


def _one_by_one(path: Path) -> Iterator[Dataset]:
    try:
        yield from single_frames(path)
    except Exception as error:  # FramesError, and all that pydicom raises for broken items
        raise VolumeError(Code.PIXELS_UNREADABLE, f"{path.name}: {error or type(error).__name__}.") from error


def _unit(vector: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
    length = float(np.linalg.norm(vector))
    if not 0.98 < length < 1.02:
        raise VolumeError(Code.NO_GEOMETRY, f"{name}: ImageOrientationPatient is not a direction.")
    return vector / length


def _ordered(slices: Sequence[_Slice]) -> list[_Slice]:
    """Slices along the common normal; refuses a series that is not one stack."""
    reference = min(slices, key=lambda one: one.uid)
    for one in slices:
        same = (
            (one.rows, one.columns) == (reference.rows, reference.columns)
            and np.allclose([one.row_step, one.column_step], [reference.row_step, reference.column_step], rtol=1e-3)
            and np.allclose(one.row_cosine, reference.row_cosine, atol=1e-3)
            and np.allclose(one.column_cosine, reference.column_cosine, atol=1e-3)
        )
        if not same:
            raise VolumeError(Code.MIXED_GEOMETRY, f"{one.name}: matrix, spacing or orientation differs.")
    normal = reference.normal
    return sorted(slices, key=lambda one: (float(one.position @ normal), one.uid))


def _stack_affine(slices: Sequence[_Slice]) -> Affine:
    """(k, j, i, 1) -> LPS mm of an ordered stack; refuses gaps, duplicates and sheared stacks."""
    first, last = slices[0], slices[-1]
    along = np.array([float(one.position @ first.normal) for one in slices])
    gaps = np.diff(along)
    step = float(np.median(gaps))
    if float(gaps.min()) < 0.01:
        raise VolumeError(Code.DUPLICATE_POSITION, "Two slices lie at the same position.")
    if float(gaps.max()) > 1.5 * step:
        raise VolumeError(Code.MISSING_SLICE, f"A gap of {gaps.max():.2f} mm between slices {step:.2f} mm apart.")
    if float(np.abs(gaps - step).max()) > STEP_TOLERANCE * step:
        raise VolumeError(Code.SPACING_UNEVEN, f"Slice steps from {gaps.min():.2f} to {gaps.max():.2f} mm.")
    stride = (last.position - first.position) / (len(slices) - 1)
    sideways = float(np.linalg.norm(stride - (stride @ first.normal) * first.normal))
    if sideways > 0.02 * step:
        raise VolumeError(Code.GANTRY_TILT, f"Slices are shifted sideways by {sideways:.2f} mm each (gantry tilt).")
    affine = np.eye(4)
    affine[:3, 0] = stride
    affine[:3, 1] = first.column_cosine * first.row_step
    affine[:3, 2] = first.row_cosine * first.column_step
    affine[:3, 3] = first.position
    return affine


def _check_pixels(dataset: Dataset, name: str) -> None:
    """Refuse what must not reach a decoder: lossy, colour, oversized, or shorter than the header says (RULES
    13).
    """
    if "PixelData" not in dataset:
        raise VolumeError(Code.NO_PIXELS, f"{name}: there are no pixels.")
    syntax = str(getattr(dataset.file_meta, "TransferSyntaxUID", ""))
    if syntax not in LOSSLESS_SYNTAXES:
        raise VolumeError(Code.LOSSY, f"{name}: transfer syntax {syntax or 'absent'} is not a lossless one.")
    try:
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        bits, samples = int(dataset.BitsAllocated), int(dataset.get("SamplesPerPixel", 1))
        frames = int(dataset.get("NumberOfFrames", None) or 1)
    except (AttributeError, TypeError, ValueError) as error:
        raise VolumeError(Code.PIXELS_UNREADABLE, f"{name}: the pixel description is incomplete.") from error
    if bits not in (8, 16, 32) or samples != 1 or frames != 1:
        raise VolumeError(Code.PIXELS_UNREADABLE, f"{name}: not one greyscale image of 8, 16 or 32 bits.")
    if not 0 < rows * columns <= MAX_SLICE_PIXELS or min(rows, columns) <= 0:
        raise VolumeError(Code.PIXELS_UNREADABLE, f"{name}: {rows} x {columns} pixels are beyond the limit.")
    _check_length(dataset, name, expected_bytes=rows * columns * bits // 8, size=(rows, columns))


def _check_length(dataset: Dataset, name: str, *, expected_bytes: int, size: tuple[int, int]) -> None:
    data = dataset.PixelData
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        if len(data) < expected_bytes or len(data) > expected_bytes + 2:
            text = f"{name}: {len(data)} bytes of pixels, {expected_bytes} expected."
            raise VolumeError(Code.PIXELS_UNREADABLE, text)
        return
    if len(data) > 2 * expected_bytes + 65536:
        raise VolumeError(Code.PIXELS_UNREADABLE, f"{name}: more encoded bytes than pixels can need.")
    found = codestream_size(data)
    if found is not None and found != size:
        text = f"{name}: the encoded image is {found[0]} x {found[1]}, not {size[0]} x {size[1]}."
        raise VolumeError(Code.PIXELS_UNREADABLE, text)


def codestream_size(encapsulated: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 codestream announces; None where no marker is found.

    The decoder allocates by these, not by the DICOM header, so a bomb hides here (ITU-T T.81 B.2.2, T.87
    C.2.2, T.800 A.5.1).
    """
    siz = encapsulated.find(b"\xff\x4f\xff\x51")
    if siz >= 0 and len(encapsulated) >= siz + 24:
        width, height, left, top = struct.unpack(">4I", encapsulated[siz + 8 : siz + 24])
        return height - top, width - left
    start = encapsulated.find(b"\xff\xd8\xff")
    position = start + 2
    while start >= 0 and position + 9 <= len(encapsulated):
        marker, length = struct.unpack(">HH", encapsulated[position : position + 4])
        if marker in (0xFFC0, 0xFFC1, 0xFFC2, 0xFFC3, 0xFFF7):
            height, width = struct.unpack(">HH", encapsulated[position + 5 : position + 9])
            return height, width
        if marker < 0xFF01 or length < 2:
            return None
        position += 2 + length
    return None


def _rescale(given: tuple[Any, Any, Any], name: str) -> tuple[float, float]:
    """Slope and intercept of one image; PS3.3 C.11.1: without RescaleType the output of a CT is HU."""
    try:
        slope, intercept = float(given[0]), float(given[1])
    except (TypeError, ValueError) as error:
        raise VolumeError(Code.NO_RESCALE, f"{name}: no rescale slope and intercept.") from error
    kind = str(given[2] or "HU").strip().upper()
    if kind != "HU":
        raise VolumeError(Code.NOT_HU, f"{name}: the rescaled values are {kind}, not HU.")
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise VolumeError(Code.NO_RESCALE, f"{name}: rescale slope or intercept makes no sense.")
    return slope, intercept


def _padding(stored: npt.NDArray[Any], hu: FloatArray, dataset: Dataset) -> npt.NDArray[np.bool_]:
    """Pixels outside of the reconstruction, as the tag PixelPaddingValue (and its range limit) names them.

    A padding value that is also a tissue's HU (seen: 0) counts only where it touches the image's edge.
    Padding that the tag does not name (seen: tag -32768, pixels -2000) lies below -1024 HU and is clipped by
    the caller.
    """
    value = dataset.get("PixelPaddingValue")
    if not isinstance(value, int):
        return np.zeros(stored.shape, dtype=np.bool_)
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    named = (stored >= low) & (stored <= high)
    if not named.any() or float(hu[named].max()) <= -1000.0:
        return named
    regions, _ = ndimage.label(named)
    edge = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    return np.isin(regions, np.unique(edge[edge > 0]))


# ------------------------------------------------------------------------------------------------------ NIfTI


def load_nifti(path: Path) -> Volume:
    """A CT in HU from a NIfTI of any orientation -> Volume with slices from feet to head (axes S, P, L).

    A NIfTI carries no modality: values that do not look like HU (no air, little soft tissue) are refused as
    NOT_HU.
    """
    image = _open_nifti(path)
    data = _nifti_values(image, path).astype(np.float32)
    np.nan_to_num(data, copy=False, nan=PADDING_HU, posinf=PADDING_HU, neginf=PADDING_HU)
    _require_hu(data, path)
    array, affine = _to_axial(np.maximum(data, np.float32(PADDING_HU)), image.affine)
    i, j, k = (int(n) for n in image.shape[:3])
    return Volume(np.ascontiguousarray(array), affine, source=SourceGrid((i, j, k), np.asarray(image.affine)))


def load_label_map(path: Path, volume: Volume) -> LabelArray:
    """A NIfTI label map on the volume's own grid [k, j, i]; another grid is sampled at the nearest voxel."""
    image = _open_nifti(path)
    values = _nifti_values(image, path)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 255 or (values != np.round(values)).any():
        raise VolumeError(Code.UNREADABLE, f"{path.name}: a label map holds whole numbers from 0 to 255.")
    labels, affine = _to_axial(values.astype(np.uint8), image.affine)
    if labels.shape == volume.hu.shape and _same_grid(affine, volume.affine, labels.shape):
        return np.ascontiguousarray(labels)
    to_labels = np.linalg.inv(affine) @ volume.affine
    moved: LabelArray = ndimage.affine_transform(
        labels,
        to_labels[:3, :3],
        to_labels[:3, 3],
        output_shape=volume.hu.shape,
        order=0,
        mode="grid-constant",
        cval=0,
    )
    if labels.any() and not moved.any():
        raise VolumeError(Code.MIXED_GEOMETRY, f"{path.name}: the label map lies outside of the CT.")
    return moved


def _same_grid(one: Affine, other: Affine, shape: tuple[int, ...]) -> bool:
    """True when no voxel of the two grids lies further apart than SAME_GRID_MM: an affine's error grows outwards."""
    far = np.array([*shape, 1.0])
    corners = np.array(
        [[0.0, 0.0, 0.0, 1.0], far, *(np.where(np.arange(4) == axis, far, [0, 0, 0, 1]) for axis in range(3))]
    )
    return bool(np.abs(corners @ (one - other).T).max() <= SAME_GRID_MM)


def write_label_map(labels: LabelArray, volume: Volume, path: Path) -> None:
    """Write labels [k, j, i] as NIfTI in the CT's own grid: the source file's orientation, or the DICOM grid
    in RAS.
    """
    affine_ras = _LPS_FROM_RAS @ volume.affine[:, [2, 1, 0, 3]]
    array = labels.transpose(2, 1, 0)
    if volume.source is not None:
        back = ornt_transform(io_orientation(affine_ras), io_orientation(volume.source.affine_ras))
        array = apply_orientation(array, back)
        affine_ras = volume.source.affine_ras
    image = nib.Nifti1Image(np.ascontiguousarray(array), affine_ras)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _open_nifti(path: Path) -> Any:
    try:
        image: Any = nib.load(path)
        shape = tuple(int(n) for n in image.shape)
        coded = int(image.header["sform_code"]) > 0 or int(image.header["qform_code"]) > 0
    except Exception as error:
        raise VolumeError(Code.UNREADABLE, f"{path.name}: not readable as NIfTI ({type(error).__name__}).") from error
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3 or min(shape) < 2:
        raise VolumeError(Code.NO_GEOMETRY, f"{path.name}: {image.shape} is not one volume.")
    if int(np.prod(shape, dtype=np.int64)) > MAX_VOXELS:
        raise VolumeError(Code.TOO_MANY_SLICES, f"{path.name}: more than {MAX_VOXELS} voxels.")
    if not coded or not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-6:
        raise VolumeError(Code.NO_GEOMETRY, f"{path.name}: the header does not say how the patient lies.")
    return image


def _nifti_values(image: Any, path: Path) -> npt.NDArray[np.float32]:
    try:
        values = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as error:
        raise VolumeError(Code.PIXELS_UNREADABLE, f"{path.name}: the voxels do not read ({error}).") from error
    return values[..., 0] if values.ndim == 4 else values


def _to_axial(array: npt.NDArray[Any], affine_ras: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], Affine]:
    """(i, j, k) in any orientation -> [k, j, i] with axes S, P, L and its affine to LPS mm; no resampling."""
    turn = ornt_transform(io_orientation(affine_ras), axcodes2ornt(("L", "P", "S")))
    turned = apply_orientation(array, turn)
    affine = _LPS_FROM_RAS @ affine_ras @ inv_ornt_aff(turn, array.shape)
    return turned.transpose(2, 1, 0), np.asarray(affine[:, [2, 1, 0, 3]], dtype=np.float64)


def _require_hu(data: FloatArray, path: Path) -> None:
    """Air near -1000 HU, and most of what is not air within soft tissue's range: true of every body CT, of no
    MR.
    """
    sample = data[::2, ::2, ::2]
    air = float(np.mean((sample > -1100) & (sample < -850)))
    body = sample[sample > -500]
    soft = float(np.mean((body > -200) & (body < 200))) if body.size else 0.0
    if air < 0.005 or soft < 0.5:
        text = f"{path.name}: the values are not HU (air {air:.1%}, soft tissue {soft:.0%} of the rest)."
        raise VolumeError(Code.NOT_HU, text)
