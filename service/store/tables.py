"""The tables. ORM classes live here and nowhere else; times are UTC, JSON columns hold plain values."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    DateTime,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from service.domain.states import (
    DeliveryState,
    DxaReportState,
    JobState,
    ReferralState,
    ReportState,
    RunState,
    StudyState,
)

NAMING = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes on every database (SQLite keeps no zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("naive datetime refused: times in the store are UTC")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or value.tzinfo is not None:
            return value if value is None else value.astimezone(UTC)
        return value.replace(tzinfo=UTC)


class Table(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime(),
        dict[str, Any]: JSON(),
        list[Any]: JSON(),
    }


class StudyRow(Table):
    """One DICOM study; patient facts as its first instance told them."""

    __tablename__ = "studies"

    id: Mapped[int] = mapped_column(primary_key=True)
    study_uid: Mapped[str] = mapped_column(String(64), unique=True)
    patient_id: Mapped[str | None] = mapped_column(String(255), index=True)
    patient_name: Mapped[str | None] = mapped_column(Text)
    patient_sex: Mapped[str | None] = mapped_column(String(16))
    patient_birth_date: Mapped[str | None] = mapped_column(String(8))
    patient_age_years: Mapped[float | None]
    study_date: Mapped[str | None] = mapped_column(String(8))
    description: Mapped[str | None] = mapped_column(Text)
    accession_number: Mapped[str | None] = mapped_column(String(64), index=True)
    synthetic: Mapped[bool] = mapped_column(default=False)
    state: Mapped[str] = mapped_column(String(16), default=StudyState.RECEIVING.value, index=True)
    revision: Mapped[int] = mapped_column(default=0)  # raised each time the study closes with new instances
    choice: Mapped[str | None] = mapped_column(Text)  # which series was chosen and why, for people
    policy: Mapped[str | None] = mapped_column(String(80))  # label of the policy that judged its series
    calling_ae: Mapped[str | None] = mapped_column(String(16))
    first_received_at: Mapped[datetime]
    last_received_at: Mapped[datetime] = mapped_column(UtcDateTime(), index=True)
    closed_at: Mapped[datetime | None]

    series: Mapped[list[SeriesRow]] = relationship(back_populates="study", order_by="SeriesRow.id")
    results: Mapped[list[ResultRow]] = relationship(back_populates="study", order_by="ResultRow.id")
    referral: Mapped[ReferralRow | None] = relationship(back_populates="study")


class SeriesRow(Table):
    """One series with its verdict; every series gets one, chosen or not."""

    __tablename__ = "series"

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"), index=True)
    series_uid: Mapped[str] = mapped_column(String(64), unique=True)
    modality: Mapped[str | None] = mapped_column(String(16))
    description: Mapped[str | None] = mapped_column(Text)
    number: Mapped[int | None]
    instance_count: Mapped[int] = mapped_column(default=0)
    eligible: Mapped[bool | None]  # None until judged
    reasons: Mapped[list[Any]] = mapped_column(default=list)  # [{"code", "text"}], refusals
    cautions: Mapped[list[Any]] = mapped_column(default=list)  # [{"code", "text"}]
    chosen: Mapped[bool] = mapped_column(default=False)

    study: Mapped[StudyRow] = relationship(back_populates="series")
    instances: Mapped[list[InstanceRow]] = relationship(back_populates="series", order_by="InstanceRow.id")


class InstanceRow(Table):
    """One received SOP instance, durable in the spool before this row exists."""

    __tablename__ = "instances"

    id: Mapped[int] = mapped_column(primary_key=True)
    series_id: Mapped[int] = mapped_column(ForeignKey("series.id"), index=True)
    sop_instance_uid: Mapped[str] = mapped_column(String(64), unique=True)
    sha256: Mapped[str] = mapped_column(String(64))  # of the bytes in the spool
    path: Mapped[str] = mapped_column(Text)  # relative to the spool
    size_bytes: Mapped[int]
    transfer_syntax_uid: Mapped[str] = mapped_column(String(64))
    facts: Mapped[dict[str, Any]]  # InstanceFacts.as_json
    calling_ae: Mapped[str | None] = mapped_column(String(16))
    peer_address: Mapped[str | None] = mapped_column(String(64))
    received_at: Mapped[datetime]

    series: Mapped[SeriesRow] = relationship(back_populates="instances")


class ConflictRow(Table):
    """A SOP instance that arrived again with other bytes: kept, shown, never silently dropped."""

    __tablename__ = "conflicts"

    id: Mapped[int] = mapped_column(primary_key=True)
    sop_instance_uid: Mapped[str] = mapped_column(String(64), index=True)
    study_uid: Mapped[str] = mapped_column(String(64), index=True)
    sha256: Mapped[str] = mapped_column(String(64))
    path: Mapped[str] = mapped_column(Text)
    calling_ae: Mapped[str | None] = mapped_column(String(16))
    received_at: Mapped[datetime]

    __table_args__ = (UniqueConstraint("sop_instance_uid", "sha256"),)


class RefusalRow(Table):
    """Something turned away at the door: an association, a context or an instance; shown on /intake."""

    __tablename__ = "refusals"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime(), index=True)
    kind: Mapped[str] = mapped_column(String(16))  # association, context, instance
    code: Mapped[str] = mapped_column(String(40))
    text: Mapped[str] = mapped_column(Text)
    calling_ae: Mapped[str | None] = mapped_column(String(64))
    peer_address: Mapped[str | None] = mapped_column(String(64))
    sop_class_uid: Mapped[str | None] = mapped_column(String(64))
    status: Mapped[int | None]  # the DIMSE status that was answered


class JobRow(Table):
    """A piece of work. Key = series, instance set and model: the same work is never queued twice."""

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))  # screen
    key: Mapped[str] = mapped_column(String(64), unique=True)  # sha256 of (series, instance-set hash, model)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"), index=True)
    series_id: Mapped[int] = mapped_column(ForeignKey("series.id"))
    segmentation_id: Mapped[int | None] = mapped_column(ForeignKey("instances.id"))  # a supplied SEG of the study
    rerun_of_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id"))  # the same work, asked for again by a person
    renumbering: Mapped[dict[str, Any] | None]  # Renumbering: the kept outlines are measured under other names
    revision: Mapped[int]
    state: Mapped[str] = mapped_column(String(16), default=JobState.WAITING.value)
    attempts: Mapped[int] = mapped_column(default=0)
    token: Mapped[int] = mapped_column(default=0)  # fencing token: raised by every claim
    worker: Mapped[str | None] = mapped_column(String(128))
    lease_until: Mapped[datetime | None]
    deadline_at: Mapped[datetime | None]
    rung_at: Mapped[datetime | None]  # when the bell was last rung for it
    last_error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    study: Mapped[StudyRow] = relationship()
    series: Mapped[SeriesRow] = relationship()

    __table_args__ = (Index("ix_jobs_state_lease", "state", "lease_until"),)


class ResultRow(Table):
    """One result document; a newer revision supersedes it, visibly."""

    __tablename__ = "results"

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"), index=True)
    series_id: Mapped[int] = mapped_column(ForeignKey("series.id"))
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), unique=True)
    revision: Mapped[int]
    run: Mapped[int] = mapped_column(default=0)  # counts repeated measurements of one revision
    attempt: Mapped[int]
    superseded: Mapped[bool] = mapped_column(default=False, index=True)
    document: Mapped[dict[str, Any]]  # result.json
    artefacts: Mapped[str | None] = mapped_column(Text)  # folder relative to results_dir
    category: Mapped[str] = mapped_column(String(16), index=True)
    bmd_g_cm2: Mapped[float | None]
    tbs: Mapped[float | None]
    hu_mean: Mapped[float | None]
    created_at: Mapped[datetime]

    study: Mapped[StudyRow] = relationship(back_populates="results")
    series: Mapped[SeriesRow] = relationship()
    reports: Mapped[list[ReportRow]] = relationship(back_populates="result", order_by="ReportRow.id")


class ReportRow(Table):
    """One DICOM object of one result (SEG or SR): promised in the result's transaction, made by the steward."""

    __tablename__ = "reports"

    id: Mapped[int] = mapped_column(primary_key=True)
    result_id: Mapped[int] = mapped_column(ForeignKey("results.id"))
    kind: Mapped[str] = mapped_column(String(8))  # SEG, SR
    state: Mapped[str] = mapped_column(String(16), default=ReportState.WAITING.value, index=True)
    attempts: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[datetime]
    last_error: Mapped[str | None] = mapped_column(Text)
    sop_instance_uid: Mapped[str | None] = mapped_column(String(64))
    path: Mapped[str | None] = mapped_column(Text)  # relative to the results folder
    sha256: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime]
    made_at: Mapped[datetime | None]

    result: Mapped[ResultRow] = relationship(back_populates="reports")
    deliveries: Mapped[list[DeliveryRow]] = relationship(back_populates="report", order_by="DeliveryRow.id")

    __table_args__ = (UniqueConstraint("result_id", "kind"),)


