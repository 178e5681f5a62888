"""The source CT's headers, brought into a form in which they can be carried over into our objects.

Archives hold headers with absent type 2 attributes, odd sexes and single-component names, on which highdicom raises
or warns. What is needed is copied; what is unusable stays empty, and a value is never invented.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from datetime import datetime

import numpy as np
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from service.dicom.part10 import IMPLEMENTATION_CLASS_UID
from service.dicom.reports import codes
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
    gaps = np.diff([float(_position(one) @ np.cross(row, column)) for one in ordered])
    if not gaps.size:
        raise ReportError("the thickness of a single slice is not given")
    for one in ordered:
        one.SliceThickness = f"{float(np.median(gaps)):.6g}"


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
    if first in UTF_8:
        return text
    return text.translate(PLAIN).encode("ascii", "replace").decode("ascii")
