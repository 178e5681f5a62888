"""Segmentation of the lumbar spine: what a segmenter is, and where one comes from.

    segmenter = load_segmenter(None, "cpu")        # the built-in weights
    segmentation = segmenter.segment(volume)       # labels on the volume's own grid

A result always says which segmenter and which weights made it.
"""

from __future__ import annotations

from pathlib import Path

from worker.segmentation.base import Segmentation, SegmentationError, Segmenter
from worker.segmentation.dicom_seg import SuppliedError
from worker.segmentation.supplied import SuppliedLabels
from worker.segmentation.weights import BUILT_IN, WeightsError, verify

__all__ = [
    "Segmentation",
    "SegmentationError",
    "Segmenter",
    "SuppliedError",
    "SuppliedLabels",
    "WeightsError",
    "load_segmenter",
    "verify",
]


def load_segmenter(weights_dir: Path | None, device: str) -> Segmenter:
    """The resident coarse-to-fine segmenter; None takes the built-in weights. `device`: auto, cpu or cuda.

    Every file is verified against the package's pinned sums first; WeightsError names the file that fails.
    """
    from worker.segmentation.cascade import Cascade  # torch: only a worker that segments pays for it

    root = BUILT_IN if weights_dir is None else weights_dir
    return Cascade.load(root, device)
