"""What the worker measured on one CT, and the result document that everyone reads.

`Measurements` is the worker's answer (numbers, exclusions, anatomy; no verdict, no decision).
`service.domain.referral.decide` turns it into a decision; `result_document` joins both into result.json
(the same shape that `GET /api/v1/studies/{study_uid}/result` gives). An absent value is null, never a missing key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from service.domain.reasons import Reason

LEVELS = ("L1", "L2", "L3", "L4")

Interval = tuple[float, float]


class Numbering(StrEnum):
    """Whether the vertebral levels were named with two independent anchors agreeing."""

    CERTAIN = "certain"
    UNCERTAIN = "uncertain"


NO_FLAG_RULES_NOTHING_OUT = "No flag does not rule out low bone density."  # stands beside every other category


class Category(StrEnum):
    """The four decisions; there is no "normal"."""

    REFER = "refer"
    NO_FLAG = "no-flag"
    INDETERMINATE = "indeterminate"
    NOT_ASSESSABLE = "not-assessable"


class Driver(StrEnum):
    """Who decided: the network, the published CT-attenuation rule, or nobody."""

    NETWORK = "network"
    CT_ATTENUATION = "ct-attenuation"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Heights:
    """Vertebral body heights in mm at the anterior, middle and posterior third (15/50/85 % of the AP line)."""

    anterior: float | None
    middle: float | None
    posterior: float | None


@dataclass(frozen=True, slots=True)
class LevelAnatomy:
    """What the segmentation shows of one level, before any density is measured."""

    level: str
    in_view: bool
    exclusions: tuple[Reason, ...] = ()
    heights: Heights | None = None
    quality: float | None = None  # of the outline, 0..1; None: not known


@dataclass(frozen=True, slots=True)
class Renumbering:
    """Whose word the names of the levels are, where a person corrected or confirmed them."""

    levels: Mapping[str, str]  # name before -> name now, of the result that was renumbered
    by: str
    at: str  # ISO 8601
    reason: str
    result_id: int | None = None  # the result that was renumbered

    def as_dict(self) -> dict[str, Any]:
        """The form used in result.json and in the database."""
        return {
            "levels": dict(self.levels),
            "by": self.by,
            "at": self.at,
            "reason": self.reason,
            "result_id": self.result_id,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Renumbering:
        """Read back what `as_dict` wrote."""
        return cls(**stored)


@dataclass(frozen=True, slots=True)
class ReferenceHu:
    """HU of tissues that hardly differ between people: nothing about the bone, much about the scanner."""

    vessel: float | None = None
    muscle: float | None = None
    fat: float | None = None


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The spine as found: which levels are there, and how surely they are named."""

    levels: Mapping[str, LevelAnatomy]
    numbering: Numbering
    lumbar_count: int | None
    cobb_deg: float | None = None
    contrast: str | None = None
    reference_hu: ReferenceHu = ReferenceHu()
    notes: tuple[str, ...] = ()
    refusals: tuple[Reason, ...] = ()  # any of these makes the CT not assessable
    alternative: Mapping[str, str] | None = None  # uncertain: each level's name when counted from the other anchor
    renumbered: Renumbering | None = None
    quality_basis: str | None = None  # what the levels' quality rests on: "network" or "outline"


@dataclass(frozen=True, slots=True)
class LevelMeasurement:
    """One vertebra: BMD in g/cm2, TBS without unit, attenuation in HU; None where it was not measured."""

    level: str
    in_view: bool
    exclusions: tuple[Reason, ...] = ()
    bmd_g_cm2: float | None = None
    bmd_interval: Interval | None = None
    tbs: float | None = None
    tbs_interval: Interval | None = None
    hu_mean: float | None = None
    hu_roi_mm2: float | None = None
    hu_shift_range: Interval | None = None  # lowest and highest mean when the disc moves by +-3 mm
    heights: Heights | None = None
    quality: float | None = None  # of the outline, 0..1; None: not known

    @property
    def valid(self) -> bool:
        """In view and not excluded."""
        return self.in_view and not self.exclusions


@dataclass(frozen=True, slots=True)
class Provenance:
    """What made this result: software, model and segmenter with the hashes of their weights."""

    software: str
    model: str | None
    model_sha256: str | None
    segmenter: str | None
    segmenter_sha256: str | None
    device: str | None
    engine: str | None = None  # what computed the predictions there


@dataclass(frozen=True, slots=True)
class Shadowed:
    """What a model that is not in force says of the same vertebrae: compared, never reported, and decides nothing."""

    model_sha256: str
    levels: Mapping[str, tuple[float, float | None]]  # BMD in g/cm2, TBS where the model measures it


@dataclass(frozen=True, slots=True)
class Measurements:
    """Everything that the worker measured on one CT."""

    levels: Mapping[str, LevelMeasurement]
    anatomy: Anatomy
    provenance: Provenance
    model_synthetic_only: bool = True  # the model was validated on digital patients only
    model_gate_passed: bool = False  # a person promoted it here after it passed this site's gate on people
    model_measures_tbs: bool = True  # False: it was trained on BMD alone
    model_knows_scanner: bool = True  # False: it was fitted to other scanners, or to digital patients alone
    model_densitometer: str = "GE Lunar"  # the maker whose BMD it predicts
    patient_bmd_interval: Interval | None = None
    patient_tbs_interval: Interval | None = None
    refusals: tuple[Reason, ...] = ()  # CT-wide reasons found in the pixels
    timings_s: Mapping[str, float] = field(default_factory=dict)
    shadow: Shadowed | None = None

    def valid_levels(self) -> list[LevelMeasurement]:
        """The levels that count, in order L1 to L4."""
        return [self.levels[name] for name in LEVELS if name in self.levels and self.levels[name].valid]


