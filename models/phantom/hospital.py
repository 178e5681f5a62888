"""`phantom hospital`: digital patients of a hospital with its own scanner and population, as files that it would hold.

    patients/OSG-*/dicom/*.dcm    a CT each, for `osteogate send`
    patients/OSG-*/truth.json     what is true of the patient
    dxa.csv                       a row a region, for `osteogate dxa import` (the GE Lunar layout)
    hospital.json                 seed, scanners, settings, how many results were mixed up

The scanner is of the maker that no shipped network has seen, and shows mineral stronger than its maker's others do, as
with a softer beam (our choice, so that the bias is plain); water, fat and muscle read as everywhere, so that no watch
on reference tissues can tell. A hospital of several scanners has one of each maker, each with a gain of its own,
drawn as far apart as real scanners were found to be. The patients are older than those of the paper. They are made side
by side, and one that stands is not made again: a run that was stopped goes on, and another `mix_up` writes another
dxa.csv for the same CTs.
"""

from __future__ import annotations

import csv
import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from models.phantom import dicom, dxa
from models.phantom.anatomy import LEVELS, Patient
from models.phantom.cohort import SEED_STEP
from models.phantom.densitometer import PRODIGY, Densitometer
from models.phantom.freeze import fingerprint
from models.phantom.patient import draw
from models.phantom.settings import RANGES, VENDORS, Setting, dials_of
from models.phantom.side_by_side import side_by_side
from models.phantom.study import TRUTH_FILE, save_truth, write_ct

SCANNER: Mapping[str, Setting] = {"vendor": "ge", "mineral_gain": 1.15}
SLICE_MM = 3.0
BETWEEN_SCANNERS = 0.092  # SD of eight scanners' mineral (Skornitzke 2022, see SOURCES.md)
AGES = (55, 90)  # drawn evenly
WOMEN = 0.8  # share
PATIENTS, DXA_FILE, HOSPITAL_FILE = "patients", "dxa.csv", "hospital.json"
DENSITOMETER = "Prodigy"
TOTAL = "L1-L4"
COLUMNS = ("Patients_ID", "Scan_Date", "Model", "Region", "Area_cm2", "BMC_g", "BMD_g/cm2", "TBS")
POPULATION_STREAM, MIX_UP_STREAM, SCANNER_STREAM = 11, 12, 13


@dataclass(frozen=True)
class Exam:
    """One patient's DXA, as the densitometer keeps it."""

    patient_id: str
    date: datetime.date
    result: dxa.Dxa


@dataclass(frozen=True)
class Place:
    """Who is to be made, and where."""

    seed: int
    settings: tuple[tuple[str, Setting], ...]
    folder: Path


