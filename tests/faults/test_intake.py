"""Faults of the way in (RULES 7-10, 12, 13, 20, 21): injected, not imagined."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from pynetdicom.acse import ACSE

from service.dicom.listener import Listener
from service.dicom.send import SendReport, send_files
from service.dicom.spool import Spool
from service.settings import Peer
from tests.service.dicom.harness import (
    PATIENCE_SECONDS,
    Database,
    RawPeer,
    assert_intact,
    associate_request,
    ct_slice,
    encoded,
    is_closed,
    is_open,
    listening,
    p_data,
    slice_file,
    store_command,
    temp_files,
    wait_until,
)

STEPS = ("created", "written", "synced", "renamed", "durable")


def send(listener: Listener, *paths: Path, calling: str = "HEALTHY") -> SendReport:
    host, port = listener.address
    return send_files(
        paths, host=host, port=port, called="OSTEOGATE", calling=calling, timeout_seconds=PATIENCE_SECONDS
    )


def is_cut_off(peer: RawPeer, content: list[bytes], *, pause_seconds: float = 0.0) -> bool:
    """True where the listener ends the connection before all of `content` is sent."""
    try:
        for piece in content:
            peer.send(piece)
            time.sleep(pause_seconds)
    except OSError:
        return True
    return False


def settled(figure: Callable[[], int]) -> int:
    """Wait until a figure has begun to grow and then stays as it is for a while."""
    wait_until(lambda: figure() > 0)
    last = -1
    while (now := figure()) != last:
        last = now
        time.sleep(0.7)
    return last


# 7


def test_database_down_is_retryable_and_recovers(tmp_path: Path) -> None:
    database = Database()
    database.is_down = True
    source = slice_file(tmp_path / "in")
    with listening(tmp_path, database) as listener:
        report = send(listener, source)
        assert "0xA700" in report.failed[0][1]
        assert database.rows == {}
        database.is_down = False
        assert send(listener, source).failed == []
    (received,) = database.rows.values()
    assert_intact(tmp_path / "spool", received)
    assert len(list((tmp_path / "spool").rglob("*.dcm"))) == 1


# 8


def test_disk_full_mid_slice_is_retryable_and_leaves_no_litter(tmp_path: Path) -> None:
    room = {"bytes": 300}

    def write_bytes(descriptor: int, rest: memoryview) -> int:
        if room["bytes"] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = os.write(descriptor, rest[: room["bytes"]])
        room["bytes"] -= written
        return written

    database = Database()
    source = slice_file(tmp_path / "in")
    spool = Spool(tmp_path / "spool", 0, write_bytes=write_bytes)
    with listening(tmp_path, database, spool=spool) as listener:
        report = send(listener, source)
        assert "0xA700" in report.failed[0][1]
        assert temp_files(tmp_path / "spool") == []
        assert (database.rows, database.codes()) == ({}, ["SPOOL_FULL"])
        room["bytes"] = 10**9
        assert send(listener, source).failed == []
    assert_intact(tmp_path / "spool", *database.rows.values())


# 9

KILLED = """
import json, os, signal, sys
from pathlib import Path
from service.dicom.listener import Listener
from service.dicom.received import Stored
from service.dicom.spool import Spool
from service.settings import Settings

folder, fatal_step, fatal_write = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
writes = 0

def die_at(step):
    global writes
    writes += step == "created"
    if step == fatal_step and writes == fatal_write:
        os.kill(os.getpid(), signal.SIGKILL)

def commit(batch):
    if fatal_step == "committing" and writes == fatal_write:
        os.kill(os.getpid(), signal.SIGKILL)
    with open(folder / "rows", "a") as rows:
        for received in batch:
            rows.write(json.dumps([received.facts.sop_instance_uid, received.path, received.sha256]) + "\\n")
        rows.flush()
        os.fsync(rows.fileno())
    if fatal_step == "committed" and writes == fatal_write:
        os.kill(os.getpid(), signal.SIGKILL)
    return [Stored.NEW] * len(batch)

