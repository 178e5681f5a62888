"""The values that several readers share, and how they are made of stored rows and documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from service.domain.result import Interval
from service.domain.states import ReferralState
from service.store.tables import ReferralRow, StudyRow

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Told:
    """A stored reason: its code as written (a newer version may know more codes) and its text."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Patient:
    """Who the study says it shows; DICOM values as received."""

    patient_id: str | None
    name: str | None
    sex: str | None
    birth_date: str | None  # YYYYMMDD
    age_years: float | None


@dataclass(frozen=True, slots=True)
class Standing:
    """The referral of a study: where it stands, since when, by whom, and why it was dismissed."""

    state: ReferralState
    reason: str | None
    changed_at: datetime
    changed_by: str


@dataclass(frozen=True, slots=True)
class Values:
    """The patient's values as the result in force gives them: g/cm2, no unit, HU, percent."""

    bmd_g_cm2: float | None = None
    bmd_interval: Interval | None = None
    tbs: float | None = None
    tbs_interval: Interval | None = None
    hu_mean: float | None = None
    percent_yam: float | None = None
    levels_used: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A slice of a longer list; `number` counts from 1."""

    items: tuple[T, ...]
    total: int
    number: int
    size: int

    @property
    def last(self) -> int:
        """Number of the last page; an empty list has one, empty, page."""
        return max(1, -(-self.total // self.size))


def digital_model(document: Mapping[str, Any]) -> bool:
    """True when the network behind the values is known from digital patients only.

    A document that does not say so is taken to be of that kind, unless the network decided for a real
    patient: the claim "validated on people" must be written down, never assumed.
    """
    provenance = document.get("provenance", {})
    if provenance.get("model") is None:
        return False
    told = provenance.get("model_synthetic_only")
    if told is not None:
        return bool(told)
    network = document.get("decision", {}).get("driver") == "network"
    return not (network and not document.get("patient", {}).get("synthetic", False))


def values_of(patient: Mapping[str, Any]) -> Values:
    return Values(
        bmd_g_cm2=patient.get("bmd_g_cm2"),
        bmd_interval=interval(patient.get("bmd_interval")),
        tbs=patient.get("tbs"),
        tbs_interval=interval(patient.get("tbs_interval")),
        hu_mean=patient.get("hu_mean"),
        percent_yam=patient.get("percent_yam"),
        levels_used=tuple(patient.get("levels_used", ())),
    )


def interval(pair: Sequence[float] | None) -> Interval | None:
    return None if pair is None else (pair[0], pair[1])


def told(stored: Sequence[Mapping[str, str]]) -> tuple[Told, ...]:
    return tuple(Told(one["code"], one["text"]) for one in stored)


def patient(study: StudyRow) -> Patient:
    return Patient(
        patient_id=study.patient_id,
        name=study.patient_name,
        sex=study.patient_sex,
        birth_date=study.patient_birth_date,
        age_years=study.patient_age_years,
    )


def standing(referral: ReferralRow | None) -> Standing | None:
    if referral is None:
        return None
    return Standing(ReferralState(referral.state), referral.reason, referral.changed_at, referral.changed_by)
