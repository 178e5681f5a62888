"""Training runs as people see them: what could be trained on, a run that is asked for, cancelled, resumed, finished.

What a run learns from is frozen when it is asked for: its manifest names every study, label and fold, and a hash
holds it. What arrives later waits for the next run. `service.workflow.training_work` is the worker's side.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session, selectinload

import models.package
from service.domain.bone import load_references
from service.domain.criteria import definitions
from service.domain.eligibility import first_kernel, vendor_of
from service.domain.errors import OsteogateError
from service.domain.facts import InstanceFacts
from service.domain.pairing import Pair
from service.domain.policy import Policy
from service.domain.reasons import Code, Reason
from service.domain.splits import Part, Person, Place, places
from service.domain.states import RunStage, RunState
from service.domain.training import (
    BMD_ALONE,
    KEEP_SECONDS,
    TARGETS,
    Origin,
    People,
    Start,
    Wanted,
    configured,
    objections,
)
from service.settings import MIB, Settings
from service.store.tables import (
    AuditRow,
    DxaScanRow,
    InstanceRow,
    ResultRow,
    StudyRow,
    TrainingEpochRow,
    TrainingPatientRow,
    TrainingRunRow,
)
from service.version import software_version
from service.workflow import pairing
from service.workflow.model import InForce, shipped_in_force
from service.workflow.people import By

FORMAT = 1  # of the manifest
CONFIGURATIONS = Path(models.package.__file__).parent / "configurations"
_CHUNK = 500


class NotChangeable(OsteogateError):
    """The run stands where this can't be done with it."""


# --- what there is to train on --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shelf:
    """What a run may be made of: the shipped configurations by name, and the model in force."""

    configurations: Mapping[str, Mapping[str, Any]]
    origin: Origin | None


def shelf(in_force: InForce | None = None) -> Shelf:
    """What there is to start with; without a model in force, the one that ships.

    Raises:
        PackageError: the manifest of the model in force cannot be read.
    """
    files = sorted(CONFIGURATIONS.glob("*.json"))
    known = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    model = in_force or shipped_in_force()
    text = (model.folder / models.package.MANIFEST).read_text(encoding="utf-8")
    return Shelf(known, _origin(models.package.Manifest.from_json(text), model.sha256))


