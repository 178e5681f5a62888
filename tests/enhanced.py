"""A single-frame CT series as one Enhanced CT object, as a scanner would write it (PS3.3 A.38.1).

Values stand where the Standard puts them: in the shared functional groups what all frames have in common, in the
per-frame ones each frame's place, and nothing of it at the top level.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

CARRIED = (
    "SpecificCharacterSet", "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge",
    "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName",
    "StudyDescription", "SeriesDescription", "Modality", "SeriesNumber", "SeriesDate", "SeriesTime", "PatientPosition",
    "ProtocolName", "FrameOfReferenceUID", "PositionReferenceIndicator", "Manufacturer", "ManufacturerModelName",
    "DeviceSerialNumber", "SoftwareVersions", "SyntheticData", "AcquisitionNumber", "ContentDate", "ContentTime",
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelPaddingValue",
)  # fmt: skip
GROUPS = {  # functional group -> what it holds of a single-frame slice
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelValueTransformationSequence": ("RescaleIntercept", "RescaleSlope", "RescaleType"),
    "CTXRayDetailsSequence": ("KVP",),
    "CTReconstructionSequence": ("ConvolutionKernel", "ReconstructionDiameter"),
    "CTAcquisitionDetailsSequence": (
        "GantryDetectorTilt", "TableHeight", "RotationDirection", "DataCollectionDiameter",
    ),
}  # fmt: skip

Edit = Callable[[Dataset], None]


def enhanced(slices: Sequence[Dataset], edit: Edit | None = None) -> FileDataset:
    """One Enhanced CT object of these slices, frames in the order given; `edit` changes it before it is returned.

    What differs between the slices (a rescale intercept, a thickness) goes to the per-frame functional groups, what
    does not to the shared ones.
    """
    first = slices[0]
    made = _file(EnhancedCTImageStorage)
    for keyword in CARRIED:
        if keyword in first:
            made[keyword] = copy.deepcopy(first[keyword])
    made.SeriesInstanceUID = generate_uid()
    made.InstanceNumber = 1
    made.NumberOfFrames = len(slices)
    made.ImageType = [*first.ImageType[:2], "VOLUME", "NONE"]
    made.AcquisitionDateTime = f"{first.AcquisitionDate}{first.AcquisitionTime}"
    made.AcquisitionDuration = 4.0
    made.ContentQualification, made.BurnedInAnnotation, made.LossyImageCompression = "PRODUCT", "NO", "00"
    made.PixelPresentation, made.VolumetricProperties = "MONOCHROME", "VOLUME"
    made.VolumeBasedCalculationTechnique, made.PresentationLUTShape = "NONE", "IDENTITY"
    made.MultienergyCTAcquisition = "NO"
    made.AcquisitionContextSequence = Items([])
    _dimensions(made)
    shared, per_frame = _groups(slices)
    made.SharedFunctionalGroupsSequence = Items([shared])
    made.PerFrameFunctionalGroupsSequence = Items(per_frame)
    made.PixelData = b"".join(one.PixelData for one in slices)
    made["PixelData"].VR = "OW"
    if edit is not None:
        edit(made)
    return made


def enhanced_from(folder: Path, edit: Edit | None = None) -> FileDataset:
    """`enhanced` of every slice in a folder, in the order of their names."""
    return enhanced(slices_of(folder), edit)


def slices_of(folder: Path, first: int = 0, count: int | None = None, size: int | None = None) -> list[Dataset]:
    """Slices of a series in the order of their file names; `size`: only the square of so many pixels in the middle."""
    paths = sorted(folder.glob("*.dcm"))[first : None if count is None else first + count]
    slices: list[Dataset] = [dcmread(path) for path in paths]
    for one in slices if size is not None else []:
        _crop(one, size)
    return slices


def _crop(one: Dataset, size: int) -> None:
    row, column = (one.Rows - size) // 2, (one.Columns - size) // 2
    pixels = np.frombuffer(one.PixelData, dtype="<u2").reshape(one.Rows, one.Columns)
    x, y, z = (float(value) for value in one.ImagePositionPatient)
    down, across = (float(value) for value in one.PixelSpacing)
    one.ImagePositionPatient = [f"{x + column * across:.4f}", f"{y + row * down:.4f}", f"{z:.4f}"]
    one.PixelData = pixels[row : row + size, column : column + size].tobytes()
    one.Rows = one.Columns = size


def as_file(dataset: Dataset) -> bytes:
    """The object as a DICOM file's bytes."""
    stream = BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _file(sop_class: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    made.SOPClassUID, made.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    return made


def _dimensions(made: Dataset) -> None:
    organization = Dataset()
    organization.DimensionOrganizationUID = generate_uid()
    made.DimensionOrganizationSequence = Items([organization])
    made.DimensionOrganizationType = "3D"
    made.DimensionIndexSequence = Items(
        [
            _index(organization.DimensionOrganizationUID, 0x00209056, 0x00209111, "Stack ID"),
            _index(organization.DimensionOrganizationUID, 0x00209057, 0x00209111, "In-Stack Position"),
        ]
    )


def _index(organization: str, pointer: int, group: int, label: str) -> Dataset:
    made = Dataset()
    made.DimensionOrganizationUID = organization
    made.DimensionIndexPointer, made.FunctionalGroupPointer, made.DimensionDescriptionLabel = pointer, group, label
    return made


def _groups(slices: Sequence[Dataset]) -> tuple[Dataset, list[Dataset]]:
    shared, per_frame = Dataset(), [_placed(one, number) for number, one in enumerate(slices, start=1)]
    for group, keywords in GROUPS.items():
        made = [_item(one, keywords) for one in slices]
        if all(item == made[0] for item in made):
            setattr(shared, group, Items([_completed(group, made[0])]))
        else:
            for frame, item in zip(per_frame, made, strict=True):
                setattr(frame, group, Items([_completed(group, item)]))
    shared.CTImageFrameTypeSequence = Items([_frame_type(slices[0])])
    shared.CTAcquisitionTypeSequence = Items([_acquisition_type()])
    shared.FrameAnatomySequence = Items([_anatomy()])
    shared.CTTableDynamicsSequence = Items([_table_dynamics()])
    shared.CTGeometrySequence = Items([_geometry()])
    shared.IrradiationEventIdentificationSequence = Items([_irradiation()])
    return shared, per_frame


def _placed(one: Dataset, number: int) -> Dataset:
    content, position, frame = Dataset(), Dataset(), Dataset()
    content.FrameAcquisitionNumber = 1
    content.FrameReferenceDateTime = content.FrameAcquisitionDateTime = f"{one.AcquisitionDate}{one.AcquisitionTime}"
    content.FrameAcquisitionDuration = 4.0
    content.StackID, content.InStackPositionNumber = "1", number
    content.DimensionIndexValues = [1, number]
    position.ImagePositionPatient = copy.deepcopy(one.ImagePositionPatient)
    frame.FrameContentSequence = Items([content])
    frame.PlanePositionSequence = Items([position])
    frame.CTPositionSequence = Items([_table_position()])
    frame.CTExposureSequence = Items([_exposure(one)])
    return frame


def _item(one: Dataset, keywords: Sequence[str]) -> Dataset:
    made = Dataset()
    for keyword in keywords:
        if keyword in one:
            made[keyword] = copy.deepcopy(one[keyword])
    return made


def _completed(group: str, item: Dataset) -> Dataset:
    """Add what the Standard demands of a group and no single-frame slice tells."""
    if group == "CTXRayDetailsSequence":
        item.FocalSpots, item.FilterType, item.FilterMaterial = [1.2], "FLAT", ["ALUMINUM"]
    elif group == "CTReconstructionSequence":
        item.ReconstructionAlgorithm, item.ConvolutionKernelGroup = "FILTER_BACK_PROJ", "SOFT_TISSUE"
        item.ReconstructionAngle, item.ImageFilter = 360.0, "NONE"
        item.ReconstructionPixelSpacing = [0.7, 0.7]
    elif group == "CTAcquisitionDetailsSequence":
        item.RevolutionTime, item.SingleCollimationWidth, item.TotalCollimationWidth = 0.5, 0.6, 38.4
    return item


def _frame_type(one: Dataset) -> Dataset:
    made = Dataset()
    made.FrameType = [*one.ImageType[:2], "VOLUME", "NONE"]
    made.PixelPresentation, made.VolumetricProperties = "MONOCHROME", "VOLUME"
    made.VolumeBasedCalculationTechnique = "NONE"
    return made


def _acquisition_type() -> Dataset:
    made = Dataset()
    made.AcquisitionType = "SPIRAL"
    made.ConstantVolumeFlag, made.FluoroscopyFlag = "NO", "NO"
    return made


def _anatomy() -> Dataset:
    region, made = Dataset(), Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "818981001", "SCT", "Abdomen"
    made.AnatomicRegionSequence = Items([region])
    made.FrameLaterality = "U"
    return made


def _table_dynamics() -> Dataset:
    made = Dataset()
    made.TableSpeed, made.TableFeedPerRotation, made.SpiralPitchFactor = 46.0, 23.0, 0.6
    return made


def _geometry() -> Dataset:
    made = Dataset()
    made.DistanceSourceToDetector, made.DistanceSourceToDataCollectionCenter = 1085.0, 595.0
    return made


def _irradiation() -> Dataset:
    made = Dataset()
    made.IrradiationEventUID = generate_uid()
    return made


def _table_position() -> Dataset:
    made = Dataset()
    made.TablePosition = 0.0
    made.ReconstructionTargetCenterPatient = made.DataCollectionCenterPatient = [0.0, 0.0, 0.0]
    return made


def _exposure(one: Dataset) -> Dataset:
    made = Dataset()
    made.ExposureTimeInms, made.XRayTubeCurrentInmA = float(one.ExposureTime), float(one.XRayTubeCurrent)
    made.ExposureInmAs, made.ExposureModulationType, made.CTDIvol = float(one.Exposure), "NONE", 8.0
    return made
