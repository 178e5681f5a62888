"""One enhanced CT -> the very Volume of the slices that it was made of; and what is refused, with its code."""

from __future__ import annotations

import copy
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels import pixel_array
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

from service.dicom.headers import read_facts
from service.domain.reasons import Code
from tests.conftest import absent
from tests.enhanced import as_file, enhanced, slices_of
from worker import volume as volume_module
from worker.multiframe import FramesError, single_frames
from worker.volume import PADDING_HU, Volume, VolumeError, load_dicom

J2K, HTJ2K, HTJ2K_RPCL = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202"
BY_DCMTK = {  # syntax -> the program that converts to it, frame by frame
    "1.2.840.10008.1.2": ("dcmconv", "+ti"),
    "1.2.840.10008.1.2.2": ("dcmconv", "+tb"),
    "1.2.840.10008.1.2.5": ("dcmcrle",),
    "1.2.840.10008.1.2.4.57": ("dcmcjpeg", "+el"),
    "1.2.840.10008.1.2.4.70": ("dcmcjpeg", "+e1"),
    "1.2.840.10008.1.2.4.80": ("dcmcjpls", "+el"),
}
Frames = NDArray[np.uint16]
Encode = Callable[[NDArray[np.uint16]], bytes]


@pytest.fixture(scope="module")
def slices(digital_study: Path) -> list[Dataset]:
    return slices_of(digital_study / "dicom", first=30, count=12, size=64)


@pytest.fixture(scope="module")
def plain(slices: list[Dataset], tmp_path_factory: pytest.TempPathFactory) -> Volume:
    """The single-frame series."""
    return load_dicom(saved(slices, tmp_path_factory.mktemp("plain")))


def saved(datasets: Sequence[Dataset], folder: Path) -> list[Path]:
    paths = [folder / f"{number:03d}.dcm" for number in range(len(datasets))]
    for dataset, path in zip(datasets, paths, strict=True):
        path.write_bytes(as_file(dataset))
    return paths


def loaded(dataset: Dataset, folder: Path) -> Volume:
    return load_dicom(saved([dataset], folder))


def refused(dataset: Dataset, folder: Path) -> Code:
    with pytest.raises(VolumeError) as caught:
        loaded(dataset, folder)
    return caught.value.code


def assert_same(one: Volume, other: Volume) -> None:
    assert np.array_equal(one.hu, other.hu)
    assert one.hu.dtype == other.hu.dtype == np.float32
    assert np.array_equal(one.affine, other.affine)
    assert one.frame_of_reference_uid == other.frame_of_reference_uid


def frames_of(dataset: Dataset) -> Frames:
    shape = (int(dataset.NumberOfFrames), int(dataset.Rows), int(dataset.Columns))
    return np.frombuffer(dataset.PixelData, dtype="<u2").reshape(shape)


def encoded(dataset: Dataset, syntax: str, encode: Encode, *, extended: bool = False) -> Dataset:
    made = copy.deepcopy(dataset)
    contents = [encode(frame) for frame in frames_of(dataset)]
    made.file_meta.TransferSyntaxUID = syntax
    if extended:
        made.PixelData, made.ExtendedOffsetTable, made.ExtendedOffsetTableLengths = encapsulate_extended(contents)
    else:
        made.PixelData = encapsulate(contents, fragments_per_frame=2, has_bot=syntax != J2K or len(contents) > 1)
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    return made


def j2k(frame: NDArray[np.uint16]) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(frame, level=0, reversible=True, codecformat="j2k", bitspersample=12))


def test_an_enhanced_ct_is_the_same_volume(slices: list[Dataset], plain: Volume, tmp_path: Path) -> None:
    made = enhanced(slices)
    volume = loaded(made, tmp_path)
    assert_same(volume, plain)
    assert set(volume.slice_uids) == {made.SOPInstanceUID}
    assert len(volume.slice_uids) == len(slices)


def test_the_order_of_the_frames_does_not_matter(slices: list[Dataset], plain: Volume, tmp_path: Path) -> None:
    assert_same(loaded(enhanced(random.Random(5).sample(slices, len(slices))), tmp_path), plain)


