"""Alembic's folder: `service.store.engine.upgrade` runs it; there is no alembic.ini."""
