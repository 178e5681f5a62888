"""A row goes from one state to the next only where it still is in the one that the statement names."""

from typing import Any

from sqlalchemy import CursorResult
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import Update


def moved(session: Session, statement: Update) -> bool:
    """Run an update of one row; False where somebody else was there first."""
    result: Any = session.execute(statement.execution_options(synchronize_session=False))
    assert isinstance(result, CursorResult)
    return result.rowcount == 1
