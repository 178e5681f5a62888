"""Other names for levels: what can be asked for, and what cannot."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from service.domain.renumber import LADDER, RenumberingError, mapped, shifted


def test_the_ladder_runs_from_the_head_to_a_sixth_lumbar_body() -> None:
    assert (LADDER[0], LADDER[-8:]) == ("C1", ("T11", "T12", "L1", "L2", "L3", "L4", "L5", "L6"))


def test_a_shift_names_every_level_and_none_beyond_the_ladder() -> None:
    down, up = shifted(1), shifted(-1)
    assert (down["T12"], down["L1"], down["L5"]) == ("L1", "L2", "L6")
    assert (up["L1"], up["L6"]) == ("T12", "L5")
    assert "L6" not in down
    assert "C1" not in up
    assert shifted(0) == {name: name for name in LADDER}


@pytest.mark.parametrize("steps", [3, -3, 100])
def test_a_shift_beyond_any_variant_is_refused(steps: int) -> None:
    with pytest.raises(RenumberingError, match="up to 2 places"):
        shifted(steps)


def test_a_mapping_takes_its_names_from_whoever_had_them() -> None:
    told = mapped({"T12": "L1", "L1": "L2"})
    assert (told["T12"], told["L1"], told["L3"]) == ("L1", "L2", "L3")
    assert "L2" not in told  # it was given away, and got no other
    swapped = mapped({"L2": "L3", "L3": "L2"})
    assert (swapped["L2"], swapped["L3"]) == ("L3", "L2")


@pytest.mark.parametrize(
    ("levels", "why"),
    [
        ({"L1": "L7"}, "L7"),
        ({"sacrum": "L5"}, "sacrum"),
        ({"liver": "L1"}, "liver"),
        ({"L1": "L2", "L3": "L2"}, "two levels cannot both be L2"),
    ],
)
def test_an_impossible_mapping_is_refused(levels: Mapping[str, str], why: str) -> None:
    with pytest.raises(RenumberingError, match=why):
        mapped(levels)
