"""One DICOM header, read tolerantly into `InstanceFacts`: what can't be read is None, never a guess.

Only what is no readable DICOM at all is an error. Time and memory are bounded whatever a peer sends: sequences are
measured before they are kept, and of frames only a few values are built.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from service.dicom import contrast, frames, segments, syntaxes
from service.dicom.elements import UNDEFINED_LENGTH, Budget, Encoding, WalkError, pass_over, read_head
from service.dicom.part10 import BoundedFile, FileMeta, NotPart10Error, read_file_meta
from service.dicom.reports import is_ours
from service.dicom.values import Header, raw_sequence
from service.domain.eligibility import ENHANCED_CT
from service.domain.facts import InstanceFacts

MAX_AGE_YEARS = 130.0
MAX_ELEMENTS = 1_000_000  # in the sequences of one header; 2000 real frames hold about 200,000
PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})  # Float, Double Float and Pixel Data

TEXT_KEYWORDS = (
    "SpecificCharacterSet", "SyntheticData", "SOPClassUID", "SOPInstanceUID", "StudyDate", "SeriesDate",
    "AcquisitionDate", "ContentDate", "AccessionNumber", "Modality", "Manufacturer", "StudyDescription",
    "SeriesDescription", "ManufacturerModelName", "PatientName", "PatientID", "IssuerOfPatientID",
    "PatientBirthDate", "PatientSex", "PatientAge", "DeviceSerialNumber", "SoftwareVersions", "StudyInstanceUID",
    "SeriesInstanceUID", "SeriesNumber", "AcquisitionNumber", "InstanceNumber", "FrameOfReferenceUID",
    "ConcatenationUID", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "LossyImageCompression",
)  # fmt: skip
KEYWORDS = TEXT_KEYWORDS + frames.KEYWORDS + frames.GROUPS + contrast.KEYWORDS + segments.KEYWORDS

_AGE = re.compile(r"^(\d{1,3})([DWMY])$")
_UNITS_A_YEAR = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}


class HeaderError(Exception):
    """The source is no DICOM instance that can be told apart from others; the text says why."""


def read_facts(source: Path | BytesIO | Dataset, transfer_syntax_uid: str | None = None) -> InstanceFacts:
    """Read one instance's header.

    `source` is a Part 10 file, a parsed data set, or (with `transfer_syntax_uid`) the raw bytes of a data set
    as a C-STORE brings them. Pixels are never read. An absent study, series or instance UID is "" (seen in anonymised
    files): the listener refuses it, `osteogate screen` need not. Raises HeaderError.
    """
    try:
        if isinstance(source, Dataset):
            return _from_dataset(source, transfer_syntax_uid)
        if isinstance(source, BytesIO):
            source.seek(0)
        if isinstance(source, BytesIO) and transfer_syntax_uid is not None:
            return _facts(*_parse(source, FileMeta("", "", transfer_syntax_uid, 0)))
        with BoundedFile(source) if isinstance(source, Path) else nullcontext(source) as stream:
            return _facts(*_parse(stream, read_file_meta(stream)))
    except HeaderError:
        raise
    except NotPart10Error as error:
        raise HeaderError(f"not a DICOM file: {error}") from error
    except WalkError as error:
        raise HeaderError(f"header can't be read: {error}") from error
    except RecursionError as error:
        raise HeaderError("sequences are nested too deeply") from error
    except Exception as error:  # pydicom raises nearly anything on broken bytes
        raise HeaderError(f"header can't be read: {type(error).__name__}") from error


def read_header(path: Path, keywords: tuple[str, ...]) -> Header:
    """These elements of a Part 10 file, up to its pixels. Raises HeaderError, or OSError where there is no file."""
    try:
        with BoundedFile(path) as stream:
            meta = read_file_meta(stream)
            return Header(_read(stream, meta, lambda tag, _vr, _length: tag >= min(PIXEL_TAGS), keywords))
    except OSError:
        raise
    except RecursionError as error:
        raise HeaderError("sequences are nested too deeply") from error
    except Exception as error:  # pydicom raises nearly anything on broken bytes
        raise HeaderError(f"it can't be read: {type(error).__name__}") from error


def _from_dataset(dataset: Dataset, syntax: str | None) -> InstanceFacts:
    meta = getattr(dataset, "file_meta", None)
    syntax = syntax or str(getattr(meta, "TransferSyntaxUID", None) or syntaxes.EXPLICIT_VR_LITTLE_ENDIAN)
    return _facts(Header(dataset), FileMeta("", "", syntax, 0), any(tag in dataset for tag in PIXEL_TAGS))


def _parse(stream: BinaryIO, meta: FileMeta) -> tuple[Header, FileMeta, bool]:
    syntax = meta.transfer_syntax_uid
    if syntax == syntaxes.DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN:
        raise HeaderError("deflated transfer syntax is not taken")
    pixels = False
    last = _last_tag(stream, meta)

    def stop_when(tag: int, _vr: str | None, length: int) -> bool:
        nonlocal pixels
        if tag in PIXEL_TAGS or tag == last:
            pixels = length > 0
        return tag >= last

    return Header(_read(stream, meta, stop_when, KEYWORDS)), meta, pixels


def _last_tag(stream: BinaryIO, meta: FileMeta) -> int:
    """Where reading ends: before the pixels; in a segmentation before what it says of its thousands of frames.

    A segmentation's pixels lie behind that; whether they are whole is the worker's to find.
    """
    start = stream.tell()
    named = Header(_read(stream, meta, lambda tag, _vr, _length: tag > 0x00080016, ("SOPClassUID",)))
    stream.seek(start)
    sop_class_uid = named.text("SOPClassUID") or meta.sop_class_uid
    return 0x52009230 if sop_class_uid in segments.SOP_CLASSES else 0x7FE00008


def _read(
    stream: BinaryIO, meta: FileMeta, stop_when: Callable[[int, str | None, int], bool], keywords: tuple[str, ...]
) -> Dataset:
    """The wanted elements; what has no length of its own is measured before any of it is kept."""
    wanted = [tag for tag in map(tag_for_keyword, keywords) if tag is not None]
    found, budget = Dataset(), Budget(MAX_ELEMENTS)
    open_ended = True

    def stop(tag: int, vr: str | None, length: int) -> bool:
        nonlocal open_ended
        if stop_when(tag, vr, length):
            return True
        open_ended = length == UNDEFINED_LENGTH
        return open_ended

    while open_ended:
        open_ended = False
        part = read_dataset(
            stream,
            is_implicit_VR=meta.transfer_syntax_uid == syntaxes.IMPLICIT_VR_LITTLE_ENDIAN,
            is_little_endian=meta.transfer_syntax_uid != syntaxes.EXPLICIT_VR_BIG_ENDIAN,
            stop_when=stop,
            specific_tags=wanted,
        )
        found.update(part)
        if open_ended:
            found.update(_measured(stream, Encoding(*part.original_encoding), budget, wanted))
    return found


def _measured(stream: BinaryIO, encoding: Encoding, budget: Budget, wanted: list[int]) -> dict[int, Any]:
    """Pass over a value of undefined length; it is given back where it is wanted."""
    element = read_head(stream, encoding)
    if element is None:
        return {}
    start = stream.tell()
    end = pass_over(stream, element, encoding, budget)
    if element.tag not in wanted:
        return {}
    if end - start > frames.MAX_GROUPS_BYTES:
        raise WalkError(f"more than {frames.MAX_GROUPS_BYTES} bytes in one sequence")
    behind = stream.tell()
    stream.seek(start)
    value = stream.read(end - start)
    stream.seek(behind)
    return {element.tag: raw_sequence(element, value, encoding)}


def _facts(top: Header, meta: FileMeta, has_pixels: bool) -> InstanceFacts:
    sop_class_uid = top.text("SOPClassUID") or meta.sop_class_uid
    sop_instance_uid = top.text("SOPInstanceUID") or meta.sop_instance_uid
    if not sop_class_uid:
        raise HeaderError("no SOP Class UID: not a DICOM instance")
    study_date = _da(top.text("StudyDate"))
    acquired = study_date or next(
        (day for key in ("AcquisitionDate", "SeriesDate", "ContentDate") if (day := _da(top.text(key)))), None
    )
    birth_date = _da(top.text("PatientBirthDate"))
    count = max(top.integer("NumberOfFrames") or 1, 1)
    images = frames.read_frames(top, count, Budget(MAX_ELEMENTS), enhanced=sop_class_uid in ENHANCED_CT)
    is_segmentation = sop_class_uid in segments.SOP_CLASSES
    facts = InstanceFacts(
        study_uid=top.text("StudyInstanceUID") or "",
        series_uid=top.text("SeriesInstanceUID") or "",
        sop_instance_uid=sop_instance_uid,
        sop_class_uid=sop_class_uid,
        transfer_syntax_uid=meta.transfer_syntax_uid,
        modality=top.text("Modality"),
        patient_id=top.text("PatientID"),
        issuer_of_patient_id=top.text("IssuerOfPatientID"),
        patient_name=top.text("PatientName"),
        patient_sex=top.text("PatientSex"),
        patient_birth_date=birth_date,
        patient_age_years=_age_years(top.text("PatientAge"), birth_date, acquired),
        study_date=study_date,
        study_description=top.text("StudyDescription"),
        accession_number=top.text("AccessionNumber"),
        series_description=top.text("SeriesDescription"),
        series_number=top.integer("SeriesNumber"),
        instance_number=top.integer("InstanceNumber"),
        acquisition_number=top.integer("AcquisitionNumber"),
        manufacturer=top.text("Manufacturer"),
        model_name=top.text("ManufacturerModelName"),
        device_serial_number=top.text("DeviceSerialNumber"),
        software_versions="\\".join(top.texts("SoftwareVersions")) or None,
        frame_of_reference_uid=top.text("FrameOfReferenceUID"),
        rows=top.unsigned("Rows"),
        columns=top.unsigned("Columns"),
        frames=count,
        has_pixels=has_pixels,
        bits_allocated=top.unsigned("BitsAllocated"),
        samples_per_pixel=top.unsigned("SamplesPerPixel"),
        photometric=top.text("PhotometricInterpretation"),
        lossy=_is_lossy(top.text("LossyImageCompression"), meta.transfer_syntax_uid),
        synthetic=top.text("SyntheticData") == "YES",
        contrast_bolus=images.contrast,
        frame_positions_lps_mm=images.positions,
        frame_values=images.columns,
        concatenation_uid=top.text("ConcatenationUID"),
        segments=segments.property_types(top) if is_segmentation else (),
        referenced_series_uids=segments.referenced_series(top) if is_segmentation else (),
        **images.common,
    )
    return replace(facts, own_output=is_ours(facts))


def _is_lossy(lossy_image_compression: str | None, syntax: str) -> bool:
    """PS3.3 C.7.6.1.1.5: 01 says lossy; a syntax that may be lossy counts as lossy unless the tag says 00."""
    if lossy_image_compression == "01" or syntax in syntaxes.ALWAYS_LOSSY + syntaxes.RETIRED_LOSSY:
        return True
    return syntax in syntaxes.PERHAPS_LOSSY and lossy_image_compression != "00"


def _age_years(age: str | None, birth: str | None, acquired: str | None) -> float | None:
    """PatientAge (AS, PS3.5 6.2) in years; else whole years from birth to the study; else None."""
    match = _AGE.match((age or "").upper())
    if match:
        years = int(match[1]) / _UNITS_A_YEAR[match[2]]
        # 000Y is what anonymisers write for "removed"; a newborn's age comes in days, weeks or months.
        if 0 < years <= MAX_AGE_YEARS:
            return years
    if birth is None or acquired is None:
        return None
    born, seen = date.fromisoformat(birth), date.fromisoformat(acquired)
    whole_years = seen.year - born.year - ((seen.month, seen.day) < (born.month, born.day))
    return float(whole_years) if 0 <= whole_years <= MAX_AGE_YEARS and seen >= born else None


def _da(text: str | None) -> str | None:
    """A valid DA as YYYYMMDD (the retired YYYY.MM.DD too)."""
    digits = (text or "").replace(".", "")
    if len(digits) != 8 or not (digits.isascii() and digits.isdigit()):
        return None
    with suppress(ValueError):
        date.fromisoformat(digits)
        return digits
    return None
