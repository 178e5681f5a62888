"""Facts of a series that every rule accepts, to be spoilt one value at a time."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from service.domain.facts import InstanceFacts

CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
OWN_OF_AN_OBJECT = ("sop_instance_uid", "sop_class_uid", "instance_number", "series_number")

GOOD = InstanceFacts(
    study_uid="1.2.3",
    series_uid="1.2.3.4",
    sop_instance_uid="1.2.3.4.0",
    sop_class_uid=CT,
    transfer_syntax_uid="1.2.840.10008.1.2.1",
    modality="CT",
    patient_sex="F",
    patient_age_years=63.0,
    series_number=3,
    acquisition_number=1,
    manufacturer="SIEMENS",
    kvp=120.0,
    convolution_kernel=("Br40d", "3"),
    image_type=("ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"),
    gantry_tilt_deg=0.0,
    slice_thickness_mm=1.0,
    position_lps_mm=(-150.0, -150.0, 0.0),
    row_cosine=(1.0, 0.0, 0.0),
    column_cosine=(0.0, 1.0, 0.0),
    pixel_spacing_mm=(0.7, 0.7),
    frame_of_reference_uid="1.2.3.9",
    rows=512,
    columns=512,
    has_pixels=True,
    samples_per_pixel=1,
    rescale_slope=1.0,
    rescale_intercept=-1024.0,
    rescale_type="HU",
)


def series(n: int = 160, *, step_mm: float = 1.0, **changes: Any) -> list[InstanceFacts]:
    """`n` slices every `step_mm`, 1 mm thick by default, with the given facts changed in all of them."""
    return [
        replace(
            GOOD,
            sop_instance_uid=f"1.2.3.4.{k}",
            instance_number=k + 1,
            **{"position_lps_mm": (-150.0, -150.0, -200.0 + k * step_mm), **changes},
        )
        for k in range(n)
    ]


def enhanced(frames: list[InstanceFacts], **changes: Any) -> InstanceFacts:
    """One enhanced CT object that holds these slices as its frames, as `service.dicom.headers` would tell it."""
    names = [field.name for field in fields(InstanceFacts) if field.name not in (*OWN_OF_AN_OBJECT, "position_lps_mm")]
    columns = {name: tuple(getattr(one, name) for one in frames) for name in names}
    positions = [one.position_lps_mm for one in frames]
    return replace(
        frames[0],
        **{
            "sop_class_uid": ENHANCED_CT,
            "frames": len(frames),
            "position_lps_mm": None,
            "frame_positions_lps_mm": () if None in positions else tuple(positions),
            "frame_values": tuple((name, column) for name, column in columns.items() if len(set(column)) > 1),
            **changes,
        },
    )
