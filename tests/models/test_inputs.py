"""What the network sees: one window, one field, the same for training and prediction."""

import numpy as np
import pytest

from models.crop import OUTSIDE_HU
from models.inputs import InputConfig, central_field, display_view, network_input, windowed

CONFIG = InputConfig(slabs=3)


def slabs(size: int = 256, vertebrae: int = 2) -> np.ndarray:
    hu = np.full((vertebrae, 3, size, size), OUTSIDE_HU, dtype=np.float32)
    middle = size // 2
    body = hu[..., middle - 12 : middle + 12, middle - 15 : middle + 15]
    body[:] = np.random.default_rng(0).normal(150, 40, body.shape)
    return hu


def test_input_is_the_same_from_the_whole_slab_and_from_its_middle() -> None:
    whole = slabs(256)
    middle = whole[..., 64:192, 64:192]
    assert np.array_equal(network_input(whole, CONFIG), network_input(middle, CONFIG))
    assert np.array_equal(network_input(whole, CONFIG), network_input(whole.astype(np.float64), CONFIG))


def test_input_has_three_channels_and_grey_levels_of_one_byte() -> None:
    picture = network_input(slabs(), CONFIG)
    assert picture.shape == (2, 3, 48, 80)
    assert picture.dtype == np.float32
    assert np.allclose(picture * 255, np.rint(picture * 255), atol=1e-4)


def test_outside_is_zero_and_inside_never_is() -> None:
    hu = np.array([OUTSIDE_HU, -900.0, -200.0, 300.0, 800.0, 2000.0])
    assert windowed(hu, CONFIG).tolist() == pytest.approx([0, 1 / 255, 1 / 255, 128 / 255, 1, 1], abs=1e-6)


def test_the_field_reaches_further_back_than_forward() -> None:
    hu = np.zeros((256, 256))
    hu[128, 128 + 50] = 1  # a spinous process
    hu[128, 128 - 30] = 2  # before any vertebra
    field = central_field(hu, CONFIG)
    assert (field == 1).sum() == 1
    assert (field == 2).sum() == 0


def test_a_field_larger_than_the_stored_slab_is_the_whole_slab() -> None:
    """A cohort stores the middle of its slabs; the rest of the whole field lies outside the vertebra."""
    full = InputConfig(rows=256, columns=256, posterior_shift_px=0, slabs=1)
    whole = slabs(256)
    assert np.array_equal(network_input(whole[..., 64:192, 64:192], full), network_input(whole, full))
    further_back = InputConfig(rows=140, columns=80, posterior_shift_px=40, slabs=3)
    assert np.array_equal(network_input(whole[..., 64:192, 64:192], further_back), network_input(whole, further_back))


def test_neighbours_are_channels_in_order_and_one_slab_is_repeated() -> None:
    hu = slabs()
    for index, value in enumerate((100.0, 200.0, 300.0)):
        hu[:, index, 120:136, 120:136] = value
    seen = network_input(hu, CONFIG)[0, :, 24, 24]
    assert (np.diff(seen) > 0).all()
    single = network_input(hu, InputConfig(slabs=1))[0, :, 24, 24]
    assert (single == seen[1]).all()


def test_as_many_slabs_as_a_network_sees_are_its_channels() -> None:
    hu = np.zeros((1, 9, 256, 256), dtype=np.float32) + 100 * np.arange(9)[None, :, None, None]
    nine, five = (network_input(hu, InputConfig(slabs=count)) for count in (9, 5))
    assert nine.shape == (1, InputConfig(slabs=9).channels, 48, 80)
    assert np.array_equal(five, nine[:, 2:7])
    assert (np.diff(nine[0, :, 24, 24]) > 0).all()


def test_a_missing_neighbour_is_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        network_input(slabs()[:, 1], CONFIG)


@pytest.mark.parametrize(
    "wrong", [{"window_low_hu": 900.0}, {"slabs": 2}, {"slabs": 11}, {"rows": 16}, {"grey_levels": 0}]
)
def test_impossible_configurations_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"window|sees|at least"):
        InputConfig.from_dict(wrong)


def test_configuration_survives_the_manifest() -> None:
    changed = InputConfig(rows=96, slabs=1)
    assert InputConfig.from_dict(changed.to_dict()) == changed


def test_display_view_is_a_byte_picture() -> None:
    view = display_view(np.array([[-1024.0, -200.0, 300.0, 800.0]], dtype=np.float32))
    assert view.dtype == np.uint8
    assert view.tolist() == [[0, 0, 128, 255]]
