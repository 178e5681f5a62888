"""Volume and labels -> one vertebra's own frame, its body, and the sagittal slabs that the network sees.

After Yoshida 2023 (design page PAPER.md): of each of L1-L4 a sagittal slab through the middle of the
vertebra, 5 mm thick, 300 x 300 mm, 256 x 256 pixels, masked to that vertebra; for training also the
slabs 5 mm to either side. Here SLABS of them, which hold the whole vertebra. "The middle" belongs to
the vertebra, not to the image: a rotated or tilted vertebra is cut along its own mirror plane.

Geometry is LPS millimetres. Volumes are [k, j, i]; `affine` (4 x 4) maps (k, j, i, 1) to (x, y, z, 1).
The frame is found on the label map only, in four steps that need no training:

1. the bulkiest spot of the mask lies in the vertebral body (posterior elements are thin);
2. planes through both endplates give the superior axis (a wedge gives the mean of the two);
3. the mirror symmetry of the whole vertebra gives the left-right axis and the midplane;
4. the first gap behind the body, in the midplane, is the spinal canal: a line through the gap's near
   edge is the posterior wall, and the body is what lies in front of it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage, optimize

Floats = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Labels = npt.NDArray[Any]
Box = tuple[slice, slice, slice]

OUTSIDE_HU = -1024.0  # what a masked slab holds outside its vertebra: air
THICKNESS_MM = 5.0  # Yoshida 2023
FOV_MM = 300.0  # Yoshida 2023
SIZE_PX = 256  # Yoshida 2023, after their resize
PIXEL_MM = FOV_MM / SIZE_PX
SLABS = 9  # 45 mm: a lumbar vertebra with its pedicles and facet joints; Yoshida 2023 has 3 at most

_WORK_MM = 1.5  # isotropic grid for finding the frame; half a voxel of a 3 mm CT
_BULK_SIGMA_MM = 6.0  # blur whose maximum is the body: a body is about 27 mm high, a pedicle 8-15 mm
_MIN_VOLUME_MM3 = 4_000.0  # a lumbar vertebra has 40,000-90,000 mm3; below a tenth there is no frame
_CANAL_HALF_WIDTH_MM = 7.5  # strip around the midplane; the lumbar canal is about 22 mm wide
_WALL_PERCENTILE = 75.0  # of the wall's depth from side to side
_MAX_WALL_MM = 32.0  # from the body's middle to its posterior wall: never more (deepest L5 about 20 mm)


class VertebraError(ValueError):
    """The label map does not hold a vertebra from which a frame can be read."""


@dataclass(frozen=True)
class VertebraFrame:
    """A right-handed frame of one vertebra: unit vectors in LPS, origin in the body, on the midplane."""

    centre_lps: Vector  # [3] mm
    left: Vector  # [3] unit
    posterior: Vector  # [3] unit
    superior: Vector  # [3] unit

    @property
    def right(self) -> Vector:
        return -self.left

    @property
    def anterior(self) -> Vector:
        return -self.posterior

    @property
    def axes(self) -> Vector:
        """[3, 3]: rows are left, posterior, superior."""
        return np.stack([self.left, self.posterior, self.superior])

    def to_lps(self, points: Vector) -> Vector:
        """(left, posterior, superior) mm [..., 3] -> LPS mm [..., 3]."""
        lps: Vector = points @ self.axes + self.centre_lps
        return lps

    def from_lps(self, points: Vector) -> Vector:
        """LPS mm [..., 3] -> (left, posterior, superior) mm [..., 3]."""
        local: Vector = (points - self.centre_lps) @ self.axes.T
        return local


@dataclass(frozen=True)
class Vertebra:
    """One vertebra found in a label map: its frame, and its body apart from its posterior elements."""

    label_id: int
    frame: VertebraFrame
    box: Box  # where it lies in the volume, [k, j, i]
    mask: Bools  # whole vertebra inside the box
    body: Bools  # vertebral body inside the box
    body_centroid_lps: Vector  # [3] mm
    symmetry: float  # 0..1, share of the vertebra that its mirror image covers


@dataclass(frozen=True)
class SagittalSlabs:
    """Parallel slabs of one vertebra, from its right to its left; rows go down, columns go back."""

    hu: Floats  # [n, size, size] HU, OUTSIDE_HU where the mask is False
    mask: Bools  # [n, size, size]
    offsets_mm: tuple[float, ...]  # of each slab from the midplane, left positive
    pixel_mm: float
    frame: VertebraFrame

    @property
    def middle(self) -> int:
        return len(self.offsets_mm) // 2


def body_frame(labels: Labels, affine: Vector, label_id: int) -> VertebraFrame:
    """The vertebra's own frame."""
    return locate(labels, affine, label_id).frame


