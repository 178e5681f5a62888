"""Segmentations that others made: DICOM SEG of any writer, orientation and spacing, and what is refused."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels.utils import pack_bits
from pydicom.sequence import Sequence as DicomSequence
from pydicom.sr.codedict import codes as dictionary
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless, generate_uid

from service.dicom.syntaxes import LABEL_MAP_SEGMENTATION_STORAGE, SEGMENTATION_STORAGE
from worker.segmentation import SegmentationError, SuppliedLabels
from worker.segmentation.base import L1, L2, L3, L4, L5, S1, SACRUM, T12, LabelArray
from worker.segmentation.dicom_seg import (
    VERTEBRAE,
    SuppliedError,
    read_header,
    read_labels,
)
from worker.segmentation.evaluate import dice
from worker.volume import Volume, load_dicom

Affine = npt.NDArray[np.float64]

FRAME = "1.2.826.0.1.3680043.8.498.1"
CODE_OF = {label: code for code, label in VERTEBRAE.items()}
LIVER = ("10200004", "SCT")
SHAPE = (26, 51, 57)  # 51 x 57 pixels do not fill whole bytes: frames begin in the middle of one
AXIAL = np.array([[0, 0, 1.3, -40], [0, 1.3, 0, -30], [4, 0, 0, 500], [0, 0, 0, 1]], dtype=np.float64)


@dataclass(frozen=True)
class FramedVolume(Volume):
    """A volume that knows its frame of reference."""

    frame_of_reference_uid: str | None = None


def spine(shape: Sequence[int], affine: Affine) -> LabelArray:
    """L2, L3 and L4 as ellipsoids, drawn on any grid: (n, row, column) -> LPS mm by `affine`."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    places = grid @ affine[:3, :3].T + affine[:3, 3]
    labels = np.zeros(tuple(shape), dtype=np.uint8)
    for number, label in enumerate((L4, L3, L2)):
        centre = np.array([-4.0 + number, 2.0, 517.0 + 33.0 * number])
        labels[(((places - centre) / np.array([22.0, 18.0, 13.0])) ** 2).sum(axis=-1) < 1] = label
    return labels


def volume_of(shape: Sequence[int] = SHAPE, affine: Affine = AXIAL, **known: Any) -> Volume:
    return FramedVolume(np.zeros(tuple(shape), dtype=np.float32), affine, **known)


def sequence(**elements: Any) -> DicomSequence:
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return DicomSequence([item])


def coded(code: tuple[str, str]) -> DicomSequence:
    return sequence(CodeValue=code[0], CodingSchemeDesignator=code[1], CodeMeaning="a structure")


def segment(number: int, code: tuple[str, str], name: str = "a label for people") -> Dataset:
    item = Dataset()
    item.SegmentNumber, item.SegmentLabel = number, name
    item.SegmentAlgorithmType, item.SegmentAlgorithmName = "AUTOMATIC", "SpineFinder"
    item.SegmentedPropertyCategoryCodeSequence = coded(("123037004", "SCT"))
    item.SegmentedPropertyTypeCodeSequence = coded(code)
    return item


