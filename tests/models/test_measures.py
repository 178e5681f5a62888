"""The measures of a vertebra's slabs follow what they are named after."""

import numpy as np
import pytest

from models.crop import OUTSIDE_HU, SLABS
from models.measures import NAMES, measures

SIDE = 128


def block(hu: float | np.ndarray, slabs: int = SLABS) -> np.ndarray:
    """A box of bone, 30 rows by 60 columns around the slabs' middle, in every slab: [slabs, size, size] HU."""
    made = np.full((slabs, SIDE, SIDE), OUTSIDE_HU)
    made[:, 49:79, 44:104] = hu
    return made


def grainy(sd: float, smooth: int = 1) -> np.ndarray:
    """The box with grain of one standard deviation, each grain `smooth` pixels wide along rows and columns."""
    fine = np.random.default_rng(3).standard_normal((SLABS, 30 // smooth, 60 // smooth))
    return block(200.0 + sd * fine.repeat(smooth, axis=1).repeat(smooth, axis=2))


def named(slabs: np.ndarray) -> dict[str, float]:
    return dict(zip(NAMES, measures(slabs), strict=True))


def test_names_are_unique_and_every_one_has_a_number() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert np.isfinite(measures(grainy(40.0))).all()


def test_mineral_is_a_sum_over_the_projected_area() -> None:
    one = named(block(150.0))
    assert one["projected_area"] == SLABS * 30
    assert np.expm1(one["mineral"]) == pytest.approx(200.0 * SLABS * 30 * 60)  # counted from marrow's -50 HU
    assert np.expm1(one["mineral_per_area"]) == pytest.approx(200.0 * 60)
    assert one["body_volume"] + one["behind_volume"] == SLABS * 30 * 60
    assert (one["middle_height"], one["middle_depth"], one["middle_area"]) == (30, 60, 1800)
    assert named(block(150.0, 5))["projected_area"] == 5 * 30


def test_the_body_ends_where_the_canal_begins() -> None:
    slabs = block(100.0)
    slabs[:, 49:79, 79:104] = 500.0  # 18 mm behind the middle: 15 pixels
    found = named(slabs)
    assert (found["body_mean"], found["behind_mean"]) == (100.0, 500.0)


def test_grain_is_seen_by_amplitude_and_by_width() -> None:
    even, weak, strong = (named(grainy(sd)) for sd in (0.0, 20.0, 60.0))
    for name in ("slabs1_variogram_down_1", "slabs5_variogram_back_2", "core_fine_sd", "core_sd"):
        assert even[name] == 0.0 < weak[name] < strong[name]
    assert np.expm1(strong["slabs5_variogram_back_4"]) == pytest.approx(60.0**2, rel=0.1)  # a variogram's sill
    wide = named(grainy(60.0, smooth=3))
    assert wide["slabs5_variogram_down_1"] < strong["slabs5_variogram_down_1"] - 0.5
    assert wide["slabs5_variogram_down_4"] == pytest.approx(strong["slabs5_variogram_down_4"], abs=0.2)


def test_a_cohorts_whole_numbers_and_a_cts_fractions_measure_alike() -> None:
    slabs = grainy(40.0)
    assert np.array_equal(measures(slabs), measures(np.rint(slabs).astype(np.int16)))
    assert np.array_equal(measures(slabs), measures(np.pad(slabs, ((0, 0), (64, 64), (64, 64)), constant_values=-1024)))


@pytest.mark.parametrize("voxels", [0, 1, 2])
def test_next_to_nothing_is_measured_without_a_crash(voxels: int) -> None:
    slabs = np.full((SLABS, SIDE, SIDE), OUTSIDE_HU)
    slabs[SLABS // 2, 64, 64 : 64 + voxels] = 300.0
    found = measures(slabs)
    assert found.shape == (len(NAMES),)
    assert np.isnan(found).all() == (voxels == 0)
