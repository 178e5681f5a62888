"""A digital patient's CT as CT Image Storage objects (PS3.3 A.3), each marked SyntheticData = YES."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from models.phantom.anatomy import Patient
from models.phantom.grid import Grid

UID_ROOT = "2.25"
INTERCEPT = -1024
# manufacturer as the vendor writes it, model, how it names its kernel
VENDOR_TAGS: dict[str, tuple[str, str]] = {
    "canon": ("CANON_MEC", "Aquilion ONE"),
    "siemens": ("Siemens Healthineers", "SOMATOM Force"),
    "philips": ("Philips", "iCT 256"),
    "ge": ("GE MEDICAL SYSTEMS", "Revolution CT"),
}
AGENTS = {"arterial": "IOHEXOL 300", "portal": "IOHEXOL 300"}


@dataclass(frozen=True)
class Identity:
    """UIDs and dates of one study; equal seeds and settings give equal ones."""

    study_uid: str
    series_uid: str
    frame_uid: str
    date: datetime.date
    birth: datetime.date
    time: str

    def instance_uid(self, number: int) -> str:
        """The UID of one slice, by its place in the whole volume."""
        return uid(self.series_uid, str(number))


def uid(*parts: str) -> str:
    """A UUID-derived UID (PS3.5 B.2) that is a function of its parts."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()[:16]
    return f"{UID_ROOT}.{int.from_bytes(digest, 'big')}"


def identity(patient: Patient) -> Identity:
    """Who and when, from the seed and everything that was set."""
    key = repr(patient)
    rng = np.random.default_rng([patient.seed, 4])
    date = datetime.date(2026, 1, 5) + datetime.timedelta(days=int(rng.integers(0, 300)))
    birth = datetime.date(date.year - patient.age - 1, 12, 31)
    birth += datetime.timedelta(days=int(rng.integers(1, (date - datetime.date(date.year, 1, 1)).days + 2)))
    time = f"{int(rng.integers(8, 18)):02d}{int(rng.integers(0, 60)):02d}{int(rng.integers(0, 60)):02d}"
    return Identity(uid("study", key), uid("series", key), uid("frame", key), date, birth, time)


