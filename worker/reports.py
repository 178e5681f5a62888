"""A result as DICOM objects beside `result.json`: `sr.dcm` and, where vertebrae were outlined, `seg.dcm`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from service.dicom.reports.codes import LEVEL_NAMES
from service.dicom.reports.seg import make_segmentation
from service.dicom.reports.source import ReportError, read_source
from service.dicom.reports.sr import make_structured_report
from service.domain.bone import reference_words
from worker.segmentation.base import LabelArray

LOGGER = logging.getLogger(__name__)


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
    source = read_source(files)
    try:
        segmentation = (
            None if labels is None else make_segmentation(source, labels, LEVEL_NAMES, result["provenance"], at=at)
        )
        report = make_structured_report(source, segmentation, result, at=at, reference=reference_words(result))
    except ReportError as error:
        LOGGER.warning("no DICOM objects are written: %s", error)
        return []
    made = {"sr.dcm": report} | ({} if segmentation is None else {"seg.dcm": segmentation})
    for name, dataset in made.items():
        dataset.save_as(out / name, enforce_file_format=True)
    return [out / name for name in made]