def geometry(affine: Affine) -> tuple[DicomSequence, DicomSequence]:
    """Plane orientation and pixel measures of frames [n, row, column] that lie by `affine`."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = affine[:3, :3] / lengths
    orientation = sequence(ImageOrientationPatient=[f"{v:.9f}"[:16] for v in (*cosines[:, 2], *cosines[:, 1])])
    measures = sequence(
        PixelSpacing=[f"{lengths[1]:.6f}", f"{lengths[2]:.6f}"],
        SpacingBetweenSlices=f"{lengths[0]:.6f}",
        SliceThickness=f"{lengths[0]:.6f}",
    )
    return orientation, measures


def position(affine: Affine, n: int) -> DicomSequence:
    return sequence(ImagePositionPatient=[f"{v:.6f}" for v in affine[:3, 3] + n * affine[:3, 0]])


def make_seg(
    path: Path,
    masks: Mapping[int, npt.NDArray[Any]],
    affine: Affine = AXIAL,
    *,
    codes: Mapping[int, tuple[str, str]] = CODE_OF,
    own_geometry: bool = False,
    whole: bool = False,
) -> FileDataset:
    """A BINARY SEG, one segment per mask [n, row, column]; empty frames left out unless `whole`."""
    dataset = start(path, SEGMENTATION_STORAGE, "BINARY")
    orientation, measures = geometry(affine)
    if not own_geometry:
        dataset.SharedFunctionalGroupsSequence = sequence(
            PlaneOrientationSequence=orientation, PixelMeasuresSequence=measures
        )
    dataset.SegmentSequence = DicomSequence([segment(n, codes[label]) for n, label in enumerate(masks, start=1)])
    frames, groups = [], []
    for number, mask in enumerate(masks.values(), start=1):
        for n in range(mask.shape[0]):
            if not (whole or mask[n].any()):
                continue
            group = Dataset()
            group.PlanePositionSequence = position(affine, n)
            group.SegmentIdentificationSequence = sequence(ReferencedSegmentNumber=number)
            if own_geometry:
                group.PlaneOrientationSequence, group.PixelMeasuresSequence = orientation, measures
            frames.append(mask[n] > 0)
            groups.append(group)
    fill(dataset, np.array(frames, dtype=np.uint8), groups, bits=1)
    dataset.save_as(path, enforce_file_format=True)
    return dataset


def make_label_map(path: Path, labels: LabelArray, affine: Affine = AXIAL, *, bits: int = 8) -> FileDataset:
    """A LABELMAP whose pixel values are segment numbers, not our class ids."""
    dataset = start(path, LABEL_MAP_SEGMENTATION_STORAGE, "LABELMAP")
    orientation, measures = geometry(affine)
    dataset.SharedFunctionalGroupsSequence = sequence(
        PlaneOrientationSequence=orientation, PixelMeasuresSequence=measures
    )
    present = [int(label) for label in np.unique(labels[labels > 0])]
    numbers = {label: n + (300 if bits == 16 else 3) for n, label in enumerate(present)}
    table = np.zeros(256, dtype=np.uint16)
    table[list(numbers)] = list(numbers.values())
    dataset.SegmentSequence = DicomSequence(
        [
            segment(0, ("125040", "DCM"), "Background"),
            segment(2, LIVER, "Liver"),
            *(segment(number, CODE_OF[label]) for label, number in numbers.items()),
        ]
    )
    groups = []
    for n in range(labels.shape[0]):
        group = Dataset()
        group.PlanePositionSequence = position(affine, n)
        groups.append(group)
    values = table[labels]
    values[:, :3, :3] = 2  # liver in a corner
    fill(dataset, values, groups, bits=bits)
    dataset.save_as(path, enforce_file_format=True)
    return dataset


def start(path: Path, sop_class: str, kind: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.UID(sop_class)
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.Manufacturer, dataset.SegmentationType = "SEG", "A foreign maker", kind
    dataset.ContentCreatorName = "Doe^Jane"
    dataset.FrameOfReferenceUID = FRAME
    return dataset


def fill(dataset: Dataset, frames: npt.NDArray[Any], groups: list[Dataset], *, bits: int) -> None:
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames.shape
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = bits - 1, 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PerFrameFunctionalGroupsSequence = DicomSequence(groups)
    if bits == 1:
        dataset.PixelData = pack_bits(frames.reshape(-1))
    else:
        raw = frames.astype(np.uint8 if bits == 8 else np.dtype("<u2")).tobytes()
        dataset.PixelData = raw + b"\0" * (len(raw) % 2)
    dataset["PixelData"].VR = "OW" if bits == 16 else "OB"


def masks_of(labels: LabelArray) -> dict[int, npt.NDArray[np.bool_]]:
    return {int(label): labels == label for label in np.unique(labels[labels > 0])}


def mean_dice(one: LabelArray, other: LabelArray) -> float:
    return float(np.min([dice(one, other, label) for label in (L2, L3, L4)]))


# -------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("own_geometry", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_on_the_cts_own_grid_the_labels_come_back_identical(tmp_path: Path, own_geometry: bool, whole: bool) -> None:
    truth = spine(SHAPE, AXIAL)
    assert not truth[0].any()
    make_seg(tmp_path / "seg", masks_of(truth), own_geometry=own_geometry, whole=whole)
    supplied = SuppliedLabels(tmp_path / "seg")  # no suffix: the contents decide what it is
    made = supplied.segment(volume_of())
    assert np.array_equal(made.labels, truth)
    assert made.labels.dtype == np.uint8
    assert made.second_opinion is None
    assert made.sha256 == supplied.sha256
    assert len(made.sha256) == 64


def test_the_provenance_names_the_object_and_its_maker_but_no_person(tmp_path: Path) -> None:
    dataset = make_seg(tmp_path / "seg.dcm", masks_of(spine(SHAPE, AXIAL)))
    name = SuppliedLabels(tmp_path / "seg.dcm").name
    assert name == f"supplied DICOM SEG by SpineFinder, A foreign maker ({dataset.SOPInstanceUID})"


def turned(*columns: Sequence[float], origin: Sequence[float]) -> Affine:
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns).T
    affine[:3, 3] = origin
    return affine


TILT = np.deg2rad(17.0)
OBLIQUE = turned(
    [0.0, -2.0 * np.sin(TILT), 2.0 * np.cos(TILT)],
    [0.0, 1.1 * np.cos(TILT), 1.1 * np.sin(TILT)],
    [0.9, 0.0, 0.0],
    origin=[-38.0, -20.0, 480.0],
)


@pytest.mark.parametrize(
    ("shape", "affine"),
    [
        pytest.param((26, 51, 57), turned([0, 0, -4], [0, 1.3, 0], [1.3, 0, 0], origin=[-40, -30, 600]), id="feet-up"),
        pytest.param((26, 51, 57), turned([0, 0, 4], [0, -1.3, 0], [-1.3, 0, 0], origin=[32, 35, 500]), id="prone"),
        pytest.param((41, 110, 45), turned([1.7, 0, 0], [0, 0, -1], [0, 1, 0], origin=[-38, -22, 600]), id="sagittal"),
        pytest.param((30, 110, 70), turned([0, 1.5, 0], [0, 0, -1], [1, 0, 0], origin=[-38, -20, 600]), id="coronal"),
        pytest.param((70, 85, 75), OBLIQUE, id="oblique"),
        pytest.param((104, 80, 90), turned([0, 0, 1], [0, 0.7, 0], [0.8, 0, 0], origin=[-38, -26, 500]), id="finer"),
    ],
)
def test_any_orientation_and_spacing_lands_on_the_cts_grid(
    tmp_path: Path, shape: tuple[int, int, int], affine: Affine
) -> None:
    make_seg(tmp_path / "seg.dcm", masks_of(spine(shape, affine)), affine)
    labels = read_labels(tmp_path / "seg.dcm", volume_of())
    assert mean_dice(labels, spine(SHAPE, AXIAL)) > 0.95


def test_a_flipped_copy_of_the_grid_loses_no_voxel(tmp_path: Path) -> None:
    truth = spine(SHAPE, AXIAL)
    truth[:, 0, :5] = truth[:, -1, -5:] = truth[0, 20, 20:30] = L4  # the outermost voxels too
    flip = AXIAL @ turned([-1, 0, 0], [0, -1, 0], [0, 0, 1], origin=[SHAPE[0] - 1, SHAPE[1] - 1, 0])
    make_seg(tmp_path / "seg.dcm", masks_of(truth[::-1, ::-1]), flip)
    assert np.array_equal(read_labels(tmp_path / "seg.dcm", volume_of()), truth)


def test_a_nearly_equal_spacing_is_not_taken_for_the_same(tmp_path: Path) -> None:
    """0.009 mm a column are 2.3 mm after 250 columns: most of two voxels."""
    block = np.zeros((3, 6, 300), dtype=np.uint8)
    block[1, 2:5, 250:260] = L3
    wider = AXIAL @ np.diag([1, 1, 1.309 / 1.3, 1])
    make_seg(tmp_path / "seg.dcm", masks_of(block), wider, whole=True)
    columns = np.round(np.arange(300) * 1.3 / 1.309).astype(int)
    assert np.array_equal(read_labels(tmp_path / "seg.dcm", volume_of(block.shape)), block[:, :, columns])
    assert not np.array_equal(block[:, :, columns], block)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_label_map_is_read_by_its_segments_not_by_its_pixel_values(tmp_path: Path, bits: int) -> None:
    truth = spine(SHAPE, AXIAL)
    make_label_map(tmp_path / "map.dcm", truth, bits=bits)
    assert np.array_equal(read_labels(tmp_path / "map.dcm", volume_of()), truth)


def test_a_compressed_label_map_is_read(tmp_path: Path) -> None:
    truth = spine(SHAPE, AXIAL)
    dataset = make_label_map(tmp_path / "map.dcm", truth)
    dataset.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)  # GDCM's aborts
    dataset.save_as(tmp_path / "rle.dcm", enforce_file_format=True)
    assert np.array_equal(read_labels(tmp_path / "rle.dcm", volume_of()), truth)


def test_old_snomed_codes_are_the_same_vertebrae(tmp_path: Path) -> None:
    """dcmqi wrote SNOMED-RT until 2019."""
    truth = spine(SHAPE, AXIAL)
    old = {L2: ("T-11920", "SRT"), L3: ("T-11930", "SRT"), L4: ("T-11940", "SRT")}
    make_seg(tmp_path / "seg.dcm", masks_of(truth), codes=old)
    assert np.array_equal(read_labels(tmp_path / "seg.dcm", volume_of()), truth)


def test_a_frame_missing_within_the_stack_is_an_empty_slice(tmp_path: Path) -> None:
    truth = spine(SHAPE, AXIAL)
    truth[8:13] = 0
    make_seg(tmp_path / "seg.dcm", masks_of(truth))
    assert np.array_equal(read_labels(tmp_path / "seg.dcm", volume_of()), truth)


def test_only_the_cts_part_of_a_longer_segmentation_is_taken(tmp_path: Path) -> None:
    truth = spine(SHAPE, AXIAL)
    make_seg(tmp_path / "seg.dcm", masks_of(truth))
    part = AXIAL @ turned([1, 0, 0], [0, 1, 0], [0, 0, 1], origin=[9, 0, 0])
    assert np.array_equal(read_labels(tmp_path / "seg.dcm", volume_of((10, 51, 57), part)), truth[9:19])


def test_the_codes_are_those_of_the_public_tables() -> None:
    concept = {label: f"{name}Vertebra" for label, name in NAMES.items() if name not in ("S1", "sacrum")}
    for label, keyword in concept.items():
        assert getattr(dictionary.SCT, keyword).value == CODE_OF[label][0]
    table = (
        Path(pytest.importorskip("totalsegmentator").__file__).parent / "resources/totalsegmentator_snomed_mapping.csv"
    )
    # their columns: name, category scheme, value, meaning, type scheme, value, meaning
    with table.open(encoding="utf-8") as file:
        theirs = {row[0].removeprefix("vertebrae_"): (row[5], row[4]) for row in csv.reader(file) if len(row) > 5}
    assert {name: theirs[name] for name in NAMES.values()} == {name: CODE_OF[label] for label, name in NAMES.items()}


def test_our_own_segmentations_use_the_same_codes() -> None:
    reports = pytest.importorskip("service.dicom.reports.codes")
    ours = {name: (code.value, code.scheme_designator) for name, code in reports.VERTEBRAE.items()}
    expected = {NAMES[label]: CODE_OF[label] for label in (T12, L1, L2, L3, L4, L5, S1, SACRUM)}
    assert expected.items() <= ours.items()
    assert ours["L6"] in VERTEBRAE


NAMES = {SACRUM: "sacrum", S1: "S1"}
NAMES |= {27 + n: f"L{5 - n}" for n in range(5)} | {32 + n: f"T{12 - n}" for n in range(12)}
NAMES |= {44 + n: f"C{7 - n}" for n in range(7)}


# --------------------------------------------------------------------------------------- what real writers make


def nrrd(path: Path) -> npt.NDArray[Any]:
    """The array [k, j, i] of a gzipped NRRD of shorts, as dcmqi's test data are."""
    header, data = path.read_bytes().split(b"\n\n", 1)
    sizes = next(line for line in header.decode().splitlines() if line.startswith("sizes:"))
    return np.frombuffer(gzip.decompress(data), dtype="<i2").reshape([int(n) for n in sizes.split()[1:]][::-1])


