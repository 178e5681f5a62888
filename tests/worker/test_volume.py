"""Files -> Volume: order, HU, padding, geometry, every lossless syntax; and what is refused, with its code."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import imagecodecs
import nibabel as nib
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from service.domain.reasons import Code
from worker.volume import (
    PADDING_HU,
    Volume,
    VolumeError,
    codestream_size,
    load_dicom,
    load_label_map,
    load_nifti,
    read_slice,
    write_label_map,
)

ROWS, COLUMNS = 12, 10
AXIAL_1_MM = [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]  # (k, j, i, 1) -> LPS mm
Edit = Callable[[Dataset, int], None]


def ct_series(folder: Path, slices: int = 5, edit: Edit | None = None) -> list[Path]:
    """A small axial CT: voxel (k, j, i) holds 1000 + 100 k + 10 j + i stored, -1024 intercept, 2.5 mm apart."""
    paths = []
    series = generate_uid()
    for k in range(slices):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.SeriesInstanceUID, ds.Modality = series, "CT"
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [-20.0, -30.0, 100.0 + 2.5 * k]
        ds.PixelSpacing = [0.8, 0.7]
        ds.Rows, ds.Columns = ROWS, COLUMNS
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 15, 1, 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        j, i = np.mgrid[:ROWS, :COLUMNS]
        ds.PixelData = (1000 + 100 * k + 10 * j + i).astype("<i2").tobytes()
        if edit is not None:
            edit(ds, k)
        path = folder / f"{k:03d}.dcm"
        ds.save_as(path)
        paths.append(path)
    return paths


def refused(paths: list[Path]) -> Code:
    with pytest.raises(VolumeError) as caught:
        load_dicom(paths)
    return caught.value.code


def test_hu_and_geometry_of_a_series(tmp_path: Path) -> None:
    volume = load_dicom(ct_series(tmp_path))
    assert volume.hu.shape == (5, ROWS, COLUMNS)
    assert volume.hu[3, 4, 5] == 1000 + 300 + 40 + 5 - 1024
    assert volume.hu.dtype == np.float32
    assert volume.affine.dtype == np.float64
    assert (volume.affine @ [3, 4, 5, 1])[:3] == pytest.approx([-20 + 5 * 0.7, -30 + 4 * 0.8, 107.5])
    assert volume.spacing_mm == pytest.approx((2.5, 0.8, 0.7))
    assert len(set(volume.slice_uids)) == 5


def test_shuffled_slices_give_the_identical_volume(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, 9)
    first = load_dicom(paths)
    for seed in range(3):
        shuffled = random.Random(seed).sample(paths, len(paths))
        again = load_dicom(shuffled)
        assert np.array_equal(again.hu, first.hu)
        assert np.array_equal(again.affine, first.affine)
        assert again.slice_uids == first.slice_uids


def test_slices_lie_along_the_normal_even_where_it_points_down(tmp_path: Path) -> None:
    """Feet-first prone images have a normal to the feet: each voxel keeps its place in the patient."""

    def head_to_feet(ds: Dataset, k: int) -> None:
        ds.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]  # the cross product points to the feet

    volume = load_dicom(ct_series(tmp_path, edit=head_to_feet))
    for k in range(5):  # stored value 100 k lies at z = 100 + 2.5 k, wherever k ended up
        where = np.argwhere(volume.hu == 1000 + 100 * k - 1024)[0]
        assert (volume.affine @ [*where, 1])[2] == pytest.approx(100 + 2.5 * k)


def test_slope_and_intercept_belong_to_each_slice(tmp_path: Path) -> None:
    def own_slope(ds: Dataset, k: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = 1 + k, -1000 * k

    volume = load_dicom(ct_series(tmp_path, edit=own_slope))
    assert volume.hu[2, 0, 0] == 3 * 1200 - 2000


def test_padding_is_air_named_by_the_tag_or_not(tmp_path: Path) -> None:
    def pad(ds: Dataset, k: int) -> None:
        pixels = np.frombuffer(ds.PixelData, "<i2").reshape(ROWS, COLUMNS).copy()
        pixels[0, :] = -2000  # a scanner's own padding, not the tag's value
        pixels[1, 0] = 500  # the tag's value, at the edge
        pixels[5, 5] = 500  # tissue that happens to equal it
        ds.PixelData = pixels.tobytes()
        ds.add_new(0x00280120, "SS", 500)

    volume = load_dicom(ct_series(tmp_path, edit=pad))
    assert (volume.hu[:, 0, :] == PADDING_HU).all()
    assert (volume.hu[:, 1, 0] == PADDING_HU).all()
    assert (volume.hu[:, 5, 5] == 500 - 1024).all()
    assert volume.hu.min() == PADDING_HU


def test_truncated_pixels_are_refused_before_decoding(tmp_path: Path) -> None:
    def cut(ds: Dataset, k: int) -> None:
        if k == 2:
            ds.PixelData = ds.PixelData[:-20]

    assert refused(ct_series(tmp_path, edit=cut)) is Code.PIXELS_UNREADABLE


def test_a_file_cut_on_disk_is_refused(tmp_path: Path) -> None:
    paths = ct_series(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:-37])
    assert refused(paths) is Code.PIXELS_UNREADABLE
    paths[1].write_bytes(paths[1].read_bytes()[:90])
    assert refused(paths) is Code.UNREADABLE


def test_a_bomb_in_the_header_is_refused_before_decoding(tmp_path: Path) -> None:
    def bomb(ds: Dataset, k: int) -> None:
        ds.Rows = ds.Columns = 65000

    assert refused(ct_series(tmp_path, 2, bomb)) is Code.TOO_MANY_SLICES
    with pytest.raises(VolumeError) as caught:
        read_slice(tmp_path / "000.dcm")
    assert caught.value.code is Code.PIXELS_UNREADABLE


def test_a_bomb_inside_the_codestream_is_refused_before_decoding(tmp_path: Path) -> None:
    """The header says 12 x 10, the JPEG 2000 stream itself 60000 x 60000: the decoder would allocate 7 GB."""
    siz = b"\xff\x4f\xff\x51\x00\x29\x00\x00" + np.array([60000, 60000, 0, 0], ">u4").tobytes() + bytes(40)

    def bomb(ds: Dataset, k: int) -> None:
        ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
        ds.PixelData = pydicom.encaps.encapsulate([siz])
        ds["PixelData"].VR = "OB"

    assert codestream_size(siz) == (60000, 60000)
    ct_series(tmp_path, 2, bomb)
    with pytest.raises(VolumeError, match="60000"):
        read_slice(tmp_path / "000.dcm")


def _set(name: str, value: object) -> Edit:
    def edit(ds: Dataset, k: int) -> None:
        setattr(ds, name, value)

    return edit


def _move_last(ds: Dataset, k: int) -> None:
    if k == 4:
        ds.ImagePositionPatient = [-20.0, -30.0, 100.0 + 2.5 * 5]


def _same_place(ds: Dataset, k: int) -> None:
    if k == 4:
        ds.ImagePositionPatient = [-20.0, -30.0, 100.0]


def _tilted(ds: Dataset, k: int) -> None:
    ds.ImagePositionPatient = [-20.0, -30.0 + 0.8 * k, 100.0 + 2.5 * k]


def _one_larger(ds: Dataset, k: int) -> None:
    if k == 1:
        ds.PixelSpacing = [0.9, 0.9]


def _without(name: str) -> Edit:
    def edit(ds: Dataset, k: int) -> None:
        delattr(ds, name)

    return edit


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (_move_last, Code.MISSING_SLICE),
        (_same_place, Code.DUPLICATE_POSITION),
        (_tilted, Code.GANTRY_TILT),
        (_one_larger, Code.MIXED_GEOMETRY),
        (_without("ImagePositionPatient"), Code.NO_GEOMETRY),
        (_without("PixelSpacing"), Code.NO_GEOMETRY),
        (_without("RescaleSlope"), Code.NO_RESCALE),
        (_without("PixelData"), Code.NO_PIXELS),
        (_set("RescaleType", "US"), Code.NOT_HU),
        (_set("Modality", "MR"), Code.NOT_CT),
        (_set("NumberOfFrames", 3), Code.MULTIFRAME_UNSUPPORTED),
        (_set("ImageOrientationPatient", [0, 0, 0, 0, 1, 0]), Code.NO_GEOMETRY),
        (_set("SamplesPerPixel", 3), Code.PIXELS_UNREADABLE),
    ],
)
def test_refusals_have_stable_codes(tmp_path: Path, edit: Edit, code: Code) -> None:
    assert refused(ct_series(tmp_path, edit=edit)) is code


def test_one_slice_and_no_dicom_are_refused(tmp_path: Path) -> None:
    assert refused(ct_series(tmp_path, 1)) is Code.COVERAGE_TOO_SHORT
    (tmp_path / "a.txt").write_text("not DICOM")
    (tmp_path / "b.txt").write_text("nor this")
    assert refused([tmp_path / "a.txt", tmp_path / "b.txt"]) is Code.UNREADABLE


def test_every_lossless_syntax_decodes_to_identical_pixels(real_data: Path) -> None:
    folder = real_data / "ct-transfer-syntaxes" / "cornerstone3D"
    wanted = ("1.2.1", "1.2", "1.2.2", "1.2.5", "1.2.4.57", "1.2.4.70", "1.2.4.80", "1.2.4.90")
    reference = read_slice(folder / "CTImage.dcm")
    assert reference.shape == (512, 512)
    assert reference.min() == PADDING_HU  # the pixels' own padding is -2000, the tag says -32768
    for syntax in wanted:
        (path,) = folder.glob(f"CTImage.dcm_*1.2.840.10008.{syntax}.dcm")
        assert np.array_equal(read_slice(path), reference), syntax


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202"])
def test_high_throughput_jpeg_2000_decodes_to_identical_pixels(syntax: str, tmp_path: Path) -> None:
    def encode(ds: Dataset, _k: int) -> None:
        ds.PixelRepresentation = 0
        stored = np.frombuffer(ds.PixelData, dtype="<u2").reshape(ROWS, COLUMNS)
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = encapsulate([imagecodecs.htj2k_encode(stored)])
        ds["PixelData"].is_undefined_length = True

    (tmp_path / "encoded").mkdir()
    encoded = load_dicom(ct_series(tmp_path / "encoded", edit=encode))
    assert np.array_equal(encoded.hu, load_dicom(ct_series(tmp_path)).hu)


def test_lossy_and_pixelless_files_are_refused(real_data: Path) -> None:
    folder = real_data / "ct-transfer-syntaxes" / "cornerstone3D"
    for syntax in ("4.50", "4.51", "4.81", "4.91"):
        (path,) = folder.glob(f"CTImage.dcm_*1.2.840.10008.1.2.{syntax}.dcm")
        with pytest.raises(VolumeError) as caught:
            read_slice(path)
        assert caught.value.code is Code.LOSSY
    with pytest.raises(VolumeError) as caught:
        read_slice(folder / "no-pixel-data.dcm")
    assert caught.value.code is Code.NO_PIXELS


def test_a_real_jpeg2000_series_in_any_order(real_data: Path) -> None:
    folder = real_data / "totalsegmentator-example-dicom-j2k" / "example_ct_dicom"
    paths = sorted(folder.iterdir())
    volume = load_dicom(paths[::-1])
    assert volume.hu.shape == (20, 512, 512)
    assert volume.spacing_mm == pytest.approx((2.0, 0.9766, 0.9766), abs=1e-3)
    assert np.array_equal(load_dicom(paths[10:] + paths[:10]).hu, volume.hu)


# ----------------------------------------------------------------------------------------------------- NIfTI


def torso() -> npt.NDArray[np.float32]:
    """(i, j, k) in RAS: air around soft tissue with one bright voxel off every mirror plane."""
    values = np.full((16, 14, 12), -1000, dtype=np.float32)
    values[3:13, 3:11, :] = 40
    values[5, 4, 9] = 700
    return values


def save(path: Path, values: npt.NDArray[np.generic], affine: npt.NDArray[np.float64]) -> Path:
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAI", "PSR", "SAL", "IRP"])
def test_every_nifti_orientation_gives_the_same_volume(tmp_path: Path, axes: str) -> None:
    image = nib.Nifti1Image(torso(), np.diag([1.0, 2.0, 3.0, 1.0]))
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(
            nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(axes))
        )
    )
    nib.save(turned, tmp_path / "ct.nii.gz")
    volume = load_nifti(tmp_path / "ct.nii.gz")
    (k, j, i) = np.argwhere(volume.hu == 700)[0]
    assert (volume.affine @ [k, j, i, 1])[:3] == pytest.approx([-5.0, -8.0, 27.0])  # RAS (5, 8, 27) in LPS
    assert volume.spacing_mm == pytest.approx((3.0, 2.0, 1.0))
    labels = (volume.hu == 700).astype(np.uint8) * 31
    write_label_map(labels, volume, tmp_path / "labels.nii.gz")
    written = nib.load(tmp_path / "labels.nii.gz")
    assert written.shape == turned.shape
    assert np.allclose(written.affine, turned.affine)
    assert np.array_equal(np.asarray(written.dataobj) == 31, np.asarray(turned.dataobj) == 700)
    assert np.array_equal(load_label_map(tmp_path / "labels.nii.gz", volume), labels)


def test_a_label_map_on_another_grid_is_brought_to_the_cts(tmp_path: Path) -> None:
    volume = load_nifti(save(tmp_path / "ct.nii.gz", torso(), np.diag([1.0, 2.0, 3.0, 1.0])))
    fine = np.zeros((32, 28, 24), dtype=np.uint8)
    fine[10:12, 8:10, 18:20] = 30
    affine = np.diag([0.5, 1.0, 1.5, 1.0])
    affine[:3, 3] = [-0.25, -0.5, -0.75]  # the same box, halved voxels
    labels = load_label_map(save(tmp_path / "labels.nii.gz", fine, affine), volume)
    assert labels.shape == volume.hu.shape
    assert np.array_equal(labels == 30, volume.hu == 700)
    elsewhere = save(tmp_path / "off.nii.gz", fine, affine @ np.diag([1, 1, 1, 1]) + _shift(900))
    with pytest.raises(VolumeError) as caught:
        load_label_map(elsewhere, volume)
    assert caught.value.code is Code.MIXED_GEOMETRY


def _shift(mm: float) -> npt.NDArray[np.float64]:
    shift = np.zeros((4, 4))
    shift[2, 3] = mm
    return shift


def test_a_dicom_volumes_label_map_keeps_its_place(tmp_path: Path) -> None:
    volume = load_dicom(ct_series(tmp_path))
    labels = np.zeros(volume.hu.shape, dtype=np.uint8)
    labels[3, 4, 5] = 29
    write_label_map(labels, volume, tmp_path / "labels.nii.gz")
    written = nib.load(tmp_path / "labels.nii.gz")
    voxel = np.argwhere(np.asarray(written.dataobj) == 29)[0]
    x, y, z = (written.affine @ [*voxel, 1])[:3]
    assert [-x, -y, z] == pytest.approx((volume.affine @ [3, 4, 5, 1])[:3])


def test_values_that_are_not_hu_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mr_like = rng.gamma(2.0, 150.0, (20, 20, 20)).astype(np.float32)
    offset = torso() + 1024
    for name, values in (("mr", mr_like), ("offset", offset), ("flat", np.zeros((9, 9, 9), np.float32))):
        with pytest.raises(VolumeError) as caught:
            load_nifti(save(tmp_path / f"{name}.nii.gz", values, np.eye(4)))
        assert caught.value.code is Code.NOT_HU, name


def test_a_nifti_without_orientation_or_cut_short_is_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(torso(), None)
    nib.save(image, tmp_path / "lost.nii")
    with pytest.raises(VolumeError) as caught:
        load_nifti(tmp_path / "lost.nii")
    assert caught.value.code is Code.NO_GEOMETRY
    whole = save(tmp_path / "cut.nii", torso(), np.eye(4)).read_bytes()
    (tmp_path / "cut.nii").write_bytes(whole[:-500])
    with pytest.raises(VolumeError) as caught:
        load_nifti(tmp_path / "cut.nii")
    assert caught.value.code is Code.PIXELS_UNREADABLE


def test_a_real_mr_is_refused_and_a_real_ct_read(real_data: Path) -> None:
    folder = real_data / "totalsegmentator-example-ct"
    with pytest.raises(VolumeError) as caught:
        load_nifti(folder / "neg-mr" / "example_mr_sm.nii.gz")
    assert caught.value.code is Code.NOT_HU
    volume: Volume = load_nifti(folder / "example_ct.nii.gz")
    assert volume.hu.shape == (112, 101, 122)
    labels = load_label_map(folder / "spine_report" / "test_result" / "totalseg.nii.gz", volume)
    heights = [(volume.affine @ [*np.argwhere(labels == label).mean(axis=0), 1])[2] for label in range(26, 34)]
    assert heights == sorted(heights)  # S1 lowest, T11 highest


def test_a_label_map_whose_grid_drifts_outwards_is_resampled(tmp_path: Path) -> None:
    """0.5 % of stretch is 1 mm at the far side of a 200 mm CT: not the same grid, however alike the affines look."""
    volume = Volume(np.zeros((4, 200, 200), np.float32), np.array(AXIAL_1_MM, dtype=np.float64))
    labels = np.zeros(volume.hu.shape, np.uint8)
    labels[1:3, 20:180, 20:180] = 31
    same, stretched = tmp_path / "same.nii.gz", tmp_path / "stretched.nii.gz"
    write_label_map(labels, volume, same)
    wider = volume.affine.copy()
    wider[:3, :3] *= 1.005
    write_label_map(labels, replace(volume, affine=wider), stretched)
    assert np.array_equal(load_label_map(same, volume), labels)
    found = load_label_map(stretched, volume)
    assert found.shape == labels.shape
    assert not np.array_equal(found, labels)
