"""Fault 19: corrupt, truncated and bomb-sized pixels, sequences nested without end: each study fails alone."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from service.dicom import syntaxes
from service.dicom.headers import HeaderError, read_facts
from service.store.tables import StudyRow
from service.workflow.screening import not_screened_document
from tests.faults import hostile
from tests.faults.site import Site, ct_study, part10, send, standing_site
from tests.service.workflow.workbench import DATABASES

HEALTHY = "1.2.3"


def document(site: Site, uid: str) -> dict[str, Any] | None:
    """What stands for a study: its result, or why it has none; None while it is on its way."""
    with site.store.reading() as session:
        study = session.scalars(select(StudyRow).where(StudyRow.study_uid == uid)).one()
        return study.results[-1].document if study.results else not_screened_document(study)


def codes(told: dict[str, Any]) -> set[str]:
    return {reason["code"] for reason in [*told["verdict"]["reasons"], *told["decision"]["reasons"]]}


@pytest.mark.parametrize("kind", DATABASES)
def test_every_bad_study_fails_alone_beside_a_healthy_one(tmp_path: Path, kind: str) -> None:
    """Through the real listener and the real loader, in one worker process that may not grow by more than 1 GiB."""
    studies = {f"2.25.{number}": make for number, make in enumerate(hostile.BAD_STUDIES, start=1)}
    with standing_site(tmp_path, kind, lease_seconds=600.0) as site, site.supervised_worker("loads") as worker:
        with site.listening() as listener:
            for uid, make in studies.items():
                make(tmp_path / uid, uid)
                failures = [text for _, text in send(listener, tmp_path / uid).failed]
                assert all("0xC000" in text for text in failures), (make.__name__, failures)  # an answer, each time
                assert len(failures) <= 1, make.__name__
            assert send(listener, *ct_study(tmp_path / "healthy", HEALTHY)).failed == []
        site.work_until(lambda: all(document(site, uid) for uid in [*studies, HEALTHY]), "every study has its answer")
        told = {make.__name__: document(site, uid) for uid, make in studies.items()}
        assert {name: one["decision"]["category"] for name, one in told.items() if one} == dict.fromkeys(
            told, "not-assessable"
        )
        wrong = {
            make.__name__: codes(told[make.__name__] or {})
            for make, expected in hostile.BAD_STUDIES.items()
            if not expected & codes(told[make.__name__] or {})
        }
        assert wrong == {}
        assert document(site, HEALTHY)["decision"]["category"] == "refer"  # type: ignore[index]
        assert {job.attempts for job in site.jobs()} == {1}
        assert worker.deaths == []


@pytest.mark.parametrize("kind", DATABASES)
def test_a_hostile_segmentation_or_header_costs_its_ct_nothing(tmp_path: Path, kind: str) -> None:
    """Whether the door refuses it or keeps it: the association lives, and the healthy CT is measured."""
    with standing_site(tmp_path, kind, lease_seconds=600.0) as site, site.supervised_worker("loads") as worker:
        ct_study(tmp_path / "in", HEALTHY)
        for number, sequence in enumerate(hostile.SEQUENCES, start=1):
            path = tmp_path / "in" / f"a-segmentation-{number}.dcm"  # after the CT on its association
            hostile.segmentation(path, HEALTHY, number, sequence(hostile.SEGMENTS))
        with site.listening() as listener:
            report = send(listener, tmp_path / "in")
            assert all("0xC000" in text for _, text in report.failed), report.failed
            assert {path.name[0] for path, _ in report.failed} <= {"a"}
            assert len(report.sent) >= 60
        site.work_until(lambda: document(site, HEALTHY), "the CT is measured")
        assert document(site, HEALTHY)["decision"]["category"] == "refer"  # type: ignore[index]
        assert worker.deaths == []


@pytest.mark.parametrize("head", ["CONTRAST", "PRIVATE", "SEGMENTS"])
@pytest.mark.parametrize("sequence", hostile.SEQUENCES)
def test_a_hostile_header_is_read_or_refused_in_bounded_memory(tmp_path: Path, head: str, sequence: Any) -> None:
    content = sequence(getattr(hostile, head))
    path = tmp_path / "hostile.dcm"
    if head == "SEGMENTS":
        hostile.segmentation(path, HEALTHY, 1, content)
    else:
        part10(path, hostile.ct_with(content, HEALTHY), f"{HEALTHY}.4.{hostile.BAD + 1}")
    del content
    tracemalloc.start()
    try:
        with suppress(HeaderError):
            assert read_facts(path).segments == ()
        assert tracemalloc.get_traced_memory()[1] < 16_000_000 + 4 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_the_hostile_files_are_what_they_say(tmp_path: Path) -> None:
    """pydicom itself fails on the nested ones, or this shows nothing."""
    from pydicom import dcmread

    path = tmp_path / "nested.dcm"
    hostile.segmentation(path, HEALTHY, 1, hostile.nested_without_lengths(hostile.SEGMENTS))
    with pytest.raises(RecursionError):
        dcmread(path)
    hostile.segmentation(path, HEALTHY, 1, hostile.nested_with_lengths(hostile.SEGMENTS))
    dataset = dcmread(path)
    assert dataset.file_meta.MediaStorageSOPClassUID == syntaxes.SEGMENTATION_STORAGE
    for _ in range(hostile.LEVELS):
        [dataset] = dataset.SegmentSequence
    assert len(dataset) == 0
