"""The skeleton as soft implicit shapes: vertebrae, sacrum, iliac wings and ribs, with cortex and texture.

Cortical shells are effective ones (about 0.8 mm round bodies, 2 mm behind, at 960 mg/cm3): they stand for
cortex and the dense bone under it, so that areal density comes out as Lunar reports it. Approximation: the shell alone
measures about 0.35 mm (Silva 1994, see SOURCES.md).
Proportions of posterior elements are an approximation after Panjabi 1992 and Berry 1987.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from models.phantom.anatomy import LABELS, Patient, Texture, Vertebra
from models.phantom.geometry import Frame, Rod, box_window, soft
from models.phantom.grid import Array, Grid, Vec3, Window
from models.phantom.lesions import condense

LATTICE = 64  # mm and nodes: period of the trabecular texture


@dataclass
class Skeleton:
    """Mineral (mg/cm3), share of each voxel that is bone (0..1) and labels, on one grid."""

    grid: Grid
    mineral: Array
    bone: Array
    labels: np.typing.NDArray[np.uint8]

    @classmethod
    def empty(cls, grid: Grid) -> Skeleton:
        """No bone yet."""
        shape = grid.shape_kji
        return cls(grid, np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.uint8))

    def add(self, w: Window, mineral: Array, bone: Array, label: int) -> None:
        """Lay a structure in; where two share a voxel the one that fills it more keeps the label."""
        old = self.bone[w.slices]
        here = (bone >= 0.5) & (bone > old)
        if label:
            self.labels[w.slices][here] = label
        np.maximum(old, bone, out=old)
        current = self.mineral[w.slices]
        np.maximum(current, mineral, out=current)


@dataclass(frozen=True)
class Body:
    """A vertebral body: dished endplates, a waist, a hollow posterior wall. Local millimetres."""

    width: float
    depth: float
    height_anterior: float
    height_posterior: float
    waist: float
    squareness: float
    posterior_hollow: float
    endplate_hollow: float
    lipping: float
    cortex: float
    endplate: float
    taper: float = 0.0  # loses this fraction of its size from top to bottom
    dent: float = 0.0

    def window(self, grid: Grid, frame: Frame) -> Window | None:
        """The sub-grid that can hold any of it."""
        a, b = self.width / 2 + self.lipping + 2, self.depth / 2 + self.lipping + 2
        h = max(self.height_anterior, self.height_posterior) / 2 + 1
        return box_window(grid, frame, (-a, -b, -h), (a, b, h))

    def occupancy(self, local: tuple[Array, Array, Array], support: Vec3) -> tuple[Array, Array]:
        """Shares of each voxel inside the body, and inside its shell; each (nk, nj, ni)."""
        x, y, z = local
        half = 0.25 * (self.height_anterior + self.height_posterior)
        level = z * np.float32(1 / half)
        rim = np.minimum(level * level, np.float32(1))
        grow = 1 - np.float32(self.waist) * (1 - rim) + np.float32(self.taper / 2) * np.clip(level, -1, 1)
        grow += np.float32(2 * self.lipping / self.width) * rim * rim
        u = x / (grow * np.float32(self.width / 2))
        v = y / (grow * np.float32(self.depth / 2))
        u2 = u * u
        np.minimum(u2, 2.0, out=u2)
        v *= 1 + np.float32(self.posterior_hollow) * np.clip(1 - u2, 0, 1) * (v > 0)
        v2 = np.minimum(v * v, np.float32(2))
        rho2 = u2 + v2 - np.float32(self.squareness) * u2 * v2
        rho = np.sqrt(rho2) + np.float32(1e-4)
        radial = (1 - 1 / rho) * np.sqrt(x * x + y * y)
        slope = np.float32((self.height_posterior - self.height_anterior) / (2 * self.depth))
        dish = np.float32(self.endplate_hollow) * np.clip(1 - rho2 * rho2, 0, 1)
        if self.dent:
            dish += np.float32(self.dent) * np.clip(1 - rho2, 0, 1)
        ends = np.abs(z) - (np.float32(half) + slope * y - dish)
        wall = float(np.hypot(support[0], support[1]) / np.sqrt(2))
        outer = soft(radial, wall) * soft(ends, support[2])
        inner = soft(radial + np.float32(self.cortex), wall) * soft(ends + np.float32(self.endplate), support[2])
        return outer, inner


Solid = tuple[Frame, Body | Rod]


def body_of(v: Vertebra) -> Body:
    """The body of a vertebra."""
    return Body(
        v.width, v.depth, v.height_anterior, v.height_posterior, v.waist, v.squareness, v.posterior_hollow,
        v.endplate_hollow, v.lipping, v.cortex, v.endplate, dent=v.dent,
    )  # fmt: skip


def back_wall(v: Vertebra) -> float:
    """Local y of the middle of the posterior wall."""
    return v.back_wall_y


def posterior_elements(v: Vertebra) -> tuple[list[Rod], list[Rod]]:
    """Laminae and spinous process; pedicles, articular and transverse processes."""
    y, depth, h = back_wall(v), v.canal_depth, v.arch_height
    lamina_y = y + depth + 3.0
    px = v.pedicle_x
    f = v.facet_size
    upper, lower = v.canal_width / 2 + 6.0, v.canal_width / 2 - 0.5
    low = v.name in ("L5", "L6")
    heavy = 1.5 if low else 1.0
    tip = (
        v.transverse_span / 2,
        y + 0.35 * depth + (3.0 if low else 7.0),
        0.10 * h + v.transverse_rise,
    )
    end = (0.0, lamina_y + v.spinous_length, -0.30 * h - v.spinous_drop)
    middle = [Rod((0.0, lamina_y, -0.28 * h), end, (3.3, 4.0, v.spinous_height / 2), 0.78)]
    lateral = []
    for side in (-1.0, 1.0):
        middle.append(
            Rod((side * px, y + 0.65 * depth, 0.05 * h), (side * 2.0, lamina_y, -0.28 * h),
                (3.6, 3.4, 0.33 * h))
        )  # fmt: skip
        lateral += [
            Rod((side * px, y - 4, 0.17 * h), (side * (px + 1), y + 0.5 * depth, 0.17 * h),
                (v.pedicle_width / 2, 4.0, v.pedicle_height / 2)),
            Rod((side * upper, y + 0.58 * depth, 0.2 * h), (side * upper, y + 0.62 * depth, 0.62 * h),
                (3.1 * f, 4.6 * f, 4.0 * f)),
            Rod((side * lower, y + depth + 0.5, -0.35 * h), (side * lower, y + 0.92 * depth, -0.82 * h),
                (3.4 * f, 4.2 * f, 5.0 * f)),
            Rod((side * (px + 2), y + 0.4 * depth, 0.10 * h), (side * tip[0], tip[1], tip[2]),
                (4.0, 3.4 * heavy, 5.2 * heavy), 0.62),
        ]  # fmt: skip
    return middle, lateral


def texture_lattice(texture: Texture, grid: Grid) -> Array:
    """One period of the relative trabecular variation, (64, 64, 64) at 1 mm, as fine as the grid can hold."""
    rng = np.random.default_rng(texture.seed)
    fine = rng.standard_normal((LATTICE,) * 3, dtype=np.float32)
    slow = rng.standard_normal((LATTICE // 4,) * 3, dtype=np.float32)
    own = 0.5 * texture.scale_mm
    gain = texture.amplitude * (4 * np.pi * own**2) ** 0.75 * (1 + 0.08 / own**2)  # keeps the deviation about equal
    sigma = [float(np.hypot(own, 0.29 * max(s - 1.0, 0.0))) for s in grid.spacing_kji_mm]
    fine = ndimage.gaussian_filter(fine, sigma, mode="wrap", truncate=3.0) * np.float32(gain)
    slow = ndimage.gaussian_filter(slow, 1.2, mode="wrap")
    slow = ndimage.zoom(
        slow * np.float32(texture.coarse_amplitude / slow.std()), 4, order=1, mode="grid-wrap", grid_mode=True
    )
    return np.asarray(fine + slow, dtype=np.float32)


def vertebra_into(skeleton: Skeleton, v: Vertebra, patient: Patient, lattice: Array) -> None:
    """Render one vertebra: body and posterior elements merge, so that no cortex is left where they join."""
    grid, bone = skeleton.grid, patient.bone
    body, (middle, lateral) = body_of(v), posterior_elements(v)
    w = _union_window(grid, [(v.frame, body), *((v.frame, rod) for rod in (*middle, *lateral))])
    if w is None:
        return
    outer, inner, spongy = (np.zeros(w.shape, np.float32) for _ in range(3))
    support = v.frame.support_mm(grid)
    b = body.window(grid, v.frame)
    if b is not None:
        local = v.frame.local(b)
        where = b.relative_to(w)
        outer[where], inner[where] = body.occupancy(local, support)
        spongy[where] = inner[where] * _trabecular(v, local, inner[where], lattice)
        condense(spongy[where], inner[where], v, local, patient.lesions)
    mean_support = float(np.mean(support))
    rod_density = np.float32(v.trabecular_mg_cm3 * bone.posterior_trabecular)
    for rods, cortex in ((middle, v.posterior_cortex), (lateral, v.lateral_cortex)):
        for rod in rods:
            _rod_into(rod, v.frame, grid, w, (outer, inner, spongy), cortex, rod_density, mean_support)
    mineral = _mineral(outer, inner, spongy, patient)
    skeleton.add(w, mineral, outer, v.label)


def _union_window(grid: Grid, solids: Sequence[Solid]) -> Window | None:
    windows = [w for frame, part in solids if (w := part.window(grid, frame)) is not None]
    if not windows:
        return None
    z, y, x = grid.axes()
    (k, j, i) = (
        slice(min(w.slices[n].start for w in windows), max(w.slices[n].stop for w in windows)) for n in range(3)
    )
    return Window((k, j, i), z[k][:, None, None], y[j][None, :, None], x[i][None, None, :])


def _rod_into(
    rod: Rod, frame: Frame, grid: Grid, into: Window, arrays: tuple[Array, Array, Array], cortex: float,
    density: np.float32, support: float,
) -> None:  # fmt: skip
    w = rod.window(grid, frame)
    if w is None:
        return
    where = w.relative_to(into)
    distance = rod.distance(frame.local(w))
    inside = soft(distance + np.float32(cortex), support)
    outer, inner, spongy = (a[where] for a in arrays)
    np.maximum(outer, soft(distance, support), out=outer)
    np.maximum(inner, inside, out=inner)
    np.maximum(spongy, inside * density, out=spongy)


def _mineral(outer: Array, inner: Array, spongy: Array, patient: Patient) -> Array:
    cortical = np.float32(patient.bone.cortical_mg_cm3)
    return np.asarray((cortical * (outer - inner) + spongy) * np.float32(patient.bone.scale), dtype=np.float32)


def _trabecular(v: Vertebra, local: tuple[Array, Array, Array], inner: Array, lattice: Array) -> Array:
    """Density of the interior, mg/cm3: denser towards the endplates, with the patient's grain."""
    density = np.zeros(inner.shape, np.float32)
    where = inner > 0
    points = np.stack([c[where] for c in local[::-1]])  # (3, n): z, y, x
    end = np.minimum(np.abs(points[0]) * np.float32(2 / v.height), np.float32(1.1)) ** 6
    points += np.asarray(v.texture_shift, dtype=np.float32)[:, None]
    grain = ndimage.map_coordinates(lattice, points, order=1, mode="grid-wrap", prefilter=False)
    relative = np.maximum((1 + grain) * (np.float32(0.94) + np.float32(0.35) * end), np.float32(0.08))
    density[where] = np.float32(v.trabecular_mg_cm3) * relative
    return density


