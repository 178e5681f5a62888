"""A densitometer's report comes by C-STORE and becomes a DXA result, or says why not."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from sqlalchemy import select

from service.dicom.listener import Listener
from service.domain.policy import DEFAULT_POLICY, PairingPolicy
from service.domain.states import DxaReportState
from service.steward import Steward
from service.store.engine import Store
from service.store.tables import AuditRow, DxaReportRow, DxaScanRow, JobRow, SeriesRow, StudyRow
from service.workflow import dxa, dxa_reports, intake, pairing, reading
from service.workflow.report_verdicts import NOTHING_BUT_REPORTS
from tests import dxa_report
from tests.service.dicom import harness
from tests.service.workflow import workbench
from tests.service.workflow.workbench import Clock, claim, close, deliver, record, slices

DXA_STUDY = "1.2.77"


@contextmanager
def listening(store: Store, folder: Path) -> Iterator[Listener]:
    """The door before the real database."""
    settings = harness.settings_for(folder)
    door = intake.Door(store, settings)
    listener = Listener(settings, door.commit, door.refuse)
    listener.start()
    try:
        yield listener
    finally:
        listener.stop(grace_seconds=1.0)


def storescu(listener: Listener, *files: Path) -> None:
    host, port = listener.address
    program = harness.peer_program("storescu")
    command = [program, "-aec", "OSTEOGATE", "-aet", "DENSITO", host, str(port), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def report(content: list[Dataset] | None = None, **header: Any) -> Dataset:
    told = {"StudyInstanceUID": DXA_STUDY, "SeriesInstanceUID": f"{DXA_STUDY}.1", "SyntheticData": "YES"}
    return dxa_report.report(dxa_report.coded() if content is None else content, **{**told, **header})


def read(store: Store, folder: Path, clock: Clock) -> int:
    return dxa_reports.read_waiting(store, folder / "spool", clock, 365)


def verdicts(store: Store) -> list[tuple[str, list[str]]]:
    """State and codes of every report, in the order of arrival."""
    with store.reading() as session:
        rows = session.scalars(select(DxaReportRow).order_by(DxaReportRow.id))
        return [(row.state, [reason["code"] for reason in row.reasons]) for row in rows]


def series_codes(store: Store, series_uid: str) -> list[str]:
    with store.reading() as session:
        row = session.scalars(select(SeriesRow).where(SeriesRow.series_uid == series_uid)).one()
        return [reason["code"] for reason in row.reasons]


def bring(store: Store, folder: Path, clock: Clock, *reports: Dataset) -> None:
    """Send by pynetdicom's peer, the stores checked; then read."""
    with listening(store, folder) as listener:
        files = [dxa_report.write(one, folder / f"{number}.dcm") for number, one in enumerate(reports)]
        storescu(listener, *files)
    assert read(store, folder, clock) == len(reports)


@pytest.mark.peer("dcmtk")
def test_a_report_sent_by_a_peer_is_paired_with_its_ct_and_closes_the_loop(
    store: Store, clock: Clock, tmp_path: Path
) -> None:
    deliver(store, slices(study_date="20260301", synthetic=True, patient_id="P1"), clock.now)
    assert close(store, clock.advance(31)) == 1
    with store.reading() as session:
        job_id = session.scalars(select(JobRow.id)).one()  # a sequence may have skipped 1
    held = claim(store, job_id, clock.now)
    assert held is not None
    record(store, held, clock.now, hu=60.0)
    bring(store, tmp_path, clock, report(dxa_report.coded()), report(dxa_report.worded(), SeriesInstanceUID="1.2.77.2"))
    # The second report tells a TBS and the hip as well, and the same spine: one scan, told twice.
    assert verdicts(store) == [("accepted", ["DXA_ACCEPTED"]), ("duplicate", ["DXA_DUPLICATE"])]
    with store.reading() as session:
        row = session.scalars(select(DxaScanRow)).one()
        assert (row.patient_id, row.scan_date.isoformat()) == ("P1", "2026-03-04")
        assert (row.manufacturer, row.model) == ("GE Lunar", "Lunar iDXA")
        assert (row.total_bmd_g_cm2, row.total_tbs, row.total_t_score) == (0.983, 1.31, -1.4)
        assert {one.level: (one.bmd_g_cm2, one.bmc_g, one.area_cm2, one.t_score) for one in row.levels}["L3"] == (
            1.0, 14.0, 14.0, -1.2,
        )  # fmt: skip
        (delivery,) = dxa.imports(session)
        assert (delivery.layout, delivery.actor, delivery.accepted) == ("dicom-sr", "dicom:DENSITO", 1)
        (pair,) = pairing.overview(session, PairingPolicy()).pairs
        assert (pair.ct.study_uid, pair.days, pair.levels) == ("1.2.3", 3, ("L1", "L2", "L3", "L4"))
        assert pairing.overview(session, PairingPolicy()).unpaired == ()  # the densitometer's own study is no CT
        detail = reading.study(session, "1.2.3")
        assert detail is not None
        assert detail.entry.referral is not None
        assert detail.entry.referral.state == "dxa-done"
        actions = list(session.scalars(select(AuditRow.action).where(AuditRow.actor == "dicom:DENSITO")))
        assert sorted(actions) == ["dxa.accept", "referral.dxa-done"]