class DeliveryRow(Table):
    """The outbox: one object for one destination, kept until that destination has said that it holds it."""

    __tablename__ = "deliveries"

    id: Mapped[int] = mapped_column(primary_key=True)
    report_id: Mapped[int] = mapped_column(ForeignKey("reports.id"))
    destination: Mapped[str] = mapped_column(String(64))  # its name in the settings
    state: Mapped[str] = mapped_column(String(16), default=DeliveryState.WAITING.value)
    attempts: Mapped[int] = mapped_column(default=0)  # since the last success or resend
    token: Mapped[int] = mapped_column(default=0)  # fencing token: raised by every claim
    due_at: Mapped[datetime]  # waiting: when to try (again); sending: when the lease runs out
    last_error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime]
    delivered_at: Mapped[datetime | None]

    report: Mapped[ReportRow] = relationship(back_populates="deliveries")

    __table_args__ = (
        UniqueConstraint("report_id", "destination"),
        Index("ix_deliveries_destination_state_due", "destination", "state", "due_at"),
    )


class ReferralRow(Table):
    """The referral of a flagged study and where it stands."""

    __tablename__ = "referrals"

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"), unique=True)
    state: Mapped[str] = mapped_column(String(16), default=ReferralState.OPEN.value, index=True)
    reason: Mapped[str | None] = mapped_column(Text)  # of a dismissal
    changed_at: Mapped[datetime]
    changed_by: Mapped[str] = mapped_column(String(64))

    study: Mapped[StudyRow] = relationship(back_populates="referral")


