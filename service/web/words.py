"""How values are told to people: names, dates, numbers and the words of the product.

The wording follows one rule: no verdict of health and no finding of disease is ever pronounced. A flag says
"Consider DXA"; its absence says "No flag" and nothing more.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date as date_type
from datetime import datetime
from typing import Any

from service.domain.access import Right
from service.domain.criteria import Scale, cuts_on
from service.domain.figures import digits_beside
from service.domain.monitoring import Estimate
from service.domain.policy import Policy
from service.domain.reasons import Code
from service.domain.result import NO_FLAG_RULES_NOTHING_OUT, Interval
from service.domain.states import (
    DeliveryState,
    DxaReportState,
    ReferralState,
    ReportState,
    RunStage,
    RunState,
    StudyState,
)
from service.workflow.models import ModelLine
from service.workflow.reading import (
    Address,
    DestinationLine,
    Flow,
    JobLine,
    Outgoing,
    Patient,
    ReportLine,
    ResultLine,
    SeriesLine,
    Stage,
)

DISCLAIMER = "Investigational. Not a medical device. Confirm with DXA."
DIGITAL_MODEL = "network trained on digital patients only, not validated on people"
NO_FLAG = NO_FLAG_RULES_NOTHING_OUT
NO_TBS = "TBS not measured by this model"
MISSING = "–"


@dataclass(frozen=True, slots=True)
class Chip:
    """A decision or a verdict as people see it: an icon, two words, and a colour by class name."""

    tone: str
    text: str


STAGES = {
    Stage.REFER: Chip("refer", "Consider DXA"),
    Stage.INDETERMINATE: Chip("indeterminate", "Indeterminate"),
    Stage.NOT_ASSESSABLE: Chip("not-assessable", "Not assessable"),
    Stage.NO_FLAG: Chip("no-flag", "No flag"),
    Stage.IN_PROGRESS: Chip("in-progress", "In progress"),
    Stage.FAILED: Chip("failed", "Needs attention"),
}

STUDY_STATES = {
    StudyState.RECEIVING: Chip("in-progress", "Receiving"),
    StudyState.QUEUED: Chip("in-progress", "Queued"),
    StudyState.SCREENED: Chip("done", "Screened"),
    StudyState.NOT_SCREENED: Chip("not-assessable", "Not screened"),
    StudyState.QUARANTINED: Chip("failed", "Quarantined"),
}

REFERRAL_STATES = {
    ReferralState.OPEN: "Open",
    ReferralState.REVIEWED: "Reviewed",
    ReferralState.ORDERED: "DXA ordered",
    ReferralState.DXA_DONE: "DXA done",
    ReferralState.DISMISSED: "Dismissed",
}

ACTIONS = {
    "review": "Mark reviewed",
    "order": "Mark ordered",
    "dxa-done": "Mark DXA done",
    "dismiss": "Dismiss",
    "reopen": "Reopen",
}

DRIVERS = {
    "network": "Decided by the network's BMD",
    "ct-attenuation": "Decided by the CT-attenuation rule on L1",
    "none": "Nothing could be decided from this CT",
}

OUTGOING = {
    Outgoing.NOT_MADE: Chip("failed", "Report not made"),
    Outgoing.FAILING: Chip("failed", "Not delivered yet"),
    Outgoing.TO_MAKE: Chip("in-progress", "Report is being made"),
    Outgoing.ON_ITS_WAY: Chip("in-progress", "On its way"),
    Outgoing.DELIVERED: Chip("delivered", "Delivered"),
    Outgoing.KEPT: Chip("not-assessable", "Kept here"),
}

KINDS = {"SR": "Report", "SEG": "Segmentation"}

# What stands beside an object that is no CT: told calmly, since nothing went wrong.
OBJECT_VERDICTS = {
    Code.OWN_OUTPUT: Chip("quiet", "ours, came back: ignored"),
    Code.SEGMENTATION_USED: Chip("chosen", "segmentation used"),
    Code.SEGMENTATION_NOT_USED: Chip("quiet", "segmentation not used"),
    Code.DXA_ACCEPTED: Chip("chosen", "DXA result stored"),
    Code.DXA_DUPLICATE: Chip("quiet", "DXA result known before"),
}

DXA_REPORTS = {
    DxaReportState.WAITING: Chip("quiet", "to be read"),
    DxaReportState.ACCEPTED: Chip("chosen", "stored"),
    DxaReportState.DUPLICATE: Chip("quiet", "known before"),
    DxaReportState.REFUSED: Chip("refused", "refused"),
}

WHY_UNPAIRED = {
    Code.PAIR_NO_DXA: "the patient has no DXA result, or the CT no patient ID",
    Code.PAIR_NO_DATE: "the CT does not tell its date",
    Code.PAIR_NOT_MEASURED: "no level of the CT is valid and named with certainty, or it was not measured",
    Code.PAIR_SYNTHETIC_MIXED: "one is of a digital patient, the other of a person",
    Code.PAIR_OTHER_SEX: "CT and DXA tell different sexes",
    Code.PAIR_ISSUERS: "the patient ID was given by more than one issuer",
    Code.PAIR_OTHER_DENSITOMETER: "measured by another maker's densitometer than this site pairs",
    Code.PAIR_OUTSIDE_WINDOW: "every DXA result is too far away in time",
    Code.PAIR_NO_COMMON_LEVEL: "no level counts on both sides",
    Code.PAIR_AMBIGUOUS: "nothing decides between equally near ones",
    Code.PAIR_NEARER_CT: "another CT of the patient is nearer to the DXA result",
}

MODEL_ORIGINS = {
    "shipped": "Ships with this release",
    "trained": "Trained at this site",
    "imported": "Trained at another site",
}
MODEL_MOVES = {"shipped": "In force from the start,", "promote": "Promoted", "rollback": "Brought back"}
RUN_STATES = {
    RunState.WAITING: Chip("in-progress", "Waiting"),
    RunState.RUNNING: Chip("in-progress", "Running"),
    RunState.FINISHED: Chip("done", "Finished"),
    RunState.FAILED: Chip("failed", "Failed"),
    RunState.CANCELLED: Chip("not-assessable", "Cancelled"),
}
RUN_STAGES = {
    RunStage.CUTTING: "Cutting vertebrae out of the stored CTs",
    RunStage.TRAINING: "Training",
    RunStage.JUDGING: "Judging on the locked patients",
}

# What a page that refuses is called; the API keeps HTTP's own phrases.
REFUSALS = {
    401: "Log in first",
    403: "Not open to you",
    404: "Nothing here",
    405: "Nothing here",
    409: "Not done",
    413: "Too large",
    421: "Not at this address",
    422: "Something is missing or does not fit",
    429: "Too many requests",
    500: "Something broke",
    503: "Not at this moment",
}
RIGHTS = {
    Right.READ: "look at worklist and studies",
    Right.REFER: "decide about referrals",
    Right.OPERATE: "have something measured or sent again",
    Right.DXA: "bring in DXA results",
    Right.MODELS: "change which model is in force",
    Right.AUDIT: "read the audit",
    Right.WATCH: "see how the model does",
    Right.TRAIN: "look at or start training runs",
}

SEXES = {"F": "female", "M": "male", "O": "other"}


def not_granted(right: Right) -> str:
    """That a person's role does not open this, and who can help."""
    return f"Your role does not let you {RIGHTS[right]}. Whoever runs this installation can give you one that does."