def recoded(source: Path, target: Path, code: tuple[str, str]) -> Path:
    """A real SEG of a liver whose liver is called a vertebra."""
    dataset = pydicom.dcmread(source)
    dataset.SegmentSequence[-1].SegmentedPropertyTypeCodeSequence = coded(code)
    dataset.save_as(target)
    return target


@pytest.mark.parametrize("name", ["23x38x3", "24x38x3"])
def test_dcmqis_frames_are_read_as_dcmqi_means_them(real_data: Path, tmp_path: Path, name: str) -> None:
    folder = real_data / "dcmqi-ct3slice" / name
    seg = recoded(folder / "seg" / "label.seg", tmp_path / "seg.dcm", ("T-11910", "SRT"))
    truth = nrrd(folder / "nrrd" / "label.nrrd") > 0
    affine = turned([0, 0, 2.5], [0, 0.7, 0], [0.7, 0, 0], origin=[46.4649, 5.01881, -177.75])
    labels = read_labels(seg, volume_of(truth.shape, affine))
    assert truth.any()
    assert np.array_equal(labels, np.where(truth, L1, 0))


@pytest.mark.parametrize("name", ["sparse-labelmap-noppv", "sparse-labelmap-ppv5"])
def test_dcmqis_sparse_label_maps_are_read(real_data: Path, tmp_path: Path, name: str) -> None:
    folder = real_data / "dcmqi-ct3slice"
    seg = recoded(folder / f"{name}.dcm", tmp_path / "map.dcm", ("66794005", "SCT"))
    truth = nrrd(folder / f"{name.replace('-', '_')}_seg.nrrd") == 1
    affine = turned([0, 0, 2.5], [0, 0.7, 0], [0.7, 0, 0], origin=[46.4649, 5.01881, -177.75])
    labels = read_labels(seg, volume_of(truth.shape, affine))
    assert truth.any()
    assert np.array_equal(labels, np.where(truth, L1, 0))


