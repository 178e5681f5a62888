"""A hospital's months in a few rows: measured CTs of several scanners and the DXA results that followed them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.domain.dxa import DxaScan, Figures, Level
from service.domain.eligibility import Verdict
from service.domain.policy import DEFAULT_POLICY
from service.domain.referral import PatientFacts, decide
from service.domain.result import (
    LEVELS,
    Anatomy,
    LevelAnatomy,
    LevelMeasurement,
    Measurements,
    Numbering,
    Provenance,
    ReferenceHu,
    result_document,
)
from service.domain.states import JobState, StudyState
from service.store.tables import InstanceRow, JobRow, ResultRow, SeriesRow, StudyRow
from service.workflow import dxa
from service.workflow.people import By
from tests.service.workflow.workbench import slices

BEGIN = datetime(2026, 1, 5, 9, 0, tzinfo=UTC)  # a Monday
A_DAY = 4  # CTs of one scanner
FIRST, SECOND = "a" * 64, "b" * 64
SIEMENS: Mapping[str, Any] = {"manufacturer": "SIEMENS", "model_name": "SOMATOM", "convolution_kernel": ("Br40d", "3")}
CANON: Mapping[str, Any] = {"manufacturer": "CANON", "model_name": "Aquilion", "convolution_kernel": ("FC18",)}


def ct(
    session: Session,
    number: int,
    *,
    scanner: Mapping[str, Any] = SIEMENS,
    bmd: float = 0.9,
    hu: float = 100.0,
    tissues: ReferenceHu | None = None,
    model: str = FIRST,
    synthetic: bool = False,
) -> StudyRow:
    """One measured CT, the `number`-th of its scanner; the network's density is `bmd` at every level."""
    uid = f"1.9.{len(scanner['manufacturer'])}.{int(synthetic)}.{number}"
    at = BEGIN + timedelta(days=number // A_DAY, minutes=5 * (number % A_DAY))
    facts = replace(slices(uid, f"{uid}.1", n=1)[0], synthetic=synthetic, patient_id=f"P{uid}", **scanner)
    study = StudyRow(
        study_uid=uid, patient_id=facts.patient_id, patient_sex="F", patient_age_years=63.0, synthetic=synthetic,
        study_date=f"{at:%Y%m%d}", state=StudyState.SCREENED.value, revision=1, first_received_at=at,
        last_received_at=at,
    )  # fmt: skip
    series = SeriesRow(
        study=study, series_uid=facts.series_uid, modality="CT", instance_count=1, chosen=True, eligible=True,
        reasons=[], cautions=[],
    )  # fmt: skip
    session.add_all([study, series])
    session.flush()
    job = JobRow(
        kind="screen", key=f"{uid} {model}"[:64], study_id=study.id, series_id=series.id, revision=1,
        state=JobState.DONE.value, created_at=at,
    )  # fmt: skip
    session.add(job)
    session.add(
        InstanceRow(
            series_id=series.id, sop_instance_uid=facts.sop_instance_uid, sha256=uid, path=uid, size_bytes=1,
            transfer_syntax_uid=facts.transfer_syntax_uid, facts=facts.as_json(), received_at=at,
        )
    )  # fmt: skip
    session.flush()
    document = _document(study, series, _measured(bmd, hu, tissues, model), synthetic)
    session.add(
        ResultRow(
            study_id=study.id, series_id=series.id, job_id=job.id, revision=1, attempt=1, document=document,
            category=document["decision"]["category"], created_at=at,
        )
    )  # fmt: skip
    session.flush()
    return study


def _measured(bmd: float, hu: float, tissues: ReferenceHu | None, model: str) -> Measurements:
    levels = {
        name: LevelMeasurement(name, True, bmd_g_cm2=bmd, bmd_interval=(bmd - 0.1, bmd + 0.1), tbs=1.3, hu_mean=hu)
        for name in LEVELS
    }
    anatomy = Anatomy(
        {name: LevelAnatomy(name, True) for name in LEVELS}, Numbering.CERTAIN, 5, contrast="native",
        reference_hu=tissues or ReferenceHu(),
    )  # fmt: skip
    made = Provenance("osteogate test", f"model-{model[0]}", model, "fake", "0" * 64, "cpu")
    return Measurements(levels, anatomy, made)


def _document(study: StudyRow, series: SeriesRow, measured: Measurements, synthetic: bool) -> dict[str, Any]:
    facts = PatientFacts(synthetic=synthetic, sex="F", age_years=63.0, manufacturer="SIEMENS")
    outcome = decide(measured, facts, Verdict(True, ()), DEFAULT_POLICY)
    return result_document(
        study_uid=study.study_uid, series_uid=series.series_uid, revision=1, eligible=outcome.eligible,
        verdict_reasons=outcome.verdict_reasons, measurements=measured, patient=outcome.patient,
        decision=outcome.decision,
    )  # fmt: skip


def dxa_of(
    session: Session, study: StudyRow, bmd: float, at: datetime, t_score: float | None = None, days: int = 7
) -> None:
    """The DXA result so many days after a CT (a week), stored `at`."""
    day = date.fromisoformat(study.study_date or "") + timedelta(days=days)
    levels = {name: Level(Figures(bmd_g_cm2=round(bmd, 3))) for name in LEVELS}
    scan = DxaScan(
        study.patient_id or "", day, "GE Lunar", "iDXA", levels, Figures(t_score=t_score), synthetic=study.synthetic
    )
    taken = dxa.accept(session, scan, By("test", at), window_days=365)
    assert taken.id is not None, taken.reasons


def months(session: Session, n: int, *, seed: int = 1, shift_from: int | None = None, **more: Any) -> list[StudyRow]:
    """`n` CTs of one scanner, whose tissues read 12 HU more from one study on."""
    dice = random.Random(seed)
    found = []
    for number in range(n):
        off = 12.0 if shift_from is not None and number >= shift_from else 0.0
        tissues = ReferenceHu(*(dice.gauss(mean, sd) + off for mean, sd in ((42, 6), (50, 7), (-88, 12))))
        found.append(ct(session, number, tissues=tissues, bmd=dice.gauss(0.95, 0.15), hu=dice.gauss(125, 30), **more))
    return found


def pairs(
    session: Session, studies: list[StudyRow], *, bias: float, at: datetime, days: int = 7, seed: int = 2
) -> None:
    """A DXA result for every one of these CTs; the network reads `bias` g/cm2 too high."""
    dice = random.Random(seed)
    for study in studies:
        result = session.scalars(select(ResultRow).where(ResultRow.study_id == study.id)).one()
        predicted = result.document["levels"]["L1"]["bmd_g_cm2"]
        true = max(0.3, predicted - bias + dice.gauss(0, 0.04))
        dxa_of(session, study, true, at, round((true - 1.05) / 0.11, 1), days)
