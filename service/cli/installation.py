"""`osteogate demo | up | db | doctor | health`: a whole installation, and how it fares."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from service.cli.shared import DISCLAIMER, add_command, require_lock, site_policy, until_signalled
from service.settings import Settings


def add_commands(commands: Any) -> None:
    """Add them to the command line."""
    demo = add_command(commands, "demo", run_demo, "a whole installation in a fresh folder, fed with digital patients")
    demo.add_argument("--patients", type=int, default=7, metavar="N")
    demo.add_argument("--seed", type=int, default=1, metavar="S")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write truth, results, addresses and timings")
    demo.add_argument("--stay", action="store_true", help="leave it running until Ctrl-C")
    up = add_command(commands, "up", run_up, "the embedded installation, until Ctrl-C")
    up.add_argument("--data", type=Path, metavar="DIR", help="the data folder (OSTEOGATE_DATA_DIR)")
    database = commands.add_parser("db", help="the database").add_subparsers(required=True, metavar="ACTION")
    add_command(database, "upgrade", run_db_upgrade, "bring the database to this version's schema")
    add_command(commands, "doctor", run_doctor, "check this installation's parts and say what is amiss")
    health = add_command(commands, "health", run_health, "ask one process of this machine whether it does its work")
    health.add_argument("part", choices=("listener", "web", "steward", "worker"))


def run_demo(options: argparse.Namespace) -> int:
    """`osteogate demo`."""
    from service.demo import run

    return run(patients=options.patients, seed=options.seed, json_file=options.json, stay=options.stay)


def run_up(options: argparse.Namespace) -> int:
    """`osteogate up`."""
    from service.store.engine import upgrade
    from service.supervise import Installation, sole_owner

    settings = Settings(**({"data_dir": options.data} if options.data else {}))
    site_policy(settings)  # one that cannot be used is told here, in one line, not by five processes in their logs
    console = Console()
    stopping = until_signalled()
    with sole_owner(settings.data_dir):
        upgrade(settings.sqlalchemy_url)
        require_lock(settings)
        console.print(f"[bold]Osteogate[/] {DISCLAIMER}", highlight=False)
        console.print(
            f"  DICOM   {settings.ae_title} at {settings.dicom_host}:{settings.dicom_port}\n"
            f"  pages   http://{settings.web_host}:{settings.web_port}/\n"
            f"  data    {settings.data_dir.resolve()} (logs in logs/)\n"
            "  Ctrl-C stops it; nothing is lost.",
            highlight=False,
            soft_wrap=True,
        )
        Installation.of(settings, console.print).run(stopping.is_set)
    return 0


def run_db_upgrade(_: argparse.Namespace) -> int:
    """`osteogate db upgrade`."""
    from service.store.engine import upgrade

    settings = Settings()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    upgrade(settings.sqlalchemy_url)
    return 0


def run_doctor(_: argparse.Namespace) -> int:
    """`osteogate doctor`."""
    from service.doctor import examine

    console = Console()
    findings = examine(Settings())
    for finding in findings:
        console.print(f"[{'green' if finding.good else 'red'}]{'ok ' if finding.good else 'BAD'}[/] ", end="")
        console.print(f"{finding.part}: {finding.text}", markup=False, highlight=False, soft_wrap=True)
    return 0 if all(finding.good for finding in findings) else 1


def run_health(options: argparse.Namespace) -> int:
    """`osteogate health`: one sentence; a part that is not healthy is told like any other failure."""
    from service.health import check

    print(check(options.part, Settings()))
    return 0
