"""Everything that is not bone: skin, fat, muscle, organs, vessels, bowel, canal, discs and the table.

HU of tissues are textbook values (approximation). They follow the spine, so that every patient's differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.phantom.anatomy import Patient
from models.phantom.geometry import Frame, Rod, soft
from models.phantom.grid import Array, Grid, Vec3, Window
from models.phantom.spine import Body, back_wall

AIR, LUNG, FAT = -1000.0, -860.0, -103.0
# native, arterial, portal (approximation)
ENHANCED = {
    "aorta": (42.0, 330.0, 160.0),
    "cava": (40.0, 75.0, 145.0),
    "kidney": (32.0, 150.0, 185.0),
    "liver": (58.0, 68.0, 112.0),
    "spleen": (48.0, 115.0, 122.0),
    "wall": (42.0, 60.0, 85.0),
}
MARROW_GAIN = {"native": 0.0, "arterial": 4.0, "portal": 11.0}
_PHASES = ("native", "arterial", "portal")


@dataclass(frozen=True)
class Organ:
    """A soft solid with its HU; `clipped` keeps it inside the peritoneal cavity."""

    rod: Rod
    frame: Frame
    hu: float
    clipped: bool = False


class Outline:
    """Three nested outlines of the torso (skin, fascia, cavity) that change with height."""

    def __init__(self, patient: Patient) -> None:
        t = patient.torso
        self.t = t
        crest = patient.sacrum.frame.center[2] + patient.sacrum.wing_crest
        ribs = patient.vertebra("T12").frame.center[2]
        self.knots = (crest - 90, crest - 10, (crest + ribs) / 2, ribs + 30)
        self.skin = (t.hip_widening, t.hip_widening * 0.7, -4.0, t.chest_widening)
        self.cavity_loss = (34.0, 16.0, 0.0, 2.0)
        s = patient.sacrum.frame
        self.levels = (s.center[2], *(v.frame.center[2] for v in patient.vertebrae))
        self.spine_y = (
            s.center[1] - t.center[1],
            *(v.frame.center[1] - t.center[1] for v in patient.vertebrae),
        )
        tips = [
            v.frame.to_lps((0.0, back_wall(v) + v.canal_depth + v.spinous_length, -8.0))[1] for v in patient.vertebrae
        ]
        tips.insert(0, s.to_lps((0.0, patient.sacrum.depth / 2 + 22, -35.0))[1])
        # the small of the back does not touch the table
        self.recess = tuple(0.7 * (max(tips) - tip) for tip in tips)

    def layers(self, z: float) -> tuple[tuple[float, float, float], ...]:
        """Half width, half depth and centre offset (y) of skin, fascia and cavity at height z."""
        t = self.t
        grown = t.half_width + float(np.interp(z, self.knots, self.skin))
        loss = float(np.interp(z, self.knots, self.cavity_loss))
        recess = float(np.interp(z, self.levels, self.recess)) / 2
        spine_back = float(np.interp(z, self.levels, self.spine_y)) + 22
        skin = (grown, t.half_depth - recess, -recess)
        fascia = (
            grown - t.fat_side,
            skin[1] - (t.fat_front + t.fat_back) / 2,
            skin[2] + (t.fat_front - t.fat_back) / 2,
        )
        front = fascia[2] - fascia[1] + 0.8 * t.wall
        cavity = (fascia[0] - t.wall - loss, (spine_back - front) / 2, (spine_back + front) / 2)
        return skin, fascia, cavity

    def turned(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Coordinates about the torso's axis."""
        c, s = np.float32(np.cos(self.t.roll_rad)), np.float32(np.sin(self.t.roll_rad))
        dx, dy = x - np.float32(self.t.center[0]), y - np.float32(self.t.center[1])
        return c * dx + s * dy, c * dy - s * dx

    def occupancy(self, across: Array, along: Array, layer: tuple[float, float, float], width: float) -> Array:
        """Share of voxels inside one outline at one height."""
        a, b, shift = layer
        u2 = np.minimum((across * np.float32(1 / a)) ** 2, np.float32(1.6))
        v2 = np.minimum(((along - np.float32(shift)) * np.float32(1 / b)) ** 2, np.float32(1.6))
        q = u2 + v2 - np.float32(self.t.squareness) * u2 * v2
        q -= 1
        q *= np.float32(0.25 * (a + b))
        return soft(q, width)


