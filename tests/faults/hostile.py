"""Instances that no scanner made: cut, corrupt, with claims that would fill a machine, nested without end."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from pydicom.encaps import encapsulate

from service.dicom import syntaxes
from tests.faults.site import ct_dataset, ct_file, ct_study, part10
from tests.service.dicom.harness import ct_slice, encoded

LEVELS = 10_000
UNDEFINED = b"\xff\xff\xff\xff"
ITEM = b"\xfe\xff\x00\xe0"
ENDS = b"\xfe\xff\x0d\xe0" + bytes(4) + b"\xfe\xff\xdd\xe0" + bytes(4)
CONTRAST = b"\x18\x00\x12\x00SQ\x00\x00"  # ContrastBolusAgentSequence, which the door reads
PRIVATE = b"\x09\x00\x10\x10SQ\x00\x00"  # which nobody reads
SEGMENTS = b"\x62\x00\x02\x00SQ\x00\x00"  # SegmentSequence
PIXELS = b"\xe0\x7f\x10\x00OW\x00\x00"
RLE, JPEG_LOSSLESS, JPEG_LS, JPEG_2000 = (f"1.2.840.10008.1.2.{end}" for end in ("5", "4.70", "4.80", "4.90"))

SLICES = range(45)  # 135 mm
BAD = 30  # the slice of a study that is bad
MakeStudy = Callable[[Path, str], None]


# Nothing but bytes


def nested_without_lengths(head: bytes) -> bytes:
    """A sequence in a sequence in a sequence, none of which says where it ends before it does."""
    return (head + UNDEFINED + ITEM + UNDEFINED) * LEVELS + ENDS * LEVELS


def nested_with_lengths(head: bytes) -> bytes:
    """The same with every length told, from the inside out."""
    lengths = [20 * level for level in range(LEVELS)]  # of what lies within; an item's head is 8, a sequence's 12 bytes
    return b"".join(head + struct.pack("<L", within + 8) + ITEM + struct.pack("<L", within) for within in lengths[::-1])


def never_closed(head: bytes) -> bytes:
    """Nested, and then the bytes are over."""
    return (head + UNDEFINED + ITEM + UNDEFINED) * LEVELS


def empty_items(head: bytes) -> bytes:
    """A sequence of half a million empty items."""
    items = (ITEM + bytes(4)) * 500_000
    return head + struct.pack("<L", len(items)) + items


def giant_length(head: bytes) -> bytes:
    """A sequence that claims nearly 4 GiB."""
    return head + b"\xf0\xff\xff\xff" + ITEM + b"\xf0\xff\xff\xff"


def giant_item(head: bytes) -> bytes:
    """An item that claims nearly 4 GiB."""
    return head + UNDEFINED + ITEM + b"\xf0\xff\xff\xff"


def no_sequence(head: bytes) -> bytes:
    """Bytes where items belong."""
    return head + struct.pack("<L", 4096) + b"\xa5" * 4096


SEQUENCES = (
    nested_without_lengths,
    nested_with_lengths,
    never_closed,
    empty_items,
    giant_length,
    giant_item,
    no_sequence,
)


def inserted(dataset: bytes, sequence: bytes, *, before: bytes) -> bytes:
    """A data set with a sequence more, before the element that begins so."""
    place = dataset.index(before)
    return dataset[:place] + sequence + dataset[place:]


def ct_with(sequence: bytes, study: str) -> bytes:
    """The bad slice with a sequence more: one that the door reads, or a private one."""
    before = b"\x10\x00\x10\x00PN" if sequence.startswith(PRIVATE[:4]) else b"\x18\x00\x50\x00DS"
    return inserted(encoded(ct_dataset(study, BAD)), sequence, before=before)


# A CT study with one bad slice


def whole_but_one(folder: Path, study: str) -> Path:
    """A study, and the file of the one that is to be bad."""
    return ct_study(folder, study, SLICES)[BAD]


def half_the_pixels(folder: Path, study: str) -> None:
    whole_but_one(folder, study)
    ct_file(folder, study, BAD, PixelData=bytes(32 * 32))


def cut_off_in_the_pixels(folder: Path, study: str) -> None:
    bad = whole_but_one(folder, study)
    bad.write_bytes(bad.read_bytes()[:-700])


def giant_pixels(folder: Path, study: str) -> None:
    """A claim of nearly 4 GiB, and not even the slice's own pixels."""
    bad = whole_but_one(folder, study)
    content = bad.read_bytes()
    place = content.index(PIXELS) + len(PIXELS)
    bad.write_bytes(content[:place] + b"\xfe\xff\xff\xff" + content[place + 4 : -700])


def claims_60000_by_60000(folder: Path, study: str) -> None:
    """Every slice does, so that they agree with each other."""
    ct_study(folder, study, SLICES, Rows=60_000, Columns=60_000)


def claims_two_thousand_million_frames(folder: Path, study: str) -> None:
    whole_but_one(folder, study)
    ct_file(folder, study, BAD, NumberOfFrames="2147483647")