@pytest.mark.peer("dcmtk")
def test_every_refusal_stands_beside_its_series_and_stays_there(store: Store, clock: Clock, tmp_path: Path) -> None:
    wrong = {**dxa_report.SPINE, "L2": {"bmd": 0.7, "bmc": 11.4, "area": 12.0}}
    hip = dxa_report.worded()[1:]
    cad = [dxa_report.text(("1", "99TEST", "Finding"), "nothing")]
    bring(
        store, tmp_path, clock,
        report(dxa_report.coded(wrong)),
        report(hip, SeriesInstanceUID="1.2.77.2"),
        report(cad, SeriesInstanceUID="1.2.77.3"),
        report(PatientID=None, SeriesInstanceUID="1.2.77.4"),
    )  # fmt: skip
    assert verdicts(store) == [
        ("refused", ["DXA_INCONSISTENT"]),
        ("refused", ["DXA_REGION"]),
        ("no-dxa", []),
        ("refused", ["DXA_PATIENT_MISSING"]),
    ]
    with store.reading() as session:
        assert session.scalars(select(DxaScanRow)).all() == []
        assert [line.state for line in dxa_reports.lines(session)] == [DxaReportState.REFUSED] * 3
    assert (
        close(store, datetime.now(UTC) + timedelta(hours=1)) == 1
    )  # the study of the reports: judged, and the reasons stay
    assert series_codes(store, "1.2.77.1") == ["DXA_INCONSISTENT"]
    assert series_codes(store, "1.2.77.3") == ["NOT_CT", "SOP_CLASS_UNSUPPORTED", "NO_PIXELS"]  # as any other report
    with store.reading() as session:
        study = session.scalars(select(StudyRow)).one()
        assert (study.state, study.choice) == ("not-screened", NOTHING_BUT_REPORTS)
        assert reading.worklist(session, reading.Filter()).total == 0  # nothing for the clinician's list
        assert reading.intake(session).total == 1
        assert list(session.scalars(select(AuditRow.action).order_by(AuditRow.id))) == ["dxa.refused"] * 3


@pytest.mark.peer("dcmtk")
def test_a_contradicting_report_is_refused_and_reading_twice_changes_nothing(
    store: Store, clock: Clock, tmp_path: Path
) -> None:
    other = {**dxa_report.SPINE, "L1": {"bmd": 0.91, "bmc": 10.01, "area": 11.0}}
    bring(store, tmp_path, clock, report(), report(dxa_report.coded(other), SeriesInstanceUID="1.2.77.2"))
    assert [codes for _, codes in verdicts(store)] == [["DXA_ACCEPTED"], ["DXA_CONTRADICTS"]]
    assert read(store, tmp_path, clock) == 0


def facts_of(sop: str, **changes: Any) -> Any:
    one = slices(study=DXA_STUDY, series=f"{DXA_STUDY}.1", n=1)[0]
    return replace(one, sop_instance_uid=sop, sop_class_uid=dxa_report.ENHANCED_SR, modality="SR", **changes)


def test_our_own_report_is_never_read(store: Store, clock: Clock, tmp_path: Path) -> None:
    deliver(store, [facts_of("1.2.77.1.1", own_output=True)], clock.now)
    assert verdicts(store) == []
    assert series_codes(store, f"{DXA_STUDY}.1") == ["OWN_OUTPUT"]


def test_a_report_whose_file_is_gone_waits_and_one_that_is_broken_says_so(
    store: Store, clock: Clock, tmp_path: Path
) -> None:
    deliver(store, [facts_of("1.2.77.1.1"), facts_of("1.2.77.1.2")], clock.now)
    with store.reading() as session:
        first = session.scalars(select(DxaReportRow).order_by(DxaReportRow.id)).first()
        assert first is not None
        path = tmp_path / "spool" / first.instance.path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no DICOM at all")
    settings = workbench.settings(tmp_path)
    Steward(store, settings, DEFAULT_POLICY, lambda _: None, clock, model_key=lambda: "m").step()
    assert verdicts(store) == [("no-dxa", ["UNREADABLE"]), ("waiting", [])]
    assert series_codes(store, f"{DXA_STUDY}.1") == ["UNREADABLE"]
