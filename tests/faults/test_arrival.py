"""Faults 14 and 16: one study from two senders, sent again, and slices that come late; real files, real senders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from service.dicom.listener import Listener
from service.dicom.received import Received, Stored
from tests.faults.site import Site, ct_study, send, standing_site, storescu
from tests.service.workflow.workbench import DATABASES, eventually

STUDY, OTHER = "1.2.3", "9.9.9"


def states(site: Site) -> list[tuple[str, int, int]]:
    """State, revision and attempts of the study's jobs."""
    return [(job.state, job.revision, job.attempts) for job in site.jobs(STUDY)]


def standing(site: Site) -> list[tuple[int, bool]]:
    """Revision of the study's results, and whether each is superseded."""
    return [(result.revision, result.superseded) for result in site.results(STUDY)]


def let_pass(site: Site, listener: Listener, folder: Path) -> None:
    """Another study goes all the way: whatever the one before would have caused has happened by then."""
    assert send(listener, *ct_study(folder, OTHER)).failed == []
    site.work_until(lambda: site.results(OTHER), "the other study is measured")


# 14


@pytest.mark.peer("dcmtk")
@pytest.mark.parametrize("kind", DATABASES)
def test_two_senders_at_once_and_a_third_later_make_one_job(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ct_study(tmp_path / "in", STUDY)
    with standing_site(tmp_path, kind) as site, site.supervised_worker("at_once"):
        monkeypatch.setattr(
            site.door, "commit", at_once_with(site.door.commit, lambda: listener.open_associations == 2)
        )
        with site.listening() as listener:
            senders = [storescu(listener, tmp_path / "in", calling) for calling in ("PACS-A", "PACS-B")]
            for sender in senders:
                said, _ = sender.communicate()
                assert sender.returncode == 0, said
            site.work_until(lambda: site.results(STUDY), "the study is measured")
            later = storescu(listener, tmp_path / "in", "ARCHIVE")
            said, _ = later.communicate()
            assert later.returncode == 0, said
            let_pass(site, listener, tmp_path / "other")
        assert states(site) == [("done", 1, 1)]
        assert standing(site) == [(1, False)]
        assert (site.study(STUDY).state, site.study(STUDY).revision) == ("screened", 1)
        assert site.measured() == ["60", "60"]  # one call for each study
        assert len(list(site.settings.spool_dir.rglob("*.dcm"))) == 120


def at_once_with(
    commit: Callable[[Sequence[Received]], list[Stored]], both_are_here: Callable[[], bool]
) -> Callable[[Sequence[Received]], list[Stored]]:
    """The first commit waits until both senders have their association: then they do send at once."""
    begun: list[bool] = []

    def held(batch: Sequence[Received]) -> list[Stored]:
        if not begun:
            eventually(both_are_here, "both senders are here")
            begun.append(True)
        return commit(batch)

    return held


# 16


@pytest.mark.parametrize("kind", DATABASES)
def test_slices_that_come_while_the_worker_measures(tmp_path: Path, kind: str) -> None:
    """What it measures is not the study any more: its result is refused, the whole study is measured."""
    files = ct_study(tmp_path / "in", STUDY, range(70))
    results = tmp_path / "results"
    with standing_site(tmp_path, kind, lease_seconds=600.0) as site, site.listening() as listener:
        assert send(listener, *files[:60]).failed == []
        with site.supervised_worker("at_the_gate"):
            site.work_until((results / "at-the-gate").exists, "the worker measures")
            assert states(site) == [("running", 1, 1)]
            assert send(listener, *files[60:]).failed == []
            assert site.study_state(STUDY) == "receiving"
            site.work_until(lambda: len(site.jobs(STUDY)) == 2, "the study is closed again")
            assert states(site) == [("superseded", 1, 1), ("waiting", 2, 0)]
            (results / "gate").touch()
            site.work_until(lambda: site.results(STUDY), "the whole study is measured")
        assert standing(site) == [(2, False)]
        assert states(site) == [("superseded", 1, 1), ("done", 2, 1)]
        assert site.measured() == ["60", "70"]
        [result] = site.results(STUDY)
        assert result.document["revision"] == 2
        assert [folder.name for folder in results.iterdir() if folder.is_dir()] == [result.artefacts]  # no stale rest


@pytest.mark.parametrize("kind", DATABASES)
def test_slices_that_come_while_the_result_is_on_its_way(tmp_path: Path, kind: str) -> None:
    """The slices are here, the study is not closed again yet: a result of the old slices never stands for the new."""
    files = ct_study(tmp_path / "in", STUDY, range(70))
    results = tmp_path / "results"
    with standing_site(tmp_path, kind, lease_seconds=600.0) as site, site.listening() as listener:
        assert send(listener, *files[:60]).failed == []
        with site.supervised_worker("at_the_gate"):
            site.work_until((results / "at-the-gate").exists, "the worker measures")
            assert send(listener, *files[60:]).failed == []
            (results / "gate").touch()
            eventually(lambda: site.results(STUDY), "the first result")
            assert site.study_state(STUDY) == "receiving"  # said beside the decision: it is about to be replaced
            site.work_until(lambda: len(site.results(STUDY)) == 2, "the whole study is measured")
        assert standing(site) == [(1, True), (2, False)]
        assert site.measured() == ["60", "70"]


@pytest.mark.parametrize("kind", DATABASES)
def test_slices_that_come_after_the_result(tmp_path: Path, kind: str) -> None:
    files = ct_study(tmp_path / "in", STUDY, range(70))
    with standing_site(tmp_path, kind) as site, site.listening() as listener, site.supervised_worker("at_once"):
        assert send(listener, *files[:60]).failed == []
        site.work_until(lambda: site.results(STUDY), "the study is measured")
        earlier = site.report(STUDY)
        assert send(listener, *files[60:]).failed == []
        site.work_until(lambda: len(site.results(STUDY)) == 2, "the whole study is measured")
        assert standing(site) == [(1, True), (2, False)]
        assert (site.study(STUDY).revision, site.study_state(STUDY)) == (2, "screened")
        assert site.measured() == ["60", "70"]
        [study] = site.report(STUDY, revision=2).PredecessorDocumentsSequence  # the new report says which it replaces
        [replaced] = study.ReferencedSeriesSequence[0].ReferencedSOPSequence
        assert replaced.ReferencedSOPInstanceUID == earlier.SOPInstanceUID