def body_mask(labels: Labels, affine: Vector, label_id: int) -> Bools:
    """The vertebral body [k, j, i] without pedicles, arch and processes."""
    vertebra = locate(labels, affine, label_id)
    whole = np.zeros(labels.shape, dtype=np.bool_)
    whole[vertebra.box] = vertebra.body
    return whole


def locate(labels: Labels, affine: Vector, label_id: int) -> Vertebra:
    """Find one vertebra: see the four steps at the top of this file."""
    box = _bounding_box(labels, label_id)
    mask: Bools = labels[box] == label_id
    volume_mm3 = float(mask.sum()) * abs(float(np.linalg.det(affine[:3, :3])))
    if volume_mm3 < _MIN_VOLUME_MM3:
        raise VertebraError(f"label {label_id}: {volume_mm3:.0f} mm3 is too little for a vertebra")
    work = _WorkMask.of(mask, _shifted(affine, box))

    superior = _tangent(labels, affine, label_id, box)
    frame = _first_frame(work, superior)
    for _ in range(2):
        frame = _level_to_endplates(work, frame)
    frame, symmetry = _mirror(work, frame)
    frame = _level_to_endplates(work, frame)
    wall = _posterior_wall(work, frame)

    body = _body_in_box(mask, _shifted(affine, box), frame, wall)
    centroid = _apply(_shifted(affine, box), np.argwhere(body).mean(axis=0))
    local = frame.from_lps(centroid)
    centre = frame.to_lps(np.array([0.0, local[1], local[2]]))  # keep the midplane, move to the body's middle
    frame = VertebraFrame(centre, frame.left, frame.posterior, frame.superior)
    return Vertebra(label_id, frame, box, mask, body, centroid, symmetry)


