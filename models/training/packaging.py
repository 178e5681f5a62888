"""A run becomes a model package: best epochs, intervals, curves, the whole configuration and a model card."""

import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy import stats

from models.measures import NAMES
from models.package import (
    BMD_ALONE,
    READOUT,
    WEIGHTS,
    Manifest,
    Member,
    ModelPackage,
    refuse_to_overwrite,
    write_members,
)
from models.readout import Readout
from models.resnet50 import Floats, PackageNetwork
from models.training.calibration import COVERAGE, calibrate
from models.training.cohort import Cohort, Ints
from models.training.configuration import DEFAULT, TrainingConfig, load_configuration
from models.training.loop import (
    CHECKPOINT_SECONDS,
    Trained,
    Watch,
    correlation,
    never_stop,
    predict_cohort,
    resolved,
    short,
    train,
)
from models.training.readout import known_scanners, weigh, weigh_apart

NOT_MEASURED = "not measured"
FLAT_SHARE = 0.2  # of the curve, at its end
FLAT_POINTS = 5  # fewer say nothing
FLAT_FALL = 0.05  # of the best epoch's loss; ours
FLAT_DEFINITIONS: Mapping[str, str] = {  # by what a run keeps
    "last": f"the Theil-Sen line through the last fifth of the validation curve (at least {FLAT_POINTS} epochs) falls, "
    f"from that fifth's first epoch to its last, by less than {FLAT_FALL:.0%} of the best epoch's loss",
    "best": f"the last fifth of the epochs (at least {FLAT_POINTS}) brought the best validation loss, which is kept, "
    f"down by less than {FLAT_FALL:.0%}",
}


def train_package(
    cohort_dir: Path,
    out: Path,
    config: TrainingConfig | Path | str = DEFAULT,
    *,
    device: torch.device | None = None,
    resume: bool = False,
    stop_after_steps: int | None = None,
    networks: tuple[str, ...] | None = None,
    calibration_dir: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    console: Console | None = None,
    initial: ModelPackage | None = None,
    watch: Watch = never_stop,
    created: datetime | None = None,
) -> ModelPackage:
    """Cohort folder -> trained, calibrated package at `out`; the run's checkpoints lie beside it, in `out`.run.

    `config` may be a shipped configuration's name, or a JSON file with any of TrainingConfig's fields. A run that was
    stopped (`stop_after_steps`, of each network, or `networks`) makes a package too, which says that it is unfinished;
    the resumed run's package takes its place. `calibration_dir` is a cohort of its own that sets the intervals.
    `initial` is the package to fine-tune. `created` (now by default) stands in the manifest: a caller that knows when
    its run began gets the same package, hash and all, however often the run was taken up again.

    Raises:
        ValueError: the configuration or the run to resume is not there, no network of some target is yet, a cohort has
            no value of a target, the package to start with doesn't fit, or the calibration cohort is of another kind
            or shares a patient.
        Interrupted: `watch`, asked after every step, said that it shall stop; `resume` goes on.
        PackageError: a finished package is at `out`.
    """
    refuse_to_overwrite(out)
    if not isinstance(config, TrainingConfig):
        config = load_configuration(str(config))
    device = device or torch.device("cpu")
    config = resolved(config, device)
    cohort = Cohort.read(cohort_dir)
    calibration = None if calibration_dir is None else apart(Cohort.read(calibration_dir), cohort, config.targets)
    trained = train(
        cohort,
        config,
        out.with_name(f"{out.name}.run"),
        device=device,
        resume=resume,
        stop_after_steps=stop_after_steps,
        networks=networks,
        checkpoint_seconds=checkpoint_seconds,
        console=console,
        initial=initial,
        watch=watch,
    )
    return package_run(trained, cohort, config, out, device=device, calibration=calibration, created=created)


def apart(calibration: Cohort, cohort: Cohort, targets: tuple[str, ...]) -> Cohort:
    """The calibration cohort, where it is of the same kind, knows the targets, and nobody in it was learned from."""
    calibration.truth(targets)
    if calibration.provenance != cohort.provenance:
        raise ValueError(f"{calibration.provenance} patients can't set the intervals of {cohort.provenance} ones")
    shared = set(calibration.patients) & set(cohort.patients)
    if shared:
        raise ValueError(f"patients in both cohorts, {min(shared)} for one: the intervals would be too narrow")
    return calibration


