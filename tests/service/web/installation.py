"""An installation for the tests: a seeded SQLite in a temporary folder and a client on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi.testclient import TestClient

from service.api.app import create_app
from service.domain.policy import DEFAULT_POLICY
from service.settings import Settings
from service.store.engine import Store, make_engine
from service.store.tables import Table
from tests.service.web import seed

ORIGIN = "http://127.0.0.1:8080"


@dataclass(frozen=True)
class Installation:
    client: TestClient
    store: Store
    settings: Settings


@contextmanager
def installed(folder: Path, *, empty: bool = False, disk_floor_bytes: int = 1) -> Iterator[Installation]:
    """A running application; `empty` leaves the database without studies."""
    settings = Settings(data_dir=folder, disk_floor_bytes=disk_floor_bytes)
    engine = make_engine(settings.sqlalchemy_url)
    Table.metadata.create_all(engine)
    store = Store(engine)
    if not empty:
        with store.transaction() as session:
            seed.fill(session, settings.results_dir)
    app = create_app(settings, store, DEFAULT_POLICY, clock=lambda: seed.NOW)
    with TestClient(app, base_url=ORIGIN, raise_server_exceptions=False) as client:
        yield Installation(client, store, settings)
    store.close()