def test_a_legacy_converted_ct_is_the_same_volume(slices: list[Dataset], plain: Volume, tmp_path: Path) -> None:
    """As highdicom converts it: rescale and position stand in the frames, the rest among unassigned attributes."""
    made = LegacyConvertedEnhancedCTImage(slices, generate_uid(), 7, generate_uid(), 1)
    assert_same(loaded(made, tmp_path), plain)


def test_each_frame_has_its_own_rescale(slices: list[Dataset], tmp_path: Path) -> None:
    own = copy.deepcopy(slices)
    for number, one in enumerate(own):
        one.RescaleIntercept, one.RescaleSlope = str(-1024 + number), "1" if number % 2 else "0.5"
    (tmp_path / "plain").mkdir()
    expected = load_dicom(saved(own, tmp_path / "plain"))
    assert_same(loaded(enhanced(own[::-1]), tmp_path), expected)
    assert not np.array_equal(expected.hu[1] + 1024, expected.hu[0] + 1024)


def test_padding_of_frames_becomes_air(slices: list[Dataset], tmp_path: Path) -> None:
    def pad(made: Dataset) -> None:
        pixels = frames_of(made).copy()
        pixels[:, :3, :] = 4000
        made.PixelPaddingValue, made.PixelData = 4000, pixels.tobytes()

    volume = loaded(enhanced(slices, pad), tmp_path)
    assert (volume.hu[:, :3] == PADDING_HU).all()
    assert (volume.hu[:, 20:40, 20:40] > PADDING_HU).any()


@pytest.mark.parametrize("syntax", sorted(BY_DCMTK))
def test_dcmtk_converts_it_to_every_lossless_syntax(
    syntax: str, slices: list[Dataset], plain: Volume, tmp_path: Path
) -> None:
    (source,) = saved([enhanced(slices)], tmp_path)
    program, *options = BY_DCMTK[syntax]
    target = tmp_path / "converted.dcm"
    path = shutil.which(program) or absent(f"dcmtk's {program}")
    subprocess.run([path, *options, str(source), str(target)], check=True, capture_output=True)
    assert dcmread(target, stop_before_pixels=True).file_meta.TransferSyntaxUID == syntax
    assert_same(load_dicom([target]), plain)


@pytest.mark.parametrize("extended", [False, True], ids=["basic offset table", "extended offset table"])
@pytest.mark.parametrize("syntax", [J2K, HTJ2K, HTJ2K_RPCL])
def test_jpeg_2000_in_its_lossless_forms(
    syntax: str, extended: bool, slices: list[Dataset], plain: Volume, tmp_path: Path
) -> None:
    encode = j2k if syntax == J2K else imagecodecs.htj2k_encode
    assert_same(loaded(encoded(enhanced(slices), syntax, encode, extended=extended), tmp_path), plain)


# What is refused


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, J2K])
@pytest.mark.parametrize("wrong", [-1, 1])
def test_more_or_fewer_frames_of_pixels_than_positions(
    syntax: str, wrong: int, slices: list[Dataset], tmp_path: Path
) -> None:
    made = enhanced(slices)
    pixels = np.concatenate([frames_of(made), frames_of(made)])[: len(slices) + wrong]
    if syntax == ExplicitVRLittleEndian:
        made.PixelData = pixels.tobytes()
    else:
        made.NumberOfFrames, made.PixelData = len(pixels), pixels.tobytes()
        made = encoded(made, syntax, j2k) if syntax == J2K else _by_pydicom(made, syntax)
        made.NumberOfFrames = len(slices)
    assert refused(made, tmp_path) is Code.PIXELS_UNREADABLE


def _by_pydicom(made: Dataset, syntax: str) -> Dataset:
    again = dcmread(BytesIO(as_file(made)))
    again.compress(syntax, generate_instance_uid=False)
    return again


def test_a_frame_that_announces_another_size_is_never_decoded(slices: list[Dataset], tmp_path: Path) -> None:
    made = encoded(enhanced(slices), J2K, j2k)
    position = made.PixelData.rindex(b"\xff\x4f\xff\x51")
    bomb = (100_000).to_bytes(4, "big") * 2
    made.PixelData = made.PixelData[: position + 8] + bomb + made.PixelData[position + 16 :]
    assert refused(made, tmp_path) is Code.PIXELS_UNREADABLE


