"""The registry of models: register, judge, promote, roll back, export; each use case is one transaction.

Nothing here promotes by itself. A person promotes, with a reason, what passed the gate; the gate is asked again at that
moment, with the policy in force and against the model in force, from the reports that were signed when it was judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from service.domain.errors import OsteogateError
from service.domain.policy import Policy
from service.domain.promotion import Verdict, judge
from service.domain.reasons import Code, Reason
from service.domain.training import TARGETS
from service.store.tables import ActiveModelRow, AuditRow, DxaScanRow, InstanceRow, ModelRow, SeriesRow, StudyRow
from service.store.upsert import insert_missing
from service.workflow import shadow
from service.workflow.model import IMPORTED, PROMOTE, ROLLBACK, SHIPPED, TRAINED, shipped_model
from service.workflow.packages import PACKAGE, Kept, Library, PackageRefused, patient_words
from service.workflow.people import By

ACTOR = "osteogate"
MAX_REASON = 1000
_CHUNK = 500


class ModelError(OsteogateError):
    """What cannot be done with a model; the message is for people."""


class NoModel(ModelError):
    """There is no such model."""


class NotPromotable(ModelError):
    """The gate is shut; `reasons` holds every why."""

    def __init__(self, reasons: Sequence[Reason]) -> None:
        super().__init__("the gate is shut: " + " ".join(reason.text for reason in reasons))
        self.reasons = tuple(reasons)


class NothingBefore(ModelError):
    """There is no model to roll back to."""


class ReasonMissing(ModelError):
    """A promotion or a rollback needs its reason."""


class PatientData(ModelError):
    """What would be exported names a patient."""


@dataclass(frozen=True, slots=True)
class ModelLine:
    """One model, for people and programs."""

    id: int
    name: str  # with its version
    sha256: str
    origin: str
    run_id: str | None
    synthetic_only: bool
    finished: bool
    provenance: Mapping[str, Any]
    verdict: Verdict | None
    judged_at: datetime | None
    shadow_since: datetime | None  # it sees live studies beside the one in force
    signature: str | None
    created_at: datetime
    created_by: str
    in_force: bool
    against: tuple[Reason, ...]  # why it could not be promoted now; nothing where it is in force

    @property
    def targets(self) -> tuple[str, ...]:
        """What it measures; one that was entered before there was a choice measures both."""
        return tuple(self.provenance.get("targets") or TARGETS)

    @property
    def promotable(self) -> bool:
        """A person could promote it now."""
        return not self.in_force and not self.against


@dataclass(frozen=True, slots=True)
class Move:
    """One move of the pointer."""

    number: int
    model_id: int
    name: str
    sha256: str
    action: str
    reason: str | None
    at: datetime
    by: str


@dataclass(frozen=True, slots=True)
class Registry:
    """What the page shows: the model in force, since when and by whom; every model; the pointer's history."""

    models: tuple[ModelLine, ...]  # the one in force first, then the newest
    history: tuple[Move, ...]  # the latest first
    rollback_to: ModelLine | None

    @property
    def in_force(self) -> ModelLine:
        """The model in force."""
        return next(model for model in self.models if model.in_force)


# --- what ships ------------------------------------------------------------------------------------------------------


def enrol_shipped(session: Session, now: datetime) -> None:
    """Write the model of this release into the registry, and the first pointer, where they are missing."""
    shipped = shipped_model()
    manifest = shipped.manifest
    row = {
        "name": manifest.name,
        "version": manifest.version,
        "sha256": shipped.sha256,
        "path": shipped.folder.name,
        "origin": SHIPPED,
        "run_id": None,
        "synthetic_only": manifest.synthetic_only,
        "finished": manifest.finished,
        "provenance": {"provenance": manifest.training.get("provenance"), "created": manifest.created},
        "hashes": {},
        "signature": None,
        "verdict": None,
        "judged_at": None,
        "shadow_since": None,
        "created_at": now,
        "created_by": ACTOR,
    }
    if session.scalar(select(ModelRow.id).where(ModelRow.sha256 == shipped.sha256)) is None:
        insert_missing(session, ModelRow, [row], ["sha256"])
    if _newest(session) is None:
        own = _shipped_row(session)
        first = {"number": 1, "model_id": own.id, "action": SHIPPED, "restores": None, "reason": None}
        insert_missing(session, ActiveModelRow, [{**first, "at": now, "by": ACTOR}], ["number"])


