"""Which DXA result belongs to which CT."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import pytest

from service.domain.pairing import Ct, Dxa, answered, cut_ids, pair, tally
from service.domain.reasons import Code

DAY = date(2026, 3, 4)
ALL = frozenset({"L1", "L2", "L3", "L4"})


def ct(uid: str = "1", days: int | None = 0, levels: frozenset[str] = ALL, **more: Any) -> Ct:
    told = {"patient_id": "P1", "synthetic": False, **more}
    return Ct(uid, scan_date=None if days is None else DAY + timedelta(days), levels=levels, **told)


def dxa(id: int = 1, days: int = 0, levels: frozenset[str] = ALL, **more: Any) -> Dxa:
    told = {"patient_id": "P1", "synthetic": False, **more}
    return Dxa(id, scan_date=DAY + timedelta(days), levels=levels, **told)


def why(*cts: Ct, results: list[Dxa]) -> list[Code]:
    return [one.reason.code for one in pair(cts, results, 365).unpaired]


def test_the_nearest_wins_before_or_after() -> None:
    found = pair([ct()], [dxa(1, 200), dxa(2, -100), dxa(3, 101)], 365)
    (one,) = found.pairs
    assert (one.dxa.id, one.days, one.levels) == (2, -100, ("L1", "L2", "L3", "L4"))
    assert [unused.id for unused in found.unused] == [1, 3]
    assert found.unpaired == ()


def test_levels_left_out_on_either_side_stay_out() -> None:
    one = pair([ct(levels=ALL - {"L1"})], [dxa(levels=ALL - {"L3"})], 365).pairs[0]
    assert one.levels == ("L2", "L4")


@pytest.mark.parametrize(
    ("one", "results", "code"),
    [
        (ct(days=None), [dxa()], Code.PAIR_NO_DATE),
        (ct(levels=frozenset()), [dxa()], Code.PAIR_NOT_MEASURED),
        (ct(), [], Code.PAIR_NO_DXA),
        (ct(), [dxa(patient_id="P2")], Code.PAIR_NO_DXA),
        (ct(), [dxa(synthetic=True)], Code.PAIR_SYNTHETIC_MIXED),
        (ct(), [dxa(days=366)], Code.PAIR_OUTSIDE_WINDOW),
        (ct(levels=frozenset({"L1"})), [dxa(levels=frozenset({"L2"}))], Code.PAIR_NO_COMMON_LEVEL),
        (ct(), [dxa(1, 10), dxa(2, -10)], Code.PAIR_AMBIGUOUS),
        (ct(sex="F"), [dxa(sex="M")], Code.PAIR_OTHER_SEX),
        (ct(issuers=("East", "West")), [dxa()], Code.PAIR_ISSUERS),
    ],
)
def test_what_stays_alone_says_why(one: Ct, results: list[Dxa], code: Code) -> None:
    assert why(one, results=results) == [code]


def test_the_window_is_closed() -> None:
    assert pair([ct()], [dxa(days=365)], 365).pairs
    assert pair([ct()], [dxa(days=-365)], 365).pairs


def test_a_result_without_common_levels_does_not_stand_in_the_way_of_the_next() -> None:
    found = pair([ct(levels=frozenset({"L1"}))], [dxa(1, 1, frozenset({"L2"})), dxa(2, 9)], 365)
    assert found.pairs[0].dxa.id == 2


def test_ambiguous_ones_name_their_rivals() -> None:
    (alone,) = pair([ct()], [dxa(1, 10), dxa(2, -10)], 365).unpaired
    assert [one.id for one in alone.rivals] == [1, 2]


def test_one_result_goes_to_one_ct() -> None:
    found = pair([ct("far", 100), ct("near", 3)], [dxa()], 365)
    assert [one.ct.study_uid for one in found.pairs] == ["near"]
    assert [(one.ct.study_uid, one.reason.code) for one in found.unpaired] == [("far", Code.PAIR_NEARER_CT)]
    both = pair([ct("a", 5), ct("b", -5)], [dxa()], 365)
    assert both.pairs == ()
    assert tally(both) == {Code.PAIR_AMBIGUOUS: 2}
    assert [one.id for one in both.unused] == [1]


def test_a_result_of_the_other_sex_is_passed_over_and_an_unknown_sex_contradicts_none() -> None:
    found = pair([ct(sex="F")], [dxa(1, 0, sex="M"), dxa(2, 40, sex="F")], 365)
    assert [(one.dxa.id, one.days) for one in found.pairs] == [(2, 40)]
    assert pair([ct(sex="F")], [dxa(sex="")], 365).pairs
    assert pair([ct(sex="O")], [dxa(sex="M")], 365).pairs


def test_people_are_paired_with_densitometers_of_one_maker() -> None:
    """Bone that reads 1.00 on one maker's reads another figure on the other's: mixed pairs teach neither."""
    both = [dxa(1, 1, maker="Hologic"), dxa(2, 90, maker="GE Lunar")]
    assert [one.dxa.id for one in pair([ct()], both, 365, "GE Lunar").pairs] == [2]
    assert [one.dxa.id for one in pair([ct()], both, 365, "Hologic").pairs] == [1]
    (alone,) = pair([ct()], both[:1], 365, "GE Lunar").unpaired
    assert (alone.reason.code, "Hologic" in alone.reason.text) == (Code.PAIR_OTHER_DENSITOMETER, True)
    digital = pair([ct(synthetic=True)], [dxa(synthetic=True, maker="GE Lunar")], 365, "Hologic")
    assert len(digital.pairs) == 1


def test_one_scan_that_came_twice_is_one_scan() -> None:
    """As a table and as a report, under other scan numbers; what differs is another scan."""
    table = dxa(1, figures=dict.fromkeys(ALL, (0.9, 1.3)))
    printed = dxa(2, figures=dict.fromkeys(ALL, (0.9004, None)))
    assert [one.dxa.id for one in pair([ct()], [printed, table], 365).pairs] == [1]  # it tells TBS as well
    other = dxa(3, figures=dict.fromkeys(ALL, (0.91, None)))
    assert why(ct(), results=[table, other]) == [Code.PAIR_AMBIGUOUS]
    assert why(ct(), results=[table, replace(printed, maker="Hologic")]) == [Code.PAIR_AMBIGUOUS]
    assert why(ct(days=5), results=[table, dxa(2, 10, figures=dict(table.figures))]) == [Code.PAIR_AMBIGUOUS]


def test_one_scan_stored_twice_never_makes_two_pairs() -> None:
    report = dxa(1, levels=ALL - {"L4"}, figures=dict.fromkeys(ALL - {"L4"}, (0.9, 1.3)))
    table = dxa(2, figures=dict.fromkeys(ALL, (0.9, None)))
    found = pair([ct("a", levels=ALL - {"L4"}), ct("b", 9, frozenset({"L4"}))], [report, table], 365)
    assert len(found.pairs) == 1
    assert found.unused == ()


def test_whoever_went_to_dxa_went_whatever_it_is_compared_with() -> None:
    results = [dxa(1, -3), dxa(2, 40, maker="Hologic")]  # the older one is nearer
    assert pair([ct()], results, 365, "GE Lunar").pairs == ()
    assert pair([ct()], results, 365).pairs[0].dxa.id == 1
    assert answered([ct("a"), ct("b", 41), ct("c", None), ct("d", issuers=("E", "W"))], results, 365) == {"a"}
    assert answered([ct("a", sex="F")], [dxa(2, 40, sex="M")], 365) == frozenset()
    assert answered([ct("a")], [dxa(2, 366)], 365) == frozenset()


def test_an_id_that_a_spreadsheet_cut_is_told_and_pairs_nothing() -> None:
    assert pair([ct(patient_id="0012")], [dxa(patient_id="12")], 365).pairs == ()
    assert cut_ids({"12", "7", "000", "A1"}, {"0012", "012", "0", "0A1x"}) == (("12", "0012"),)
    assert cut_ids({"12"}, {"12", "0012"}) == ()


def test_the_order_of_the_input_changes_nothing() -> None:
    cts, results = [ct("a", 100), ct("b", 3), ct("c", 400)], [dxa(1), dxa(2, 390)]
    first = pair(cts, results, 365)
    again = pair(reversed(cts), reversed(results), 365)
    assert {(one.ct.study_uid, one.dxa.id) for one in first.pairs} == {("b", 1), ("c", 2)}
    assert set(first.pairs) == set(again.pairs)