def tissue(patient: Patient, grid: Grid) -> Array:
    """Noise-free HU of everything but bone, (nk, nj, ni)."""
    outline = Outline(patient)
    hu = _layers(patient, grid, outline)
    for organ in _organs(patient):
        _organ_into(hu, grid, organ, outline)
    _discs_into(hu, patient, grid)
    return hu


def _layers(patient: Patient, grid: Grid, outline: Outline) -> Array:
    """Table, subcutaneous fat, muscle and the cavity's fat, slice by slice, with slow variation."""
    t = patient.torso
    z, y, x = grid.axes()
    across, along = outline.turned(x[None, :], y[:, None])  # (nj, ni)
    table = _table(patient, x, y)
    uneven = _Unevenness(t.seed, grid)
    width = float(grid.spacing_kji_mm[2])
    out = np.empty(grid.shape_kji, np.float32)
    for k, height in enumerate(z):
        skin, fascia, cavity = (
            outline.occupancy(across, along, layer, width) for layer in outline.layers(float(height))
        )
        rough = uneven.slice(k)
        plane = table * (1 - skin) + skin * np.float32(FAT)
        plane += fascia * (np.float32(t.muscle_hu - FAT) + 9 * rough)
        plane += cavity * (np.float32(t.visceral_fat_hu - t.muscle_hu) + 6 * rough)
        out[k] = plane
    return out


def _table(patient: Patient, x: Array, y: Array) -> Array:
    """A curved carbon-fibre top with foam under it, (nj, ni)."""
    t = patient.torso
    edge = t.center[1] + t.half_depth + t.table_gap
    curved = y[:, None] - np.float32(edge) + ((x[None, :] - np.float32(t.center[0])) ** 2) * np.float32(1 / 1400)
    inside = np.float32(np.abs(x[None, :]) < 215)
    step = np.float32(max(0.7, float(np.diff(y[:2])[0]) if len(y) > 1 else 0.7))
    shell = soft(np.abs(curved) - 1, float(step)) + soft(np.abs(curved - 38) - 1, float(step))
    foam = soft(np.abs(curved - 19) - 19, float(step))
    return np.asarray(AIR + inside * (40 * foam + 1000 * np.minimum(shell, 1)), dtype=np.float32)


class _Unevenness:
    """Smooth unit noise on a fixed 7 mm lattice, so that it does not depend on the grid."""

    STEP = 7.0

    def __init__(self, seed: int, grid: Grid) -> None:
        nodes = np.random.default_rng(seed).standard_normal((96, 48, 64), dtype=np.float32)
        axes = grid.axes()
        self.wz, wy, wx = (_linear_weights(a, n, self.STEP) for a, n in zip(axes, nodes.shape, strict=True))
        self.raw, self.wy, self.wx = nodes, wy, wx

    def slice(self, k: int) -> Array:
        """(nj, ni) at slice k."""
        near = np.flatnonzero(self.wz[k])
        plane = np.tensordot(self.wz[k, near], self.raw[near], axes=1)
        return np.asarray(self.wy @ plane @ self.wx.T, dtype=np.float32)


def _linear_weights(axis: Array, count: int, step: float) -> Array:
    position = axis / np.float32(step)
    low = np.floor(position).astype(int)
    share = (position - low).astype(np.float32)
    weights = np.zeros((axis.size, count), np.float32)
    rows = np.arange(axis.size)
    weights[rows, low % count] = 1 - share
    weights[rows, (low + 1) % count] = share
    return weights