def _shipped_row(session: Session) -> ModelRow:
    return session.scalars(select(ModelRow).where(ModelRow.sha256 == shipped_model().sha256)).one()


# --- candidates ------------------------------------------------------------------------------------------------------


def register(session: Session, kept: Kept, by: By, *, policy: Policy, run_id: str | None = None) -> ModelLine:
    """Enter a package that this site trained (`Library.keep_run`), with its verdict; a second time changes nothing.

    Raises:
        PackageRefused: the candidate's report is about another package, or missing.
    """
    enrol_shipped(session, by.now)
    row = _enter(session, kept, TRAINED, by, run_id)
    _give_verdict(row, kept, policy, by.now)
    _audit(session, by, "model.register", row, run=run_id, passed=_passed(row), origin=TRAINED)
    return show(session, row.id)


def enter_imported(session: Session, kept: Kept, by: By) -> ModelLine:
    """Enter a package of another site (`Library.receive`): its figures are hearsay until this site has judged it."""
    enrol_shipped(session, by.now)
    row = _enter(session, kept, IMPORTED, by, None)
    told = {name: kept.provenance.get(name) for name in ("signature", "signed_by")}
    _audit(session, by, "model.import", row, origin=row.origin, **told)
    return show(session, row.id)


def judged(session: Session, kept: Kept, by: By, *, policy: Policy) -> ModelLine:
    """Give a model that is known its verdict from reports made here (`Library.keep` with both reports).

    Raises:
        NoModel: it is not known here.
        ModelError: it ships with the release.
        PackageRefused: the candidate's report is about another package, or missing.
    """
    enrol_shipped(session, by.now)
    row = session.scalars(select(ModelRow).where(ModelRow.sha256 == kept.sha256).with_for_update()).one_or_none()
    if row is None:
        raise NoModel("there is no such model")
    if row.origin == SHIPPED:
        raise ModelError("what ships with the release is never promoted: a rollback leads back to it")
    row.hashes, row.signature = dict(kept.hashes), kept.signature
    _give_verdict(row, kept, policy, by.now)
    _audit(session, by, "model.judge", row, passed=_passed(row))
    return show(session, row.id)


def _enter(session: Session, kept: Kept, origin: str, by: By, run_id: str | None) -> ModelRow:
    """The package's row, new or as it was, with what lies on disk now."""
    row = {
        "name": kept.name[:128],
        "version": kept.version[:64],
        "sha256": kept.sha256,
        "path": kept.path,
        "origin": origin,
        "run_id": run_id,
        "synthetic_only": kept.synthetic_only,
        "finished": kept.finished,
        "provenance": dict(kept.provenance),
        "hashes": dict(kept.hashes),
        "signature": kept.signature,
        "verdict": None,
        "judged_at": None,
        "shadow_since": None,
        "created_at": by.now,
        "created_by": by.actor,
    }
    insert_missing(session, ModelRow, [row], ["sha256"])
    found = session.scalars(select(ModelRow).where(ModelRow.sha256 == kept.sha256).with_for_update()).one()
    found.hashes, found.signature = dict(kept.hashes), kept.signature
    return found


def _give_verdict(row: ModelRow, kept: Kept, policy: Policy, now: datetime) -> None:
    row.verdict = _verdict(row, kept.reports, policy).as_dict()
    row.judged_at = now


def _verdict(row: ModelRow, reports: Mapping[str, Any], policy: Policy) -> Verdict:
    candidate, champion = reports.get("candidate"), reports.get("champion")
    if candidate is None:
        raise PackageRefused("there is no report on the candidate")
    if candidate.get("model_sha256") != row.sha256:
        raise PackageRefused("the candidate's report is about another package")
    return judge(
        candidate,
        champion,
        policy.gate,
        gate=policy.gate_label,
        finished=row.finished,
        definitions=policy.definitions,
    )


