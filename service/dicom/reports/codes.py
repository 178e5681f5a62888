"""The codes in our objects: SNOMED CT, DICOM and UCUM where they fit, our own scheme where a public code would lie.

Predicted values take the private scheme: a LOINC or SNOMED code of a DXA measurement on a prediction from CT would
misstate the method.
"""

from __future__ import annotations

from pydicom.sr.coding import Code

from service.domain import vertebrae

SCHEME = "99OSTEOGATE"
SCHEME_UID = "2.25.195432702612446380216430857246934103181"  # fixed for ever: it names the scheme
SCHEME_NAME = "Osteogate private codes"

ANATOMICAL_STRUCTURE = Code("91723000", "SCT", "Anatomical Structure")
LUMBAR_SPINE = Code("122496007", "SCT", "Lumbar spine")
ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")

# PS3.16 CID 7603; from the head down, which is the order of the segments
VERTEBRAE: dict[str, Code] = {
    "T11": Code("12989004", "SCT", "T11 vertebra"),
    "T12": Code("23215003", "SCT", "T12 vertebra"),
    "L1": Code("66794005", "SCT", "L1 vertebra"),
    "L2": Code("14293000", "SCT", "L2 vertebra"),
    "L3": Code("36470004", "SCT", "L3 vertebra"),
    "L4": Code("11994002", "SCT", "L4 vertebra"),
    "L5": Code("49668003", "SCT", "L5 vertebra"),
    "L6": Code("L6", SCHEME, "Sixth lumbar vertebra"),
    "S1": Code("65985001", "SCT", "S1 vertebra"),
    "sacrum": Code("54735007", "SCT", "Sacrum"),
}
# Which label of a segmentation (TotalSegmentator's class ids) is which of them
LEVEL_NAMES: dict[int, str] = {
    vertebra.class_id: vertebra.name for vertebra in vertebrae.VERTEBRAE if vertebra.name in VERTEBRAE
}

# Concepts of TID 1500, TID 300 and TID 310
PROCEDURE = Code("77477000", "SCT", "Computerized tomography")
MEAN_ATTENUATION = Code("112181", "DCM", "Mean Attenuation Coefficient")
MEAN = Code("373098007", "SCT", "Mean")
RECOMMENDATION = Code("121075", "DCM", "Recommendation")
COMMENT = Code("121106", "DCM", "Comment")
REFERENCE_AUTHORITY = Code("121406", "DCM", "Reference Authority")
UPPER_UNCERTAINTY = Code("371886008", "SCT", "+, range of upper measurement uncertainty")
LOWER_UNCERTAINTY = Code("371885007", "SCT", "-, range of lower measurement uncertainty")

# Units
HOUNSFIELD = Code("[hnsf'U]", "UCUM", "Hounsfield unit")
G_CM2 = Code("g/cm2", "UCUM", "g/cm2")
PERCENT = Code("%", "UCUM", "percent")
ONE = Code("1", "UCUM", "no units")

# Our own concepts
BMD = Code("BMD-PRED", SCHEME, "Predicted areal bone mineral density")
TBS = Code("TBS-PRED", SCHEME, "Predicted trabecular bone score")
PERCENT_YAM = Code("YAM-PRED", SCHEME, "Predicted density, % of young adult mean")
T_SCORE = Code("T-PRED", SCHEME, "T-score of the predicted density")
VALIDITY = Code("VALIDITY", SCHEME, "Use of this vertebra")
EXCLUSION = Code("EXCLUSION", SCHEME, "Reason for exclusion")
DRIVER = Code("DRIVER", SCHEME, "Decided by")
POLICY = Code("POLICY", SCHEME, "Policy of the decision")
REASON = Code("REASON", SCHEME, "Reason")
LEVELS_USED = Code("LEVELS-USED", SCHEME, "Vertebrae used")
NUMBERING = Code("NUMBERING", SCHEME, "Numbering of the vertebrae")
NOTE = Code("NOTE", SCHEME, "Note on the anatomy")

VALID = Code("VALID", SCHEME, "Used")
EXCLUDED = Code("EXCLUDED", SCHEME, "Not used")

CATEGORIES: dict[str, Code] = {
    "refer": Code("REFER", SCHEME, "Consider DXA"),
    "no-flag": Code("NO-FLAG", SCHEME, "No flag"),
    "indeterminate": Code("INDETERMINATE", SCHEME, "Indeterminate"),
    "not-assessable": Code("NOT-ASSESSABLE", SCHEME, "Not assessable"),
}
DRIVERS: dict[str, Code] = {
    "network": Code("NETWORK", SCHEME, "The network's prediction"),
    "ct-attenuation": Code("CT-ATTENUATION", SCHEME, "The rule for CT attenuation"),
    "none": Code("NONE", SCHEME, "Nobody: nothing was decided"),
}


def reason_code(code: str) -> Code:
    """One of our stable reason codes (service.domain.reasons) as a code of our scheme."""
    return Code(code, SCHEME, code.replace("_", " ").capitalize())
