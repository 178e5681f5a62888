"""INSERT ... ON CONFLICT DO NOTHING, written the same for SQLite and PostgreSQL.

Two processes that insert the same row at once both succeed: the second waits for the first and finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Table as CoreTable
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.store.tables import Table

_CHUNK = 500  # rows per statement: SQLite allows 32,766 bound values


def insert_missing(
    session: Session, table: type[Table], rows: Sequence[dict[str, Any]], unique: Sequence[str]
) -> set[Any]:
    """Insert the rows that are not there yet, ordered by `unique`; the inserted values of its first column.

    The order matters: transactions that insert the same rows in the same order cannot deadlock.
    """
    core = table.__table__
    assert isinstance(core, CoreTable)
    ordered = sorted(rows, key=lambda row: tuple(row[name] for name in unique))
    inserted: set[Any] = set()
    for start in range(0, len(ordered), _CHUNK):
        values = ordered[start : start + _CHUNK]
        insert: Any = (postgresql if session.get_bind().dialect.name == "postgresql" else sqlite).insert(core)
        statement = insert.values(values).on_conflict_do_nothing(index_elements=list(unique))
        inserted.update(session.scalars(statement.returning(core.c[unique[0]])))
    return inserted
