"""Labels that someone else made, used instead of our own networks; the same level checks apply to them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scipy import ndimage

from models.weight_files import file_sha256
from service.dicom.headers import HeaderError, read_facts
from service.domain.reasons import Code
from service.domain.result import Anatomy
from service.domain.supplied import SUPPLIED
from worker.segmentation.base import L1, L2, L3, L4, L5, S1, SACRUM, T12, LabelArray, Segmentation
from worker.segmentation.dicom_seg import SuppliedError, is_dicom, read_header, read_labels
from worker.volume import Volume, load_label_map

OF_THE_OUTLINES = (Code.NO_SPINE_FOUND, Code.LEVELS_UNCERTAIN, Code.LEVEL_OUT_OF_VIEW)
FEWEST_GOOD = 2  # a patient's value needs so many levels at least (ISCD 2023)
CHECKED = {"T12": T12, "L1": L1, "L2": L2, "L3": L3, "L4": L4, "L5": L5}


class SuppliedLabels:
    """A NIfTI label map with TotalSegmentator's class ids, or a DICOM SEG with coded vertebrae, as a segmenter.

    The file's contents decide which it is, never its name.

    Raises:
        SuppliedError: a DICOM file that is no segmentation with vertebrae in it; told before any network is loaded.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._dicom = is_dicom(path)
        with _refusals(path):
            self.name = read_header(path).name if self._dicom else f"{SUPPLIED} label map {path.name}"
        self.sha256 = file_sha256(path)

    def segment(self, volume: Volume) -> Segmentation:
        """The supplied labels on the volume's grid; there is no second opinion.

        Raises:
            SuppliedError: the DICOM SEG cannot be used on this volume; the text says why.
            VolumeError: the NIfTI label map cannot.
        """
        started = time.perf_counter()
        if self._dicom:
            with _refusals(self._path):
                labels = read_labels(self._path, volume)
        else:
            labels = load_label_map(self._path, volume)
        return Segmentation(labels, self.name, self.sha256, {"segmentation": time.perf_counter() - started})


def check_usable(labels: LabelArray, anatomy: Anatomy) -> None:
    """Whether supplied labels [k, j, i] pass the level checks and the checks of their outlines.

    What is found of the patient (contrast medium, a curve, a broken vertebra) speaks against the CT, not against
    whoever outlined it. A single bad outline costs its level, as with our own; fewer than two good ones leave no value.

    Raises:
        SuppliedError: they do not; the text says why.
    """
    failed = [reason for reason in anatomy.refusals if reason.code in OF_THE_OUTLINES]
    if failed:
        check_complete(labels)
        raise SuppliedError(f"its levels do not pass the checks: {' '.join(reason.text for reason in failed)}")
    bad = {
        name: reason.text
        for name, level in anatomy.levels.items()
        for reason in level.exclusions
        if reason.code in (Code.IMPLAUSIBLE_SHAPE, Code.LOW_QUALITY)
    }
    if len(anatomy.levels) - len(bad) < FEWEST_GOOD:
        raise SuppliedError(f"too few of its outlines pass the checks: {' '.join(bad.values())}")


def check_complete(labels: LabelArray) -> None:
    """Whether labels [k, j, i] hold what the numbering is checked by: T12 to L5 and the sacrum.

    Raises:
        SuppliedError: something of that is not outlined; the text says what.
    """
    outlined = {number for number, box in enumerate(ndimage.find_objects(labels), start=1) if box is not None}
    lacking = [name for name, label in CHECKED.items() if label not in outlined]
    if not outlined.intersection((SACRUM, S1)):
        lacking.append("the sacrum")
    if lacking:
        raise SuppliedError(f"it does not outline {', '.join(lacking)}, without which its levels cannot be checked.")


def unused(path: Path, error: SuppliedError) -> str:
    """What a result says of a supplied segmentation that could not be used: which one, whose, and why."""
    try:
        facts = read_facts(path)
        name = f"{facts.sop_instance_uid} by {facts.manufacturer or 'an unnamed maker'}"
    except HeaderError:
        name = path.name
    why = str(error).removeprefix(f"{path.name}: ").rstrip(".")
    return f"The supplied segmentation {name} was not used: {why}. Osteogate's own networks segmented instead."


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """A broken segmentation is refused, however it breaks its reader; an unreadable disk is no refusal."""
    try:
        yield
    except (SuppliedError, OSError, MemoryError):
        raise
    except Exception as error:  # pydicom converts lazily: any element may raise nearly anything when it is looked at
        raise SuppliedError(f"{path.name}: it is not readable ({type(error).__name__}).") from error
