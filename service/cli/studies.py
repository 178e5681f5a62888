"""`osteogate send | screen | acceptance`: CTs, without a PACS."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from service.cli.shared import DISCLAIMER, add_command, quiet_libraries, site_policy
from service.settings import Settings


def add_commands(commands: Any) -> None:
    """Add them to the command line."""
    send = add_command(commands, "send", run_send, "C-STORE files or folders to a DICOM node")
    send.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    send.add_argument("--to", required=True, metavar="HOST:PORT")
    send.add_argument("--called", required=True, metavar="AET")
    send.add_argument("--calling", default="OSTEOGATE", metavar="AET")

    screen = add_command(commands, "screen", run_screen, "one CT (DICOM folder or NIfTI) without a server")
    screen.add_argument("path", type=Path, metavar="PATH")
    screen.add_argument(
        "--segmentation", type=Path, metavar="FILE", help="use these vertebrae: a NIfTI label map or a DICOM SEG"
    )
    screen.add_argument("--out", type=Path, required=True, metavar="DIR")
    _takes_a_model(screen)

    acceptance = add_command(commands, "acceptance", run_acceptance, "measure the pipeline on digital patients, here")
    acceptance.add_argument("--patients", type=int, default=50, metavar="N")
    acceptance.add_argument("--seed", type=int, metavar="S", help="of the first patient")
    acceptance.add_argument("--json", type=Path, metavar="FILE")
    _takes_a_model(acceptance)


def _takes_a_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="PACKAGE", help="a folder or a name with version (else the one in force)")


def run_send(options: argparse.Namespace) -> int:
    """`osteogate send`."""
    from rich.progress import Progress

    from service.dicom.send import send_files

    host, _, port = options.to.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("--to takes HOST:PORT")
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task(f"to {options.called}", total=None)
        report = send_files(
            options.paths,
            host=host,
            port=int(port),
            called=options.called,
            calling=options.calling,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for path, text in report.failed:
        console.print(f"{path}: {text}", style="red", markup=False, highlight=False)
    passed_over = f", {len(report.passed_over)} passed over (not DICOM)" if report.passed_over else ""
    console.print(f"{len(report.sent)} stored, {len(report.failed)} failed{passed_over}")
    return 1 if report.failed or not report.sent else 0


def run_screen(options: argparse.Namespace) -> int:
    """`osteogate screen`."""
    quiet_libraries()
    from worker.screen import screen_path
    from worker.start import make_pipeline

    settings = Settings()
    document = screen_path(
        options.path,
        options.out,
        lambda: make_pipeline(settings, options.segmentation, options.model),
        site_policy(settings),
        at=datetime.now().astimezone(),
    )
    print(json.dumps({"decision": document["decision"], "patient": document["patient"]}, indent=2, ensure_ascii=False))
    print(f"{options.out / 'result.json'}  ({DISCLAIMER})")
    return 0


def run_acceptance(options: argparse.Namespace) -> int:
    """`osteogate acceptance`."""
    quiet_libraries()
    from worker.acceptance import FIRST_SEED, run
    from worker.start import make_pipeline

    settings = Settings()
    first = FIRST_SEED if options.seed is None else options.seed
    pipeline = make_pipeline(settings, model=options.model)
    report = run(pipeline, range(first, first + options.patients), lambda done: print(done, flush=True))
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1
