"""Other names for the levels of a result: what a person may ask for, as a mapping from each name to the right one.

Pure and small: whether the vertebrae are in order and whole under their new names is for the worker's level checks.
"""

from __future__ import annotations

from collections.abc import Mapping

from service.domain.errors import OsteogateError
from service.domain.vertebrae import VERTEBRAE

FIXED = ("sacrum", "S1")  # what the numbering is counted from has no other name
LADDER = tuple(one.name for one in sorted(VERTEBRAE, key=lambda one: (one.name != "L6", one.class_id)))[::-1]
LADDER = tuple(name for name in LADDER if name not in FIXED)  # from the head down
MOST_STEPS = 2


class RenumberingError(OsteogateError):
    """Names that levels cannot be given; the message is for people."""


def shifted(steps: int) -> dict[str, str]:
    """Every level called as the one so many places below it; 1: T12 is L1, L1 is L2. 0 confirms the names.

    What would lie beyond either end of the ladder loses its name.

    Raises:
        RenumberingError: more steps than any variant of the spine accounts for.
    """
    if abs(steps) > MOST_STEPS:
        raise RenumberingError(f"levels can be shifted by up to {MOST_STEPS} places, not by {abs(steps)}")
    places = {name: place + steps for place, name in enumerate(LADDER)}
    return {name: LADDER[place] for name, place in places.items() if 0 <= place < len(LADDER)}


def mapped(levels: Mapping[str, str]) -> dict[str, str]:
    """Exactly these levels under other names, every other one under its own.

    Raises:
        RenumberingError: an unknown name, or two levels under one name.
    """
    unknown = sorted({*levels, *levels.values()} - set(LADDER))
    if unknown:
        raise RenumberingError(
            f"{', '.join(unknown)}: not a vertebra that can be renamed ({LADDER[0]} to {LADDER[-1]})"
        )
    told = {name: levels.get(name, name) for name in LADDER}
    given = list(levels.values())
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise RenumberingError(f"two levels cannot both be {' and '.join(twice)}")
    kept = [name for name in LADDER if name not in levels and name in given]
    return {name: new for name, new in told.items() if name not in kept}  # a name that was given away is given up
