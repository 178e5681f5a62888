"""How values are told to people: names, dates, numbers and the words of the product.

The wording follows one rule: no verdict of health and no finding of disease is ever pronounced. A flag says
"Consider DXA"; its absence says "No flag" and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from service.domain.result import Interval
from service.domain.states import ReferralState, StudyState
from service.workflow.reading import JobLine, Patient, Stage

DISCLAIMER = "Investigational. Not a medical device. Confirm with DXA."
DIGITAL_MODEL = "network trained on digital patients only, not validated on people"
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

SEXES = {"F": "female", "M": "male", "O": "other"}


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


def moment(value: datetime | None) -> str:
    """A moment in this machine's time zone."""
    return MISSING if value is None else f"{value.astimezone():%-d %b %Y, %H:%M}"


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


def interval(value: Interval | Sequence[float] | None, digits: int = 2) -> str:
    """An interval, "0.78–0.91", or nothing."""
    if value is None:
        return ""
    low, high = value
    joint = " to " if low < 0 or high < 0 else "–"
    return f"{number(low, digits)}{joint}{number(high, digits)}"


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
