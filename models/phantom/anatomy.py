"""What a digital patient is made of: frozen values, no randomness and no voxels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from models.phantom.geometry import Frame, as_vec3, rotation
from models.phantom.grid import Vec3

# TotalSegmentator `total` (2.x, datasets 291-295) class ids
LABELS = {
    "sacrum": 25,
    "S1": 26,
    "L5": 27,
    "L4": 28,
    "L3": 29,
    "L2": 30,
    "L1": 31,
    "T12": 32,
    "T11": 33,
    "T10": 34,
    "L6": 126,  # ours: TotalSegmentator has no sixth lumbar body
}
LUMBAR_COUNTS = (4, 5, 6)
LEVELS = ("L1", "L2", "L3", "L4")  # counted from the last rib down, whatever lies below them


def spine_names(lumbar_count: int) -> tuple[str, ...]:
    """The free vertebrae of a spine with so many lumbar bodies, caudal to cranial."""
    return (*(f"L{n}" for n in range(lumbar_count, 0, -1)), "T12", "T11", "T10")


SPINE = spine_names(5)


@dataclass(frozen=True)
class Vertebra:
    """One vertebra; local axes x left, y posterior, z up, origin in the middle of the body. Millimetres."""

    name: str
    frame: Frame
    width: float
    depth: float
    height_anterior: float
    height_posterior: float
    waist: float  # narrowing of the wall at mid-height, fraction
    squareness: float  # 0 ellipse .. 0.5 nearly a rounded square
    posterior_hollow: float  # how far the posterior wall is dished, fraction of half the depth
    endplate_hollow: float  # depth of the endplates' concavity
    lipping: float  # osteophytes: widening at the rims
    cortex: float  # effective thickness of the body's wall
    endplate: float
    posterior_cortex: float  # of the laminae and the spinous process
    lateral_cortex: float  # of the pedicles, articular and transverse processes: no midsagittal slab shows them
    trabecular_mg_cm3: float
    canal_width: float
    canal_depth: float
    pedicle_width: float
    pedicle_height: float
    transverse_span: float  # tip to tip
    transverse_rise: float
    spinous_length: float  # behind the lamina
    spinous_drop: float
    spinous_height: float
    facet_size: float
    texture_shift: Vec3
    dent: float = 0.0  # how far each endplate of a broken body sank in the middle, beside its own hollow
    height_intact: float | None = None  # mean height before it broke; None where it did not

    @property
    def label(self) -> int:
        """TotalSegmentator class id."""
        return LABELS[self.name]

    @property
    def height(self) -> float:
        """Mean height of the body's rim."""
        return 0.5 * (self.height_anterior + self.height_posterior)

    @property
    def height_middle(self) -> float:
        """Height between the deepest points of both endplates."""
        return self.height - 2 * (self.endplate_hollow + self.dent)

    @property
    def arch_height(self) -> float:
        """The height that the posterior elements were built for: a broken body leaves them as they were."""
        return self.height if self.height_intact is None else self.height_intact

    @property
    def pedicle_x(self) -> float:
        """Local x of the left pedicle's axis; the right one mirrors it."""
        return self.canal_width / 2 + self.pedicle_width / 2 - 1.0

    @property
    def back_wall_y(self) -> float:
        """Local y of the middle of the posterior wall."""
        return 0.5 * self.depth / (1 + self.posterior_hollow)


KINDS = ("wedge", "biconcave", "crush")  # Genant 1993 (J Bone Miner Res 8:1137)


@dataclass(frozen=True)
class Fracture:
    """A compression fracture: what the affected height lost, against the same vertebra intact."""

    level: str
    percent: float
    kind: str  # wedge: in front; biconcave: in the middle; crush: everywhere


@dataclass(frozen=True)
class Hardware:
    """A pair of pedicle screws; rods join those of neighbouring levels. Local millimetres of the vertebra."""

    level: str
    radius: float
    reach: float  # how far into the body, fraction of its depth
    convergence: float  # how far the tips come together, fraction of the pedicles' distance
    seed: int  # grain of the streaks


@dataclass(frozen=True)
class Blob:
    """An ellipsoid of cement in local millimetres."""

    center: Vec3
    radii: Vec3


@dataclass(frozen=True)
class Cement:
    """A vertebroplasty: lumps that run into one another and seep between the trabeculae."""

    level: str
    hu: float
    blobs: tuple[Blob, ...]


@dataclass(frozen=True)
class Sclerosis:
    """Dense bone under both endplates of a level."""

    level: str
    mg_cm3: float  # at the endplate, over the bone's own
    depth_mm: float  # where it has fallen to 1/e
    forward: float  # how much stronger in front than in the middle, fraction
    patches_mm: Vec3  # phase of its unevenness


@dataclass(frozen=True)
class Lesions:
    """What ails a spine beyond age and density; empty unless a setting asks for it."""

    fractures: tuple[Fracture, ...] = ()
    hardware: tuple[Hardware, ...] = ()
    cement: tuple[Cement, ...] = ()
    sclerosis: tuple[Sclerosis, ...] = ()

    def fracture(self, level: str) -> Fracture | None:
        """The fracture of that level."""
        return next((f for f in self.fractures if f.level == level), None)

    def at(self, level: str) -> list[str]:
        """The names of the settings that touch a level."""
        named: dict[str, tuple[Fracture | Hardware | Cement | Sclerosis, ...]] = {
            "fracture": self.fractures,
            "metal": self.hardware,
            "cement": self.cement,
            "sclerosis": self.sclerosis,
        }
        return [name for name, found in named.items() if any(lesion.level == level for lesion in found)]