def write_series(patient: Patient, directory: Path, hu: NDArray[np.int16], grid: Grid) -> list[Path]:
    """Write one file per slice, `0001.dcm` lowest; the slice that `drop_slice` names is left out."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, dataset in _slices(patient, hu, grid):
        path = directory / f"{number:04d}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def dropped_slice(patient: Patient, count: int) -> int | None:
    """The index that is left out, or None; ValueError where it is not a slice between two others."""
    wanted = patient.acquisition.drop_slice
    if wanted is None:
        return None
    index = count // 2 if wanted < 0 else wanted
    if not 0 < index < count - 1:
        raise ValueError(f"drop_slice must be 1 to {count - 2}, between two other slices, not {wanted}")
    return index


def _slices(patient: Patient, hu: NDArray[np.int16], grid: Grid) -> Iterator[tuple[int, Dataset]]:
    who = identity(patient)
    dropped = dropped_slice(patient, hu.shape[0])
    for k in range(hu.shape[0]):
        if k == dropped:
            continue
        ds = Dataset()
        _patient_and_study(ds, patient, who)
        _series_and_equipment(ds, patient, who)
        _image(ds, patient, who, hu[k], grid, k)
        yield k + 1, ds


def _patient_and_study(ds: Dataset, patient: Patient, who: Identity) -> None:
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientName = f"Digital^Patient{patient.seed:06d}"
    ds.PatientID = patient.patient_id
    ds.PatientBirthDate = who.birth.strftime("%Y%m%d")
    ds.PatientSex = patient.sex
    ds.PatientAge = f"{patient.age:03d}Y"
    ds.PatientSize = f"{patient.height_m:.2f}"
    ds.PatientWeight = f"{patient.bmi * patient.height_m**2:.1f}"
    ds.PatientComments = "Digital patient: simulated, no person"
    ds.StudyInstanceUID = who.study_uid
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = who.date.strftime("%Y%m%d")
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = who.time
    ds.StudyID = "1"
    ds.AccessionNumber = f"OSG{patient.seed:08d}"
    ds.ReferringPhysicianName = ""
    ds.StudyDescription = "CT abdomen and lumbar spine"


def _series_and_equipment(ds: Dataset, patient: Patient, who: Identity) -> None:
    a = patient.acquisition
    ds.Modality = "CT"
    ds.SeriesInstanceUID = who.series_uid
    ds.SeriesNumber = 2
    ds.SeriesDescription = f"Abdomen {a.slice_mm:.1f} {a.kernel}"
    ds.BodyPartExamined = "ABDOMEN"
    ds.PatientPosition = "HFS"
    ds.ProtocolName = "Abdomen"
    ds.FrameOfReferenceUID = who.frame_uid
    ds.PositionReferenceIndicator = ""
    ds.Manufacturer, ds.ManufacturerModelName = VENDOR_TAGS[a.vendor]
    ds.InstitutionName = "Osteogate digital patients"
    ds.StationName = "PHANTOM"
    ds.DeviceSerialNumber = "0"
    ds.SoftwareVersions = "osteogate models.phantom"


def _image(ds: Dataset, patient: Patient, who: Identity, hu: NDArray[np.int16], grid: Grid, k: int) -> None:
    a = patient.acquisition
    x, y, z = grid.origin_lps
    sk, sj, si = grid.spacing_kji_mm
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = who.instance_uid(k)
    ds.SyntheticData = "YES"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.InstanceNumber, ds.AcquisitionNumber = k + 1, 1
    ds.ImagePositionPatient = [f"{x:.4f}", f"{y:.4f}", f"{z + k * sk:.4f}"]
    # a tilted gantry: the planes lean, the table (and with it ImagePositionPatient) still moves along z
    ds.ImageOrientationPatient = [1, 0, 0, *(f"{c:.8f}" if c % 1 else int(c) for c in grid.row_direction)]
    ds.SliceLocation = f"{z + k * sk:.4f}"
    ds.SliceThickness, ds.PixelSpacing = f"{a.slice_mm:g}", [f"{sj:.6f}", f"{si:.6f}"]
    if a.vendor != "canon":
        ds.SpacingBetweenSlices = f"{sk:g}"
    ds.KVP, ds.ConvolutionKernel = str(a.kvp), a.kernel
    ds.GantryDetectorTilt, ds.TableHeight = f"{grid.tilt_deg:g}", "150"
    ds.ReconstructionDiameter = ds.DataCollectionDiameter = f"{a.fov_mm:g}"
    ds.ScanOptions, ds.RotationDirection = "HELICAL", "CW"
    ds.ExposureTime, ds.XRayTubeCurrent, ds.Exposure = 500, 240, 120
    _contrast(ds, a.contrast_phase)
    _pixels(ds, hu)
    _file_meta(ds)


def _contrast(ds: Dataset, phase: str) -> None:
    if phase not in AGENTS:
        return
    ds.ContrastBolusAgent = AGENTS[phase]
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "109219003", "SCT", "Iohexol"
    ds.ContrastBolusAgentSequence = Sequence([code])
    ds.ContrastBolusRoute, ds.ContrastBolusVolume = "IV", "95"


def _pixels(ds: Dataset, hu: NDArray[np.int16]) -> None:
    stored = np.clip(hu.astype(np.int32) - INTERCEPT, 0, 4095).astype("<u2")
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = str(INTERCEPT), "1", "HU"
    ds.WindowCenter, ds.WindowWidth = "50", "400"
    ds.PixelData = stored.tobytes()


def _file_meta(ds: Dataset) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.SOPClassUID
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta = meta