def claims_sixty_thousand_samples(folder: Path, study: str) -> None:
    whole_but_one(folder, study)
    ct_file(folder, study, BAD, SamplesPerPixel=60_000)


def compressed(folder: Path, study: str, syntax: str, stream: bytes) -> None:
    """The bad slice in a compressed syntax with this as its codestream."""
    whole_but_one(folder, study)
    header = encoded(ct_dataset(study, BAD, PixelData=None))
    pixels = b"\xe0\x7f\x10\x00OB\x00\x00" + UNDEFINED + encapsulate([stream]) + b"\xfe\xff\xdd\xe0" + bytes(4)
    part10(folder / f"{BAD + 1:04d}.dcm", header + pixels, f"{study}.4.{BAD + 1}", syntax=syntax)


def noise_as_jpeg_2000(folder: Path, study: str) -> None:
    compressed(folder, study, JPEG_2000, bytes(range(256)) * 4)


def bomb_of_jpeg_2000(folder: Path, study: str) -> None:
    """A codestream of a few bytes whose SIZ marker claims 60000 x 60000 pixels (ISO 15444-1 A.5.1)."""
    size = struct.pack(">HHLLLLLLLLH", 41, 0, 60_000, 60_000, 0, 0, 60_000, 60_000, 0, 0, 1) + b"\x0f\x01\x01"
    compressed(folder, study, JPEG_2000, b"\xff\x4f\xff\x51" + size + b"\xff\xd9")


def bomb_of_jpeg_lossless(folder: Path, study: str) -> None:
    """A frame header (SOF3) that claims 60000 x 60000 pixels (ITU T.81 B.2.2)."""
    frame = struct.pack(">HBHHB", 11, 16, 60_000, 60_000, 1) + b"\x01\x11\x00"
    compressed(folder, study, JPEG_LOSSLESS, b"\xff\xd8\xff\xc3" + frame + b"\xff\xd9")


def bomb_of_jpeg_ls(folder: Path, study: str) -> None:
    """A frame header (SOF55) that claims 60000 x 60000 pixels (ITU T.87 C.2.2)."""
    frame = struct.pack(">HBHHB", 11, 16, 60_000, 60_000, 1) + b"\x01\x11\x00"
    compressed(folder, study, JPEG_LS, b"\xff\xd8\xff\xf7" + frame + b"\xff\xd9")


def bomb_of_rle(folder: Path, study: str) -> None:
    """Two segments of a megabyte that would unfold to 64 (PS3.5 G.3)."""
    segment = b"\x81\x00" * 500_000
    compressed(folder, study, RLE, struct.pack("<16L", 2, 64, 64 + len(segment), *[0] * 13) + segment * 2)


def rle_with_wild_offsets(folder: Path, study: str) -> None:
    compressed(folder, study, RLE, struct.pack("<16L", 15, *[0xFFFFFFF0] * 15))


def header_nested(folder: Path, study: str) -> None:
    """Refused at the door, so that a slice is missing."""
    whole_but_one(folder, study)
    bad = ct_with(nested_without_lengths(CONTRAST), study)
    part10(folder / f"{BAD + 1:04d}.dcm", bad, f"{study}.4.{BAD + 1}")


BAD_STUDIES: dict[MakeStudy, set[str]] = {
    half_the_pixels: {"PIXELS_UNREADABLE"},
    cut_off_in_the_pixels: {"PIXELS_UNREADABLE", "UNREADABLE"},
    giant_pixels: {"PIXELS_UNREADABLE", "UNREADABLE"},
    claims_60000_by_60000: {"TOO_MANY_SLICES", "PIXELS_UNREADABLE"},
    claims_two_thousand_million_frames: {"MULTIFRAME_UNSUPPORTED"},
    claims_sixty_thousand_samples: {"NOT_HU"},
    noise_as_jpeg_2000: {"PIXELS_UNREADABLE"},
    bomb_of_jpeg_2000: {"PIXELS_UNREADABLE"},
    bomb_of_jpeg_lossless: {"PIXELS_UNREADABLE"},
    bomb_of_jpeg_ls: {"PIXELS_UNREADABLE"},
    bomb_of_rle: {"PIXELS_UNREADABLE"},
    rle_with_wild_offsets: {"PIXELS_UNREADABLE"},
    header_nested: {"MISSING_SLICE"},
}
"""How each kind of bad study is made, and the reasons of which one must stand beside it."""


# Segmentations


def segmentation(path: Path, study: str, number: int, sequence: bytes) -> Path:
    """A SEG on the study's CT whose SegmentSequence is these bytes."""
    header = ct_slice(
        SOPClassUID=syntaxes.SEGMENTATION_STORAGE,
        SOPInstanceUID=f"{study}.66.{number}",
        StudyInstanceUID=study,
        SeriesInstanceUID=f"{study}.6.{number}",
        FrameOfReferenceUID=f"{study}.5",
        Modality="SEG",
    )
    dataset = inserted(encoded(header), sequence, before=PIXELS[:6])
    return part10(path, dataset, f"{study}.66.{number}", sop_class=syntaxes.SEGMENTATION_STORAGE)