def package_run(
    trained: Sequence[Trained],
    cohort: Cohort,
    config: TrainingConfig,
    out: Path,
    *,
    device: torch.device | None = None,
    calibration: Cohort | None = None,
    created: datetime | None = None,
) -> ModelPackage:
    """Each network's kept epoch, with intervals from patients that its errors were not trained on."""
    kept = [one for one in trained if one.best]
    for target in config.targets:
        if not any(target in one.plan.targets for one in kept):
            raise ValueError(f"no package yet: no network of {target} has finished an epoch; resume the run")
    device = device or torch.device("cpu")
    judges = calibration or cohort
    if calibration is None:
        judged, answers = _held_out(kept, cohort, config, device)
    else:
        judged = np.arange(len(calibration.patients))
        answers = predict_cohort(_together(kept, config, device), calibration, judged, config.input, "fp32", device)
    together = _together(kept, config, device)
    readout = weigh(together, cohort, config, device)
    unbiased = weigh_apart(together, cohort, config, device) if calibration is None else None
    calibrated = calibrate(readout, judges, judged, answers, config.targets, unbiased)
    files = {one.plan.name: WEIGHTS if len(config.members) == 1 else f"{one.plan.name}.safetensors" for one in kept}
    finished = len(kept) == len(config.members) and all(one.finished for one in kept)
    manifest = Manifest(
        name=config.name,
        version=config.version,
        architecture=config.architecture,
        targets=config.targets,
        input=config.input.to_dict(),
        training={
            **_training(trained, cohort, config, calibration),
            "readout": readout and READOUT,
            "scanners": {} if readout is None else readout.by_scanner(),
            "learned_on": known_scanners(cohort.scanners, cohort.patients) if (cohort.scanners != "").any() else None,
        },
        synthetic_only=cohort.provenance == "digital",
        metrics={"calibration": metrics(judged, calibrated.predicted, judges, config.targets)},
        intervals=calibrated.intervals,
        interval_level=COVERAGE,
        created=(created or datetime.now(UTC)).isoformat(timespec="seconds"),
        members=tuple(
            Member(files[one.plan.name], one.plan.fold, one.plan.targets, one.step, one.best_epoch) for one in kept
        ),
        test_time=config.test_time,
        finished=finished,
    )
    curves = [{"name": one.plan.name, "targets": one.plan.targets, "curve": one.curve} for one in trained]
    extra: dict[str, str | bytes] = {
        "config.json": json.dumps(config.to_dict(), indent=2) + "\n",
        "training.json": json.dumps({"members": curves}, indent=1) + "\n",
        "curves.png": curves_png(trained),
    }
    if readout is not None:
        extra[READOUT] = readout.to_json()
    tensors = {files[one.plan.name]: one.network(config).tensors() for one in kept}
    return write_members(out, manifest, tensors, model_card(manifest, readout), extra)


def _held_out(
    kept: Sequence[Trained], cohort: Cohort, config: TrainingConfig, device: torch.device
) -> tuple[Ints, Floats]:
    """(vertebrae, predictions [vertebrae, targets]) that calibrate: split or cross, see calibration.py."""
    if config.calibration == "split":
        held_out = cohort.where(config.calibration_folds)
        network = _together(kept, config, device)
        return held_out, predict_cohort(network, cohort, held_out, config.input, "fp32", device)
    predicted = np.full((len(cohort.patients), len(config.targets)), np.nan, dtype=np.float32)
    for fold in dict.fromkeys(one.plan.fold for one in kept):
        members = [one for one in kept if one.plan.fold == fold]
        if {target for one in members for target in one.plan.targets} != set(config.targets):
            continue  # this fold's networks are not all there yet
        unseen = cohort.where(members[0].plan.validation)
        network = _together(members, config, device)
        predicted[unseen] = predict_cohort(network, cohort, unseen, config.input, "fp32", device)
    judged = np.flatnonzero(~np.isnan(predicted).any(axis=1))
    if len(judged) == 0:
        raise ValueError("no package yet: no fold has a network of every target; resume the run")
    return judged, predicted[judged]


