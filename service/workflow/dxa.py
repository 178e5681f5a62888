"""DXA results come in: one, or a file of them; each delivery is one transaction and nothing is half-imported.

A result that is stored already is a duplicate and changes nothing. One that contradicts a stored result of the same
scan is refused: which of the two is right is for a person to say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from enum import StrEnum
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session, selectinload

from service.domain.dxa import DxaScan, Objection, Recomputed, objections, recompute
from service.domain.dxa_csv import Defaults, RefusedRow, Table, read_csv
from service.domain.reasons import Code, Reason
from service.store.tables import AuditRow, DxaImportRow, DxaLevelRow, DxaScanRow
from service.workflow import pairing
from service.workflow.people import By
from service.workflow.reading import Page

CONTRADICTS = (
    "another result of the same patient, day and device says otherwise; if it is another scan, give both their numbers "
    "(scan_id)"
)
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Source:
    """How one result came: by the API, or in a DICOM object with a name and the hash of its file."""

    layout: str = "api"
    name: str | None = None
    sha256: str | None = None


BY_API = Source()


class OnRefusal(StrEnum):
    """What becomes of the good rows of a file when others are refused."""

    STOP = "stop"  # nothing is imported: mend the file and send it again
    SKIP = "skip"  # the good ones are imported, the refused ones reported


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a delivery."""

    layout: str
    rows: int
    accepted: int  # scans stored now
    duplicates: int  # scans that were stored already, with the same figures
    passed_over: int  # rows about another part of the body, or of a spine that was not scanned
    refused: tuple[RefusedRow, ...]
    imported: bool
    import_id: int | None


@dataclass(frozen=True, slots=True)
class Accepted:
    """What came of one result: its id, and the total recomputed; or every reason why it is not taken."""

    id: int | None
    duplicate: bool
    recomputed: Recomputed | None
    reasons: tuple[Reason, ...]

    @property
    def contradicts(self) -> bool:
        """Refused for what is stored, not for what it says."""
        return any(reason.code is Code.DXA_CONTRADICTS for reason in self.reasons)


@dataclass(frozen=True, slots=True)
class LevelLine:
    """One vertebra of a stored result."""

    level: str
    validity: str
    bmd_g_cm2: float | None
    bmc_g: float | None
    area_cm2: float | None
    t_score: float | None
    z_score: float | None
    tbs: float | None


@dataclass(frozen=True, slots=True)
class ScanLine:
    """One stored result, for people."""

    id: int
    patient_id: str
    scan_date: date
    manufacturer: str
    model: str
    synthetic: bool
    total_bmd_g_cm2: float | None
    by_area_g_cm2: float | None
    mean_g_cm2: float
    total_tbs: float | None
    levels: tuple[LevelLine, ...]


@dataclass(frozen=True, slots=True)
class ImportLine:
    """One delivery, for people."""

    id: int
    at: Any
    actor: str
    layout: str
    name: str | None
    accepted: int
    duplicates: int
    refused: int
    passed_over: int


def accept(session: Session, scan: DxaScan, by: By, *, window_days: int, source: Source = BY_API) -> Accepted:
    """Take one result, or say why not; audit row and the referrals that it answers go with it."""
    sorted_out = _sort_out(session, [(None, scan)], by.now.date())
    reasons = tuple(row.reason for row in sorted_out.refused)
    if reasons:
        note_refused(session, by, source, reasons)
        return Accepted(None, False, None, reasons)
    found = recompute(scan)
    if sorted_out.duplicates:
        stored = session.scalars(select(DxaScanRow.id).where(DxaScanRow.identity == scan.identity)).one()
        return Accepted(stored, True, found, ())
    counts = {"rows": 1, "accepted": 1, "duplicates": 0, "refused": 0, "passed_over": 0}
    delivery = _delivery(source.layout, source.name, source.sha256, **counts, by=by)
    session.add(delivery)
    session.flush()
    (row,) = _store(session, delivery.id, sorted_out.new)
    closed = pairing.close_referrals(session, [scan.patient_id], window_days, by)
    _audit(session, by, "dxa.accept", f"dxa:{row.id}", patient_id=scan.patient_id, referrals_closed=closed)
    return Accepted(row.id, False, found, ())


def note_refused(session: Session, by: By, source: Source, reasons: Sequence[Reason]) -> None:
    """Write into the audit that a result was refused."""
    told = sorted({reason.code.value for reason in reasons})
    _audit(session, by, "dxa.refused", source.name or "dxa", codes=told)


def import_csv(
    session: Session,
    text: str,
    defaults: Defaults,
    by: By,
    *,
    window_days: int,
    columns: Mapping[str, str] | None = None,
    on_refusal: OnRefusal = OnRefusal.STOP,
    name: str | None = None,
) -> Report:
    """Take the results of a file in the caller's transaction: all of them, or (SKIP) all but the refused, or none."""
    table = read_csv(text, defaults, columns)
    found = _sort_out(session, table.scans, by.now.date(), table.line_of)
    refused = tuple(sorted([*table.refused, *found.refused], key=lambda row: row.line))
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    readable = bool(table.layout)
    if not readable or (refused and on_refusal is OnRefusal.STOP):
        told = sorted({row.reason.code.value for row in refused})
        _audit(session, by, "dxa.import.refused", "dxa", file=name, sha256=sha256, refused=len(refused), codes=told)
        return Report(table.layout, table.rows, 0, 0, table.passed_over, refused, False, None)
    counts = {"accepted": len(found.new), "duplicates": found.duplicates, "refused": len(refused)}
    told_counts = {"rows": table.rows, **counts, "passed_over": table.passed_over}
    delivery = _delivery(table.layout, name, sha256, **told_counts, by=by)
    session.add(delivery)
    session.flush()
    _store(session, delivery.id, found.new)
    counts["referrals_closed"] = pairing.close_referrals(
        session, [scan.patient_id for _, scan in found.new], window_days, by
    )
    _audit(
        session, by, "dxa.import", f"dxa-import:{delivery.id}", file=name, sha256=sha256, layout=table.layout, **counts
    )
    return _report(table, found, refused, delivery.id)


