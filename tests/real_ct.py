"""The one real spine, written as a DICOM series so that it can travel like any CT."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_dicom_series(nifti: Path, folder: Path, *, kvp: str = "120") -> list[Path]:
    """A NIfTI CT in HU as axial CT Image Storage, feet first in file order, head-first supine in its geometry."""
    image = nibabel.as_closest_canonical(nibabel.load(nifti))  # RAS: i right, j anterior, k superior
    hu = np.asarray(image.dataobj)[::-1, ::-1].astype(np.int16)  # now i left, j posterior
    affine = RAS_TO_LPS @ image.affine
    origin = (affine @ [hu.shape[0] - 1, hu.shape[1] - 1, 0, 1])[:3]
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = (generate_uid(entropy_srcs=[nifti.name, kind]) for kind in ("study", "series", "frame"))
    return [
        _write_slice(
            hu[:, :, k].T, origin + np.array([0, 0, k * spacing[2]]), spacing, k, (study, series, frame), kvp, folder
        )
        for k in range(hu.shape[2])
    ]


def independent_hu(case: Path, label: int) -> float:
    """Mean HU by TRAPS.md's definition, in voxel space: a 125 mm2 disc, 5 mm thick, at the body's centroid.

    The body is the reference's own vertebral-body map, split by level; nothing of ours is used.
    """
    report = case / "spine_report" / "example_ct_report"
    image = nibabel.load(case / "example_ct.nii.gz")
    levels = np.asarray(nibabel.load(report / "totalseg.nii.gz").dataobj)
    body = np.asarray(nibabel.load(report / "totalseg_vertebrae_body.nii.gz").dataobj) == 1
    spacing = np.array(image.header.get_zooms()[:3], dtype=float)
    inside = np.argwhere((levels == label) & body) * spacing
    centre = inside.mean(axis=0)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in image.shape], indexing="ij"), axis=-1) * spacing
    # Sub-voxel: every 3 mm voxel is cut into 6 x 6 x 6 parts, each counted by its own centre.
    radius = np.sqrt(125.0 / np.pi)
    near = np.all(np.abs(grid - centre) <= [radius + 3, radius + 3, 2.5 + 3], axis=-1)
    parts = (np.arange(6) - 2.5) / 6
    offsets = np.stack(np.meshgrid(parts, parts, parts, indexing="ij"), axis=-1).reshape(-1, 3) * spacing
    away = grid[near][:, None, :] + offsets[None] - centre
    weight = ((away[..., 0] ** 2 + away[..., 1] ** 2 <= radius**2) & (np.abs(away[..., 2]) <= 2.5)).sum(axis=1)
    return float(np.average(np.asarray(image.dataobj)[near], weights=weight))


def _write_slice(
    hu: np.ndarray,
    position: np.ndarray,
    spacing: np.ndarray,
    k: int,
    uids: tuple[str, str, str],
    kvp: str,
    folder: Path,
) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[uids[1], str(k)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path = folder / f"{k + 1:04d}.dcm"
    ct = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ct.SOPClassUID, ct.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    ct.StudyInstanceUID, ct.SeriesInstanceUID, ct.FrameOfReferenceUID = uids
    ct.Modality, ct.Manufacturer, ct.ConvolutionKernel = "CT", "SIEMENS", "Br40"
    ct.PatientName, ct.PatientID, ct.PatientSex, ct.PatientAge = "Real^Spine", "REAL-1", "M", "060Y"
    ct.StudyDate, ct.StudyTime, ct.StudyID, ct.AccessionNumber = "20260101", "120000", "1", ""
    ct.SeriesNumber, ct.InstanceNumber, ct.ImageType = 1, k + 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
    ct.KVP, ct.SliceThickness = kvp, float(spacing[2])
    ct.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ct.ImagePositionPatient = [round(float(value), 4) for value in position]
    ct.PixelSpacing = [float(spacing[1]), float(spacing[0])]
    ct.Rows, ct.Columns = hu.shape
    ct.SamplesPerPixel, ct.PhotometricInterpretation = 1, "MONOCHROME2"
    ct.BitsAllocated, ct.BitsStored, ct.HighBit, ct.PixelRepresentation = 16, 16, 15, 1
    ct.RescaleSlope, ct.RescaleIntercept, ct.RescaleType = 1, 0, "HU"
    ct.PixelData = np.ascontiguousarray(hu).astype("<i2").tobytes()
    ct.save_as(path, enforce_file_format=True)
    return path