def _together(members: Sequence[Trained], config: TrainingConfig, device: torch.device) -> PackageNetwork:
    network = PackageNetwork([one.network(config) for one in members], config.targets, config.test_time)
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def metrics(judged: Ints, predicted: Floats, cohort: Cohort, targets: tuple[str, ...]) -> dict[str, Any]:
    """What the manifest and the model card say of the held-out vertebrae, of the package's targets alone."""
    truth, hu = cohort.truth(targets, judged), cohort.hu[judged]
    found: dict[str, Any] = {"n_vertebrae": len(judged), "n_patients": len(set(cohort.patients[judged]))}
    for column, target in enumerate(targets):
        found |= {
            f"{short(target)}_r": correlation(predicted[:, column], truth[:, column]),
            f"hu_{short(target)}_r": correlation(hu, truth[:, column]),
            f"{short(target)}_mean_error": float((predicted - truth)[:, column].mean()),
        }
    return found


def _training(
    trained: Sequence[Trained], cohort: Cohort, config: TrainingConfig, calibration: Cohort | None
) -> dict[str, Any]:
    """What the manifest says of the run: the configuration, the patients, and the steps really done."""
    first = config.members[0]
    steps_each = trained[0].steps  # of a whole network; folds may differ by a batch or two
    by_name = {one.plan.name: one for one in trained}
    return {
        "provenance": cohort.provenance,
        "cohort": dict(cohort.facts),
        "cohort_sha256": cohort.sha256,
        "config": config.to_dict(),
        "calibration_cohort": None if calibration is None else dict(calibration.facts),
        "calibration_cohort_sha256": None if calibration is None else calibration.sha256,
        "patients": {
            "training": cohort.patients_in(first.training),
            "validation": cohort.patients_in(first.validation),
            "calibration": cohort.patients_in(config.calibration_folds)
            if calibration is None
            else len(set(calibration.patients)),
        },
        "steps_done": sum(one.step for one in trained),
        "steps_planned": sum(
            by_name[plan.name].steps if plan.name in by_name else steps_each for plan in config.members
        ),
        "flat_definition": FLAT_DEFINITIONS[config.keep],
        "members": {
            one.plan.name: {
                "targets": list(one.plan.targets),
                "steps_done": one.step,
                "steps_planned": one.steps,
                "best_epoch": one.best_epoch,
                **flatness(one.curve, config.keep),
            }
            for one in trained
        },
    }


def flatness(curve: Sequence[Mapping[str, float]], keep: str = "last") -> dict[str, Any]:
    """Whether more epochs would have helped: `flat` by FLAT_DEFINITIONS, and by how much the loss fell at the end.

    Where the last epoch is kept: Theil-Sen's line, because a validation curve has spikes. Where the best one is, the
    best so far: at a constant learning rate every other epoch is a spike, and the line's verdict changed ten times
    between epochs 24 and 72 of the paper's network for TBS. A rising end (overfitting) is flat: the best epoch lies
    behind it. Both are null where the last fifth is too short.
    """
    losses = np.array([entry["validation_loss"] for entry in curve])
    end = len(losses) - round(FLAT_SHARE * len(losses))
    if len(losses) - end < FLAT_POINTS:
        return {"flat": None, "fall": None}
    best = losses.min()
    if keep == "best":
        fall = float((losses[:end].min() - best) / best)
    else:
        fall = float(-stats.theilslopes(losses[end:]).slope * (len(losses) - end - 1) / best)
    return {"flat": fall < FLAT_FALL, "fall": fall}


