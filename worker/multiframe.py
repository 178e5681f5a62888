"""A multi-frame object's frames, one at a time: each as a single-frame image that the usual decoders and checks take.

Nothing but the frame in hand is held in memory: its bytes are found by their place in the file (PS3.5 A.4, 8.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import DeflatedExplicitVRLittleEndian

from service.dicom.elements import Encoding, read_head
from service.dicom.part10 import BoundedFile

PIXEL_DATA = 0x7FE00010
DESCRIPTION = (
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
)  # fmt: skip
OFFSETS = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")


class FramesError(ValueError):
    """The pixels are not as many frames as the header says; the text says what was found."""


def single_frames(path: Path) -> Iterator[Dataset]:
    """Every frame of a file, in frame order, as a data set of its own with `PixelData` and `file_meta`.

    Raises FramesError, and whatever pydicom raises for a broken file.
    """
    wanted = ["NumberOfFrames", *DESCRIPTION, *OFFSETS]
    with BoundedFile(path) as file:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted)
        frames = int(header.get("NumberOfFrames", None) or 1)
        syntax = header.file_meta.TransferSyntaxUID
        if syntax == DeflatedExplicitVRLittleEndian:  # no place in the file is a place in the data set
            raise FramesError("deflated multi-frame objects are not read")
        length, vr = _pixel_data(file, header)
        read = _encapsulated if syntax.is_encapsulated else _native
        contents = read(file, header, frames, length)
        for content in contents:
            yield _single(header, content, vr)


def _pixel_data(file: BinaryIO, header: Dataset) -> tuple[int, str]:
    """Read on to the value of Pixel Data; the value's length and its VR."""
    syntax = header.file_meta.TransferSyntaxUID
    element = read_head(file, Encoding(syntax.is_implicit_VR, syntax.is_little_endian))
    if element is None or element.tag != PIXEL_DATA:
        raise FramesError("there are no pixels")
    return element.length, "OW" if element.vr is None else element.vr.decode("ascii")


def _native(pixels: BinaryIO, header: Dataset, frames: int, length: int) -> Iterator[bytes]:
    size = (
        int(header.Rows) * int(header.Columns) * int(header.get("SamplesPerPixel", 1)) * int(header.BitsAllocated) // 8
    )
    if not frames * size <= length <= frames * size + 2:
        raise FramesError(f"{length} bytes of pixels, {frames} x {size} expected")
    for number in range(1, frames + 1):
        content = pixels.read(size)
        if len(content) < size:
            raise FramesError(f"it ends within frame {number}")
        yield content


def _encapsulated(pixels: BinaryIO, header: Dataset, frames: int, _length: int) -> Iterator[bytes]:
    offsets, lengths = (header.get(keyword) for keyword in OFFSETS)
    found = generate_frames(
        pixels, number_of_frames=frames, extended_offsets=(offsets, lengths) if offsets and lengths else None
    )
    count = 0
    for content in found:
        count += 1
        if count > frames:
            raise FramesError(f"more than {frames} frames of pixels")
        yield content
    if count < frames:
        raise FramesError(f"{count} frames of pixels, {frames} expected")


def _single(header: Dataset, content: bytes, vr: str) -> Dataset:
    one = Dataset()
    for keyword in DESCRIPTION:
        if keyword in header:
            one[keyword] = header[keyword]
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = header.file_meta.TransferSyntaxUID
    is_encapsulated = header.file_meta.TransferSyntaxUID.is_encapsulated
    one.PixelData = encapsulate([content], has_bot=False) if is_encapsulated else content
    one["PixelData"].VR = vr
    return one
