"""Which model is in force: what a job's key names, what the worker loads, what may decide.

The pointer is the newest row of `active_model`; before there is one, and whenever it points to a shipped model, the one
that ships with this release is in force. This service reads manifests, never weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import exists, inspect, select
from sqlalchemy.orm import Session

import models.package
from service.domain.promotion import Verdict
from service.settings import Settings
from service.store.engine import Store, make_engine
from service.store.tables import ActiveModelRow, ModelRow
from service.workflow.rules import policy_in_force

PACKAGES = Path(models.package.__file__).parent / "packages"
REFERENCE = "reference-0.5.0"  # what is in force where nothing else was promoted
SHIPPED, TRAINED, IMPORTED = "shipped", "trained", "imported"
PROMOTE, ROLLBACK = "promote", "rollback"


@dataclass(frozen=True, slots=True)
class InForce:
    """One model as the worker takes it: where it lies, what it must hash to, and whether it may decide."""

    name: str  # with its version
    sha256: str  # of its manifest
    folder: Path
    gate_passed: bool  # promoted here, after it passed this site's gate on people
    judged_on: tuple[str, ...] | None = None  # the scanners that its verdict holds on; None: told apart nowhere


@dataclass(frozen=True, slots=True)
class Shipped:
    """The model that ships with this release, from its manifest."""

    manifest: models.package.Manifest
    sha256: str
    folder: Path


def shipped_model(packages: Path = PACKAGES, name: str = REFERENCE) -> Shipped:
    """The reference package; its weights are verified by whoever loads them."""
    raw = (packages / name / models.package.MANIFEST).read_bytes()
    manifest = models.package.Manifest.from_json(raw.decode("utf-8"))
    return Shipped(manifest, hashlib.sha256(raw).hexdigest(), packages / name)


def shipped_model_key(packages: Path = PACKAGES) -> str:
    """SHA-256 over the shipped packages' manifests, which hold the hashes of their weights.

    A release with another model makes new job keys; the same study resent to the same release makes none.
    """
    digest = hashlib.sha256()
    for manifest in sorted(packages.glob(f"*/{models.package.MANIFEST}")):
        digest.update(manifest.read_bytes())
    return digest.hexdigest()


def model_key(session: Session) -> str:
    """What names the model in force in a job's key: another model makes new work of the same images."""
    row = pointed_at(session)
    return shipped_model_key() if row is None or row.origin == SHIPPED else row.sha256


def in_force(session: Session, models_dir: Path, *, gate: str | None = None) -> InForce:
    """The model in force as this transaction sees it; `gate` as in `gate_passed`."""
    row = pointed_at(session)
    if row is None or row.origin == SHIPPED:
        return shipped_in_force()
    folder = models_dir / row.path / "package"
    passed = gate_passed(session, row.sha256, gate=gate)
    judged_on = Verdict.from_dict(row.verdict).scanners if passed and row.verdict is not None else None
    return InForce(f"{row.name}-{row.version}", row.sha256, folder, passed, judged_on)


def in_shadow(session: Session, models_dir: Path) -> InForce | None:
    """The model that sees live studies beside the one in force, and decides nothing; None: there is none."""
    shadows = select(ModelRow).where(ModelRow.shadow_since.is_not(None)).order_by(ModelRow.shadow_since.desc())
    row = session.scalars(shadows.limit(1)).one_or_none()
    if row is None:
        return None
    return InForce(f"{row.name}-{row.version}", row.sha256, models_dir / row.path / "package", gate_passed=False)


def in_force_here(settings: Settings) -> InForce:
    """The model in force at an installation, whether its database has been made or not."""
    if not has_registry(settings):
        return shipped_in_force()
    store = Store(make_engine(settings.sqlalchemy_url))
    try:
        with store.reading() as session:
            return in_force(session, settings.models_dir, gate=policy_in_force(settings).gate_label)
    finally:
        store.close()


def has_registry(settings: Settings) -> bool:
    """Whether the installation has a database with a registry of models; none is made for the question."""
    if not settings.database_url and not Path(settings.sqlalchemy_url.removeprefix("sqlite:///")).exists():
        return False
    engine = make_engine(settings.sqlalchemy_url)
    try:
        return inspect(engine).has_table(ActiveModelRow.__tablename__)
    finally:
        engine.dispose()


def shipped_in_force() -> InForce:
    """What is in force where nothing else was promoted."""
    shipped = shipped_model()
    manifest = shipped.manifest
    return InForce(f"{manifest.name}-{manifest.version}", shipped.sha256, shipped.folder, gate_passed=False)


def gate_passed(session: Session, sha256: str | None, *, gate: str | None = None, scanner: str | None = None) -> bool:
    """Whether this model passed this site's gate and a person promoted it, and it knows people's bones.

    A model that drives referrals needs all of it; one whose verdict was overturned since loses it. So does one that
    another gate than `gate` (`Policy.gate_label`) judged: under other limits, criteria or young adults it has to be
    judged again. A verdict says nothing of a `scanner` (`models.package.scanner_name`) that it was not given on.
    """
    row = session.scalars(select(ModelRow).where(ModelRow.sha256 == (sha256 or ""))).one_or_none()
    if row is None or row.synthetic_only or row.verdict is None:
        return False
    verdict = Verdict.from_dict(row.verdict)
    if not verdict.passed or gate not in (None, verdict.gate) or not (scanner is None or verdict.holds_on(scanner)):
        return False
    promoted = exists().where(ActiveModelRow.model_id == row.id, ActiveModelRow.action == PROMOTE)
    return bool(session.scalar(select(promoted)))


def pointed_at(session: Session) -> ModelRow | None:
    """The row that the pointer names; None before there is a pointer."""
    newest = select(ModelRow).join(ActiveModelRow, ActiveModelRow.model_id == ModelRow.id)
    return session.scalars(newest.order_by(ActiveModelRow.number.desc()).limit(1)).one_or_none()
