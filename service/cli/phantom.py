"""`osteogate phantom`: digital patients."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from service.cli.shared import add_command, key_values


def add_commands(commands: Any) -> None:
    """Add them to the command line."""
    phantom = commands.add_parser("phantom", help="digital patients").add_subparsers(required=True, metavar="WHAT")
    study = add_command(phantom, "study", run_phantom_study, "a digital patient as a DICOM CT series with its truth")
    _drawn(study)
    cohort = add_command(phantom, "cohort", run_phantom_cohort, "training crops of digital patients with their truth")
    _drawn(cohort, many=True)
    cohort.add_argument(
        "--masks", type=int, default=2, metavar="N", help="cuts of every vertebra: the true mask, and N - 1 rough ones"
    )
    cohort.add_argument(
        "--enriched-share", type=float, default=0.0, metavar="F", help="share of patients drawn evenly over all BMD"
    )
    hospital = add_command(
        phantom, "hospital", run_phantom_hospital, "CTs and DXA results of a hospital's digital patients"
    )
    _drawn(hospital, many=True)
    hospital.add_argument(
        "--scanners",
        type=int,
        default=1,
        metavar="N",
        help="one that reads high, or one of each of N makers, gains drawn",
    )
    hospital.add_argument(
        "--mix-up", type=float, default=0.0, metavar="F", help="share of the DXA results under another patient's ID"
    )
    hospital.add_argument("--processes", type=int, metavar="N", help="side by side; one for each core by default")
    calibration = add_command(phantom, "report", run_phantom_report, "a cohort beside the paper's printed figures")
    calibration.add_argument("--cohort", type=Path, required=True, metavar="DIR")
    calibration.add_argument("--out", type=Path, required=True, metavar="DIR")
    reference = add_command(
        phantom, "reference", run_phantom_reference, "the young-adult reference of digital patients"
    )
    reference.add_argument("--seed", type=int, required=True, metavar="S")
    reference.add_argument("--patients", type=int, required=True, metavar="N", help="of each sex")


def _drawn(command: argparse.ArgumentParser, *, many: bool = False) -> None:
    """Who is drawn, with which settings, and where they are written."""
    command.add_argument("--seed", type=int, required=True, metavar="S")
    if many:
        command.add_argument("--patients", type=int, required=True, metavar="N")
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")


def run_phantom_study(options: argparse.Namespace) -> int:
    """`osteogate phantom study`."""
    from models.phantom.study import make_study

    print(make_study(options.seed, options.out, key_values(options.settings)))
    return 0


def run_phantom_cohort(options: argparse.Namespace) -> int:
    """`osteogate phantom cohort`."""
    from models.phantom.cohort import make_cohort

    settings = key_values(options.settings)
    print(
        make_cohort(
            options.seed,
            options.patients,
            options.out,
            settings,
            variants=options.masks,
            enriched_share=options.enriched_share,
        )
    )
    return 0


def run_phantom_hospital(options: argparse.Namespace) -> int:
    """`osteogate phantom hospital`."""
    from models.phantom.hospital import make_hospital

    print(
        make_hospital(
            options.seed,
            options.patients,
            options.out,
            key_values(options.settings),
            scanners=options.scanners,
            mix_up=options.mix_up,
            processes=options.processes,
        )
    )
    return 0


def run_phantom_report(options: argparse.Namespace) -> int:
    """`osteogate phantom report`: non-zero where a figure is further from the printed one than asked."""
    from models.phantom.calibration import report

    rows = report(options.cohort, options.out)["rows"]
    for row in rows:
        mark = {True: "", False: "  <- apart", None: ""}[row["within"]]
        print(f"{row['name']:36} printed {row['printed']:8.3f}   digital {row['digital']:8.3f}{mark}")
    return int(any(row["within"] is False for row in rows))


def run_phantom_reference(options: argparse.Namespace) -> int:
    """`osteogate phantom reference`: the `[digital]` tables of service/domain/references/digital.toml."""
    from models.phantom.young_adults import AGES, measure_young_adults
    from service.domain.bone import DEVICE, REGION, Reference, ReferenceOrigin, digital_section

    cohorts = [measure_young_adults(options.seed, options.patients, sex) for sex in ("F", "M")]
    command = f"osteogate phantom reference --seed {options.seed} --patients {options.patients}"
    references = [
        Reference(
            key=f"young-{cohort.sex.lower()}-l1l4",
            provenance=ReferenceOrigin.DIGITAL,
            device=DEVICE,
            region=REGION,
            sex=cohort.sex,
            ages=f"{AGES[0]}-{AGES[1]}",
            population=f"{cohort.patients} digital patients",
            mean_g_cm2=round(cohort.mean_g_cm2, 4),
            sd_g_cm2=round(cohort.sd_g_cm2, 4),
            source=command,
            version="3",  # of the phantom that it is measured on
        )
        for cohort in cohorts
    ]
    print(digital_section(references))
    return 0
