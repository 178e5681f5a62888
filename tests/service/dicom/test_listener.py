"""C-STORE and C-ECHO over TCP: with our own sender, with dcmtk's programs, and byte by byte."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from service.dicom import send as send_module
from service.dicom import syntaxes
from service.dicom.headers import read_facts
from service.dicom.listener import Listener
from service.dicom.part10 import read_file_meta
from service.dicom.received import Received, Stored
from service.dicom.send import SendReport, send_files
from service.settings import Peer
from tests.service.dicom.harness import (
    CT,
    PATIENCE_SECONDS,
    Database,
    RawPeer,
    assert_intact,
    ct_slice,
    encoded,
    listening,
    peer_program,
    slice_file,
    temp_files,
    wait_until,
)

CORNERSTONE = Path("ct-transfer-syntaxes/cornerstone3D")


def send(listener: Listener, *paths: Path, calling: str = "SENDER") -> SendReport:
    host, port = listener.address
    return send_files(
        paths, host=host, port=port, called="OSTEOGATE", calling=calling, timeout_seconds=PATIENCE_SECONDS
    )


def dcmtk(program: str, listener: Listener, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    host, port = listener.address
    command = [peer_program(program), "-aec", "OSTEOGATE", *map(str, arguments[:-1]), host, str(port)]
    return subprocess.run(
        [*command, str(arguments[-1])] if arguments else command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def data_set_of(path: Path) -> bytes:
    with path.open("rb") as stream:
        stream.seek(read_file_meta(stream).offset)
        return stream.read()


# Storing


def test_the_bytes_are_kept_as_they_came(tmp_path: Path) -> None:
    database = Database()
    source = slice_file(tmp_path / "in")
    with listening(tmp_path, database) as listener:
        report = send(listener, source)
    assert (report.failed, len(report.sent)) == ([], 1)
    (received,) = database.rows.values()
    assert_intact(tmp_path / "spool", received)
    assert data_set_of(tmp_path / "spool" / received.path) == data_set_of(source)
    assert read_facts(tmp_path / "spool" / received.path) == received.facts
    assert (received.calling_ae, received.peer_address) == ("SENDER", "127.0.0.1")
    assert temp_files(tmp_path / "spool") == []


def test_real_slices_in_every_syntax(tmp_path: Path, real_data: Path) -> None:
    """Every lossless and every refusable lossy syntax is stored as it is; deflated and retired ones are refused."""
    database = Database()
    sources = sorted((real_data / CORNERSTONE).glob("CTImage.dcm_*"))
    with listening(tmp_path, database) as listener:
        report = send(listener, *sources)
        wait_until(lambda: "SYNTAX_REFUSED" in database.codes())
    sent_syntaxes = {received.facts.transfer_syntax_uid for received in [*database.rows.values(), *database.conflicts]}
    refused = {path.name.rsplit("_", 1)[1].removesuffix(".dcm").rsplit(".", 1)[1] for path, _ in report.failed}
    assert refused == {"99", "53", "55"}
    assert len(report.sent) == 12
    assert sent_syntaxes >= {*syntaxes.UNCOMPRESSED, *syntaxes.ALWAYS_LOSSY}
    assert {"1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.90"} <= sent_syntaxes


def test_segmentation_is_taken(tmp_path: Path, real_data: Path) -> None:
    database = Database()
    with listening(tmp_path, database) as listener:
        report = send(listener, real_data / "dcmqi-ct3slice" / "23x38x3" / "seg" / "label.seg")
    assert report.failed == []
    assert {received.facts.modality for received in database.rows.values()} == {"SEG"}


def test_refused_classes_are_recorded_for_people(tmp_path: Path, real_data: Path) -> None:
    database = Database()
    with listening(tmp_path, database) as listener:
        for _ in range(2):
            report = send(listener, real_data / CORNERSTONE / "no-pixel-spacing.dcm")
        wait_until(lambda: bool(database.refusals))
    assert "takes no Ultrasound Image Storage" in report.failed[0][1]
    (refusal,) = database.refusals  # the second time is no news
    assert (refusal["kind"], refusal["code"]) == ("context", "SOP_CLASS_REFUSED")
    assert refusal["sop_class_uid"] == "1.2.840.10008.5.1.4.1.1.6.1"


def test_many_associations_share_commits(tmp_path: Path) -> None:
    database = Database()
    quick_commit = database.commit

    def commit(batch: list[Received]) -> list[Stored]:
        """The first commit lasts until every sender's first slice lies in the spool, soon to be queued."""
        if not database.batches:
            wait_until(lambda: len(list((tmp_path / "spool").rglob("*.dcm"))) == 4)
        time.sleep(0.05)
        return quick_commit(batch)

    database.commit = commit  # type: ignore[method-assign,assignment]
    with listening(tmp_path, database) as listener:
        folders = [tmp_path / f"in{sender}" for sender in range(4)]
        for sender, folder in enumerate(folders):
            for number in range(5):
                slice_file(folder, 10 * sender + number)
        threads = [threading.Thread(target=send, args=(listener, folder)) for folder in folders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(database.rows) == 20
    assert max(database.batches) > 1
    for received in database.rows.values():
        assert_intact(tmp_path / "spool", received)


def test_one_bad_row_does_not_fail_its_neighbours() -> None:
    from service.dicom.committer import CommitError, Committer

    gate = threading.Event()

    def commit(batch: list[str]) -> list[Stored]:
        gate.wait(PATIENCE_SECONDS)
        if "bad" in batch:
            raise ValueError("bad row")
        return [Stored.NEW] * len(batch)

    committer = Committer(commit)  # type: ignore[arg-type]
    committer.start()
    outcomes: dict[str, object] = {}

    def store(name: str) -> None:
        try:
            outcomes[name] = committer.store(name, timeout_seconds=PATIENCE_SECONDS)  # type: ignore[arg-type]
        except CommitError as error:
            outcomes[name] = type(error)

    threads = [threading.Thread(target=store, args=(name,)) for name in ("first", "a", "bad", "b")]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    gate.set()
    for thread in threads:
        thread.join()
    committer.stop()
    assert outcomes == {"first": Stored.NEW, "a": Stored.NEW, "bad": CommitError, "b": Stored.NEW}


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (Stored.STUDY_FULL, "0xC101"),
        (Stored.SERIES_MISMATCH, "0xC102"),
        (Stored.INSTANCE_MISMATCH, "0xC103"),
    ],
)
def test_a_refusal_of_the_database_is_permanent_and_leaves_no_file(tmp_path: Path, answer: Stored, status: str) -> None:
    database = Database()
    database.answer = answer
    with listening(tmp_path, database) as listener:
        report = send(listener, slice_file(tmp_path / "in"))
    assert status in report.failed[0][1]
    assert database.codes() == [answer.value]
    assert list((tmp_path / "spool").rglob("*.dcm")) == []


