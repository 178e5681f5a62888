"""Results go home, on both installations: a real Orthanc sends a study and receives its report and segmentation.

One story per installation, as a PACS lives it: the study goes out, the answer comes in; the answer is forwarded back
and changes nothing; a slice that was late makes a new answer that names the one it replaces; a second destination
that was down all the while gets everything when it comes up, and the first is not bothered again.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from service.dicom.reports import codes
from tests import orthanc, read_back
from tests.conftest import absent, of_dcmtk
from tests.enhanced import enhanced
from tests.installations import TIMEOUT_SECONDS, Installation
from tests.orthanc import Orthanc
from tests.service.workflow import workbench

SEGMENTATION, REPORT = "Segmentation", "Comprehensive3DSR"


@contextmanager
def storescp(port: int, folder: Path) -> Iterator[None]:
    """dcmtk's receiver on this port."""
    program = of_dcmtk("storescp") or absent("dcmtk's storescp")
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen([program, "--output-directory", str(folder), str(port)], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def hand_over(pacs: Orthanc, files: list[Path]) -> None:
    """Let Orthanc have the files by REST and forward them by C-STORE."""
    pacs.store_to("osteogate", [pacs.upload(file.read_bytes()) for file in files])


def sent(study: dict[str, Any], destination: str) -> dict[str, str]:
    """SOP instance UID by kind of what this destination holds, of the newest result."""
    newest = max((report["result_id"] for report in study["reports"]), default=None)
    return {
        report["kind"]: report["sop_instance_uid"]
        for report in study["reports"]
        for delivery in report["deliveries"]
        if report["result_id"] == newest and delivery["destination"] == destination and delivery["state"] == "delivered"
    }


def deliveries(study: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything of this study that is addressed to anybody."""
    return [delivery for report in study["reports"] for delivery in report["deliveries"]]


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_a_study_from_orthanc_has_its_report_in_orthanc(
    installation: Installation, digital_study: Path, tmp_path: Path
) -> None:
    study_uid = json.loads((digital_study / "truth.json").read_text())["study_uid"]
    files = sorted(digital_study.rglob("*.dcm"))
    late = files.pop()  # the uppermost slice: without it the study is whole, only shorter
    archive_port = workbench.free_port()
    with orthanc.running(tmp_path / "orthanc") as pacs:
        pacs.add_modality("osteogate", "OSTEOGATE", installation.dicom_port)
        installation.start(
            OSTEOGATE_DESTINATIONS=f"pacs=dicom://ORTHANC@127.0.0.1:{pacs.dicom_port},"
            f"archive=dicom://ARCHIVE@127.0.0.1:{archive_port}",
            OSTEOGATE_DELIVERY_RETRY_SECONDS="1",
            OSTEOGATE_DELIVERY_RETRY_CEILING_SECONDS="3600",
        )
        hand_over(pacs, files)
        result = installation.result(study_uid)
        first = installation.wait_for(study_uid, lambda study: len(sent(study, "pacs")) == 2, "both are in Orthanc")
        check_objects(pacs, sent(first, "pacs"), result, tmp_path)

        ours = [pacs.find(uid) for uid in sent(first, "pacs").values()]
        pacs.store_to("osteogate", [found for found in ours if found])
        again = installation.wait_for(study_uid, lambda study: len(study["series"]) == 3, "our own objects are seen")
        verdicts = {series["modality"]: [reason["code"] for reason in series["reasons"]] for series in again["series"]}
        assert verdicts == {"CT": [], "SEG": ["OWN_OUTPUT"], "SR": ["OWN_OUTPUT"]}
        assert (again["revision"], again["state"]) == (1, "screened")

        hand_over(pacs, [late])
        newer = installation.result(study_uid, revision=2)
        assert newer["revision"] == 2
        second = installation.wait_for(
            study_uid,
            lambda study: len(sent(study, "pacs")) == 2 and sent(study, "pacs") != sent(first, "pacs"),
            "the new objects are in Orthanc",
        )
        report = check_objects(pacs, sent(second, "pacs"), newer, tmp_path)
        replaced = report.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
        assert replaced.ReferencedSOPInstanceUID == sent(first, "pacs")["SR"]

        waiting = [one for one in deliveries(second) if one["state"] != "delivered"]
        assert [one["destination"] for one in waiting] == ["archive"] * 4
        with storescp(archive_port, tmp_path / "archive"):
            installation.api("/api/v1/outbox/archive/retry", method="POST", body={})
            installation.wait_for(
                study_uid,
                lambda study: all(one["state"] == "delivered" for one in deliveries(study)),
                "the archive has everything that waited for it",
            )
        held = {**sent(first, "pacs"), **{f"new {kind}": uid for kind, uid in sent(second, "pacs").items()}}
        received = [str(dcmread(file).SOPInstanceUID) for file in (tmp_path / "archive").iterdir()]
        assert sorted(received) == sorted(held.values())
        assert {pacs.arrivals(uid) for uid in held.values()} == {1}
    assert installation.stop() == 0


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_an_enhanced_ct_gives_the_same_answer(installation: Installation, digital_study: Path, tmp_path: Path) -> None:
    truth = json.loads((digital_study / "truth.json").read_text())
    slices = [dcmread(file) for file in sorted(digital_study.rglob("*.dcm"))]
    multiframe = enhanced(slices)
    content = BytesIO()
    multiframe.save_as(content, enforce_file_format=True)
    with orthanc.running(tmp_path / "orthanc") as pacs:
        pacs.add_modality("osteogate", "OSTEOGATE", installation.dicom_port)
        installation.start(OSTEOGATE_DESTINATIONS=f"pacs=dicom://ORTHANC@127.0.0.1:{pacs.dicom_port}")
        pacs.store_to("osteogate", [pacs.upload(content.getvalue())])
        result = installation.result(truth["study_uid"])
        assert result["series_uid"] == multiframe.SeriesInstanceUID
        assert result["patient"]["levels_used"] == ["L1", "L2", "L3", "L4"]
        assert result["patient"]["bmd_g_cm2"] == pytest.approx(truth["patient"]["bmd_g_cm2"], abs=0.15)
        study = installation.wait_for(truth["study_uid"], lambda study: len(sent(study, "pacs")) == 2, "both came home")
        check_objects(pacs, sent(study, "pacs"), result, tmp_path)
    assert installation.stop() == 0


def check_objects(pacs: Orthanc, uids: dict[str, str], result: dict[str, Any], folder: Path) -> Any:
    """Both objects, as Orthanc holds them, are valid, of this study, and say what the result says."""
    for kind, iod in (("SEG", SEGMENTATION), ("SR", REPORT)):
        path = folder / f"{kind}.dcm"
        path.write_bytes(pacs.file(uids[kind]))
        assert read_back.errors_of_dciodvfy(path, iod) == []
        header = dcmread(path, stop_before_pixels=True)
        assert (header.StudyInstanceUID, header.get("SyntheticData")) == (result["study_uid"], "YES")
    assert read_back.dsrdump(folder / "SR.dcm")
    rois, patient = read_back.groups(folder / "SR.dcm")
    for level in result["patient"]["levels_used"]:
        values = result["levels"][level]
        assert read_back.numbers(rois[level])[codes.BMD] == pytest.approx(values["bmd_g_cm2"], abs=6e-4)
        assert read_back.numbers(rois[level])[codes.MEAN_ATTENUATION] == pytest.approx(values["hu_mean"], abs=0.06)
        assert rois[level].referenced_segment.referenced_sop_instance_uid == uids["SEG"]
    assert read_back.numbers(patient)[codes.BMD] == pytest.approx(result["patient"]["bmd_g_cm2"], abs=6e-4)
    return dcmread(folder / "SR.dcm")