@dataclass(frozen=True)
class Texture:
    """Band-limited variation of the trabecular density."""

    seed: int
    amplitude: float  # standard deviation over the mean, fine grain
    scale_mm: float  # correlation length of the grain
    coarse_amplitude: float  # slow regional variation


@dataclass(frozen=True)
class Bone:
    """What the skeleton's mineral is like, over all levels."""

    scale: float  # multiplies every mineral density; what `bmd_g_cm2` solves for
    cortical_mg_cm3: float
    posterior_trabecular: float  # trabecular density of posterior elements over that of the body
    marrow_fat: float  # fraction
    texture: Texture


@dataclass(frozen=True)
class Sacrum:
    """S1 with its frame at the middle of its body; the segments below follow a curve."""

    frame: Frame
    width: float
    depth: float
    height: float
    curve_rad: float  # turn between neighbouring segments
    ala_span: float
    trabecular_mg_cm3: float
    wing_radii: Vec3  # ellipsoid that the iliac wings lie on
    wing_crest: float  # height of the crest over the middle of S1
    wing_thickness: float


@dataclass(frozen=True)
class Vessels:
    """Aorta and vena cava, given relative to the front of each body."""

    aorta_radius: float
    aorta_left: float
    cava_radius: float
    cava_right: float
    calcification: float  # number of plaques is drawn from it, 0..1
    gap: float


@dataclass(frozen=True)
class Torso:
    """Soft parts. Lengths in mm, in a frame that turns with the patient on the table."""

    seed: int  # places bowel, plaques and fat streaks
    center: Vec3
    roll_rad: float
    half_width: float
    half_depth: float
    hip_widening: float
    chest_widening: float
    squareness: float
    fat_side: float
    fat_front: float
    fat_back: float
    wall: float
    psoas: float
    erector: float
    kidney: Vec3
    kidney_lift: float
    liver: float
    lung_lift: float
    bowel_count: int
    gas: float
    visceral_fat_hu: float
    muscle_hu: float
    ribs: bool
    table_gap: float
    lumbar_ribs: bool = False  # a thirteenth pair, short, on L1

    @property
    def radius_cm(self) -> float:
        """Of a round body with as large a cross-section."""
        return float(np.sqrt(self.half_width * self.half_depth)) / 10


@dataclass(frozen=True)
class Interval:
    """From the CT to the DXA, and what becomes of the bone meanwhile."""

    days: int
    change_per_year: float  # of every mineral density, fraction

    @property
    def factor(self) -> float:
        """Mineral at the DXA over mineral at the CT."""
        return 1.0 + self.change_per_year * self.days / 365.25


@dataclass(frozen=True)
class Acquisition:
    """How the CT was taken."""

    vendor: str
    kernel: str
    kvp: int
    slice_mm: float
    fov_mm: float
    noise_hu: float  # standard deviation in soft tissue, 3 mm slices
    contrast_phase: str
    coverage: tuple[str, str]  # cranial, caudal
    drop_slice: int | None  # -1: the middle one
    drift: float = 0.0  # of this day's mineral contrast, fraction, beside the vendor's own
    tilt_deg: float = 0.0  # of the gantry


@dataclass(frozen=True)
class Patient:
    """A digital patient: everything that rendering needs; equal seeds and settings give equal patients."""

    seed: int
    sex: str
    age: int
    bmi: float
    height_m: float
    vertebrae: tuple[Vertebra, ...]  # caudal to cranial
    disc_mm: tuple[float, ...]  # below each vertebra of `vertebrae`
    sacrum: Sacrum
    bone: Bone
    vessels: Vessels
    torso: Torso
    acquisition: Acquisition
    interval: Interval = Interval(0, 0.0)
    lesions: Lesions = Lesions()

    @property
    def lumbar_count(self) -> int:
        """How many free lumbar vertebrae lie between the last rib and the sacrum."""
        return sum(v.name.startswith("L") for v in self.vertebrae)

    @property
    def patient_id(self) -> str:
        """The identifier on its DICOM objects."""
        return f"OSG-{self.seed:06d}"

    def vertebra(self, name: str) -> Vertebra:
        """The vertebra of that name."""
        return next(v for v in self.vertebrae if v.name == name)

    def scaled(self, factor: float) -> Patient:
        """The same patient with every mineral density multiplied."""
        return replace(self, bone=replace(self.bone, scale=self.bone.scale * factor))

    def at_dxa(self) -> Patient:
        """The same patient on the day of the DXA."""
        return self.scaled(self.interval.factor)

    def rolled(self, angle_rad: float) -> Patient:
        """The same patient whose spine lies turned about the table's long axis, around L3."""
        pivot = np.asarray(self.vertebra("L3").frame.center)
        turn = rotation(0.0, 0.0, angle_rad)

        def turned(v: Vertebra) -> Vertebra:
            about_x, about_y, about_z = v.frame.angles_rad
            center = as_vec3(pivot + turn @ (np.asarray(v.frame.center) - pivot))
            return replace(v, frame=Frame(center, (about_x, about_y, about_z + angle_rad)))

        return replace(self, vertebrae=tuple(turned(v) for v in self.vertebrae))
