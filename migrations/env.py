"""Alembic's environment: runs on the connection that `service.store.engine.migrate` hands over."""

from __future__ import annotations

from alembic import context

from service.store.tables import Table


def run() -> None:
    """Run the migrations inside the caller's transaction."""
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=Table.metadata,
        render_as_batch=True,  # SQLite alters a table by copying it
        transactional_ddl=True,  # the caller owns the one transaction, on SQLite too
    )
    with context.begin_transaction():
        context.run_migrations()


run()
