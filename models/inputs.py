"""Slabs in HU -> what the network sees; one piece of code for training and for prediction.

The paper masks the slab to the vertebra, writes it as an 8-bit picture and gives no grey-value window. Ours
is -200 to 800 HU: below it no bone is found (fatty marrow stays above -100 HU), above it none that 5 mm of
averaging leaves (dense cortex stays below about 800 HU; metal and cement are excluded earlier), so that the
picture remains a linear measure of bone mineral. 255 steps of 3.9 HU lie far below a voxel's noise.

The slab is empty outside one vertebra, so the network takes only the field that a vertebra can fill, cut
from the 300 mm slab at its own resolution (no resampling): 48 x 80 pixels, 56 mm from top to bottom and
from 28 mm in front of the body's middle to 66 mm behind it, where most spinous processes end.

The paper's network sees the midsagittal slab. Half of what a densitometer counts lies behind the body (Lee 2009, doi
10.1359/jbmr.090224), and sclerotic facets add up to 0.47 g/cm2 to a level (Drinka 1992, Calcif Tissue Int 50:507). So
ours sees the whole vertebra: nine adjoining slabs, one channel each.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from models.crop import OUTSIDE_HU, PIXEL_MM, SLABS, Floats


@dataclass(frozen=True)
class InputConfig:
    """Everything that lies between a slab in HU and the network; part of a model package's manifest."""

    window_low_hu: float = -200.0
    window_high_hu: float = 800.0
    grey_levels: int = 255  # steps of the 8-bit picture; 0 is kept for "outside the vertebra"
    rows: int = 48  # pixels, superior to inferior
    columns: int = 80  # pixels, anterior to posterior
    posterior_shift_px: int = 16  # of the field's middle behind the body's middle
    slabs: int = 9  # adjoining slabs seen together, as the picture's channels; 9 show the whole vertebra
    pixel_mm: float = PIXEL_MM

    def __post_init__(self) -> None:
        if self.window_high_hu <= self.window_low_hu or not 1 <= self.grey_levels <= 65535:
            raise ValueError("the window must rise and have 1 to 65535 grey levels")
        if not 1 <= self.slabs <= SLABS or self.slabs % 2 == 0:
            raise ValueError(f"the network sees an odd number of slabs, at most {SLABS}, not {self.slabs}")
        if min(self.rows, self.columns) < 32:
            raise ValueError("the field must have at least 32 x 32 pixels")

    @property
    def channels(self) -> int:
        """Of the picture: a single slab is in all three of a usual ResNet50."""
        return 3 if self.slabs == 1 else self.slabs

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def central_field(slabs: npt.NDArray[Any], config: InputConfig) -> npt.NDArray[Any]:
    """[..., size, size] -> [..., rows, columns]: the part of the slab that a vertebra can fill.

    A cohort stores the middle of its slabs; what a larger field has around it is outside the vertebra.
    """
    height, width = slabs.shape[-2:]
    top = (height - config.rows) // 2
    left = (width - config.columns) // 2 + config.posterior_shift_px
    above, before = max(0, -top), max(0, -left)
    below, behind = max(0, top + config.rows - height), max(0, left + config.columns - width)
    if above or before or below or behind:
        around = [(0, 0)] * (slabs.ndim - 2) + [(above, below), (before, behind)]
        slabs = np.pad(slabs, around, constant_values=OUTSIDE_HU)
    top, left = top + above, left + before
    return slabs[..., top : top + config.rows, left : left + config.columns]


def windowed(hu: npt.NDArray[Any], config: InputConfig) -> Floats:
    """HU -> 0..1 in grey-level steps; outside the vertebra 0, inside it at least one step."""
    share = (np.asarray(hu, dtype=np.float32) - config.window_low_hu) / (config.window_high_hu - config.window_low_hu)
    grey = np.clip(np.rint(share * config.grey_levels), 1, config.grey_levels)
    picture: Floats = np.where(hu <= OUTSIDE_HU, 0.0, grey / config.grey_levels).astype(np.float32)
    return picture


def network_input(slabs: npt.NDArray[Any], config: InputConfig) -> Floats:
    """Slabs [vertebrae, slabs, size, size] (or [vertebrae, size, size]) HU -> [vertebrae, channels, rows, columns].

    Of more slabs than the network sees, the middle ones. A network that sees one gets it three times, because
    ResNet50 has three channels.
    """
    if slabs.ndim == 3:
        slabs = slabs[:, None]
    if slabs.ndim != 4 or slabs.shape[1] < config.slabs:
        raise ValueError(f"expected [vertebrae, {config.slabs}, size, size], got {list(slabs.shape)}")
    middle = slabs.shape[1] // 2
    reach = config.slabs // 2
    seen = slabs[:, [middle] * 3] if config.slabs == 1 else slabs[:, middle - reach : middle + reach + 1]
    return windowed(central_field(seen, config), config)


def display_view(hu: Floats, *, low_hu: float = -200.0, high_hu: float = 800.0) -> npt.NDArray[np.uint8]:
    """A slab in HU as an 8-bit picture for people, in the same window that the network sees."""
    share = np.clip((hu - low_hu) / (high_hu - low_hu), 0.0, 1.0)
    picture: npt.NDArray[np.uint8] = np.rint(share * 255).astype(np.uint8)
    return picture
