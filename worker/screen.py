"""`osteogate screen`: one CT without a server, through the same rules and the same pipeline.

A DICOM folder gets its verdict from its headers exactly as at intake, and its answer as DICOM too (SR and SEG). A
NIfTI file has no tags: its verdict says what could not be checked, and it is measured all the same.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from service.dicom.headers import HeaderError, read_facts
from service.domain.eligibility import Verdict, assess_series, choose
from service.domain.facts import InstanceFacts
from service.domain.policy import Policy
from service.domain.reasons import Code, Reason
from service.domain.referral import PatientFacts, decide, reportable
from service.domain.result import Measurements, result_document, unmeasured
from service.version import software_version
from worker.pipeline import Pipeline
from worker.reports import write_reports
from worker.segmentation.base import LabelArray
from worker.volume import Volume, VolumeError, load_dicom, load_nifti, write_label_map

NIFTI_UNCHECKED = Reason(
    Code.TAGS_NOT_CHECKED,
    "A NIfTI file has no tags: kVp, contrast, age, kernel, tilt and compression could not be checked.",
)


class NothingToScreen(ValueError):
    """The path holds neither DICOM instances nor a NIfTI file."""


@dataclass(frozen=True)
class Candidate:
    """The CT to be measured (or the reasons why none is) as the headers tell it."""

    verdict: Verdict
    patient: PatientFacts
    study_uid: str | None = None
    series_uid: str | None = None
    files: tuple[Path, ...] = ()  # the DICOM slices that were judged
    load: Callable[[], Volume] | None = None  # None: nothing eligible


def screen_path(
    path: Path, out: Path, pipeline: Callable[[], Pipeline], policy: Policy, *, at: datetime
) -> dict[str, Any]:
    """Screen one CT and write result.json, labels.nii.gz, the pictures and, for DICOM, SR and SEG into `out`.

    Args:
        path: a DICOM file or folder, or a `.nii`/`.nii.gz` file.
        out: the folder to write to; made when absent.
        pipeline: makes the resident networks; called only when there is something to measure.
        policy: the thresholds in force.
        at: when, in the site's local time; stands in the DICOM objects.

    Raises:
        NothingToScreen: the path holds nothing that could be screened.
    """
    candidate = _nifti(path) if path.name.endswith((".nii", ".nii.gz")) else _dicom(path, policy)
    out.mkdir(parents=True, exist_ok=True)
    verdict, measurements, labels = _measure(candidate, out, pipeline)
    outcome = decide(measurements, candidate.patient, verdict, policy)
    document = result_document(
        study_uid=candidate.study_uid,
        series_uid=candidate.series_uid,
        revision=None,
        eligible=outcome.eligible,
        verdict_reasons=outcome.verdict_reasons,
        measurements=reportable(measurements, outcome),
        patient=outcome.patient,
        decision=outcome.decision,
    )
    text = json.dumps(document, indent=2, ensure_ascii=False)
    (out / "result.json").write_text(text + "\n", encoding="utf-8")
    if candidate.files:
        write_reports(candidate.files, labels, document, out, at=at)
    return document


def _measure(
    candidate: Candidate, out: Path, pipeline: Callable[[], Pipeline]
) -> tuple[Verdict, Measurements, LabelArray | None]:
    if candidate.load is None:
        return candidate.verdict, unmeasured(software_version()), None
    try:
        volume = candidate.load()
    except VolumeError as error:
        reasons = (*candidate.verdict.reasons, Reason(Code(error.code), error.text))
        return Verdict(False, reasons, candidate.verdict.cautions), unmeasured(software_version()), None
    measurements, segmentation = pipeline().run(volume, out)
    write_label_map(segmentation.labels, volume, out / "labels.nii.gz")
    return candidate.verdict, measurements, segmentation.labels


def _nifti(path: Path) -> Candidate:
    if not path.is_file():
        raise NothingToScreen(f"{path} is not a file")
    verdict = Verdict(eligible=True, reasons=(), cautions=(NIFTI_UNCHECKED,))
    patient = PatientFacts(synthetic=False, sex=None, age_years=None, manufacturer=None, tags_checked=False)
    return Candidate(verdict, patient, load=lambda: load_nifti(path))


def _dicom(path: Path, policy: Policy) -> Candidate:
    series = _read_series(path)
    if not series:
        raise NothingToScreen(f"{path} holds no DICOM instance")
    verdicts = {uid: assess_series([facts for facts, _ in found], policy) for uid, found in series.items()}
    choice = choose({uid: ([f for f, _ in series[uid]], verdicts[uid]) for uid in series}, policy)
    uid = choice.series_uid or max(series, key=lambda key: len(series[key]))
    facts, paths = series[uid][0][0], [file for _, file in series[uid]]
    return Candidate(
        verdict=verdicts[uid],
        patient=PatientFacts(
            synthetic=all(one.synthetic for one, _ in series[uid]),
            sex=facts.patient_sex,
            age_years=facts.patient_age_years,
            manufacturer=facts.manufacturer,
        ),
        study_uid=facts.study_uid,
        series_uid=uid,
        files=tuple(paths) if facts.modality == "CT" else (),
        load=(lambda: load_dicom(paths)) if choice.series_uid else None,
    )


def _read_series(path: Path) -> dict[str, list[tuple[InstanceFacts, Path]]]:
    """Every readable instance below `path`, by series; files that are not DICOM are passed over."""
    series: dict[str, list[tuple[InstanceFacts, Path]]] = defaultdict(list)
    for file in _files(path):
        try:
            facts = read_facts(file)
        except HeaderError:
            continue
        series[facts.series_uid].append((facts, file))
    return dict(series)


def _files(path: Path) -> Sequence[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if not path.exists():
        raise NothingToScreen(f"{path} does not exist")
    return [path]
