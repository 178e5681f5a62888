"""Outlines that an earlier measurement kept, under the names that a person gave them; nothing is segmented."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from service.domain.result import Renumbering
from service.domain.vertebrae import VERTEBRAE
from service.workflow import artefacts
from worker.segmentation.base import LabelArray, Segmentation, SegmentationError
from worker.volume import Volume

CLASS_IDS: Mapping[str, int] = {one.name: one.class_id for one in VERTEBRAE}
FIXED = (CLASS_IDS["sacrum"], CLASS_IDS["S1"])


@dataclass(frozen=True)
class KeptLabels:
    """The folder of an earlier result, who outlined its vertebrae, and what they are to be called: a segmenter."""

    folder: Path
    name: str
    sha256: str
    renumbering: Renumbering

    def segment(self, volume: Volume) -> Segmentation:
        """The kept outlines under their new names; there is no second opinion on what a person said.

        Raises:
            SegmentationError: the outlines lie on another grid than this CT's.
            OSError, ValueError, KeyError, zipfile.BadZipFile: they are absent or damaged.
        """
        started = time.perf_counter()
        labels = artefacts.labels(self.folder)
        if labels.shape != volume.hu.shape:
            raise SegmentationError(f"The kept outlines are on {labels.shape} voxels, the CT on {volume.hu.shape}.")
        names: LabelArray = np.zeros(256, dtype=np.uint8)
        for old, new in (*((one, one) for one in FIXED), *self._ids()):
            names[old] = new
        overlaps = {int(names[old]): one for old, one in artefacts.overlaps(self.folder).items() if names[old]}
        timings = {"kept": time.perf_counter() - started}
        return Segmentation(names[labels], self.name, self.sha256, timings, overlaps=overlaps or None)

    def told(self, volume_labels: set[int]) -> Renumbering:
        """The renumbering, of the levels that these outlines hold."""
        held = {name: new for name, new in self.renumbering.levels.items() if CLASS_IDS[new] in volume_labels}
        return replace(self.renumbering, levels=held)

    def _ids(self) -> list[tuple[int, int]]:
        return [(CLASS_IDS[old], CLASS_IDS[new]) for old, new in self.renumbering.levels.items()]
