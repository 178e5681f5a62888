"""Every test of the workflow runs on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.store.engine import Store
from tests.service.workflow import workbench


@pytest.fixture(params=workbench.DATABASES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A migrated, empty database of each kind."""
    with workbench.fresh_store(request.param, tmp_path) as opened:
        yield opened


@pytest.fixture
def clock() -> workbench.Clock:
    """Time that moves only when told to."""
    return workbench.Clock()