def spine_into(skeleton: Skeleton, patient: Patient) -> None:
    """Render every vertebra."""
    lattice = texture_lattice(patient.bone.texture, skeleton.grid)
    for v in patient.vertebrae:
        vertebra_into(skeleton, v, patient, lattice)


def group_into(
    skeleton: Skeleton, patient: Patient, solids: Sequence[Solid], density: float, cortex: float, label: int
) -> None:
    """Render solids that merge into one bone with a plain interior: no cortex is left where they join."""
    grid = skeleton.grid
    w = _union_window(grid, solids)
    if w is None:
        return
    outer, inner, spongy = (np.zeros(w.shape, np.float32) for _ in range(3))
    for frame, part in solids:
        support = frame.support_mm(grid)
        if isinstance(part, Rod):
            arrays = (outer, inner, spongy)
            _rod_into(part, frame, grid, w, arrays, cortex, np.float32(density), float(np.mean(support)))
            continue
        b = part.window(grid, frame)
        if b is not None:
            where = b.relative_to(w)
            outer[where], inner[where] = part.occupancy(frame.local(b), support)
            spongy[where] = inner[where] * np.float32(density)
    skeleton.add(w, _mineral(outer, inner, spongy, patient), outer, label)


def sacrum_into(skeleton: Skeleton, patient: Patient) -> None:
    """S1's body (label 26), then alae, posterior arch and the segments below along a curve (label 25)."""
    s = patient.sacrum
    thin = 0.8 * patient.vertebrae[0].cortex / 0.78
    body = Body(s.width, s.depth, s.height + 2, s.height - 3, 0.04, 0.15, 0.1, 1.5, 0.5, 0.6, 0.6, taper=0.28)
    group_into(skeleton, patient, [(s.frame, body)], s.trabecular_mg_cm3, thin, LABELS["S1"])
    solids = [*_first_segment(patient), *_lower_segments(patient)]
    group_into(skeleton, patient, solids, 0.7 * s.trabecular_mg_cm3, thin, LABELS["sacrum"])


