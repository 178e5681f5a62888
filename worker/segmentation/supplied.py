"""Labels that someone else made, used instead of our own networks; the same level checks apply to them."""

from __future__ import annotations

import time
from pathlib import Path

from models.spine_unet import file_sha256
from worker.segmentation.base import Segmentation
from worker.segmentation.dicom_seg import is_dicom, read_header, read_labels
from worker.volume import Volume, load_label_map


class SuppliedLabels:
    """A NIfTI label map with TotalSegmentator's class ids, or a DICOM SEG with coded vertebrae, as a segmenter.

    The file's contents decide which it is, never its name.

    Raises:
        SuppliedError: a DICOM file that is no segmentation with vertebrae in it; told before any network is loaded.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._load = read_labels if is_dicom(path) else load_label_map
        self.name = read_header(path).name if is_dicom(path) else f"supplied label map {path.name}"
        self.sha256 = file_sha256(path)

    def segment(self, volume: Volume) -> Segmentation:
        """The supplied labels on the volume's grid; there is no second opinion."""
        started = time.perf_counter()
        labels = self._load(self._path, volume)
        return Segmentation(labels, self.name, self.sha256, {"segmentation": time.perf_counter() - started})
