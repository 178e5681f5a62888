"""The courier with real peers that fall over, refuse, hang and come back: nothing lost, nothing twice after success."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pynetdicom import AE, evt
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from service.courier import Courier
from service.dicom.send import send_files
from service.domain.policy import DEFAULT_POLICY
from service.steward import Steward, serve
from service.store.engine import Store
from service.store.tables import StudyRow
from service.supervise import environment_of
from service.workflow import delivery
from tests import orthanc
from tests.conftest import ROOT
from tests.service.dicom.dicomweb import Request, item, serving
from tests.service.dicom.harness import peer_program, slice_file
from tests.service.dicom.test_stow import mute
from tests.service.workflow import workbench
from tests.service.workflow.outbox import Killed, Outbox
from tests.service.workflow.workbench import Clock, eventually

SEG, SR = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.34"


class FlakyStore(Store):
    """A database that can go away."""

    is_down = False

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        if self.is_down:
            raise OperationalError("BEGIN", {}, Exception("the database is down"))
        with super().transaction() as session:
            yield session


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FlakyStore]:
    with workbench.fresh_store("sqlite", tmp_path) as opened:
        yield FlakyStore(opened.engine)


def outbox_for(store: Store, folder: Path, *destinations: str, results: int = 1, **settings: Any) -> Outbox:
    """Results made and addressed to these destinations."""
    outbox = Outbox(store, folder, Clock(), destinations=",".join(destinations), **settings)
    for number in range(results):
        outbox.result(f"1.2.{number + 1}")
    assert outbox.make() == 2 * results
    return outbox


def courier(outbox: Outbox, number: int = 0) -> Courier:
    return Courier(outbox.store, outbox.settings, outbox.settings.destinations[number], outbox.clock)


def uids(outbox: Outbox) -> list[str]:
    """The SOP instance UIDs of every made object, in the order in which they were made."""
    return [str(dcmread(path).SOPInstanceUID) for path in sorted(outbox.settings.results_dir.rglob("*.dcm"))]


# dcmtk's storescp


class StoreScp:
    """dcmtk's storescp on a folder; its log tells how often each object came."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = workbench.free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._log = folder.with_suffix(".log")
        folder.mkdir()

    def start(self, *options: str) -> None:
        arguments = ["-d", *options, "--aetitle", "PACS", "--output-directory", str(self.folder), str(self.port)]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([peer_program("storescp"), *arguments], stdout=log, stderr=log)
        eventually(self._listens, what="storescp listens")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def held(self) -> list[str]:
        """What lies in its folder, whole."""
        return sorted(str(dcmread(path).SOPInstanceUID) for path in self.folder.iterdir())

    def came(self) -> Counter[str]:
        """How often each object was sent to it."""
        return Counter(re.findall(r"Affected SOP Instance UID +: ([0-9.]+)", self._log.read_text("utf-8", "replace")))

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self._log.read_text("utf-8", "replace")
        ports = Path("/proc/net/tcp").read_text().splitlines()[1:]  # connecting would leave an aborted association
        return any(line.split()[1].endswith(f":{self.port:04X}") and line.split()[3] == "0A" for line in ports)


@pytest.fixture
def scp(tmp_path: Path) -> Iterator[StoreScp]:
    peer = StoreScp(tmp_path / "pacs")
    try:
        yield peer
    finally:
        peer.kill()


def address(scp: StoreScp) -> str:
    return f"pacs=dicom://PACS@127.0.0.1:{scp.port}"


def test_storescp_receives_what_was_made(store: Store, tmp_path: Path, scp: StoreScp) -> None:
    outbox = outbox_for(store, tmp_path, address(scp))
    scp.start()
    carrier = courier(outbox)
    assert carrier.step() == 2
    assert outbox.states() == ["delivered", "delivered"]
    assert scp.held() == sorted(uids(outbox))
    assert carrier.step() == 0
    assert set(scp.came().values()) == {1}


