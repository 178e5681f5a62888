"""How values are told to people."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.domain.monitoring import Estimate
from service.domain.policy import DEFAULT_POLICY, ReferralPolicy
from service.domain.promotion import Check, Verdict
from service.domain.reasons import Code
from service.domain.states import DeliveryState
from service.web import words
from service.web.bands import MARGIN, WIDTH, axes
from service.workflow.models import ModelLine
from service.workflow.reading import Address, DeliveryLine, DestinationLine


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


YOUNG = {"mean_g_cm2": 1.0, "sd_g_cm2": 0.13, "bmd_g_cm2": 0.7, "bmd_interval": [0.6, 0.8]}


def level(hu: float | None) -> dict[str, object]:
    return {"valid": hu is not None, "hu_mean": hu, "bmd_g_cm2": None, "tbs": None}


def test_who_decides_for_people_is_told_with_its_reason() -> None:
    policy = replace(DEFAULT_POLICY, referral=replace(DEFAULT_POLICY.referral, network_gate_passed=True))
    passed = Check(Code.GATE_BIAS, True, "")
    verdict = Verdict(policy.gate_label, "c" * 64, None, (passed,), ("canon One", "ge Two"))
    when = datetime(2026, 11, 23, tzinfo=UTC)
    model = ModelLine(
        2, "site-1", "c" * 64, "trained", "1", False, True, {}, verdict, when, None, None, when, "ito", True, ()
    )  # fmt: skip
    assert "scanned on canon One, ge Two." in words.may_drive(model, policy)
    assert "scanned here" in words.may_drive(replace(model, verdict=replace(verdict, scanners=None)), policy)
    stricter = replace(policy, gate=replace(policy.gate, bias_g_cm2=0.01))
    for amiss, under, why in (
        (model, stricter, "judged again"),
        (model, DEFAULT_POLICY, "network_gate_passed"),
        (replace(model, verdict=None), policy, "not passed this site's gate"),
        (replace(model, synthetic_only=True), policy, "digital patients alone"),
    ):
        told = words.may_drive(amiss, under)
        assert why in told
        assert "CT attenuation" in told


def test_a_scanner_reads_high_only_where_its_whole_interval_does() -> None:
    for low, high, told in (
        (0.021, 0.08, "reads high"), (0.019, 0.08, "not sure"), (-0.09, -0.03, "reads low"), (-0.02, 0.015, "within"),
        (-0.03, 0.03, "not sure"),
    ):  # fmt: skip
        assert words.reads(Estimate((low + high) / 2, low, high, 30), 0.02) == told


def test_bands_follow_the_policy() -> None:
    document = {
        "patient": {
            "bmd_g_cm2": 0.7,
            "percent_yam": 70.0,
            "bmd_interval": [0.6, 0.8],
            "tbs": None,
            "hu_mean": -40.0,
            "reference": YOUNG | {"region": "L1-L4", "levels": ["L2", "L3", "L4"]},
        },
        "decision": {"criteria": "YOSHIDA_2023"},
        "levels": {name: level(hu) for name, hu in zip(words_levels(), (None, -40.0, 90.0, 300.0), strict=True)},
    }
    bmd, attenuation = axes(document, ReferralPolicy())
    assert [tick.label for tick in bmd.ticks] == ["0.70", "0.80"]  # young-adult mean of 1.0
    assert bmd.marks[-1].x == bmd.ticks[0].x
    assert attenuation.note is not None  # L1 is missing: said
    for drawing in (bmd, attenuation):
        assert all(MARGIN <= mark.x <= WIDTH - MARGIN for mark in drawing.marks)


@pytest.mark.parametrize(
    ("criteria", "ticks", "labels"),
    [
        ("JSBMR_2012", ["0.70", "0.87"], ["at or below 70 % YAM", "below T -1", "T -1 and above"]),
        ("WHO", ["0.68", "0.87"], ["at or below T -2.5", "below T -1", "T -1 and above"]),
    ],
)
def test_bands_are_those_of_the_criteria_that_judged(criteria: str, ticks: list[str], labels: list[str]) -> None:
    """Also where the policy in force is another one by now, and for the levels that the reference holds for."""
    document = {
        "patient": {
            "bmd_g_cm2": 0.9,
            "bmd_interval": [0.8, 1.0],
            "tbs": None,
            "hu_mean": None,
            "reference": YOUNG | {"region": "L2-L4", "levels": ["L2", "L3"]},
        },
        "levels": {name: {"valid": True, "hu_mean": None, "bmd_g_cm2": 0.9, "tbs": None} for name in words_levels()},
        "decision": {"criteria": criteria},
    }
    (bmd,) = axes(document, ReferralPolicy())
    assert bmd.title == "BMD, L2-L4"
    assert [tick.label for tick in bmd.ticks] == ticks
    assert [band.label for band in bmd.bands] == labels
    assert [mark.label for mark in bmd.marks] == ["L2", "L3", "0.70"]


@pytest.mark.parametrize(
    ("percent", "told"), [(79.6, "79.6"), (80.0, "80"), (80.4, "80.4"), (69.98, "69.98"), (85.7, "86")]
)
def test_percent_yam_is_not_rounded_across_a_threshold(percent: float, told: str) -> None:
    assert words.percent_yam(percent) == told


def test_a_t_score_is_not_rounded_across_a_threshold() -> None:
    assert [words.t_score(value) for value in (-2.48, -2.5, -1.04, -1.7, None)] == [
        "−2.48",
        "−2.5",
        "−1.04",
        "−1.7",
        "–",
    ]


def test_a_scanners_error_is_told_apart_from_what_is_allowed() -> None:
    assert words.scanner_error(Estimate(0.0311, 0.0203, 0.0419, 40), 0.02) == "0.0311 (0.0203–0.0419)"
    assert words.scanner_error(Estimate(0.031, 0.021, 0.042, 40), 0.02) == "0.031 (0.021–0.042)"


def test_a_value_in_a_drawing_is_told_apart_from_its_threshold() -> None:
    level = {"valid": True, "hu_mean": 110.04, "bmd_g_cm2": 0.7996, "tbs": 1.3096}
    used = YOUNG | {"mean_g_cm2": 1.0, "bmd_g_cm2": 0.7996, "levels": ["L1"], "region": "L1-L4"}
    document = {
        "patient": {
            "bmd_g_cm2": 0.7996,
            "bmd_interval": [0.7, 0.9],
            "tbs": 1.3096,
            "tbs_interval": [1.2, 1.4],
            "hu_mean": 110.04,
            "reference": used,
        },
        "levels": dict.fromkeys(words_levels(), level),
        "decision": {"criteria": "YOSHIDA_2023"},
    }
    bmd, attenuation, tbs = axes(document, ReferralPolicy())
    assert [mark.label for drawing in (bmd, attenuation, tbs) for mark in drawing.marks if mark.main] == [
        "0.7996",
        "110.04",
        "1.3096",
    ]
    assert bmd.ticks[1].label == "0.8000"
    assert "110.04 HU" in attenuation.summary


def words_levels() -> tuple[str, ...]:
    return ("L1", "L2", "L3", "L4")


NOW = datetime(2026, 11, 23, 9, 30, tzinfo=UTC)


def test_clock_names_the_day_where_it_is_another() -> None:
    assert re.fullmatch(r"\d\d:30", words.clock(NOW, NOW))
    assert re.fullmatch(r"2[1-3] Nov, \d\d:30", words.clock(NOW - timedelta(days=1), NOW))


@pytest.mark.parametrize("mark", ["\0", "\x07", "\x1b", "\x7f", "\x9b", "\u200e", "\u202e", "\u2066", "\ufeff"])
def test_marks_that_do_not_print_are_shown_as_such(mark: str) -> None:
    assert words.plain(f"a{mark}b\nc") == "a\ufffdb\nc"


def test_words_of_other_languages_stay() -> None:
    assert words.plain("接続できません: Übertragung\u00a0!") == "接続できません: Übertragung !"


def address(**changes: Any) -> Address:
    delivery = DeliveryLine(1, "pacs", DeliveryState.WAITING, 0, NOW, None, NOW, None)
    return Address("pacs", changes.pop("address", "dicom://PACS@h:1"), replace(delivery, **changes))


@pytest.mark.parametrize(
    ("where", "state", "tries"),
    [
        (Address("pacs", "dicom://PACS@h:1", None), "Never sent there", ""),
        (address(), "Waiting", "next try any moment"),
        (
            address(due_at=NOW + timedelta(hours=1), last_error="no", attempts=1),
            "Not delivered yet",
            "1 attempt so far",
        ),
        (address(due_at=NOW + timedelta(hours=1), last_error="no", attempts=3), "Not delivered yet", "next try at "),
        (address(state=DeliveryState.SENDING, last_error="no", attempts=3), "Being sent", ""),
        (address(state=DeliveryState.DELIVERED, delivered_at=NOW), "Delivered ", ""),
        (address(address=None), "Not delivered, and no longer sent", ""),
        (address(address=None, state=DeliveryState.DELIVERED, delivered_at=NOW), "Delivered ", ""),
    ],
)
def test_delivery_is_told_in_words(where: Address, state: str, tries: str) -> None:
    assert words.delivering(where, NOW).text.startswith(state)
    told = words.tries(where, NOW)
    assert tries in told if tries else told == ""


@pytest.mark.parametrize(
    ("line", "chip", "backlog"),
    [
        (DestinationLine("pacs", "x"), "Nothing sent yet", "No object was addressed to it yet."),
        (DestinationLine("pacs", "x", delivered=1), "Everything delivered", "1 object delivered."),
        (
            DestinationLine("pacs", "x", waiting=1, next_try_at=NOW),
            "Sending",
            "1 object waits here; nothing is lost. Next try any moment.",
        ),
        (
            DestinationLine("pacs", "x", waiting=2, failing=1, next_try_at=NOW),
            "Takes some objects, not all",
            "2 objects wait here; nothing is lost. Next try any moment.",
        ),
        (
            DestinationLine("pacs", None, waiting=2, failing=1, next_try_at=NOW),
            "No longer configured",
            "2 objects wait here; nothing is lost. Configure it again under this name, and they are sent.",
        ),
    ],
)
def test_destination_is_told_in_words(line: DestinationLine, chip: str, backlog: str) -> None:
    assert words.destination(line, NOW).text == chip
    assert words.backlog(line, NOW) == backlog


def test_failing_destination_says_since_when() -> None:
    line = DestinationLine("pacs", "x", waiting=1, failing=1, failing_since=NOW)
    assert words.destination(line, NOW).text == f"Failing since {words.clock(NOW, NOW)}"


def test_how_far_a_training_run_is() -> None:
    assert words.run_progress({}) == ""
    assert words.run_progress({"studies_done": 3, "studies": 40}) == "3 of 40 studies"
    assert words.run_progress({"judging": "champion"}) == "the champion"
    told = {
        "network": "fold1",
        "epoch": 2,
        "epochs": 60,
        "steps_done": 9,
        "steps_planned": 90,
        "images_per_second": 14.24,
    }
    assert words.run_progress(told) == "fold1, epoch 2 of 60 · 9 of 90 steps · 14.2 images/s"
