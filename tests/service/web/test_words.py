"""How values are told to people."""

from __future__ import annotations

import pytest

from service.domain.policy import ReferralPolicy
from service.web import words
from service.web.bands import MARGIN, WIDTH, axes


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ("Yamada^Hanako=山田^花子=やまだ^はなこ", "Yamada, Hanako 山田 花子"),
        ("SMITH^JOHN^Q^^", "SMITH, JOHN Q"),
        ("Phantom", "Phantom"),
        ("^^^", "Name not given"),
        (None, "Name not given"),
        ("=山田^花子", "山田 花子"),
    ],
)
def test_person_name(stored: str | None, told: str) -> None:
    assert words.person_name(stored) == told


def test_day() -> None:
    assert words.day("20261103") == "3 Nov 2026"
    assert words.day("2026") == "2026"
    assert words.day(None) == words.MISSING


def test_numbers_keep_their_sign_and_absence() -> None:
    assert words.number(-4.6, 0) == "−5"
    assert words.number(None) == words.MISSING
    assert words.interval((-12.0, 8.0), 0) == "−12 to 8"
    assert words.interval(None) == ""


def level(hu: float | None) -> dict[str, object]:
    return {"valid": hu is not None, "hu_mean": hu, "bmd_g_cm2": None, "tbs": None}


def test_bands_follow_the_policy() -> None:
    document = {
        "patient": {
            "bmd_g_cm2": 0.7,
            "percent_yam": 70.0,
            "bmd_interval": [0.6, 0.8],
            "tbs": None,
            "hu_mean": -40.0,
        },
        "levels": {name: level(hu) for name, hu in zip(words_levels(), (None, -40.0, 90.0, 300.0), strict=True)},
    }
    bmd, attenuation = axes(document, ReferralPolicy())
    assert [tick.label for tick in bmd.ticks] == ["0.70", "0.80"]  # young-adult mean of 1.0
    assert bmd.marks[-1].x == bmd.ticks[0].x
    assert attenuation.note is not None  # L1 is missing: said
    for drawing in (bmd, attenuation):
        assert all(MARGIN <= mark.x <= WIDTH - MARGIN for mark in drawing.marks)


def words_levels() -> tuple[str, ...]:
    return ("L1", "L2", "L3", "L4")
