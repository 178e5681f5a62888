"""The shapes of the API's answers; an absent value is null, never a missing key."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from service.domain.result import Category, Interval
from service.domain.states import DeliveryState, JobState, ReferralState, ReportState, StudyState
from service.workflow.reading import Flow, Stage


def iso_day(value: str | None) -> str | None:
    """A DICOM DA as ISO 8601; what is no date stays as it was received, so that nothing is lost."""
    try:
        return f"{datetime.strptime(value, '%Y%m%d'):%Y-%m-%d}" if value else None
    except ValueError:
        return value


Day = Annotated[
    str | None, BeforeValidator(iso_day), Field(description="ISO 8601, YYYY-MM-DD; as received where it is no date")
]


class Shape(BaseModel):
    """Base: reads from the frozen values of `service.workflow.reading`."""

    model_config = ConfigDict(from_attributes=True, frozen=True)


class ReasonShape(Shape):
    """A stable code and the sentence for people."""

    code: str
    text: str


class PatientShape(Shape):
    """Who the study shows, as its DICOM headers say."""

    patient_id: str | None
    name: str | None = Field(description="DICOM PN, as received")
    sex: str | None
    birth_date: Day
    age_years: float | None


class ReferralShape(Shape):
    """Where the referral of a study stands."""

    state: ReferralState
    reason: str | None
    changed_at: datetime
    changed_by: str


class ValuesShape(Shape):
    """The patient's values of the result in force, with 90 % intervals."""

    bmd_g_cm2: float | None
    bmd_interval: Interval | None
    tbs: float | None
    tbs_interval: Interval | None
    hu_mean: float | None
    percent_yam: float | None
    levels_used: tuple[str, ...]


class WorklistItem(Shape):
    """One line of the worklist."""

    study_uid: str
    patient: PatientShape
    study_date: Day
    description: str | None
    accession_number: str | None
    synthetic: bool
    state: StudyState
    stage: Stage = Field(description="the category, or in-progress, or failed (needs attention)")
    revision: int
    received_at: datetime
    category: Category | None
    reasons: tuple[ReasonShape, ...]
    driver: str | None
    values: ValuesShape
    digital_model: bool = Field(description="the network is known from digital patients only")
    updating: bool = Field(description="a decision stands and newer slices are about to replace it")
    attempts: int
    referral: ReferralShape | None


class Worklist(Shape):
    """One page of the worklist."""

    items: tuple[WorklistItem, ...]
    total: int
    page: int
    page_size: int
    counts: dict[Stage, int]
    notice: str = "Investigational. Not a medical device. Confirm with DXA."


class SeriesShape(Shape):
    """One series with its verdict."""

    series_uid: str
    modality: str | None
    description: str | None
    number: int | None
    instance_count: int
    eligible: bool | None = Field(description="null until judged")
    chosen: bool
    reasons: tuple[ReasonShape, ...]
    cautions: tuple[ReasonShape, ...]


class JobShape(Shape):
    """One piece of work."""

    job_id: int
    kind: str
    series_uid: str
    revision: int
    state: JobState
    attempts: int
    worker: str | None
    last_error: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class ConflictShape(Shape):
    """An instance that came again with other bytes; the first copy was kept."""

    sop_instance_uid: str
    study_uid: str
    sha256: str
    calling_ae: str | None
    received_at: datetime


class ResultSummary(Shape):
    """One revision of a result."""

    result_id: int
    series_uid: str
    revision: int
    run: int = Field(description="counts repeated measurements of one revision")
    attempt: int
    superseded: bool
    category: str
    created_at: datetime


class DeliveryShape(Shape):
    """One DICOM object on its way to one destination."""

    id: int
    destination: str
    state: DeliveryState
    attempts: int = Field(description="since it was addressed, or since a person sent it again")
    due_at: datetime = Field(description="waiting: the next try; sending: the end of the courier's lease")
    delivered_at: datetime | None
    last_error: str | None = Field(description="the last failure; of a delivered object a remark of the destination")


