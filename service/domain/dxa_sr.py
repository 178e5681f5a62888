"""A DXA result in a DICOM structured report: is it one, and what does it say?

PS3.16 has no template for densitometers, and each maker uses codes of its own: GE enCORE has exported Enhanced SR since
8.0 (BMC and area since 10.2, units by UCUM since 11.1: "enCORE Conformance Statement for DICOM", direction 40472,
revision history), Hologic APEX as an option ("APEX DICOM Conformance Statement", MAN-03649). So a report is read by
what its items mean: by a public code where there is one, else by the words of the code's meaning. Nothing is guessed:
an item whose region is not told is left out, and figures that contradict each other refuse the report.

Public codes, each read in its own source:
- LOINC (2.7x): 24966-4 "DXA Lumbar spine [Mass/Area] Bone density", 38267-1 "... [T-score] Bone density", 85394-5
  "... [Z-score] Bone density"; other regions have codes of their own, which are not taken.
- PS3.16 (as in pydicom 3.0): DCM 113071 "Z-score", 121416 "Z-Score of measurement"; SCT 42798000 (retired SRT G-A166)
  "Area"; SCT 241686001 "Dual energy X-Ray absorptiometry", DCM BMD "Bone Mineral Densitometry" (CID 29); SCT 77477000
  "Computerized tomography" and DCM 111001 "Algorithm Name", which speak against DXA; DCM 121014 and 121015 "Device
  Observer Manufacturer" and "... Model Name"; DCM 111060 "Study Date"; SCT 122496007 (SRT T-11503) "Lumbar spine"; the
  vertebrae of CID 7603 (`service.domain.vertebrae`).
Meanings in words, and GE's "L1-L4(L3)" for a sum without L3, are [K]: seen in print-outs, unverified in a report.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from enum import Enum

from service.domain.content import CODE, DATE, DATETIME, NUM, TEXT, Concept, Item
from service.domain.dxa import DxaScan, Figures, Level, Validity, included_in, manufacturer_named
from service.domain.facts import InstanceFacts
from service.domain.reasons import Code, Reason
from service.domain.vertebrae import BY_CODE

BMD, BMC, AREA, T, Z, TBS = "bmd_g_cm2", "bmc_g", "area_cm2", "t_score", "z_score", "tbs"

QUANTITY_BY_CODE: Mapping[str, str] = {
    "LN:24966-4": BMD,
    "LN:38267-1": T,
    "LN:85394-5": Z,
    "DCM:113071": Z,
    "DCM:121416": Z,
    "SCT:42798000": AREA,
    "SRT:G-A166": AREA,
}
OF_LUMBAR_SPINE = frozenset({"LN:24966-4", "LN:38267-1", "LN:85394-5", "SCT:122496007", "SRT:T-11503"})
BY_DXA = frozenset({"LN:24966-4", "LN:38267-1", "LN:85394-5", "SCT:241686001", "DCM:BMD"})
NOT_BY_DXA = frozenset({"SCT:77477000", "DCM:111001"})
FINDING_SITE = frozenset({"SCT:363698007", "SRT:G-C0E3"})  # PS3.16 TID 300
STUDY_DATE, OBSERVER_MAKER, OBSERVER_MODEL = "DCM:111060", "DCM:121014", "DCM:121015"

# What the words of a concept's meaning say it is; the first that fits.
_QUANTITIES = (
    (TBS, re.compile(r"\btbs\b|trabecular bone score")),
    (T, re.compile(r"\bt[- ]?score\b")),
    (Z, re.compile(r"\bz[- ]?score\b")),
    (BMC, re.compile(r"\bbmc\b|bone mineral content")),
    (BMD, re.compile(r"\bbmd\b|bone mineral density|bone density")),
    (AREA, re.compile(r"\barea\b")),
)
# ... unless it is a figure about that figure: of an earlier scan, of other people, of its error. A T-score is itself
# about young adults and a Z-score about people of that age, so fewer words speak against those.
_ABOUT_SCORES = re.compile(r"\b(change|previous|prior|baseline|trend|rate|percent|precision|uncertainty|error)\b|%")
_ABOUT_IT = re.compile(
    _ABOUT_SCORES.pattern
    + r"|\b(reference|young|peak|matched|expected|predicted|least significant|lsc|sd|deviation|cv|adjusted|mean of)\b"
)
_DXA_WORDS = re.compile(r"\bdxa\b|\bdexa\b|absorptiometry|densitometr|hologic|lunar|idxa|prodigy|\bdpx\b|norland")
_LUMBAR_WORDS = re.compile(r"lumbar|\bspine\b|\blws\b")
_LATERAL_WORDS = re.compile(r"\blateral\b|\blva\b|decubitus|morphometr")
_OTHER_VERTEBRAE = re.compile(r"thoracic|\bt1[0-2]\b|\bl[56]\b|cervical")
_OTHER_PARTS = re.compile(
    r"femur|femoral|\bhip\b|\bneck\b|trochanter|\bward|\bshaft\b|forearm|radius|\bulna|whole body|total body|\bhead\b"
    r"|\barms?\b|\blegs?\b|trunk|pelvis|\bribs?\b|android|gynoid|calcaneus"
)
_LEVELS = re.compile(r"\bl[1-4](?:\s*[-–,&+]\s*l?[1-4])*(?![0-9])", re.IGNORECASE)
_LEFT_OUT = re.compile(r"\(\s*(l[1-4](?:\s*,\s*l[1-4])*)\s*\)", re.IGNORECASE)
_SITE_NAME = re.compile(r"\bsite\b|region|\blevel\b|vertebra|anatom|\broi\b")
_DATE_NAME = re.compile(r"(scan|exam|examination|acquisition|study|measure(ment|d)?) date|date of (the )?(scan|exam)")
# Not of this scan: an item so called, or one that stands within another so called.
_EARLIER = re.compile(r"\b(previous|prior|baseline|comparison|earlier|last|birth)\b")
_SCAN_NAME = re.compile(r"\b(scan|exam|examination) (id|number)\b")

# Units by UCUM (PS3.16 CID 82 and others) and as older reports write them; the factor makes ours of it.
_UNITS: Mapping[str, Mapping[str, float]] = {
    BMD: {"g/cm2": 1.0, "g.cm-2": 1.0, "gm/cm2": 1.0, "mg/cm2": 0.001},
    BMC: {"g": 1.0, "gm": 1.0, "gram": 1.0, "grams": 1.0, "mg": 0.001},
    AREA: {"cm2": 1.0, "mm2": 0.01, "square centimeter": 1.0},
}
_NO_UNIT = re.compile(r"1|\{[^}]*\}|\[?sd\]?|no units?|score|ratio|standard deviations?|s\.d\.|", re.IGNORECASE)


_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")  # a DS; float() takes more


class _Elsewhere(Enum):
    SITE = "another part of the body"


Site = tuple[str, ...] | _Elsewhere
TOTAL: Site = ()  # the lumbar spine as a whole, its levels not named


@dataclass(frozen=True, slots=True)
class NoDxa:
    """The report holds no bone density by DXA; the reason, where people should be told one."""

    reason: Reason | None = None


@dataclass(slots=True)
class _Read:
    """What was gathered; `reasons` refuse the whole report."""

    figures: dict[Site, dict[str, float]] = field(default_factory=dict)
    elsewhere: int = 0
    nowhere: int = 0
    reasons: list[Reason] = field(default_factory=list)

    def take(self, site: Site, quantity: str, value: float) -> None:
        known = self.figures.setdefault(site, {})
        if quantity in known and known[quantity] != value:
            text = f"{_named(site)}: {quantity} is told as {known[quantity]:g} and as {value:g}; one scan a report"
            self.reasons.append(Reason(Code.DXA_ROW, text))
        known[quantity] = value


def read_report(root: Item, facts: InstanceFacts) -> DxaScan | NoDxa | tuple[Reason, ...]:
    """The DXA result of a report; every reason why it cannot be read; or that it is none."""
    measured = [(item, above, quantity) for item, above, quantity in _measured(root)]
    if not any(quantity == BMD for *_, quantity in measured):
        return NoDxa()
    against = _not_by_dxa(root, facts)
    if against is not None:
        return NoDxa(Reason(Code.DXA_METHOD, against))
    read = _Read()
    for item, above, quantity in measured:
        _gather(read, item, above, quantity)
    day = _day(root, facts, read)
    if not read.figures and not read.reasons:
        what = "of other parts of the body" if read.elsewhere else "whose region is not told"
        read.reasons.append(Reason(Code.DXA_REGION, f"it holds bone densities {what}, none of L1 to L4"))
    if read.reasons or day is None:
        return tuple(dict.fromkeys(read.reasons))
    return _scan(root, facts, day, read)


Found = tuple[Item, tuple[Item, ...], str]  # a numeric item, what it stands within, which of our quantities it is


def _measured(root: Item) -> Iterator[Found]:
    """Every numeric item that is one of our quantities, but those of an earlier examination."""
    aside = _earlier_sections(root)
    return (one for one in _numeric(root) if not _within(one[1], aside))


def _numeric(root: Item) -> Iterator[Found]:
    for item, above in root.walk():
        if item.kind == NUM and (quantity := _quantity(item.name)) is not None:
            yield item, above, quantity


def _earlier_sections(root: Item) -> frozenset[int]:
    """The `id` of each section that is called earlier, where a density stands outside of them all.

    A first examination is a baseline itself, and its only figures are its own.
    """
    sections = frozenset(id(item) for item, _ in root.walk() if item is not root and item.items and _is_earlier(item))
    current = any(quantity == BMD and not _within(above, sections) for _, above, quantity in _numeric(root))
    return sections if current else frozenset()


def _within(above: Iterable[Item], sections: frozenset[int]) -> bool:
    return any(id(one) in sections for one in above)


def _is_earlier(item: Item) -> bool:
    return bool(_EARLIER.search(item.name.meaning.casefold()))


def _quantity(name: Concept) -> str | None:
    if name.key in QUANTITY_BY_CODE:
        return QUANTITY_BY_CODE[name.key]
    words = name.meaning.casefold()
    found = [quantity for quantity, pattern in _QUANTITIES if pattern.search(words)]
    if not found or (TBS in found and len(found) > 1):  # "TBS T-score" is neither
        return None
    about = _ABOUT_SCORES if found[0] in (T, Z) else _ABOUT_IT
    return None if about.search(words) else found[0]


def _not_by_dxa(root: Item, facts: InstanceFacts) -> str | None:
    """What speaks against DXA as the method, in words; None where DXA is told and nothing contradicts it."""
    concepts = [one for item, _ in root.walk() for one in (item.name, item.code)]
    keys = {one.key for one in concepts}
    if keys & NOT_BY_DXA:
        return "its bone density was made from a CT or by an algorithm, not measured by DXA"
    if keys & BY_DXA:
        return None
    texts = [one.meaning for one in concepts] + [item.text for item, _ in root.walk()]
    texts += [facts.manufacturer or "", facts.model_name or "", facts.study_description or ""]
    texts.append(facts.series_description or "")
    if any(_DXA_WORDS.search(text.casefold()) for text in texts):
        return None
    return "it holds a bone density, but nothing says that DXA measured it"


def _gather(read: _Read, item: Item, above: tuple[Item, ...], quantity: str) -> None:
    site = _site(item, above)
    if site is _Elsewhere.SITE:
        read.elsewhere += 1
        return
    if site is None:
        read.nowhere += 1
        return
    if not item.number:
        return
    value = _number(item, quantity, site, read)
    if value is not None and not (value == 0 and quantity in _UNITS):  # of these 0 means: not measured
        read.take(site, quantity, value)


def _number(item: Item, quantity: str, site: Site, read: _Read) -> float | None:
    factor = _factor(item.unit, quantity)
    where = f"{_named(site)}: {quantity}"
    if factor is None:
        told = item.unit.value or item.unit.meaning or "none"
        read.reasons.append(Reason(Code.DXA_UNIT, f"{where} has the unit {told[:40]!r}"))
        return None
    value = float(item.number) * factor if _DECIMAL.fullmatch(item.number) else math.nan
    if not math.isfinite(value):
        read.reasons.append(Reason(Code.DXA_VALUE, f"{where}: {item.number[:40]!r} is no number"))
        return None
    return round(value, 6)


def _factor(unit: Concept, quantity: str) -> float | None:
    """What makes our unit of this one; None where it is another kind of unit."""
    told = [_plain_unit(unit.value), _plain_unit(unit.meaning)]
    known = _UNITS.get(quantity)
    if known is None:
        return 1.0 if _NO_UNIT.fullmatch(told[0]) or (told[1] and _NO_UNIT.fullmatch(told[1])) else None
    return next((known[one] for one in told if one in known), None)


def _plain_unit(text: str) -> str:
    return re.sub(r"\s*/\s*", "/", text.strip().casefold().replace("²", "2").replace("^2", "2").replace("**2", "2"))


# --- where -------------------------------------------------------------------------------------------------------


def _site(item: Item, above: tuple[Item, ...]) -> Site | None:
    """The part of the body that an item speaks of: what stands nearest to it; None where nothing tells."""
    found: Site | None = None
    for one in (item, *above):
        near = _site_at(one)
        if near is _Elsewhere.SITE:
            return near  # "L1" within a lateral scan, "total" within a hip
        if found is None or (found == TOTAL and near):
            found = near if near is not None else found
    return found


def _site_at(item: Item) -> Site | None:
    """What an item says itself, or by a modifier right below it."""
    concepts, texts = [item.name], []
    for one in item.items:
        names_site = one.name.key in FINDING_SITE or bool(_SITE_NAME.search(one.name.meaning.casefold()))
        if one.kind == CODE and (names_site or one.code.key in BY_CODE):
            concepts.append(one.code)
        elif one.kind == TEXT and names_site:
            texts.append(one.text)
    texts += [one.meaning for one in concepts]
    keys = [one.key for one in concepts]
    if any(_is_elsewhere(text.casefold()) for text in texts):
        return _Elsewhere.SITE
    named = {BY_CODE[key].name for key in keys if key in BY_CODE}
    if named:
        return _levels_of(" , ".join(sorted(named))) or _Elsewhere.SITE
    levels = next((found for text in texts if (found := _levels_of(text))), None)
    if levels is not None:
        return levels
    lumbar = any(key in OF_LUMBAR_SPINE for key in keys)
    return TOTAL if lumbar or any(_LUMBAR_WORDS.search(text.casefold()) for text in texts) else None


def _is_elsewhere(words: str) -> bool:
    """Another part of the body; a title that names the spine beside others leaves it to what stands below it."""
    if _LATERAL_WORDS.search(words) or _OTHER_VERTEBRAE.search(words):
        return True
    return bool(_OTHER_PARTS.search(words)) and not _LUMBAR_WORDS.search(words)


def _levels_of(text: str) -> tuple[str, ...] | None:
    """ "L1-L4 BMD" names four levels, "L1-L4(L3)" three; None where a text names none."""
    left_out = {name for found in _LEFT_OUT.findall(text) for name in included_in(found) or ()}
    match = _LEVELS.search(_LEFT_OUT.sub("", text))
    if match is None:
        return None
    told = re.sub(r"([-–,&+])\s*([1-4])", r"\1L\2", match[0])
    names = included_in(told)
    return None if names is None else tuple(name for name in names if name not in left_out) or None


def _named(site: Site) -> str:
    return ", ".join(site) if isinstance(site, tuple) and site else "total"


# --- who, when, by which device ------------------------------------------------------------------------------------


def _day(root: Item, facts: InstanceFacts, read: _Read) -> date | None:
    """The day of the scan: what an item says, else the study's date; two days without a word are none."""
    study = _da(facts.study_date or "")
    told = {day for day in _dates(root) if day is not None}
    if len(told) == 1:
        return next(iter(told))
    if study is not None and (not told or study in told):
        return study
    text = "the scan's date is not told" if not told else "it tells several dates, and which is the scan's is not clear"
    read.reasons.append(Reason(Code.DXA_DATE, text))
    return None


