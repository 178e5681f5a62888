"""DXA results are stored once, whole files or nothing, and what contradicts is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from service.domain.dxa import Figures
from service.domain.dxa_csv import Defaults
from service.domain.reasons import Code
from service.store.engine import Store
from service.store.tables import AuditRow, DxaImportRow, DxaLevelRow, DxaScanRow
from service.workflow import dxa
from service.workflow.dxa import OnRefusal
from service.workflow.people import By
from tests.service.domain.test_dxa import APEX, GE, scan
from tests.service.workflow import workbench

BY = By("lab", workbench.START, "10.0.0.7")
PRODIGY = Defaults(model="Prodigy")
OTHER = GE.replace("P1,", "P2,").partition("\n")[2]


@pytest.fixture(params=workbench.DATABASES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with workbench.fresh_store(request.param, tmp_path) as opened:
        yield opened


def bring(store: Store, text: str, defaults: Defaults = PRODIGY, **more: Any) -> dxa.Report:
    with store.transaction() as session:
        return dxa.import_csv(session, text, defaults, BY, window_days=365, **more)


def counts(store: Store) -> tuple[int, ...]:
    """Deliveries, scans, levels."""
    with store.reading() as session:
        tables = (DxaImportRow, DxaScanRow, DxaLevelRow)
        return tuple(session.scalar(select(func.count()).select_from(table)) or 0 for table in tables)


def trail(store: Store) -> list[str]:
    with store.reading() as session:
        return list(session.scalars(select(AuditRow.action).order_by(AuditRow.id)))


def test_a_file_is_stored_with_both_totals_and_a_second_time_changes_nothing(store: Store) -> None:
    report = bring(store, GE + OTHER, name="spine.csv")
    assert (report.imported, report.accepted, report.duplicates, report.passed_over) == (True, 2, 0, 2)
    with store.reading() as session:
        page = dxa.scans(session, patient_id="P2")
        (line,) = page.items
        assert page.total == 1
        assert line.total_bmd_g_cm2 == 0.983
        assert line.by_area_g_cm2 == pytest.approx(52.1 / 53)
        assert line.mean_g_cm2 == pytest.approx(0.975)
        assert [one.level for one in line.levels] == ["L1", "L2", "L3", "L4"]
        row = session.scalars(select(DxaScanRow).where(DxaScanRow.patient_id == "P2")).one()
        assert row.line == 9
    again = bring(store, GE + OTHER)
    assert (again.imported, again.accepted, again.duplicates) == (True, 0, 2)
    assert counts(store) == (2, 2, 8)
    assert trail(store) == ["dxa.import", "dxa.import"]


def test_one_refused_row_and_nothing_is_imported_unless_told(store: Store) -> None:
    text = GE + "P2,1,2026-03-04,L1,11.00,9.90,0.700,,\n"  # 0.7 is not 9.9 / 11
    report = bring(store, text)
    assert not report.imported
    assert [(row.line, row.reason.code) for row in report.refused] == [(9, Code.DXA_INCONSISTENT)]
    assert counts(store) == (0, 0, 0)
    assert trail(store) == ["dxa.import.refused"]
    rest = bring(store, text, on_refusal=OnRefusal.SKIP)
    assert (rest.imported, rest.accepted, len(rest.refused)) == (True, 1, 1)
    assert counts(store) == (1, 1, 4)


def test_a_wrong_region_is_told_with_its_own_line(store: Store) -> None:
    wrong = GE.replace("14.00,14.00,1.000", "14.00,14.00,0.700").replace("53.00,52.10,0.983", "53.00,52.10,0.999")
    report = bring(store, wrong)
    assert [(row.line, row.reason.code) for row in report.refused] == [
        (4, Code.DXA_INCONSISTENT),  # L3
        (6, Code.DXA_INCONSISTENT),  # L1-L4: 52.1 / 53
        (6, Code.DXA_TOTAL_MISMATCH),
    ]


def test_a_file_of_an_unknown_layout_is_never_imported(store: Store) -> None:
    report = bring(store, "a,b\n1,2\n", on_refusal=OnRefusal.SKIP)
    assert not report.imported
    assert counts(store) == (0, 0, 0)


def test_what_contradicts_a_stored_result_is_refused(store: Store) -> None:
    assert bring(store, APEX, Defaults(model="Horizon")).accepted == 1
    changed = APEX.replace("41.0,40.7,0.993", "41.0,40.7,0.990")
    report = bring(store, changed, Defaults(model="Horizon"))
    assert [(row.line, row.reason.code) for row in report.refused] == [(2, Code.DXA_CONTRADICTS)]
    assert bring(store, changed.replace("A01", "A02"), Defaults(model="Horizon")).accepted == 1
    assert counts(store)[1] == 2


def test_a_file_that_contradicts_itself_is_refused(store: Store) -> None:
    twice = APEX + APEX.splitlines()[1].replace("0.993", "0.990") + "\n"
    report = bring(store, twice, Defaults(model="Horizon"))
    assert [(row.line, row.reason.code) for row in report.refused] == [(3, Code.DXA_CONTRADICTS)]
    same = bring(store, APEX + APEX.splitlines()[1] + "\n", Defaults(model="Horizon"))
    assert (same.accepted, same.duplicates) == (1, 1)


def test_nothing_stays_of_an_import_that_breaks_in_the_middle(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(dxa, "_audit", breaks)  # the last thing that an import writes
    with pytest.raises(OSError, match="full"):
        bring(store, GE)
    assert counts(store) == (0, 0, 0)


def test_one_result_is_taken_once_and_refused_with_every_reason(store: Store) -> None:
    with store.transaction() as session:
        first = dxa.accept(session, scan(), BY, window_days=365)
    assert first.id is not None
    assert not first.duplicate
    with store.transaction() as session:
        second = dxa.accept(session, scan(), BY, window_days=365)
    assert (second.id, second.duplicate) == (first.id, True)
    with store.transaction() as session:
        third = dxa.accept(session, scan(model="another"), BY, window_days=365)
    assert (third.id, third.contradicts) == (None, True)
    with store.transaction() as session:
        fourth = dxa.accept(session, scan(patient_id="", total=Figures(bmd_g_cm2=2.0)), BY, window_days=365)
    assert {reason.code for reason in fourth.reasons} == {Code.DXA_PATIENT_MISSING, Code.DXA_TOTAL_MISMATCH}
    assert counts(store) == (1, 1, 4)
    assert trail(store) == ["dxa.accept", "dxa.refused", "dxa.refused"]
