"""The worklist as CSV, safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping

from service.api.schemas import iso_day
from service.workflow.reading import WorklistEntry

Cell = str | int | float | None

# What a spreadsheet takes for a formula, full-width forms included (OWASP, "CSV Injection").
TRIGGERS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def safe(cell: Cell) -> Cell:
    """A text that a spreadsheet would run gets an apostrophe in front; figures stay figures."""
    if isinstance(cell, str) and (cell.startswith(TRIGGERS) or cell.lstrip().startswith(TRIGGERS)):
        return f"'{cell}"
    return cell


COLUMNS: Mapping[str, Callable[[WorklistEntry], Cell]] = {
    "study_uid": lambda entry: entry.study_uid,
    "patient_id": lambda entry: entry.patient.patient_id,
    "patient_name": lambda entry: entry.patient.name,
    "patient_sex": lambda entry: entry.patient.sex,
    "patient_age_years": lambda entry: entry.patient.age_years,
    "synthetic": lambda entry: "yes" if entry.synthetic else "no",
    "study_date": lambda entry: iso_day(entry.study_date),
    "accession_number": lambda entry: entry.accession_number,
    "received_at": lambda entry: entry.received_at.isoformat(timespec="seconds"),
    "state": lambda entry: entry.state.value,
    "category": lambda entry: entry.category.value if entry.category else None,
    "reason_codes": lambda entry: " ".join(reason.code for reason in entry.reasons),
    "reason": lambda entry: entry.reasons[0].text if entry.reasons else None,
    "driver": lambda entry: entry.driver,
    "bmd_g_cm2": lambda entry: entry.values.bmd_g_cm2,
    "bmd_low": lambda entry: entry.values.bmd_interval[0] if entry.values.bmd_interval else None,
    "bmd_high": lambda entry: entry.values.bmd_interval[1] if entry.values.bmd_interval else None,
    "percent_yam": lambda entry: entry.values.percent_yam,
    "tbs": lambda entry: entry.values.tbs,
    "tbs_low": lambda entry: entry.values.tbs_interval[0] if entry.values.tbs_interval else None,
    "tbs_high": lambda entry: entry.values.tbs_interval[1] if entry.values.tbs_interval else None,
    "hu_mean": lambda entry: entry.values.hu_mean,
    "network_validated_on": lambda entry: "digital patients only" if entry.digital_model else None,
    "referral_state": lambda entry: entry.referral.state.value if entry.referral else None,
    "notice": lambda entry: "Investigational. Not a medical device. Confirm with DXA.",
}


def worklist_csv(entries: Iterable[WorklistEntry]) -> str:
    """The worklist, one study a line, with a heading."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for entry in entries:
        writer.writerow([safe(read(entry)) for read in COLUMNS.values()])
    return text.getvalue()
