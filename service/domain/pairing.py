"""Which DXA result belongs to which CT: same patient, nearest in time within a window, levels that count on both sides.

One CT gets at most one DXA result, and one DXA result at most one CT: a patient who is scanned often must not weigh
more than others. A patient ID alone does not make two of them one patient: another sex, or an ID that two issuers have
given, keeps them apart. Densitometers of different makers read the same bone differently, so a site's pairs are of one
maker. Everything that stays unpaired says why. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date

from service.domain.reasons import Code, Reason
from service.domain.result import LEVELS

PRINTED_G_CM2 = 0.0011  # three decimals, rounded on either side


@dataclass(frozen=True, slots=True)
class Ct:
    """One measured CT of a patient."""

    study_uid: str
    patient_id: str
    scan_date: date | None
    levels: frozenset[str]  # valid in the result in force
    synthetic: bool
    sex: str = ""  # F, M or unknown
    issuers: tuple[str, ...] = ()  # of its patient ID, where CTs under it name more than one


@dataclass(frozen=True, slots=True)
class Dxa:
    """One stored DXA result of a patient."""

    id: int
    patient_id: str
    scan_date: date
    levels: frozenset[str]  # included
    synthetic: bool
    sex: str = ""
    maker: str = ""  # of the densitometer, by `service.domain.dxa.manufacturer_named`
    figures: Mapping[str, tuple[float, float | None]] = field(
        default_factory=dict, hash=False
    )  # BMD g/cm2, TBS of the included


@dataclass(frozen=True, slots=True)
class Pair:
    """A CT and the DXA result that says what its bone is."""

    ct: Ct
    dxa: Dxa
    levels: tuple[str, ...]  # that count on both sides
    days: int  # from the CT to the DXA; negative: the DXA came first


@dataclass(frozen=True, slots=True)
class Unpaired:
    """A CT without a DXA result, and why; `rivals` are the results between which nothing decides."""

    ct: Ct
    reason: Reason
    rivals: tuple[Dxa, ...] = ()


@dataclass(frozen=True, slots=True)
class Pairing:
    """What belongs together, and what does not."""

    pairs: tuple[Pair, ...]
    unpaired: tuple[Unpaired, ...]
    unused: tuple[Dxa, ...]  # results that no CT took


def pair(cts: Iterable[Ct], results: Iterable[Dxa], window_days: int, maker: str = "") -> Pairing:
    """Pair every patient's CTs with their DXA results.

    Args:
        cts: of any patients, in any order.
        results: of any patients, in any order.
        window_days: the longest time between the two.
        maker: of the densitometers whose results people are paired with; "": any.
    """
    every: dict[str, list[Dxa]] = {}
    for result in results:
        every.setdefault(result.patient_id, []).append(result)
    by_patient = {patient_id: _once(some) for patient_id, some in every.items()}
    wishes: list[Pair] = []
    unpaired: list[Unpaired] = []
    for ct in cts:
        found = _nearest(ct, by_patient.get(ct.patient_id, ()), window_days, maker)
        if isinstance(found, Unpaired):
            unpaired.append(found)
        else:
            wishes.append(found)
    pairs, losers = _one_ct_each(wishes)
    taken = {one.dxa.id for one in pairs}
    unused = tuple(one for some in by_patient.values() for one in some if one.id not in taken)
    return Pairing(tuple(pairs), (*unpaired, *losers), unused)


def answered(cts: Iterable[Ct], results: Iterable[Dxa], window_days: int) -> frozenset[str]:
    """Study UIDs of the CTs that a DXA of the same patient followed, on the day or within the window.

    Whatever the densitometer, and whichever levels counted: that a patient went is one thing, what is learned from it
    another.
    """
    by_patient: dict[str, list[Dxa]] = {}
    for result in results:
        by_patient.setdefault(result.patient_id, []).append(result)

    def went(ct: Ct) -> bool:
        if ct.scan_date is None or ct.issuers:
            return False
        own = _of_patient(ct, by_patient.get(ct.patient_id, ()))
        return any(0 <= _days(ct.scan_date, one) <= window_days for one in own)

    return frozenset(ct.study_uid for ct in cts if went(ct))


def _of_patient(ct: Ct, results: Iterable[Dxa]) -> list[Dxa]:
    """Those that may be the same patient's: of a person or not, and not of the other sex."""
    sexes = {"F", "M"}
    return [one for one in results if one.synthetic == ct.synthetic and {ct.sex, one.sex} != sexes]