def _passed(row: ModelRow) -> bool:
    return row.verdict is not None and Verdict.from_dict(row.verdict).passed


# --- promotion -------------------------------------------------------------------------------------------------------


def promote(
    session: Session,
    model_id: int,
    reason: str,
    by: By,
    *,
    library: Library,
    policy: Policy,
    person: str | None = None,
) -> ModelLine:
    """Put a model in front of patients: pointer and audit row together, or neither.

    Args:
        person: who stands for it, where that is another than who asks (a program's key, a shell).

    Raises:
        NoModel, ReasonMissing: what the names say.
        NotPromotable: the gate is shut, now, under the policy in force and against the model in force.
        PackageRefused: the package or its reports are no longer what was judged.
        sqlalchemy.exc.IntegrityError: somebody else moved the pointer at this moment.
    """
    why = _reason(reason)
    enrol_shipped(session, by.now)
    pointer, champion = _in_force(session)
    row = _row(session, model_id, held=True)
    if row.id == champion.id:
        raise ModelError("this model is in force already")
    verdict = None
    if row.verdict is not None:
        library.load(row.path, row.hashes, row.signature)
        verdict = _verdict(row, library.reports(row.path), policy)
        row.verdict, row.judged_at = verdict.as_dict(), by.now
    against = _against(verdict, champion)
    if against:
        raise NotPromotable(against)
    row.shadow_since = None
    _move(session, pointer, row, PROMOTE, why, by)
    detail = {"from": _called(champion), "reason": why, "person": (person or by.actor)[:64]}
    _audit(session, by, "model.promote", row, gate=policy.gate_label, **detail)
    return show(session, row.id)


def rollback(session: Session, reason: str, by: By, *, person: str | None = None) -> ModelLine:
    """Bring the model back that was in force before; a second time goes one further back.

    Raises:
        NothingBefore: nothing was in force before.
        ReasonMissing: no reason.
        sqlalchemy.exc.IntegrityError: somebody else moved the pointer at this moment.
    """
    why = _reason(reason)
    enrol_shipped(session, by.now)
    pointer, now_in_force = _in_force(session)
    before = _before(session, pointer)
    if before is None:
        raise NothingBefore("no other model was in force before this one")
    _move(session, pointer, before.model, ROLLBACK, why, by, restores=before.number)
    detail = {"from": _called(now_in_force), "reason": why, "person": (person or by.actor)[:64]}
    _audit(session, by, "model.rollback", before.model, **detail)
    return show(session, before.model_id)


def begin_shadow(session: Session, model_id: int, by: By, *, library: Library) -> ModelLine:
    """Let a candidate see live studies beside the model in force, in place of any other; it needs no verdict for that.

    Raises:
        NoModel: there is none.
        ModelError: it is in force, or ships.
        PackageRefused: the package is no longer what was entered.
    """
    enrol_shipped(session, by.now)
    row = _row(session, model_id, held=True)
    if row.id == _in_force(session)[1].id or row.origin == SHIPPED:
        raise ModelError("only a candidate can be in shadow")
    library.load(row.path, row.hashes, row.signature)
    shadow.only(session, row, by.now)
    _audit(session, by, "model.shadow.begin", row)
    return show(session, row.id)


def end_shadow(session: Session, model_id: int, by: By) -> ModelLine:
    """Let a candidate see no more studies; what it said of those that it saw is kept.

    Raises:
        NoModel: there is none.
        ModelError: it is not in shadow.
    """
    enrol_shipped(session, by.now)
    row = _row(session, model_id, held=True)
    if row.shadow_since is None:
        raise ModelError("this model is not in shadow")
    shadow.only(session, None, by.now)
    _audit(session, by, "model.shadow.end", row)
    return show(session, row.id)


def agreement(session: Session, model_id: int) -> shadow.Agreement:
    """How a model that is or was in shadow agrees with the one in force now.

    Raises:
        NoModel: there is none.
    """
    return shadow.agreement(session, _row(session, model_id), _in_force(session)[1].sha256)


