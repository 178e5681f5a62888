"""A package's own networks with readout and intervals fitted anew: a minute instead of hours.

`refit_package` does it on the cohort that the networks were trained on. `refit_for_site` does it on patients whom they
have never seen: what a site without a GPU can learn from its own pairs.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.package import READOUT, ModelPackage, refuse_to_overwrite, write_members
from models.readout import Readout
from models.resnet50 import load_network
from models.training.calibration import Calibrated, calibrate
from models.training.cohort import Cohort, Ints
from models.training.configuration import TrainingConfig
from models.training.loop import predict_cohort
from models.training.packaging import apart, metrics, model_card
from models.training.readout import adjust_readout, cohort_columns, weigh, weigh_apart


def refit_package(
    package: ModelPackage,
    cohort_dir: Path,
    out: Path,
    config: TrainingConfig,
    *,
    calibration_dir: Path | None = None,
) -> ModelPackage:
    """The package's own networks with a readout and intervals of their own; no network is trained.

    `cohort_dir` is the cohort that they were trained on, `config` their configuration but for version and readout.

    Raises:
        ValueError: the cohort or the configuration is another one.
        PackageError: a package is at `out`.
    """
    refuse_to_overwrite(out)
    told = package.manifest.training
    cohort = Cohort.read(cohort_dir)
    if cohort.sha256 != told.get("cohort_sha256") and not _rendered_again(cohort, told):
        raise ValueError(f"{cohort_dir} is not the cohort that {package.name} was trained on")
    before = TrainingConfig.from_dict(told["config"])
    if replace(config, version=before.version, readout=before.readout, precision=before.precision) != before:
        raise ValueError(f"the configuration differs from that of {package.name} in more than version and readout")
    config = replace(config, precision=before.precision)
    calibration = None if calibration_dir is None else apart(Cohort.read(calibration_dir), cohort, config.targets)
    device = torch.device("cpu")
    network = load_network(package, device)
    readout = weigh(network, cohort, config, device)
    judges = calibration or cohort
    judged = judges.where(config.calibration_folds) if calibration is None else np.arange(len(judges.patients))
    answers = predict_cohort(network, judges, judged, config.input, "fp32", device)
    own = weigh_apart(network, cohort, config, device) if calibration is None else None
    calibrated = calibrate(readout, judges, judged, answers, config.targets, own)
    training = {
        **told,
        "cohort_sha256": cohort.sha256,
        "config": config.to_dict(),
        "readout": readout and READOUT,
        "networks_from": {"package": package.name, "sha256": package.sha256},
        "calibration_cohort": None if calibration is None else dict(calibration.facts),
        "calibration_cohort_sha256": None if calibration is None else calibration.sha256,
        "patients": {**told["patients"], "calibration": len(set(judges.patients[judged]))},
    }
    return _write(package, out, config, training, readout, judges, judged, calibrated)


def _rendered_again(cohort: Cohort, told: Mapping[str, Any]) -> bool:
    """Whether these are the digital patients that the networks were trained on, drawn again from the same seed.

    Another processor rounds an exponential differently in its last bit, and with it some voxel by one HU.
    """
    return "phantom_sha256" in cohort.facts and dict(cohort.facts) == told.get("cohort")


def refit_for_site(
    package: ModelPackage,
    cohort_dir: Path,
    out: Path,
    config: TrainingConfig,
    *,
    created: datetime | None = None,
) -> ModelPackage:
    """The package's own networks, its readout adjusted to a cohort that none of them was trained on.

    The configuration's calibration folds set the intervals, everybody else adjusts the readout. Each scanner gets its
    own factors, a CT from another one wider intervals.

    Raises:
        ValueError: too few patients, or measures that the networks' input does not allow.
        PackageError: a package is at `out`.
    """
    refuse_to_overwrite(out)
    told = package.manifest.training
    cohort = Cohort.read(cohort_dir)
    device = torch.device("cpu")
    network = load_network(package, device)
    everybody = np.arange(len(cohort.patients))
    judged = cohort.where(config.calibration_folds)
    fitting = np.setdiff1d(everybody, judged)
    answers = predict_cohort(network, cohort, everybody, config.input, "fp32", device)
    table = cohort_columns(cohort, everybody, answers)
    before = Readout.of(package) or Readout.unweighed(table[fitting], config.targets)
    truth, patients, scanners = cohort.truth(config.targets), cohort.patients, cohort.scanners
    readout = adjust_readout(before, table[fitting], truth[fitting], patients[fitting], scanners[fitting])
    calibrated = calibrate(readout, cohort, judged, answers[judged], config.targets)
    training = {
        **told,
        "provenance": cohort.provenance,
        "cohort": dict(cohort.facts),
        "cohort_sha256": cohort.sha256,
        "config": config.to_dict(),
        "readout": READOUT,
        "scanners": readout.by_scanner(),
        "networks_from": {"package": package.name, "sha256": package.sha256},
        "networks_cohort": told.get("networks_cohort", told["cohort"]),
        "calibration_cohort": None,
        "calibration_cohort_sha256": None,
        "patients": {
            "training": len(set(cohort.patients[fitting])),
            "validation": 0,
            "calibration": len(set(cohort.patients[judged])),
        },
    }
    return _write(package, out, config, training, readout, cohort, judged, calibrated, created)


def _write(
    package: ModelPackage,
    out: Path,
    config: TrainingConfig,
    training: dict[str, Any],
    readout: Readout | None,
    judges: Cohort,
    judged: Ints,
    calibrated: Calibrated,
    created: datetime | None = None,
) -> ModelPackage:
    """The package's networks as they are, with what was fitted, and what it says of the `judged`."""
    manifest = replace(
        package.manifest,
        name=config.name,
        version=config.version,
        training=training,
        synthetic_only=training["provenance"] == "digital",
        metrics={"calibration": metrics(judged, calibrated.predicted, judges, config.targets)},
        intervals=calibrated.intervals,
        created=(created or datetime.now(UTC)).isoformat(timespec="seconds"),
        files={},
    )
    kept = [name for name in ("training.json", "curves.png") if (package.path / name).is_file()]
    extra: dict[str, str | bytes] = {name: (package.path / name).read_bytes() for name in kept}
    extra["config.json"] = json.dumps(config.to_dict(), indent=2) + "\n"
    if readout is not None:
        extra[READOUT] = readout.to_json()
    tensors = {member.file: package.weights(member.file) for member in manifest.members}
    return write_members(out, manifest, tensors, model_card(manifest, readout), extra)
