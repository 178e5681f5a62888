"""DXA results from CSV: the layout is recognised by its columns, each row becomes a scan or a reason why not.

A layout is a table: our field -> the headings it may stand under. Headings are compared without case, spaces and
signs ("BMD (g/cm²)" is "bmd_g_cm2"). Two shapes exist: wide (a row is a scan) and long (a row is a region of one).

Sources: NHANES DXXSPN codebooks; Hologic APEX's table Spine (PATIENT_KEY, SCANID, L1_INCLUDED, L1_AREA, L1_BMC, L1_BMD,
TOT_*); GE Lunar reports as the DXA Data Xtraction Assistant writes them (doi 10.5281/zenodo.3974993), whose
Patients_Visit counts visits and is no date.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime

from service.domain.dxa import (
    NHANES_VALIDITY,
    TOTAL_TOLERANCE_G_CM2,
    DxaScan,
    Figures,
    Level,
    Validity,
    included_in,
    manufacturer_named,
    recompute,
)
from service.domain.reasons import Code, Reason
from service.domain.result import LEVELS

MAX_ROWS = 200_000
FIGURES = {
    "bmd": "bmd_g_cm2",
    "bmc": "bmc_g",
    "area": "area_cm2",
    "t": "t_score",
    "z": "z_score",
    "tbs": "tbs",
}
MEASURED = ("bmd", "bmc", "area")  # of these 0 means: not measured
WHO = ("patient_id", "scan_date", "manufacturer", "model", "scan_id", "sex", "synthetic")
WIDE_FIELDS = frozenset(
    [
        *WHO,
        "status",
        *(f"{where}.{name}" for where in (*LEVELS, "total") for name in FIGURES),
        *(f"{level}.{name}" for level in LEVELS for name in ("included", "validity", "tbs_validity")),
    ]
)
LONG_FIELDS = frozenset([*WHO, "region", "visit", *FIGURES])
MISSING = frozenset({"", ".", "na", "n/a", "nan", "null", "none", "-", "--"})
YES = frozenset({"1", "1.0", "true", "yes", "y", "x", "t", "-1"})  # -1 is how Access, under APEX, writes True
NO = frozenset({"0", "0.0", "false", "no", "n", "f"})
NHANES_NOT_SCANNED = frozenset({"3", "4", "5"})  # DXASPNST


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to write DXA results down."""

    name: str
    fields: Mapping[str, tuple[str, ...]]  # our field -> headings, the first that is there counts
    required: frozenset[str]  # fields without which it is another layout
    manufacturer: str = ""

    @property
    def long(self) -> bool:
        """A row is a region, not a scan."""
        return "region" in self.fields


