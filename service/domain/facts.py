"""What one DICOM instance's header says, in plain Python values.

Read tolerantly by `service.dicom.headers`, kept as JSON beside each instance, and judged by
`service.domain.eligibility`. `None` means "absent or unreadable": nothing is ever imputed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

Vector = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class InstanceFacts:
    """Header facts of one instance; DICOM keywords keep their meaning, units are in the names."""

    study_uid: str
    series_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    modality: str | None = None
    # Patient and study
    patient_id: str | None = None
    issuer_of_patient_id: str | None = None
    patient_name: str | None = None
    patient_sex: str | None = None
    patient_birth_date: str | None = None  # DICOM DA, YYYYMMDD
    patient_age_years: float | None = None  # from PatientAge (AS), else birth date and study date
    study_date: str | None = None
    study_description: str | None = None
    accession_number: str | None = None
    series_description: str | None = None
    series_number: int | None = None
    instance_number: int | None = None
    acquisition_number: int | None = None
    # Scanner
    manufacturer: str | None = None
    model_name: str | None = None
    device_serial_number: str | None = None
    software_versions: str | None = None
    kvp: float | None = None
    convolution_kernel: tuple[str, ...] = ()
    image_type: tuple[str, ...] = ()
    contrast_bolus: tuple[str, ...] = ()  # every tag that speaks of contrast, as "Keyword=value"
    multienergy: bool = False
    gantry_tilt_deg: float | None = None
    slice_thickness_mm: float | None = None
    reconstruction_diameter_mm: float | None = None
    # Geometry (LPS, mm)
    position_lps_mm: Vector | None = None
    row_cosine: Vector | None = None
    column_cosine: Vector | None = None
    pixel_spacing_mm: tuple[float, float] | None = None  # (row spacing, column spacing)
    frame_of_reference_uid: str | None = None
    rows: int | None = None
    columns: int | None = None
    frames: int = 1
    # Pixels
    has_pixels: bool = False
    bits_allocated: int | None = None
    samples_per_pixel: int | None = None
    photometric: str | None = None
    rescale_slope: float | None = None
    rescale_intercept: float | None = None
    rescale_type: str | None = None
    lossy: bool = False  # LossyImageCompression 01 or a lossy transfer syntax
    synthetic: bool = False  # SyntheticData (0008,001C) YES
    # Objects other than plain slices
    frame_positions_lps_mm: tuple[Vector, ...] = ()  # enhanced CT: where each frame lies, in frame order
    frame_values: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # facts that differ between frames, each in frame order
    concatenation_uid: str | None = None  # a part of a larger multi-frame object (PS3.3 C.7.6.16.2.2.4)
    segments: tuple[str, ...] = ()  # SEG: each segment's property type as "SCT:14293000"
    referenced_series_uids: tuple[str, ...] = ()  # SEG: the series it was drawn on
    own_output: bool = False  # a report or segmentation that Osteogate made

    def per_frame(self) -> tuple[InstanceFacts, ...]:
        """The frames as if each were an object of its own; the object itself where they are not known."""
        count = len(self.frame_positions_lps_mm)
        if not count or any(len(values) != count for _, values in self.frame_values):
            return (self,)
        one = replace(self, frames=1, frame_positions_lps_mm=(), frame_values=())
        return tuple(
            replace(one, position_lps_mm=position, **{name: values[k] for name, values in self.frame_values})
            for k, position in enumerate(self.frame_positions_lps_mm)
        )

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_json` reads it back to an equal value."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> InstanceFacts:
        """Read `as_json` back; unknown keys (of a newer version) are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: _untuple(value) for key, value in stored.items() if key in known})


def _untuple(value: Any) -> Any:
    return tuple(_untuple(part) for part in value) if isinstance(value, list) else value
