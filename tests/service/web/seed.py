"""A small hospital day in a database: every decision, every state, and names that try to do harm."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.domain.eligibility import Verdict
from service.domain.policy import DEFAULT_POLICY
from service.domain.reasons import Code, Reason
from service.domain.referral import PatientFacts, decide
from service.domain.result import (
    LEVELS,
    Anatomy,
    Heights,
    LevelAnatomy,
    LevelMeasurement,
    Measurements,
    Numbering,
    Provenance,
    result_document,
)
from service.domain.states import DeliveryState, JobState, ReferralState, ReportState, StudyState
from service.store.tables import (
    ConflictRow,
    DeliveryRow,
    InstanceRow,
    JobRow,
    ReferralRow,
    RefusalRow,
    ReportRow,
    ResultRow,
    SeriesRow,
    StudyRow,
)

NOW = datetime(2026, 11, 23, 9, 30, tzinfo=UTC)
PREFIX = "2.25.10"
SCRIPT = "<script>alert(1)</script>^<b>Bold</b>"
FORMULA = "=cmd|' /C calc'!A0"
JAPANESE = "Yamada^Hanako=山田^花子=やまだ^はなこ"
REFER, NO_FLAG, BETWEEN, SHORT_VIEW, NOT_SCREENED, RECEIVING, QUEUED, QUARANTINED, REAL, LATE = (
    f"{PREFIX}.{number}" for number in range(1, 11)
)
XSS, SHEET = f"{PREFIX}.11", f"{PREFIX}.12"
PASSWORD = "correct-horse"
DESTINATIONS = (
    "pacs=dicom://HOSPITAL_PACS@10.0.0.5:104,"
    f"archive=https://osteogate:{PASSWORD}@archive.example:8443/dicom-web?token={PASSWORD},"
    "research=dicom://RESEARCH@10.0.0.9:11112"  # configured after everything was made
)
REMOVED = "old-pacs"  # still has an object waiting for it
DOWN = "no association with HOSPITAL_PACS at 10.0.0.5:104: connection refused"
HOSTILE_ANSWER = "0xC000 <script>alert(2)</script> \x1b[31mred\x07 \u202eesrever\x9b"
REPORT_BYTES = b"\0" * 128 + b"DICM a report of the tests"


def fill(session: Session, results_dir: Path) -> None:
    """Twelve studies and what was turned away."""
    screened(session, REFER, JAPANESE, "F", 74, bmd=0.71, tbs=1.19, hu=74, minutes=3, results=results_dir)
    screened(session, NO_FLAG, "Phantom^Otto", "M", 52, bmd=1.16, tbs=1.38, hu=182, minutes=9)
    screened(session, BETWEEN, "Phantom^Berta", "F", 66, bmd=1.0, tbs=1.29, hu=128, minutes=14)
    screened(session, SHORT_VIEW, "Phantom^Karl", "M", 70, bmd=0.9, tbs=1.3, hu=120, minutes=25, out_of_view="L1")
    screened(session, REAL, "Svensson^Astrid", "F", 68, bmd=0.83, tbs=1.25, hu=98, minutes=41, synthetic=False)
    session.add(_referral(session, REAL, ReferralState.REVIEWED))
    screened(session, XSS, SCRIPT, "M", 61, bmd=1.05, tbs=1.33, hu=171, minutes=52, synthetic=False)
    screened(session, SHEET, FORMULA, "F", 77, bmd=0.66, tbs=1.15, hu=61, minutes=75, excluded="L2")
    session.add(_referral(session, SHEET, ReferralState.OPEN))
    session.add(_referral(session, REFER, ReferralState.OPEN))
    late = screened(session, LATE, "Phantom^Dora", "F", 71, bmd=0.74, tbs=1.2, hu=88, minutes=2)
    late.state = StudyState.RECEIVING.value
    session.add(_referral(session, LATE, ReferralState.ORDERED))
    not_screened(session)
    under_way(session)
    turned_away(session)
    sent_home(session, results_dir)
    session.flush()


def study_row(uid: str, name: str, sex: str | None, age: float | None, **more: Any) -> StudyRow:
    minutes = more.pop("minutes", 30)
    arrived = NOW - timedelta(minutes=minutes)
    defaults: dict[str, Any] = {
        "study_uid": uid,
        "patient_id": f"P{uid.rpartition('.')[2].zfill(5)}",
        "patient_name": name,
        "patient_sex": sex,
        "patient_age_years": age,
        "study_date": "20261123",
        "description": "CT abdomen native",
        "accession_number": f"A{uid.rpartition('.')[2]}",
        "synthetic": True,
        "state": StudyState.SCREENED.value,
        "revision": 1,
        "policy": DEFAULT_POLICY.label,
        "calling_ae": "CT_ROOM_2",
        "first_received_at": arrived - timedelta(seconds=40),
        "last_received_at": arrived,
        "closed_at": arrived + timedelta(seconds=30),
    }
    return StudyRow(**{**defaults, **more})


def series_row(study: StudyRow, number: int, description: str, **more: Any) -> SeriesRow:
    defaults: dict[str, Any] = {
        "series_uid": f"{study.study_uid}.{number}",
        "modality": "CT",
        "description": description,
        "number": number,
        "instance_count": 104,
        "eligible": True,
        "reasons": [],
        "cautions": [],
        "chosen": False,
    }
    row = SeriesRow(**{**defaults, **more})
    study.series.append(row)
    return row


def screened(
    session: Session,
    uid: str,
    name: str,
    sex: str,
    age: float,
    *,
    bmd: float,
    tbs: float,
    hu: float,
    minutes: int,
    synthetic: bool = True,
    out_of_view: str | None = None,
    excluded: str | None = None,
    results: Path | None = None,
) -> StudyRow:
    study = study_row(uid, name, sex, age, minutes=minutes, synthetic=synthetic)
    study.choice = "Series 2 was chosen: thinnest slices among the eligible ones."
    thick = Reason(Code.SLICES_THICK, "Slices of 2.5 mm; 1.0 mm or thinner is best.")
    refused = Reason(Code.KERNEL_NOT_ALLOWED, "Kernel FC52 is not on the list for Canon.")
    chosen = series_row(study, 2, "Abdomen 2.5 FC03", chosen=True, cautions=[thick.as_dict()])
    series_row(study, 3, "Lung 1.0 FC52", eligible=False, reasons=[refused.as_dict()], instance_count=260)
    session.add(study)
    session.flush()
    job = _job(study, chosen, JobState.DONE, attempts=1)
    session.add(job)
    session.flush()
    measured = measurements(bmd, tbs, hu, out_of_view=out_of_view, excluded=excluded)
    facts = PatientFacts(synthetic=synthetic, sex=sex, age_years=age, manufacturer="CANON")
    document = _document(study, chosen, measured, facts, Verdict(True, (), (thick,)))
    folder = pictures(results, uid) if results is not None else None
    session.add(
        ResultRow(
            study_id=study.id,
            series_id=chosen.id,
            job_id=job.id,
            revision=1,
            attempt=1,
            document=document,
            artefacts=folder,
            category=document["decision"]["category"],
            bmd_g_cm2=document["patient"]["bmd_g_cm2"],
            tbs=document["patient"]["tbs"],
            hu_mean=document["patient"]["hu_mean"],
            created_at=NOW - timedelta(minutes=minutes - 1),
        )
    )
    session.flush()
    return study


def _document(
    study: StudyRow, series: SeriesRow, measured: Measurements, facts: PatientFacts, verdict: Verdict
) -> dict[str, Any]:
    outcome = decide(measured, facts, verdict, DEFAULT_POLICY)
    return result_document(
        study_uid=study.study_uid,
        series_uid=series.series_uid,
        revision=1,
        eligible=outcome.eligible,
        verdict_reasons=outcome.verdict_reasons,
        measurements=measured,
        patient=outcome.patient,
        decision=outcome.decision,
    )


def measurements(bmd: float, tbs: float, hu: float, *, out_of_view: str | None, excluded: str | None) -> Measurements:
    fracture = (Reason(Code.FRACTURE, "Anterior height is 31 % below the posterior one."),)
    levels: dict[str, LevelMeasurement] = {}
    for place, name in enumerate(LEVELS):
        if name == out_of_view:
            gone = (Reason(Code.LEVEL_OUT_OF_VIEW, f"{name} is not wholly in the field of view."),)
            levels[name] = LevelMeasurement(name, in_view=False, exclusions=gone)
            continue
        value, structure, density = bmd + 0.02 * place - 0.03, tbs + 0.01 * place, hu - 3 * place + 4
        levels[name] = LevelMeasurement(
            level=name,
            in_view=True,
            exclusions=fracture if name == excluded else (),
            bmd_g_cm2=round(value, 3),
            bmd_interval=(round(value - 0.09, 3), round(value + 0.09, 3)),
            tbs=round(structure, 3),
            tbs_interval=(round(structure - 0.1, 3), round(structure + 0.1, 3)),
            hu_mean=density,
            hu_roi_mm2=121.0,
            hu_shift_range=(density - 7, density + 5),
            heights=Heights(24.1 + place, 23.2 + place, 25.3 + place),
        )
    anatomy = Anatomy(
        levels={name: LevelAnatomy(name, level.in_view, level.exclusions) for name, level in levels.items()},
        numbering=Numbering.CERTAIN,
        lumbar_count=5,
        cobb_deg=4.0,
        contrast="native",
        notes=("Counted from the sacrum and from the last rib: both agree.",),
    )
    made = Provenance("osteogate 0.1.0", "resnet50-digital-1", "3f" * 32, "builtin", "a9" * 32, "cpu")
    return Measurements(
        levels=levels,
        anatomy=anatomy,
        provenance=made,
        patient_bmd_interval=(round(bmd - 0.06, 3), round(bmd + 0.06, 3)),
        patient_tbs_interval=(round(tbs - 0.07, 3), round(tbs + 0.07, 3)),
        timings_s={"read": 1.2, "segment": 14.8, "crop": 0.6, "predict": 0.5},
    )


def not_screened(session: Session) -> None:
    study = study_row(NOT_SCREENED, "Phantom^Vera", "F", 58, state=StudyState.NOT_SCREENED.value, minutes=33)
    study.choice = "No series of this study can be screened."
    contrast = Reason(Code.CONTRAST_TAGGED, "Contrast medium is named in the tags (ContrastBolusAgent).")
    scout = Reason(Code.LOCALIZER, "A localizer, not a volume.")
    short = Reason(Code.COVERAGE_TOO_SHORT, "One slice covers 0 mm; 120 mm are needed.")
    series_row(study, 1, "Topogram", eligible=False, instance_count=1, reasons=_stored(scout, short))
    series_row(study, 2, "Portal venous 2.5", eligible=False, reasons=_stored(contrast))
    session.add(study)


def under_way(session: Session) -> None:
    receiving = study_row(RECEIVING, "Phantom^Emil", "M", 63, state=StudyState.RECEIVING.value, minutes=0, revision=0)
    series_row(receiving, 1, "Abdomen 2.5", eligible=None, instance_count=37)
    queued = study_row(QUEUED, "Phantom^Frida", "F", 80, state=StudyState.QUEUED.value, minutes=4)
    running = series_row(queued, 1, "Abdomen 1.0", chosen=True)
    broken = study_row(QUARANTINED, "Phantom^Gustav", None, None, state=StudyState.QUARANTINED.value, minutes=120)
    bad = series_row(broken, 1, "Abdomen 1.0", chosen=True)
    session.add_all([receiving, queued, broken])
    session.flush()
    session.add(_job(queued, running, JobState.RUNNING, attempts=2))
    lost = _job(broken, bad, JobState.QUARANTINED, attempts=3)
    lost.last_error = "worker lost its lease: no heartbeat for 60 s"
    session.add(lost)


def turned_away(session: Session) -> None:
    refused = [
        ("association", "AE_NOT_ALLOWED", "Calling AE title UNKNOWN_PACS is not on the list.", None, None),
        ("instance", "UID_MISMATCH", f"Dataset of {REFER} names another SOP instance.", "1.2.3", 0xA900),
    ]
    for kind, code, text, sop_class, status in refused:
        session.add(
            RefusalRow(
                at=NOW - timedelta(minutes=50),
                kind=kind,
                code=code,
                text=text,
                calling_ae="UNKNOWN_PACS",
                peer_address="10.2.3.4",
                sop_class_uid=sop_class,
                status=status,
            )
        )
    session.add(
        ConflictRow(
            sop_instance_uid=f"{REFER}.2.17",
            study_uid=REFER,
            sha256="c" * 64,
            path="conflicts/c",
            calling_ae="CT_ROOM_2",
            received_at=NOW - timedelta(minutes=2),
        )
    )


def sent_home(session: Session, results_dir: Path) -> None:
    """Where the results went: pacs is down since 09:22, archive takes everything, research was added later.

    One object cannot be made, one is still to be made, and one answer of a destination is hostile.
    """
    folder = results_dir / "objects"
    folder.mkdir(parents=True)
    supersede(session, REAL)
    for result in session.scalars(select(ResultRow).order_by(ResultRow.id)).all():
        uid = result.study.study_uid
        if uid == SHORT_VIEW:
            _report(result, "SR", ReportState.FAILED, attempts=5, last_error="the slices' headers are gone: 104 of 104")
        elif uid == SHEET:
            _report(result, "SR", ReportState.WAITING)
        else:
            for kind in ("SEG", "SR"):
                _delivered_or_not(_report(result, kind, ReportState.MADE, folder=folder))
    session.flush()


def _delivered_or_not(report: ReportRow) -> None:
    study, made = report.result.study.study_uid, report.created_at
    _delivery(report, "archive", DeliveryState.DELIVERED, created_at=made)
    if made < NOW - timedelta(minutes=9):
        _delivery(report, "pacs", DeliveryState.DELIVERED, created_at=made)
    elif study == LATE:
        _delivery(report, "pacs", DeliveryState.SENDING, created_at=made, attempts=1)
    else:
        _delivery(report, "pacs", DeliveryState.WAITING, created_at=made, attempts=5, last_error=DOWN)
    if study == XSS:
        _delivery(report, REMOVED, DeliveryState.WAITING, created_at=made, attempts=3, last_error=HOSTILE_ANSWER)


def _report(result: ResultRow, kind: str, state: ReportState, *, folder: Path | None = None, **more: Any) -> ReportRow:
    row = ReportRow(
        kind=kind, state=state.value, due_at=result.created_at, created_at=result.created_at, **{"attempts": 0, **more}
    )
    result.reports.append(row)
    if folder is not None:
        name = f"{result.id}-{kind}.dcm"
        (folder / name).write_bytes(REPORT_BYTES)
        row.path, row.attempts, row.made_at = f"objects/{name}", 1, result.created_at
        row.sop_instance_uid = f"2.25.31415926535897932384626433.{result.id}.{len(kind)}"
    return row


def _delivery(report: ReportRow, destination: str, state: DeliveryState, *, created_at: datetime, **more: Any) -> None:
    arrived = created_at + timedelta(seconds=20) if state is DeliveryState.DELIVERED else None
    due_at = created_at if arrived else NOW + timedelta(minutes=7)
    known = {"attempts": 0, "due_at": due_at, "created_at": created_at, "delivered_at": arrived}
    report.deliveries.append(DeliveryRow(destination=destination, state=state.value, **{**known, **more}))


def supersede(session: Session, uid: str) -> None:
    """A segmentation made elsewhere came late: a new revision measured with it and replaced the first result.

    The report of the first one came back from the PACS meanwhile, and a second segmentation was of no use.
    """
    study = session.scalars(select(StudyRow).where(StudyRow.study_uid == uid)).one()
    first, chosen = study.results[0], study.series[0]
    used = Reason(Code.SEGMENTATION_USED, "Its vertebrae (L1, L2, L3, L4, L5) are used in place of our own networks'.")
    useless = Reason(Code.SEGMENTATION_NOT_USED, "It was drawn on another series than the chosen one.")
    ours = Reason(Code.OWN_OUTPUT, "Made by Osteogate itself and sent back: kept, and otherwise ignored.")
    supplied = series_row(study, 90, "Spine labels", modality="SEG", instance_count=1, reasons=_stored(used))
    other = {"modality": "SEG", "instance_count": 1, "eligible": False}
    series_row(study, 91, "Liver and kidneys", **other, reasons=_stored(useless))
    series_row(study, 92, "Osteogate report", **{**other, "modality": "SR"}, reasons=_stored(ours))
    segmentation = InstanceRow(
        series=supplied,
        sop_instance_uid=f"{uid}.90.1",
        sha256="5e" * 32,
        path="seg",
        size_bytes=4096,
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        facts={},
        calling_ae="AI_ROUTER",
        received_at=NOW - timedelta(minutes=21),
    )
    session.add(segmentation)
    session.flush()
    job = _job(study, chosen, JobState.DONE, attempts=1)
    job.key, job.revision, job.segmentation_id = "2" * 64, 2, segmentation.id
    session.add(job)
    session.flush()
    named = f"supplied DICOM SEG by TotalSegmentator ({segmentation.sop_instance_uid})"
    made = {**first.document["provenance"], "segmenter": named, "segmenter_sha256": segmentation.sha256}
    first.superseded, study.revision = True, 2
    values = ("category", "bmd_g_cm2", "tbs", "hu_mean", "series_id")
    study.results.append(
        ResultRow(
            job_id=job.id,
            revision=2,
            attempt=1,
            document={**first.document, "revision": 2, "provenance": made},
            created_at=NOW - timedelta(minutes=20),
            **{name: getattr(first, name) for name in values},
        )
    )
    session.flush()


def _job(study: StudyRow, series: SeriesRow, state: JobState, *, attempts: int) -> JobRow:
    return JobRow(
        kind="screen",
        key=hashlib.sha256(series.series_uid.encode()).hexdigest(),
        study_id=study.id,
        series_id=series.id,
        revision=1,
        state=state.value,
        attempts=attempts,
        created_at=NOW - timedelta(minutes=5),
    )


def _referral(session: Session, uid: str, state: ReferralState) -> ReferralRow:
    study = session.query(StudyRow).filter_by(study_uid=uid).one()
    changed = NOW - timedelta(minutes=1)
    return ReferralRow(study_id=study.id, state=state.value, changed_at=changed, changed_by="local")


def _stored(*reasons: Reason) -> list[Mapping[str, str]]:
    return [reason.as_dict() for reason in reasons]


def pictures(results: Path, uid: str) -> str:
    """Placeholder pictures, in the names of the worker."""
    folder = results / uid
    folder.mkdir(parents=True)
    names = [f"crop-{name}.png" for name in LEVELS] + ["overlay-sagittal.png", "overlay-coronal.png"]
    for name in names:
        (folder / name).write_bytes(png(256, 256 if name.startswith("crop") else 330))
    (folder / "labels.nii.gz").write_bytes(b"not for the web")
    return uid


def png(width: int, height: int) -> bytes:
    """A grey block (a vertebra, from very far away) on black, 8 bit."""

    def pixel(row: int, column: int) -> int:
        inside = abs(row - height // 2) < 30 and abs(column - width // 2) < 38
        return 130 + (row * 7 + column * 13) % 40 if inside else 0

    rows = b"".join(b"\0" + bytes(pixel(row, column) for column in range(width)) for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