def make_hospital(
    seed: int,
    patients: int,
    out: Path,
    settings: Mapping[str, Setting] | None = None,
    *,
    scanners: int = 1,
    mix_up: float = 0.0,
    processes: int | None = None,
    console: Console | None = None,
) -> Path:
    """Write a hospital into `out`; every patient is a function of `seed`, its number and the settings.

    `scanners` take the patients in turn; `mix_up` is the share of the DXA results that stand under another patient's
    ID.

    Raises:
        ValueError: a setting is impossible, or another hospital lies in `out`.
    """
    if not 1 <= patients <= SEED_STEP:
        raise ValueError(f"a hospital has 1 to {SEED_STEP} patients, not {patients}")
    there = scanners_of(seed, scanners)
    given: dict[str, Setting] = {"slice_mm": SLICE_MM, **(settings or {})}
    facts = {"provenance": "digital", "seed": seed, "scanners": there, "settings": given}
    facts |= {"phantom_sha256": fingerprint()}
    out.mkdir(parents=True, exist_ok=True)
    _same_hospital(out / HOSPITAL_FILE, facts)
    (out / HOSPITAL_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    places = [
        _place(seed * SEED_STEP + number, {**there[number % scanners], **given}, out) for number in range(patients)
    ]
    made = side_by_side(make_resident, places, processes)
    told = track(made, "patients", len(places), console=console or Console(stderr=True))
    exams, mixed = mixed_up(list(told), mix_up, seed)
    write_dxa(exams, out / DXA_FILE)
    facts |= {"patients": patients, "mixed_up": mixed}
    (out / HOSPITAL_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return out


def scanners_of(seed: int, count: int) -> list[Mapping[str, Setting]]:
    """The settings of each scanner: the one that is known to read high, or so many with a maker and a gain each.

    Raises:
        ValueError: there are not so many makers.
    """
    if not 1 <= count <= len(VENDORS):
        raise ValueError(f"a hospital has 1 to {len(VENDORS)} scanners, one of each maker, not {count}")
    if count == 1:
        return [SCANNER]
    rng = np.random.default_rng([seed, SCANNER_STREAM])
    makers = rng.permutation(list(VENDORS))[:count]
    gains = np.clip(rng.normal(1.0, BETWEEN_SCANNERS, count), *RANGES["mineral_gain"])
    return [
        {"vendor": str(maker), "mineral_gain": round(float(gain), 3)} for maker, gain in zip(makers, gains, strict=True)
    ]


def resident(seed: int, settings: Mapping[str, Setting]) -> Patient:
    """A patient of the hospital: its scanner, its ages, and a DXA that came before the CT."""
    rng = np.random.default_rng([seed, POPULATION_STREAM])
    own: dict[str, Setting] = {
        "age": int(rng.integers(AGES[0], AGES[1] + 1)),
        "sex": "F" if rng.random() < WOMEN else "M",
    }
    drawn = draw(seed, **{**own, **SCANNER, "slice_mm": SLICE_MM, **settings})
    # before it, for the CTs are of this year and no densitometer tells the future; bone was denser then
    return replace(drawn, interval=replace(drawn.interval, days=-drawn.interval.days))


def exam_of(patient: Patient, device: Densitometer = PRODIGY) -> Exam:
    """The patient's DXA."""
    day = dicom.identity(patient).date + datetime.timedelta(days=patient.interval.days)
    return Exam(patient.patient_id, day, dxa.measure(patient, device=device))


def mixed_up(exams: Sequence[Exam], share: float, seed: int) -> tuple[list[Exam], int]:
    """The exams with this share of the results under another patient's ID, and how many those are."""
    if not 0 <= share <= 1:
        raise ValueError(f"mix-up is a share, 0 to 1, not {share:g}")
    count = round(share * len(exams))
    if count < 2:
        if share > 0:
            raise ValueError(f"{share:g} of {len(exams)} patients is not two: nobody to mix up with")
        return list(exams), 0
    chosen = np.random.default_rng([seed, MIX_UP_STREAM]).permutation(len(exams))[:count]
    mixed = list(exams)
    for place, other in zip(chosen, np.roll(chosen, 1), strict=True):
        mixed[place] = replace(exams[place], result=exams[other].result)
    return mixed, count


def write_dxa(exams: Sequence[Exam], path: Path) -> None:
    """A row for each region of each exam."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(COLUMNS)
        for exam in exams:
            for region, values in _regions(exam.result):
                table.writerow([exam.patient_id, exam.date.isoformat(), DENSITOMETER, region, *values])


def _regions(result: dxa.Dxa) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name in LEVELS:
        one = result.levels[name]
        yield name, (f"{one.area_cm2:.3f}", f"{one.bmc_g:.4f}", f"{one.bmd_g_cm2:.5f}", f"{one.tbs:.4f}")
    area = sum(one.area_cm2 for one in result.levels.values())
    content = sum(one.bmc_g for one in result.levels.values())
    yield TOTAL, (f"{area:.3f}", f"{content:.4f}", f"{content / area:.5f}", f"{result.tbs:.4f}")


def _same_hospital(file: Path, facts: Mapping[str, object]) -> None:
    if not file.is_file():
        return
    told = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, value in facts.items() if told.get(name) != value]
    if other:
        raise ValueError(f"{file.parent} holds another hospital: it differs in {', '.join(other)}")


def _place(seed: int, settings: Mapping[str, Setting], out: Path) -> Place:
    patient = resident(seed, settings)  # refuses what is impossible before anybody is rendered
    return Place(seed, tuple(settings.items()), out / PATIENTS / patient.patient_id)


def make_resident(place: Place) -> Exam:
    """One patient's files, where they do not stand yet (truth.json is written last), and its exam."""
    patient, dials = resident(place.seed, dict(place.settings)), dials_of(dict(place.settings))
    if not (place.folder / TRUTH_FILE).is_file():
        save_truth(patient, write_ct(patient, place.folder, dials.blur), place.folder, dict(place.settings))
    return exam_of(patient, dials.densitometer)