def misfit(field: str, kind: str, limits: Mapping[str, Any]) -> str:
    """What is wrong with one field of a form; `kind` and `limits` as the validation names them."""
    name = f"“{field.replace('_', ' ')}”"
    if kind in ("missing", "string_too_short"):
        return f"{name} is missing."
    if kind == "string_too_long":
        return f"{name} is longer than {limits.get('max_length')} characters."
    if kind.startswith(("int", "float")):
        return f"{name} is not a number."
    if kind in ("greater_than_equal", "less_than_equal", "greater_than", "less_than"):
        return f"{name} is out of range."
    return f"{name} is not one of the choices that the page offers."


def model_chip(model: ModelLine) -> Chip:
    """Where a model stands, in two words."""
    if model.in_force:
        return Chip("done", "In force")
    if model.origin == "shipped":
        return Chip("not-assessable", "Not in force")
    if model.verdict is None:
        return Chip("indeterminate", "Not judged here")
    return Chip("no-flag", "Passed the gate") if model.promotable else Chip("failed", "Gate shut")


def targets(told: Iterable[str]) -> str:
    """What a run learns, or a model measures."""
    return "BMD and TBS" if "tbs" in told else "BMD alone, no TBS"


def scanners(told: Mapping[str, Mapping[str, float]]) -> str:
    """The scanners that a model was fitted to, each with its factor: "ge Revolution CT (88 patients, BMD × 1.052)"."""
    return "; ".join(f"{name} ({one['patients']} patients, BMD × {one['bmd_g_cm2']:.3f})" for name, one in told.items())


