"""One CT through the method: volume -> vertebrae -> anatomy -> crops -> prediction and attenuation -> pictures.

Composes the rooms of `worker` and `models`; knows no queue and no database. The referral decision is not made
here: `service.domain.referral.decide` reads what this measured.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from models.attenuation import INSIDE_LEAST, Attenuation, disc_attenuation
from models.crop import SLABS, SagittalSlabs, Vertebra, VertebraError, sagittal_slabs
from models.package import Scanner
from models.soft_tissue import fat_over_spine_cm
from service.dicom.reports.codes import LEVEL_NAMES
from service.domain.policy import FindingsPolicy
from service.domain.reasons import Code, Reason
from service.domain.result import (
    LEVELS,
    Anatomy,
    LevelAnatomy,
    LevelMeasurement,
    Measurements,
    Provenance,
    Renumbering,
    Shadowed,
)
from service.settings import Settings
from service.version import software_version
from service.workflow import artefacts
from service.workflow.rules import policy_in_force
from worker import anatomy as anatomy_room
from worker import pictures
from worker.located import Located
from worker.predict import Prediction, Predictor
from worker.segmentation import Segmentation, Segmenter, SuppliedError, SuppliedLabels, load_segmenter
from worker.segmentation.renamed import KeptLabels
from worker.segmentation.supplied import check_usable, unused
from worker.segmentation.weights import weights_in_force
from worker.volume import Volume, load_dicom

log = logging.getLogger(__name__)

LABEL_IDS: Mapping[str, int] = {"L1": 31, "L2": 30, "L3": 29, "L4": 28}


class ScreenInput(Protocol):
    """What the job hands over: the spool's files, a folder for pictures; outlines made by others, or kept, if any."""

    @property
    def paths(self) -> tuple[Path, ...]: ...
    @property
    def artefacts_dir(self) -> Path: ...
    @property
    def segmentation(self) -> Path | None: ...
    @property
    def kept(self) -> KeptLabels | None: ...


