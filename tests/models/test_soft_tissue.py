"""Fat over the spine, as a CT shows it: on slabs of fat and muscle that are known, and on digital patients."""

import numpy as np
import numpy.typing as npt
import pytest

from models.phantom import dxa
from models.phantom.anatomy import LEVELS
from models.phantom.cohort import draw_member, fat_of
from models.phantom.render import native_grid, render
from models.phantom.scanner import scan, scanner_rng
from models.soft_tissue import fat_over_spine_cm

MIDDLE = (0.0, 20.0, 30.0)
AFFINE = np.array([[0, 0, 1, -110.0], [0, 1, 0, -100.0], [3, 0, 0, 0.0], [0, 0, 0, 1.0]])


def trunk(over_cm: float = 2.0, beside_cm: float = 2.0, table: bool = False) -> npt.NDArray[np.float32]:
    """A box of muscle in air, 20 cm wide and 16 deep, with so much fat at its front over and beside the spine."""
    hu = np.full((21, 220, 220), -1000.0, np.float32)
    hu[:, 20:180, 10:210] = 50.0
    across = np.abs(np.arange(220) - 110.0)
    hu[:, 20 : 20 + round(10 * over_cm), across <= 28] = -103.0
    hu[:, 20 : 20 + round(10 * beside_cm), (across > 28) & (across < 100)] = -103.0
    if table:
        hu[:, 190:193] = -100.0
    return hu


@pytest.mark.parametrize(("over", "beside"), [(2.0, 2.0), (3.0, 2.0), (0.5, 2.5)])
def test_it_is_the_difference_between_over_and_beside(over: float, beside: float) -> None:
    found = fat_over_spine_cm(trunk(over, beside), AFFINE, MIDDLE)
    assert found == pytest.approx(over - beside, abs=0.1)


def test_a_table_a_turned_array_and_noise_change_nothing() -> None:
    plain = fat_over_spine_cm(trunk(3.0), AFFINE, MIDDLE)
    assert fat_over_spine_cm(trunk(3.0, table=True), AFFINE, MIDDLE) == pytest.approx(plain, abs=0.02)
    turned = AFFINE.copy()
    turned[1, 1], turned[1, 3] = -1.0, -100.0 + 219
    assert fat_over_spine_cm(trunk(3.0)[:, ::-1], turned, MIDDLE) == pytest.approx(plain, abs=0.02)
    noisy = trunk(3.0) + np.random.default_rng(0).normal(0, 20, (21, 220, 220)).astype(np.float32)
    assert fat_over_spine_cm(noisy, AFFINE, MIDDLE) == pytest.approx(plain, abs=0.1)


def test_what_the_ct_does_not_show_is_not_told() -> None:
    assert np.isnan(fat_over_spine_cm(trunk(), AFFINE, (0.0, 20.0, 300.0)))  # no slice
    assert np.isnan(fat_over_spine_cm(trunk()[:, :, 60:], AFFINE, (0.0, 20.0, 30.0)))  # no room beside the spine
    assert np.isnan(fat_over_spine_cm(trunk()[:, 22:], AFFINE, (0.0, 0.0, 30.0)))  # the body's front is cut off
    assert np.isnan(fat_over_spine_cm(np.full((21, 220, 220), -1000.0), AFFINE, MIDDLE))  # nobody
    coronal = AFFINE[:, [1, 0, 2, 3]]
    assert np.isnan(fat_over_spine_cm(trunk(), coronal, MIDDLE))


def test_a_cohort_s_figure_is_that_of_the_whole_ct_and_goes_with_the_densitometer_s() -> None:
    coarse: list[float] = []
    whole: list[float] = []
    causes: list[float] = []
    for seed in range(200_000, 200_010):
        patient = draw_member(seed, {}, enriched=False)
        coarse += fat_of(patient)
        causes += [dxa.fat_over_spine_cm(patient)[level] for level in LEVELS]
        if seed < 200_003:
            grid = native_grid(patient)
            rendered = render(patient, grid)
            hu = scan(rendered, patient, scanner_rng(patient))
            middles = [np.array(patient.vertebra(level).frame.center) for level in LEVELS]
            whole += [fat_over_spine_cm(hu, rendered.affine, middle) for middle in middles]
    assert not np.isnan(coarse).any()
    assert np.abs(np.array(coarse[: len(whole)]) - whole).mean() < 0.15
    assert np.corrcoef(coarse, causes)[0, 1] > 0.7