def test_dcmqis_liver_lies_on_its_real_ct(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "dcmqi-ct3slice"
    volume = load_dicom(sorted((folder / "ct-3slice").glob("*.dcm")))
    seg = recoded(folder / "liver.dcm", tmp_path / "seg.dcm", ("T-11910", "SRT"))
    labels = SuppliedLabels(seg).segment(volume).labels
    truth = nrrd(folder / "liver_seg.nrrd") > 0
    assert np.array_equal(labels, np.where(truth, L1, 0))


@pytest.mark.parametrize("name", ["liver.dcm", "partial_overlaps.dcm", "sparse-labelmap-noppv.dcm"])
def test_without_a_vertebra_the_refusal_says_what_there_is(real_data: Path, name: str) -> None:
    with pytest.raises(SegmentationError, match=r"no segment is coded as a vertebra \(it holds .*(Liver|GREEN)"):
        SuppliedLabels(real_data / "dcmqi-ct3slice" / name)


def headers(shape: Sequence[int], affine: Affine) -> list[Dataset]:
    """The headers of an axial CT series as highdicom wants them."""
    orientation, measures = geometry(affine)
    study, series, made = generate_uid(), generate_uid(), []
    for n in range(shape[0]):
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.SOPClassUID, one.SOPInstanceUID, one.Modality = CTImageStorage, generate_uid(), "CT"
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, FRAME
        one.PatientID, one.PatientName, one.PatientBirthDate, one.PatientSex = "1", "A^B", "", ""
        one.AccessionNumber, one.StudyID, one.StudyDate, one.StudyTime = "", "", "", ""
        one.ReferringPhysicianName, one.SeriesNumber, one.InstanceNumber = "", 1, n + 1
        one.Rows, one.Columns = shape[1], shape[2]
        one.ImageOrientationPatient = orientation[0].ImageOrientationPatient
        one.ImagePositionPatient = position(affine, n)[0].ImagePositionPatient
        one.PixelSpacing, one.SliceThickness = measures[0].PixelSpacing, measures[0].SliceThickness
        made.append(one)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_highdicoms_objects_are_read(tmp_path: Path, kind: str) -> None:
    highdicom = pytest.importorskip("highdicom")
    truth = spine(SHAPE, AXIAL)
    source = headers(SHAPE, AXIAL)
    levels = {L4: dictionary.SCT.L4Vertebra, L3: dictionary.SCT.L3Vertebra, L2: dictionary.SCT.L2Vertebra}
    made = highdicom.seg.Segmentation(
        source_images=source,
        pixel_array=np.select([truth == label for label in levels], [1, 2, 3], 0).astype(np.uint8),
        segmentation_type=kind,
        segment_descriptions=[
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=str(number),
                segmented_property_category=dictionary.SCT.AnatomicalStructure,
                segmented_property_type=code,
                algorithm_type="MANUAL",
            )
            for number, code in enumerate(levels.values(), start=1)
        ],
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="highdicom",
        manufacturer_model_name="test",
        software_versions="1",
        device_serial_number="1",
    )
    made.save_as(tmp_path / "seg.dcm")
    uids = tuple(str(one.SOPInstanceUID) for one in source)
    volume = volume_of(slice_uids=uids)
    assert np.array_equal(read_labels(tmp_path / "seg.dcm", volume), truth)
    assert read_header(tmp_path / "seg.dcm").source_uids <= set(uids)


