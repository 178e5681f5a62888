"""A package's own networks with readout and intervals fitted anew: a minute instead of hours."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from models.package import READOUT, ModelPackage, refuse_to_overwrite, write_members
from models.resnet50 import load_network
from models.training.calibration import conformal_intervals
from models.training.cohort import Cohort
from models.training.configuration import TrainingConfig
from models.training.loop import predict_cohort
from models.training.packaging import apart, metrics, model_card
from models.training.readout import cohort_columns, weigh


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
    if cohort.sha256 != told.get("cohort_sha256"):
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
    predicted = predict_cohort(network, judges, judged, config.input, "fp32", device)
    if readout is not None:
        predicted = readout.of_columns(cohort_columns(judges, judged, predicted)).astype(np.float32)
    training = {
        **told,
        "config": config.to_dict(),
        "readout": readout and READOUT,
        "networks_from": {"package": package.name, "sha256": package.sha256},
        "calibration_cohort": None if calibration is None else dict(calibration.facts),
        "calibration_cohort_sha256": None if calibration is None else calibration.sha256,
        "patients": {**told["patients"], "calibration": len(set(judges.patients[judged]))},
    }
    manifest = replace(
        package.manifest,
        name=config.name,
        version=config.version,
        training=training,
        metrics={"calibration": metrics(judged, predicted, judges, config.targets)},
        intervals=conformal_intervals(predicted - judges.truth(config.targets, judged), judges.patients[judged]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files={},
    )
    kept = ("training.json", "curves.png")
    extra: dict[str, str | bytes] = {name: (package.path / name).read_bytes() for name in kept}
    extra["config.json"] = json.dumps(config.to_dict(), indent=2) + "\n"
    if readout is not None:
        extra[READOUT] = readout.to_json()
    tensors = {member.file: package.weights(member.file) for member in manifest.members}
    return write_members(out, manifest, tensors, model_card(manifest), extra)