def _lower_segments(patient: Patient) -> list[Solid]:
    """S2 to the coccyx: (half width, half thickness, distance from the segment above)."""
    s, frame, solids = patient.sacrum, patient.sacrum.frame, list[Solid]()
    for n, (reach, thick, step) in enumerate(((40, 12, 25), (33, 10, 22), (25, 8, 19), (15, 6.5, 17), (6, 5, 13))):
        tilt, bend, spin = frame.angles_rad
        turned = (tilt + (0.0 if n == 0 else -1.3) * s.curve_rad, bend, spin)
        middle = Frame(frame.center, ((tilt + turned[0]) / 2, bend, spin))
        frame = Frame(middle.to_lps((0.0, 0.0, -float(step))), turned)
        wide, half = reach * s.ala_span / 108, 0.78 * step
        solids.append((frame, Rod((-wide + half, 2.0, 0.0), (wide - half, 2.0, 0.0), (half, thick, half))))
        if n < 3:
            crest = thick + 13.0 - 2 * n
            solids.append((frame, Rod((-wide * 0.4, crest, 0.0), (wide * 0.4, crest, 0.0), (5.0, 3.2, half))))
            solids.append((frame, Rod((0.0, crest, 0.0), (0.0, crest + 6, -2.0), (2.6, 3.0, half * 0.8))))
            for q in (-1, 1):
                pillar = Rod((q * wide * 0.55, 4.0, 0.0), (q * wide * 0.45, crest, 0.0), (5.0, 5.0, half))
                solids.append((frame, pillar))
    return solids


