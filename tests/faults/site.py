"""A small installation for faults: a real broker, database, listener and steward; workers are processes.

The steward runs in a thread (`stewarding`), or one step at a time (`work_until`) where a test must decide what arrives
before a study closes: then nothing depends on how fast anything is.
"""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from sqlalchemy import select

from service.dicom import syntaxes
from service.dicom.listener import Listener
from service.dicom.part10 import encode_file_meta
from service.dicom.send import SendReport, send_files
from service.domain.policy import DEFAULT_POLICY
from service.settings import Settings
from service.steward import Steward
from service.store.engine import Store, make_engine
from service.store.tables import JobRow, ReportRow, ResultRow, StudyRow
from service.workflow import reporting
from service.workflow.bell import Bell
from service.workflow.clock import utc_now
from service.workflow.intake import Door
from tests.service.dicom.harness import CT, PATIENCE_SECONDS, ct_slice, encoded, peer_program
from tests.service.workflow import workbench
from tests.service.workflow.workbench import Broker, WorkerProcess, deliver, eventually, slices

SLICE_MM = 3.0


class SupervisedWorker:
    """One worker process after the other, until told to stop."""

    def __init__(self, start: Callable[[], WorkerProcess]) -> None:
        self.stopping = threading.Event()
        self.deaths: list[int] = []  # exit codes of those that ended by themselves
        self.last_code: int | None = None  # of the one that was told to stop
        self._start = start

    def run(self) -> None:
        """Start, watch, start again; at the end SIGTERM."""
        while not self.stopping.is_set():
            with self._start() as worker:
                while worker.process.is_alive() and not self.stopping.wait(0.05):
                    pass
                if worker.process.exitcode is None:
                    worker.signal(signal.SIGTERM)
                    self.last_code = worker.wait()
                else:
                    self.deaths.append(worker.process.exitcode)


