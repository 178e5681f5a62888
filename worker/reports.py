"""A result as DICOM objects beside `result.json`: `sr.dcm` and, where vertebrae were outlined, `seg.dcm`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset

from service.dicom.reports.seg import make_segmentation
from service.dicom.reports.source import ReportError
from service.dicom.reports.sr import make_structured_report
from service.domain.bone import Reference, load_references
from worker.segmentation.base import LabelArray

LOGGER = logging.getLogger(__name__)
LEVEL_NAMES = {  # TotalSegmentator's ids -> the names that are coded in the SEG
    **{33: "T11", 32: "T12", 31: "L1", 30: "L2", 29: "L3", 28: "L4", 27: "L5", 126: "L6"},
    **{26: "S1", 25: "sacrum"},
}


def write_reports(
    files: Sequence[Path], labels: LabelArray | None, result: Mapping[str, Any], out: Path, *, at: datetime
) -> list[Path]:
    """Write the DICOM objects of one result; a source that cannot carry any (blank UIDs) is told in the log.

    Args:
        files: the slices of the judged series.
        labels: uint8 [k, j, i] on the sorted slices; None where nothing was segmented.
        result: result.json.
        out: where `sr.dcm` and `seg.dcm` are written.
        at: when the result was made, in the site's local time.
    """
    source = [dcmread(file, stop_before_pixels=True, force=True) for file in files]
    try:
        segmentation = (
            None if labels is None else make_segmentation(source, labels, LEVEL_NAMES, result["provenance"], at=at)
        )
        report = make_structured_report(source, segmentation, result, at=at, reference=_reference(source[0], result))
    except ReportError as error:
        LOGGER.warning("no DICOM objects are written: %s", error)
        return []
    made = {"sr.dcm": report} | ({} if segmentation is None else {"seg.dcm": segmentation})
    for name, dataset in made.items():
        dataset.save_as(out / name, enforce_file_format=True)
    return [out / name for name in made]


def _reference(source: Dataset, result: Mapping[str, Any]) -> str | None:
    """The young-adult reference behind %YAM and T, in words; None where they are withheld."""
    if result["patient"]["percent_yam"] is None:
        return None
    sex = str(source.get("PatientSex", "")) or None
    found = load_references().reference_for(sex, synthetic=bool(result["patient"]["synthetic"]))
    return f"{found.population}: {found.source}" if isinstance(found, Reference) else None