BIASED = ("reads high", "reads low")
WITHIN, NOT_SURE = "within", "not sure"
READS_TAGS = {WITHIN: "tag-eligible", NOT_SURE: "tag-quiet"}


def reads(error: Estimate, allowed: float) -> str:
    """Whether a scanner's mean error (g/cm2) is beyond what is allowed, as far as its 95 % interval can say."""
    if error.low > allowed:
        return BIASED[0]
    if error.high < -allowed:
        return BIASED[1]
    return WITHIN if -allowed <= error.low and error.high <= allowed else NOT_SURE


def may_drive(model: ModelLine, policy: Policy) -> str:
    """Whether the network of a model decides for real patients, and why not."""
    if model.synthetic_only:
        return "It knows digital patients alone: for people the CT attenuation decides."
    if model.verdict is None or not model.verdict.passed:
        return "It has not passed this site's gate: for people the CT attenuation decides."
    if model.verdict.gate != policy.gate_label:
        told = "It passed another gate than is in force now (other limits, criteria or young adults, or an earlier "
        return f"{told}release), and has to be judged again: until then the CT attenuation decides for people."
    if not policy.referral.network_gate_passed:
        return "It passed the gate; the policy (network_gate_passed) lets the CT attenuation decide for people."
    if model.verdict.scanners == ():
        return (
            "It passed the gate, and no scanner had patients enough among those who judged it: it decides for nobody."
        )
    who = "people who have a young-adult reference that this site verified"
    return f"In force it decides for {who}, scanned{model.verdict.where or ' here'}."


def person_name(value: str | None) -> str:
    """A DICOM PN for reading: FAMILY, Given, with the ideographic group behind it where there is one."""
    if not value or not value.strip("^= "):
        return "Name not given"
    groups = [_group(group) for group in value.split("=")]
    told = [group for group in groups[:2] if group]
    return " ".join(told) or next(group for group in groups if group)


def _group(group: str) -> str:
    family, *rest = [part.strip() for part in group.split("^")]
    given = " ".join(part for part in rest[:2] if part)
    separator = ", " if family and group.isascii() else " "
    return separator.join(part for part in (family, given) if part)


def apart(days: int) -> str:
    """How far a DXA is from its CT: "12 days later", "same day"."""
    if days == 0:
        return "same day"
    return f"{size(abs(days), 'day')} {'later' if days > 0 else 'earlier'}"


def sex_and_age(patient: Patient) -> str:
    """Sex and age, "female, 71 y"; what is not known is said."""
    sex = SEXES.get(patient.sex or "", "sex not given")
    age = "age not given" if patient.age_years is None else f"{patient.age_years:.0f}\u00a0y"
    return f"{sex}, {age}"


def day(value: str | None) -> str:
    """A DICOM DA for reading: 23 Nov 2026."""
    if not value:
        return MISSING
    try:
        return f"{datetime.strptime(value, '%Y%m%d'):%-d %b %Y}"
    except ValueError:
        return value


def date(value: date_type | None) -> str:
    """A date: 23 Nov 2026, as everywhere on the pages."""
    return MISSING if value is None else f"{value:%-d %b %Y}"


def moment(value: datetime | None) -> str:
    """A moment in this machine's time zone."""
    return MISSING if value is None else f"{value.astimezone():%-d %b %Y, %H:%M}"


def clock(value: datetime, now: datetime) -> str:
    """A moment near now in this machine's time zone: the time alone where it is of the same day."""
    here, today = value.astimezone(), now.astimezone()
    return f"{here:%H:%M}" if here.date() == today.date() else f"{here:%-d %b, %H:%M}"