def sagittal_slabs(
    hu: Floats,
    affine: Vector,
    labels: Labels,
    label_id: int,
    *,
    n: int = 3,
    thickness_mm: float = THICKNESS_MM,
    fov_mm: float = FOV_MM,
    size_px: int = SIZE_PX,
    vertebra: Vertebra | None = None,
) -> SagittalSlabs:
    """`n` adjoining slabs around the vertebra's midplane, HU averaged over the mask within each slab.

    Each slab is the mean of parallel sub-planes about 1 mm apart. Mask and masked HU are interpolated alike
    and divided, so that only the vertebra's own voxels count: interpolation never draws in disc or fat.
    """
    vertebra = vertebra or locate(labels, affine, label_id)
    frame, pixel_mm = vertebra.frame, fov_mm / size_px
    offsets = tuple((index - n // 2) * thickness_mm for index in range(n))
    rows, columns = _window(vertebra, affine, pixel_mm, size_px)
    planes = max(1, round(thickness_mm))
    inner = (np.arange(planes) + 0.5) / planes * thickness_mm - thickness_mm / 2
    lateral = (np.array(offsets)[:, None] + inner).ravel()  # [n * planes] mm

    points = _plane_points(frame, lateral, rows, columns, pixel_mm, size_px)
    box = _grown(vertebra.box, labels.shape, 1)
    indices = _apply(_inverse(_shifted(affine, box)), points)  # [n*planes, r, c, 3]
    mask = (labels[box] == label_id).astype(np.float32)
    weights = _sample(mask, indices, 0.0)
    weighted = _sample(np.asarray(hu[box], dtype=np.float32) * mask, indices, 0.0)

    shape = (n, planes, *weights.shape[1:])
    total = weights.reshape(shape).sum(axis=1)
    inside = total >= 0.5 * planes
    mean = weighted.reshape(shape).sum(axis=1) / np.maximum(total, 1e-6)

    slab_hu = np.full((n, size_px, size_px), OUTSIDE_HU, dtype=np.float32)
    slab_mask = np.zeros(slab_hu.shape, dtype=np.bool_)
    slab_hu[:, rows, columns] = np.where(inside, mean, OUTSIDE_HU)
    slab_mask[:, rows, columns] = inside
    return SagittalSlabs(slab_hu, slab_mask, offsets, pixel_mm, frame)


def sagittal_context(
    hu: Floats,
    affine: Vector,
    frame: VertebraFrame,
    *,
    thickness_mm: float = THICKNESS_MM,
    fov_mm: float = FOV_MM,
    size_px: int = SIZE_PX,
) -> Floats:
    """The middle slab [size, size] HU with everything around the vertebra: for people to look at."""
    inner = (np.arange(3) + 0.5) / 3 * thickness_mm - thickness_mm / 2
    everything = slice(0, size_px)
    points = _plane_points(frame, inner, everything, everything, fov_mm / size_px, size_px)
    mean: Floats = sample_hu(hu, affine, points).mean(axis=0)
    return mean


def sample_hu(hu: Floats, affine: Vector, points: Vector) -> Floats:
    """Linearly interpolated HU at LPS points [..., 3] mm; only the part of the volume around them is read."""
    indices = _apply(_inverse(affine), points)
    flat = indices.reshape(-1, 3)
    low = np.maximum(np.floor(flat.min(axis=0)).astype(int) - 1, 0)
    high = np.minimum(np.ceil(flat.max(axis=0)).astype(int) + 2, hu.shape)
    if bool((high <= low).any()):
        return np.full(points.shape[:-1], OUTSIDE_HU, dtype=np.float32)
    part = np.asarray(hu[low[0] : high[0], low[1] : high[1], low[2] : high[2]], dtype=np.float32)
    return _sample(part, indices - low, OUTSIDE_HU)


# ---------------------------------------------------------------------------------------------------
# Arrays and points


def _bounding_box(labels: Labels, label_id: int) -> Box:
    """The label's bounding box; a volume is scanned slice by slice so that no 80 MB mask is made."""
    slices = [k for k in range(labels.shape[0]) if bool((labels[k] == label_id).any())]
    if not slices:
        raise VertebraError(f"label {label_id} is not in the label map")
    k = slice(slices[0], slices[-1] + 1)
    flat = (labels[k] == label_id).any(axis=0)  # [j, i]
    j, i = np.flatnonzero(flat.any(axis=1)), np.flatnonzero(flat.any(axis=0))
    return k, slice(int(j[0]), int(j[-1]) + 1), slice(int(i[0]), int(i[-1]) + 1)


def _grown(box: Box, shape: tuple[int, ...], voxels: int) -> Box:
    k, j, i = (
        slice(max(0, side.start - voxels), min(size, side.stop + voxels)) for side, size in zip(box, shape, strict=True)
    )
    return k, j, i


def _shifted(affine: Vector, box: Box) -> Vector:
    """The affine of the volume cut to `box`."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ [side.start for side in box]
    return moved


def _apply(affine: Vector, points: Vector) -> Vector:
    """Affine (4 x 4) applied to points [..., 3]."""
    moved: Vector = points @ affine[:3, :3].T + affine[:3, 3]
    return moved


def _inverse(affine: Vector) -> Vector:
    return np.asarray(np.linalg.inv(affine), dtype=np.float64)


def _sample(volume: Floats, indices: Vector, outside: float) -> Floats:
    """Linear interpolation of volume at fractional indices [..., 3] -> [...]."""
    coordinates = np.moveaxis(indices, -1, 0)
    sampled: Floats = ndimage.map_coordinates(
        volume, coordinates, order=1, mode="constant", cval=outside, output=np.float32
    )
    return sampled


def _unit(vector: Vector) -> Vector:
    unit: Vector = vector / np.linalg.norm(vector)
    return unit


def _frame(centre: Vector, superior: Vector, posterior: Vector) -> VertebraFrame:
    """A frame with exactly this superior axis; `posterior` is made perpendicular to it."""
    superior = _unit(superior)
    posterior = _unit(posterior - (posterior @ superior) * superior)
    return VertebraFrame(centre, np.cross(posterior, superior), posterior, superior)


# ---------------------------------------------------------------------------------------------------
# The frame


@dataclass(frozen=True)
class _WorkMask:
    """One vertebra's mask on an isotropic grid along x, y, z of LPS, slightly blurred."""

    density: Floats  # [x, y, z], 0..1
    origin: Vector  # [3] LPS mm of voxel (0, 0, 0)

    @classmethod
    def of(cls, mask: Bools, affine: Vector) -> "_WorkMask":
        corners = np.array(np.meshgrid(*[(0, size - 1) for size in mask.shape])).reshape(3, -1).T
        lps = _apply(affine, corners.astype(float))
        origin = lps.min(axis=0) - 4 * _WORK_MM
        shape = np.ceil((lps.max(axis=0) + 4 * _WORK_MM - origin) / _WORK_MM).astype(int) + 1
        inverse = _inverse(affine)
        density = ndimage.affine_transform(
            mask.astype(np.float32),
            inverse[:3, :3] * _WORK_MM,
            _apply(inverse, origin),
            output_shape=tuple(shape),
            order=1,
        )
        return cls(ndimage.gaussian_filter(density, 0.6), origin)

    def at(self, points: Vector) -> Floats:
        """Density at LPS points [..., 3]."""
        return _sample(self.density, (points - self.origin) / _WORK_MM, 0.0)

    def points(self) -> Vector:
        """LPS points [n, 3] of the voxels inside."""
        inside: Vector = np.argwhere(self.density > 0.5) * _WORK_MM + self.origin
        return inside


def _tangent(labels: Labels, affine: Vector, label_id: int, box: Box) -> Vector:
    """The spine's direction here from the neighbours' centroids; straight up where there is none."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    reach = [int(np.ceil(45.0 / mm)) for mm in spacing]
    around: Box = tuple(  # type: ignore[assignment]
        slice(max(0, side.start - grow), side.stop + grow) for side, grow in zip(box, reach, strict=True)
    )
    stride = tuple(max(1, int(2.0 // mm)) for mm in spacing)
    nearby = labels[around][:: stride[0], :: stride[1], :: stride[2]]
    step = affine[:3, :3] * stride
    centroids = {}
    for neighbour in (label_id + 1, label_id, label_id - 1):  # TotalSegmentator: ids rise towards the head
        found = np.argwhere(nearby == neighbour)
        if len(found) >= 20 and 27 <= neighbour <= 33:
            centroids[neighbour] = step @ found.mean(axis=0)
    up = np.array([0.0, 0.0, 1.0])
    if len(centroids) < 2:
        return up
    tangent = _unit(centroids[max(centroids)] - centroids[min(centroids)])
    return tangent if tangent @ up > 0.5 else up


def _first_frame(work: _WorkMask, superior: Vector) -> VertebraFrame:
    """Origin at the bulkiest spot, posterior towards what sticks out of it."""
    bulk = ndimage.gaussian_filter(work.density, _BULK_SIGMA_MM / _WORK_MM)
    core = np.argwhere(bulk > 0.9 * bulk.max()).mean(axis=0) * _WORK_MM + work.origin
    back = np.array([0.0, 1.0, 0.0])
    tail = work.points().mean(axis=0) - core
    tail -= (tail @ superior) * superior
    looks_back = np.linalg.norm(tail) > 3.0 and _unit(tail) @ back > 0.5
    return _frame(core, superior, tail if looks_back else back)


def _level_to_endplates(work: _WorkMask, frame: VertebraFrame) -> VertebraFrame:
    """Turn the superior axis to the mean normal of both endplates and centre between them."""
    across = np.arange(-12.0, 12.1, 3.0)
    along = np.arange(-9.0, 9.1, 3.0)
    up = np.arange(0.0, 30.1, 1.0)
    left, posterior = (grid.ravel() for grid in np.meshgrid(across, along, indexing="ij"))
    slopes, tops = [], []
    for sign in (1.0, -1.0):
        local = np.empty((left.size, up.size, 3))
        local[..., 0], local[..., 1], local[..., 2] = left[:, None], posterior[:, None], sign * up
        density = work.at(frame.to_lps(local))
        height = sign * _first_fall(density, up)
        plane = _robust_plane(left, posterior, height)
        if plane is None:
            return frame
        tops.append(plane[0])
        slopes.append(plane[1:])
    slope = np.clip(np.mean(slopes, axis=0), -0.6, 0.6)  # at most 31 degrees a step
    superior = _unit(np.array([-slope[0], -slope[1], 1.0])) @ frame.axes
    centre = frame.to_lps(np.array([0.0, 0.0, float(np.mean(tops))]))
    return _frame(centre, superior, frame.posterior)


def _first_fall(density: Floats, distance: Vector) -> Vector:
    """Where each row of density [n, m] first falls below one half, interpolated; NaN where it does not."""
    below = density < 0.5
    index = below.argmax(axis=1)
    found = below.any(axis=1) & (index > 0)
    rows = np.arange(len(density))
    inner, outer = density[rows, np.maximum(index - 1, 0)], density[rows, index]
    share = (inner - 0.5) / np.maximum(inner - outer, 1e-6)
    fall = distance[np.maximum(index - 1, 0)] + share * (distance[1] - distance[0])
    return np.where(found, fall, np.nan)


def _robust_plane(x: Vector, y: Vector, z: Vector) -> Vector | None:
    """(a, b, c) of z = a + b x + c y, fitted twice, the second time without the worst quarter."""
    keep = np.isfinite(z)
    if keep.sum() < 12:
        return None
    design = np.stack([np.ones_like(x), x, y], axis=1)
    first = np.linalg.lstsq(design[keep], z[keep], rcond=None)[0]
    residual = np.abs(z - design @ first)
    keep &= residual <= np.nanquantile(residual, 0.75)
    return np.asarray(np.linalg.lstsq(design[keep], z[keep], rcond=None)[0], dtype=np.float64)


def _mirror(work: _WorkMask, frame: VertebraFrame) -> tuple[VertebraFrame, float]:
    """Turn about the superior axis and shift sideways until the vertebra mirrors onto itself."""
    smooth = _WorkMask(ndimage.gaussian_filter(work.density, 1.0), work.origin)
    points = work.points()
    points = points[:: max(1, len(points) // 2500)]

    def turned(yaw: float, shift: float) -> VertebraFrame:
        left = np.cos(yaw) * frame.left + np.sin(yaw) * frame.posterior
        centre = frame.centre_lps + shift * left
        return VertebraFrame(centre, left, np.cross(frame.superior, left), frame.superior)

    def covered(yaw: float, shift: float) -> float:
        plane = turned(yaw, shift)
        distance = (points - plane.centre_lps) @ plane.left
        return float(smooth.at(points - 2 * distance[:, None] * plane.left).mean())

    coarse = max(
        ((np.deg2rad(yaw), shift) for yaw in range(-24, 25, 6) for shift in (-4.0, 0.0, 4.0)),
        key=lambda guess: covered(*guess),
    )
    found = optimize.minimize(
        lambda guess: -covered(guess[0], guess[1]),
        coarse,
        method="Nelder-Mead",
        options={
            "initial_simplex": np.array(coarse) + np.array([[0.0, 0.0], [0.06, 0.0], [0.0, 2.0]]),
            "xatol": 2e-3,
            "fatol": 1e-5,
            "maxiter": 40,
        },
    )
    return turned(*found.x), float(-found.fun)


def _posterior_wall(work: _WorkMask, frame: VertebraFrame) -> tuple[float, float]:
    """(a, b): the posterior wall is at a + b * s mm behind the origin, s mm above it.

    The wall is concave from side to side, so the deepest part of it at each height is not the midline's.
    """
    across = np.arange(-_CANAL_HALF_WIDTH_MM, _CANAL_HALF_WIDTH_MM + 0.1, 1.5)
    back = np.arange(0.0, _MAX_WALL_MM + 0.1, 1.0)
    up = np.arange(-9.0, 9.1, 1.5)
    local = np.stack(np.meshgrid(up, back, across, indexing="ij")[::-1], axis=-1)  # [s, p, l, (l, p, s)]
    density = np.moveaxis(work.at(frame.to_lps(local)), 1, 2)  # [s, l, p]
    falls = _first_fall(density.reshape(-1, back.size), back).reshape(up.size, across.size)
    seen = np.isfinite(falls).mean(axis=1) >= 0.5
    wall = np.full(up.size, np.nan)
    wall[seen] = np.nanpercentile(falls[seen], _WALL_PERCENTILE, axis=1)
    keep = np.isfinite(wall)
    if keep.sum() < 4:
        return _MAX_WALL_MM * 0.6, 0.0  # no canal in this mask: cut at a body's usual depth
    keep &= np.abs(wall - np.nanmedian(wall)) <= 4.0
    slope, offset = np.polyfit(up[keep], wall[keep], 1) if keep.sum() >= 4 else (0.0, np.nanmedian(wall))
    return float(offset), float(np.clip(slope, -0.5, 0.5))


def _body_in_box(mask: Bools, affine: Vector, frame: VertebraFrame, wall: tuple[float, float]) -> Bools:
    """The part of the mask in front of the posterior wall, in one piece."""
    voxels = np.argwhere(mask)
    local = frame.from_lps(_apply(affine, voxels.astype(float)))
    front = voxels[local[:, 1] <= wall[0] + wall[1] * local[:, 2]]
    body = np.zeros_like(mask)
    body[tuple(front.T)] = True
    pieces, count = ndimage.label(body)
    if count > 1:
        body = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    if not body.any():
        raise VertebraError("no vertebral body in front of the canal")
    return body


# ---------------------------------------------------------------------------------------------------
# The slabs


def _window(vertebra: Vertebra, affine: Vector, pixel_mm: float, size_px: int) -> tuple[slice, slice]:
    """Rows and columns of the slab that the vertebra can reach (the rest stays empty)."""
    corners = np.array(np.meshgrid(*[(s.start - 1, s.stop) for s in vertebra.box])).reshape(3, -1).T
    local = vertebra.frame.from_lps(_apply(affine, corners.astype(float)))
    middle = (size_px - 1) / 2
    low = np.floor(np.stack([-local[:, 2], local[:, 1]], axis=1).min(axis=0) / pixel_mm + middle)
    high = np.ceil(np.stack([-local[:, 2], local[:, 1]], axis=1).max(axis=0) / pixel_mm + middle) + 1
    rows, columns = (slice(int(max(0, a)), int(min(size_px, b))) for a, b in zip(low, high, strict=True))
    return rows, columns


def _plane_points(
    frame: VertebraFrame, lateral: Vector, rows: slice, columns: slice, pixel_mm: float, size_px: int
) -> Vector:
    """LPS points [len(lateral), rows, columns, 3]: rows downwards, columns backwards."""
    middle = (size_px - 1) / 2
    down = (np.arange(rows.start, rows.stop) - middle) * pixel_mm
    back = (np.arange(columns.start, columns.stop) - middle) * pixel_mm
    left, below, behind = np.meshgrid(lateral, down, back, indexing="ij")
    return frame.to_lps(np.stack([left, behind, -below], axis=-1))
