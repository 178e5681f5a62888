"""Scanners under watch: what every measured CT says of its scanner, put before `service.domain.drift`, by query.

There is no table of alerts to keep in step: an alert stands as long as the stored results say so.
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.domain.drift import TISSUES, Alert, Observation, Scanner, Watched, watch
from service.domain.policy import MonitoringPolicy
from service.domain.result import Category
from service.store.tables import ResultRow, StudyRow
from service.workflow import scanners

LATEST = 20_000  # results that are looked at
NATIVE = "native"  # as `worker.findings.contrast` calls it: only then do vessels tell about the scanner


class Lookout:
    """Remembers what it saw until another result is in force: pages that refresh themselves must cost nothing."""

    def __init__(self, policy: MonitoringPolicy) -> None:
        self._policy = policy
        self._seen: tuple[tuple[Any, ...], tuple[Watched, ...]] | None = None

    def scanners(self, session: Session) -> tuple[Watched, ...]:
        """Every scanner, those with an alert first."""
        newest = session.execute(
            select(func.max(ResultRow.id), func.count()).where(ResultRow.superseded.is_(False))
        ).one()
        if self._seen is None or self._seen[0] != tuple(newest):
            self._seen = (tuple(newest), watched(session, self._policy))
        return self._seen[1]

    def alerts(self, session: Session) -> tuple[Alert, ...]:
        """Every alert that stands."""
        return tuple(alert for one in self.scanners(session) for alert in one.alerts)


def watched(session: Session, policy: MonitoringPolicy) -> tuple[Watched, ...]:
    """Every scanner of which a result is in force, those with an alert first."""
    document = ResultRow.document
    wanted = (
        select(
            ResultRow.series_id,
            StudyRow.study_date,
            ResultRow.created_at,
            ResultRow.category,
            document[("provenance", "model_sha256")].as_string(),
            document[("anatomy", "contrast")].as_string(),
            *(document[("anatomy", "reference_hu", tissue)].as_float() for tissue in TISSUES),
        )
        .join(StudyRow, ResultRow.study_id == StudyRow.id)
        .where(ResultRow.superseded.is_(False))
        .order_by(ResultRow.id.desc())
        .limit(LATEST)
    )
    rows = session.execute(wanted).all()
    made_by = scanners.of_series(session, sorted({row[0] for row in rows}))
    studies: dict[Scanner, list[Observation]] = {}
    for series_id, told, created_at, category, model, contrast, *values in reversed(rows):
        seen = _observation(told, created_at, category, model, contrast, dict(zip(TISSUES, values, strict=True)))
        studies.setdefault(made_by.get(series_id, scanners.UNKNOWN), []).append(seen)
    found = [watch(scanner, some, policy) for scanner, some in studies.items()]
    return tuple(sorted(found, key=lambda one: (not one.alerts, one.scanner)))


def _observation(
    study_date: str | None,
    created_at: datetime,
    category: str,
    model: str | None,
    contrast: str | None,
    tissues: dict[str, float | None],
) -> Observation:
    if contrast != NATIVE:
        tissues["vessel"] = None
    assessed = category != Category.NOT_ASSESSABLE.value
    return Observation(
        day=_day(study_date) or created_at.date(),
        tissues={name: value for name, value in tissues.items() if value is not None},
        flagged=category == Category.REFER.value if assessed else None,
        model=model or "",
    )


def _day(told: str | None) -> date | None:
    try:
        return None if told is None else datetime.strptime(told, "%Y%m%d").date()
    except ValueError:
        return None
