"""The harness itself: what Orthanc acknowledged survives its being killed, and nothing of it outlives a test."""

from __future__ import annotations

import socket
from io import BytesIO
from pathlib import Path

from pydicom import dcmread

from tests.orthanc import running
from tests.service.dicom.harness import slice_file


def test_killed_and_started_again_it_holds_what_it_held(tmp_path: Path) -> None:
    source = slice_file(tmp_path, 7)
    uid = str(dcmread(source).SOPInstanceUID)
    with running(tmp_path / "orthanc") as orthanc:
        identifier = orthanc.upload(source.read_bytes())
        ports = orthanc.http_port, orthanc.dicom_port
        orthanc.kill()
        orthanc.start()
        assert (orthanc.http_port, orthanc.dicom_port) == ports
        assert (orthanc.instances(), orthanc.find(uid), orthanc.find("1.2.3")) == ([uid], identifier, None)
        assert orthanc.file(uid) == source.read_bytes()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", ports[0])) != 0


def test_a_conversion_that_it_dies_of_is_asked_for_again(tmp_path: Path) -> None:
    source = slice_file(tmp_path, 7)
    uid = str(dcmread(source).SOPInstanceUID)
    with running(tmp_path / "orthanc") as orthanc:
        orthanc.upload(source.read_bytes())
        orthanc.die()
        converted = orthanc.transcoded(uid, "1.2.840.10008.1.2.2")
        assert converted is not None
        assert dcmread(BytesIO(converted)).SOPInstanceUID == uid
