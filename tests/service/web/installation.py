"""An installation for the tests: a seeded database of either kind and a client on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import select

from service.api.app import create_app
from service.domain.policy import DEFAULT_POLICY, Policy
from service.settings import Settings
from service.store.engine import Store, make_engine, upgrade
from service.store.tables import DeliveryRow, ReportRow, ResultRow, StudyRow
from tests.service.web import seed
from tests.service.workflow import workbench

ORIGIN = "http://127.0.0.1:8080"


@dataclass(frozen=True)
class Installation:
    client: TestClient
    store: Store
    settings: Settings


@contextmanager
def installed(
    folder: Path,
    *,
    database_url: str | None = None,
    empty: bool = False,
    disk_floor_bytes: int = 1,
    destinations: str = seed.DESTINATIONS,
    policy: Policy = DEFAULT_POLICY,
    **changes: Any,
) -> Iterator[Installation]:
    """A running application on this (migrated, empty) database, else on SQLite; `empty`: without studies."""
    url = database_url or workbench.fresh_url("sqlite", folder)
    told = {"data_dir": folder, "database_url": url, "destinations": destinations}
    settings = Settings.model_validate({**told, "disk_floor_bytes": disk_floor_bytes, **changes})
    engine = make_engine(settings.sqlalchemy_url)
    store = Store(engine)
    if not empty:
        with store.transaction() as session:
            seed.fill(session, settings.results_dir)
    app = create_app(settings, store, policy, clock=lambda: seed.NOW)
    with TestClient(app, base_url=ORIGIN, raise_server_exceptions=False) as client:
        yield Installation(client, store, settings)
    store.close()


def own_url(kind: str, folder: Path) -> str:
    """A migrated database that outlives a test: no other test of the run empties it (`workbench.fresh_url` does)."""
    if kind == "sqlite":
        return workbench.fresh_url(kind, folder)
    url = workbench.new_postgresql_database()
    upgrade(url)
    return url


def report_row(site: Installation, study_uid: str, kind: str) -> ReportRow:
    """The object of this kind of the study's newest result."""
    wanted = select(ReportRow).join(ResultRow).join(StudyRow).where(StudyRow.study_uid == study_uid)
    with site.store.reading() as session:
        return session.scalars(wanted.where(ReportRow.kind == kind).order_by(ReportRow.id.desc()).limit(1)).one()


def delivery_row(site: Installation, study_uid: str, kind: str, destination: str) -> DeliveryRow:
    """The same object on its way to this destination."""
    report = report_row(site, study_uid, kind)
    wanted = select(DeliveryRow).where(DeliveryRow.report_id == report.id, DeliveryRow.destination == destination)
    with site.store.reading() as session:
        return session.scalars(wanted).one()
