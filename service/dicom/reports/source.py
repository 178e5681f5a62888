"""The source CT's headers, brought into a form in which they can be carried over into our objects.

Archives hold headers with absent type 2 attributes, odd sexes and single-component names, on which highdicom raises
or warns. What is needed is copied; what is unusable stays empty, and a value is never invented.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from service.dicom.headers import read_facts
from service.dicom.part10 import IMPLEMENTATION_CLASS_UID, BoundedFile
from service.dicom.reports import codes
from service.domain.eligibility import ENHANCED_CT
from service.domain.errors import OsteogateError

IMAGE = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "Rows", "Columns",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices",
)  # fmt: skip
IDENTITY = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
STUDY = ("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber")
EMPTY_IF_ABSENT = ("PatientID", "PatientBirthDate", "StudyDate", "StudyTime", "StudyID", "AccessionNumber")
PATIENT = ("PatientID", "PatientBirthDate")
# Put back, as they stood, into the finished object: highdicom warns about some of their values, or drops them.
CARRIED = (
    "SpecificCharacterSet", "PatientName", "IssuerOfPatientID", "OtherPatientIDsSequence", "PatientSex",
    "ReferringPhysicianName", "StudyDescription", "PatientAge", "TimezoneOffsetFromUTC",
)  # fmt: skip
UTF_8 = ("ISO_IR 192", "GB18030", "GBK")
PLAIN = str.maketrans(
    {"±": "+-", "–": "-", "—": "-", "≥": ">=", "≤": "<=", "²": "2", "³": "3", "°": " deg", "×": "x", "µ": "u"}
    | {"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "\u00a0": " "}
)


class ReportError(OsteogateError):
    """The source, the labels and the result do not fit together; the text says where."""


@dataclass(frozen=True)
class Planes:
    """The source as a segmentation refers to it: the headers, and which of their planes each slice of the volume is."""

    headers: list[Dataset]  # one a slice, or the one of an enhanced CT
    order: list[int]  # by slice of the volume (k), the number of its plane: its header's, or its frame's from 0
    first: Dataset  # the source of which patient, study and character set are carried over


def planes_of(source: Sequence[Dataset]) -> Planes:
    """The planes that may be segmented, of a series of slices in any order or of one enhanced CT."""
    if any(str(one.get("SOPClassUID", "")) in ENHANCED_CT for one in source):
        return _enhanced_planes(source)
    slices = in_volume_order(source)
    headers = clean_headers(slices)
    fill_thickness(headers)
    return Planes(headers, list(range(len(headers))), slices[0])


def _enhanced_planes(source: Sequence[Dataset]) -> Planes:
    if len(source) != 1:
        raise ReportError("an enhanced CT among other objects")
    (header,) = clean_headers(source)
    frames = read_facts(source[0]).per_frame()
    row, column = frames[0].row_cosine, frames[0].column_cosine
    places = [one.position_lps_mm for one in frames]
    if row is None or column is None or None in places or len(frames) != int(source[0].get("NumberOfFrames", 0)):
        raise ReportError("a frame of the source has no place")
    along = np.array([place for place in places if place is not None]) @ np.cross(row, column)
    header.NumberOfFrames = len(frames)
    header.SharedFunctionalGroupsSequence = [_shared(source[0])]
    header.PerFrameFunctionalGroupsSequence = [_placed(source[0], number) for number in range(len(frames))]
    _fill_measures(header, along)
    return Planes([header], [int(number) for number in np.argsort(along, kind="stable")], source[0])


def _shared(dataset: Dataset) -> Dataset:
    """Orientation and pixel measures; an enhanced CT in which they differ between frames is never segmented."""
    made = Dataset()
    made.PlaneOrientationSequence = [_macro(dataset, 0, "PlaneOrientationSequence")]
    made.PixelMeasuresSequence = [_macro(dataset, 0, "PixelMeasuresSequence")]
    return made


def _placed(dataset: Dataset, number: int) -> Dataset:
    made = Dataset()
    made.PlanePositionSequence = [_macro(dataset, number, "PlanePositionSequence")]
    return made


def _macro(dataset: Dataset, number: int, keyword: str) -> Dataset:
    """A copy of one functional group of a frame (from 0), wherever it stands."""
    for groups, place in (("PerFrameFunctionalGroupsSequence", number), ("SharedFunctionalGroupsSequence", 0)):
        if groups in dataset and keyword in dataset[groups].value[place]:
            found: Dataset = copy.deepcopy(dataset[groups].value[place][keyword].value[0])
            return found
    raise ReportError(f"frame {number + 1} of the source has no {keyword}")


def _fill_measures(header: Dataset, along: NDArray[np.float64]) -> None:
    measures = header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    if measures.get("SliceThickness") in (None, ""):
        measures.SliceThickness = _thickness(np.sort(along))


def read_source(files: Sequence[Path]) -> list[Dataset]:
    """The headers of the source's files, without pixels."""
    return [_read_header(path) for path in files]


def _read_header(path: Path) -> Dataset:
    with BoundedFile(path) as file:
        return dcmread(file, stop_before_pixels=True, force=True)