def _against(verdict: Verdict | None, champion: ModelRow) -> tuple[Reason, ...]:
    """Every reason against a promotion in the champion's place."""
    if verdict is None:
        text = "This model has not been evaluated at this site beside the model in force."
        return (Reason(Code.GATE_NOT_JUDGED, text),)
    reasons = verdict.reasons
    if verdict.champion_sha256 != champion.sha256:
        text = f"It was held against another model than the one in force ({_called(champion)}): evaluate both anew."
        reasons = (*reasons, Reason(Code.GATE_OTHER_CHAMPION, text))
    return reasons


def _move(
    session: Session,
    pointer: ActiveModelRow,
    row: ModelRow,
    action: str,
    reason: str,
    by: By,
    restores: int | None = None,
) -> None:
    session.add(
        ActiveModelRow(
            number=pointer.number + 1,
            model_id=row.id,
            action=action,
            restores=restores,
            reason=reason,
            at=by.now,
            by=by.actor,
        )
    )
    session.flush()  # the number is unique: whoever is second learns it here


def _before(session: Session, pointer: ActiveModelRow) -> ActiveModelRow | None:
    """The move whose model a rollback brings back: the last one before the one in force that was of another model."""
    stands_for = pointer.restores or pointer.number
    earlier = select(ActiveModelRow).where(ActiveModelRow.number < stands_for)
    for move in session.scalars(earlier.order_by(ActiveModelRow.number.desc())):
        if move.model_id != pointer.model_id:
            return _origin(session, move)
    return None


def _origin(session: Session, move: ActiveModelRow) -> ActiveModelRow:
    """The move that first brought a restored model: what stands before it is what was in force before it."""
    while move.restores is not None:
        move = session.scalars(select(ActiveModelRow).where(ActiveModelRow.number == move.restores)).one()
    return move


# --- export ----------------------------------------------------------------------------------------------------------


def export(session: Session, model_id: int, out: IO[bytes], by: By, *, library: Library) -> str:
    """Write a model's package for another site; its name. The audit row says who took it out.

    Raises:
        NoModel: there is none.
        PackageRefused: it ships with every release, or was altered.
        PatientData: a file of it names a patient of this site.
    """
    row = _row(session, model_id)
    if row.signature is None:
        raise PackageRefused("this model ships with every release: there is nothing to export")
    _refuse_patient_data(session, library.texts(row.path, row.hashes))
    library.export(row.path, row.hashes, row.signature, out)
    _audit(session, by, "model.export", row)
    return f"{_called(row)}-{row.sha256[:12]}.osteogate.zip"


_IDENTIFIERS = (
    StudyRow.patient_id,
    StudyRow.patient_name,
    StudyRow.study_uid,
    StudyRow.accession_number,
    SeriesRow.series_uid,
    InstanceRow.sop_instance_uid,
    DxaScanRow.patient_id,
)


def _refuse_patient_data(session: Session, texts: Mapping[str, str]) -> None:
    """Nothing that a patient or a study is called by may leave, whatever wrote it into a report."""
    words = patient_words(texts)
    for some in _chunks(sorted(words)):
        for column in _IDENTIFIERS:
            found = session.scalar(select(column).where(column.in_(some)).limit(1))
            if found is not None:
                where, what = ", ".join(sorted(words[found])), column.key.replace("_", " ")
                raise PatientData(f"{where} holds the {what} of a patient: nothing was exported")


def _chunks(words: Sequence[str]) -> Iterable[Sequence[str]]:
    return (words[start : start + _CHUNK] for start in range(0, len(words), _CHUNK))


# --- reading ---------------------------------------------------------------------------------------------------------


def registry(session: Session, now: datetime) -> Registry:
    """Everything about models, for people."""
    enrol_shipped(session, now)
    pointer, champion = _in_force(session)
    rows = session.scalars(select(ModelRow).order_by(ModelRow.id.desc())).all()
    lines = sorted((_line(row, champion) for row in rows), key=lambda line: not line.in_force)
    moves = session.scalars(select(ActiveModelRow).order_by(ActiveModelRow.number.desc()))
    before = _before(session, pointer)
    return Registry(
        models=tuple(lines),
        history=tuple(_told(move) for move in moves),
        rollback_to=None if before is None else _line(before.model, champion),
    )