def _dates(root: Item) -> Iterable[date | None]:
    """The dates that are named as the scan's."""
    aside = _earlier_sections(root)
    for item, above in root.walk():
        named = item.name.key == STUDY_DATE or _DATE_NAME.search(item.name.meaning.casefold())
        if item.kind in (DATE, DATETIME, TEXT) and named and not _is_earlier(item) and not _within(above, aside):
            yield _da(item.text)


def _da(text: str) -> date | None:
    """A DICOM DA, or the day of a DT."""
    try:
        return datetime.strptime(text[:8], "%Y%m%d").date()
    except ValueError:
        return None


def _scan(root: Item, facts: InstanceFacts, day: date, read: _Read) -> DxaScan:
    levels, total = _assembled(read.figures)
    return DxaScan(
        patient_id=(facts.patient_id or "").strip(),
        scan_date=day,
        manufacturer=manufacturer_named(_text(root, OBSERVER_MAKER) or facts.manufacturer or ""),
        model=(_text(root, OBSERVER_MODEL) or facts.model_name or "").strip(),
        levels=levels,
        total=total,
        scan_id=_scan_id(root),
        sex=facts.patient_sex if facts.patient_sex in ("F", "M") else "",
        synthetic=facts.synthetic,
    )


def _assembled(figures: Mapping[Site, Mapping[str, float]]) -> tuple[dict[str, Level], Figures]:
    """The levels and the total: the sum over most levels; what it leaves out does not count, as on a print-out."""
    told = {site: Figures(**values) for site, values in figures.items() if isinstance(site, tuple)}
    levels = {site[0]: Level(values) for site, values in told.items() if len(site) == 1}
    sums = [site for site in told if len(site) > 1]
    if not sums:
        return levels, told.get((), Figures())
    widest = max(sums, key=lambda site: (len(site), site))
    if not set(levels) <= set(widest):
        levels = {
            name: level if name in widest else replace(level, validity=Validity.OTHER) for name, level in levels.items()
        }
    return levels, told[widest]


def _text(root: Item, key: str) -> str:
    return next((item.text.strip() for item, _ in root.walk() if item.name.key == key and item.text.strip()), "")


def _scan_id(root: Item) -> str:
    found = (item.text for item, _ in root.walk() if item.kind == TEXT and _SCAN_NAME.search(item.name.meaning.lower()))
    return next(found, "").strip()