def in_volume_order(source: Sequence[Dataset]) -> list[Dataset]:
    """The slices along the normal of their common orientation, as `worker.volume` stacks them (LPS, mm)."""
    if not source:
        raise ReportError("there are no source slices")
    for keyword in ("ImageOrientationPatient", "ImagePositionPatient"):
        if any(keyword not in one or _is_blank(one, keyword) for one in source):
            raise ReportError(f"a source slice has no {keyword}")
    row, column = _vectors(source[0])
    normal = np.cross(row, column)
    return sorted(source, key=lambda one: (float(_position(one) @ normal), str(one.SOPInstanceUID)))


def _vectors(dataset: Dataset) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    cosines = np.array([float(value) for value in dataset.ImageOrientationPatient])
    return cosines[:3], cosines[3:]


def _position(dataset: Dataset) -> NDArray[np.float64]:
    return np.array([float(value) for value in dataset.ImagePositionPatient])


def clean_headers(source: Sequence[Dataset]) -> list[Dataset]:
    """What highdicom needs of every slice, and nothing on which it stumbles."""
    for keyword in IDENTITY:
        if any(keyword not in one or _is_blank(one, keyword) for one in source):
            raise ReportError(f"a source slice has no {keyword}")  # seen in files that were made anonymous
    if len({str(one.StudyInstanceUID) for one in source}) != 1:
        raise ReportError("the source slices are not of one study")
    if len({str(one.SOPInstanceUID) for one in source}) != len(source):
        raise ReportError("two source slices have the same SOPInstanceUID")
    return [_clean(one) for one in source]


def _clean(dataset: Dataset) -> Dataset:
    clean = Dataset()
    for keyword in (*IMAGE, *STUDY, *PATIENT):
        if keyword in dataset and (keyword in STUDY or not _is_blank(dataset, keyword)):
            clean[keyword] = copy.copy(dataset[keyword])  # ours to change, the caller's stays
    for keyword in (*EMPTY_IF_ABSENT, "PatientName", "PatientSex"):
        if keyword not in clean:
            setattr(clean, keyword, "")
    return clean


def _is_blank(dataset: Dataset, keyword: str) -> bool:
    return dataset[keyword].value in (None, "")


def fill_thickness(ordered: Sequence[Dataset]) -> None:
    """Give slices without a SliceThickness the distance between them (mm): a segmentation must state one."""
    if all("SliceThickness" in one for one in ordered):
        return
    row, column = _vectors(ordered[0])
    thickness = _thickness(np.array([float(_position(one) @ np.cross(row, column)) for one in ordered]))
    for one in ordered:
        one.SliceThickness = thickness


def _thickness(along: NDArray[np.float64]) -> str:
    """The usual distance between slices at these places (mm, ascending), as a DS."""
    gaps = np.diff(along)
    if not gaps.size:
        raise ReportError("the thickness of a single slice is not given")
    return f"{float(np.median(gaps)):.6g}"


def finish(made: Dataset, source: Dataset, *, synthetic: bool, at: datetime) -> Dataset:
    """Carry over patient and study, the character set and SyntheticData; give it the time and our own names."""
    for keyword in CARRIED:
        if keyword in source and not _is_blank(source, keyword):
            made[keyword] = copy.copy(source[keyword])
    for keyword in ("PatientSex", "ReferringPhysicianName"):  # type 2
        if keyword not in made:
            setattr(made, keyword, "")
    if synthetic:
        made.SyntheticData = "YES"
    made.InstanceCreationDate = made.ContentDate = made.SeriesDate = at.strftime("%Y%m%d")
    made.InstanceCreationTime = made.ContentTime = made.SeriesTime = at.strftime("%H%M%S")
    made.file_meta.ImplementationClassUID = IMPLEMENTATION_CLASS_UID
    made.file_meta.ImplementationVersionName = "OSTEOGATE"
    if "ContributingEquipmentSequence" in made:  # names the library and its time, not the maker of the result
        del made.ContributingEquipmentSequence
    return made


def is_synthetic(source: Sequence[Dataset]) -> bool:
    """Whether any source slice comes from a digital patient (SyntheticData, 0008,001C)."""
    return any(str(one.get("SyntheticData", "")).strip().upper() == "YES" for one in source)


def coding_scheme() -> CodingSchemeIdentificationItem:
    """Our private scheme, declared in the object's header (PS3.3 C.12.1.1.5)."""
    return CodingSchemeIdentificationItem(
        designator=codes.SCHEME,
        name=codes.SCHEME_NAME,
        uid=codes.SCHEME_UID,
        responsible_organization="Osteogate",
    )


def writable(text: str, source: Dataset) -> str:
    """The text as the source's character set can hold it: anything in UTF-8, else plain ASCII."""
    charset = source.get("SpecificCharacterSet") or ""
    first = charset if isinstance(charset, str) else charset[0]
    return text if first in UTF_8 else plain(text)


def plain(text: str) -> str:
    """The text in ASCII, which every character set holds, a character a byte; what it has no letter for becomes "?"."""
    return text.translate(PLAIN).encode("ascii", "replace").decode("ascii")