def _first_segment(patient: Patient) -> list[Solid]:
    """Alae, arch, crest and articular processes of S1."""
    s, low = patient.sacrum, patient.vertebrae[0]
    y, arch = s.depth / 2, s.depth / 2 + low.canal_depth + 1
    rods = [Rod((0.0, arch, -6.0), (0.0, arch + 8, -10.0), (2.8, 3.5, 8.0))]
    upper = low.canal_width / 2 + 7.5
    for q in (-1.0, 1.0):
        rods += [
            Rod(
                (q * (s.width / 2 - 5), 4.0, -4.0),
                (q * (s.ala_span / 2 - 11), 13.0, -9.0),
                (11.0, 12.0, 13.0),
            ),
            Rod((q * (s.width / 2 - 2), y - 2, -3.0), (q * upper, y + 9, 3.0), (6.0, 6.0, 9.0)),
            Rod((q * upper, y + 9, 3.0), (q * upper, y + 8, 0.6 * s.height), (4.0, 5.0, 4.5)),
            Rod((q * upper, y + 10, 0.0), (q * 2, arch, -5.0), (4.0, 3.4, 9.0)),
        ]
    return [(s.frame, rod) for rod in rods]


def wings_into(skeleton: Skeleton, patient: Patient) -> None:
    """Both iliac wings: plates on a bowl, from sacro-iliac joint to anterior spine, under a crest."""
    s = patient.sacrum
    frame = Frame(s.frame.center, (0.0, s.frame.angles_rad[1], s.frame.angles_rad[2]))
    a, b, _ = s.wing_radii
    for side in (-1.0, 1.0):
        low, high = sorted((side * 22.0, side * (a + 14)))
        w = box_window(skeleton.grid, frame, (low, -b - 40, -95.0), (high, b + 4.0, s.wing_crest + 6))
        if w is not None:
            _wing_into(skeleton, patient, frame, w, side)