def _organ_into(hu: Array, grid: Grid, organ: Organ, outline: Outline) -> None:
    w = organ.rod.window(grid, organ.frame)
    if w is None:
        return
    share = soft(organ.rod.distance(organ.frame.local(w)), float(np.mean(organ.frame.support_mm(grid))))
    if organ.clipped:
        _clip(share, w, outline, float(grid.spacing_kji_mm[2]))
    here = hu[w.slices]
    here += share * (np.float32(organ.hu) - here)


def _clip(share: Array, w: Window, outline: Outline, width: float) -> None:
    across, along = outline.turned(w.x[0], w.y[0])
    for k, height in enumerate(w.z[:, 0, 0]):
        share[k] *= outline.occupancy(across, along, outline.layers(float(height))[2], width)


def _discs_into(hu: Array, patient: Patient, grid: Grid) -> None:
    """Intervertebral discs, a little smaller than the bodies; bone is laid over them later."""
    below = 0.0
    for v, gap in zip(patient.vertebrae, patient.disc_mm, strict=True):
        frame = Frame(v.frame.to_lps((0.0, 0.0, -(v.height + gap) / 2)), v.frame.angles_rad)
        # discs bulge into endplates that gave way; nobody is drawn with any hollower than 4.5 mm
        thick = gap + 7 + 2 * max(0.0, v.endplate_hollow + v.dent - 4.5, below - 4.5)
        below = v.endplate_hollow + v.dent
        disc = Body(
            v.width * 0.98,
            v.depth * 0.98,
            thick,
            thick,
            -0.03,
            v.squareness,
            0.5 * v.posterior_hollow,
            0,
            0,
            0,
            0,
        )
        w = disc.window(grid, frame)
        if w is None:
            continue
        share, _ = disc.occupancy(frame.local(w), frame.support_mm(grid))
        here = hu[w.slices]
        here += share * (np.float32(88.0) - here)


def _phase(patient: Patient, organ: str) -> float:
    return ENHANCED[organ][_PHASES.index(patient.acquisition.contrast_phase)]


def _organs(patient: Patient) -> list[Organ]:
    rng = np.random.default_rng([patient.torso.seed, 2])
    return [
        *_upper_organs(patient), *_bowel(patient, rng), *_kidneys(patient), *_muscles(patient),
        *_vessels(patient, rng), *_canal(patient),
    ]  # fmt: skip


def _torso_frame(patient: Patient, z: float) -> Frame:
    x, y, _ = patient.torso.center
    return Frame((x, y, z), (0.0, 0.0, patient.torso.roll_rad))


def _blob(frame: Frame, center: Vec3, radii: Vec3, hu: float, clipped: bool = True) -> Organ:
    return Organ(Rod(center, center, radii), frame, hu, clipped)


def _upper_organs(patient: Patient) -> list[Organ]:
    t = patient.torso
    a, b, s = t.half_width - t.fat_side - t.wall, t.half_depth - (t.fat_front + t.fat_back) / 2, t.liver
    f = _torso_frame(patient, patient.vertebra("L1").frame.center[2])
    out = [
        _blob(f, (-0.5 * a, -0.12 * b, 50), (0.72 * a * s, 0.85 * b * s, 82 * s), _phase(patient, "liver")),
        _blob(f, (0.78 * a, 0.25 * b, 38), (0.24 * a, 0.45 * b, 46), _phase(patient, "spleen")),
        _blob(f, (0.45 * a, -0.35 * b, 45), (0.42 * a, 0.42 * b, 42), 28.0),
        _blob(f, (0.45 * a, -0.50 * b, 52), (0.30 * a, 0.22 * b, 30), -900.0),
    ]
    lift = (patient.vertebra("T10").frame.center[2] - f.center[2]) + t.lung_lift + 18
    out += [_blob(f, (q * 0.52 * a, 0.15 * b, lift), (0.44 * a, 0.72 * b, 52), LUNG, False) for q in (-1, 1)]
    return out


