"""A hospital with pairs of CT and DXA: digital patients (or, as told, people) as rows, without a single image."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.domain.dxa import DxaScan, Figures, Level, Validity
from service.domain.policy import DEFAULT_POLICY, Policy, TrainingPolicy
from service.domain.training import People, Wanted
from service.store.engine import Store
from service.store.tables import InstanceRow, ResultRow, SeriesRow, StudyRow
from service.workflow import dxa, training
from service.workflow.people import By
from service.workflow.training import Created, Room, Shelf
from tests.service.web import seed
from tests.service.workflow import workbench

NOW = datetime(2026, 11, 28, 6, 0, tzinfo=UTC)
BY = By("lena", NOW, "10.0.0.7")
SMALL = replace(DEFAULT_POLICY, training=TrainingPolicy(patients_minimum=10, locked_minimum=2))
PATIENTS = 14  # of whom two or three judge
ROOM = Room(free_bytes=2, needed_bytes=1)
QUICK = {"architecture": "resnet18", "epochs": 2, "batch": 8, "ema_decay": 0.0}
ASKED = Wanted("the first pairs of the year", "osteogate", settings=QUICK, people=People.DIGITAL)


def fill(store: Store, patients: int = PATIENTS, *, first: int = 1, synthetic: bool = True, **dxa_changes: Any) -> None:
    """So many patients, each with a measured CT and a DXA result ten days later."""
    with store.transaction() as session:
        for number in range(first, first + patients):
            pair(session, number, synthetic=synthetic, **dxa_changes)


def measured(session: Session, number: int, bmd: float, *, synthetic: bool = True) -> StudyRow:
    """A patient's CT with its result."""
    uid = f"1.2.826.{number}"
    study = seed.screened(
        session, uid, f"Phantom^N{number}", "FM"[number % 2], 50 + number, bmd=bmd, tbs=1.3, hu=120, minutes=number,
        synthetic=synthetic, results=None,
    )  # fmt: skip
    result = session.scalars(select(ResultRow).where(ResultRow.study_id == study.id)).one()
    result.artefacts = f"{number}-1"
    series = session.get_one(SeriesRow, result.series_id)
    facts = replace(workbench.slices(uid, series.series_uid, n=1)[0], model_name="Force", convolution_kernel=("Br40",))
    session.add(
        InstanceRow(
            series_id=series.id,
            sop_instance_uid=f"{uid}.9",
            sha256="0" * 64,
            path=f"00/{number}.dcm",
            size_bytes=1,
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            facts=facts.as_json(),
            received_at=NOW,
        )
    )
    return study


def pair(session: Session, number: int, *, synthetic: bool = True, tbs: float | None = 1.3, **changes: Any) -> str:
    """One patient's CT and DXA; the study's UID."""
    bmd = round(0.7 + 0.6 * (number * 7 % 20) / 20, 3)
    study = measured(session, number, bmd, synthetic=synthetic)
    levels = {
        name: Level(Figures(bmd_g_cm2=round(bmd + 0.01 * place, 3), tbs=tbs))
        for place, name in enumerate(("L1", "L2", "L3", "L4"))
    }
    levels["L4"] = replace(levels["L4"], validity=Validity.IMPLANT)  # left out on the side of the DXA
    told: dict[str, Any] = {"patient_id": study.patient_id, "scan_date": date(2026, 12, 3), **changes}
    scan = DxaScan(manufacturer="GE Lunar", model="Prodigy", levels=levels, synthetic=synthetic, **told)
    later = By("lena", datetime(2026, 12, 24, tzinfo=UTC))
    assert dxa.accept(session, scan, later, window_days=365).id is not None
    return study.study_uid


def ask(
    store: Store, wanted: Wanted = ASKED, *, policy: Policy = SMALL, room: Room = ROOM, shelf: Shelf | None = None
) -> Created:
    """Ask for a run."""
    with store.transaction() as session:
        return training.create(
            session, wanted, BY, policy=policy, shelf=training.shelf() if shelf is None else shelf, room=room
        )
