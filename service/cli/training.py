"""`osteogate train`: model packages from cohorts."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from service.cli.shared import add_command, names, until_signalled
from service.settings import Settings


def add_commands(commands: Any) -> None:
    """Add them to the command line."""
    train = add_command(commands, "train", run_train, "train a model package on a cohort")
    train.add_argument("--cohort", type=Path, required=True, metavar="DIR")
    train.add_argument("--out", type=Path, required=True, metavar="DIR")
    train.add_argument(
        "--config",
        default="osteogate",
        metavar="NAME|FILE",
        help="a shipped one (osteogate is the default), or a JSON file",
    )
    train.add_argument("--resume", action="store_true", help="go on with the run beside DIR")
    train.add_argument(
        "--stop-after-steps", type=int, metavar="N", help="of each network; the package then says that it is unfinished"
    )
    train.add_argument(
        "--networks",
        type=names,
        metavar="NAME[,NAME]...",
        help="train these only, now: fold0, or of separate heads fold0-tbs alone",
    )
    train.add_argument(
        "--calibration-cohort",
        type=Path,
        metavar="DIR",
        help="sets the intervals, not tenths of the first cohort",
    )
    train.add_argument(
        "--refit",
        metavar="PACKAGE",
        help="keep the networks of PACKAGE, which were trained on this cohort; only readout and intervals are fitted",
    )


def run_train(options: argparse.Namespace) -> int:
    """`osteogate train`."""
    from models.training import Interrupted, train_package
    from worker.predict import find_device

    if options.refit:
        return run_refit(options)
    stopping = until_signalled()
    try:
        package = train_package(
            options.cohort,
            options.out,
            options.config,
            device=find_device(Settings().device),
            resume=options.resume,
            stop_after_steps=options.stop_after_steps,
            networks=options.networks,
            calibration_dir=options.calibration_cohort,
            watch=lambda _: not stopping.is_set(),
        )
    except Interrupted as stopped:
        print(f"{stopped}; every step is kept, --resume goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    steps = package.manifest.training
    state = "finished" if package.manifest.finished else "unfinished, --resume goes on"
    print(f"{package.path}  {steps['steps_done']} of {steps['steps_planned']} steps  {state}")
    return 0


def run_refit(options: argparse.Namespace) -> int:
    """`osteogate train --refit`."""
    from models.package import ModelPackage
    from models.training import load_configuration, refit_package
    from worker.start import package_path

    made = refit_package(
        ModelPackage.load(package_path(options.refit)),
        options.cohort,
        options.out,
        load_configuration(options.config),
        calibration_dir=options.calibration_cohort,
    )
    print(f"{made.path}  the networks of {options.refit}, readout and intervals fitted anew")
    return 0