def _wing_into(skeleton: Skeleton, patient: Patient, frame: Frame, w: Window, side: float) -> None:
    s = patient.sacrum
    x, y, z = frame.local(w)
    a, b, _ = s.wing_radii
    flare = 1 - np.float32(0.30) * np.clip((np.float32(s.wing_crest) - z) / 130, 0, 1) ** 1.3
    across = np.float32(side) * x / np.float32(a)
    along = (y + 32) / np.float32(b)
    rho = np.sqrt(across**2 + along**2) / flare
    azimuth = np.arctan2(across, along)  # 0 behind, pi / 2 to the side
    shell = np.abs(rho - 1) * np.float32((a + b) / 2)
    crest = np.float32(s.wing_crest) * np.sin(np.clip((azimuth - 0.18) * np.float32(1.38), 0, np.pi)) - 8
    below = np.clip((crest - z) / 60, 0, 1)
    half = np.float32(s.wing_thickness / 2) * (1 - np.float32(0.45) * np.sin(below * np.float32(np.pi)))
    edges = np.maximum((z - crest), (np.float32(0.36) - azimuth) * 70)
    edges = np.maximum(edges, (azimuth - np.float32(2.25)) * 100)
    distance = np.maximum(shell - half, edges)
    support = float(np.mean(frame.support_mm(skeleton.grid)))
    outer, inner = soft(distance, support), soft(distance + np.float32(1.1), support)
    skeleton.add(w, _mineral(outer, inner, inner * np.float32(0.9 * s.trabecular_mg_cm3), patient), outer, 0)


def ribs_into(skeleton: Skeleton, patient: Patient) -> None:
    """Ribs 8 to 12, along the chest wall and downwards; the upper ones come in from above the field."""
    t = patient.torso
    if not t.ribs:
        return
    frame = Frame(t.center, (0.0, 0.0, t.roll_rad))
    top = patient.vertebra("T10")
    starts = [(patient.vertebra(n), 0.0) for n in ("T12", "T11", "T10")] + [(top, 26.0), (top, 52.0)]
    reach, fall = (1.0, 1.75, 2.5, 2.8, 2.9), (38.0, 60.0, 85.0, 95.0, 100.0)
    for (v, lift), end, drop in zip(starts, reach, fall, strict=True):
        for side in (-1.0, 1.0):
            rods = _rib(patient, frame, v, lift, side, end, drop)
            group_into(skeleton, patient, [(frame, rod) for rod in rods], 90.0, 0.8, 0)
    if t.lumbar_ribs:
        for side in (-1.0, 1.0):
            group_into(skeleton, patient, _lumbar_rib(patient.vertebra("L1"), side), 90.0, 0.8, 0)


