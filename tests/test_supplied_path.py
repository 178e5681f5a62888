"""The real spine with the vertebrae that others outlined, from `storescu` to the report, on both installations."""

from __future__ import annotations

import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from sqlalchemy import select

from service.store.tables import ReportRow
from tests import orthanc
from tests.foreign_seg import MAKER, write_foreign_seg
from tests.installations import TIMEOUT_SECONDS, Installation
from tests.orthanc import Orthanc
from tests.read_back import errors_of_dciodvfy
from tests.real_ct import independent_hu, write_dicom_series
from worker.pipeline import LABEL_IDS


@pytest.fixture
def case(real_data: Path) -> Path:
    return real_data / "totalsegmentator-example-ct"


def write_study(case: Path, folder: Path, root: str, kind: str) -> tuple[str, list[Path], Path]:
    """The real CT as a study under UIDs of this root, and the SEG of its label map: study UID, slices, SEG."""
    files = write_dicom_series(case / "example_ct.nii.gz", folder / "ct")
    for number, file in enumerate(files, start=1):
        dataset = dcmread(file)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = (
            root,
            f"{root}.1",
            f"{root}.2",
        )
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{root}.1.{number}"
        dataset.save_as(file, enforce_file_format=True)
    labels = case / "spine_report" / "example_ct_report" / "totalseg.nii.gz"
    return root, files, write_foreign_seg(files, labels, folder / f"{root}.dcm", kind=kind)


def store(storescu: str, installation: Installation, *paths: Path) -> None:
    """dcmtk sends files and folders; without -R it proposes its favourite SOP classes, and SEG is none of them."""
    host, port = installation.dicom_address
    command = [storescu, "-aec", "OSTEOGATE", "-aet", "PACS", "-R", "+sd", "+r", host, str(port), *map(str, paths)]
    sent = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert sent.returncode == 0, sent.stdout + sent.stderr


def is_measured_by(result: dict[str, Any], seg: Path, case: Path) -> None:
    """The result is that of the supplied vertebrae, says so, and agrees with a computation of another kind."""
    header = dcmread(seg, stop_before_pixels=True)
    made = result["provenance"]["segmenter"]
    assert made.startswith("supplied DICOM SEG by ")
    assert header.SOPInstanceUID in made
    assert MAKER in made
    assert result["patient"]["levels_used"] == ["L1", "L2", "L3", "L4"]
    assert result["anatomy"]["numbering"] == "certain"
    assert result["decision"]["driver"] == "ct-attenuation"
    for level, label in LABEL_IDS.items():
        assert result["levels"][level]["hu_mean"] == pytest.approx(independent_hu(case, label), abs=8.0), level


def reasons(study: dict[str, Any]) -> dict[tuple[str, int], list[str]]:
    """The reason codes of every series, by modality and series number."""
    return {
        (series["modality"], series["number"]): [reason["code"] for reason in series["reasons"]]
        for series in study["series"]
    }


def made_reports(installation: Installation, study_uid: str, revision: int) -> dict[str, Path]:
    """The files of this revision's SR and SEG, once both are made."""

    def ids(study: dict[str, Any]) -> list[int]:
        wanted = {line["result_id"] for line in study["results"] if line["revision"] == revision}
        return [one["id"] for one in study["reports"] if one["result_id"] in wanted and one["state"] == "made"]

    study = installation.wait_for(study_uid, lambda study: len(ids(study)) == 2, "SR and SEG are made")
    with installation.store() as opened, opened.reading() as session:
        rows = session.execute(select(ReportRow.kind, ReportRow.path).where(ReportRow.id.in_(ids(study)))).all()
    return {kind: installation.settings.results_dir / path for kind, path in rows if path}


def names(report: Path, seg: Path) -> bool:
    """Whether a report says which supplied segmentation was measured with."""
    uid = dcmread(seg, stop_before_pixels=True).SOPInstanceUID
    texts = [str(one.value) for one in dcmread(report).iterall() if one.keyword == "TextValue"]
    return any(text.startswith("supplied DICOM SEG") and uid in text for text in texts)


