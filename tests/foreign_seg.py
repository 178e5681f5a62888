"""A label map as a DICOM SEG, made by highdicom in another maker's name, on the CT that it was drawn on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import Segmentation, SegmentDescription
from pydicom import dcmread
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from service.domain.vertebrae import VERTEBRAE

MAKER = "A foreign maker"
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_foreign_seg(
    files: Sequence[Path],
    label_map: Path,
    target: Path,
    *,
    leave_out: Sequence[str] = (),
    kind: str = "BINARY",
) -> Path:
    """Every vertebra of a NIfTI label map (TotalSegmentator's ids) that lies on this axial CT, as a SEG.

    Args:
        files: the CT's slices, in any order.
        label_map: on the same grid as the CT, its axes in any order.
        target: where the SEG is written.
        leave_out: vertebrae ("L5") that it shall not hold.
        kind: BINARY or LABELMAP, its SegmentationType.
    """
    source = sorted((dcmread(file) for file in files), key=lambda one: float(one.ImagePositionPatient[2]))
    for one, keyword in product(source, ("PatientBirthDate", "ReferringPhysicianName", "AccessionNumber", "StudyID")):
        one.setdefault(keyword, "")  # type 2 (PS3.5 7.4.3), which highdicom asks for
    image = nibabel.as_closest_canonical(nibabel.load(label_map))  # RAS: i right, j anterior, k superior
    labels = np.asarray(image.dataobj)[::-1, ::-1].astype(np.uint8).transpose(2, 1, 0)  # [k, j, i] in LPS
    _check_grid(labels, RAS_TO_LPS @ image.affine, source)
    wanted = [one for one in VERTEBRAE if one.name not in leave_out and (labels == one.class_id).any()]
    numbered = np.zeros_like(labels)
    for number, one in enumerate(wanted, start=1):
        numbered[labels == one.class_id] = number
    with warnings.catch_warnings():  # highdicom's, on the odd values of a real header
        warnings.simplefilter("ignore")
        made = Segmentation(
            source_images=source,
            pixel_array=numbered,
            segmentation_type=kind,
            segment_descriptions=[_description(n, one.name, one.code) for n, one in enumerate(wanted, start=1)],
            series_instance_uid=generate_uid(entropy_srcs=[target.name, "series"]),
            series_number=77,
            series_description="Spine by somebody else",
            sop_instance_uid=generate_uid(entropy_srcs=[target.name, "instance"]),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name="Spine model",
            software_versions="1.0",
            device_serial_number="1",
        )
    made.save_as(target, enforce_file_format=True)
    return target


def _check_grid(labels: np.ndarray, affine: np.ndarray, source: Sequence[object]) -> None:
    first = source[0]
    assert labels.shape == (len(source), first.Rows, first.Columns)  # type: ignore[attr-defined]
    corner = (affine @ [labels.shape[2] - 1, labels.shape[1] - 1, 0, 1])[:3]
    assert np.allclose(corner, [float(v) for v in first.ImagePositionPatient], atol=0.05)  # type: ignore[attr-defined]


def _description(number: int, name: str, code: str) -> SegmentDescription:
    scheme, value = code.split(":")
    return SegmentDescription(
        segment_number=number,
        segment_label=f"{name} outlined",
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=Code(value, scheme, f"{name} vertebra"),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name="Spine model", family=codes.DCM.ArtificialIntelligence, version="1.0"
        ),
    )
