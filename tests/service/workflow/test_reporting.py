"""From a result to its DICOM objects: promised with it, made once, repaired after every crash."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from sqlalchemy import func, select

from service.dicom.headers import read_facts
from service.dicom.reports import is_ours
from service.store.engine import Store
from service.store.tables import AuditRow, JobRow, ReportRow, ResultRow
from service.workflow import artefacts, delivery, reporting
from tests.read_back import errors_of_dciodvfy
from tests.service.workflow import workbench
from tests.service.workflow.outbox import STUDY, Killed, Outbox
from tests.service.workflow.workbench import Clock

DESTINATIONS = "pacs=dicom://PACS@127.0.0.1:4242,web=http://127.0.0.1:8042/dicom-web"


@pytest.fixture
def outbox(store: Store, tmp_path: Path, clock: Clock) -> Outbox:
    return Outbox(store, tmp_path, clock, destinations=DESTINATIONS)


def temp_files(outbox: Outbox) -> list[Path]:
    return list(outbox.settings.results_dir.rglob("*.part"))


# The promise


def test_a_result_promises_its_report_and_where_vertebrae_were_labelled_a_segmentation(outbox: Outbox) -> None:
    assert outbox.kinds(outbox.result("1.1")) == ["SEG", "SR"]
    assert outbox.kinds(outbox.result("2.2", labelled=False)) == ["SR"]


def test_a_result_without_its_promise_is_no_result(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no promise")

    monkeypatch.setattr(reporting, "promise", broken)
    with pytest.raises(RuntimeError, match="no promise"):
        outbox.result()
    with outbox.store.reading() as session:
        assert session.scalar(select(func.count()).select_from(ResultRow)) == 0
        assert session.scalars(select(JobRow.state)).one() == "running"


# The objects


def test_they_are_made_and_addressed_to_every_destination(outbox: Outbox) -> None:
    outbox.result(TimezoneOffsetFromUTC="+0930")
    assert outbox.make() == 2
    seg, sr = outbox.report("SEG"), outbox.report("SR")
    for row, name in ((seg, "seg.dcm"), (sr, "sr.dcm")):
        assert (row.state, row.last_error, row.made_at) == ("made", None, outbox.clock.now)
        path = outbox.file(row)
        assert path.name == name
        assert row.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        made = dcmread(path)
        assert made.SOPInstanceUID == row.sop_instance_uid
        assert made.StudyInstanceUID == STUDY
        assert (made.ContentDate, made.ContentTime) == ("20261123", "183031")  # 09:00:31 UTC in the scanner's time
        assert is_ours(read_facts(path))
    assert [(kind, row.destination, row.state) for kind, row in outbox.deliveries()] == [
        ("SEG", "pacs", "waiting"),
        ("SEG", "web", "waiting"),
        ("SR", "pacs", "waiting"),
        ("SR", "web", "waiting"),
    ]
    assert outbox.make() == 0
    assert temp_files(outbox) == []


def test_the_report_refers_to_the_segmentation(outbox: Outbox) -> None:
    outbox.result()
    outbox.make()
    assert outbox.report("SEG").sop_instance_uid in referenced(dcmread(outbox.file(outbox.report("SR"))))


def test_dciodvfy_finds_no_error(outbox: Outbox) -> None:
    outbox.result()
    outbox.make()
    outbox.again()
    outbox.make()
    assert errors_of_dciodvfy(outbox.file(outbox.report("SEG")), "Segmentation") == []
    assert errors_of_dciodvfy(outbox.file(outbox.report("SR")), "Comprehensive3DSR") == []


def test_without_labels_there_is_a_report_all_the_same(outbox: Outbox) -> None:
    outbox.result(labelled=False)
    assert outbox.make() == 1
    assert [kind for kind, _ in outbox.deliveries("pacs")] == ["SR"]


def test_without_destinations_they_are_made_and_stay(store: Store, tmp_path: Path, clock: Clock) -> None:
    outbox = Outbox(store, tmp_path, clock)
    outbox.result()
    assert outbox.make() == 2
    assert outbox.deliveries() == []


def test_the_same_result_makes_the_same_bytes(outbox: Outbox) -> None:
    outbox.result()
    outbox.make()
    first = {kind: outbox.file(outbox.report(kind)).read_bytes() for kind in ("SEG", "SR")}
    with outbox.store.transaction() as session:
        for row in session.scalars(select(ReportRow)):
            row.state, row.attempts = "failed", 5
            for sent in row.deliveries:
                session.delete(sent)
    for kind in ("SEG", "SR"):
        outbox.file(outbox.report(kind)).unlink()
        with outbox.store.transaction() as session:
            reporting.remake(session, outbox.report(kind).id, actor="Dr. A", now=outbox.clock.now)
    assert outbox.make() == 2
    assert {kind: outbox.file(outbox.report(kind)).read_bytes() for kind in ("SEG", "SR")} == first


def test_slices_that_came_afterwards_are_none_of_theirs(outbox: Outbox) -> None:
    outbox.result()
    workbench.deliver(outbox.store, workbench.slices(n=61)[60:], outbox.clock.now)
    assert outbox.make() == 2
    assert len(dcmread(outbox.file(outbox.report("SEG"))).ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 8


# What a newer result does


def test_a_repeated_measurement_names_the_report_that_it_replaces(outbox: Outbox) -> None:
    outbox.result()
    outbox.make()
    first = {kind: outbox.report(kind).sop_instance_uid for kind in ("SEG", "SR")}
    again = outbox.again()
    with outbox.store.reading() as session:
        assert session.get_one(ResultRow, again).run == 1
    assert outbox.make() == 2
    second = {kind: outbox.report(kind).sop_instance_uid for kind in ("SEG", "SR")}
    assert not set(first.values()) & set(second.values())
    replaced = dcmread(outbox.file(outbox.report("SR"))).PredecessorDocumentsSequence
    series = replaced[0].ReferencedSeriesSequence[0]
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == first["SR"]
    assert replaced[0].StudyInstanceUID == STUDY
    earlier = dcmread(outbox.file(outbox.report("SR", result=again - 1)))
    assert series.SeriesInstanceUID == earlier.SeriesInstanceUID
    assert "PredecessorDocumentsSequence" not in earlier


def test_what_is_superseded_before_its_turn_is_not_made(outbox: Outbox) -> None:
    old = outbox.result()
    new = outbox.again()
    assert outbox.make() == 2
    row = outbox.report("SR", result=old)
    assert (row.state, row.last_error) == ("failed", "superseded before it was made")
    assert "PredecessorDocumentsSequence" not in dcmread(outbox.file(outbox.report("SR", result=new)))
    with outbox.store.transaction() as session, pytest.raises(reporting.NotResendable, match="superseded"):
        reporting.remake(session, row.id, actor="Dr. A", now=outbox.clock.now)


def test_what_is_superseded_while_it_is_made_is_not_published(outbox: Outbox) -> None:
    old = outbox.result()
    order = begun(outbox, "SEG")
    made = reporting.make(order, spool_dir=outbox.settings.spool_dir, results_dir=outbox.settings.results_dir)
    assert isinstance(made, Dataset)
    outbox.again()
    published: list[str] = []
    assert not finish(outbox, order, made, published)
    assert published == []
    assert outbox.report("SEG", result=old).state == "failed"


# What goes wrong


def test_a_source_that_carries_no_object_fails_at_once_and_says_why(outbox: Outbox) -> None:
    outbox.result(SeriesInstanceUID="")
    assert outbox.make() == 0
    for kind in ("SEG", "SR"):
        row = outbox.report(kind)
        assert (row.state, row.last_error) == ("failed", "a source slice has no SeriesInstanceUID")
    assert outbox.deliveries() == []


def test_a_segmentation_that_cannot_be_made_costs_the_report_nothing(outbox: Outbox) -> None:
    outbox.result(FrameOfReferenceUID=None)
    assert outbox.make() == 1
    assert outbox.report("SEG").last_error == "the source slices name no frame of reference"
    assert outbox.report("SR").state == "made"
    assert [kind for kind, _ in outbox.deliveries("pacs")] == ["SR"]


def test_a_damaged_file_is_tried_again_and_then_given_up(outbox: Outbox) -> None:
    outbox.result()
    labels = outbox.settings.results_dir / folder_of(outbox) / artefacts.LABELS
    whole = labels.read_bytes()
    labels.write_bytes(whole[: len(whole) // 2])
    pauses = []
    for _ in range(reporting.MAX_ATTEMPTS):
        assert outbox.report("SR").state == "waiting"  # its segmentation may still come
        outbox.make()
        row = outbox.report("SEG")
        pauses.append((row.due_at - outbox.clock.now).total_seconds())
        outbox.clock.now = max(row.due_at, outbox.clock.now)
    row = outbox.report("SEG")
    assert (row.state, row.attempts) == ("failed", reporting.MAX_ATTEMPTS)
    assert "BadZipFile" in (row.last_error or "")
    assert pauses[:-1] == [10.0, 40.0, 160.0, 640.0]
    assert outbox.report("SR").state == "made"

    labels.write_bytes(whole)
    with outbox.store.transaction() as session:
        reporting.remake(session, row.id, actor="Dr. A", now=outbox.clock.now, peer_address="10.0.0.9")
    assert outbox.make() == 1
    assert outbox.report("SEG").state == "made"
    with outbox.store.reading() as session:
        noted = session.scalars(select(AuditRow).where(AuditRow.action == "report.remake")).one()
    assert (noted.actor, noted.subject, noted.peer_address) == ("Dr. A", STUDY, "10.0.0.9")
    assert noted.detail == {"report": row.id, "kind": "SEG"}


def test_one_that_fails_delays_no_other(outbox: Outbox) -> None:
    outbox.result("1.1", SeriesInstanceUID="")
    outbox.result("2.2")
    (outbox.settings.spool_dir / "ct" / "1.1" / "3.dcm").unlink()
    assert outbox.make() == 2
    assert outbox.report("SR").state == "made"


@pytest.mark.parametrize("state", ["waiting", "made"])
def test_only_a_failed_object_is_made_again(outbox: Outbox, state: str) -> None:
    outbox.result()
    if state == "made":
        outbox.make()
    row = outbox.report("SR")
    assert row.state == state
    with outbox.store.transaction() as session:
        with pytest.raises(reporting.NotResendable, match="could not be made"):
            reporting.remake(session, row.id, actor="Dr. A", now=outbox.clock.now)
        with pytest.raises(reporting.NotResendable, match="no such"):
            reporting.remake(session, row.id + 1000, actor="Dr. A", now=outbox.clock.now)


# Crashes


def test_killed_between_the_file_and_the_row_it_is_made_again(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox.result(labelled=False)
    with monkeypatch.context() as patched:
        patched.setattr(delivery, "open_deliveries", killed)
        with pytest.raises(Killed):
            outbox.make()
    row = outbox.report("SR")
    assert (row.state, row.path, outbox.deliveries()) == ("waiting", None, [])
    left = outbox.settings.results_dir / folder_of(outbox) / "sr.dcm"
    bytes_left = left.read_bytes()  # the file was there already
    assert outbox.make() == 0  # its maker may still live
    outbox.clock.advance(reporting.LEASE_SECONDS + 1)
    assert outbox.make() == 1
    assert outbox.file(outbox.report("SR")).read_bytes() == bytes_left
    assert len(outbox.deliveries()) == 2


def test_killed_before_the_file_it_is_made_again(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox.result(labelled=False)
    with monkeypatch.context() as patched:
        patched.setattr(reporting, "finish", killed)
        with pytest.raises(Killed):
            outbox.make()
    assert not (outbox.settings.results_dir / folder_of(outbox) / "sr.dcm").exists()
    outbox.clock.advance(reporting.LEASE_SECONDS + 1)
    assert outbox.make() == 1


def test_what_kills_its_maker_each_time_is_given_up(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox.result()
    with monkeypatch.context() as patched:
        patched.setattr(reporting, "_segmentation", killed)
        for _ in range(reporting.MAX_ATTEMPTS):
            with pytest.raises(Killed):
                outbox.make()
            outbox.clock.advance(reporting.LEASE_SECONDS + 1)
        outbox.make()
    row = outbox.report("SEG")
    assert row.state == "failed"
    assert "given up after 5 attempts" in (row.last_error or "")
    assert outbox.report("SR").state == "made"


def test_of_two_makers_the_slower_writes_nothing(outbox: Outbox) -> None:
    outbox.result()
    slow = begun(outbox, "SEG")
    made = reporting.make(slow, spool_dir=outbox.settings.spool_dir, results_dir=outbox.settings.results_dir)
    assert isinstance(made, Dataset)
    with outbox.store.transaction() as session:
        assert reporting.begin(session, slow.report_id, outbox.clock.now) is None
    outbox.clock.advance(reporting.LEASE_SECONDS + 1)
    assert outbox.make() == 2
    published: list[str] = []
    assert not finish(outbox, slow, made, published)
    with outbox.store.transaction() as session:
        assert not reporting.fail(session, slow, "too late", outbox.clock.now)
    assert published == []
    assert outbox.report("SEG").state == "made"
    assert len(outbox.deliveries()) == 4


def test_a_maker_whose_lease_ran_out_settles_nothing_for_the_next(outbox: Outbox) -> None:
    outbox.result()
    slow = begun(outbox, "SEG")
    made = reporting.make(slow, spool_dir=outbox.settings.spool_dir, results_dir=outbox.settings.results_dir)
    assert isinstance(made, Dataset)
    outbox.clock.advance(reporting.LEASE_SECONDS + 1)
    current = begun(outbox, "SEG")
    published: list[str] = []
    assert not finish(outbox, slow, made, published)
    with outbox.store.transaction() as session:
        assert not reporting.give_up(session, slow, "too late")
    assert published == []
    assert outbox.report("SEG").state == "waiting"
    assert finish(outbox, current, made, published)
    assert published == ["SEG"]


@pytest.mark.parametrize("charset", [None, "ISO_IR 100", "ISO_IR 192", ["ISO 2022 IR 6", "ISO 2022 IR 87"]])
def test_names_in_any_script_do_not_stop_a_report(outbox: Outbox, charset: Any) -> None:
    """A supplied segmentation brings its maker's name into the provenance."""

    def name_segmenter(row: ResultRow) -> None:
        provenance = row.document["provenance"] | {"segmenter": "supplied DICOM SEG by Müller 脊椎 " + "x" * 80}
        row.document = row.document | {"provenance": provenance}

    outbox.change(name_segmenter, outbox.result(SpecificCharacterSet=charset, PatientName="Doe^Jane"))
    assert outbox.make() == 2, outbox.report("SR").last_error
    assert errors_of_dciodvfy(outbox.file(outbox.report("SR")), "Comprehensive3DSR") == []
    assert errors_of_dciodvfy(outbox.file(outbox.report("SEG")), "Segmentation") == []


