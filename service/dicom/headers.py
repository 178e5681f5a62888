"""One DICOM header, read tolerantly into `InstanceFacts`: what can't be read is None, never a guess.

Values are taken from the raw bytes instead of through pydicom's converters: those warn or raise on the values that
real archives hold (empty strings, a comma in a DS, two values where one belongs). Only what is no readable DICOM
at all is an error.
"""

from __future__ import annotations

import math
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.sequence import Sequence

from service.dicom import syntaxes
from service.dicom.part10 import FileMeta, NotPart10Error, read_file_meta
from service.domain.facts import InstanceFacts, Vector

MAX_TEXT = 255  # characters kept of any one value; PS3.5 6.2 allows 64 for LO and per PN component group
MAX_AGE_YEARS = 130.0
PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})  # Float, Double Float and Pixel Data

CONTRAST_TEXTS = (
    "ContrastBolusAgent",
    "ContrastBolusRoute",
    "ContrastBolusStartTime",
    "ContrastBolusStopTime",
    "ContrastBolusIngredient",
)
CONTRAST_AMOUNTS = (  # a zero here says that nothing was given
    "ContrastBolusVolume",
    "ContrastBolusTotalDose",
    "ContrastFlowRate",
    "ContrastFlowDuration",
    "ContrastBolusIngredientConcentration",
)
CONTRAST_SEQUENCES = (
    "ContrastBolusAgentSequence",
    "ContrastBolusAdministrationRouteSequence",
    "ContrastBolusUsageSequence",
    "ContrastAdministrationProfileSequence",
)
FUNCTIONAL_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
TEXT_KEYWORDS = (
    "SpecificCharacterSet", "ImageType", "SyntheticData", "SOPClassUID", "SOPInstanceUID", "StudyDate", "SeriesDate",
    "AcquisitionDate", "ContentDate", "AccessionNumber", "Modality", "Manufacturer", "StudyDescription",
    "SeriesDescription", "ManufacturerModelName", "PatientName", "PatientID", "IssuerOfPatientID",
    "PatientBirthDate", "PatientSex", "PatientAge", "SliceThickness", "KVP", "DeviceSerialNumber",
    "SoftwareVersions", "ReconstructionDiameter", "GantryDetectorTilt", "ConvolutionKernel",
    "MultienergyCTAcquisition", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "AcquisitionNumber",
    "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "PixelSpacing", "BitsAllocated",
    "RescaleIntercept", "RescaleSlope", "RescaleType", "LossyImageCompression",
)  # fmt: skip
KEYWORDS = TEXT_KEYWORDS + CONTRAST_TEXTS + CONTRAST_AMOUNTS + CONTRAST_SEQUENCES + FUNCTIONAL_GROUPS

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # PostgreSQL keeps no NUL; no header value needs the others
_AGE = re.compile(r"^(\d{1,3})([DWMY])$")
_UNITS_A_YEAR = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}
_CHARSET_LOCK = threading.Lock()  # warnings.catch_warnings changes the process, not the thread


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
        with source.open("rb") if isinstance(source, Path) else nullcontext(source) as stream:
            return _facts(*_parse(stream, read_file_meta(stream)))
    except HeaderError:
        raise
    except NotPart10Error as error:
        raise HeaderError(f"not a DICOM file: {error}") from error
    except RecursionError as error:
        raise HeaderError("sequences are nested too deeply") from error
    except Exception as error:  # pydicom raises nearly anything on broken bytes
        raise HeaderError(f"header can't be read: {type(error).__name__}") from error


def _from_dataset(dataset: Dataset, syntax: str | None) -> InstanceFacts:
    meta = getattr(dataset, "file_meta", None)
    syntax = syntax or str(getattr(meta, "TransferSyntaxUID", None) or syntaxes.EXPLICIT_VR_LITTLE_ENDIAN)
    return _facts(_Header(dataset), FileMeta("", "", syntax, 0), any(tag in dataset for tag in PIXEL_TAGS))


def _parse(stream: BinaryIO, meta: FileMeta) -> tuple[_Header, FileMeta, bool]:
    syntax = meta.transfer_syntax_uid
    if syntax == syntaxes.DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN:
        raise HeaderError("deflated transfer syntax is not taken")
    pixels = False

    def stop_when(tag: int, _vr: str | None, length: int) -> bool:
        nonlocal pixels
        if tag in PIXEL_TAGS:
            pixels = length > 0
        return tag >= 0x7FE00008

    dataset = read_dataset(
        stream,
        is_implicit_VR=syntax == syntaxes.IMPLICIT_VR_LITTLE_ENDIAN,
        is_little_endian=syntax != syntaxes.EXPLICIT_VR_BIG_ENDIAN,
        stop_when=stop_when,
        specific_tags=[tag for tag in map(tag_for_keyword, KEYWORDS) if tag is not None],
    )
    return _Header(dataset), meta, pixels


