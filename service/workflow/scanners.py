"""Which scanner made a series: maker, model and kernel, as its first instance tells them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.domain.drift import Scanner
from service.store.tables import InstanceRow, SeriesRow, StudyRow

_CHUNK = 500


def of_series(session: Session, series_ids: Sequence[int]) -> dict[int, Scanner]:
    """The scanner of each series."""
    found: dict[int, Scanner] = {}
    for start in range(0, len(series_ids), _CHUNK):
        some = series_ids[start : start + _CHUNK]
        first = select(func.min(InstanceRow.id)).where(InstanceRow.series_id.in_(some)).group_by(InstanceRow.series_id)
        wanted = (
            select(
                InstanceRow.series_id,
                StudyRow.synthetic,
                InstanceRow.facts["manufacturer"].as_string(),
                InstanceRow.facts["model_name"].as_string(),
                InstanceRow.facts[("convolution_kernel", 0)].as_string(),
            )
            .join(SeriesRow, InstanceRow.series_id == SeriesRow.id)
            .join(StudyRow, SeriesRow.study_id == StudyRow.id)
            .where(InstanceRow.id.in_(first))
        )
        for series_id, synthetic, maker, model, kernel in session.execute(wanted):
            found[series_id] = Scanner(synthetic, maker or "", model or "", kernel or "")
    return found


UNKNOWN = Scanner(False, "", "", "")
