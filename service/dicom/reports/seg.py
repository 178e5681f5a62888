"""The labelled vertebrae as a DICOM Segmentation object (PS3.3 A.51), one segment per vertebra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import Segmentation, SegmentDescription
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from service.dicom.reports import codes
from service.dicom.reports.source import (
    Planes,
    ReportError,
    coding_scheme,
    finish,
    is_synthetic,
    plain,
    planes_of,
)
from service.dicom.reports.uids import MANUFACTURER, MODEL_NAME, Kind, ReportKey, series_uid
from service.domain.supplied import is_supplied

SERIES_NUMBER = 9901
SERIES_DESCRIPTION = "Osteogate vertebrae (investigational)"
SHORT = 12  # characters of a hash that a reader sees


def report_key(source: Sequence[Dataset], provenance: Mapping[str, Any], revision: int, run: int = 0) -> ReportKey:
    """The key of the result on these slices, from result.json's `provenance`."""
    hashes = (provenance.get("model_sha256"), provenance.get("segmenter_sha256"))
    model = "/".join(value or "" for value in hashes)
    series = "/".join(sorted({str(one.SeriesInstanceUID) for one in source}))  # more than one: none was eligible
    return ReportKey(str(source[0].StudyInstanceUID), series, revision, model, run)


def make_segmentation(
    source: Sequence[Dataset],
    labels: NDArray[np.uint8],
    ids: Mapping[int, str],
    provenance: Mapping[str, Any],
    *,
    at: datetime,
    revision: int = 1,
    run: int = 0,
) -> Dataset | None:
    """A BINARY segmentation of the vertebrae in `labels`, or None where none of them is there.

    Args:
        source: the headers of one series' slices, in any order, or of its one enhanced CT; pixels are not looked at.
        labels: uint8 [k, j, i], k along the sorted slices (`source.in_volume_order`), j and i row and column.
        ids: which vertebra each label is ("T12", "L1", ... of `codes.VERTEBRAE`); other labels are left out.
        provenance: result.json's `provenance`.
        at: when the result was made, in the site's local time.
    """
    planes = planes_of(source)
    headers = planes.headers
    _check(planes, labels, ids)
    levels = _present(labels, ids)
    if not levels:
        return None
    key = report_key(source, provenance, revision, run)
    frame = str(headers[0].FrameOfReferenceUID)
    made = Segmentation(
        source_images=headers,
        pixel_array=_renumbered(labels, ids, levels, planes.order),
        segmentation_type="BINARY",
        segment_descriptions=[_description(n, level, key, provenance) for n, level in enumerate(levels, start=1)],
        series_instance_uid=series_uid(Kind.SEGMENTATION, key.study_uid, frame),
        series_number=SERIES_NUMBER,
        series_description=SERIES_DESCRIPTION,
        sop_instance_uid=key.uid(Kind.SEGMENTATION),
        instance_number=max(revision, 1),
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL_NAME,
        software_versions=str(provenance["software"]),
        device_serial_number="1",
        content_label="VERTEBRAE",
        content_description="Vertebrae found by Osteogate. Investigational.",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=None,
        coding_schemes=[coding_scheme()] if "L6" in levels else None,
    )
    _name_dimensions(made, key)
    return finish(made, planes.first, synthetic=is_synthetic(source), at=at)


def segment_numbers(segmentation: Dataset) -> dict[str, int]:
    """Which segment each vertebra is in, by its type code (a label is only for people)."""
    by_code = {(code.value, code.scheme_designator): level for level, code in codes.VERTEBRAE.items()}
    found = {}
    for segment in segmentation.SegmentSequence:
        item = segment.SegmentedPropertyTypeCodeSequence[0]
        level = by_code.get((str(item.get("CodeValue", "")), str(item.CodingSchemeDesignator)))
        if level is not None:
            found[level] = int(segment.SegmentNumber)
    return found


def _name_dimensions(made: Dataset, key: ReportKey) -> None:
    """A dimension organisation's UID that follows from the result; highdicom draws a random one."""
    uid = key.uid(Kind.TRACKING, "dimensions")
    for item in (*made.DimensionOrganizationSequence, *made.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid


def _check(planes: Planes, labels: NDArray[np.uint8], ids: Mapping[int, str]) -> None:
    headers = planes.headers
    if len({str(one.SeriesInstanceUID) for one in headers}) != 1:
        raise ReportError("the source slices are not of one series")
    shape = (len(planes.order), int(headers[0].Rows), int(headers[0].Columns))
    if labels.shape != shape or labels.dtype != np.uint8:
        raise ReportError(f"the labels are {labels.dtype} {labels.shape}; the source slices need uint8 {shape}")
    if "FrameOfReferenceUID" not in headers[0]:
        raise ReportError("the source slices name no frame of reference")
    unknown = sorted(set(ids.values()) - set(codes.VERTEBRAE))
    if unknown:
        raise ReportError(f"no code is known for {', '.join(unknown)}")


def _present(labels: NDArray[np.uint8], ids: Mapping[int, str]) -> list[str]:
    values: set[int] = set()
    for plane in labels:  # by slice: a whole volume would be widened to 8 bytes a voxel
        values.update(np.flatnonzero(np.bincount(plane.ravel(), minlength=256)).tolist())
    present = {level for value, level in ids.items() if value in values}
    return [level for level in codes.VERTEBRAE if level in present]


def _renumbered(
    labels: NDArray[np.uint8], ids: Mapping[int, str], levels: Sequence[str], order: Sequence[int]
) -> NDArray[np.uint8]:
    """Label ids -> segment numbers 1, 2, ... in the order of the source's planes; everything else is background."""
    table = np.zeros(256, dtype=np.uint8)
    for value, level in ids.items():
        if level in levels:
            table[value] = levels.index(level) + 1
    renumbered = np.empty_like(labels)
    for k, plane in enumerate(labels):
        renumbered[order[k]] = table[plane]
    return renumbered


def _description(number: int, level: str, key: ReportKey, provenance: Mapping[str, Any]) -> SegmentDescription:
    name, sha256 = provenance.get("segmenter"), provenance.get("segmenter_sha256")
    return SegmentDescription(
        segment_number=number,
        segment_label=level,
        segmented_property_category=codes.ANATOMICAL_STRUCTURE,
        segmented_property_type=codes.VERTEBRAE[level],
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=plain(str(name or "unnamed segmenter"))[:64],
            family=codes.ARTIFICIAL_INTELLIGENCE,
            version=str(sha256)[:SHORT] if sha256 else str(provenance["software"])[:64],
            source=None if is_supplied(str(name)) else MANUFACTURER,
            parameters={"sha256": str(sha256)} if sha256 else None,
        ),
        tracking_uid=key.uid(Kind.TRACKING, level),
        tracking_id=level,
    )
