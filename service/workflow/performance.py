"""Live performance: the pairs whose DXA came in since a model was first used, by model and by scanner; and when a
retraining would have enough new ones.

A pair whose DXA was stored before the model was used says nothing here: the model may have been trained on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session, selectinload

from models.package import MANIFEST
from service.domain.drift import Scanner
from service.domain.monitoring import Compared, Performance, Vertebra, performance
from service.domain.pairing import Pair
from service.domain.policy import Policy
from service.domain.result import Category
from service.store.tables import DxaImportRow, DxaScanRow, ResultRow, StudyRow
from service.workflow import pairing, scanners, training
from service.workflow.model import PACKAGES

_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Model:
    """A model as results name it."""

    name: str
    sha256: str
    first_used: datetime
    in_force: bool  # it made the latest result


@dataclass(frozen=True, slots=True)
class Group:
    """Pairs of people, or of digital patients; of one scanner, or (None) of all together."""

    synthetic: bool
    scanner: Scanner | None
    performance: Performance


@dataclass(frozen=True, slots=True)
class ModelPerformance:
    """One model, and every group of its pairs; the first is of all scanners."""

    model: Model
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Reminder:
    """How many pairs of people have come since the model in force was made, and how many a retraining asks for.

    A pair that a training run has learned from or judged by, or that one holds now, is not new.
    """

    since: datetime | None  # None: no model is known, every pair counts
    people: int
    digital: int  # shown, never counted: nothing about people is learned from them
    needed: int
    run: int | None = None  # the latest training run whose pairs were taken out

    @property
    def due(self) -> bool:
        """A retraining would have enough new pairs."""
        return self.people >= self.needed


@dataclass(frozen=True, slots=True)
class Overview:
    """All models, the one in force first; and the reminder."""

    models: tuple[ModelPerformance, ...]
    reminder: Reminder


@dataclass(frozen=True, slots=True)
class _Entry:
    """One pair with what its CT's result and its DXA say."""

    model: str  # sha256
    pair: training.PairKey
    scanner: Scanner
    dxa_at: datetime  # when the DXA was stored
    compared: Compared | None  # None where no level has a predicted density


def overview(session: Session, policy: Policy) -> Overview:
    """How every model does, and whether a retraining would have enough new pairs."""
    found = pairing.overview(session, policy.pairing).pairs
    entries = _entries(session, found)
    models = _models(session)
    told = tuple(_of_model(model, entries, policy) for model in models)
    return Overview(told, _reminder(models, entries, training.used(session), policy))


def reminder(session: Session, policy: Policy) -> Reminder:
    """The reminder alone."""
    return overview(session, policy).reminder


def _of_model(model: Model, entries: Iterable[_Entry], policy: Policy) -> ModelPerformance:
    own = [one for one in entries if one.model == model.sha256 and one.dxa_at >= model.first_used]
    groups: dict[tuple[bool, Scanner | None], list[Compared]] = {}
    for one in own:
        if one.compared is not None:
            for scanner in (None, one.scanner):
                groups.setdefault((one.scanner.synthetic, scanner), []).append(one.compared)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] is not None, item[0][1] or _ALL))
    least = policy.monitoring.pairs_minimum
    return ModelPerformance(
        model, tuple(Group(synthetic, scanner, performance(some, least)) for (synthetic, scanner), some in ordered)
    )


_ALL = Scanner(False, "", "", "")


def _reminder(models: tuple[Model, ...], entries: Iterable[_Entry], used: training.Used, policy: Policy) -> Reminder:
    since = _made_at(models[0]) if models else None
    new = [one for one in entries if (since is None or one.dxa_at > since) and not used.took(one.pair)]
    digital = sum(one.scanner.synthetic for one in new)
    return Reminder(since, len(new) - digital, digital, policy.monitoring.retraining_pairs, used.latest_run)


def _made_at(model: Model) -> datetime:
    """When the model was made, where its package is at hand; else when it was first used."""
    return _shipped().get(model.sha256, model.first_used)


@cache
def _shipped() -> Mapping[str, datetime]:
    """A package's hash, as results name it -> when it was made, of those that ship with this release."""
    found: dict[str, datetime] = {}
    for path in PACKAGES.glob(f"*/{MANIFEST}"):
        raw = path.read_bytes()
        found[hashlib.sha256(raw).hexdigest()] = datetime.fromisoformat(json.loads(raw)["created"])
    return found


def _models(session: Session) -> tuple[Model, ...]:
    """Every model that a stored result names, the one in force first."""
    provenance = select(
        ResultRow.id.label("id"),
        ResultRow.created_at.label("at"),
        ResultRow.document[("provenance", "model")].as_string().label("name"),
        ResultRow.document[("provenance", "model_sha256")].as_string().label("sha256"),
    ).subquery()
    rows = session.execute(
        select(provenance.c.sha256, func.max(provenance.c.name), func.min(provenance.c.at), func.max(provenance.c.id))
        .where(provenance.c.sha256.is_not(None))
        .group_by(provenance.c.sha256)
        .order_by(func.max(provenance.c.id).desc())
    ).all()
    return tuple(
        Model(name or "", sha256, first_used, in_force=number == 0)
        for number, (sha256, name, first_used, _) in enumerate(rows)
    )


# --- pairs ---------------------------------------------------------------------------------------------------------


def _entries(session: Session, pairs: tuple[Pair, ...]) -> list[_Entry]:
    found: list[_Entry] = []
    for start in range(0, len(pairs), _CHUNK):
        found += _some_entries(session, pairs[start : start + _CHUNK])
    return found


def _some_entries(session: Session, pairs: tuple[Pair, ...]) -> Iterable[_Entry]:
    in_force = select(StudyRow.study_uid, ResultRow.series_id, ResultRow.document).join(ResultRow)
    results = {
        study_uid: (series_id, document)
        for study_uid, series_id, document in session.execute(
            in_force.where(
                StudyRow.study_uid.in_([one.ct.study_uid for one in pairs]), ResultRow.superseded.is_(False)
            ).order_by(ResultRow.id)
        )
    }
    wanted = (
        select(DxaScanRow, DxaImportRow.at)
        .join(DxaImportRow, DxaScanRow.import_id == DxaImportRow.id)
        .where(DxaScanRow.id.in_([one.dxa.id for one in pairs]))
        .options(selectinload(DxaScanRow.levels))
    )
    scans = {row.id: (row, at) for row, at in session.execute(wanted)}
    made_by = scanners.of_series(session, sorted({series_id for series_id, _ in results.values()}))
    for one in pairs:
        if one.ct.study_uid in results and one.dxa.id in scans:
            series_id, document = results[one.ct.study_uid]
            scan, at = scans[one.dxa.id]
            scanner = made_by.get(series_id) or Scanner(one.ct.synthetic, "", "", "")
            sha256 = document["provenance"]["model_sha256"] or ""
            yield _Entry(sha256, (one.ct.study_uid, one.dxa.id), scanner, at, _compared(one, document, scan))


def _compared(pair: Pair, document: Mapping[str, Any], scan: DxaScanRow) -> Compared | None:
    measured = {one.level: one.bmd_g_cm2 for one in scan.levels}
    vertebrae = tuple(
        Vertebra(level["bmd_g_cm2"], dxa, None if (told := level["bmd_interval"]) is None else (told[0], told[1]))
        for name in pair.levels
        if (level := document["levels"][name])["bmd_g_cm2"] is not None and (dxa := measured.get(name)) is not None
    )
    if not vertebrae:
        return None
    return Compared(vertebrae, Category(document["decision"]["category"]), scan.total_t_score)
