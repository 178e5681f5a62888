"""Stable reason codes: every refusal, caution and decision that Osteogate gives carries one.

Integrators filter on the codes, so a code is never renamed or reused; the text beside it is for people.
Wording follows the product's rule: never "normal", never a diagnosis.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Code(StrEnum):
    """Every reason that can stand beside a series, a study, a vertebra or a decision."""

    # Eligibility of a series, from its headers (service.domain.eligibility)
    NOT_CT = "NOT_CT"
    SOP_CLASS_UNSUPPORTED = "SOP_CLASS_UNSUPPORTED"
    NO_PIXELS = "NO_PIXELS"
    NO_GEOMETRY = "NO_GEOMETRY"
    NOT_AXIAL = "NOT_AXIAL"
    LOCALIZER = "LOCALIZER"
    DERIVED = "DERIVED"
    MONOENERGETIC = "MONOENERGETIC"
    KVP_MISSING = "KVP_MISSING"
    KVP_NOT_120 = "KVP_NOT_120"
    CONTRAST_TAGGED = "CONTRAST_TAGGED"
    AGE_UNKNOWN = "AGE_UNKNOWN"
    AGE_BELOW_MINIMUM = "AGE_BELOW_MINIMUM"
    SLICES_TOO_THICK = "SLICES_TOO_THICK"
    SLICES_THICK = "SLICES_THICK"
    THICKNESS_UNKNOWN = "THICKNESS_UNKNOWN"
    KERNEL_NOT_ALLOWED = "KERNEL_NOT_ALLOWED"
    KERNEL_UNKNOWN = "KERNEL_UNKNOWN"
    VENDOR_UNKNOWN = "VENDOR_UNKNOWN"
    LOSSY = "LOSSY"
    GANTRY_TILT = "GANTRY_TILT"
    SPACING_UNEVEN = "SPACING_UNEVEN"
    MISSING_SLICE = "MISSING_SLICE"
    DUPLICATE_POSITION = "DUPLICATE_POSITION"
    COVERAGE_TOO_SHORT = "COVERAGE_TOO_SHORT"
    MIXED_GEOMETRY = "MIXED_GEOMETRY"
    NO_RESCALE = "NO_RESCALE"
    MULTIFRAME_UNSUPPORTED = "MULTIFRAME_UNSUPPORTED"
    CONCATENATION = "CONCATENATION"
    TOO_MANY_SLICES = "TOO_MANY_SLICES"
    CONFLICTING_COPIES = "CONFLICTING_COPIES"
    UNREADABLE = "UNREADABLE"
    OWN_OUTPUT = "OWN_OUTPUT"
    SEGMENTATION_USED = "SEGMENTATION_USED"
    SEGMENTATION_NOT_USED = "SEGMENTATION_NOT_USED"

    # The study as a whole
    NO_ELIGIBLE_SERIES = "NO_ELIGIBLE_SERIES"
    CHOSEN = "CHOSEN"
    NOT_CHOSEN = "NOT_CHOSEN"

    # What the pixels and the segmentation showed (worker)
    LEVEL_OUT_OF_VIEW = "LEVEL_OUT_OF_VIEW"
    NO_SPINE_FOUND = "NO_SPINE_FOUND"
    LEVELS_UNCERTAIN = "LEVELS_UNCERTAIN"
    IMPLAUSIBLE_SHAPE = "IMPLAUSIBLE_SHAPE"
    FRACTURE = "FRACTURE"
    METAL = "METAL"
    CEMENT = "CEMENT"
    SCLEROSIS = "SCLEROSIS"
    SCOLIOSIS = "SCOLIOSIS"
    LEVEL_NOT_MEASURABLE = "LEVEL_NOT_MEASURABLE"
    TOO_FEW_LEVELS = "TOO_FEW_LEVELS"
    CONTRAST_IN_PIXELS = "CONTRAST_IN_PIXELS"
    PIXELS_UNREADABLE = "PIXELS_UNREADABLE"
    NOT_HU = "NOT_HU"
    TAGS_NOT_CHECKED = "TAGS_NOT_CHECKED"

    # Decisions (service.domain.referral)
    BMD_OSTEOPOROSIS_RANGE = "BMD_OSTEOPOROSIS_RANGE"
    BMD_OSTEOPENIA_RANGE = "BMD_OSTEOPENIA_RANGE"
    BMD_ABOVE_THRESHOLDS = "BMD_ABOVE_THRESHOLDS"
    BMD_NEAR_THRESHOLD = "BMD_NEAR_THRESHOLD"
    TBS_IMPAIRED_RANGE = "TBS_IMPAIRED_RANGE"
    HU_LOW = "HU_LOW"
    HU_BETWEEN = "HU_BETWEEN"
    HU_ABOVE = "HU_ABOVE"
    L1_NOT_MEASURED = "L1_NOT_MEASURED"
    REFERENCE_WITHHELD = "REFERENCE_WITHHELD"
    NETWORK_INVESTIGATIONAL = "NETWORK_INVESTIGATIONAL"
    DIGITAL_PATIENT = "DIGITAL_PATIENT"

    # DXA results that come in (service.domain.dxa, service.workflow.dxa)
    DXA_LAYOUT = "DXA_LAYOUT"
    DXA_ROW = "DXA_ROW"
    DXA_VALUE = "DXA_VALUE"
    DXA_PATIENT_MISSING = "DXA_PATIENT_MISSING"
    DXA_DATE = "DXA_DATE"
    DXA_DEVICE_MISSING = "DXA_DEVICE_MISSING"
    DXA_REGION = "DXA_REGION"
    DXA_NO_LEVEL = "DXA_NO_LEVEL"
    DXA_RANGE = "DXA_RANGE"
    DXA_UNIT = "DXA_UNIT"
    DXA_INCONSISTENT = "DXA_INCONSISTENT"
    DXA_TOTAL_MISMATCH = "DXA_TOTAL_MISMATCH"
    DXA_CONTRADICTS = "DXA_CONTRADICTS"

    # A CT without a DXA result (service.domain.pairing)
    PAIR_NO_DXA = "PAIR_NO_DXA"
    PAIR_NO_DATE = "PAIR_NO_DATE"
    PAIR_NOT_MEASURED = "PAIR_NOT_MEASURED"
    PAIR_SYNTHETIC_MIXED = "PAIR_SYNTHETIC_MIXED"
    PAIR_OUTSIDE_WINDOW = "PAIR_OUTSIDE_WINDOW"
    PAIR_NO_COMMON_LEVEL = "PAIR_NO_COMMON_LEVEL"
    PAIR_AMBIGUOUS = "PAIR_AMBIGUOUS"
    PAIR_NEARER_CT = "PAIR_NEARER_CT"

    # A training run (service.domain.training, service.workflow.training): why it is refused
    TRAINING_TARGETS = "TRAINING_TARGETS"
    TRAINING_CONFIGURATION = "TRAINING_CONFIGURATION"
    TRAINING_START = "TRAINING_START"
    TRAINING_TOO_FEW = "TRAINING_TOO_FEW"
    TRAINING_LOCKED_TOO_FEW = "TRAINING_LOCKED_TOO_FEW"
    TRAINING_GOING = "TRAINING_GOING"
    TRAINING_DISK = "TRAINING_DISK"
    # and why a pair, a study or a level is not in it
    TRAINING_NO_TARGET = "TRAINING_NO_TARGET"
    TRAINING_CT_GONE = "TRAINING_CT_GONE"
    TRAINING_LABELS_GONE = "TRAINING_LABELS_GONE"
    TRAINING_CT_UNUSABLE = "TRAINING_CT_UNUSABLE"
    TRAINING_LEVEL_LOST = "TRAINING_LEVEL_LOST"

    # Work
    QUARANTINED = "QUARANTINED"


@dataclass(frozen=True, slots=True)
class Reason:
    """One code and the sentence that a person reads."""

    code: Code
    text: str

    def as_dict(self) -> dict[str, str]:
        """The form used in result.json, in the API and in the database."""
        return {"code": self.code.value, "text": self.text}

    @classmethod
    def from_dict(cls, stored: dict[str, str]) -> Reason:
        """Read back what `as_dict` wrote."""
        return cls(Code(stored["code"]), stored["text"])