def _levels(pattern: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {
        f"{level}.{name}": tuple(one.format(level.lower()) for one in headings)
        for level in LEVELS
        for name, headings in pattern.items()
    }


NHANES = Layout(
    "nhanes",
    {
        "patient_id": ("seqn",),
        "scan_date": ("scan_date",),
        "model": ("model",),
        "sex": ("sex",),
        "status": ("dxaspnst",),
        **_levels(
            {
                "bmd": ("dxx{}bmd",),
                "bmc": ("dxx{}bmc",),
                "area": ("dxx{}a",),
                "validity": ("dxx{}bcc",),
                "tbs": ("dxx{}tbs",),
                "tbs_validity": ("dxx{}tqa",),
            }
        ),
        "total.bmd": ("dxxosbmd",),
        "total.bmc": ("dxxosbmc",),
        "total.area": ("dxxosa",),
        "total.tbs": ("dxxtotbs",),
    },
    frozenset({"patient_id", *(f"{level}.bmd" for level in LEVELS)}),
    "Hologic",
)
HOLOGIC = Layout(
    "hologic-apex",
    {
        "patient_id": ("patient_id", "identifier1", "patientid", "patient_key"),
        "scan_date": ("scan_date", "scandate", "exam_date", "study_date"),
        "model": ("model", "scanner_model", "device_model", "system_model"),
        "scan_id": ("scanid", "scan_id"),
        "sex": ("sex", "gender"),
        **_levels(
            {
                "included": ("{}_included",),
                "bmd": ("{}_bmd",),
                "bmc": ("{}_bmc",),
                "area": ("{}_area",),
                "t": ("{}_t_score", "{}_tscore"),
                "z": ("{}_z_score", "{}_zscore"),
                "tbs": ("{}_tbs",),
            }
        ),
        "total.bmd": ("tot_bmd",),
        "total.bmc": ("tot_bmc",),
        "total.area": ("tot_area",),
        "total.t": ("tot_t_score", "tot_tscore"),
        "total.z": ("tot_z_score", "tot_zscore"),
        "total.tbs": ("tot_tbs",),
    },
    frozenset({"patient_id", *(f"{level}.{name}" for level in LEVELS for name in ("included", "bmd"))}),
    "Hologic",
)
GE_LUNAR = Layout(
    "ge-lunar",
    {
        "patient_id": ("patients_id", "patient_id", "patientid"),
        "visit": ("patients_visit", "visit"),
        "scan_date": ("scan_date", "measure_date", "exam_date", "visit_date", "date"),
        "model": ("model", "scanner_model", "scanner", "device_model"),
        "scan_id": ("scan_id",),
        "sex": ("sex", "gender"),
        "region": ("region",),
        "bmd": ("bmd_g_cm2",),
        "bmc": ("bmc_g",),
        "area": ("area_cm2",),
        "t": ("t_score",),
        "z": ("z_score",),
        "tbs": ("tbs",),
    },
    frozenset({"patient_id", "region", "bmd"}),
    "GE Lunar",
)
LAYOUTS = (NHANES, HOLOGIC, GE_LUNAR)  # the first that fits


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the file itself does not say, and how it writes dates."""

    manufacturer: str = ""
    model: str = ""
    scan_date: date | None = None
    date_format: str = ""  # of strptime, "%m/%d/%Y"
    synthetic: bool = False


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """One row that is not taken; the heading is line 1."""

    line: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Table:
    """What a CSV held."""

    layout: str
    rows: int
    scans: tuple[tuple[int, DxaScan], ...]  # with the line of each
    refused: tuple[RefusedRow, ...]
    passed_over: int  # rows about another part of the body, or of a spine that was not scanned
    lines: Mapping[int, Mapping[str, int]] = field(default_factory=dict)  # a scan's line -> its part -> that one's line

    def line_of(self, line: int, where: str) -> int:
        """Where a part of the scan of this line stands: where a row is a region, each level has a line of its own."""
        return self.lines.get(line, {}).get(where, line)


def read_csv(text: str, defaults: Defaults, columns: Mapping[str, str] | None = None) -> Table:
    """Every scan of a CSV, and every row that is none.

    Args:
        text: the file.
        defaults: what it does not say.
        columns: our field -> its heading, for a layout that is not known; see WIDE_FIELDS and LONG_FIELDS.
    """
    text = text.removeprefix("\ufeff")
    delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        headings = [_heading(cell) for cell in next(reader, [])]
    except csv.Error as error:
        return _nothing(1, Code.DXA_ROW, f"the heading cannot be read: {error}")
    layout = _layout(headings, columns)
    if isinstance(layout, Reason):
        return Table("", 0, (), (RefusedRow(1, layout),), 0)
    places = _places(layout, headings)
    rows, refused = _rows(reader, places, len(headings), delimiter != ",")
    read = (_long if layout.long else _wide)(rows, layout, defaults)
    everything = sorted([*refused, *read.refused], key=lambda one: one.line)
    count = len(rows) + len(refused)
    return Table(layout.name, count, tuple(read.scans), tuple(everything), read.passed_over, read.lines)


# --- headings ----------------------------------------------------------------------------------------------------


def _heading(cell: str) -> str:
    """ "BMD (g/cm²)" and "BMD_g/cm2" are both "bmd_g_cm2"."""
    return re.sub(r"[^0-9a-z]+", "_", cell.casefold().replace("²", "2")).strip("_")


def _delimiter(text: str) -> str:
    heading = text.partition("\n")[0]
    return max((",", ";", "\t"), key=heading.count)


def _layout(headings: Sequence[str], columns: Mapping[str, str] | None) -> Layout | Reason:
    named = [heading for heading in headings if heading]
    twice = sorted({heading for heading in named if named.count(heading) > 1})
    if columns is not None:
        return _mapped(headings, columns)
    for layout in LAYOUTS:
        if all(any(heading in named for heading in layout.fields[name]) for name in layout.required):
            used = {heading for headings_ in layout.fields.values() for heading in headings_}
            doubled = [heading for heading in twice if heading in used]
            if doubled:
                return Reason(Code.DXA_LAYOUT, f"the column {doubled[0]} stands twice")
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    return Reason(Code.DXA_LAYOUT, f"the columns fit none of {known}: name them in a mapping")


def _mapped(headings: Sequence[str], columns: Mapping[str, str]) -> Layout | Reason:
    """The layout that a person described."""
    known = LONG_FIELDS if "region" in columns else WIDE_FIELDS
    unknown = sorted(set(columns) - known)
    if unknown:
        return Reason(Code.DXA_LAYOUT, f"the mapping names {unknown[0]}; known are {', '.join(sorted(known))}")
    absent = [told for told in columns.values() if headings.count(_heading(told)) != 1]
    if absent:
        return Reason(Code.DXA_LAYOUT, f"the mapping's column {absent[0]!r} is not there, or stands twice")
    dense = "bmd" in columns if "region" in columns else any(f"{level}.bmd" in columns for level in LEVELS)
    if "patient_id" not in columns or not dense:
        return Reason(Code.DXA_LAYOUT, "a mapping needs patient_id and the BMD of at least one level")
    return Layout("mapped", {name: (_heading(told),) for name, told in columns.items()}, frozenset())


def _places(layout: Layout, headings: Sequence[str]) -> dict[str, int]:
    """Field -> number of its column; a field that the file does not have is left out."""
    found: dict[str, int] = {}
    for name, candidates in layout.fields.items():
        place = next((headings.index(heading) for heading in candidates if heading in headings), None)
        if place is not None:
            found[name] = place
    return found


# --- rows --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Row:
    """One row; what cannot be read of it is gathered in `reasons`."""

    line: int
    cells: Mapping[str, str]
    decimal_comma: bool
    reasons: list[Reason] = field(default_factory=list)

    def text(self, name: str) -> str:
        """The cell's text; empty where nothing is told."""
        told = self.cells.get(name, "").strip()
        return "" if told.casefold() in MISSING else told

    def number(self, name: str) -> float | None:
        """The cell's number; None where nothing is told, or nothing that is a number."""
        told = self.text(name)
        if not told:
            return None
        if self.decimal_comma and told.count(",") == 1 and "." not in told:
            told = told.replace(",", ".")
        # float() also takes "1_0", "inf" and digits of other scripts; none of them comes from a densitometer.
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", told, re.ASCII):
            self.refuse(Code.DXA_VALUE, f"{name}: {told[:40]!r} is no number")
            return None
        value = float(told)
        if not math.isfinite(value):
            self.refuse(Code.DXA_VALUE, f"{name}: {told[:40]!r} is beyond any number")
            return None
        return value

    def code(self, name: str) -> str:
        """A whole number as text; SAS files turned into CSV write 0 as 5.4e-79 and 3 as 3.0."""
        told = self.text(name)
        try:
            return str(round(float(told)))
        except (ValueError, OverflowError):
            return told.casefold()

    def refuse(self, code: Code, text: str) -> None:
        self.reasons.append(Reason(code, text))


def _rows(
    reader: Iterator[list[str]], places: Mapping[str, int], width: int, decimal_comma: bool
) -> tuple[list[_Row], list[RefusedRow]]:
    found: list[_Row] = []
    refused: list[RefusedRow] = []
    line = 1
    while True:
        line = int(getattr(reader, "line_num", line)) + 1
        try:
            cells = next(reader)
        except StopIteration:
            return found, refused
        except csv.Error as error:  # what follows cannot be told apart any more
            refused.append(RefusedRow(line, Reason(Code.DXA_ROW, f"the row cannot be read: {error}")))
            return found, refused
        if not any(cell.strip() for cell in cells):
            continue
        if len(found) + len(refused) >= MAX_ROWS:
            refused.append(RefusedRow(line, Reason(Code.DXA_ROW, f"more than {MAX_ROWS} rows: split the file")))
            return found, refused
        if len(cells) != width:
            text = f"{len(cells)} cells under {width} headings"
            refused.append(RefusedRow(line, Reason(Code.DXA_ROW, text)))
            continue
        told = {name: cells[place] for name, place in places.items()}
        found.append(_Row(line, told, decimal_comma))


@dataclass(slots=True)
class _Read:
    scans: list[tuple[int, DxaScan]] = field(default_factory=list)
    refused: list[RefusedRow] = field(default_factory=list)
    passed_over: int = 0
    lines: dict[int, dict[str, int]] = field(default_factory=dict)


def _wide(rows: Sequence[_Row], layout: Layout, defaults: Defaults) -> _Read:
    """One scan a row."""
    read = _Read()
    for row in rows:
        levels = {level: one for level in LEVELS if (one := _level(row, level)) is not None}
        total = _figures(row, "total.")
        not_scanned = layout is NHANES and row.code("status") in NHANES_NOT_SCANNED
        if not row.reasons and (not_scanned or (not levels and total.empty)):
            read.passed_over += 1
            continue
        scan = _scan(row, layout, defaults, levels, total)
        read.refused += [RefusedRow(row.line, reason) for reason in row.reasons]
        if scan is not None and not row.reasons:
            read.scans.append((row.line, scan))
    return read


def _level(row: _Row, level: str) -> Level | None:
    """One vertebra of a wide row; None where the row says nothing about it."""
    figures, validity = _figures(row, f"{level}."), Validity.VALID
    told = row.code(f"{level}.validity")
    if told:
        known = NHANES_VALIDITY.get(told) or next((one for one in Validity if one.value == told), None)
        if known is None:
            row.refuse(Code.DXA_VALUE, f"{level}: validity {told[:40]!r} is not known")
        else:
            validity = known
    included = row.text(f"{level}.included").casefold()
    if included in NO:
        validity = Validity.OTHER if validity is Validity.VALID else validity
    elif included and included not in YES:
        row.refuse(Code.DXA_VALUE, f"{level}: included is {included[:40]!r}, neither yes nor no")
    if row.code(f"{level}.tbs_validity") not in ("", "0"):
        figures = replace(figures, tbs=None)
    return None if figures.empty else Level(figures, validity)


def _figures(row: _Row, prefix: str) -> Figures:
    told: dict[str, float | None] = {}
    for name, attribute in FIGURES.items():
        value = row.number(prefix + name)
        told[attribute] = None if value == 0 and name in MEASURED else value
    return Figures(**told)


def _scan(row: _Row, layout: Layout, defaults: Defaults, levels: Mapping[str, Level], total: Figures) -> DxaScan | None:
    day = _day(row, defaults)
    if day is None:
        return None
    patient_id = row.text("patient_id")
    if layout is NHANES:
        patient_id = patient_id.removesuffix(".0")
    maker = row.text("manufacturer") or defaults.manufacturer or layout.manufacturer
    return DxaScan(
        patient_id=patient_id,
        scan_date=day,
        manufacturer=manufacturer_named(maker),
        model=row.text("model") or defaults.model,
        levels=levels,
        total=total,
        scan_id=row.text("scan_id") or row.text("visit"),
        sex=_sex(row),
        synthetic=defaults.synthetic or row.text("synthetic").casefold() in YES,
    )


def _sex(row: _Row) -> str:
    told = row.text("sex").casefold()
    return {"f": "F", "female": "F", "m": "M", "male": "M"}.get(told, told.upper()[:1] if told else "")


def _day(row: _Row, defaults: Defaults) -> date | None:
    """The day of the scan; 03/04/2026 is read only by a format that a person gave: a wrong guess pairs wrongly."""
    told = row.text("scan_date")
    if not told:
        if defaults.scan_date is None:
            row.refuse(Code.DXA_DATE, "the scan's date is not told")
        return defaults.scan_date
    if defaults.date_format:
        try:
            return datetime.strptime(told, defaults.date_format).date()
        except ValueError:
            row.refuse(Code.DXA_DATE, f"{told[:40]!r} does not fit the date format {defaults.date_format!r}")
            return None
    match = re.match(r"(\d{4})[-/.]?(\d{2})[-/.]?(\d{2})(?!\d)", told, re.ASCII)
    german = re.match(r"(\d{1,2})\.(\d{1,2})\.(\d{4})(?!\d)", told, re.ASCII)
    parts = match.groups() if match else german.groups()[::-1] if german else None
    if parts is not None:
        try:
            return date(*(int(part) for part in parts))
        except ValueError:
            pass
    row.refuse(Code.DXA_DATE, f"{told[:40]!r} is no date that reads one way only: give its format, %m/%d/%Y say")
    return None


def _long(rows: Sequence[_Row], layout: Layout, defaults: Defaults) -> _Read:
    """The rows of one scan together: same patient, visit, date and number."""
    read = _Read()
    groups: dict[tuple[str, ...], list[_Row]] = {}
    for row in rows:
        if included_in(row.text("region")) is None:
            read.passed_over += 1
            continue
        key = tuple(row.text(name) for name in ("patient_id", "visit", "scan_date", "scan_id"))
        groups.setdefault(key, []).append(row)
    for group in groups.values():
        scan = _gathered(group, layout, defaults)
        wrong = [RefusedRow(row.line, reason) for row in group for reason in row.reasons]
        read.refused += wrong
        if scan is not None and not wrong:
            read.scans.append((group[0].line, scan))
            read.lines[group[0].line] = _lines(group)
    return read


def _lines(group: Sequence[_Row]) -> dict[str, int]:
    """Level, or "total", -> the line that tells it."""
    named = [(included_in(row.text("region")) or (), row.line) for row in group]
    widest = max(named, key=lambda one: len(one[0]))
    told = {names[0]: line for names, line in named if len(names) == 1}
    return {**told, "total": widest[1]}


def _gathered(group: Sequence[_Row], layout: Layout, defaults: Defaults) -> DxaScan | None:
    """One scan of several rows; the row with the most levels is its total, and each must fit the levels it names."""
    levels: dict[str, Level] = {}
    sums: dict[tuple[str, ...], tuple[_Row, Figures]] = {}
    for row in group:
        names = included_in(row.text("region")) or ()
        figures = _figures(row, "")
        taken = names[0] in levels if len(names) == 1 else names in sums
        if taken:
            row.refuse(Code.DXA_ROW, f"the region {row.text('region')!r} stands twice in one scan")
        elif len(names) == 1:
            levels[names[0]] = Level(figures)
        else:
            sums[names] = (row, figures)
    widest = max(sums, key=len, default=())
    if sums and not set(levels) <= set(widest):  # the operator left levels out of every sum
        levels = {
            name: level if name in widest else replace(level, validity=Validity.OTHER) for name, level in levels.items()
        }
    total = sums[widest][1] if widest else Figures()
    scan = _scan(group[0], layout, defaults, levels, total)
    if scan is not None:
        _check_sums(scan, sums, widest)
    return scan


def _check_sums(scan: DxaScan, sums: Mapping[tuple[str, ...], tuple[_Row, Figures]], widest: tuple[str, ...]) -> None:
    """Every other sum of the print-out against its levels; `refusals` judges the widest."""
    for names, (row, figures) in sums.items():
        if names == widest or figures.bmd_g_cm2 is None or not set(names) <= set(scan.included):
            continue
        found = recompute(replace(scan, levels={name: scan.levels[name] for name in names})).by_area_g_cm2
        if found is not None and not abs(figures.bmd_g_cm2 - found) <= TOTAL_TOLERANCE_G_CM2:
            text = f"{row.text('region')}: BMD {figures.bmd_g_cm2:g}, but its levels give {found:.3f} g/cm2"
            row.refuse(Code.DXA_TOTAL_MISMATCH, text)


def _nothing(line: int, code: Code, text: str) -> Table:
    return Table("", 0, (), (RefusedRow(line, Reason(code, text)),), 0)