def _origin(manifest: models.package.Manifest, sha256: str) -> Origin:
    return Origin(
        name=f"{manifest.name}-{manifest.version}",
        sha256=sha256,
        architecture=manifest.architecture,
        input=manifest.input,
        config=manifest.training.get("config", {}),
        trained_here="training_run" in manifest.training.get("networks_cohort", manifest.training.get("cohort", {})),
        targets=manifest.targets,
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One pair with all that a cohort's row tells of it."""

    pair: Pair
    result: ResultRow
    levels: Mapping[str, Mapping[str, float]]  # targets by level
    facts: InstanceFacts
    sex: str
    age_years: float | None
    device: str

    @property
    def bmd_g_cm2(self) -> float:
        return fmean(level["bmd_g_cm2"] for level in self.levels.values())


@dataclass(frozen=True, slots=True)
class Survey:
    """What a run that is asked for now would learn from, and what stands against it."""

    people: People
    targets: tuple[str, ...]  # what it would learn
    pairs: int
    patients: int  # who would train
    locked: int  # patients who would judge
    vertebrae: int
    left_out: tuple[tuple[str, Reason], ...]  # study UIDs of pairs that cannot be used, and why
    reasons: tuple[Reason, ...]  # why no run can start
    scanners: Mapping[str, int]  # patients who would train on each, by `models.package.scanner_name`


def surveys(session: Session, policy: Policy) -> tuple[Survey, ...]:
    """For patients and for digital ones: what there is for BMD and TBS, and for BMD alone."""
    pairs = pairing.overview(session, policy.pairing).pairs
    return tuple(
        _survey(session, policy, people, targets, pairs) for people in People for targets in (TARGETS, BMD_ALONE)
    )


def survey(session: Session, policy: Policy, people: People, targets: tuple[str, ...] = TARGETS) -> Survey:
    """What there is, and whether a run could start now."""
    pairs = pairing.overview(session, policy.pairing).pairs
    return _survey(session, policy, people, targets, pairs)


def _survey(
    session: Session, policy: Policy, people: People, targets: tuple[str, ...], pairs: Sequence[Pair]
) -> Survey:
    found, left_out = _candidates(session, pairs, people, targets)
    placed = _places(session, found, policy, seed=1)
    against = [*_going(session), *_too_few(placed, policy, people)]
    locked = sum(place.part is Part.LOCKED for place in placed.values())
    vertebrae = sum(len(one.levels) for one in found)
    return Survey(
        people, targets, len(found), len(placed) - locked, locked, vertebrae, left_out, tuple(against),
        _by_scanner(one for one in found if placed[one.pair.ct.patient_id].part is Part.TRAINING),
    )  # fmt: skip


def _by_scanner(found: Iterable[_Candidate]) -> dict[str, int]:
    """How many patients each scanner has, the most first."""
    named = models.package.scanner_name
    told = {(named(vendor_of(one.facts.manufacturer), one.facts.model_name), one.pair.ct.patient_id) for one in found}
    return dict(Counter(name for name, _ in sorted(told)).most_common())


def _candidates(
    session: Session, every: Sequence[Pair], people: People, targets: tuple[str, ...]
) -> tuple[list[_Candidate], tuple[tuple[str, Reason], ...]]:
    """Every pair of these people that holds a level with all targets, by study UID; and the others, with why."""
    pairs = [one for one in every if one.ct.synthetic is (people is People.DIGITAL)]
    found: list[_Candidate] = []
    left_out: list[tuple[str, Reason]] = []
    for start in range(0, len(pairs), _CHUNK):
        some = pairs[start : start + _CHUNK]
        results = _results(session, [one.ct.study_uid for one in some])
        scans = _scans(session, [one.dxa.id for one in some])
        facts = _facts(session, [row.series_id for row in results.values()])
        for pair in some:
            result, scan = results[pair.ct.study_uid], scans[pair.dxa.id]
            levels = _levels(pair, scan, targets)
            if not levels:
                what = "both BMD and TBS" if "tbs" in targets else "a BMD"
                told = f"no level that counts on both sides has {what}"
                left_out.append((pair.ct.study_uid, Reason(Code.TRAINING_NO_TARGET, told)))
            elif result.artefacts is None:
                told = "the result kept no outlines"
                left_out.append((pair.ct.study_uid, Reason(Code.TRAINING_LABELS_GONE, told)))
            else:
                study, seen = result.study, facts[result.series_id]
                sex, age = study.patient_sex or "", study.patient_age_years
                device = f"{scan.manufacturer} {scan.model}"
                found.append(_Candidate(pair, result, levels, seen, sex, age, device))
    found, others = _one_each(found)
    return found, tuple(sorted([*left_out, *others], key=lambda one: one[0]))


def _one_each(found: Sequence[_Candidate]) -> tuple[list[_Candidate], list[tuple[str, Reason]]]:
    """One pair a patient, by study UID, and the others: whoever is scanned often must not weigh more than others."""
    best: dict[str, _Candidate] = {}
    for one in sorted(found, key=lambda one: (abs(one.pair.days), one.pair.ct.study_uid)):
        best.setdefault(one.pair.ct.patient_id, one)
    kept = sorted(best.values(), key=lambda one: one.pair.ct.study_uid)
    told = "another CT of the patient is nearer to its DXA, and each patient counts once"
    left = {one.pair.ct.study_uid for one in found} - {one.pair.ct.study_uid for one in kept}
    return kept, [(study_uid, Reason(Code.TRAINING_OTHER_PAIR, told)) for study_uid in left]


def _results(session: Session, study_uids: Collection[str]) -> dict[str, ResultRow]:
    wanted = (
        select(StudyRow.study_uid, ResultRow)
        .join(StudyRow, ResultRow.study_id == StudyRow.id)
        .where(StudyRow.study_uid.in_(list(study_uids)), ResultRow.superseded.is_(False))
        .options(selectinload(ResultRow.study), selectinload(ResultRow.series))
        .order_by(ResultRow.id)
    )
    return {study_uid: row for study_uid, row in session.execute(wanted)}  # noqa: C416 (rows are no pairs)


def _scans(session: Session, ids: Collection[int]) -> dict[int, DxaScanRow]:
    wanted = select(DxaScanRow).where(DxaScanRow.id.in_(list(ids))).options(selectinload(DxaScanRow.levels))
    return {row.id: row for row in session.scalars(wanted)}


def _facts(session: Session, series_ids: Collection[int]) -> dict[int, InstanceFacts]:
    """What the first instance of each series tells of patient and scanner."""
    first = select(func.min(InstanceRow.id)).where(InstanceRow.series_id.in_(list(series_ids)))
    wanted = select(InstanceRow.series_id, InstanceRow.facts).where(
        InstanceRow.id.in_(first.group_by(InstanceRow.series_id))
    )
    return {series_id: InstanceFacts.from_json(facts) for series_id, facts in session.execute(wanted)}


def _levels(pair: Pair, scan: DxaScanRow, targets: tuple[str, ...]) -> dict[str, dict[str, float]]:
    told = {one.level: {name: getattr(one, name) for name in targets} for one in scan.levels}
    return {name: told[name] for name in pair.levels if all(value is not None for value in told[name].values())}


def _places(session: Session, found: Sequence[_Candidate], policy: Policy, seed: int) -> dict[str, Place]:
    """Each patient's place: the one that an earlier run gave, else a drawn one."""
    by_patient: dict[str, list[float]] = {}
    for one in found:
        by_patient.setdefault(one.pair.ct.patient_id, []).append(one.bmd_g_cm2)
    people = [Person(key, fmean(values)) for key, values in by_patient.items()]
    rows = session.scalars(select(TrainingPatientRow))
    known = {row.patient_id: Place(Part(row.part), row.tenth) for row in rows}
    return places(people, known, seed=seed, locked_share=policy.training.locked_share)


def _too_few(placed: Mapping[str, Place], policy: Policy, people: People) -> Iterator[Reason]:
    locked = sum(place.part is Part.LOCKED for place in placed.values())
    training, rules = len(placed) - locked, policy.training
    if training < rules.patients_minimum:
        told = f"{training} {_who(people)} with CT and DXA could train; {rules.patients_minimum} are needed"
        yield Reason(Code.TRAINING_TOO_FEW, told)
    elif missing := sorted(set(range(10)) - {place.tenth for place in placed.values()}):
        told = f"nobody is left in the tenth {missing[0]}, which a fold would need"
        yield Reason(Code.TRAINING_TOO_FEW, told)
    if locked < rules.locked_minimum:
        told = f"{locked} {_who(people)} could judge (the locked test set); {rules.locked_minimum} are needed"
        yield Reason(Code.TRAINING_LOCKED_TOO_FEW, told)


def _who(people: People) -> str:
    return "digital patients" if people is People.DIGITAL else "patients"


def _going(session: Session) -> Iterator[Reason]:
    going = session.scalar(select(TrainingRunRow.id).where(TrainingRunRow.going == 1))
    if going is not None:
        yield Reason(Code.TRAINING_GOING, f"run {going} waits or runs; one goes at a time")


# --- asked for ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Room:
    """Free bytes where runs are kept, and how many must be free."""

    free_bytes: int
    needed_bytes: int


def room(settings: Settings) -> Room:
    """How much room there is for a run here."""
    return Room(free_bytes(settings), settings.training_disk_bytes)


def free_bytes(settings: Settings) -> int:
    """Free bytes on the disk that holds (or will hold) the runs."""
    folder = settings.training_dir
    standing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(standing).free


@dataclass(frozen=True, slots=True)
class Created:
    """The new run's id; or every reason why there is none."""

    id: int | None
    reasons: tuple[Reason, ...]


def create(session: Session, wanted: Wanted, by: By, *, policy: Policy, shelf: Shelf, room: Room) -> Created:
    """Freeze what a run learns from and let it wait for the trainer; a refusal stands in the audit as well."""
    pairs = pairing.overview(session, policy.pairing).pairs
    targets = wanted.learned if set(BMD_ALONE) <= set(wanted.learned) else TARGETS  # else it is refused below
    found, left_out = _candidates(session, pairs, wanted.people, targets)
    placed = _places(session, found, policy, wanted.seed)
    against = [
        *objections(wanted, shelf.configurations, shelf.origin),
        *_going(session),
        *_too_few(placed, policy, wanted.people),
        *_no_room(room),
    ]
    if against:
        codes = sorted({reason.code.value for reason in against})
        _audit(session, by, "training.refused", "training", codes=codes, reason=wanted.reason)
        return Created(None, tuple(against))
    row = TrainingRunRow(
        going=1,
        reason=wanted.reason,
        created_at=by.now,
        created_by=by.actor,
        configuration=wanted.configuration,
        start=wanted.start.value,
        people=wanted.people.value,
        patients=sum(place.part is Part.TRAINING for place in placed.values()),
        locked=sum(place.part is Part.LOCKED for place in placed.values()),
        vertebrae=sum(len(one.levels) for one in found),
        manifest={},
        manifest_sha256="",
    )
    session.add(row)
    session.flush()
    row.manifest = _manifest(row, wanted, shelf, policy, found, placed, left_out)
    row.manifest_sha256 = content_hash(row.manifest)
    _remember(session, row.id, placed)
    _audit(
        session,
        by,
        "training.create",
        f"training-run:{row.id}",
        reason=wanted.reason,
        configuration=wanted.configuration,
        start=wanted.start.value,
        people=wanted.people.value,
        targets=list(wanted.learned),
        patients=row.patients,
        locked=row.locked,
        manifest_sha256=row.manifest_sha256,
    )
    return Created(row.id, ())


def _no_room(room: Room) -> Iterator[Reason]:
    if room.free_bytes < room.needed_bytes:
        told = f"{room.free_bytes // MIB} MiB are free on the disk; a run needs {room.needed_bytes // MIB} MiB"
        yield Reason(Code.TRAINING_DISK, told)


def _remember(session: Session, run_id: int, placed: Mapping[str, Place]) -> None:
    """Write down the places that were drawn now; those of earlier runs stand already."""
    known = set(session.scalars(select(TrainingPatientRow.patient_id)))
    session.add_all(
        TrainingPatientRow(patient_id=key, part=place.part.value, tenth=place.tenth, run_id=run_id)
        for key, place in placed.items()
        if key not in known
    )
    session.flush()


def _manifest(
    row: TrainingRunRow,
    wanted: Wanted,
    shelf: Shelf,
    policy: Policy,
    found: Sequence[_Candidate],
    placed: Mapping[str, Place],
    left_out: Sequence[tuple[str, Reason]],
) -> dict[str, Any]:
    """All that the run depends on. Patients have numbers here: nothing that leaves the house can carry a patient ID."""
    number = {key: f"p{index:05d}" for index, key in enumerate(sorted(placed), start=1)}
    origin = shelf.origin
    return {
        "format": FORMAT,
        "run": row.id,
        "created": row.created_at.isoformat(),
        "software": software_version(),
        "policy": policy.label,
        "window_days": policy.pairing.window_days,
        "densitometer": _densitometer(policy, wanted.people),
        "targets": list(wanted.learned),
        "configuration": configured(wanted, shelf.configurations, origin, version=str(row.id)),
        "start": wanted.start.value,
        "start_from": origin.name if origin is not None and wanted.start is not Start.SCRATCH else None,
        "seed": wanted.seed,
        "people": wanted.people.value,
        "definitions": _definitions(policy, wanted.people),
        "pairs": [_entry(one, number[one.pair.ct.patient_id], placed[one.pair.ct.patient_id]) for one in found],
        "left_out": [{"study_uid": study_uid, **reason.as_dict()} for study_uid, reason in left_out],
    }


def _entry(one: _Candidate, patient: str, place: Place) -> dict[str, Any]:
    return {
        "patient": patient,
        "part": place.part.value,
        "tenth": place.tenth,
        "provenance": "digital" if one.pair.ct.synthetic else "patient",
        "study_uid": one.pair.ct.study_uid,
        "series_uid": one.result.series.series_uid,
        "revision": one.result.revision,
        "result_id": one.result.id,
        "artefacts": one.result.artefacts,
        "dxa_id": one.pair.dxa.id,
        "dxa_device": one.device,
        "days": one.pair.days,
        "sex": one.sex,
        "age": one.age_years,
        "vendor": vendor_of(one.facts.manufacturer) or "unknown",
        "scanner": one.facts.model_name,
        "kernel": first_kernel(one.facts),
        "slice_mm": one.facts.slice_thickness_mm,
        "levels": {name: dict(values) for name, values in one.levels.items()},
    }


def _densitometer(policy: Policy, people: People) -> str:
    """Whose BMD a run learns: what measures digital patients is made after a Prodigy."""
    return models.package.DENSITOMETER if people is People.DIGITAL else policy.pairing.densitometer


def _definitions(policy: Policy, people: People) -> dict[str, dict[str, Any]]:
    """Who counts as having what: by the site's criteria, and its young adults or the digital ones; empty without."""
    if people is People.DIGITAL:
        return definitions(policy.referral.profile, load_references().digital_young_adults())
    return policy.definitions


def content_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest, however it was stored."""
    return hashlib.sha256(content(manifest)).hexdigest()


def content(manifest: Mapping[str, Any]) -> bytes:
    """The bytes that its hash is of."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# --- cancelled, resumed, finished -----------------------------------------------------------------------------------


def cancel(session: Session, run_id: int, by: By) -> RunState:
    """Stop a run: a waiting one at once, a running one after its next step; what it has done is kept.

    Raises:
        NotChangeable: it has ended.
    """
    row = _locked_row(session, run_id)
    state = RunState(row.state)
    if state is RunState.WAITING:
        row.state, row.going, row.finished_at = RunState.CANCELLED.value, None, by.now
    elif state is RunState.RUNNING:
        row.cancel_asked_at = row.cancel_asked_at or by.now
    else:
        raise NotChangeable(f"run {run_id} is {state.value}: there is nothing to cancel")
    _audit(session, by, "training.cancel", f"training-run:{run_id}", was=state.value)
    return RunState(row.state)


def resume(session: Session, run_id: int, by: By, *, keep_seconds: float = KEEP_SECONDS) -> None:
    """Let a failed or cancelled run go on where it stopped, with a fresh set of attempts.

    Raises:
        NotChangeable: it has not stopped, it stopped longer ago than its files are kept, or another one goes.
    """
    row = _locked_row(session, run_id)
    if RunState(row.state) not in (RunState.FAILED, RunState.CANCELLED):
        raise NotChangeable(f"run {run_id} is {row.state}: only one that failed or was cancelled can be resumed")
    if row.finished_at is not None and not _kept(row.finished_at, by.now, keep_seconds):
        told = f"run {run_id} stopped on {row.finished_at:%Y-%m-%d}: its crops and checkpoints are not kept so long"
        raise NotChangeable(f"{told}; ask for a new one")
    for reason in _going(session):
        raise NotChangeable(reason.text)
    row.state, row.going, row.attempts = RunState.WAITING.value, 1, 0
    row.cancel_asked_at = row.deadline_at = row.finished_at = row.rung_at = None
    _audit(session, by, "training.resume", f"training-run:{run_id}", stage=row.stage)


def resumable(run: RunLine, now: datetime, keep_seconds: float) -> bool:
    """Whether a person may let it go on."""
    stopped = run.state in (RunState.FAILED, RunState.CANCELLED)
    return stopped and _kept(run.finished_at, now, keep_seconds)


def _kept(finished_at: datetime | None, now: datetime, keep_seconds: float) -> bool:
    return finished_at is None or now <= finished_at + timedelta(seconds=keep_seconds)


def _locked_row(session: Session, run_id: int) -> TrainingRunRow:
    """The run, held until the commit.

    Raises:
        LookupError: there is none.
    """
    statement = select(TrainingRunRow).where(TrainingRunRow.id == run_id).with_for_update()
    row = session.scalars(statement.execution_options(populate_existing=True)).first()
    if row is None:
        raise LookupError(f"no training run {run_id}")
    return row


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to; paths are relative to the data folder."""

    package_path: str
    package_sha256: str
    candidate_report: str
    champion_report: str
    champion: str
    champion_sha256: str


def hand_over(session: Session, run_id: int, outcome: Outcome) -> None:
    """Tell the audit that a candidate stands; the registry takes it in the same transaction (`worker.trainer`)."""
    by = By("osteogate", _locked_row(session, run_id).finished_at or datetime.min)
    _audit(session, by, "training.finish", f"training-run:{run_id}", package_sha256=outcome.package_sha256)


def _audit(session: Session, by: By, action: str, subject: str, **detail: Any) -> None:
    session.add(
        AuditRow(at=by.now, actor=by.actor, action=action, subject=subject, detail=detail, peer_address=by.peer_address)
    )


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lost:
    """A study, or a level of it, that stands in the manifest and could not be cut out."""

    study_uid: str
    level: str | None
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class EpochLine:
    """One point of a curve."""

    id: int
    network: str
    epoch: int
    step: int
    training_loss: float
    validation_loss: float
    bmd_r: float | None
    tbs_r: float | None


@dataclass(frozen=True, slots=True)
class RunLine:
    """One run, for people."""

    id: int
    state: RunState
    stage: RunStage | None
    reason: str
    created_at: datetime
    created_by: str
    configuration: str
    start: str
    people: str
    targets: tuple[str, ...]
    patients: int
    locked: int
    vertebrae: int
    manifest_sha256: str
    progress: Mapping[str, Any]
    lost: tuple[Lost, ...]
    attempts: int
    cancel_asked: bool
    last_error: str | None
    started_at: datetime | None
    finished_at: datetime | None
    package_path: str | None
    package_sha256: str | None
    candidate_report: str | None
    champion_report: str | None
    champion: str | None

    @property
    def share(self) -> float | None:
        """How much of its training is done, 0 to 1; None before it is known."""
        planned = self.progress.get("steps_planned")
        return None if not planned else min(1.0, float(self.progress.get("steps_done", 0)) / float(planned))


def runs(session: Session, *, size: int = 100) -> tuple[RunLine, ...]:
    """The latest runs first."""
    return tuple(
        _line(row) for row in session.scalars(select(TrainingRunRow).order_by(TrainingRunRow.id.desc()).limit(size))
    )


def run(session: Session, run_id: int) -> RunLine | None:
    """One run; None where there is none."""
    row = session.get(TrainingRunRow, run_id)
    return None if row is None else _line(row)


def manifest(session: Session, run_id: int) -> Mapping[str, Any] | None:
    """What a run was frozen to; None where there is no such run."""
    return session.scalar(select(TrainingRunRow.manifest).where(TrainingRunRow.id == run_id))


def curve(session: Session, run_id: int, *, after: int = 0) -> tuple[EpochLine, ...]:
    """The points of a run's curves in the order in which they came; `after` is the id of the last one known."""
    wanted = select(TrainingEpochRow).where(TrainingEpochRow.run_id == run_id, TrainingEpochRow.id > after)
    return tuple(
        EpochLine(
            row.id,
            row.network,
            row.epoch,
            row.step,
            row.training_loss,
            row.validation_loss,
            row.bmd_r,
            row.tbs_r,
        )
        for row in session.scalars(wanted.order_by(TrainingEpochRow.id))
    )


PairKey = tuple[str, int]  # the CT's study UID, the DXA's id


@dataclass(frozen=True, slots=True)
class Used:
    """What training runs that finished, or that wait or run now, have taken."""

    pairs: frozenset[PairKey]
    latest_run: int | None
    passed_over: frozenset[str] = frozenset()  # study UIDs of a patient's further CTs: another one stood for it

    def took(self, pair: PairKey) -> bool:
        """Whether it is not new any more."""
        return pair in self.pairs or pair[0] in self.passed_over


def used(session: Session) -> Used:
    """The pairs of every such run, whether they trained or judged; one that failed or was cancelled took nothing."""
    taken = (RunState.FINISHED.value, RunState.WAITING.value, RunState.RUNNING.value)
    wanted = select(TrainingRunRow.id, TrainingRunRow.manifest).where(TrainingRunRow.state.in_(taken))
    found, others, latest = set[PairKey](), set[str](), None
    for run_id, manifest in session.execute(wanted.order_by(TrainingRunRow.id)).yield_per(1):
        found |= {(pair["study_uid"], pair["dxa_id"]) for pair in manifest["pairs"]}
        left_out = manifest.get("left_out", ())
        others |= {one["study_uid"] for one in left_out if one["code"] == Code.TRAINING_OTHER_PAIR.value}
        latest = run_id
    return Used(frozenset(found), latest, frozenset(others))


def wanted_now(session: Session) -> bool:
    """Whether a run waits or runs: a trainer is needed."""
    return session.scalar(select(TrainingRunRow.id).where(TrainingRunRow.going == 1).limit(1)) is not None


def _line(row: TrainingRunRow) -> RunLine:
    return RunLine(
        id=row.id,
        state=RunState(row.state),
        stage=None if row.stage is None else RunStage(row.stage),
        reason=row.reason,
        created_at=row.created_at,
        created_by=row.created_by,
        configuration=row.configuration,
        start=row.start,
        people=row.people,
        targets=tuple(row.manifest["targets"]),
        patients=row.patients,
        locked=row.locked,
        vertebrae=row.vertebrae,
        manifest_sha256=row.manifest_sha256,
        progress=row.progress,
        lost=tuple(Lost(one["study_uid"], one["level"], one["code"], one["text"]) for one in row.lost),
        attempts=row.attempts,
        cancel_asked=row.cancel_asked_at is not None,
        last_error=row.last_error,
        started_at=row.started_at,
        finished_at=row.finished_at,
        package_path=row.package_path,
        package_sha256=row.package_sha256,
        candidate_report=row.candidate_report,
        champion_report=row.champion_report,
        champion=row.champion,
    )