def test_killed_and_restarted_in_the_middle_it_loses_nothing_and_gets_nothing_twice(
    store: Store, tmp_path: Path, scp: StoreScp
) -> None:
    """Meanwhile the other destination, a real Orthanc, goes on as if nothing had happened."""
    with orthanc.running(tmp_path / "orthanc") as pacs:
        other = f"archive=dicom://ORTHANC@127.0.0.1:{pacs.dicom_port}"
        outbox = outbox_for(store, tmp_path, address(scp), other, results=3)
        scp.start("--sleep-after", "3")
        first = courier(outbox)
        thread = threading.Thread(target=first.step)
        thread.start()
        eventually(lambda: "delivered" in outbox.states("pacs"), what="the first object is delivered")
        scp.kill()
        thread.join()
        done = [row.report_id for _, row in outbox.deliveries("pacs") if row.state == "delivered"]
        waiting = [row for _, row in outbox.deliveries("pacs") if row.state == "waiting"]
        assert 1 <= len(done) < 6
        assert len(done) + len(waiting) == 6
        assert all(row.last_error for row in waiting)
        before = scp.came()

        assert courier(outbox, 1).step() == 6
        assert outbox.states("archive") == ["delivered"] * 6
        assert pacs.instances() == sorted(uids(outbox))

        outbox.clock.advance(60)
        courier(outbox).step()  # nobody there
        assert outbox.states("pacs").count("waiting") == len(waiting)
        scp.start()
        outbox.clock.advance(3600)
        assert courier(outbox).step() == len(waiting)
        assert outbox.states("pacs") == ["delivered"] * 6
        assert scp.held() == sorted(uids(outbox))
        after = scp.came()
        assert sum(after.values()) - sum(before.values()) == len(waiting)
        assert max(after.values()) <= 2  # the one whose answer was cut off may have come twice
        assert len([uid for uid, times in after.items() if times == 2]) <= 1


