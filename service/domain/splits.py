"""Which patients train and which judge: by patient, for good.

A patient who once judged (the locked test set) never trains, and one who once trained never judges: places that were
given stay, and only new patients are drawn. Both draws are even over bone density, so that neither the locked set nor
a tenth misses the low end by chance. Pure: the seed is an argument, and the order of the patients plays no part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

TENTHS = 10  # a cohort's `fold` column: tenths of its training patients


class Part(StrEnum):
    """What a patient is for."""

    TRAINING = "training"
    LOCKED = "locked"  # judges finished models, and is seen by no training


@dataclass(frozen=True, slots=True)
class Person:
    """One patient with pairs; `bmd_g_cm2` (mean of the levels that count) only makes the draw even."""

    key: str
    bmd_g_cm2: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where a patient belongs, from the first run that saw them on; `tenth` is None in the locked set."""

    part: Part
    tenth: int | None = None


def places(people: Iterable[Person], known: Mapping[str, Place], *, seed: int, locked_share: float) -> dict[str, Place]:
    """Everybody's place: the known one, else a drawn one.

    Args:
        people: each patient once.
        known: the places that earlier runs gave, of these patients and of others.
        seed: of the draw for those who have none.
        locked_share: of new patients, who join the locked set; 0 to 1.
    """
    everybody = sorted(people, key=lambda one: (one.bmd_g_cm2, one.key))
    new = [one for one in everybody if one.key not in known]
    locked = set(_locked(new, seed, locked_share))
    given = dict(known)
    given |= {key: Place(Part.LOCKED) for key in locked}
    learning = [one.key for one in new if one.key not in locked]
    given |= {key: Place(Part.TRAINING, tenth) for key, tenth in _tenths(learning, known, seed)}
    return {one.key: given[one.key] for one in everybody}


def _locked(new: Sequence[Person], seed: int, share: float) -> Iterator[str]:
    """Of every block of neighbours in density one; of what remains each with the probability `share`."""
    blocks: dict[int, list[str]] = {}  # as long as `share` has them be on average: 3 and 2 in turn for 0.4
    for index, one in enumerate(new):
        blocks.setdefault(_quota(index, share), []).append(one.key)
    for block, keys in blocks.items():
        if _quota(len(new), share) > block:
            yield min(keys, key=lambda key: _drawn(seed, "locked", key))
        else:
            yield from (key for key in keys if _drawn(seed, "locked", key) < share)


def _quota(count: int, share: float) -> int:
    """How many of so many are locked; rounded first, for 0.1 x 30 is 3 and no less."""
    return math.floor(round(count * share, 9))


def _tenths(learning: Sequence[str], known: Mapping[str, Place], seed: int) -> Iterator[tuple[str, int]]:
    """Neighbours in density go to ten different tenths, the emptiest first."""
    filled = dict.fromkeys(range(TENTHS), 0)
    for place in known.values():
        if place.tenth is not None:
            filled[place.tenth] += 1
    for start in range(0, len(learning), TENTHS):
        block = sorted(learning[start : start + TENTHS], key=lambda key: _drawn(seed, "tenth", key))
        order = sorted(filled, key=lambda tenth: (filled[tenth], _drawn(seed, f"block {start}", str(tenth))))
        for key, tenth in zip(block, order, strict=False):
            filled[tenth] += 1
            yield key, tenth


def _drawn(seed: int, what: str, key: str) -> float:
    """A number in [0, 1) that seed, purpose and key fix."""
    digest = hashlib.sha256(f"{seed}\x00{what}\x00{key}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
