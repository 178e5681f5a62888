"""A bench for the outbox: results with real slices behind them, made and addressed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from sqlalchemy import select

from service.dicom.reports.codes import LEVEL_NAMES
from service.domain.policy import DEFAULT_POLICY
from service.settings import Settings
from service.store.engine import Store
from service.store.tables import DeliveryRow, ReportRow, ResultRow
from service.workflow import artefacts, reporting, rerun, screening
from tests.service.workflow import workbench

STUDY = "1.2.3"
SLICES, ROWS = 8, 32
CT = "1.2.840.10008.5.1.4.1.1.2"


class Killed(BaseException):
    """What a test raises where kill -9 would strike: nothing that the code does about errors may see it."""


class Outbox:
    """Results that were measured and recorded, and the settings by which their objects are made."""

    def __init__(self, store: Store, folder: Path, clock: workbench.Clock, **settings: Any) -> None:
        self.store = store
        self.clock = clock
        self.settings: Settings = workbench.settings(folder, **settings)

    def result(self, study: str = STUDY, *, labelled: bool = True, **header: Any) -> int:
        """A study received, closed, measured and recorded; the result's id. `header` changes its slices."""
        return self.measure(workbench.queued(self.store, self.clock, study), study, labelled=labelled, **header)

    def again(self, study: str = STUDY, **header: Any) -> int:
        """The same images measured again, because a person asked; the new result's id."""
        with self.store.transaction() as session:
            job = rerun.rerun(session, study, actor="tester", now=self.clock.now)
        return self.measure(job, study, **header)

    def measure(self, job: int, study: str = STUDY, *, labelled: bool = True, **header: Any) -> int:
        """A worker's part: the slices' names, the labels, the result."""
        held = workbench.claim(self.store, job, self.clock.now)
        assert held is not None
        name = f"{held.job_id}-{held.token}"
        folder = self.settings.results_dir / name
        folder.mkdir(parents=True)
        artefacts.keep_sources(folder, spooled(self.settings.spool_dir, study, **header))
        if labelled:
            assert artefacts.keep_labels(folder, some_labels(), LEVEL_NAMES.keys())
        with self.store.transaction() as session:
            recorded = screening.record(
                session,
                held,
                workbench.measured(),
                artefacts=name,
                labelled=labelled,
                policy=DEFAULT_POLICY,
                now=self.clock.now,
            )
            return recorded.id

    def make(self) -> int:
        """Make what is due; how many objects."""
        return reporting.make_reports(self.store, self.settings, self.clock)

    def report(self, kind: str, result: int | None = None) -> ReportRow:
        """The row of one object, of the newest result where none is named."""
        statement = select(ReportRow).where(ReportRow.kind == kind).order_by(ReportRow.result_id.desc())
        with self.store.reading() as session:
            if result is not None:
                statement = statement.where(ReportRow.result_id == result)
            return session.scalars(statement.limit(1)).one()

    def kinds(self, result: int) -> list[str]:
        """What a result promises."""
        with self.store.reading() as session:
            return sorted(session.scalars(select(ReportRow.kind).where(ReportRow.result_id == result)))

    def file(self, report: ReportRow) -> Path:
        """Where a made object lies."""
        assert report.path is not None, report.last_error
        return self.settings.results_dir / report.path

    def deliveries(self, destination: str | None = None) -> list[tuple[str, DeliveryRow]]:
        """Every delivery with the kind of its object, oldest first."""
        statement = select(ReportRow.kind, DeliveryRow).join(DeliveryRow, DeliveryRow.report_id == ReportRow.id)
        if destination is not None:
            statement = statement.where(DeliveryRow.destination == destination)
        with self.store.reading() as session:
            return [(kind, row) for kind, row in session.execute(statement.order_by(DeliveryRow.id))]

    def states(self, destination: str | None = None) -> list[str]:
        """Where each delivery stands."""
        return [row.state for _, row in self.deliveries(destination)]

    def change(self, alter: Callable[[ResultRow], None], result: int) -> None:
        """Alter a result's row, as nothing in the code would."""
        with self.store.transaction() as session:
            alter(session.get_one(ResultRow, result))


def spooled(
    spool: Path, study: str, *, spoil: Callable[[Dataset, int], None] | None = None, **header: Any
) -> list[str]:
    """Write one small axial CT, 3 mm apart, into a spool; the files' names relative to it."""
    folder = spool / "ct" / study
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(SLICES):
        dataset = ct_slice(study, number, **header)
        if spoil is not None:
            spoil(dataset, number)
        dataset.save_as(folder / f"{number}.dcm", enforce_file_format=True)
        names.append(f"ct/{study}/{number}.dcm")
    return names


def ct_slice(study: str, number: int, **header: Any) -> Dataset:
    """The header of one slice, and few pixels."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = CT
    dataset.file_meta.MediaStorageSOPInstanceUID = f"{study}.4.{number}"
    values: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "SOPClassUID": CT,
        "SOPInstanceUID": f"{study}.4.{number}",
        "StudyInstanceUID": study,
        "SeriesInstanceUID": f"{study}.4",
        "FrameOfReferenceUID": f"{study}.5",
        "Modality": "CT",
        "PatientID": "P1",
        "PatientName": "Doe^Jane",
        "PatientBirthDate": "19630203",
        "PatientSex": "F",
        "StudyDate": "20261123",
        "StudyTime": "080000",
        "StudyID": "77",
        "AccessionNumber": "A-77",
        "ReferringPhysicianName": "",
        "ImagePositionPatient": [-50.0, -50.0, 3.0 * number],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [0.8, 0.8],
        "SliceThickness": 3.0,
        "Rows": ROWS,
        "Columns": ROWS,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        "PixelData": bytes(2 * ROWS * ROWS),
    }
    for keyword, value in (values | header).items():
        if value is not None:
            setattr(dataset, keyword, value)
    return dataset


def some_labels() -> np.ndarray:
    """Three vertebrae on the slices: L4, L3 and L2 from below."""
    labels = np.zeros((SLICES, ROWS, ROWS), np.uint8)
    for number, value in enumerate((28, 29, 30)):
        labels[2 * number : 2 * number + 2, 8:20, 8:20] = value
    return labels