def _bowel(patient: Patient, rng: np.random.Generator) -> list[Organ]:
    """Loops of bowel and mesentery; gas rises to the front in a patient who lies on the back."""
    t = patient.torso
    a, b = t.half_width - t.fat_side - t.wall, t.half_depth - t.fat_front
    low, high = patient.sacrum.frame.center[2] - 60, patient.vertebra("T12").frame.center[2] + 10
    wall, out = _phase(patient, "wall"), []
    for _ in range(t.bowel_count):
        center = (float(rng.uniform(-0.85, 0.85) * a), float(rng.uniform(-0.85, 0.12) * b), 0.0)
        f = _torso_frame(patient, float(rng.uniform(low, high)))
        f = Frame(
            f.to_lps(center),
            (float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1)), float(rng.uniform(-2, 2))),
        )
        r, length = float(rng.uniform(8, 21)), float(rng.uniform(0, 35))
        start, end = (-length, 0.0, 0.0), (length, 0.0, 0.0)
        out.append(Organ(Rod(start, end, (r, r, r)), f, wall, True))
        inner = max(r - 3, 3)
        out.append(Organ(Rod(start, end, (inner, inner, inner)), f, float(rng.uniform(8, 45)), True))
        if rng.random() < t.gas:
            up = Frame((f.center[0], f.center[1] - 0.3 * inner, f.center[2]), f.angles_rad)
            g = 0.62 * inner
            out.append(Organ(Rod(start, end, (g, g, g)), up, -900.0, True))
    return out


def _kidneys(patient: Patient) -> list[Organ]:
    t = patient.torso
    spine = patient.vertebra("L2")
    out = []
    for q in (-1.0, 1.0):
        lift = t.kidney_lift + 6 * q
        out_by = spine.width / 2 + 14 + t.kidney[0] + 4
        center = spine.frame.to_lps((q * out_by, 2.0, lift))
        f = Frame(center, (0.15, -q * 0.22, t.roll_rad - q * 0.5))
        out.append(_blob(f, (0, 0, 0), t.kidney, _phase(patient, "kidney"), False))
        out.append(_blob(f, (-q * 9, -4, 0), (t.kidney[0] * 0.55, 8, t.kidney[2] * 0.5), -60.0, False))
    return out


def _chain(points: list[Vec3], radii: list[Vec3], hu: float, angles: Vec3) -> list[Organ]:
    out = []
    turn = Frame((0.0, 0.0, 0.0), angles).matrix.T
    for p, q, r, s in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
        step = turn @ (np.asarray(q) - np.asarray(p))
        end = (float(step[0]), float(step[1]), float(step[2]))
        out.append(Organ(Rod((0.0, 0.0, 0.0), end, r, s[0] / r[0]), Frame(p, angles), hu))
    return out


def _muscles(patient: Patient) -> list[Organ]:
    """Psoas from L1 to the pelvis; fat planes between the muscles of the back."""
    t, out = patient.torso, []
    sizes = {"T12": 0.42, "L1": 0.6, "L2": 0.8, "L3": 1.0, "L4": 1.15, "L5": 1.2, "L6": 1.2}
    sizes = {v.name: sizes[v.name] for v in patient.vertebrae[::-1] if v.name in sizes}
    angles = (0.0, 0.0, t.roll_rad)
    for q in (-1.0, 1.0):
        points, radii = [], []
        for name, size in sizes.items():
            v = patient.vertebra(name)
            r = t.psoas * size
            points.append(v.frame.to_lps((q * (v.width / 2 + 0.72 * r), 5.0 - 8.0 * size**3, 0.0)))
            radii.append((r, 1.15 * r, r))
        s1 = patient.sacrum.frame
        points.append(s1.to_lps((q * (46.0 + 0.5 * t.psoas), -34.0, -30.0)))
        radii.append((1.15 * t.psoas, 1.3 * t.psoas, t.psoas))
        out += _chain(points, radii, t.muscle_hu + 4, angles)
        sides = [patient.vertebra(n) for n in sizes]
        quadratus = [
            v.frame.to_lps((q * (v.width / 2 + 12 + 5 * n), back_wall(v) + 5, 0.0)) for n, v in enumerate(sides)
        ]
        out += _chain(quadratus, [(0.9 * t.psoas, 0.55 * t.psoas, 6.0)] * len(sides), t.muscle_hu, angles)
        out += _back_planes(patient, q)
    return out


