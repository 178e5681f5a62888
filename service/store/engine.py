"""The database: SQLite for one host, PostgreSQL for more; the same code on both.

SQLite runs in WAL with `synchronous=FULL` (an acknowledged row survives a power cut) and takes its write lock
at BEGIN, so that two writers queue at the busy timeout instead of failing at COMMIT.
"""

from __future__ import annotations

import importlib.resources
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.orm import Session, sessionmaker

BUSY_TIMEOUT_MS = 30_000
_READING = "osteogate_reading"
_MIGRATION_LOCK = 0x6F7374656F  # any fixed number: PostgreSQL's advisory lock of our migrations


def make_engine(url: str) -> Engine:
    """An engine for SQLite (file) or PostgreSQL (psycopg 3); opens nothing yet."""
    if make_url(url).get_backend_name() == "sqlite":
        engine = create_engine(url)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    # A connection that the server closed meanwhile is replaced before use.
    return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 5})


class Store:
    """Sessions on one engine: `transaction` to write, `reading` to look."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        reading = engine.execution_options(**{_READING: True, "postgresql_readonly": True})
        self._writers = sessionmaker(engine, expire_on_commit=False)
        self._readers = sessionmaker(reading, expire_on_commit=False)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One writing transaction: committed at the end, rolled back on any exception."""
        with self._writers.begin() as session:
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One reading transaction; it takes no write lock, and whatever it changed is dropped."""
        with self._readers() as session:
            yield session

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()


def has_schema(url: str) -> bool:
    """False before `upgrade` has ever run on this database."""
    engine = make_engine(url)
    try:
        return inspect(engine).has_table("alembic_version")
    finally:
        engine.dispose()


def upgrade(url: str) -> None:
    """Bring the database at `url` to this version's schema; safe to run from two processes at once."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine(url)
    try:
        with engine.begin() as connection:
            migrate(connection)
    finally:
        engine.dispose()


def migrate(connection: Connection, revision: str = "head") -> None:
    """Run every missing migration inside the connection's transaction; `base` takes all of them back."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
    from alembic import command  # slow to import, and only a migration needs it
    from alembic.config import Config

    config = Config()
    # The folder of the installed package: there is no alembic.ini, in a checkout or in a wheel.
    config.set_main_option("script_location", str(importlib.resources.files("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    if revision == "base":
        command.downgrade(config, revision)
    else:
        command.upgrade(config, revision)


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # the driver starts no transactions of its own: `_begin_sqlite` does
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    _use_write_ahead_log(cursor)
    for pragma in ("synchronous = FULL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _use_write_ahead_log(cursor: sqlite3.Cursor) -> None:
    """Two processes that open a fresh file at once meet here, and SQLite waits for no busy timeout in this step."""
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get(_READING, False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