@dataclass
class Stopwatch:
    """Seconds per stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 4)


class Outlined(NamedTuple):
    """A segmented CT: its outlines, what was made of them, and its vertebrae as far as they were located."""

    segmentation: Segmentation
    anatomy: Anatomy
    located: Located


@dataclass(frozen=True)
class Found:
    """One level that was located and cut."""

    level: str
    vertebra: Vertebra
    slabs: SagittalSlabs
    attenuation: Attenuation
    fat_over_spine_cm: float = math.nan  # NaN: the CT does not show it


@dataclass(frozen=True)
class Pipeline:
    """The resident segmenter and predictor; `run` takes one CT through them."""

    segmenter: Segmenter
    predictor: Predictor
    device: str
    limits: FindingsPolicy = field(default_factory=FindingsPolicy)
    gate_passed: bool = False  # the model was promoted at this site after it passed the gate
    judged_on: tuple[str, ...] | None = None  # the scanners that the gate judged it on; None: told apart nowhere
    shadow: Predictor | None = None  # a candidate that sees the same vertebrae, and decides nothing

    @classmethod
    def load(cls, settings: Settings, package: Path, segmenter: Segmenter | None = None) -> Pipeline:
        """Load both networks once; weights are verified before anything runs.

        Raises:
            WeightsError, PackageError: a file is missing or altered; the message names it.
            PolicyError: the site's policy cannot be used.
        """
        segmenter = segmenter or load_segmenter(weights_in_force(settings), settings.device)
        predictor = Predictor(package, settings.device, settings.prediction_precision)
        return cls(segmenter, predictor, predictor.device, policy_in_force(settings).findings)

    def screen(self, request: ScreenInput) -> Measurements:
        """Measure the CT in the spool's files, the labels kept beside the pictures (the worker's screen function)."""
        watch = Stopwatch()
        with watch.stage("read"):
            volume = load_dicom(request.paths)
        measurements, segmentation = self.run(volume, request.artefacts_dir, watch, request.segmentation, request.kept)
        with watch.stage("keep"):
            kept = (segmentation.labels, LEVEL_NAMES.keys(), segmentation.overlaps)
            artefacts.keep_labels(request.artefacts_dir, *kept)
        return measurements

    def run(
        self,
        volume: Volume,
        artefacts_dir: Path,
        watch: Stopwatch | None = None,
        supplied: Path | None = None,
        kept: KeptLabels | None = None,
    ) -> tuple[Measurements, Segmentation]:
        """Measure one volume and write its pictures; every refusal is a value in the answer."""
        watch = watch or Stopwatch()
        if kept is not None:
            segmentation, anatomy, located = self._renamed(volume, kept, watch)
        else:
            segmentation, anatomy, located = self._outline(volume, supplied, watch)
        with watch.stage("crop"):
            found, lost = _cut(volume, located, anatomy)
        with watch.stage("predict"):
            predictions = self._predict(found, volume.scanner)
        with watch.stage("pictures"):
            pictures.write(artefacts_dir, volume, segmentation.labels, [(f.level, f.vertebra) for f in found])
        levels = _levels(anatomy, found, lost, predictions)
        patient = self._patient([predictions[name] for name, level in levels.items() if level.valid], volume.scanner)
        measurements = Measurements(
            levels=levels,
            anatomy=anatomy,
            provenance=self._provenance(segmentation),
            model_synthetic_only=self.predictor.synthetic_only,
            model_gate_passed=self.gate_passed and (self.judged_on is None or volume.scanner.name in self.judged_on),
            model_measures_tbs=self.predictor.measures_tbs,
            model_knows_scanner=self.predictor.knows(volume.scanner),
            model_densitometer=self.predictor.densitometer,
            patient_bmd_interval=_rounded_pair(patient.bmd_interval, 4) if patient else None,
            patient_tbs_interval=_rounded_pair(patient.tbs_interval, 4) if patient else None,
            refusals=anatomy.refusals,
            timings_s=watch.seconds,
            shadow=self._shadowed(found, volume.scanner, watch),
        )
        return measurements, segmentation

    def _outline(self, volume: Volume, supplied: Path | None, watch: Stopwatch) -> Outlined:
        """The supplied vertebrae where they pass the checks that ours do; else ours, with a note that says why."""
        if supplied is None:
            return self._segmented(self.segmenter, volume, watch)
        try:
            outlined = self._segmented(SuppliedLabels(supplied), volume, watch)
            check_usable(outlined.segmentation.labels, outlined.anatomy)
            return outlined
        except SuppliedError as error:
            own = self._segmented(self.segmenter, volume, watch)
            notes = (unused(supplied, error), *own.anatomy.notes)
            return own._replace(anatomy=replace(own.anatomy, notes=notes))

    def _renamed(self, volume: Volume, kept: KeptLabels, watch: Stopwatch) -> Outlined:
        """The outlines of an earlier result under the names that a person gave them."""
        with watch.stage("segment"):
            segmentation = kept.segment(volume)
        told = kept.told(set(np.unique(segmentation.labels).tolist()))
        return self._assessed(volume, segmentation, watch, told)

    def _segmented(self, segmenter: Segmenter, volume: Volume, watch: Stopwatch) -> Outlined:
        with watch.stage("segment"):
            segmentation = segmenter.segment(volume)
        watch.seconds.update({f"segment.{name}": value for name, value in segmentation.timings_s.items()})
        return self._assessed(volume, segmentation, watch, None)

    def _assessed(
        self, volume: Volume, segmentation: Segmentation, watch: Stopwatch, told: Renumbering | None
    ) -> Outlined:
        located = Located(segmentation.labels, volume.affine)
        with watch.stage("anatomy"):
            anatomy = anatomy_room.assess(volume, segmentation, self.limits, told, located)
        return Outlined(segmentation, anatomy, located)

    def _predict(self, found: list[Found], scanner: Scanner) -> dict[str, Prediction]:
        if not found:
            return {}
        predictions = self.predictor.predict(*_seen(found), scanner)
        return {one.level: prediction for one, prediction in zip(found, predictions, strict=True)}

    def _shadowed(self, found: list[Found], scanner: Scanner, watch: Stopwatch) -> Shadowed | None:
        """What the candidate in shadow says; whatever befalls it, the study goes on without."""
        if self.shadow is None or not found:
            return None
        try:
            with watch.stage("shadow"):
                said = self.shadow.predict(*_seen(found), scanner)
        except Exception:
            log.exception("the model in shadow (%s) failed; the study goes on without it", self.shadow.name)
            return None
        levels = {one.level: (two.bmd_g_cm2, two.tbs) for one, two in zip(found, said, strict=True)}
        finite = {name: pair for name, pair in levels.items() if all(one is None or np.isfinite(one) for one in pair)}
        return Shadowed(self.shadow.sha256, finite)

    def _patient(self, valid: list[Prediction], scanner: Scanner) -> Prediction | None:
        """The mean over the valid levels: its interval is narrower than a single vertebra's."""
        return self.predictor.patient(valid, scanner) if valid else None

    def _provenance(self, segmentation: Segmentation) -> Provenance:
        return Provenance(
            software=software_version(),
            model=self.predictor.name,
            model_sha256=self.predictor.sha256,
            segmenter=segmentation.segmenter,
            segmenter_sha256=segmentation.sha256,
            device=self.device,
            engine=self.predictor.engine,
        )


