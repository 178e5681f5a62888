"""Which supplied segmentation is used, and what every other one is told."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any

import pytest

from service.domain.facts import InstanceFacts
from service.domain.reasons import Code
from service.domain.supplied import Candidate, Target, choose_supplied, is_segmentation
from service.domain.vertebrae import VERTEBRAE

AT = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)
TARGET = Target("1.2.3.4", "1.2.9")
CODE = {one.name: one.code for one in VERTEBRAE}


def seg(uid: str, *levels: str, minutes: int = 0, conflicting: bool = False, **changes: Any) -> Candidate:
    """A segmentation of these vertebrae, drawn on the chosen series, in a series of its own."""
    facts = InstanceFacts(
        study_uid="1.2.3",
        series_uid=f"{uid}.0",
        sop_instance_uid=uid,
        sop_class_uid="1.2.840.10008.5.1.4.1.1.66.4",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        modality="SEG",
        frame_of_reference_uid="1.2.9",
        segments=("SCT:10200004", *(CODE[level] for level in levels)),
        referenced_series_uids=("1.2.3.4",),
    )
    return Candidate(replace(facts, **changes), AT + timedelta(minutes=minutes), conflicting)


def text(candidates: list[Candidate], series: str, target: Target | None = TARGET) -> str:
    [reason] = choose_supplied(candidates, target).verdicts[series].reasons
    return f"{reason.code.value}: {reason.text}"


def test_one_that_lies_on_the_chosen_ct_is_used_and_says_what_it_holds() -> None:
    choice = choose_supplied([seg("7", "L1", "L2", "L3", "L4", "L5", "T12")], TARGET)
    assert choice.sop_instance_uid == "7"
    verdict = choice.verdicts["7.0"]
    assert verdict.eligible
    assert [reason.code for reason in verdict.reasons] == [Code.SEGMENTATION_USED]
    assert "L1, L2, L3, L4, L5)" in verdict.reasons[0].text


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (seg("7"), "none of L1 to L5"),
        (seg("7", "T12", "sacrum"), "none of L1 to L5"),
        (seg("7", "L1", frame_of_reference_uid="1.2.8"), "another frame of reference"),
        (seg("7", "L1", referenced_series_uids=("1.2.3.5", "1.2.3.6")), "another series"),
        (seg("7", "L1", referenced_series_uids=(), frame_of_reference_uid=None), "names neither"),
        (seg("7", "L1", conflicting=True), "arrived again with other content"),
    ],
)
def test_what_does_not_belong_is_told_why(candidate: Candidate, words: str) -> None:
    choice = choose_supplied([candidate], TARGET)
    assert choice.sop_instance_uid is None
    assert not choice.verdicts["7.0"].eligible
    told = text([candidate], "7.0")
    assert told.startswith("SEGMENTATION_NOT_USED: ")
    assert words in told


@pytest.mark.parametrize(
    "candidate",
    [
        seg("7", "L5"),
        seg("7", "L1", referenced_series_uids=()),  # the frame of reference tells
        seg("7", "L1", frame_of_reference_uid=None),  # the series that it names tells
        seg("7", "L1", referenced_series_uids=("1.2.3.5", "1.2.3.4")),
        seg("7", "L1", sop_class_uid="1.2.840.10008.5.1.4.1.1.66.7"),
    ],
)
def test_enough_to_know_where_it_belongs(candidate: Candidate) -> None:
    assert choose_supplied([candidate], TARGET).sop_instance_uid == "7"


def test_without_a_measured_ct_none_is_used() -> None:
    assert "No CT series" in text([seg("7", "L1")], "7.0", None)
    assert choose_supplied([seg("7", "L1")], None).sop_instance_uid is None


def test_most_levels_win_then_the_latest_then_the_uid() -> None:
    found = [
        seg("7", "L1", "L2", "L3", minutes=9),
        seg("8", "L1", "L2", "L3", "L4", minutes=1),
        seg("9", "L1", "L2", "L3", "L4", minutes=2),
        seg("6", "L2", "L3", "L4", "L5", minutes=9),  # L5 is not measured
    ]
    for order in permutations(found):
        assert choose_supplied(order, TARGET).sop_instance_uid == "9"
    assert "holds more of L1 to L4 than this one (L1, L2, L3)" in text(found, "7.0")
    assert "arrived later" in text(found, "8.0")
    assert "(L2, L3, L4, L5)" in text(found, "6.0")
    twins = [seg("8", "L1"), seg("7", "L1")]
    assert choose_supplied(twins, TARGET) == choose_supplied(twins[::-1], TARGET)


def test_a_series_of_several_is_used_when_one_of_them_is() -> None:
    used, other = seg("7", "L1", series_uid="5"), seg("8", series_uid="5")
    verdict = choose_supplied([other, used], TARGET).verdicts["5"]
    assert [reason.code for reason in verdict.reasons] == [Code.SEGMENTATION_USED]
    refused = [seg("7", series_uid="5"), seg("8", series_uid="5"), seg("9", "L1", conflicting=True, series_uid="5")]
    verdict = choose_supplied(refused, TARGET).verdicts["5"]
    assert len(verdict.reasons) == 2  # each reason once
    assert not verdict.eligible


def test_what_a_series_of_segmentations_is() -> None:
    one = seg("7").facts
    assert is_segmentation([one])
    assert not is_segmentation([])
    assert not is_segmentation([one, replace(one, sop_class_uid="1.2.840.10008.5.1.4.1.1.2")])