class _Header:
    """Keyword access to a data set: raw bytes in, plain values or None out."""

    def __init__(self, dataset: Dataset, encodings: list[str] | None = None) -> None:
        self._dataset = dataset
        self._encodings = encodings or ["iso8859"]
        charsets = list(self.texts("SpecificCharacterSet"))
        if any(charsets):
            self._encodings = _python_encodings(charsets)

    def texts(self, keyword: str) -> tuple[str, ...]:
        """Every value as stripped text; () where the element is absent or empty."""
        element = self._dataset.get_item(keyword)
        if element is None:
            return ()
        value = element.value
        if isinstance(element, RawDataElement) and isinstance(value, bytes):
            parts = self._decode(value).split("\\")
        elif isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
            parts = [str(part) for part in value]
        else:
            parts = [] if value is None else [str(value)]
        cleaned = tuple(_CONTROL.sub(" ", part).strip()[:MAX_TEXT] for part in parts)
        return cleaned if any(cleaned) else ()

    def text(self, keyword: str) -> str | None:
        """The first value that isn't empty."""
        return next((part for part in self.texts(keyword) if part), None)

    def number(self, keyword: str) -> float | None:
        """The first value as a finite number."""
        values = self.numbers(keyword)
        return values[0] if values else None

    def numbers(self, keyword: str) -> tuple[float, ...] | None:
        """Every value as a finite number, or None if one of them is not."""
        try:
            values = tuple(float(part) for part in self.texts(keyword))
        except ValueError:
            return None
        return values if values and all(map(math.isfinite, values)) else None

    def integer(self, keyword: str) -> int | None:
        """An IS value."""
        value = self.number(keyword)
        return int(value) if value is not None and value == int(value) and abs(value) < 2**31 else None

    def unsigned(self, keyword: str) -> int | None:
        """A US value."""
        element = self._dataset.get_item(keyword)
        if isinstance(element, RawDataElement) and isinstance(element.value, bytes):
            if len(element.value) < 2:
                return None
            order = "<H" if element.is_little_endian else ">H"
            return int(struct.unpack(order, element.value[:2])[0])
        return self.integer(keyword)

    def items(self, keyword: str) -> list[_Header]:
        """The items of a sequence; [] where it is absent or can't be read."""
        try:
            value = self._dataset[keyword].value if self._dataset.get_item(keyword) is not None else None
        except Exception:  # whatever a broken nested sequence makes pydicom raise, RecursionError included
            return []
        return [_Header(item, self._encodings) for item in value] if isinstance(value, Sequence) else []

    def is_unreadable(self, keyword: str) -> bool:
        """True for a sequence that holds bytes but gives no items."""
        element = self._dataset.get_item(keyword)
        return element is not None and bool(element.value) and not self.items(keyword)

    def sequences(self) -> Iterator[list[_Header]]:
        """Every readable sequence of this data set."""
        for tag in list(self._dataset.keys()):
            keyword = keyword_for_tag(tag)
            if keyword and (items := self.items(keyword)):
                yield items

    def _decode(self, value: bytes) -> str:
        if value.isascii() and b"\x1b" not in value:
            return value.decode("ascii")
        try:
            with _CHARSET_LOCK, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return str(decode_bytes(value, self._encodings, {0x5C, 0x5E, 0x3D}))
        except Exception:
            return value.decode("ascii", "replace")


def _python_encodings(charsets: list[str]) -> list[str]:
    try:
        with _CHARSET_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(convert_encodings(charsets))
    except Exception:
        return ["iso8859"]


class _Layered:
    """Top level first, then an enhanced image's functional groups: shared, then the first frame's.

    PS3.3 C.7.6.16.
    """

    def __init__(self, top: _Header) -> None:
        self._layers = [top]
        for keyword in FUNCTIONAL_GROUPS:
            for group in top.items(keyword)[:1]:
                self._layers += [item for items in group.sequences() for item in items[:1]]

    def text(self, keyword: str) -> str | None:
        return next((value for layer in self._layers if (value := layer.text(keyword)) is not None), None)

    def texts(self, keyword: str) -> tuple[str, ...]:
        return next((values for layer in self._layers if (values := layer.texts(keyword))), ())

    def number(self, keyword: str) -> float | None:
        return next((value for layer in self._layers if (value := layer.number(keyword)) is not None), None)

    def numbers(self, keyword: str, count: int) -> tuple[float, ...] | None:
        for layer in self._layers:
            values = layer.numbers(keyword)
            if values is not None and len(values) == count:
                return values
        return None

    def contrast(self) -> tuple[str, ...]:
        """Every non-empty contrast tag of every layer, in order, once."""
        return tuple(dict.fromkeys(text for layer in self._layers for text in _contrast(layer)))