class AuditRow(Table):
    """Append-only: who did what, to what, when, from where. A trigger refuses to change or delete a row."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime(), index=True)
    actor: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(40))
    subject: Mapped[str] = mapped_column(String(128))
    detail: Mapped[dict[str, Any]] = mapped_column(default=dict)
    peer_address: Mapped[str | None] = mapped_column(String(64))


class UserRow(Table):
    """A person who may log in; never deleted, since the audit names them."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64))  # as the audit shows it
    name_key: Mapped[str] = mapped_column(String(192), unique=True)  # casefolded: no two people differ by case alone
    password_hash: Mapped[str] = mapped_column(String(255))  # argon2id, salt and costs included
    roles: Mapped[list[Any]]
    disabled: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime]
    password_changed_at: Mapped[datetime]

    sessions: Mapped[list[SessionRow]] = relationship(back_populates="user", cascade="all, delete-orphan")


class SessionRow(Table):
    """One browser of one user; the cookie holds the token, this row only its hash."""

    __tablename__ = "sessions"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    token_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime]
    seen_at: Mapped[datetime]  # the last thing that the person did, to the minute

    user: Mapped[UserRow] = relationship(back_populates="sessions")


class KeyRow(Table):
    """A program's API key: only its hash is kept; never deleted, since the audit names it."""

    __tablename__ = "api_keys"

    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(String(60), unique=True)  # "key:<label>" in the audit
    key_sha256: Mapped[str] = mapped_column(
        String(64), unique=True
    )  # of 256 random bits: a slow hash would add nothing
    roles: Mapped[list[Any]]
    created_at: Mapped[datetime]
    created_by: Mapped[str] = mapped_column(String(64))
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    used_at: Mapped[datetime | None]  # to the minute


class DxaImportRow(Table):
    """One delivery of DXA results: a file, or one call of the API."""

    __tablename__ = "dxa_imports"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    actor: Mapped[str] = mapped_column(String(64))
    layout: Mapped[str] = mapped_column(String(32))
    name: Mapped[str | None] = mapped_column(Text)  # of the file, where it has one
    sha256: Mapped[str | None] = mapped_column(String(64))  # of the file's text
    rows: Mapped[int]
    accepted: Mapped[int]
    duplicates: Mapped[int]
    refused: Mapped[int]
    passed_over: Mapped[int]