@dataclass
class Site:
    """One installation and what can be done to it."""

    settings: Settings
    store: Store
    broker: Broker
    log: Path
    steward: Steward
    door: Door

    # What comes in

    def receive(self, study: str = "1.2.3", n: int = 60) -> None:
        """Rows of a study, without files."""
        deliver(self.store, slices(study, f"{study}.4", n), utc_now())

    @contextmanager
    def listening(self) -> Iterator[Listener]:
        """The DICOM listener, on any free port."""
        listener = Listener(self.settings, self.door.commit, self.door.refuse)
        listener.start()
        try:
            yield listener
        finally:
            listener.stop(grace_seconds=1.0)

    # What is there

    def results(self, uid: str = "") -> list[ResultRow]:
        """Every result, in order; of one study where a UID is given."""
        with self.store.reading() as session:
            statement = select(ResultRow).join(StudyRow, ResultRow.study_id == StudyRow.id).order_by(ResultRow.id)
            return list(session.scalars(statement.where(StudyRow.study_uid == uid) if uid else statement))

    def jobs(self, uid: str = "") -> list[JobRow]:
        """Every job, in order; of one study where a UID is given."""
        with self.store.reading() as session:
            statement = select(JobRow).join(StudyRow, JobRow.study_id == StudyRow.id).order_by(JobRow.id)
            return list(session.scalars(statement.where(StudyRow.study_uid == uid) if uid else statement))

    def study(self, uid: str = "1.2.3") -> StudyRow:
        """The study's row."""
        with self.store.reading() as session:
            return session.scalars(select(StudyRow).where(StudyRow.study_uid == uid)).one()

    def study_state(self, uid: str = "1.2.3") -> str:
        """Where the study stands."""
        return self.study(uid).state

    def measured(self) -> list[str]:
        """How many slices each call of a worker's screen function was given, in order: one line a call."""
        file = self.settings.results_dir / "measured"
        return file.read_text().split() if file.exists() else []

    def report(self, uid: str, revision: int = 1) -> Dataset:
        """The SR of a result of this revision, made now where it is due."""
        reporting.make_reports(self.store, self.settings, utc_now)
        with self.store.reading() as session:
            statement = select(ReportRow).join(ResultRow).join(StudyRow, ResultRow.study_id == StudyRow.id)
            statement = statement.where(StudyRow.study_uid == uid, ResultRow.revision == revision)
            row = session.scalars(statement.where(ReportRow.kind == reporting.REPORT)).one()
        assert row.path is not None, f"{row.state}: {row.last_error}"
        return dcmread(self.settings.results_dir / row.path)

    # What works

    def worker(self, behaviour: str) -> WorkerProcess:
        """A worker process (see fake_worker.py); a context manager."""
        return WorkerProcess(self.settings, behaviour, self.log)

    @contextmanager
    def supervised_worker(self, behaviour: str) -> Iterator[SupervisedWorker]:
        """A worker that is started again whenever it ends, as in every installation."""
        supervised = SupervisedWorker(lambda: self.worker(behaviour))
        thread = threading.Thread(target=supervised.run)
        thread.start()
        try:
            yield supervised
        finally:
            supervised.stopping.set()
            thread.join()

    @contextmanager
    def stewarding(self) -> Iterator[None]:
        """The steward at work in a thread."""
        stop = threading.Event()
        thread = threading.Thread(target=self.steward.run, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def work_until(self, check: Callable[[], Any], what: str) -> None:
        """Let the steward take one step after the other until `check` holds."""

        def step() -> Any:
            self.steward.step()
            return check()

        eventually(step, what)


@contextmanager
def standing_site(folder: Path, kind: str = "sqlite", *, tcp: bool = False, **changes: object) -> Iterator[Site]:
    """A site whose steward does nothing yet."""
    with workbench.broker(folder / "broker", tcp=tcp) as broker:
        url = workbench.fresh_url(kind, folder)
        settings = workbench.settings(
            folder, database_url=url, broker_url=broker.url, dicom_port=0, disk_floor_bytes=0, **changes
        )
        store = Store(make_engine(url))
        bell = Bell(broker.url)
        steward = Steward(store, settings, DEFAULT_POLICY, bell.ring, ring_training=bell.ring_training)
        try:
            yield Site(settings, store, broker, folder / "worker.log", steward, Door(store, settings))
        finally:
            bell.close()
            store.close()


@contextmanager
def running_site(folder: Path, kind: str = "sqlite", *, tcp: bool = False, **changes: object) -> Iterator[Site]:
    """A site with its steward at work."""
    with standing_site(folder, kind, tcp=tcp, **changes) as site, site.stewarding():
        yield site


# Senders


def send(listener: Listener, *paths: Path, calling: str = "PACS") -> SendReport:
    """Files or folders to the listener, by our own sender."""
    host, port = listener.address
    return send_files(
        paths, host=host, port=port, called="OSTEOGATE", calling=calling, timeout_seconds=PATIENCE_SECONDS
    )


def storescu(listener: Listener, folder: Path, calling: str) -> subprocess.Popen[str]:
    """dcmtk's storescu on its way with a folder."""
    host, port = listener.address
    command = [
        peer_program("storescu"),
        "-aec",
        "OSTEOGATE",
        "-aet",
        calling,
        "-xe",
        "+sd",
        host,
        str(port),
        str(folder),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# Studies


def ct_dataset(study: str, k: int, **changes: Any) -> Dataset:
    """Slice `k` of an axial CT of 32 x 32 pixels that every rule of the default policy accepts."""
    attributes: dict[str, Any] = {
        "StudyInstanceUID": study,
        "SeriesInstanceUID": f"{study}.4",
        "SOPInstanceUID": f"{study}.4.{k + 1}",
        "FrameOfReferenceUID": f"{study}.5",
        "PatientID": f"ID-{study}",
        "PatientName": "Doe^Jane",
        "PatientSex": "F",
        "StudyDate": "20261123",
        "StudyTime": "101500",
        "Manufacturer": "SIEMENS",
        "ConvolutionKernel": "Br40",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SeriesNumber": 1,
        "InstanceNumber": k + 1,
        "SliceThickness": SLICE_MM,
        "ImagePositionPatient": [-150.0, -150.0, -300.0 + SLICE_MM * k],
        "PixelSpacing": [9.0, 9.0],
        "Rows": 32,
        "Columns": 32,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "PixelData": bytes(2 * 32 * 32),
    }
    return ct_slice(k + 1, **{**attributes, **changes})


def ct_file(folder: Path, study: str, k: int, **changes: Any) -> Path:
    """The same as a file."""
    dataset = ct_dataset(study, k, **changes)
    return part10(folder / f"{k + 1:04d}.dcm", encoded(dataset), str(dataset.SOPInstanceUID))


def ct_study(folder: Path, study: str, numbers: Sequence[int] = range(60), **changes: Any) -> list[Path]:
    """Several slices of one study in a folder."""
    return [ct_file(folder, study, k, **changes) for k in numbers]


def part10(
    path: Path,
    dataset: bytes,
    sop_instance: str,
    *,
    sop_class: str = CT,
    syntax: str = syntaxes.EXPLICIT_VR_LITTLE_ENDIAN,
) -> Path:
    """A Part 10 file around the bytes of a data set, whatever they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_file_meta(sop_class, sop_instance, syntax) + dataset)
    return path
