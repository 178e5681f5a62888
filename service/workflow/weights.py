"""The audit of segmentation weights: who brought which, when (this service handles no weights itself)."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy.orm import Session

from service.store.tables import AuditRow
from service.workflow.people import By


def record_import(session: Session, task: str, sha256: str, archives: Mapping[str, str], by: By, person: str) -> None:
    """Weights were imported; workers use them from their next start. `person` answers for where they come from."""
    session.add(
        AuditRow(
            at=by.now,
            actor=by.actor,
            action="weights.import",
            subject=f"weights:{task}",
            detail={"person": person, "sha256": sha256, "archives": dict(archives)},
            peer_address=by.peer_address,
        )
    )