def test_it_stops_between_two_objects_when_told_to(outbox: Outbox) -> None:
    outbox.result()
    asked = iter([True, False])
    made = reporting.make_reports(outbox.store, outbox.settings, outbox.clock, going_on=lambda: next(asked))
    assert made == 1
    assert outbox.report("SR").state == "waiting"


def test_a_result_without_a_folder_has_no_objects(outbox: Outbox) -> None:
    def lose_folder(row: ResultRow) -> None:
        row.artefacts = None

    outbox.change(lose_folder, outbox.result())
    assert outbox.make() == 0
    assert outbox.report("SR").last_error == "its result has no folder"


def test_local_time_follows_the_source_where_it_says(outbox: Outbox) -> None:
    header = Dataset()
    header.TimezoneOffsetFromUTC = "-0330"
    local = reporting._local(workbench.START, [header])
    assert (local.utcoffset(), local) == (timedelta(hours=-3, minutes=-30), workbench.START)
    for unusable in ("", "JST", "+9"):
        header.TimezoneOffsetFromUTC = unusable
        assert reporting._local(workbench.START, [header]) == workbench.START.astimezone()


def killed(*_: object, **__: object) -> Any:
    raise Killed


def begun(outbox: Outbox, kind: str) -> reporting.Order:
    with outbox.store.transaction() as session:
        order = reporting.begin(session, outbox.report(kind).id, outbox.clock.now)
    assert order is not None
    return order


def finish(outbox: Outbox, order: reporting.Order, made: Dataset, published: list[str]) -> bool:
    with outbox.store.transaction() as session:
        return reporting.finish(
            session,
            order,
            sop_instance_uid=str(made.SOPInstanceUID),
            sha256="0" * 64,
            publish=lambda: published.append(order.kind),
            destinations=["pacs"],
            now=outbox.clock.now,
        )


def folder_of(outbox: Outbox) -> str:
    with outbox.store.reading() as session:
        folder = session.scalars(select(ResultRow.artefacts).order_by(ResultRow.id.desc()).limit(1)).one()
    assert folder is not None
    return folder


def referenced(document: Dataset) -> set[str]:
    return {
        str(item.ReferencedSOPInstanceUID)
        for study in document.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