@pytest.mark.filterwarnings("ignore")
def test_totalsegmentators_own_writer_is_read(real_data: Path, tmp_path: Path) -> None:
    """Its SEG has the category 123037004; its arrays come as a NIfTI's: (column, row from below, slice)."""
    writer = pytest.importorskip("totalsegmentator.dicom_io")
    pytest.importorskip("highdicom")
    ct = tmp_path / "ct"
    ct.mkdir()
    for file in (real_data / "dcmqi-ct3slice" / "ct-3slice").glob("*.dcm"):
        dataset = pydicom.dcmread(file)
        dataset.SpecificCharacterSet = "ISO_IR 100"  # empty there, which the writer refuses
        dataset.save_as(ct / file.name)
    volume = load_dicom(sorted(ct.glob("*.dcm")))
    truth = np.zeros(volume.hu.shape, dtype=np.uint8)
    truth[:, 200:240, 250:300], truth[1:, 260:290, 250:300], truth[:, 100:200, 100:200] = 1, 2, 3
    classes = {1: "vertebrae_L1", 2: "vertebrae_L2", 3: "liver"}
    writer.save_mask_as_dicomseg(truth[:, ::-1].transpose(2, 1, 0), classes, ct, tmp_path / "seg.dcm", np.eye(4))
    labels = SuppliedLabels(tmp_path / "seg.dcm").segment(volume).labels
    assert np.array_equal(labels, np.select([truth == 1, truth == 2], [L1, L2], 0))