def _report(table: Table, found: _Sorted, refused: tuple[RefusedRow, ...], import_id: int) -> Report:
    accepted = len(found.new)
    return Report(table.layout, table.rows, accepted, found.duplicates, table.passed_over, refused, True, import_id)


# --- new, known, or contradicting ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sorted:
    new: tuple[tuple[int | None, DxaScan], ...]
    duplicates: int
    refused: tuple[RefusedRow, ...]


def _sort_out(
    session: Session,
    scans: Sequence[tuple[int | None, DxaScan]],
    today: date,
    line_of: Callable[[int, str], int] = lambda line, _where: line,
) -> _Sorted:
    """`line_of` tells where a part of the scan of a line stands."""
    known = _contents(session, [scan.identity for _, scan in scans])
    new: list[tuple[int | None, DxaScan]] = []
    refused: list[RefusedRow] = []
    duplicates = 0
    for line, scan in scans:
        against = objections(scan, today)
        stored = known.get(scan.identity)
        if not against and stored is not None and stored != scan.content:
            against = (Objection("", Reason(Code.DXA_CONTRADICTS, CONTRADICTS)),)
        if against:
            refused += [RefusedRow(line_of(line or 0, one.where), one.reason) for one in against]
        elif stored is not None:
            duplicates += 1
        else:
            known[scan.identity] = scan.content
            new.append((line, scan))
    return _Sorted(tuple(new), duplicates, tuple(refused))


def _contents(session: Session, identities: Sequence[str]) -> dict[str, str]:
    """What is stored under these identities."""
    found: dict[str, str] = {}
    for start in range(0, len(identities), _CHUNK):
        some = identities[start : start + _CHUNK]
        wanted = select(DxaScanRow.identity, DxaScanRow.content).where(DxaScanRow.identity.in_(some))
        found.update((identity, content) for identity, content in session.execute(wanted))
    return found


def _store(session: Session, import_id: int, scans: Iterable[tuple[int | None, DxaScan]]) -> list[DxaScanRow]:
    rows = [_scan_row(import_id, line, scan) for line, scan in scans]
    session.add_all(rows)
    session.flush()
    return rows


def _scan_row(import_id: int, line: int | None, scan: DxaScan) -> DxaScanRow:
    found = recompute(scan)
    assert found.mean_g_cm2 is not None  # a scan without a valid level was refused
    levels = [
        DxaLevelRow(level=name, validity=level.validity.value, **asdict(level.figures))
        for name, level in scan.levels.items()
    ]
    total = {f"total_{name}": value for name, value in asdict(scan.total).items()}
    return DxaScanRow(
        import_id=import_id,
        line=line,
        identity=scan.identity,
        content=scan.content,
        patient_id=scan.patient_id,
        scan_date=scan.scan_date,
        manufacturer=scan.manufacturer,
        model=scan.model,
        region=scan.region,
        scan_id=scan.scan_id,
        sex=scan.sex,
        synthetic=scan.synthetic,
        by_area_g_cm2=found.by_area_g_cm2,
        mean_g_cm2=found.mean_g_cm2,
        levels=levels,
        **total,
    )


def _delivery(layout: str, name: str | None, sha256: str | None, *, by: By, **counts: int) -> DxaImportRow:
    return DxaImportRow(at=by.now, actor=by.actor, layout=layout, name=name, sha256=sha256, **counts)


def _audit(session: Session, by: By, action: str, subject: str, **detail: Any) -> None:
    session.add(
        AuditRow(at=by.now, actor=by.actor, action=action, subject=subject, detail=detail, peer_address=by.peer_address)
    )


# --- reading -------------------------------------------------------------------------------------------------------


def scans(session: Session, *, patient_id: str | None = None, number: int = 1, size: int = 50) -> Page[ScanLine]:
    """One page of the stored results, the latest scan first."""
    conditions = [DxaScanRow.patient_id == patient_id] if patient_id else []
    total = session.scalar(select(func.count()).select_from(DxaScanRow).where(*conditions)) or 0
    wanted = select(DxaScanRow).where(*conditions).options(selectinload(DxaScanRow.levels))
    ordered = wanted.order_by(DxaScanRow.scan_date.desc(), DxaScanRow.id.desc())
    rows = session.scalars(ordered.limit(size).offset((number - 1) * size))
    return Page(tuple(_line(row) for row in rows), total, number, size)


def imports(session: Session, *, size: int = 10) -> tuple[ImportLine, ...]:
    """The latest deliveries."""
    rows = session.scalars(select(DxaImportRow).order_by(DxaImportRow.id.desc()).limit(size))
    return tuple(
        ImportLine(
            row.id,
            row.at,
            row.actor,
            row.layout,
            row.name,
            row.accepted,
            row.duplicates,
            row.refused,
            row.passed_over,
        )
        for row in rows
    )


def _line(row: DxaScanRow) -> ScanLine:
    levels = tuple(
        LevelLine(
            one.level,
            one.validity,
            one.bmd_g_cm2,
            one.bmc_g,
            one.area_cm2,
            one.t_score,
            one.z_score,
            one.tbs,
        )
        for one in row.levels
    )
    return ScanLine(
        row.id,
        row.patient_id,
        row.scan_date,
        row.manufacturer,
        row.model,
        row.synthetic,
        row.total_bmd_g_cm2,
        row.by_area_g_cm2,
        row.mean_g_cm2,
        row.total_tbs,
        levels,
    )