class DxaScanRow(Table):
    """One DXA result of the lumbar spine, as the device told it and as recomputed over the included levels."""

    __tablename__ = "dxa_scans"

    id: Mapped[int] = mapped_column(primary_key=True)
    import_id: Mapped[int] = mapped_column(ForeignKey("dxa_imports.id"), index=True)
    line: Mapped[int | None]  # of the file
    identity: Mapped[str] = mapped_column(String(64), unique=True)  # DxaScan.identity: the same scan is stored once
    content: Mapped[str] = mapped_column(String(64))  # DxaScan.content: tells a repetition from a contradiction
    patient_id: Mapped[str] = mapped_column(String(64), index=True)
    scan_date: Mapped[date]
    manufacturer: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(64))
    region: Mapped[str] = mapped_column(String(32))
    scan_id: Mapped[str] = mapped_column(String(64))
    sex: Mapped[str] = mapped_column(String(1))
    synthetic: Mapped[bool]
    total_bmd_g_cm2: Mapped[float | None]  # what the device said
    total_bmc_g: Mapped[float | None]
    total_area_cm2: Mapped[float | None]
    total_t_score: Mapped[float | None]
    total_z_score: Mapped[float | None]
    total_tbs: Mapped[float | None]
    by_area_g_cm2: Mapped[float | None]  # recomputed: sum of BMC over sum of area, as devices do
    mean_g_cm2: Mapped[float]  # recomputed: mean of the levels, as Yoshida 2023 does

    levels: Mapped[list[DxaLevelRow]] = relationship(back_populates="scan", order_by="DxaLevelRow.level")


class DxaLevelRow(Table):
    """One vertebra of one DXA result; a level that is not valid is kept and never compared."""

    __tablename__ = "dxa_levels"

    id: Mapped[int] = mapped_column(primary_key=True)
    scan_id: Mapped[int] = mapped_column(ForeignKey("dxa_scans.id"))
    level: Mapped[str] = mapped_column(String(4))
    validity: Mapped[str] = mapped_column(String(24))
    bmd_g_cm2: Mapped[float | None]
    bmc_g: Mapped[float | None]
    area_cm2: Mapped[float | None]
    t_score: Mapped[float | None]
    z_score: Mapped[float | None]
    tbs: Mapped[float | None]

    scan: Mapped[DxaScanRow] = relationship(back_populates="levels")

    __table_args__ = (UniqueConstraint("scan_id", "level"),)


class DxaReportRow(Table):
    """A structured report by others: promised to be read in the transaction that records it, read by the steward."""

    __tablename__ = "dxa_reports"

    id: Mapped[int] = mapped_column(primary_key=True)
    instance_id: Mapped[int] = mapped_column(ForeignKey("instances.id"), unique=True)
    state: Mapped[str] = mapped_column(String(16), default=DxaReportState.WAITING.value, index=True)
    reasons: Mapped[list[Any]] = mapped_column(default=list)  # [{"code", "text"}]
    scan_id: Mapped[int | None] = mapped_column(ForeignKey("dxa_scans.id"))
    read_at: Mapped[datetime | None]

    instance: Mapped[InstanceRow] = relationship()


class ModelRow(Table):
    """One model package known here; its files lie in the folder of packages under its hash."""

    __tablename__ = "models"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    version: Mapped[str] = mapped_column(String(64))
    sha256: Mapped[str] = mapped_column(String(64), unique=True)  # of the package's manifest, which hashes the rest
    path: Mapped[str] = mapped_column(Text)  # relative to the folder of packages (shipped: to that of the release)
    origin: Mapped[str] = mapped_column(String(16))  # shipped, trained, imported
    run_id: Mapped[str | None] = mapped_column(String(64))  # of the training run
    synthetic_only: Mapped[bool]
    finished: Mapped[bool]  # its training came to its end
    provenance: Mapped[dict[str, Any]]  # what the manifest says of the training; of an imported one, who signed it
    hashes: Mapped[dict[str, Any]]  # SHA-256 of every file of package and reports
    signature: Mapped[str | None] = mapped_column(String(64))  # this site's, over the hashes
    verdict: Mapped[dict[str, Any] | None]  # of this site's gate; None: not judged here
    judged_at: Mapped[datetime | None]
    shadow_since: Mapped[datetime | None]  # it sees live studies beside the one in force, and decides nothing
    created_at: Mapped[datetime]
    created_by: Mapped[str] = mapped_column(String(64))


