"""What stands beside a series of structured reports, and which studies hold nothing else.

A room of its own, so that closing a study and listing the worklist need not know how a report is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, exists, or_, select
from sqlalchemy.orm import Session, aliased

from service.domain.eligibility import Verdict
from service.domain.reasons import Reason
from service.domain.states import DxaReportState
from service.store.tables import DxaReportRow, InstanceRow, SeriesRow, StudyRow

NOTHING_BUT_REPORTS = "Nothing but structured reports came of this study."
_READ = (DxaReportState.ACCEPTED.value, DxaReportState.DUPLICATE.value, DxaReportState.REFUSED.value)


def verdict(session: Session, series: SeriesRow) -> Verdict | None:
    """What its reports came to, each reason once; None where none of them has anything to say."""
    wanted = select(DxaReportRow.reasons).join(InstanceRow).where(InstanceRow.series_id == series.id)
    found = [Reason.from_dict(one) for told in session.scalars(wanted.order_by(DxaReportRow.id)) for one in told]
    return Verdict(False, tuple(dict.fromkeys(found))) if found else None


def are_reports(series: Sequence[SeriesRow]) -> bool:
    """Whether all of these series hold reports."""
    return bool(series) and all(one.modality == "SR" for one in series)


_OTHER, _SERIES = aliased(SeriesRow), aliased(SeriesRow)
only_reports: ColumnElement[bool] = and_(
    exists(select(_SERIES.id).where(_SERIES.study_id == StudyRow.id)),
    ~exists(
        select(_OTHER.id).where(_OTHER.study_id == StudyRow.id, or_(_OTHER.modality.is_(None), _OTHER.modality != "SR"))
    ),
)
"""A study of which nothing but structured reports came: no CT that a DXA result could belong to."""

only_dxa: ColumnElement[bool] = and_(
    only_reports,
    exists(
        select(DxaReportRow.id)
        .join(InstanceRow, DxaReportRow.instance_id == InstanceRow.id)
        .join(_SERIES, InstanceRow.series_id == _SERIES.id)
        .where(_SERIES.study_id == StudyRow.id, DxaReportRow.state.in_(_READ))
    ),
)
"""A densitometer's study: its results stand on the page of DXA results, not on the worklist of CTs."""