def _seen(found: list[Found]) -> tuple[list[SagittalSlabs], list[str], list[float]]:
    """What a predictor is shown: slabs, names, and the fat over the spine."""
    return [one.slabs for one in found], [one.level for one in found], [one.fat_over_spine_cm for one in found]


def _cut(volume: Volume, located: Located, anatomy: Anatomy) -> tuple[list[Found], dict[str, Reason]]:
    """Cut every level that is in view; one that cannot be cut is excluded with its cause."""
    found: list[Found] = []
    lost: dict[str, Reason] = {}
    for level, label_id in LABEL_IDS.items():
        if not anatomy.levels[level].in_view:
            continue
        try:
            found.append(cut_level(volume, located, level, label_id))
        except VertebraError as error:
            lost[level] = Reason(Code.LEVEL_NOT_MEASURABLE, f"{level} could not be measured: {error}.")
    return found, lost


def cut_level(volume: Volume, located: Located, level: str, label_id: int) -> Found:
    """One vertebra located, cut into its slabs and measured in HU: for prediction and for training alike.

    Args:
        volume: the CT.
        located: the vertebrae of labels on the CT's grid.
        level: L1 to L4.
        label_id: its value in the labels.

    Raises:
        VertebraError: the vertebra cannot be located or cut.
    """
    vertebra = located.vertebra(label_id)
    grid = (volume.hu, volume.affine, located.labels, label_id)
    slabs = sagittal_slabs(*grid, n=SLABS, vertebra=vertebra)
    fat = fat_over_spine_cm(volume.hu, volume.affine, vertebra.body_centroid_lps)
    attenuation = disc_attenuation(*grid, vertebra=vertebra)
    if attenuation.inside < INSIDE_LEAST:
        raise VertebraError(f"{attenuation.inside:.0%} of the disc that measures attenuation lies in its outline")
    return Found(level, vertebra, slabs, attenuation, fat)


def _levels(
    anatomy: Anatomy,
    found: list[Found],
    lost: Mapping[str, Reason],
    predictions: Mapping[str, Prediction],
) -> dict[str, LevelMeasurement]:
    by_level = {one.level: one for one in found}
    return {
        level: _level(anatomy.levels[level], by_level.get(level), lost.get(level), predictions.get(level))
        for level in LEVELS
    }


def _level(
    seen: LevelAnatomy, found: Found | None, lost: Reason | None, prediction: Prediction | None
) -> LevelMeasurement:
    exclusions = seen.exclusions + ((lost,) if lost else ())
    if found is None or prediction is None:
        return LevelMeasurement(seen.level, seen.in_view, exclusions, heights=seen.heights, quality=seen.quality)
    low, high = found.attenuation.shift_range_hu
    return LevelMeasurement(
        level=seen.level,
        in_view=seen.in_view,
        exclusions=exclusions,
        bmd_g_cm2=_rounded(prediction.bmd_g_cm2, 4),
        bmd_interval=_rounded_pair(prediction.bmd_interval, 4),
        tbs=_rounded(prediction.tbs, 4),
        tbs_interval=_rounded_pair(prediction.tbs_interval, 4),
        hu_mean=_rounded(found.attenuation.hu_mean, 2),
        hu_roi_mm2=found.attenuation.roi_mm2,
        hu_shift_range=(round(low, 2), round(high, 2)),
        heights=seen.heights,
        quality=seen.quality,
    )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), digits)


def _rounded_pair(pair: tuple[float, float] | None, digits: int) -> tuple[float, float] | None:
    if pair is None or not np.isfinite(pair).all():
        return None
    return round(float(pair[0]), digits), round(float(pair[1]), digits)