settings = Settings(data_dir=folder, dicom_port=0, disk_floor_bytes=0)
listener = Listener(settings, commit, lambda **_: None, spool=Spool(settings.spool_dir, 0, step=die_at))
listener.start()
print(listener.address[1], flush=True)
signal.pause()
"""


@pytest.mark.parametrize("step", [*STEPS, "committing", "committed"])
def test_kill_9_at_every_step_loses_nothing_that_was_acknowledged(tmp_path: Path, step: str) -> None:
    sources = [slice_file(tmp_path / "in", number) for number in range(1, 4)]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), step, "3"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        port = int(process.stdout.readline())
        report = send_files(
            [*sources], host="127.0.0.1", port=port, called="OSTEOGATE", timeout_seconds=PATIENCE_SECONDS
        )
        assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    assert len(report.sent) == 2
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert {f"1.2.3.4.{number}" for number in (1, 2)} <= {uid for uid, _, _ in rows}
    spool = Spool(tmp_path / "spool", 0)
    spool.sweep(older_than_seconds=0)
    assert temp_files(tmp_path / "spool") == []
    for _, path, sha256 in rows:  # every row's file is whole; so is every file without a row
        assert Path(path).stem == sha256
    for file in (tmp_path / "spool").rglob("*.dcm"):
        assert spool.write((file.read_bytes(),)).sha256 == file.stem
    files = {file.stem for file in (tmp_path / "spool").rglob("*.dcm")}
    assert {sha256 for _, _, sha256 in rows} <= files

    database = Database()
    with listening(tmp_path, database) as listener:
        assert send(listener, *sources).failed == []
    assert len(list((tmp_path / "spool").rglob("*.dcm"))) == 3


# 10


def test_two_hundred_silent_peers_before_association_cost_no_threads_and_delay_nobody(tmp_path: Path) -> None:
    threads = threading.active_count()
    with listening(tmp_path, Database()) as listener, ExitStack() as open_peers:
        silent = [open_peers.enter_context(socket.create_connection(listener.address)) for _ in range(200)]
        for connection in silent:
            connection.sendall(b"\x01")
        assert send(listener, slice_file(tmp_path / "in")).failed == []
        assert threading.active_count() < threads + 100
        assert all(is_open(connection) for connection in silent)  # they were there all the while


def test_two_hundred_silent_peers_before_association_are_freed_by_the_deadline(tmp_path: Path) -> None:
    with listening(tmp_path, Database(), handshake_seconds=0.5) as listener, ExitStack() as open_peers:
        silent = [open_peers.enter_context(socket.create_connection(listener.address)) for _ in range(200)]
        for connection in silent:
            with suppress(ConnectionError):  # the first ones may be cut off already
                connection.sendall(b"\x01")
        assert all(is_closed(connection) for connection in silent)


LIMITS = {"max_associations": 32, "max_associations_per_peer": 8}


def silent_associations(listener: Listener, open_peers: ExitStack) -> list[RawPeer]:
    """Two hundred times: associate, where that is granted send one byte, then nothing more."""
    accepted = []
    for _ in range(200):
        peer = open_peers.enter_context(RawPeer(listener))
        if peer.associate(calling="SILENT") == 2:
            accepted.append(peer)
            with suppress(ConnectionError):  # the first ones may be cut off already
                peer.send(b"\x04")
    return accepted


def test_two_hundred_silent_peers_after_association_delay_nobody(tmp_path: Path) -> None:
    with listening(tmp_path, Database(), **LIMITS) as listener, ExitStack() as open_peers:
        accepted = silent_associations(listener, open_peers)
        assert send(listener, slice_file(tmp_path / "in")).failed == []
        assert len(accepted) == 8
        assert all(is_open(peer.socket) for peer in accepted)  # they were there all the while


def test_two_hundred_silent_peers_after_association_are_freed_by_the_deadline(tmp_path: Path) -> None:
    with listening(tmp_path, Database(), idle_seconds=0.5, **LIMITS) as listener, ExitStack() as open_peers:
        accepted = silent_associations(listener, open_peers)
        assert len(accepted) >= 8
        assert all(peer.is_closed() for peer in accepted)
        wait_until(lambda: listener.open_associations == 0)


@pytest.mark.parametrize("where", ["request", "command", "between fragments"])
def test_slowloris_is_freed_by_the_minimum_rate(tmp_path: Path, where: str) -> None:
    """A byte now and then defeats an idle timeout; it must not defeat the deadline of the whole."""
    database = Database()
    limits = {"handshake_seconds": 1.5} if where == "request" else {"idle_seconds": 1.5}
    limits["minimum_bytes_per_second"] = 100_000
    with listening(tmp_path, database, **limits) as listener, RawPeer(listener) as peer:
        drops = [bytes((byte,)) for byte in associate_request()]
        if where != "request":
            assert peer.associate() == 2
            drops = [bytes((byte,)) for byte in p_data(store_command("1.2.3"), 3)]
        if where == "between fragments":
            peer.send(p_data(store_command("1.2.3"), 3))
            drops = [p_data(b"\x00\x00", 0)] * 100
        assert is_cut_off(peer, drops, pause_seconds=0.1)  # long before the last of more than a hundred drops
        wait_until(lambda: listener.open_associations == 0)
        if where != "request":
            wait_until(lambda: database.codes() == ["TOO_SLOW"])


# 12


def test_a_pdu_length_of_4_gib_is_aborted_unread(tmp_path: Path) -> None:
    database = Database()
    with listening(tmp_path, database) as listener:
        with RawPeer(listener) as peer:
            peer.send(b"\x01\x00\xff\xff\xff\xff")
            assert peer.read_pdu()[:1] == b"\x07"
        with RawPeer(listener) as peer:
            assert peer.associate() == 2
            peer.send(b"\x04\x00\xff\xff\xff\xff")
            assert peer.read_pdu()[:1] == b"\x07"
            assert peer.is_closed()
        wait_until(lambda: database.codes() == ["PDU_REFUSED"])
        assert send(listener, slice_file(tmp_path / "in")).failed == []


def test_an_endless_data_set_is_aborted_in_bounded_memory(tmp_path: Path) -> None:
    database = Database()
    tracemalloc.start()
    try:
        with listening(tmp_path, database, max_instance_bytes=1_000_000) as listener:
            with RawPeer(listener) as peer:
                assert peer.associate() == 2
                peer.send(p_data(store_command("1.2.3"), 3))
                assert is_cut_off(peer, [p_data(bytes(100_000), 0)] * 2000)
            wait_until(lambda: database.codes() == ["INSTANCE_TOO_LARGE"])
            wait_until(lambda: listener.open_associations == 0)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert database.rows == {}


def test_pipelined_requests_wait_their_turn_in_bounded_memory(tmp_path: Path) -> None:
    """No asynchronous window is negotiated; a peer that sends on regardless is not read, then served in order."""
    database = Database()
    gate = threading.Event()
    commit = database.commit

    def slow_commit(batch):  # type: ignore[no-untyped-def]
        gate.wait(PATIENCE_SECONDS)
        return commit(batch)

    database.commit = slow_commit  # type: ignore[method-assign]
    with listening(tmp_path, database) as listener, RawPeer(listener) as peer:
        assert peer.associate() == 2
        sent = []

        def pipeline() -> None:
            for number in range(1, 201):
                dataset = encoded(ct_slice(number, Rows=256, Columns=256, PixelData=bytes(2**17 - 2**14)))
                peer.send(p_data(store_command(f"1.2.3.4.{number}", message_id=number), 3) + p_data(dataset, 2))
                sent.append(number)

        sender = threading.Thread(target=pipeline)
        sender.start()
        settled(lambda: len(sent))
        assert len(sent) < 150  # held back by TCP: most of it is still with the peer
        gate.set()
        assert [peer.read_status() for _ in range(200)] == [0] * 200
        sender.join()
    assert len(database.rows) == 200


# 13


def test_the_same_bytes_twice_are_one_row(tmp_path: Path) -> None:
    database = Database()
    source = slice_file(tmp_path / "in")
    with listening(tmp_path, database) as listener:
        assert send(listener, source).failed == []
        assert send(listener, source).failed == []
    assert (len(database.rows), database.conflicts) == (1, [])
    assert len(list((tmp_path / "spool").rglob("*.dcm"))) == 1


def test_other_bytes_are_kept_aside_never_instead(tmp_path: Path) -> None:
    database = Database()
    with listening(tmp_path, database) as listener:
        assert send(listener, slice_file(tmp_path / "in")).failed == []
        assert send(listener, slice_file(tmp_path / "in", PatientID="P2")).failed == []
    (first,) = database.rows.values()
    (second,) = database.conflicts
    assert (first.facts.patient_id, second.facts.patient_id) == ("P1", "P2")
    assert assert_intact(tmp_path / "spool", first) != assert_intact(tmp_path / "spool", second)


# 20

EVIL_UIDS = ["../../x", "/etc/x", "1.2\x00.3", "1." + "2" * 63, "1..2", "1.2.", "", " ", "１.２"]


@pytest.mark.filterwarnings("ignore:.*")  # pydicom warns of each of these UIDs
@pytest.mark.parametrize("uid", EVIL_UIDS)
@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
def test_an_evil_uid_is_refused_and_reaches_no_path(tmp_path: Path, uid: str, keyword: str) -> None:
    database = Database()
    dataset = encoded(ct_slice(1)).replace(*_swap(keyword, uid))
    with listening(tmp_path / "data", database) as listener, RawPeer(listener) as peer:
        assert peer.associate() == 2
        status = peer.store(dataset, uid if keyword == "SOPInstanceUID" else "1.2.3.4.1")
        assert status in (0x0117, 0xA900, 0xC000, -1)
        if status == -1:  # an empty instance UID in the command makes no valid request: pynetdicom ends it
            assert not uid.strip()
        else:
            assert peer.store(encoded(ct_slice(2)), "1.2.3.4.2") == 0  # the association lives
            assert len(database.refusals) == 1
    assert {str(file.parent.relative_to(tmp_path)).split("/")[1] for file in tmp_path.rglob("*") if file.is_file()} <= {
        "spool"
    }
    assert len(list(tmp_path.rglob("*.dcm"))) == len(database.rows) <= 1


def _swap(keyword: str, uid: str) -> tuple[bytes, bytes]:
    element, value = {
        "SOPInstanceUID": (b"\x08\x00\x18\x00", b"1.2.3.4.1\x00"),
        "StudyInstanceUID": (b"\x20\x00\x0d\x00", b"1.2.3\x00"),
        "SeriesInstanceUID": (b"\x20\x00\x0e\x00", b"1.2.3.4\x00"),
    }[keyword]
    evil = uid.encode()
    evil += b"\x00" * (len(evil) % 2)
    return tuple(element + b"UI" + len(text).to_bytes(2, "little") + text for text in (value, evil))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ({"sop_instance": "1.2.3.4.9"}, "SOP_INSTANCE_MISMATCH"),
        ({"sop_class": "1.2.840.10008.5.1.4.1.1.2.1"}, "SOP_CLASS_MISMATCH"),
    ],
)
def test_command_and_data_set_must_agree(tmp_path: Path, command: dict[str, str], code: str) -> None:
    database = Database()
    with listening(tmp_path, database) as listener, RawPeer(listener) as peer:
        assert peer.associate() == 2
        assert peer.store(encoded(ct_slice(1)), **{"sop_instance": "1.2.3.4.1", **command}) == 0xA900
    assert (database.codes(), database.rows) == ([code], {})
    assert database.refusals[0]["status"] == 0xA900


# 21


def test_a_rejection_that_comes_back_at_once_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It closes the connection before pynetdicom's requestor has looked at it."""
    ask = ACSE.send_request

    def ask_and_dawdle(acse: ACSE) -> None:
        ask(acse)
        time.sleep(0.3)

    monkeypatch.setattr(ACSE, "send_request", ask_and_dawdle)
    source = slice_file(tmp_path / "in")
    with listening(tmp_path, Database(), peers=(Peer(ae_title="PACS", network="127.0.0.0/8"),)) as listener:
        assert "Calling AE title not recognised" in send(listener, source, calling="EVIL").failed[0][1]


def test_unknown_peers_are_rejected_and_recorded(tmp_path: Path) -> None:
    database = Database()
    peers = (Peer(ae_title="PACS", network="127.0.0.0/8"), Peer(ae_title="FAR", network="10.0.0.0/8"))
    source = slice_file(tmp_path / "in")
    with listening(tmp_path, database, peers=peers) as listener:
        assert send(listener, source, calling="PACS").failed == []
        assert "rejected" in send(listener, source, calling="FAR").failed[0][1]
        assert "rejected" in send(listener, source, calling="EVIL").failed[0][1]
        host, port = listener.address
        report = send_files([source], host=host, port=port, called="OTHER", calling="PACS")
        assert "Called AE title not recognised" in report.failed[0][1]
        wait_until(lambda: len(database.refusals) == 3)
    assert database.codes() == ["PEER_ADDRESS_WRONG", "CALLING_AE_UNKNOWN", "CALLED_AE_UNKNOWN"]
    assert [(one["kind"], one["calling_ae"], one["peer_address"]) for one in database.refusals[:2]] == [
        ("association", "FAR", "127.0.0.1"),
        ("association", "EVIL", "127.0.0.1"),
    ]
    assert len(database.rows) == 1