def refers_to(report: Path, own: Path) -> bool:
    """Whether a report's content refers to this object of ours."""
    uids = {str(one.value) for one in dcmread(report).iterall() if one.keyword == "ReferencedSOPInstanceUID"}
    return str(dcmread(own, stop_before_pixels=True).SOPInstanceUID) in uids


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_supplied_vertebrae_are_used_from_end_to_end(
    installation: Installation, storescu: str, case: Path, tmp_path: Path
) -> None:
    with orthanc.running(tmp_path / "orthanc") as pacs:
        installation.start(OSTEOGATE_DESTINATIONS=f"pacs=dicom://ORTHANC@127.0.0.1:{pacs.dicom_port}")
        sent_with_the_study(installation, storescu, pacs, case, tmp_path)
        sent_late(installation, storescu, case, tmp_path)
    assert installation.stop() == 0


def sent_with_the_study(installation: Installation, storescu: str, pacs: Orthanc, case: Path, tmp_path: Path) -> None:
    """Sent together: measured with at once, and the report arrives in Orthanc."""
    study_uid, _, seg = write_study(case, tmp_path / "together", "1.2.826.0.1.3680043.8.498.71", "BINARY")
    store(storescu, installation, tmp_path / "together")
    is_measured_by(installation.result(study_uid), seg, case)
    study = installation.wait_for(study_uid, lambda study: study["results"])
    assert (study["revision"], reasons(study)) == (1, {("CT", 1): [], ("SEG", 77): ["SEGMENTATION_USED"]})
    made = made_reports(installation, study_uid, 1)
    assert names(made["SR"], seg)
    assert refers_to(made["SR"], made["SEG"])
    for kind, iod in (("SEG", "Segmentation"), ("SR", "Comprehensive3DSR")):
        assert errors_of_dciodvfy(made[kind], iod) == []
        uid = str(dcmread(made[kind], stop_before_pixels=True).SOPInstanceUID)
        installation.until(lambda: uid in pacs.instances(), f"the {kind} arrives in Orthanc")  # noqa: B023
        assert dcmread(BytesIO(pacs.file(uid))) == dcmread(made[kind])


def sent_late(installation: Installation, storescu: str, case: Path, tmp_path: Path) -> None:
    """The images alone first, by our own networks; their answer comes back; then the segmentation arrives."""
    study_uid, files, seg = write_study(case, tmp_path / "late", "1.2.826.0.1.3680043.8.498.72", "LABELMAP")
    store(storescu, installation, *files)
    first = installation.result(study_uid)
    assert not first["provenance"]["segmenter"].startswith("supplied")

    # Our own answer comes back from an archive: kept, shown, and nothing more.
    back = made_reports(installation, study_uid, 1)
    store(storescu, installation, *back.values())
    study = installation.wait_for(study_uid, lambda study: len(study["series"]) == 3, "our own objects are listed")
    ours = {series["modality"]: [one["code"] for one in series["reasons"]] for series in study["series"]}
    assert ours == {"CT": [], "SR": ["OWN_OUTPUT"], "SEG": ["OWN_OUTPUT"]}
    assert (study["revision"], study["state"], len(study["jobs"])) == (1, "screened", 1)
    assert installation.api(f"/api/v1/studies/{study_uid}/result") == first

    # The segmentation arrives late, of a kind too young for storescu: a new revision takes the result's place.
    assert installation.send([seg]) == 1
    is_measured_by(installation.result(study_uid, revision=2), seg, case)
    study = installation.wait_for(study_uid, lambda study: len(study["results"]) == 2)
    assert [(line["revision"], line["superseded"]) for line in study["results"]] == [(2, False), (1, True)]
    assert reasons(study)[("SEG", 77)] == ["SEGMENTATION_USED"]
    second = made_reports(installation, study_uid, 2)["SR"]
    assert names(second, seg)
    assert not names(back["SR"], seg)
    replaced = dcmread(second).PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert replaced.ReferencedSOPInstanceUID == dcmread(back["SR"]).SOPInstanceUID