def _nearest(ct: Ct, results: Sequence[Dxa], window_days: int, maker: str) -> Pair | Unpaired:
    """The DXA result that a CT would take, or why it takes none."""
    if ct.scan_date is None:
        return _alone(ct, Code.PAIR_NO_DATE, "the CT does not tell its date")
    if not ct.levels:
        return _alone(ct, Code.PAIR_NOT_MEASURED, "no level of the CT is valid and named with certainty")
    if not results:
        return _alone(ct, Code.PAIR_NO_DXA, "the patient has no DXA result")
    if ct.issuers:
        told = f"its patient ID was given by {' and by '.join(ct.issuers)}: these may be different patients"
        return _alone(ct, Code.PAIR_ISSUERS, told)
    if not any(one.synthetic == ct.synthetic for one in results):
        return _alone(ct, Code.PAIR_SYNTHETIC_MIXED, "one is of a digital patient, the other of a person")
    own = _of_patient(ct, results)
    if not own:
        return _alone(ct, Code.PAIR_OTHER_SEX, "CT and DXA tell different sexes under one patient ID")
    alike = [one for one in own if ct.synthetic or maker in ("", one.maker)]
    if not alike:
        told = f"measured by {' and '.join(sorted({one.maker for one in own}))}; this site pairs results of {maker}"
        return _alone(ct, Code.PAIR_OTHER_DENSITOMETER, told)
    near = [one for one in alike if abs(_days(ct.scan_date, one)) <= window_days]
    if not near:
        days = min(abs(_days(ct.scan_date, one)) for one in alike)
        return _alone(ct, Code.PAIR_OUTSIDE_WINDOW, f"the nearest is {days} days away; {window_days} are allowed")
    common = [one for one in near if one.levels & ct.levels]
    if not common:
        return _alone(ct, Code.PAIR_NO_COMMON_LEVEL, "no level counts on both sides")
    least = min(abs(_days(ct.scan_date, one)) for one in common)
    nearest = tuple(one for one in common if abs(_days(ct.scan_date, one)) == least)
    if len(nearest) > 1:
        text = f"{len(nearest)} DXA results are equally near ({least} days)"
        return Unpaired(ct, Reason(Code.PAIR_AMBIGUOUS, text), nearest)
    (best,) = nearest
    levels = tuple(name for name in LEVELS if name in ct.levels & best.levels)
    return Pair(ct, best, levels, _days(ct.scan_date, best))


def _once(results: Sequence[Dxa]) -> tuple[Dxa, ...]:
    """Each scan once: what came as a report and in a table as well is taken from where most is told, else the first."""
    kept: list[Dxa] = []
    for one in sorted(results, key=lambda one: (-_told(one), one.id)):
        if not any(_same_scan(one, other) for other in kept):
            kept.append(one)
    return tuple(one for one in results if one in kept)


def _told(result: Dxa) -> int:
    return len(result.levels) + sum(tbs is not None for _, tbs in result.figures.values())


def _same_scan(one: Dxa, other: Dxa) -> bool:
    """Whether two results of a day agree in every level that both tell, to the rounding of a print-out."""
    both = one.figures.keys() & other.figures.keys()
    same = one.scan_date == other.scan_date and one.maker == other.maker and bool(both)
    return same and all(abs(one.figures[level][0] - other.figures[level][0]) <= PRINTED_G_CM2 for level in both)


def _one_ct_each(wishes: Sequence[Pair]) -> tuple[list[Pair], list[Unpaired]]:
    """Of several CTs that take one result the nearest keeps it; of equally near ones none."""
    rivals: dict[int, list[Pair]] = {}
    for wish in wishes:
        rivals.setdefault(wish.dxa.id, []).append(wish)
    pairs: list[Pair] = []
    unpaired: list[Unpaired] = []
    for some in rivals.values():
        least = min(abs(one.days) for one in some)
        winners = [one for one in some if abs(one.days) == least]
        for one in some:
            if len(winners) > 1 and one in winners:
                text = f"{len(winners)} CTs are equally near ({least} days) to the same DXA result"
                unpaired.append(Unpaired(one.ct, Reason(Code.PAIR_AMBIGUOUS, text), (one.dxa,)))
            elif one in winners:
                pairs.append(one)
            else:
                text = f"another CT is nearer to the DXA result of {one.dxa.scan_date}"
                unpaired.append(_alone(one.ct, Code.PAIR_NEARER_CT, text))
    return pairs, unpaired


def cut_ids(with_dxa: Iterable[str], with_ct: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """(ID of a DXA result, ID of a CT) that differ by leading zeros alone, as a spreadsheet leaves them.

    A person is told; nothing is paired by it, for they may be two patients.
    """
    known = set(with_ct)
    cts = {told.lstrip("0"): told for told in sorted(known, reverse=True)}
    near = ((told, cts.get(told.lstrip("0"))) for told in sorted(with_dxa) if told not in known and told.strip("0"))
    return tuple((told, ct) for told, ct in near if ct is not None)


def tally(pairing: Pairing) -> Mapping[Code, int]:
    """How many CTs stay alone, by reason, the most frequent first."""
    counts: dict[Code, int] = {}
    for one in pairing.unpaired:
        counts[one.reason.code] = counts.get(one.reason.code, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _days(scan_date: date, result: Dxa) -> int:
    return (result.scan_date - scan_date).days


def _alone(ct: Ct, code: Code, text: str) -> Unpaired:
    return Unpaired(ct, Reason(code, text))
