"""What a densitometer is and how far it errs: the dials of `dxa.py` (what is printed beside them: SOURCES.md)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Densitometer:
    """The dials. Approximations, but for the pixel; chosen so that repeated scans differ by about 1.5 %."""

    pixel_mm: tuple[float, float] = (1.05, 0.6)  # along the spine, across
    roll_sd_deg: float = 3.0  # how differently a patient lies from scan to scan
    line_sd_mm: float = 1.0  # how differently an operator draws a line between two vertebrae
    blur_mm: float = 0.35  # Gaussian sigma of the detector's aperture
    noise_g_cm2: float = 0.004  # of one pixel, at 20 cm of tissue
    # g/cm2 for a centimetre of fat over the spine that is not beside it; between what tabulated attenuation makes of
    # adipose tissue (-0.040) and of lipid (-0.052): tests/models/phantom/test_tabulated_attenuation.py
    fat_as_bone: float = -0.048
    fat_usual_cm: float = 0.52  # that difference in the patients whom the manufacturer calibrated with
    bowel_sd_cm: float = 0.30  # how much that difference changes from scan to scan with what the bowel holds
    edge_share: float = 0.40  # of the level's median density: where bone begins
    radius_mm: float = 3.1  # neighbourhood of the variogram: 5 pixels across, 2 along
    # Gaussian sigma of the slow course that is taken off before: pedicles and arches are no texture
    trend_mm: float = 3.0
    # of a level's pixels, those that the edges of pedicles and arches cross least, are looked at
    calm_share: float = 0.6
    # affine recalibration of the variogram's slope, chosen once on drawn patients for a mean of 1.36 (0.13)
    tbs_slope: float = 1.035
    tbs_offset: float = -0.350


PRODIGY = Densitometer()