def test_an_unreadable_header_is_refused_alone(tmp_path: Path) -> None:
    database = Database()
    with listening(tmp_path, database) as listener, RawPeer(listener) as peer:
        peer.associate()
        nested = b"\x08\x00\x15\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 3000
        assert peer.store(nested, "1.2") == 0xC000
        assert peer.store(encoded(ct_slice(2)), "1.2.3.4.2") == 0
    assert database.codes() == ["HEADER_UNREADABLE"]


def test_no_answer_is_lost_to_a_reactor_that_dawdles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pynetdicom's reactor says that it is paused, and on a busy machine takes our answer all the same."""

    class Dawdling(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            held = super().wait(timeout)
            time.sleep(0.05)
            return held

    def dawdle(event: Any) -> None:
        association, send_msg = event.assoc, event.assoc.dimse.send_msg
        association._reactor_checkpoint = Dawdling()
        association._reactor_checkpoint.set()
        association.dimse.send_msg = lambda *arguments: send_msg(*arguments) or time.sleep(0.2)

    monkeypatch.setattr(send_module, "_prepare_socket", dawdle)
    for number in range(10):
        slice_file(tmp_path / "in", number)
    database = Database()
    with listening(tmp_path, database) as listener:
        assert send(listener, tmp_path / "in").failed == []
    assert len(database.rows) == 10


# Verification


def test_echo_is_truthful(tmp_path: Path) -> None:
    database = Database()
    with listening(tmp_path, database) as listener:
        assert dcmtk_echo(listener) == 0
    with listening(tmp_path, database, disk_floor_bytes=2**60) as listener:
        assert dcmtk_echo(listener) != 0


def dcmtk_echo(listener: Listener) -> int:
    host, port = listener.address
    command = [peer_program("echoscu"), "-v", "-aec", "OSTEOGATE", host, str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return 0 if "Received Echo Response (Success)" in done.stdout + done.stderr else 1


# dcmtk's storescu

SYNTAX_OPTIONS = {
    "LittleEndianImplicitTransferSyntax_1.2.840.10008.1.2": "-xi",
    "LittleEndianExplicitTransferSyntax_1.2.840.10008.1.2.1": "-xe",
    "BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2": "-xb",
    "RLELosslessTransferSyntax_1.2.840.10008.1.2.5": "-xr",
    "JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70": "-xs",
    "JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50": "-xy",
    "JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51": "-xx",
    "JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80": "-xt",
    "JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81": "-xu",
    "JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90": "-xv",
    "JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91": "-xw",
}


@pytest.mark.peer("dcmtk")
@pytest.mark.parametrize("name", SYNTAX_OPTIONS)
def test_storescu_in_each_syntax(tmp_path: Path, real_data: Path, name: str) -> None:
    source = real_data / CORNERSTONE / f"CTImage.dcm_{name}.dcm"
    database = Database()
    with listening(tmp_path, database) as listener:
        done = dcmtk("storescu", listener, SYNTAX_OPTIONS[name], source)
    assert done.returncode == 0, done.stderr
    (received,) = database.rows.values()
    assert received.facts.transfer_syntax_uid == name.rsplit("_", 1)[1]
    assert_intact(tmp_path / "spool", received)
    assert received.facts.rows == 512


@pytest.mark.peer("dcmtk")
def test_storescu_sends_a_folder_and_hears_refusals(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(10):
        slice_file(folder, number)
    database = Database()
    with listening(tmp_path, database) as listener:
        assert dcmtk("storescu", listener, "-xe", "+sd", folder).returncode == 0
        assert len(database.rows) == 10
        database.answer = Stored.STUDY_FULL
        assert dcmtk("storescu", listener, "-xe", "+sd", folder).returncode != 0


# Coming and going


def test_stop_ends_idle_associations_and_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    listening_long = listening(tmp_path, Database(), idle_seconds=1e6, handshake_seconds=1e6)
    with listening_long as listener, RawPeer(listener) as peer, RawPeer(listener) as silent:
        assert peer.associate() == 2
        listener.stop(grace_seconds=1e6)  # it does not wait for those who are idle
        assert peer.is_closed()
        assert silent.is_closed()
    wait_until(lambda: threading.active_count() <= before)


def test_associations_are_counted_per_peer_and_in_all(tmp_path: Path) -> None:
    database = Database()
    limits = {"max_associations": 3, "max_associations_per_peer": 2}
    with listening(tmp_path, database, **limits) as listener:
        peers = [RawPeer(listener) for _ in range(5)]
        answers = [peer.associate(calling=name) for peer, name in zip(peers, "AAABB", strict=True)]
        assert answers == [2, 2, 3, 2, 3]
        wait_until(lambda: len(database.refusals) == 2)
        assert database.codes() == ["TOO_MANY_FROM_PEER", "TOO_MANY_ASSOCIATIONS"]
        peers[0].socket.close()
        wait_until(lambda: listener.open_associations == 2)
        with RawPeer(listener) as late:
            assert late.associate(calling="C") == 2
        for peer in peers:
            peer.socket.close()


def test_rejections_are_proper_and_nothing_follows_them(tmp_path: Path) -> None:
    database = Database()
    with listening(tmp_path, database, peers=(Peer(ae_title="PACS"),)) as listener, RawPeer(listener) as peer:
        from tests.service.dicom.harness import associate_request

        peer.send(associate_request(calling="EVIL"))
        assert peer.read_pdu() == b"\x03\x00\x00\x00\x00\x04\x00\x01\x01\x03"
        assert peer.read_pdu() == b""
        assert listener.open_associations == 0


def test_constants_are_what_the_standard_says() -> None:
    assert CT == "1.2.840.10008.5.1.4.1.1.2"
    assert syntaxes.DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN not in {s for many in syntaxes.ACCEPTED.values() for s in many}