def plain(text: str) -> str:
    """Text of a foreign program, readable and harmless: what does not print (control marks, bidi) becomes a blank mark.

    Line breaks stay, and wider spaces become plain ones.
    """
    return "".join(_plain(mark) for mark in text)


def _plain(mark: str) -> str:
    if mark.isprintable() or mark == "\n":
        return mark
    return " " if unicodedata.category(mark) == "Zs" else "\ufffd"


def renamed(levels: Mapping[str, str]) -> str:
    """The levels that changed their name: "L1 is L2, L2 is L3"."""
    return ", ".join(f"{old} is {new}" for old, new in levels.items() if old != new)


def ago(value: datetime, now: datetime) -> str:
    """How long ago, roughly."""
    seconds = max(0.0, (now - value).total_seconds())
    if seconds < 60:
        return "just now"
    for unit, length, limit in (("min", 60, 3600), ("h", 3600, 86_400), ("d", 86_400, 30 * 86_400)):
        if seconds < limit:
            return f"{seconds // length:.0f} {unit} ago"
    return moment(value)


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where nothing was measured."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")


def figure(value: float | None, digits: int, *cuts: float) -> str:
    """A figure that stands beside its cuts: with more digits where rounding would take it across one of them."""
    return MISSING if value is None else number(value, digits_beside(value, cuts, digits))


def percent_yam(value: float | None) -> str:
    """% YAM beside the thresholds of every criteria."""
    return figure(value, 0, *cuts_on(Scale.PERCENT_YAM))


def t_score(value: float | None) -> str:
    """A T-score beside the thresholds of every criteria."""
    return figure(value, 1, *cuts_on(Scale.T_SCORE))


def estimate(told: Estimate, digits: int, percent: bool) -> str:
    """A figure with its interval, "0.012 (−0.003 to 0.027)" or "62 % (48–74)"."""
    scale, unit = (100, "\u00a0%") if percent else (1, "")
    low, high = told.low * scale, told.high * scale
    return f"{number(told.value * scale, digits)}{unit} ({interval((low, high), digits)})"


def scanner_error(told: Estimate, allowed: float) -> str:
    """A scanner's mean error (g/cm2) with its interval, beside what is allowed either way."""
    digits = max(digits_beside(value, (allowed, -allowed), 3) for value in (told.value, told.low, told.high))
    return estimate(told, digits, percent=False)


def run_progress(told: Mapping[str, Any]) -> str:
    """How far a training run is, as its trainer told last."""
    if "studies" in told:
        return f"{told.get('studies_done', 0)} of {told['studies']} studies"
    if "judging" in told:
        return f"the {told['judging']}"
    if "steps_planned" not in told:
        return ""
    parts = [f"{told.get('steps_done', 0)} of {told['steps_planned']} steps"]
    if "network" in told:
        parts.insert(0, f"{told['network']}, epoch {told.get('epoch', 0)} of {told.get('epochs', MISSING)}")
    if told.get("images_per_second"):
        parts.append(f"{number(told['images_per_second'], 1)} images/s")
    return " · ".join(parts)


def interval(value: Interval | Sequence[float] | None, digits: int = 2) -> str:
    """An interval, "0.78–0.91", or nothing."""
    if value is None:
        return ""
    low, high = value
    joint = " to " if low < 0 or high < 0 else "–"
    return f"{number(low, digits)}{joint}{number(high, digits)}"


def sentence(text: str) -> str:
    """The text with its first letter raised; the rest (names, codes) stays as it is."""
    return f"{text[:1].upper()}{text[1:]}"


def short(text: str | None, length: int = 10) -> str:
    """The beginning of a hash or UID."""
    if not text:
        return MISSING
    return text if len(text) <= length else f"{text[:length]}…"


def tail(uid: str, length: int = 14) -> str:
    """The end of a UID: its beginning is the same everywhere."""
    return uid if len(uid) <= length else f"…{uid[-length:]}"