class ReportShape(Shape):
    """One DICOM object (SR or SEG) of one result, and everywhere it was addressed to."""

    id: int
    result_id: int
    kind: Literal["SR", "SEG"]
    state: ReportState
    attempts: int
    sop_instance_uid: str | None
    last_error: str | None
    created_at: datetime
    made_at: datetime | None
    deliveries: tuple[DeliveryShape, ...]


class DestinationShape(Shape):
    """One destination and what waits for it."""

    name: str
    address: str | None = Field(description="without user and password; null: no longer configured")
    flow: Flow = Field(description="failing: nothing has arrived since the oldest failure; refusing: later objects did")
    waiting: int = Field(description="objects that it does not hold yet")
    failing: int = Field(description="those of them that were tried already")
    delivered: int
    oldest_waiting_at: datetime | None
    next_try_at: datetime | None
    failing_since: datetime | None
    last_success_at: datetime | None
    last_error: str | None


class OutboxShape(Shape):
    """Every destination, and how many objects are not made yet or cannot be made."""

    destinations: tuple[DestinationShape, ...]
    to_make: int
    not_made: int


class SendTo(BaseModel):
    """The destination, by its name in the settings, that an object is to be sent to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    destination: str = Field(min_length=1, max_length=64)


class RetryAnswer(Shape):
    """How many objects are tried now."""

    destination: str
    deliveries: int


class StudyShape(Shape):
    """One study as it came in."""

    study_uid: str
    patient: PatientShape
    study_date: Day
    description: str | None
    accession_number: str | None
    synthetic: bool
    state: StudyState
    revision: int
    choice: str | None
    calling_ae: str | None
    first_received_at: datetime
    last_received_at: datetime
    closed_at: datetime | None
    series: tuple[SeriesShape, ...]


class Studies(Shape):
    """One page of studies, the latest arrival first."""

    items: tuple[StudyShape, ...]
    total: int
    page: int
    page_size: int


class StudyDetailShape(StudyShape):
    """One study with its work, its results, its referral and what was refused of it."""

    category: Category | None
    referral: ReferralShape | None
    jobs: tuple[JobShape, ...]
    results: tuple[ResultSummary, ...]
    reports: tuple[ReportShape, ...] = Field(description="the DICOM objects of every result, the newest result first")
    conflicts: tuple[ConflictShape, ...]
    refusals: tuple[RefusalShape, ...] = Field(description="refused instances that named this study")


class RefusalShape(Shape):
    """Something turned away at the door."""

    at: datetime
    kind: str
    code: str
    text: str
    calling_ae: str | None
    peer_address: str | None
    sop_class_uid: str | None
    status: int | None


class ReferralAction(BaseModel):
    """A step of the referral loop; a dismissal needs its reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Literal["review", "order", "dismiss", "reopen", "dxa-done"]
    reason: str | None = Field(default=None, max_length=1000)


class RerunAnswer(Shape):
    """The study waits for the worker again."""

    study_uid: str
    state: StudyState


class RenumberAction(BaseModel):
    """Other names for the levels: a shift, or a mapping from each wrong name to the right one; and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shift: int | None = Field(
        default=None, ge=-2, le=2, description="places further down; 1: T12 is L1, L1 is L2; 0 confirms the names"
    )
    levels: dict[str, str] | None = Field(default=None, max_length=30, description='{"T12": "L1", "L1": "L2"}')
    reason: str = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _one_way(self) -> RenumberAction:
        if (self.shift is None) == (self.levels is None):
            raise ValueError("give either a shift or levels")
        return self


class RenumberAnswer(Shape):
    """The study waits for the worker under its new names."""

    study_uid: str
    state: StudyState
    revision: int


class Check(Shape):
    """One thing that must work."""

    ok: bool
    text: str


class Health(Shape):
    """Whether this installation can do its work."""

    status: Literal["ok", "failing"]
    checks: dict[str, Check] = {}


class AuditShape(Shape):
    """One line of the audit trail."""

    at: datetime
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    peer_address: str | None


class Audit(Shape):
    """One page of the audit trail, the latest first."""

    items: tuple[AuditShape, ...]
    total: int
    page: int
    page_size: int


class Problem(BaseModel):
    """An RFC 9457 problem document."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str | None = None
    instance: str | None = None


