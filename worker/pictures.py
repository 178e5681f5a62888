"""The pictures of a result: each vertebra's sagittal slab with its mask outlined, and the spine seen from two sides.

For people only: nothing is measured on them. Written once by the worker, served as files by the web process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from models.crop import Vertebra, sagittal_context, sagittal_slabs
from worker.volume import Volume

Image = npt.NDArray[np.uint8]  # [rows, columns, 3] BGR
Floats = npt.NDArray[np.float32]

BONE_WINDOW_HU = (-160.0, 440.0)  # soft tissue stays readable beside bone
CROP_FOV_MM = 110.0  # enough to see the neighbours; the network's own field is 300 mm
CROP_PX = 440
OVERLAY_MM = 0.8  # pixel size of the overviews
COLOURS = {  # BGR, one per level, the same on every picture
    32: (170, 170, 170),
    31: (80, 175, 255),
    30: (120, 220, 120),
    29: (255, 190, 90),
    28: (200, 130, 255),
    27: (150, 150, 230),
    26: (150, 150, 150),
    25: (130, 130, 130),
}


def write(
    folder: Path, volume: Volume, labels: npt.NDArray[np.uint8], found: Sequence[tuple[str, Vertebra]]
) -> list[Path]:
    """Write `crop-L1.png` .. and both overviews into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Image] = {
        f"crop-{level}.png": crop_picture(volume, labels, vertebra) for level, vertebra in found
    }
    pictures["overlay-sagittal.png"] = overview(volume, labels, found, axis=2)
    pictures["overlay-coronal.png"] = overview(volume, labels, found, axis=1)
    return [_save(folder / name, image) for name, image in pictures.items()]


def crop_picture(volume: Volume, labels: npt.NDArray[np.uint8], vertebra: Vertebra) -> Image:
    """The vertebra's middle slab with its surroundings, the mask outlined."""
    pixels = {"fov_mm": CROP_FOV_MM, "size_px": CROP_PX}
    context = sagittal_context(volume.hu, volume.affine, vertebra.frame, **pixels)  # type: ignore[arg-type]
    slab = sagittal_slabs(
        volume.hu,
        volume.affine,
        labels,
        vertebra.label_id,
        n=1,
        vertebra=vertebra,
        **pixels,  # type: ignore[arg-type]
    )
    picture = _grey(context)
    _outline(picture, slab.mask[0], COLOURS.get(vertebra.label_id, (80, 175, 255)), thickness=2)
    return picture


def overview(
    volume: Volume, labels: npt.NDArray[np.uint8], found: Sequence[tuple[str, Vertebra]], *, axis: int
) -> Image:
    """One plane of the whole CT through the middle of the vertebrae: axis 2 sagittal, axis 1 coronal.

    A flat plane cuts a curved spine off-centre; the crops follow each vertebra, this shows the whole.
    """
    index = _plane_index(volume, labels, found, axis)
    hu = np.take(volume.hu, index, axis=axis)
    mask = np.take(labels, index, axis=axis)
    row_mm = volume.spacing_mm[0]
    column_mm = volume.spacing_mm[1 if axis == 2 else 2]
    size = (
        max(1, round(hu.shape[1] * column_mm / OVERLAY_MM)),
        max(1, round(hu.shape[0] * row_mm / OVERLAY_MM)),
    )
    grey = cv2.resize(np.ascontiguousarray(hu), size, interpolation=cv2.INTER_LINEAR)
    drawn = cv2.resize(np.ascontiguousarray(mask), size, interpolation=cv2.INTER_NEAREST)
    if volume.affine[2, 0] > 0:  # slices run upwards: put the head at the top
        grey, drawn = grey[::-1], drawn[::-1]
    picture = _grey(np.ascontiguousarray(grey, dtype=np.float32))
    drawn = np.ascontiguousarray(drawn)
    for label_id, colour in COLOURS.items():
        _outline(picture, drawn == label_id, colour)
    names = {vertebra.label_id: level for level, vertebra in found}
    for label_id, name in names.items():
        _write_name(picture, drawn == label_id, name, COLOURS[label_id])
    return picture


def _plane_index(
    volume: Volume, labels: npt.NDArray[np.uint8], found: Sequence[tuple[str, Vertebra]], axis: int
) -> int:
    if not found:
        return int(volume.hu.shape[axis]) // 2
    centre = np.mean([vertebra.body_centroid_lps for _, vertebra in found], axis=0)
    inverse = np.linalg.inv(volume.affine)
    index = round(float((inverse[:3, :3] @ centre + inverse[:3, 3])[axis]))
    return int(np.clip(index, 0, volume.hu.shape[axis] - 1))


def _grey(hu: Floats) -> Image:
    low, high = BONE_WINDOW_HU
    grey = np.clip((hu - low) / (high - low) * 255.0, 0, 255).astype(np.uint8)
    return np.asarray(cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), dtype=np.uint8)


def _outline(picture: Image, mask: npt.NDArray[np.bool_], colour: tuple[int, int, int], *, thickness: int = 1) -> None:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, colour, thickness, cv2.LINE_AA)


def _write_name(picture: Image, mask: npt.NDArray[np.bool_], name: str, colour: tuple[int, int, int]) -> None:
    rows, columns = np.nonzero(mask)
    if rows.size == 0:
        return
    place = (int(columns.min()) - 30, int(rows.mean()) + 5)
    cv2.putText(picture, name, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA)


def _save(path: Path, image: Any) -> Path:
    if not cv2.imwrite(str(path), image):
        raise OSError(f"could not write {path}")
    return path