def size(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun: "1 series", "3 studies"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def progress(state: StudyState, job: JobLine | None, max_attempts: int) -> str:
    """Where the work on a study stands, in words."""
    if state is StudyState.RECEIVING:
        return "receiving"
    if state is StudyState.QUEUED and job is not None and job.state.value == "running":
        return f"running, attempt {job.attempts} of {max_attempts}"
    if state is StudyState.QUEUED:
        tried = f", {size(job.attempts, 'attempt')} so far" if job is not None and job.attempts else ""
        return f"waiting for the worker{tried}"
    if state is StudyState.QUARANTINED:
        attempts = job.attempts if job is not None else max_attempts
        return f"quarantined after {size(attempts, 'attempt')}"
    return STUDY_STATES[state].text.lower()


def verdict(series: SeriesLine) -> Chip:
    """What became of a series, in two or three words."""
    if series.eligible is None:
        return Chip("waiting", "not judged yet")
    codes = {reason.code for reason in series.reasons}
    known = next((told for code, told in OBJECT_VERDICTS.items() if code.value in codes), None)
    if known is not None:
        return known
    if series.found:
        return Chip("refused", "refused once measured")
    if series.chosen:
        return Chip("chosen", "chosen")
    return Chip("eligible", "eligible") if series.eligible else Chip("refused", "refused")


def reason_tone(code: str, tone: str) -> str:
    """How a reason's code is coloured: `tone`, unless it only says what became of a report or a segmentation."""
    return "plain" if code in OBJECT_VERDICTS else tone


def revision(result: ResultLine) -> str:
    """Which result: "revision 2", or "revision 2, run 3" where the same images were measured again."""
    return f"revision {result.revision}" + (f", run {result.run + 1}" if result.run else "")


def making(report: ReportLine, now: datetime) -> str:
    """Where the making of an object stands."""
    if report.state is ReportState.MADE and report.made_at is not None:
        return f"made {clock(report.made_at, now)}"
    if report.state is ReportState.FAILED:
        return f"not made: {plain(report.last_error or 'no reason was stored')}"
    if report.last_error is None:
        return "to be made"
    return f"to be made: next try {_at(report.due_at, now)}, {size(report.attempts, 'attempt')} so far"


def delivering(address: Address, now: datetime) -> Chip:
    """Where one object stands at one destination."""
    delivery = address.delivery
    if delivery is None:
        return Chip("not-assessable", "Never sent there")
    if delivery.state is DeliveryState.DELIVERED:
        return Chip("delivered", f"Delivered {clock(delivery.delivered_at or delivery.due_at, now)}")
    if address.address is None:
        return Chip("failed", "Not delivered, and no longer sent")
    if delivery.state is DeliveryState.SENDING:
        return Chip("in-progress", "Being sent")
    return Chip("failed", "Not delivered yet") if delivery.failing else Chip("in-progress", "Waiting")


def tries(address: Address, now: datetime) -> str:
    """When an object is tried at a destination again, and how often it was; empty where nothing is to come."""
    delivery = address.delivery
    if delivery is None or address.address is None or delivery.state is not DeliveryState.WAITING:
        return ""
    tried = f", {size(delivery.attempts, 'attempt')} so far" if delivery.attempts else ""
    return f"next try {_at(delivery.due_at, now)}{tried}"


def _at(due_at: datetime, now: datetime) -> str:
    return "any moment" if due_at <= now else f"at {clock(due_at, now)}"


def destination(line: DestinationLine, now: datetime) -> Chip:
    """How a destination takes what is sent to it."""
    if line.address is None:
        return Chip("failed", "No longer configured")
    if line.flow is Flow.FAILING and line.failing_since is not None:
        return Chip("failed", f"Failing since {clock(line.failing_since, now)}")
    return {
        Flow.REFUSING: Chip("indeterminate", "Takes some objects, not all"),
        Flow.BUSY: Chip("in-progress", "Sending"),
        Flow.CLEAR: Chip("delivered", "Everything delivered"),
    }.get(line.flow, Chip("not-assessable", "Nothing sent yet"))


def backlog(line: DestinationLine, now: datetime) -> str:
    """What waits for a destination, and that it is safe."""
    if not line.waiting:
        return (
            f"{size(line.delivered, 'object')} delivered." if line.delivered else "No object was addressed to it yet."
        )
    verb = "waits" if line.waiting == 1 else "wait"
    waits = f"{size(line.waiting, 'object')} {verb} here; nothing is lost."
    if line.address is None:
        return f"{waits} Configure it again under this name, and they are sent."
    return f"{waits} Next try {_at(line.next_try_at, now)}." if line.next_try_at is not None else waits
