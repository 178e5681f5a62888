"""What pages and API do with models: one place that opens the transaction and names who asks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from fastapi import HTTPException, Request

from service.web.desk import Desk, by
from service.workflow import models
from service.workflow.packages import Library
from service.workflow.shadow import Agreement

NO_MODEL = "There is no such model."
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class ModelDesk:
    """The registry of models behind the desk."""

    desk: Desk

    @property
    def library(self) -> Library:
        """The packages on disk."""
        return Library.of(self.desk.settings)

    def registry(self, request: Request) -> models.Registry:
        """Every model; the view is audited."""
        with self.desk.store.transaction() as session:
            found = models.registry(session, self.desk.clock())
            self.desk.note(session, request, "models.view", "models", models=len(found.models))
        return found

    def show(self, request: Request, model_id: int) -> models.ModelLine:
        """One model, its view audited; 404 where there is none."""
        with self.desk.store.transaction() as session:
            models.enrol_shipped(session, self.desk.clock())
            found = _known(lambda: models.show(session, model_id))
            self.desk.note(session, request, "model.view", f"model:{model_id}", model=found.name)
        return found

    def promote(self, request: Request, model_id: int, reason: str, person: str | None) -> models.ModelLine:
        """Put a model in force. A refusal stands in the audit too, and is raised again."""
        desk, asked = self.desk, by(request, self.desk.clock)
        try:
            with desk.store.transaction() as session:
                models.enrol_shipped(session, asked.now)
                _known(lambda: models.show(session, model_id))
                return models.promote(
                    session, model_id, reason, asked, library=self.library, policy=desk.policy, person=person
                )
        except models.NotPromotable as shut:
            codes = [one.code.value for one in shut.reasons]
            with desk.store.transaction() as session:
                desk.note(session, request, "model.promote.refused", f"model:{model_id}", reason=reason, codes=codes)
            raise

    def agreement(self, model_id: int) -> Agreement:
        """How a model that is or was in shadow agrees with the one in force."""
        with self.desk.store.reading() as session:
            return models.agreement(session, model_id)

    def begin_shadow(self, request: Request, model_id: int) -> models.ModelLine:
        """Let a candidate see live studies."""
        asked = by(request, self.desk.clock)
        with self.desk.store.transaction() as session:
            return _known(lambda: models.begin_shadow(session, model_id, asked, library=self.library))

    def end_shadow(self, request: Request, model_id: int) -> models.ModelLine:
        """Let it see no more."""
        with self.desk.store.transaction() as session:
            return _known(lambda: models.end_shadow(session, model_id, by(request, self.desk.clock)))

    def rollback(self, request: Request, reason: str, person: str | None) -> models.ModelLine:
        """Bring back the model that was in force before."""
        with self.desk.store.transaction() as session:
            return models.rollback(session, reason, by(request, self.desk.clock), person=person)

    def export(self, request: Request, model_id: int) -> tuple[Path, str]:
        """A file of the package that the caller removes, and the name that it goes by."""
        descriptor, name = tempfile.mkstemp(suffix=".zip")
        path = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as out, self.desk.store.transaction() as session:
                asked = by(request, self.desk.clock)
                told = _known(lambda: models.export(session, model_id, out, asked, library=self.library))
        except BaseException:
            path.unlink()
            raise
        return path, told

    def receive(self, request: Request, file: IO[bytes]) -> models.ModelLine:
        """Take a package of another site."""
        kept = self.library.receive(file)
        with self.desk.store.transaction() as session:
            return models.enter_imported(session, kept, by(request, self.desk.clock))


def _known(read: Callable[[], Found]) -> Found:
    try:
        return read()
    except models.NoModel as missing:
        raise HTTPException(404, NO_MODEL) from missing