def test_a_file_that_was_cut_off(slices: list[Dataset], tmp_path: Path) -> None:
    (path,) = saved([enhanced(slices)], tmp_path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(VolumeError) as caught:
        load_dicom([path])
    assert caught.value.code is Code.PIXELS_UNREADABLE


def test_sizes_are_checked_before_anything_is_decoded(
    slices: list[Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_module, "single_frames", _never)
    monkeypatch.setattr(volume_module, "MAX_VOXELS", 12 * 64 * 64 - 1)
    assert refused(enhanced(slices), tmp_path) is Code.TOO_MANY_SLICES
    monkeypatch.setattr(volume_module, "MAX_SLICES", 11)
    assert refused(enhanced(slices), tmp_path) is Code.TOO_MANY_SLICES


def _never(_path: Path) -> Any:
    raise AssertionError("the pixels must not be looked at")


def _group(dataset: Dataset, frame: int, macro: str) -> Dataset:
    item: Dataset = dataset.PerFrameFunctionalGroupsSequence[frame][macro].value[0]
    return item


def _drop_position(made: Dataset) -> None:
    del _group(made, 3, "PlanePositionSequence").ImagePositionPatient


def _drop_rescale(made: Dataset) -> None:
    del made.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence


def _same_position(made: Dataset) -> None:
    _group(made, 3, "PlanePositionSequence").ImagePositionPatient = _group(
        made, 4, "PlanePositionSequence"
    ).ImagePositionPatient


def _lossy(made: Dataset) -> None:
    made.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.50"
    made.PixelData = encapsulate([b"\xff\xd8\xff\xd9"] * int(made.NumberOfFrames))
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (_drop_position, Code.NO_GEOMETRY),
        (_drop_rescale, Code.NO_RESCALE),
        (_same_position, Code.DUPLICATE_POSITION),
        (_lossy, Code.LOSSY),
        (lambda made: setattr(made, "ConcatenationUID", "1.2.3"), Code.CONCATENATION),
        (lambda made: setattr(made, "Modality", "MR"), Code.NOT_CT),
    ],
)
def test_what_makes_no_volume_is_refused_with_its_code(
    edit: Callable[[Dataset], None], code: Code, slices: list[Dataset], tmp_path: Path
) -> None:
    assert refused(enhanced(slices, edit), tmp_path) is code


def test_two_enhanced_objects_are_not_one_volume(slices: list[Dataset], tmp_path: Path) -> None:
    with pytest.raises(VolumeError) as caught:
        load_dicom(saved([enhanced(slices[:6]), enhanced(slices[6:])], tmp_path))
    assert caught.value.code is Code.MULTIFRAME_UNSUPPORTED


def test_a_deflated_object_is_refused(slices: list[Dataset], tmp_path: Path) -> None:
    """Never accepted at the door: it can expand without bound."""
    (source,) = saved([enhanced(slices)], tmp_path)
    target = tmp_path / "deflated.dcm"
    subprocess.run([shutil.which("dcmconv") or absent("dcmconv"), "+td", str(source), str(target)], check=True)
    with pytest.raises(VolumeError) as caught:
        load_dicom([target])
    assert caught.value.code is Code.UNREADABLE
    with pytest.raises(FramesError, match="deflated"):
        next(single_frames(target))


def test_the_frames_of_a_real_legacy_converted_ct(real_data: Path) -> None:
    """Three slices, as single frames and as others converted them; neither claims to hold HU."""
    for folder in ("23x38x3", "24x38x3"):
        case = real_data / "dcmqi-ct3slice" / folder
        plain = sorted((dcmread(path) for path in (case / "image").glob("*.dcm")), key=_height)
        frames = [pixel_array(one, raw=True) for one in single_frames(case / "multiframe" / "mf.dcm")]
        places = [facts.position_lps_mm for facts in read_facts(case / "multiframe" / "mf.dcm").per_frame()]
        ordered = [frames[k] for k in np.argsort([place[2] for place in places if place is not None])]
        assert len(ordered) == len(plain) == 3
        for frame, one in zip(ordered, plain, strict=True):
            assert np.array_equal(frame, pixel_array(one, raw=True))
        with pytest.raises(VolumeError) as caught:
            load_dicom([case / "multiframe" / "mf.dcm"])
        assert caught.value.code is Code.NOT_HU


def _height(dataset: Dataset) -> float:
    return float(dataset.ImagePositionPatient[2])
