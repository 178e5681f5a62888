"""CT attenuation of a vertebra: the paper's comparator, and what decides for real patients at first.

Definition (design page TRAPS.md; the paper's ROI is 100-150 mm2 by hand): the mean HU in an axial disc of
125 mm2, 5 mm thick, at the centroid of the vertebral *body* (pedicles and processes left out). The disc
lies in the scanner's axial plane and is moved by 3 mm along x, y and z to show how far the figure hangs
on where one looks: on a real case one L1 read 95-162 HU that way.
"""

from dataclasses import dataclass

import numpy as np

from models.crop import Floats, Labels, Vector, Vertebra, locate, sample_hu

ROI_MM2 = 125.0
DISC_MM = 5.0
SHIFT_MM = 3.0
# Of the disc, in the vertebra's outline; our choice. Digital patients have 1.0; on the real CT our own outline of L1
# has 0.87, and reads 0.8 HU more there than TotalSegmentator's, which has 1.0.
INSIDE_LEAST = 0.75
_STEP_MM = 0.5  # sampling of the disc: about 500 points a plane


@dataclass(frozen=True)
class Attenuation:
    """Mean HU of one vertebral body's disc, and how it changes with the disc's place."""

    hu_mean: float
    roi_mm2: float
    shift_range_hu: tuple[float, float]  # lowest and highest mean HU under the +-3 mm shifts
    inside: float  # share of the disc that lies in the vertebra's mask, 0..1
    centre_lps: tuple[float, float, float]  # mm


def disc_attenuation(
    hu: Floats, affine: Vector, labels: Labels, label_id: int, *, vertebra: Vertebra | None = None
) -> Attenuation:
    """Mean HU in the disc at the body's centroid; `vertebra` saves finding it again."""
    vertebra = vertebra or locate(labels, affine, label_id)
    centre = vertebra.body_centroid_lps
    disc = _disc_points()
    mean = float(sample_hu(hu, affine, centre + disc).mean())
    shifts = SHIFT_MM * np.concatenate([np.eye(3), -np.eye(3)])
    moved = [float(sample_hu(hu, affine, centre + shift + disc).mean()) for shift in shifts]
    inside = _share_inside(vertebra, affine, centre + disc)
    x, y, z = (float(value) for value in centre)
    return Attenuation(mean, ROI_MM2, (min(mean, *moved), max(mean, *moved)), inside, (x, y, z))


def _share_inside(vertebra: Vertebra, affine: Vector, points: Vector) -> float:
    """Share of LPS points [n, 3] whose nearest voxel belongs to the vertebra."""
    indices = (points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    nearest = np.rint(indices).astype(int) - [side.start for side in vertebra.box]
    fits = ((nearest >= 0) & (nearest < vertebra.mask.shape)).all(axis=1)
    return float(vertebra.mask[tuple(nearest[fits].T)].sum() / len(points))


def _disc_points() -> Vector:
    """Points [n, 3] mm of the disc around the origin, evenly spaced, in the axial plane."""
    radius = float(np.sqrt(ROI_MM2 / np.pi))
    line = np.arange(-radius, radius + 1e-9, _STEP_MM)
    line -= line.mean()
    planes = (np.arange(10) + 0.5) / 10 * DISC_MM - DISC_MM / 2
    x, y, z = (grid.ravel() for grid in np.meshgrid(line, line, planes, indexing="ij"))
    inside = x**2 + y**2 <= radius**2
    points: Vector = np.stack([x, y, z], axis=1)[inside]
    return points