def _back_planes(patient: Patient, q: float) -> list[Organ]:
    """Thin fat between erector spinae and quadratus, and beside the spinous processes."""
    t = patient.torso
    points, radii = [], []
    for v in patient.vertebrae[::-1]:
        y = back_wall(v) + v.canal_depth
        points.append(v.frame.to_lps((q * (v.width / 2 + 24 * t.erector), y - 6, 0.0)))
        radii.append((11.0 * t.erector, 1.8, 4.0))
    return _chain(points, radii, -70.0, (0.0, 0.0, t.roll_rad - q * 0.35))


def _vessels(patient: Patient, rng: np.random.Generator) -> list[Organ]:
    v, out = patient.vessels, []
    straight = (0.0, 0.0, patient.torso.roll_rad)
    levels = [patient.vertebra(n) for n in ("T10", "T11", "T12", "L1", "L2", "L3", "L4")]
    aorta = [b.frame.to_lps((v.aorta_left, -(b.depth / 2 + v.gap + v.aorta_radius), 0.0)) for b in levels]
    cava = [b.frame.to_lps((-v.cava_right, -(b.depth / 2 + v.gap + v.cava_radius), 0.0)) for b in levels]
    ra, rc = v.aorta_radius, v.cava_radius
    out += _chain(cava, [(rc * 1.15, rc * 0.85, rc)] * len(cava), _phase(patient, "cava"), straight)
    out += _chain(aorta, [(ra, ra, ra)] * len(aorta), _phase(patient, "aorta"), straight)
    for q in (-1.0, 1.0):
        low = patient.sacrum.frame.to_lps((q * 42.0, -24.0, -18.0))
        out += _chain([cava[-1], low], [(rc * 0.8,) * 3] * 2, _phase(patient, "cava"), straight)
        ahead = (low[0], low[1] - 13, low[2])
        out += _chain([aorta[-1], ahead], [(ra * 0.62,) * 3] * 2, _phase(patient, "aorta"), straight)
    for _ in range(round(14 * v.calcification)):
        at, angle = aorta[int(rng.integers(1, len(aorta)))], float(rng.uniform(0, 2 * np.pi))
        center = (
            at[0] + ra * float(np.cos(angle)),
            at[1] + ra * float(np.sin(angle)),
            at[2] + float(rng.uniform(-18, 18)),
        )
        size = float(rng.uniform(1.0, 2.6))
        out.append(
            Organ(
                Rod((0, 0, 0), (0, 0, 0), (size, size, 2.2 * size)),
                Frame(center),
                float(rng.uniform(350, 1000)),
            )
        )
    return out


def _canal(patient: Patient) -> list[Organ]:
    """Epidural fat and the dural sac from T10 to S2."""
    fat, sac, radii = [], [], []
    for v in patient.vertebrae[::-1]:
        at = v.frame.to_lps((0.0, back_wall(v) + v.canal_depth / 2, 0.0))
        fat.append(at)
        sac.append(at)
        radii.append((v.canal_width / 2, v.canal_depth / 2, 6.0))
    s = patient.sacrum
    fat.append(s.frame.to_lps((0.0, s.depth / 2 + 8, -8.0)))
    sac.append(fat[-1])
    radii.append((11.0, 7.0, 6.0))
    tight = [(0.78 * r[0], 0.78 * r[1], 5.0) for r in radii]
    angles = (0.0, 0.0, patient.torso.roll_rad)
    return _chain(fat, radii, -55.0, angles) + _chain(sac, tight, 26.0, angles)