# ---------------------------------------------------------------------------------------------- what is refused


def test_another_frame_of_reference_is_another_scan(tmp_path: Path) -> None:
    truth = spine(SHAPE, AXIAL)
    make_seg(tmp_path / "seg.dcm", masks_of(truth))
    assert np.array_equal(read_labels(tmp_path / "seg.dcm", volume_of(frame_of_reference_uid=FRAME)), truth)
    with pytest.raises(SuppliedError, match="frame of reference"):
        read_labels(tmp_path / "seg.dcm", volume_of(frame_of_reference_uid=f"{FRAME}.2"))


def test_where_the_frame_is_unknown_the_source_images_must_be_the_cts(tmp_path: Path) -> None:
    truth = spine(SHAPE, AXIAL)
    dataset = make_seg(tmp_path / "seg.dcm", masks_of(truth))
    dataset.ReferencedSeriesSequence = sequence(
        ReferencedInstanceSequence=sequence(ReferencedSOPClassUID=CTImageStorage, ReferencedSOPInstanceUID="1.2.3")
    )
    dataset.save_as(tmp_path / "seg.dcm")
    assert read_labels(tmp_path / "seg.dcm", volume_of(slice_uids=("1.2.3", "1.2.4"))).any()
    assert read_labels(tmp_path / "seg.dcm", volume_of()).any()  # from a NIfTI: nothing to compare
    with pytest.raises(SuppliedError, match="belongs to this CT"):
        read_labels(tmp_path / "seg.dcm", volume_of(slice_uids=("1.2.5",)))