def show(session: Session, model_id: int) -> ModelLine:
    """One model.

    Raises:
        NoModel: there is none.
    """
    return _line(_row(session, model_id), _in_force(session)[1])


def made_by(session: Session, package_sha256: str | None) -> ModelLine | None:
    """The model that a training run entered here; None before its end."""
    row = session.scalar(select(ModelRow).where(ModelRow.sha256 == package_sha256))
    return _line(row, _in_force(session)[1]) if row is not None else None


def find(session: Session, told: str) -> int:
    """The id of the model that a person means: its id, its name with version, or the beginning of its hash.

    Raises:
        NoModel: there is none, or more than one.
    """
    if told == "active":
        return _in_force(session)[1].id
    known = or_(
        ModelRow.sha256.startswith(told if len(told) >= 6 else " ", autoescape=True),
        (ModelRow.name + "-" + ModelRow.version) == told,
        ModelRow.id == (int(told) if told.isascii() and told.isdigit() and len(told) < 10 else 0),
    )
    found = session.scalars(select(ModelRow.id).where(known)).all()
    if len(found) != 1:
        raise NoModel(f"no model package {told!r}" if not found else f"{len(found)} models are called {told!r}")
    return found[0]


def folder(session: Session, model_id: int, library: Library) -> Path:
    """Where a model's package lies.

    Raises:
        NoModel: there is none, or it shipped with another release.
    """
    row, shipped = _row(session, model_id), shipped_model()
    if row.origin != SHIPPED:
        return library.root / row.path / PACKAGE
    if row.sha256 != shipped.sha256:
        raise NoModel(f"{_called(row)} shipped with another release")
    return shipped.folder


def _line(row: ModelRow, champion: ModelRow) -> ModelLine:
    verdict = None if row.verdict is None else Verdict.from_dict(row.verdict)
    in_force = row.id == champion.id
    return ModelLine(
        id=row.id,
        name=_called(row),
        sha256=row.sha256,
        origin=row.origin,
        run_id=row.run_id,
        synthetic_only=row.synthetic_only,
        finished=row.finished,
        provenance=row.provenance,
        verdict=verdict,
        judged_at=row.judged_at,
        shadow_since=row.shadow_since,
        signature=row.signature,
        created_at=row.created_at,
        created_by=row.created_by,
        in_force=in_force,
        against=() if in_force else _against(verdict, champion),
    )


def _told(move: ActiveModelRow) -> Move:
    model = move.model
    return Move(move.number, model.id, _called(model), model.sha256, move.action, move.reason, move.at, move.by)


def _called(row: ModelRow) -> str:
    return f"{row.name}-{row.version}"


def _row(session: Session, model_id: int, *, held: bool = False) -> ModelRow:
    found = session.get(ModelRow, model_id, with_for_update=held)
    if found is None:
        raise NoModel("there is no such model")
    return found


def _newest(session: Session) -> ActiveModelRow | None:
    return session.scalars(select(ActiveModelRow).order_by(ActiveModelRow.number.desc()).limit(1)).one_or_none()


def _in_force(session: Session) -> tuple[ActiveModelRow, ModelRow]:
    """The pointer, and the model that it puts in force: a shipped one is that of this release."""
    pointer = _newest(session)
    if pointer is None:
        raise NoModel("no model is in the registry yet")
    return pointer, _shipped_row(session) if pointer.model.origin == SHIPPED else pointer.model


def _reason(told: str) -> str:
    reason = told.strip()
    if not reason or len(reason) > MAX_REASON:
        raise ReasonMissing(f"say why, in at most {MAX_REASON} characters")
    return reason


def _audit(session: Session, by: By, action: str, row: ModelRow, **detail: Any) -> None:
    session.add(
        AuditRow(
            at=by.now,
            actor=by.actor,
            action=action,
            subject=f"model:{row.id}",
            detail={"model": _called(row), "sha256": row.sha256, **detail},
            peer_address=by.peer_address,
        )
    )
