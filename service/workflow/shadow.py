"""A candidate in shadow: it sees the live studies, its values are kept beside, and nobody is decided on by them.

The comparison is with the results of the model in force on the same studies: how far apart, and how much that varies
(Bland and Altman 1986). It says whether two models agree, not which of them is right: that only a DXA can say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean, stdev

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.domain.result import PatientValues, Shadowed
from service.store.tables import ModelRow, ResultRow, ShadowRow

LIMIT_SDS = 1.96


@dataclass(frozen=True, slots=True)
class Difference:
    """Shadow minus in force over so many studies; the limits of agreement need two."""

    n: int
    mean: float
    limits: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a model in shadow agrees with the one in force; None: no study yet."""

    since: datetime | None  # None: it is in shadow no more
    bmd_g_cm2: Difference | None
    tbs: Difference | None


def keep(session: Session, result: ResultRow, shadowed: Shadowed | None, patient: PatientValues, now: datetime) -> None:
    """Keep what the shadow said of the levels that the result used; nothing where the result withheld its values."""
    if shadowed is None or patient.bmd_g_cm2 is None:
        return
    beside = result.document["provenance"]["model_sha256"]
    model_id = session.scalar(select(ModelRow.id).where(ModelRow.sha256 == shadowed.model_sha256))
    values = [shadowed.levels[name] for name in patient.levels_used if name in shadowed.levels]
    if model_id is None or beside is None or len(values) < len(patient.levels_used):
        return
    session.add(
        ShadowRow(
            result_id=result.id,
            model_id=model_id,
            beside_sha256=beside,
            bmd_g_cm2=fmean(bmd for bmd, _ in values),
            tbs=_mean_where_all([tbs for _, tbs in values]),
            levels={name: list(pair) for name, pair in shadowed.levels.items()},
            created_at=now,
        )
    )
    session.flush()


def only(session: Session, row: ModelRow | None, now: datetime) -> None:
    """This model alone is in shadow from now on; None: none is."""
    session.execute(update(ModelRow).where(ModelRow.shadow_since.is_not(None)).values(shadow_since=None))
    session.expire_all()
    if row is not None:
        row.shadow_since = now
    session.flush()


def agreement(session: Session, row: ModelRow, in_force_sha256: str) -> Agreement:
    """Over the results that stand, made by the model that is in force now."""
    statement = (
        select(ShadowRow.bmd_g_cm2, ShadowRow.tbs, ResultRow.bmd_g_cm2, ResultRow.tbs)
        .join(ResultRow, ShadowRow.result_id == ResultRow.id)
        .where(
            ShadowRow.model_id == row.id,
            ShadowRow.beside_sha256 == in_force_sha256,
            ResultRow.superseded.is_(False),
        )
    )
    found = session.execute(statement).all()
    return Agreement(
        since=row.shadow_since,
        bmd_g_cm2=_difference([mine - theirs for mine, _, theirs, _ in found if theirs is not None]),
        tbs=_difference([mine - theirs for _, mine, _, theirs in found if mine is not None and theirs is not None]),
    )


def _mean_where_all(values: Sequence[float | None]) -> float | None:
    """The mean; None where one is missing: a model of BMD alone."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _difference(values: Sequence[float]) -> Difference | None:
    if not values:
        return None
    mean = fmean(values)
    reach = LIMIT_SDS * stdev(values) if len(values) > 1 else None
    return Difference(len(values), mean, None if reach is None else (mean - reach, mean + reach))