class ActiveModelRow(Table):
    """The pointer to the model in force, with its history: the row with the highest number counts.

    Two people who move it at once write the same number: one of them is turned away.
    """

    __tablename__ = "active_model"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    action: Mapped[str] = mapped_column(String(16))  # shipped, promote, rollback
    restores: Mapped[int | None]  # a rollback: the number of the row whose model is back
    reason: Mapped[str | None] = mapped_column(Text)
    at: Mapped[datetime]
    by: Mapped[str] = mapped_column(String(64))

    model: Mapped[ModelRow] = relationship()


class ShadowRow(Table):
    """What a model in shadow said of a study, beside the result that counts; no page of the study shows it."""

    __tablename__ = "shadow_values"

    id: Mapped[int] = mapped_column(primary_key=True)
    result_id: Mapped[int] = mapped_column(ForeignKey("results.id"))
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    beside_sha256: Mapped[str] = mapped_column(String(64), index=True)  # of the model that made the result
    bmd_g_cm2: Mapped[float]  # means over the levels that the result used
    tbs: Mapped[float | None]  # null: the model measures BMD alone
    levels: Mapped[dict[str, Any]]  # {"L1": [BMD, TBS or null], ...}
    created_at: Mapped[datetime]

    __table_args__ = (UniqueConstraint("result_id", "model_id"),)


class TrainingRunRow(Table):
    """One training run: what was asked for, its frozen manifest, where it stands, and what came of it."""

    __tablename__ = "training_runs"

    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(String(16), default=RunState.WAITING.value, index=True)
    going: Mapped[int | None] = mapped_column(unique=True)  # 1 while it waits or runs, else null: one goes at a time
    reason: Mapped[str] = mapped_column(Text)  # why a person wants it
    created_at: Mapped[datetime]
    created_by: Mapped[str] = mapped_column(String(64))
    configuration: Mapped[str] = mapped_column(String(64))  # the shipped one that it began with
    start: Mapped[str] = mapped_column(String(16))
    people: Mapped[str] = mapped_column(String(16))  # patients or digital
    patients: Mapped[int]  # who train
    locked: Mapped[int]  # patients who judge
    vertebrae: Mapped[int]  # of both
    manifest: Mapped[dict[str, Any]]
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    stage: Mapped[str | None] = mapped_column(String(16))
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)
    lost: Mapped[list[Any]] = mapped_column(default=list)  # [{"study_uid", "level", "code", "text"}] while cutting
    attempts: Mapped[int] = mapped_column(default=0)
    token: Mapped[int] = mapped_column(default=0)  # fencing token: raised by every claim
    worker: Mapped[str | None] = mapped_column(String(128))
    lease_until: Mapped[datetime | None]
    deadline_at: Mapped[datetime | None]
    rung_at: Mapped[datetime | None]
    cancel_asked_at: Mapped[datetime | None]
    last_error: Mapped[str | None] = mapped_column(Text)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    package_path: Mapped[str | None] = mapped_column(Text)  # this, and the reports, relative to the data folder
    package_sha256: Mapped[str | None] = mapped_column(String(64))
    candidate_report: Mapped[str | None] = mapped_column(Text)
    champion_report: Mapped[str | None] = mapped_column(Text)
    champion: Mapped[str | None] = mapped_column(String(128))  # the model in force that judged beside it
    champion_sha256: Mapped[str | None] = mapped_column(String(64))


class TrainingEpochRow(Table):
    """One point of one network's curve."""

    __tablename__ = "training_epochs"

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("training_runs.id"))
    network: Mapped[str] = mapped_column(String(32))
    epoch: Mapped[int]
    step: Mapped[int]
    training_loss: Mapped[float]
    validation_loss: Mapped[float]
    bmd_r: Mapped[float | None]
    tbs_r: Mapped[float | None]

    __table_args__ = (UniqueConstraint("run_id", "network", "epoch"),)


class TrainingPatientRow(Table):
    """Where a patient belongs for good: who once judged never trains, and the other way round."""

    __tablename__ = "training_patients"

    patient_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    part: Mapped[str] = mapped_column(String(16))  # training, locked
    tenth: Mapped[int | None]
    run_id: Mapped[int] = mapped_column(ForeignKey("training_runs.id"))  # the first that saw them