# result.json -------------------------------------------------------------------------------------------


class ResultVerdict(Shape):
    """Whether the CT could be judged."""

    eligible: bool
    reasons: tuple[ReasonShape, ...]


class ResultHeights(Shape):
    """Heights of the vertebral body in mm."""

    anterior: float | None
    middle: float | None
    posterior: float | None


class ResultLevel(Shape):
    """One vertebra."""

    valid: bool
    exclusions: tuple[ReasonShape, ...]
    bmd_g_cm2: float | None
    bmd_interval: Interval | None
    tbs: float | None
    tbs_interval: Interval | None
    hu_mean: float | None
    hu_roi_mm2: float | None
    heights_mm: ResultHeights
    quality: float | None = Field(default=None, description="of the outline, 0 to 1; 0.5 and more is good")


class ResultReference(Shape):
    """The young adults behind %YAM and T, and the density that was compared with them."""

    key: str
    version: str
    region: str
    levels: tuple[str, ...]
    bmd_g_cm2: float
    bmd_interval: Interval | None
    mean_g_cm2: float
    sd_g_cm2: float
    text: str


class ResultPatient(Shape):
    """The patient's values: means over the valid levels."""

    synthetic: bool
    bmd_g_cm2: float | None
    bmd_interval: Interval | None
    tbs: float | None
    tbs_interval: Interval | None
    hu_mean: float | None
    percent_yam: float | None
    t_score: float | None
    levels_used: tuple[str, ...]
    reference: ResultReference | None


class ResultReferenceHu(Shape):
    """HU of tissues that tell about the scanner, not about the bone."""

    vessel: float | None
    muscle: float | None
    fat: float | None


class ResultRenumbering(Shape):
    """Whose word the names of the levels are."""

    levels: dict[str, str] = Field(description="name before -> name now, of the result that was renumbered")
    by: str
    at: datetime
    reason: str
    result_id: int | None = Field(description="the result that was renumbered")


class ResultAnatomy(Shape):
    """The spine as found."""

    lumbar_count: int | None
    numbering: Literal["certain", "uncertain"]
    cobb_deg: float | None
    contrast: str | None
    reference_hu: ResultReferenceHu | None = None  # absent in results of earlier versions
    notes: tuple[str, ...]
    alternative: dict[str, str] | None = Field(
        default=None, description="uncertain numbering: each level's name when counted from the other end"
    )
    renumbered: ResultRenumbering | None = None
    quality_basis: Literal["network", "outline"] | None = Field(default=None, description="of the levels' quality")


class ResultDecision(Shape):
    """The decision, why, by whom, under which policy."""

    category: Category
    reasons: tuple[ReasonShape, ...]
    driver: Literal["network", "ct-attenuation", "none"]
    policy: str
    criteria: str | None


class ResultProvenance(Shape):
    """What made the result."""

    software: str | None
    model: str | None
    model_sha256: str | None
    segmenter: str | None
    segmenter_sha256: str | None
    device: str | None
    engine: str | None = None  # absent in results of earlier versions


class ResultDocument(Shape):
    """result.json."""

    study_uid: str | None
    series_uid: str | None
    revision: int | None
    verdict: ResultVerdict
    levels: dict[str, ResultLevel]
    patient: ResultPatient
    anatomy: ResultAnatomy
    decision: ResultDecision
    provenance: ResultProvenance
    timings_s: dict[str, float]


StudyDetailShape.model_rebuild()
