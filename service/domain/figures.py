"""How many digits a figure needs where it stands beside a cut."""

from __future__ import annotations

from collections.abc import Iterable

ARITHMETIC_DIGITS = 9  # "at the threshold" must not depend on the last bit of a division


def digits_beside(value: float, cuts: Iterable[float], fewest: int) -> int:
    """As many digits as it takes for the rounded value to lie on the same side of every (rounded) cut as the value.

    79.6 told as "80" beside a cut of 80 would say that it is not below it.
    """
    exact, marks = round(value, ARITHMETIC_DIGITS), tuple(cuts)
    for digits in range(fewest, ARITHMETIC_DIGITS):
        if all(_side(round(exact, digits), round(cut, digits)) == _side(exact, cut) for cut in marks):
            return digits
    return ARITHMETIC_DIGITS


def figure_beside(value: float, cuts: Iterable[float], fewest: int) -> str:
    """The value as text, with `digits_beside` digits."""
    exact = round(value, ARITHMETIC_DIGITS)
    return f"{exact:.{digits_beside(value, cuts, fewest)}f}"


def _side(value: float, cut: float) -> int:
    return (value > cut) - (value < cut)