def _facts(top: _Header, meta: FileMeta, has_pixels: bool) -> InstanceFacts:
    sop_class_uid = top.text("SOPClassUID") or meta.sop_class_uid
    sop_instance_uid = top.text("SOPInstanceUID") or meta.sop_instance_uid
    if not sop_class_uid:
        raise HeaderError("no SOP Class UID: not a DICOM instance")
    layers = _Layered(top)
    study_date = _da(top.text("StudyDate"))
    acquired = study_date or next(
        (day for key in ("AcquisitionDate", "SeriesDate", "ContentDate") if (day := _da(top.text(key)))), None
    )
    birth_date = _da(top.text("PatientBirthDate"))
    orientation = layers.numbers("ImageOrientationPatient", 6)
    spacing = layers.numbers("PixelSpacing", 2)
    frames = top.integer("NumberOfFrames")
    return InstanceFacts(
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
        kvp=layers.number("KVP"),
        convolution_kernel=tuple(part for part in layers.texts("ConvolutionKernel") if part),
        image_type=top.texts("ImageType"),
        contrast_bolus=layers.contrast(),
        multienergy=layers.text("MultienergyCTAcquisition") == "YES",
        gantry_tilt_deg=layers.number("GantryDetectorTilt"),
        slice_thickness_mm=_positive(layers.number("SliceThickness")),
        reconstruction_diameter_mm=_positive(layers.number("ReconstructionDiameter")),
        position_lps_mm=_vector(layers.numbers("ImagePositionPatient", 3)),
        row_cosine=_vector(orientation[:3] if orientation else None),
        column_cosine=_vector(orientation[3:] if orientation else None),
        pixel_spacing_mm=(spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None,
        frame_of_reference_uid=top.text("FrameOfReferenceUID"),
        rows=top.unsigned("Rows"),
        columns=top.unsigned("Columns"),
        frames=frames if frames is not None and frames > 0 else 1,
        has_pixels=has_pixels,
        bits_allocated=top.unsigned("BitsAllocated"),
        samples_per_pixel=top.unsigned("SamplesPerPixel"),
        photometric=top.text("PhotometricInterpretation"),
        rescale_slope=layers.number("RescaleSlope"),
        rescale_intercept=layers.number("RescaleIntercept"),
        rescale_type=layers.text("RescaleType"),
        lossy=_is_lossy(top.text("LossyImageCompression"), meta.transfer_syntax_uid),
        synthetic=top.text("SyntheticData") == "YES",
    )


def _is_lossy(lossy_image_compression: str | None, syntax: str) -> bool:
    """PS3.3 C.7.6.1.1.5: 01 says lossy; a syntax that may be lossy counts as lossy unless the tag says 00."""
    if lossy_image_compression == "01" or syntax in syntaxes.ALWAYS_LOSSY + syntaxes.RETIRED_LOSSY:
        return True
    return syntax in syntaxes.PERHAPS_LOSSY and lossy_image_compression != "00"


def _contrast(header: _Header) -> Iterator[str]:
    for keyword in CONTRAST_TEXTS:
        if values := [text for text in header.texts(keyword) if text]:
            yield f"{keyword}={', '.join(values)}"
    for keyword in CONTRAST_AMOUNTS:
        numbers = header.numbers(keyword)
        texts = [text for text in header.texts(keyword) if text]
        if texts and (numbers is None or any(number != 0 for number in numbers)):
            yield f"{keyword}={', '.join(texts)}"
    for keyword in CONTRAST_SEQUENCES:
        if header.is_unreadable(keyword):
            yield f"{keyword}=unreadable"
        for item in header.items(keyword):
            if item.text("ContrastBolusAgentAdministered") == "NO":
                continue
            yield f"{keyword}={item.text('CodeMeaning') or item.text('ContrastBolusAgent') or 'present'}"


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


def _positive(value: float | None) -> float | None:
    return value if value is not None and value > 0 else None


def _vector(values: tuple[float, ...] | None) -> Vector | None:
    return (values[0], values[1], values[2]) if values is not None else None
