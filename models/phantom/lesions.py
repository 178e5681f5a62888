"""What ails a spine only where a setting asks for it: fractures, screws, cement, sclerosis.

Drawing them, breaking the bodies, and the bone that lesions add. Cement and metal are no bone: they are seen by the
CT alone (`implants`). A densitometer sees them too, but their levels are excluded from both, so the simulated DXA
leaves them out. All figures are approximations.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from models.phantom.anatomy import (
    LABELS,
    Blob,
    Cement,
    Fracture,
    Hardware,
    Lesions,
    Sacrum,
    Sclerosis,
    Vertebra,
)
from models.phantom.geometry import Frame, as_vec3
from models.phantom.grid import Array, Vec3
from models.phantom.settings import Value, fractures, levels

Rng = np.random.Generator

IMPACTION = 0.5  # share of the bone of the lost volume that is pressed into what is left
BAND_MG_CM3, BAND_DEPTH_MM = 3.0, 2.2  # condensed bone under the broken endplate: per % of height lost; to 1/e
BULGE = 0.15  # how much wider a body grows for the volume it lost
KYPHOSIS = 0.7  # share of a wedge's angle that the spine above keeps: discs take the rest


def drawn(seed: int, given: dict[str, Value], spine: tuple[Vertebra, ...]) -> Lesions:
    """The lesions that settings (as `settings.check` returns them) ask for, each from a generator of its own."""
    own = {v.name: v for v in spine}

    def wanted(key: str, number: int) -> list[tuple[Vertebra, Rng]]:
        named = levels(str(given.get(key, "")))
        return [(own[level], np.random.default_rng([seed, 7, number, LABELS[level]])) for level in named]

    return Lesions(
        fractures(str(given["fracture"])) if "fracture" in given else (),
        tuple(_hardware(v, rng) for v, rng in wanted("metal", 1)),
        tuple(_cement(v, rng) for v, rng in wanted("cement", 2)),
        tuple(_sclerosis(v, rng) for v, rng in wanted("sclerosis", 3)),
    )


def _hardware(v: Vertebra, rng: Rng) -> Hardware:
    thick = min(3.2, 0.42 * v.pedicle_width)
    reach, convergence = rng.uniform(0.6, 0.78), rng.uniform(0.35, 0.5)
    return Hardware(v.name, thick, float(reach), float(convergence), int(rng.integers(2**31)))


def _cement(v: Vertebra, rng: Rng) -> Cement:
    """Lumps that seep from the tips of two needles, one in each half, nearer the front; ragged where they end."""
    tall = 0.5 * min(v.height_anterior, v.height_middle, v.height_posterior)
    blobs = []
    for side in (-1.0, 1.0):
        at = np.array([0.2 * side * v.width, -0.12 * v.depth, 0.0])
        for n in range(9):
            size = float(rng.uniform(2.0, 5.0)) if n else 5.5
            radii = (size * float(rng.uniform(0.8, 1.5)), size, min(size * float(rng.uniform(0.7, 1.1)), 0.8 * tall))
            blobs.append(Blob(as_vec3(at), radii))
            at = at + rng.normal(0, 1, 3) * (0.09 * v.width, 0.10 * v.depth, 0.3 * tall)
            at[2] = np.clip(at[2], -0.8 * tall, 0.8 * tall)
            at[0] *= 0.92  # towards the middle
    return Cement(v.name, float(rng.uniform(1000, 1300)), tuple(blobs))


def _sclerosis(v: Vertebra, rng: Rng) -> Sclerosis:
    patches = as_vec3(rng.uniform(0, 2 * np.pi, 3))
    return Sclerosis(
        v.name, float(rng.uniform(320, 480)), float(rng.uniform(3.5, 6.0)), float(rng.uniform(0, 0.6)), patches
    )


def broken(
    spine: tuple[Vertebra, ...], discs: tuple[float, ...], sacrum: Sacrum, found: tuple[Fracture, ...]
) -> tuple[Vertebra, ...]:
    """The same spine with bodies that gave way: all above comes down, and leans forward over a wedge."""
    if not found:
        return spine
    kinds = {fracture.level: fracture for fracture in found}
    at = np.asarray(sacrum.frame.to_lps((0.0, 0.0, sacrum.height / 2)))
    up, kyphosis, out = sacrum.frame.matrix[:, 2], 0.0, list[Vertebra]()
    for v, disc in zip(spine, discs, strict=True):
        wedge, own = 0.0, v
        if v.name in kinds:
            own = _give_way(v, kinds[v.name])
            lost = (v.height_anterior - own.height_anterior) - (v.height_posterior - own.height_posterior)
            wedge = float(np.arctan2(max(lost, 0.0), v.depth))
        tilt, bend, spin = v.frame.angles_rad
        angles = (tilt + kyphosis + wedge / 2, bend, spin)
        own_up = Frame((0.0, 0.0, 0.0), angles).matrix[:, 2]
        middle = own_up + up
        at = at + disc * middle / np.linalg.norm(middle)
        out.append(replace(own, frame=Frame(as_vec3(at + own_up * own.height / 2), angles)))
        at, up = at + own_up * own.height, own_up
        kyphosis += KYPHOSIS * wedge
    return tuple(out)


def _give_way(v: Vertebra, fracture: Fracture) -> Vertebra:
    left = 1 - fracture.percent / 100
    front, back, hollow, dent = v.height_anterior, v.height_posterior, v.endplate_hollow, 0.0
    if fracture.kind == "wedge":
        front *= left
        lost = (1 - left) / 2
    elif fracture.kind == "biconcave":
        dent = (1 - left) * v.height_middle / 2
        lost = dent / v.height  # a paraboloid at either end fills half of its depth
    else:
        front, back, hollow = left * front, left * back, left * hollow
        lost = 1 - left
    return replace(
        v,
        height_anterior=front,
        height_posterior=back,
        endplate_hollow=hollow,
        dent=dent,
        height_intact=v.height,
        width=v.width * (1 + BULGE / 2 * lost),
        depth=v.depth * (1 + BULGE * lost),
        trabecular_mg_cm3=v.trabecular_mg_cm3 * (1 + IMPACTION * lost / (1 - lost)),
    )


def condense(spongy: Array, inner: Array, v: Vertebra, local: tuple[Array, Array, Array], lesions: Lesions) -> None:
    """Add the bone that lesions put under the endplates of a body; `spongy` (mg/cm3, in place), `inner` its share."""
    fracture = lesions.fracture(v.name)
    if fracture is not None:
        added = BAND_MG_CM3 * fracture.percent * np.exp(-_depth_mm(v, local, 1.0) / np.float32(BAND_DEPTH_MM))
        if fracture.kind == "biconcave":
            added += BAND_MG_CM3 * fracture.percent * np.exp(-_depth_mm(v, local, -1.0) / np.float32(BAND_DEPTH_MM))
        spongy += inner * np.minimum(added, np.float32(BAND_MG_CM3 * fracture.percent))
    for sclerosis in lesions.sclerosis:
        if sclerosis.level == v.name:
            spongy += inner * _sclerotic(sclerosis, v, local)


def _sclerotic(lesion: Sclerosis, v: Vertebra, local: tuple[Array, Array, Array]) -> Array:
    """Added density, mg/cm3: falls away from either endplate, stronger in front, in patches of about 2 cm."""
    x, y, _ = local
    a, b, c = lesion.patches_mm
    uneven = 1 + 0.3 * np.sin(x / 6.5 + np.float32(a)) * np.sin(y / 5.5 + np.float32(b))
    uneven *= np.clip(1 - np.float32(2 * lesion.forward / v.depth) * y, 0.2, None)
    total = np.zeros(x.shape, np.float32)
    for side in (-1.0, 1.0):
        deep = np.float32(lesion.depth_mm) * (1 + 0.35 * np.sin(x / 9 + np.float32(side * c)))
        total += np.exp(-((np.maximum(_depth_mm(v, local, side), 0) / deep) ** 1.5))
    return np.asarray(np.float32(lesion.mg_cm3) * uneven * total, dtype=np.float32)


def _depth_mm(v: Vertebra, local: tuple[Array, Array, Array], side: float) -> Array:
    """How deep below the upper (side 1) or lower (-1) endplate a point lies, along the body's axis."""
    x, y, z = local
    rho2 = (x * np.float32(2 / v.width)) ** 2 + (y * np.float32(2 / v.depth)) ** 2
    dish = np.float32(v.endplate_hollow) * np.clip(1 - rho2 * rho2, 0, 1) + np.float32(v.dent) * np.clip(1 - rho2, 0, 1)
    slope = np.float32((v.height_posterior - v.height_anterior) / (2 * v.depth))
    return np.asarray(np.float32(v.height / 2) + slope * y - dish - np.float32(side) * z, dtype=np.float32)


def hardware_points(v: Vertebra, screw: Hardware, side: float) -> tuple[Vec3, Vec3]:
    """Head and tip of one screw, local: from behind the facets through the pedicle into the body."""
    z, wall = 0.17 * v.arch_height, v.back_wall_y
    head = (side * (v.pedicle_x * 1.15 + 1.0), wall + v.canal_depth + 12.0, z + 1.0)
    inside = min(z, 0.25 * min(v.height_anterior, v.height_middle))
    tip = (side * v.pedicle_x * (1 - screw.convergence), wall - screw.reach * v.depth, inside)
    return head, tip
