"""A real Orthanc as the sender: in every lossless syntax that it converts to, all arrives with the pixels as they were.

Orthanc's own transcoder is DCMTK's; its plugin `orthanc-gdcm` adds RLE and JPEG 2000. What it can convert to is asked
of Orthanc itself, so that a newer one is tested for more.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from service.dicom import syntaxes
from tests.enhanced import as_file, enhanced, slices_of
from tests.orthanc import Orthanc, running
from tests.service.dicom.harness import Database, assert_intact, listening
from worker.volume import Volume, load_dicom

MODALITY = "osteogate"
OFFERED = (*syntaxes.UNCOMPRESSED, *syntaxes.LOSSLESS)
BY_DCMTK = {
    *syntaxes.UNCOMPRESSED,
    "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",
}
BY_GDCM = {"1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90"}
# GDCM's JPEG-LS encoder ends Debian's Orthanc; DCMTK's serves in its place.
GDCM = {"Gdcm": {"Enable": True, "RestrictTransferSyntaxes": sorted(BY_GDCM)}}


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with running(tmp_path_factory.mktemp("orthanc")) as started:
        yield started


@pytest.fixture(scope="module")
def study(digital_study: Path) -> Path:
    return digital_study / "dicom"


def send(orthanc: Orthanc, files: list[bytes], folder: Path) -> Database:
    """Put files into Orthanc, have it send them to a listener of ours, and see that each arrived with Success."""
    ids = [orthanc.upload(content) for content in files]
    database = Database()
    with listening(folder, database, idle_seconds=30.0, handshake_seconds=30.0) as listener:
        orthanc.add_modality(MODALITY, "OSTEOGATE", listener.address[1])
        sent = orthanc.store_to(MODALITY, ids)
    assert (sent["InstancesCount"], sent["FailedInstancesCount"]) == (len(files), 0)
    # Orthanc proposes all SOP classes that it knows, whatever it is going to send; only those contexts are refused.
    assert {refusal["kind"] for refusal in database.refusals} <= {"context"}
    assert not {refusal["sop_class_uid"] for refusal in database.refusals} & set(syntaxes.STORAGE_CLASSES)
    assert database.conflicts == []
    return database


def received(database: Database, folder: Path) -> list[Path]:
    """The files in the spool, each whole."""
    for row in database.rows.values():
        assert_intact(folder / "spool", row)
    return [folder / "spool" / row.path for row in database.rows.values()]


def assert_same(one: Volume, other: Volume) -> None:
    np.testing.assert_array_equal(one.hu, other.hu)
    np.testing.assert_array_equal(one.affine, other.affine)


def test_a_whole_study_arrives(orthanc: Orthanc, study: Path, tmp_path: Path) -> None:
    files = sorted(study.glob("*.dcm"))
    database = send(orthanc, [path.read_bytes() for path in files], tmp_path)
    assert set(database.rows) == {str(dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID) for path in files}
    assert_same(load_dicom(received(database, tmp_path)), load_dicom(files))


def test_every_lossless_syntax_that_orthanc_converts_to(study: Path, tmp_path: Path) -> None:
    with running(tmp_path / "orthanc", plugins=["libOrthancGdcm.so"], settings=GDCM) as orthanc:
        assert arrived_in_every_syntax(orthanc, study, tmp_path) >= BY_DCMTK | BY_GDCM


def arrived_in_every_syntax(orthanc: Orthanc, study: Path, tmp_path: Path) -> set[str]:
    """The lossless syntaxes that Orthanc converts to, each seen to arrive with its pixels as they were."""
    files = sorted(study.glob("*.dcm"))[40:44]
    expected = load_dicom(files)
    uids = [str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in files]
    seen = set()
    for number, syntax in enumerate(OFFERED):
        for path in files:  # from the original each time
            orthanc.upload(path.read_bytes())
        converted = [orthanc.transcoded(uid, syntax) for uid in uids]
        whole = [content for content in converted if content is not None]
        if not whole:
            continue
        assert len(whole) == len(files), syntax
        database = send(orthanc, whole, tmp_path / str(number))
        assert set(database.rows) == set(uids)
        assert {row.facts.transfer_syntax_uid for row in database.rows.values()} == {syntax}
        assert not any(row.facts.lossy for row in database.rows.values())
        assert_same(load_dicom(received(database, tmp_path / str(number))), expected)
        seen.add(syntax)
    return seen


@pytest.mark.parametrize("syntax", [syntaxes.EXPLICIT_VR_LITTLE_ENDIAN, "1.2.840.10008.1.2.4.70"])
def test_an_enhanced_ct_arrives_as_one_object(syntax: str, orthanc: Orthanc, study: Path, tmp_path: Path) -> None:
    slices = slices_of(study, first=40, count=6, size=128)
    made = enhanced(slices[::-1])
    orthanc.upload(as_file(made))
    converted = orthanc.transcoded(str(made.SOPInstanceUID), syntax)
    assert converted is not None
    database = send(orthanc, [converted], tmp_path)
    (row,) = database.rows.values()
    assert row.facts.transfer_syntax_uid == syntax
    assert row.facts.frames == len(row.facts.frame_positions_lps_mm) == 6
    paths = [tmp_path / f"{number}.dcm" for number in range(6)]
    for one, path in zip(slices, paths, strict=True):
        path.write_bytes(as_file(one))
    assert_same(load_dicom(received(database, tmp_path)), load_dicom(paths))


def test_what_is_sent_again_is_stored_once(orthanc: Orthanc, study: Path, tmp_path: Path) -> None:
    content = sorted(study.glob("*.dcm"))[50].read_bytes()
    identifier = orthanc.upload(content)
    database = Database()
    with listening(tmp_path, database, idle_seconds=30.0, handshake_seconds=30.0) as listener:
        orthanc.add_modality(MODALITY, "OSTEOGATE", listener.address[1])
        for _ in range(2):
            assert orthanc.store_to(MODALITY, [identifier])["FailedInstancesCount"] == 0
    assert sum(database.batches) == 2
    assert len(database.rows) == 1
    assert database.conflicts == []
