"""One CT scanner: kernel, slice sensitivity, correlated noise and a vendor's small bias.

All figures are approximations (what is printed beside them: SOURCES.md); kernel names are those of DOMAIN.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from models.phantom.anatomy import Patient
from models.phantom.grid import Array
from models.phantom.render import HU_PER_MG_CM3, Rendered


@dataclass(frozen=True)
class Kernel:
    """In-plane blur (Gaussian sigma, mm), and what it does to noise."""

    blur_mm: float
    noise_gain: float
    grain_mm: float


KERNELS = {
    "FC18": Kernel(0.62, 1.0, 0.75), "FC03": Kernel(0.70, 0.9, 0.85), "FC13": Kernel(0.66, 1.0, 0.8),
    "Br40": Kernel(0.60, 1.0, 0.75), "B": Kernel(0.66, 0.95, 0.8), "C": Kernel(0.58, 1.1, 0.7),
    "STANDARD": Kernel(0.78, 0.80, 0.95), "SOFT": Kernel(0.86, 0.70, 1.05),
    "FC30": Kernel(0.35, 2.2, 0.4), "Br59": Kernel(0.38, 2.0, 0.45), "BONE": Kernel(0.35, 2.3, 0.4),
}  # fmt: skip
DEFAULT_KERNEL = Kernel(0.64, 1.0, 0.8)


@dataclass(frozen=True)
class Bias:
    """How a vendor's HU differ: the beam's effective energy acts on mineral alone, the water calibration on all."""

    mineral_gain: float
    offset_hu: float


# Scanners differ by several per cent in bone density, more in large bodies (Bonaretti 2014, Phys Med Biol 59:7819);
# eight differed by 9.2 % (SD; Skornitzke 2022, see SOURCES.md). Which vendor reads high is ours. GE, and its kernels,
# lie outside the others' span: no shipped network has seen it.
BIAS = {
    "canon": Bias(1.0, -0.8), "siemens": Bias(1.02, 0.5), "philips": Bias(0.975, 1.5), "ge": Bias(1.04, -2.5),
}  # fmt: skip
# of mineral contrast for a centimetre of mean body radius beyond 14: beam hardening (its direction: Bonaretti 2014)
SIZE_LOSS = 0.002
LOWEST_HU, HIGHEST_HU = -1024, 3071


def scan(rendered: Rendered, patient: Patient, rng: np.random.Generator, blur: float = 1.0) -> NDArray[np.int16]:
    """HU as the scanner would deliver them on the same grid, int16, (nk, nj, ni); `blur` times as wide as usual."""
    kernel = KERNELS.get(patient.acquisition.kernel, DEFAULT_KERNEL)
    bias, gain = BIAS[patient.acquisition.vendor], np.float32(mineral_gain(patient) - 1.0)
    gain *= np.float32(HU_PER_MG_CM3[patient.acquisition.kvp])
    sk, sj, si = rendered.grid.spacing_kji_mm
    out = np.empty(rendered.grid.shape_kji, np.int16)
    noise = _Noise(rng, kernel, patient, rendered.grid.spacing_kji_mm, rendered.grid.shape_kji)
    hu, mineral = rendered.hu_noise_free, rendered.mineral_mg_cm3
    last = hu.shape[0] - 1
    side = np.float32(min(0.16, 0.16 * (patient.acquisition.slice_mm / sk) ** 2 if sk < 2.0 else 0.12))
    for k in range(last + 1):
        plane = (1 - 2 * side) * hu[k] + side * (hu[max(k - 1, 0)] + hu[min(k + 1, last)])
        plane += gain * mineral[k]
        plane = ndimage.gaussian_filter(plane, (blur * kernel.blur_mm / sj, blur * kernel.blur_mm / si), truncate=3.0)
        plane += np.float32(bias.offset_hu) * (plane > -950)
        plane += noise.slice() * (plane > -950)
        out[k] = np.clip(np.rint(plane), LOWEST_HU, HIGHEST_HU)
    return out


def mineral_gain(patient: Patient) -> float:
    """HU of mineral over what the nominal beam would give: vendor, this day's drift, and the patient's size."""
    drift = patient.acquisition.drift - SIZE_LOSS * (patient.torso.radius_cm - 14.0)
    return BIAS[patient.acquisition.vendor].mineral_gain * (1.0 + drift)


class _Noise:
    """Noise with a soft-tissue grain in the plane; its strength follows dose, patient and voxel."""

    def __init__(
        self,
        rng: np.random.Generator,
        kernel: Kernel,
        patient: Patient,
        spacing: tuple[float, float, float],
        shape: tuple[int, int, int],
    ) -> None:
        self.rng, self.shape = rng, shape[1:]
        self.sigma_px = (kernel.grain_mm / spacing[1], kernel.grain_mm / spacing[2])
        # averaging over thicker slices and, once pixels exceed the grain, over larger pixels
        thickness = float(np.sqrt(3.0 / max(spacing[0], 1.0)))
        pixel = min(1.0, 2.2 * kernel.grain_mm / spacing[2])
        self.target = patient.acquisition.noise_hu * kernel.noise_gain * thickness * pixel
        self.gain = 0.0

    def slice(self) -> Array:
        """One (nj, ni) plane."""
        white = self.rng.standard_normal(self.shape, dtype=np.float32)
        plane = ndimage.gaussian_filter(white, self.sigma_px, truncate=2.5, mode="wrap")
        plane -= np.float32(0.5) * ndimage.uniform_filter(plane, 9, mode="wrap")
        if self.gain == 0.0:
            self.gain = self.target / float(plane.std())
        return np.asarray(plane * np.float32(self.gain), dtype=np.float32)


def scanner_rng(patient: Patient) -> np.random.Generator:
    """The scanner's own random numbers, apart from those of the anatomy."""
    return np.random.default_rng([patient.seed, 2])