def curves_png(trained: Sequence[Trained]) -> bytes:
    """Training and validation loss of every network over its epochs."""
    from matplotlib.figure import Figure  # heavy; only a package needs it

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, one in enumerate(trained):
        epochs = [entry["epoch"] for entry in one.curve]
        for name, style in (("validation", "-"), ("training", ":")):
            losses = [entry[f"{name}_loss"] for entry in one.curve]
            axes.plot(epochs, losses, style, color=f"C{number}", linewidth=1, label=f"{one.plan.name} {name}")
        if one.best_epoch:
            best = one.curve[one.best_epoch - 1]
            axes.plot(best["epoch"], best["validation_loss"], "o", color=f"C{number}", markersize=4)
    axes.set(xlabel="epoch (the dot is kept)", ylabel="Huber loss, standard deviations", yscale="log")
    axes.legend(fontsize="x-small", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------------
# For people


def model_card(manifest: Manifest, readout: Readout | None = None) -> str:
    """What people must know before they use the package; `readout` where it tells scanners apart."""
    held_out = manifest.metrics["calibration"]
    training = manifest.training
    config = training["config"]
    alone = manifest.targets == BMD_ALONE
    score = "" if alone else " and trabecular bone score"
    widths = "\n".join(
        f"| {one.levels} | {one.bmd_g_cm2:.3f} | {NOT_MEASURED if one.tbs is None else f'{one.tbs:.3f}'} |"
        for one in manifest.intervals
    )
    if manifest.synthetic_only:
        kind = "digital patients only (no person's image)"
        tbs = "" if alone else " TBS is *simulated* TBS."
        use = (
            "Digital patients: demonstration, tests, and a start for training on a site's own pairs.\n"
            "For a real patient its values are shown as investigational and drive no decision."
        )
    else:
        kind, tbs = "patients of one site", ""
        use = "Non-contrast 120 kVp CT of adults of the site it was trained on."
    seen = config["input"]["slabs"]
    slabs = "one masked sagittal CT slab" if seen == 1 else f"{seen} adjoining masked sagittal CT slabs"
    if training["calibration_cohort"] is not None:
        judged = f"{held_out['n_patients']} patients of a cohort of their own"
        intervals = "split-conformal"
    elif config["calibration"] == "cross":
        judged = f"{held_out['n_patients']} patients, each judged by the networks of the fold that never trained on it"
        intervals = "from these out-of-fold errors"
    else:
        judged = f"{held_out['n_patients']} calibration patients, who neither trained nor chose an epoch"
        intervals = "split-conformal"
    unfinished = ""
    if not manifest.finished:
        done, planned = training["steps_done"], training["steps_planned"]
        unfinished = f"\n**Unfinished: {done} of {planned} steps.** The run can be resumed; its figures will change.\n"
    return f"""# {manifest.name} {manifest.version}

Investigational, not a medical device; confirm with DXA.
{unfinished}
**What it does.** Estimates lumbar DXA bone mineral density (g/cm2){score} of a vertebra
from {slabs} (5 mm thick), after Yoshida et al. 2023
(doi 10.1097/RCT.0000000000001437).{" TBS is not measured by this model." if alone else ""}
{_networks(manifest)}

**What it was trained on.** {_patients(manifest, kind)}{tbs}

**Intended use.** {use}

**Results on {judged}** (per vertebra, n {held_out["n_vertebrae"]}):

| | r | mean error |
|---|---|---|
{_held_out_rows(manifest)}

**{manifest.interval_level:.0%} intervals** ({intervals}; half-widths of a mean over so many vertebrae):

| vertebrae | BMD g/cm2 | TBS |
|---|---|---|
{widths}
{_scanners(manifest, readout)}
**Training.** {training["steps_done"]} of {training["steps_planned"]} steps in {config["precision"]}.

| network | targets | steps | epoch kept | validation curve |
|---|---|---|---|---|
{_members(manifest)}

Flat means: {training["flat_definition"]}.

**Limits.** Not for contrast-enhanced CT, other tube voltages than 120 kVp, fractured or operated vertebrae,
metal. The network was trained on masks that follow the bone; coarse masks shift its values.
Intervals hold for patients like the calibration patients, not for other scanners or populations.
"""


def _scanners(manifest: Manifest, readout: Readout | None) -> str:
    """How each scanner reads, and what is told of a CT from another one; nothing where all are taken alike."""
    if readout is None or readout.between is None:
        return ""
    if not readout.scanners:
        return "\n**Scanners.** None had enough patients to tell how it reads: all intervals are wider.\n"
    named = [short(target).upper() for target in manifest.targets]
    rows = "\n".join(
        f"| {name} | {known.patients} | {' | '.join(f'{factor:.3f}' for factor in known.factors)} |"
        for name, known in readout.scanners.items()
    )
    differ = " and ".join(f"{share:.1%} ({name})" for share, name in zip(readout.between, named, strict=True))
    return f"""
**Scanners.** Each reads mineral in its own way, so its answers are multiplied by a factor from its own patients' pairs:

| scanner | patients | {" | ".join(named)} |
|---|---|{"---|" * len(named)}
{rows}

On any other scanner there is no factor, and the intervals are wider, as scanners differ by {differ}; there the network
decides for no real patient.
"""


def _held_out_rows(manifest: Manifest) -> str:
    """A row per target, then the comparator's."""
    found = manifest.metrics["calibration"]
    told = [(target, short(target), short(target).upper()) for target in manifest.targets]
    units = {"bmd_g_cm2": " g/cm2"}
    rows = [
        f"| {words} | {found[f'{name}_r']:.3f} | {found[f'{name}_mean_error']:+.4f}{units.get(target, '')} |"
        for target, name, words in told
    ]
    rows += [f"| HU with {words} (comparator) | {found[f'hu_{name}_r']:.3f} | |" for _, name, words in told]
    return "\n".join(rows)


def _networks(manifest: Manifest) -> str:
    batch, count = manifest.training["config"]["batch"], len(manifest.members)
    head = "one joint head" if manifest.training["config"]["heads"] == "joint" else "a network per target"
    if manifest.targets == BMD_ALONE:
        head = "one head"
    many = "" if count == 1 else f"; the mean of {count} networks"
    sides = "; the mean over both orders of the slabs" if manifest.test_time == "exchange-sides" else ""
    origin = manifest.training["config"].get("start_from")
    start = f"fine-tuned from the package {origin[:12]}" if origin else "untrained start"
    if _borrowed(manifest):
        start = f"unchanged from the package {manifest.training['networks_from']['package']} ({origin[:12]})"
    weighed = ""
    if manifest.training.get("readout"):
        weighed = (
            f" Its answers are weighed with {len(NAMES)} measures of the same slabs, the fat over the spine and the "
            f"level ({READOUT}): what is told is what a densitometer would tell, which reads fat over the spine as a "
            "lack of bone."
        )
    return f"Trunk {manifest.architecture}, {start}, {head}, batches of {batch}{many}{sides}.{weighed}"


def _borrowed(manifest: Manifest) -> bool:
    """Whether its networks were trained on another cohort than its readout."""
    return "networks_cohort" in manifest.training


def _patients(manifest: Manifest, kind: str) -> str:
    count, folds = manifest.training["patients"], manifest.training["config"]["cross_folds"]
    each = "" if folds == 1 else f"in each of {folds} folds "
    config = manifest.training["config"]
    if _borrowed(manifest):
        learned = manifest.training["networks_cohort"].get("provenance", "unknown")
        told = f"{count['training']} adjusted the readout, {count['calibration']} set the intervals"
        return f"{kind[0].upper()}{kind[1:]}: {told}. The networks themselves learned from another cohort ({learned})."
    apart = f", {count['calibration']} to set the intervals" if count["calibration"] else ""
    others = f"{count['validation']} to {'watch' if config['keep'] == 'last' else 'choose the epoch'}{apart}."
    if config["validation_folds"] == config["calibration_folds"] and manifest.training["calibration_cohort"] is None:
        others = f"{count['calibration']} to watch and to set the intervals."
    chosen = f"{count['training']} to train, {others}"
    return f"{kind[0].upper()}{kind[1:]}: {each}{chosen}"


def _members(manifest: Manifest) -> str:
    """A row per network that has begun."""
    curve = {True: "flat", False: "not flat", None: "too short to tell"}
    return "\n".join(
        f"| {name} | {', '.join(one['targets'])} | {one['steps_done']} of {one['steps_planned']} "
        f"| {one['best_epoch'] or 'none yet'} | {curve[one['flat']]} |"
        for name, one in manifest.training["members"].items()
    )