def test_killed_between_the_peers_success_and_our_row_it_repeats_that_one_object(
    store: Store, tmp_path: Path, scp: StoreScp, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = outbox_for(store, tmp_path, address(scp), results=2)
    scp.start()
    with monkeypatch.context() as patched:
        patched.setattr(delivery, "delivered", killed)
        with pytest.raises(Killed):
            courier(outbox).step()
    assert outbox.states() == ["sending"] * 4
    assert len(scp.came()) == 1
    (repeated,) = scp.came()
    assert courier(outbox).step() == 0  # its courier may still live
    outbox.clock.advance(3600)
    assert courier(outbox).step() == 4
    assert outbox.states() == ["delivered"] * 4
    assert scp.came() == {uid: 2 if uid == repeated else 1 for uid in uids(outbox)}
    assert scp.held() == sorted(uids(outbox))


def test_an_answer_is_not_lost_with_the_database(store: FlakyStore, tmp_path: Path, scp: StoreScp) -> None:
    outbox = outbox_for(store, tmp_path, address(scp))
    scp.start()
    carrier = courier(outbox)
    hear = carrier._settle

    def settle(*answer: Any) -> None:
        store.is_down = True
        hear(*answer)

    carrier._settle = settle  # type: ignore[method-assign]
    assert carrier.step() == 1  # and then it stops: what it hears next could not be written either
    assert sum(scp.came().values()) == 1
    carrier._settle = hear  # type: ignore[method-assign]
    with pytest.raises(OperationalError):
        carrier.step()
    store.is_down = False
    outbox.clock.advance(3600)
    assert carrier.step() == 1
    assert outbox.states() == ["delivered", "delivered"]
    assert set(scp.came().values()) == {1}


# A peer with a mind of its own


@contextmanager
def peer(answers: Callable[[str], int], *sop_classes: str) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """A storage SCP that answers by SOP class; its port, and what came as (calling AE title, SOP class)."""
    came: list[tuple[str, str]] = []

    def store(event: Any) -> int:
        sop_class = str(event.request.AffectedSOPClassUID)
        came.append((event.assoc.requestor.ae_title, sop_class))
        return answers(sop_class)

    ae = AE("PEER")
    for sop_class in sop_classes or (SEG, SR):
        ae.add_supported_context(sop_class, "1.2.840.10008.1.2.1")
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    assert server is not None
    try:
        yield server.socket.getsockname()[1], came
    finally:
        server.shutdown()


def test_we_call_by_our_own_name(store: Store, tmp_path: Path) -> None:
    with peer(lambda _: 0) as (port, came):
        courier(outbox_for(store, tmp_path, f"pacs=dicom://PEER@127.0.0.1:{port}", ae_title="BONES")).step()
    assert came == [("BONES", SEG), ("BONES", SR)]


@pytest.mark.parametrize(
    ("status", "remark"),
    [(0xB000, "stored with warning 0xB000"), (0x0111, "the destination held it already")],
)
def test_a_warning_and_a_duplicate_count_as_delivered(store: Store, tmp_path: Path, status: int, remark: str) -> None:
    with peer(lambda _: status) as (port, _):
        outbox = outbox_for(store, tmp_path, f"pacs=dicom://PEER@127.0.0.1:{port}")
        courier(outbox).step()
    assert [(row.state, row.last_error) for _, row in outbox.deliveries()] == [("delivered", remark)] * 2


def test_a_refused_segmentation_holds_up_no_report(store: Store, tmp_path: Path) -> None:
    with peer(lambda sop_class: 0xA900 if sop_class == SEG else 0) as (port, _):
        outbox = outbox_for(store, tmp_path, f"pacs=dicom://PEER@127.0.0.1:{port}", results=2)
        courier(outbox).step()
    states = [(kind, row.state, row.last_error) for kind, row in outbox.deliveries()]
    assert sorted(states, key=str) == [
        ("SEG", "waiting", "refused with status 0xA900"),
        ("SEG", "waiting", "refused with status 0xA900"),
        ("SR", "delivered", None),
        ("SR", "delivered", None),
    ]


def test_a_peer_that_takes_no_segmentations_gets_the_report(store: Store, tmp_path: Path) -> None:
    with peer(lambda _: 0, SR) as (port, _):
        outbox = outbox_for(store, tmp_path, f"pacs=dicom://PEER@127.0.0.1:{port}")
        courier(outbox).step()
    (_, seg), (_, sr) = outbox.deliveries()
    assert (seg.state, sr.state) == ("waiting", "delivered")
    assert seg.last_error == "the peer takes no Segmentation Storage as Explicit VR Little Endian"


def test_a_damaged_file_is_not_sent(store: Store, tmp_path: Path) -> None:
    with peer(lambda _: 0) as (port, came):
        outbox = outbox_for(store, tmp_path, f"pacs=dicom://PEER@127.0.0.1:{port}")
        with outbox.file(outbox.report("SEG")).open("ab") as file:
            file.write(b"more")
        outbox.file(outbox.report("SR")).unlink()
        assert courier(outbox).step() == 2
    assert came == []
    told = {row.last_error for _, row in outbox.deliveries()}
    assert told == {"the file in the results folder is not the one that was made"}
    assert outbox.states() == ["waiting", "waiting"]


def test_what_was_not_foreseen_counts_for_one_object_only(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with peer(lambda _: 0) as (port, _):
        outbox = outbox_for(store, tmp_path, f"pacs=dicom://PEER@127.0.0.1:{port}")
        with monkeypatch.context() as patched:
            patched.setattr("service.courier.send_files", broken)
            assert courier(outbox).step() == 1
        assert [row.last_error for _, row in outbox.deliveries()] == ["RuntimeError: no idea", None]
        outbox.clock.advance(60)
        assert courier(outbox).step() == 2
    assert outbox.states() == ["delivered", "delivered"]


def test_a_slow_batch_is_not_taken_by_another_courier(store: Store, tmp_path: Path) -> None:
    """Each object takes long; the lease of those behind it is lengthened with every answer."""
    taken: list[delivery.Parcel] = []

    def slowly(_: str) -> int:
        outbox.clock.advance(200)
        with store.transaction() as session:
            taken.extend(delivery.claim(session, "pacs", now=outbox.clock.now, lease_seconds=1))
        return 0

    with peer(slowly) as (port, came):
        outbox = outbox_for(store, tmp_path, f"pacs=dicom://PEER@127.0.0.1:{port}", results=2)
        assert courier(outbox).step() == 4
    assert taken == []
    assert len(came) == 4
    assert outbox.states() == ["delivered"] * 4


def test_told_to_stop_it_gives_the_rest_back(store: Store, tmp_path: Path) -> None:
    with peer(lambda _: 0) as (port, came):
        outbox = outbox_for(store, tmp_path, f"pacs=dicom://PEER@127.0.0.1:{port}", results=2)
        assert courier(outbox).step(lambda: len(came) < 1) == 1
        assert [(row.state, row.attempts) for _, row in outbox.deliveries()] == [
            ("delivered", 0),
            *[("waiting", 0)] * 3,
        ]
        assert courier(outbox).step() == 3


def test_a_peer_that_stops_reading_does_not_hold_the_sender_for_ever(tmp_path: Path) -> None:
    """The kernel of a stopped process still acknowledges: only a time-out of ours ends it."""
    scp = StoreScp(tmp_path / "pacs")
    small, big = slice_file(tmp_path), slice_file(tmp_path, 2, PixelData=bytes(64 * 1024 * 1024))
    scp.start()
    try:
        assert scp.process is not None
        report = send_files(
            [small, big],
            host="127.0.0.1",
            port=scp.port,
            called="PACS",
            on_answer=lambda _: os.kill(scp.process.pid, signal.SIGSTOP) if scp.process else None,
            timeout_seconds=8.0,
        )
        assert report.sent == [small]
        assert [path for path, _ in report.failed] == [big]
    finally:
        scp.kill()


# STOW-RS


def test_a_dicomweb_service_receives_what_was_made(store: Store, tmp_path: Path) -> None:
    with orthanc.running(tmp_path / "orthanc", plugins=["libOrthancDicomWeb.so"]) as pacs:
        outbox = outbox_for(store, tmp_path, f"web={pacs.url}/dicom-web")
        assert courier(outbox).step() == 2
        assert pacs.instances() == sorted(uids(outbox))
        for path in outbox.settings.results_dir.rglob("*.dcm"):
            assert pacs.file(str(dcmread(path).SOPInstanceUID)) == path.read_bytes()
        pacs.kill()
        with outbox.store.transaction() as session:
            for _, row in outbox.deliveries():
                delivery.resend(session, row.id, actor="Dr. A", now=outbox.clock.now)
        assert courier(outbox).step() == 2
        assert outbox.states() == ["waiting", "waiting"]
        pacs.start()
        outbox.clock.advance(3600)
        assert courier(outbox).step() == 2
        assert outbox.states() == ["delivered", "delivered"]
        assert pacs.instances() == sorted(uids(outbox))


def test_a_dicomweb_service_that_held_it_already_is_not_asked_again(store: Store, tmp_path: Path) -> None:
    def duplicate(request: Request) -> tuple[int, Any]:
        return 409, {"00081198": {"vr": "SQ", "Value": [item(uid, failure=0x0111) for uid in request.uids]}}

    with serving(duplicate) as service:
        outbox = outbox_for(store, tmp_path, f"web={service.url()}")
        assert courier(outbox).step() == 2
    told = [(row.state, row.last_error) for _, row in outbox.deliveries()]
    assert told == [("delivered", "the destination held it already")] * 2


def test_a_password_never_reaches_the_rows(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(lambda _: (403, b"")) as service:
        outbox = outbox_for(store, tmp_path, f"web={service.url('dr:hushhush@')}")
        courier(outbox).step()
    assert {row.last_error for _, row in outbox.deliveries()} == {"HTTP 403: our user may not store here"}
    assert "hushhush" not in caplog.text
    assert "HTTP 403" in caplog.text


# The steward's threads


def test_a_destination_that_hangs_delays_nothing_else(
    store: Store, tmp_path: Path, scp: StoreScp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.steward.LEAVE_SECONDS", 0.5)
    scp.start()
    with mute() as (port, connections):
        outbox = Outbox(
            store,
            tmp_path,
            Clock(),
            destinations=f"hung=dicom://HUNG@127.0.0.1:{port},{address(scp)}",
            delivery_timeout_seconds=600,
        )
        outbox.result("1.2.1")
        steward = Steward(store, outbox.settings, DEFAULT_POLICY, lambda _: None, model_key=lambda _: "model")
        stop, ended = threading.Event(), []
        thread = threading.Thread(target=lambda: ended.append(serve(steward, store, outbox.settings, stop)))
        thread.start()
        eventually(lambda: outbox.states("pacs") == ["delivered"] * 2, what="the scribe makes, a courier delivers")
        eventually(lambda: connections, what="the other courier hangs")
        workbench.deliver(store, workbench.slices("7.7", "7.7.1"), outbox.clock.now)
        eventually(lambda: state(store, "7.7") == "queued", what="a study is closed")
        stop.set()
        thread.join()
        assert ended == [False]
        assert "sending" in outbox.states("hung")  # until the lease runs out
    hanging = [one for one in threading.enumerate() if one.name == "courier-hung"]
    for one in hanging:  # its connection is closed now
        one.join()


def test_the_steward_process_ends_when_told_though_a_peer_hangs(store: Store, tmp_path: Path) -> None:
    with mute() as (port, connections):
        outbox = Outbox(
            store, tmp_path, Clock(), destinations=f"hung=dicom://HUNG@127.0.0.1:{port}", delivery_timeout_seconds=600
        )
        outbox.result("1.2.1")
        settings = outbox.settings.model_copy(update={"database_url": str(store.engine.url)})
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "steward"],
            env={**os.environ, **environment_of(settings)},
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        try:
            eventually(lambda: connections, what="the courier hangs")
            process.terminate()
            assert process.wait(workbench.PATIENCE_SECONDS) == 0
        finally:
            process.kill()
            process.wait()
    assert "sending" in outbox.states("hung")  # its lease brings it back


def state(store: Store, study: str) -> str:
    with store.reading() as session:
        return session.query(StudyRow.state).filter(StudyRow.study_uid == study).scalar() or ""


def killed(*_: object, **__: object) -> Any:
    raise Killed


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("no idea")