def _lumbar_rib(v: Vertebra, side: float) -> list[Solid]:
    """A short rib, about 5 cm, that ends in the muscle; in the frame of its vertebra."""
    head = (side * (v.width / 2 + 1.5), back_wall(v) - 3, 4.0)
    neck = (head[0] + side * 20.0, head[1] + 11.0, 1.0)
    tip = (neck[0] + side * 26.0, neck[1] + 6.0, -13.0)
    return [(v.frame, Rod(head, neck, (3.4, 3.4, 4.6))), (v.frame, Rod(neck, tip, (3.4, 3.4, 4.6), 0.6))]


def _rib(patient: Patient, frame: Frame, v: Vertebra, lift: float, side: float, end: float, drop: float) -> list[Rod]:
    t = patient.torso
    a, b = t.half_width - t.fat_side - 8, t.half_depth - (t.fat_front + t.fat_back) / 2 - 8
    y0 = (t.fat_front - t.fat_back) / 2
    head = np.asarray(v.frame.to_lps((side * (v.width / 2 + 2), back_wall(v) - 3, 4.0 + lift)))
    inverse = frame.matrix.T
    start = inverse @ (head - np.asarray(frame.center))
    first = start + np.array([side * 26.0, 15.0, -4.0])
    points = [start, first]
    begin = float(np.arctan2(abs(first[0]) / a, max(first[1] - y0, 1.0) / b))
    for angle in np.linspace(begin + 0.25, max(end, begin + 0.3), 7):
        down = drop * (angle - begin) / 2.0
        points.append(np.array([side * a * np.sin(angle), y0 + b * np.cos(angle), first[2] - down]))
    radii = (3.6, 3.6, 5.6)
    return [
        Rod((float(p[0]), float(p[1]), float(p[2])), (float(q[0]), float(q[1]), float(q[2])), radii)
        for p, q in itertools.pairwise(points)
    ]


def skeleton_of(patient: Patient, grid: Grid) -> Skeleton:
    """The whole skeleton on a grid."""
    out = Skeleton.empty(grid)
    ribs_into(out, patient)
    wings_into(out, patient)
    sacrum_into(out, patient)
    spine_into(out, patient)
    return out


def spine_bounds(patient: Patient, first: str, last: str) -> tuple[Vec3, Vec3]:
    """The LPS box around the vertebrae (or S1) `first` (cranial) to `last`, posterior elements included."""
    lows, highs = [], []
    names = [*[v.name for v in patient.vertebrae[::-1]], "S1"]
    for name in names[names.index(first) : names.index(last) + 1]:
        frame, reach_x, front, behind, up, down = _reach(patient, name)
        for dx in (-reach_x, reach_x):
            for dy, dz in ((front, up), (front, -up), (behind, up), (behind, -down)):
                p = frame.to_lps((dx, dy, dz))
                lows.append(p)
                highs.append(p)
    low, high = np.min(lows, axis=0), np.max(highs, axis=0)
    return (float(low[0]), float(low[1]), float(low[2])), (float(high[0]), float(high[1]), float(high[2]))


def _reach(patient: Patient, name: str) -> tuple[Frame, float, float, float, float, float]:
    if name == "S1":
        s = patient.sacrum
        return s.frame, s.width / 2, -s.depth / 2, s.depth / 2 + 30, s.height / 2, s.height / 2
    v = patient.vertebra(name)
    behind = back_wall(v) + v.canal_depth + 8 + v.spinous_length
    down = 0.3 * v.arch_height + v.spinous_drop + v.spinous_height / 2
    return (
        v.frame,
        v.transverse_span / 2 + 3,
        -v.depth / 2 - v.lipping,
        behind,
        0.62 * v.arch_height + 5 * v.facet_size,
        down,
    )
