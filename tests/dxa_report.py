"""Structured reports as densitometers send them: built with pydicom alone, since a maker's report follows no template.

Two manners: `coded` gives public codes (LOINC, SNOMED CT) and TID 300's finding site, `worded` a private scheme whose
meanings alone say what is meant, each region a container, as in a print-out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

ENHANCED_SR, COMPREHENSIVE_SR = "1.2.840.10008.5.1.4.1.1.88.22", "1.2.840.10008.5.1.4.1.1.88.33"
CODED = {
    "bmd": ("24966-4", "LN", "DXA Lumbar spine [Mass/Area] Bone density"),
    "t": ("38267-1", "LN", "DXA Lumbar spine [T-score] Bone density"),
    "z": ("85394-5", "LN", "DXA Lumbar spine [Z-score] Bone density"),
    "area": ("42798000", "SCT", "Area"),
    "bmc": ("BMC", "99TEST", "Bone Mineral Content"),
    "tbs": ("TBS", "99TEST", "Trabecular Bone Score"),
}
WORDED = {
    "bmd": ("1", "99TEST", "BMD"),
    "t": ("2", "99TEST", "Young Adult T-score"),
    "z": ("3", "99TEST", "Age Matched Z-score"),
    "area": ("4", "99TEST", "Area"),
    "bmc": ("5", "99TEST", "BMC"),
    "tbs": ("6", "99TEST", "TBS"),
}
UNITS = {"bmd": "g/cm2", "bmc": "g", "area": "cm2"}
VERTEBRAE = {"L1": "66794005", "L2": "14293000", "L3": "36470004", "L4": "11994002"}
SPINE = {
    "L1": {"bmd": 0.9, "bmc": 9.9, "area": 11.0, "t": -1.9, "z": -0.4},
    "L2": {"bmd": 0.95, "bmc": 11.4, "area": 12.0, "t": -1.6, "z": -0.2},
    "L3": {"bmd": 1.0, "bmc": 14.0, "area": 14.0, "t": -1.2, "z": 0.1},
    "L4": {"bmd": 1.05, "bmc": 16.8, "area": 16.0, "t": -1.0, "z": 0.3},
    "L1-L4": {"bmd": 0.983, "bmc": 52.1, "area": 53.0, "t": -1.4, "z": 0.0, "tbs": 1.31},
}
Figures = Mapping[str, Mapping[str, float]]


def code(value: str, scheme: str, meaning: str) -> Dataset:
    entry = Dataset()
    entry.CodeValue, entry.CodingSchemeDesignator, entry.CodeMeaning = value, scheme, meaning
    return entry


def item(kind: str, name: tuple[str, str, str] | None = None, *below: Dataset, by: str = "CONTAINS") -> Dataset:
    one = Dataset()
    one.RelationshipType, one.ValueType = by, kind
    if name is not None:
        one.ConceptNameCodeSequence = Sequence([code(*name)])
    if kind == "CONTAINER":
        one.ContinuityOfContent = "SEPARATE"
    if below:
        one.ContentSequence = Sequence(below)
    return one


def number(quantity: str, value: float, names: Mapping[str, tuple[str, str, str]], *below: Dataset) -> Dataset:
    one = item("NUM", names[quantity], *below)
    measured = Dataset()
    measured.NumericValue = f"{value:g}"
    unit = UNITS.get(quantity, "1")
    measured.MeasurementUnitsCodeSequence = Sequence([code(unit, "UCUM", "no units" if unit == "1" else unit)])
    one.MeasuredValueSequence = Sequence([measured])
    return one


def text(name: tuple[str, str, str], value: str, by: str = "CONTAINS") -> Dataset:
    one = item("TEXT", name, by=by)
    one.TextValue = value
    return one


def coded(figures: Figures = SPINE) -> list[Dataset]:
    """One group a vertebra with its finding site; the total without one."""
    groups = []
    for region, values in figures.items():
        site = item("CODE", ("363698007", "SCT", "Finding Site"), by="HAS CONCEPT MOD")
        vertebra = (VERTEBRAE[region], "SCT", region) if region in VERTEBRAE else ("122496007", "SCT", "Lumbar spine")
        site.ConceptCodeSequence = Sequence([code(*vertebra)])
        numbers = [number(quantity, value, CODED) for quantity, value in values.items()]
        groups.append(item("CONTAINER", ("125007", "DCM", "Measurement Group"), site, *numbers))
    return groups


def worded(figures: Figures = SPINE) -> list[Dataset]:
    """The spine as a container, each region one below it; a hip beside it."""

    def region(name: str, values: Mapping[str, float]) -> Dataset:
        numbers = [number(quantity, value, WORDED) for quantity, value in values.items()]
        return item("CONTAINER", ("R", "99TEST", "Measurements"), text(("N", "99TEST", "Region"), name), *numbers)

    regions = [region(name, values) for name, values in figures.items()]
    hip = region("Neck", {"bmd": 0.8, "bmc": 4.0, "area": 5.0})
    return [
        item("CONTAINER", ("S", "99TEST", "AP Spine"), *regions),
        item("CONTAINER", ("H", "99TEST", "Left Femur"), hip),
    ]


def report(
    content: list[Dataset], *, sop_class: str = ENHANCED_SR, title: str = "DXA report", **header: Any
) -> Dataset:
    """A whole report; `header` are keywords, None removes one."""
    root = item("CONTAINER", ("DXA", "99TEST", title), *content)
    del root.RelationshipType
    values: dict[str, Any] = {
        "SOPClassUID": sop_class,
        "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "StudyDate": "20260304",
        "StudyTime": "101500",
        "ContentDate": "20260305",
        "ContentTime": "080000",
        "AccessionNumber": "A1",
        "ReferringPhysicianName": "",
        "Modality": "SR",
        "Manufacturer": "GE Healthcare",
        "ManufacturerModelName": "Lunar iDXA",
        "DeviceSerialNumber": "1",
        "SoftwareVersions": "1",
        "PatientName": "Phantom^Dora",
        "PatientID": "P1",
        "PatientBirthDate": "19550101",
        "PatientSex": "F",
        "StudyID": "1",
        "SeriesNumber": 1,
        "InstanceNumber": 1,
        "CompletionFlag": "COMPLETE",
        "VerificationFlag": "UNVERIFIED",
        "ReferencedPerformedProcedureStepSequence": Sequence(),
        "PerformedProcedureCodeSequence": Sequence(),
    }
    for keyword, value in (values | header).items():
        if value is not None:
            setattr(root, keyword, value)
    return root


def write(dataset: Dataset, path: Path) -> Path:
    """As a Part 10 file."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    dataset.file_meta = meta
    dataset.save_as(path, enforce_file_format=True)
    return path