@dataclass(frozen=True, slots=True)
class ReferenceUsed:
    """What stands behind %YAM and T: the young adults, and the density that was compared with them."""

    key: str
    version: str
    region: str
    levels: tuple[str, ...]  # the valid levels of the reference's region: BMD is their mean
    bmd_g_cm2: float
    bmd_interval: Interval | None
    mean_g_cm2: float
    sd_g_cm2: float
    text: str  # the authority in words, verification included


@dataclass(frozen=True, slots=True)
class PatientValues:
    """The patient's values: means over the valid levels (the paper's definition)."""

    synthetic: bool
    bmd_g_cm2: float | None = None
    bmd_interval: Interval | None = None
    tbs: float | None = None
    tbs_interval: Interval | None = None
    hu_mean: float | None = None
    percent_yam: float | None = None
    t_score: float | None = None
    levels_used: tuple[str, ...] = ()
    reference: ReferenceUsed | None = None  # present exactly where %YAM and T are


@dataclass(frozen=True, slots=True)
class Decision:
    """The referral decision with every reason, who drove it, the policy's label and the criteria in force."""

    category: Category
    reasons: tuple[Reason, ...]
    driver: Driver
    policy: str
    criteria: str | None = None


def result_document(
    *,
    study_uid: str | None,
    series_uid: str | None,
    revision: int | None,
    eligible: bool,
    verdict_reasons: tuple[Reason, ...],
    measurements: Measurements,
    patient: PatientValues,
    decision: Decision,
) -> dict[str, Any]:
    """result.json as the contract names it (README, "result.json")."""
    anatomy = measurements.anatomy
    provenance = measurements.provenance
    return {
        "study_uid": study_uid,
        "series_uid": series_uid,
        "revision": revision,
        "verdict": {"eligible": eligible, "reasons": [reason.as_dict() for reason in verdict_reasons]},
        "levels": {name: _level_document(measurements.levels.get(name), name) for name in LEVELS},
        "patient": {
            "synthetic": patient.synthetic,
            "bmd_g_cm2": patient.bmd_g_cm2,
            "bmd_interval": _pair(patient.bmd_interval),
            "tbs": patient.tbs,
            "tbs_interval": _pair(patient.tbs_interval),
            "hu_mean": patient.hu_mean,
            "percent_yam": patient.percent_yam,
            "t_score": patient.t_score,
            "levels_used": list(patient.levels_used),
            "reference": _reference_document(patient.reference),
        },
        "anatomy": {
            "lumbar_count": anatomy.lumbar_count,
            "numbering": anatomy.numbering.value,
            "cobb_deg": anatomy.cobb_deg,
            "contrast": anatomy.contrast,
            "reference_hu": asdict(anatomy.reference_hu),
            "notes": list(anatomy.notes),
            "alternative": None if anatomy.alternative is None else dict(anatomy.alternative),
            "renumbered": None if anatomy.renumbered is None else anatomy.renumbered.as_dict(),
            "quality_basis": anatomy.quality_basis,
        },
        "decision": {
            "category": decision.category.value,
            "reasons": [reason.as_dict() for reason in decision.reasons],
            "driver": decision.driver.value,
            "policy": decision.policy,
            "criteria": decision.criteria,
        },
        "provenance": {
            "software": provenance.software,
            "model": provenance.model,
            "model_sha256": provenance.model_sha256,
            "model_synthetic_only": measurements.model_synthetic_only if provenance.model else None,
            "model_gate_passed": measurements.model_gate_passed if provenance.model else None,
            "segmenter": provenance.segmenter,
            "segmenter_sha256": provenance.segmenter_sha256,
            "device": provenance.device,
            "engine": provenance.engine,
        },
        "timings_s": dict(measurements.timings_s),
    }


def _level_document(level: LevelMeasurement | None, name: str) -> dict[str, Any]:
    level = level or LevelMeasurement(level=name, in_view=False)
    heights = level.heights
    return {
        "valid": level.valid,
        "exclusions": [reason.as_dict() for reason in level.exclusions],
        "bmd_g_cm2": level.bmd_g_cm2,
        "bmd_interval": _pair(level.bmd_interval),
        "tbs": level.tbs,
        "tbs_interval": _pair(level.tbs_interval),
        "hu_mean": level.hu_mean,
        "hu_roi_mm2": level.hu_roi_mm2,
        "hu_shift_range": _pair(level.hu_shift_range),
        "heights_mm": {
            "anterior": heights.anterior if heights else None,
            "middle": heights.middle if heights else None,
            "posterior": heights.posterior if heights else None,
        },
        "quality": level.quality,
    }


def _reference_document(used: ReferenceUsed | None) -> dict[str, Any] | None:
    if used is None:
        return None
    return {
        "key": used.key,
        "version": used.version,
        "region": used.region,
        "levels": list(used.levels),
        "bmd_g_cm2": used.bmd_g_cm2,
        "bmd_interval": _pair(used.bmd_interval),
        "mean_g_cm2": used.mean_g_cm2,
        "sd_g_cm2": used.sd_g_cm2,
        "text": used.text,
    }


def _pair(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval[0], interval[1]]


def unmeasured(software: str) -> Measurements:
    """The measurements of a CT that was refused before anything was measured: every value is absent."""
    levels = {name: LevelMeasurement(level=name, in_view=False) for name in LEVELS}
    anatomy = Anatomy(
        levels={name: LevelAnatomy(level=name, in_view=False) for name in LEVELS},
        numbering=Numbering.UNCERTAIN,
        lumbar_count=None,
    )
    return Measurements(levels, anatomy, Provenance(software, None, None, None, None, None))