def test_outside_of_the_ct_is_refused(tmp_path: Path) -> None:
    make_seg(tmp_path / "seg.dcm", masks_of(spine(SHAPE, AXIAL)))
    far = AXIAL + np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 400], [0, 0, 0, 0]])
    with pytest.raises(SuppliedError, match="outside of the CT"):
        read_labels(tmp_path / "seg.dcm", volume_of(affine=far))


def test_two_vertebrae_in_the_same_voxels_are_refused_whoever_comes_last(tmp_path: Path) -> None:
    truth = spine(SHAPE, AXIAL)
    masks = masks_of(truth)
    masks[L3][:, 20:30, 20:30] |= masks[L4][:, 20:30, 20:30]
    for order in (masks, dict(reversed(masks.items()))):
        make_seg(tmp_path / "seg.dcm", order)
        with pytest.raises(SuppliedError, match=r"L4 and L3 overlap in \d+ voxels"):
            read_labels(tmp_path / "seg.dcm", volume_of())


def test_a_few_shared_voxels_belong_to_neither(tmp_path: Path) -> None:
    truth = spine(SHAPE, AXIAL)
    masks = masks_of(truth)
    shared = np.argwhere(masks[L4])[:4]
    masks[L3][tuple(shared.T)] = True
    expected = truth.copy()
    expected[tuple(shared.T)] = 0
    for order in (masks, dict(reversed(masks.items()))):
        make_seg(tmp_path / "seg.dcm", order)
        assert np.array_equal(read_labels(tmp_path / "seg.dcm", volume_of()), expected)


def test_s1_within_the_sacrum_stays_s1(tmp_path: Path) -> None:
    truth = spine(SHAPE, AXIAL)
    sacrum = (truth == L4) | (truth == L3)
    for order in ({SACRUM: sacrum, S1: truth == L3}, {S1: truth == L3, SACRUM: sacrum}):
        make_seg(tmp_path / "seg.dcm", order)
        labels = read_labels(tmp_path / "seg.dcm", volume_of())
        assert np.array_equal(labels, np.select([truth == L3, truth == L4], [S1, SACRUM], 0))


