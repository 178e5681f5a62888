"""The database holds what it promises: schema, durability settings, locks."""

from __future__ import annotations

import sqlite3
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import IntegrityError

from service.store.engine import Store, make_engine, migrate, upgrade
from service.store.tables import AuditRow, DxaReportRow, SeriesRow, Table
from service.store.upsert import insert_missing
from tests.service.workflow import workbench


@pytest.mark.parametrize("kind", workbench.DATABASES)
def test_the_migrations_make_exactly_the_tables(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an installed wheel knows no checkout
    if kind == "sqlite":
        url = f"sqlite:///{tmp_path / 'deep' / 'folder' / 'new.sqlite3'}"
    else:
        url = workbench.new_postgresql_database()
    upgrade(url)
    upgrade(url)  # a second time changes nothing
    engine = make_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        differences = compare_metadata(context, Table.metadata)
        assert context.get_current_revision() is not None
    engine.dispose()
    assert differences == []


@pytest.mark.parametrize("kind", workbench.DATABASES)
def test_every_migration_can_be_taken_back(kind: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.sqlite3'}" if kind == "sqlite" else workbench.new_postgresql_database()
    upgrade(url)
    engine = make_engine(url)
    for wanted in ("base", "head"):
        with engine.begin() as connection:
            migrate(connection, wanted)
        with engine.connect() as connection:
            left = set(inspect(connection).get_table_names()) - {"alembic_version"}
            assert left == (set() if wanted == "base" else set(Table.metadata.tables))
    engine.dispose()


def test_a_fresh_file_in_which_another_process_writes_is_waited_for(tmp_path: Path) -> None:
    """SQLite answers "locked" at once when a connection asks for the write-ahead log meanwhile."""
    path = tmp_path / "a.sqlite3"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    done = threading.Timer(0.5, other.rollback)
    done.start()
    engine = make_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    engine.dispose()
    done.join()
    other.close()


@pytest.mark.parametrize("kind", workbench.DATABASES)
def test_two_processes_may_upgrade_at_once(kind: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.sqlite3'}" if kind == "sqlite" else workbench.new_postgresql_database()
    errors: list[BaseException] = []

    def go() -> None:
        try:
            upgrade(url)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_sqlite_is_set_up_to_lose_nothing(tmp_path: Path) -> None:
    with workbench.fresh_store("sqlite", tmp_path) as store, store.reading() as session:
        said = {
            name: session.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert said == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_sqlite_writers_queue_and_readers_do_not(tmp_path: Path) -> None:
    """A second writer waits at BEGIN (no SQLITE_BUSY after a read); a reader is served meanwhile."""
    with workbench.fresh_store("sqlite", tmp_path) as store:
        order: list[str] = []

        def second() -> None:
            with store.transaction() as session:
                assert len(session.scalars(select(AuditRow)).all()) == 1  # it sees what the first one wrote
                order.append("second began")
                session.add(_audit("second"))

        thread = threading.Thread(target=second)
        with store.transaction() as session:
            assert session.scalars(select(AuditRow)).all() == []  # the read that would deadlock a deferred BEGIN
            thread.start()
            with store.reading() as reader:
                assert reader.scalars(select(AuditRow)).all() == []
            session.add(_audit("first"))
            session.flush()
            order.append("first ends")
        thread.join()
        assert order == ["first ends", "second began"]
        with store.reading() as reader:
            assert set(reader.scalars(select(AuditRow.actor))) == {"first", "second"}


@pytest.mark.parametrize("kind", workbench.DATABASES)
def test_a_transaction_is_all_or_nothing_and_a_reader_writes_nothing(kind: str, tmp_path: Path) -> None:
    with workbench.fresh_store(kind, tmp_path) as store:
        with pytest.raises(ZeroDivisionError):
            _write_and_fail(store)
        with store.reading() as session:
            session.add(_audit("nobody"))
        with store.reading() as session:
            assert session.scalars(select(AuditRow)).all() == []


@pytest.mark.parametrize("kind", workbench.DATABASES)
def test_foreign_keys_hold_and_times_come_back_in_utc(kind: str, tmp_path: Path) -> None:
    with workbench.fresh_store(kind, tmp_path) as store:
        with pytest.raises(IntegrityError), store.transaction() as session:
            session.add(SeriesRow(study_id=999, series_uid="1.2"))
        with store.transaction() as session:
            session.add(_audit("a"))
        with store.reading() as session:
            at = session.scalars(select(AuditRow.at)).one()
        assert at == workbench.START
        assert at.tzinfo is UTC
        with pytest.raises(Exception, match="naive"), store.transaction() as session:
            session.add(AuditRow(at=datetime(2026, 1, 1), actor="a", action="b", subject="c"))


@pytest.mark.parametrize("kind", workbench.DATABASES)
def test_insert_missing_says_what_it_inserted(kind: str, tmp_path: Path) -> None:
    rows = [
        {"sop_instance_uid": uid, "study_uid": "1", "sha256": "a", "path": "p", "received_at": workbench.START}
        for uid in ("2", "1", "3")
    ]
    from service.store.tables import ConflictRow

    with workbench.fresh_store(kind, tmp_path) as store:
        unique = ["sop_instance_uid", "sha256"]
        with store.transaction() as session:
            assert insert_missing(session, ConflictRow, rows[:2], unique) == {"1", "2"}
        with store.transaction() as session:
            assert insert_missing(session, ConflictRow, rows, unique) == {"3"}
            assert insert_missing(session, ConflictRow, [], unique) == set()


def _write_and_fail(store: Store) -> None:
    with store.transaction() as session:
        session.add(_audit("nobody"))
        session.flush()
        raise ZeroDivisionError


def _audit(actor: str) -> AuditRow:
    return AuditRow(at=workbench.START, actor=actor, action="test", subject="nothing")


def test_the_store_needs_no_open_connection(tmp_path: Path) -> None:
    store = Store(make_engine(f"sqlite:///{tmp_path / 'absent' / 'x.sqlite3'}"))
    store.close()
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("kind", workbench.DATABASES)
def test_reports_received_before_the_upgrade_wait_to_be_read(kind: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.sqlite3'}" if kind == "sqlite" else workbench.new_postgresql_database()
    engine = make_engine(url)
    with engine.begin() as connection:
        migrate(connection, "0003")
    at = "2026-11-23 09:00:00+00:00"
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO studies (id, study_uid, synthetic, state, revision, first_received_at, last_received_at) "
                f"VALUES (1, '1', false, 'not-screened', 1, '{at}', '{at}')"
            )
        )
        connection.execute(
            text(
                "INSERT INTO series (id, study_id, series_uid, instance_count, reasons, cautions, chosen) "
                "VALUES (1, 1, '1.1', 3, '[]', '[]', false)"
            )
        )
        for number, (sop_class, own) in enumerate([("88.22", "false"), ("88.34", "true"), ("2", "false")], start=1):
            facts = f'{{"sop_class_uid": "1.2.840.10008.5.1.4.1.1.{sop_class}", "own_output": {own}}}'
            connection.execute(
                text(
                    "INSERT INTO instances (id, series_id, sop_instance_uid, sha256, path, size_bytes, "
                    "transfer_syntax_uid, facts, received_at) "
                    f"VALUES ({number}, 1, '{number}', 's', 'p', 1, 't', :facts, '{at}')"
                ),
                {"facts": facts},
            )
    with engine.begin() as connection:
        migrate(connection)
    with Store(engine).reading() as session:
        assert [(row.instance_id, row.state, row.reasons) for row in session.scalars(select(DxaReportRow))] == [
            (1, "waiting", [])
        ]
    engine.dispose()