def test_two_segments_of_one_vertebra_are_refused(tmp_path: Path) -> None:
    truth = spine(SHAPE, AXIAL)
    make_seg(tmp_path / "seg.dcm", masks_of(truth), codes={**CODE_OF, L3: CODE_OF[L4]})
    with pytest.raises(SuppliedError, match="same vertebra's code"):
        SuppliedLabels(tmp_path / "seg.dcm")


def test_fractions_are_refused(tmp_path: Path) -> None:
    dataset = make_seg(tmp_path / "seg.dcm", masks_of(spine(SHAPE, AXIAL)))
    dataset.SegmentationType = "FRACTIONAL"
    dataset.save_as(tmp_path / "seg.dcm")
    with pytest.raises(SuppliedError, match="FRACTIONAL"):
        SuppliedLabels(tmp_path / "seg.dcm")


def test_a_ct_is_no_segmentation(real_data: Path) -> None:
    with pytest.raises(SuppliedError, match="CT Image Storage, not a DICOM SEG"):
        SuppliedLabels(real_data / "dcmqi-ct3slice" / "ct-3slice" / "01.dcm")


def damaged(path: Path, **changes: Any) -> Path:
    """A sound SEG with some elements set otherwise (None: removed)."""
    dataset = make_seg(path, masks_of(spine(SHAPE, AXIAL)))
    for keyword, value in changes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path)
    return path


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"PixelData": b"\0" * 100}, "100 bytes of pixels"),
        ({"PixelData": None}, "no pixels"),
        ({"NumberOfFrames": 2**31 - 1}, "beyond the limit"),
        ({"Rows": None}, "header is incomplete"),
        ({"SegmentSequence": None}, "header is incomplete"),
        ({"SharedFunctionalGroupsSequence": None}, "does not say where its frames lie"),
        ({"PerFrameFunctionalGroupsSequence": DicomSequence([])}, "descriptions of frames"),
        ({"BitsAllocated": 8}, "depth"),
    ],
)
def test_broken_objects_are_refused_in_words(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    path = damaged(tmp_path / "seg.dcm", **changes)
    with pytest.raises(SuppliedError, match=text):
        read_labels(path, volume_of())


def test_lossy_pixels_are_not_decoded(tmp_path: Path) -> None:
    dataset = make_label_map(tmp_path / "map.dcm", spine(SHAPE, AXIAL))
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"] * SHAPE[0])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.save_as(tmp_path / "map.dcm")
    with pytest.raises(SuppliedError, match="transfer syntax JPEG Baseline"):
        read_labels(tmp_path / "map.dcm", volume_of())


@pytest.mark.parametrize(("axis", "text"), [(2, "not evenly spaced"), (0, "shifted sideways")])
def test_frames_that_are_no_stack_are_refused(tmp_path: Path, axis: int, text: str) -> None:
    dataset = make_seg(tmp_path / "seg.dcm", masks_of(spine(SHAPE, AXIAL)))
    place = dataset.PerFrameFunctionalGroupsSequence[5].PlanePositionSequence[0]
    moved = [float(v) for v in place.ImagePositionPatient]
    moved[axis] += 1.5
    place.ImagePositionPatient = moved
    dataset.save_as(tmp_path / "seg.dcm")
    with pytest.raises(SuppliedError, match=text):
        read_labels(tmp_path / "seg.dcm", volume_of())


def test_frames_of_two_orientations_are_refused(tmp_path: Path) -> None:
    dataset = make_seg(tmp_path / "seg.dcm", masks_of(spine(SHAPE, AXIAL)), own_geometry=True)
    other, _ = geometry(OBLIQUE)
    dataset.PerFrameFunctionalGroupsSequence[5].PlaneOrientationSequence = other
    dataset.save_as(tmp_path / "seg.dcm")
    with pytest.raises(SuppliedError, match="differ in orientation"):
        read_labels(tmp_path / "seg.dcm", volume_of())
