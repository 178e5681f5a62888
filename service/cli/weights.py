"""`osteogate weights`: what segments the vertebrae."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from service.cli.shared import add_command, open_store, quiet_libraries, who_types
from service.settings import Settings


def add_commands(commands: Any) -> None:
    """Add them to the command line."""
    weights = commands.add_parser("weights", help="segmentation weights").add_subparsers(
        required=True, metavar="ACTION"
    )
    add_command(weights, "status", run_weights_status, "which segmentation weights are in force, and who imported them")
    add_command(weights, "verify", run_weights_verify, "hold every file of the weights in force against its pinned sum")
    pull = add_command(weights, "pull", run_weights_pull, "fetch TotalSegmentator's published weights and import them")
    pull.add_argument("--task", default="total", metavar="TASK", help="total (the default) or total_v3")
    pull.add_argument("--releases", metavar="URL", help="another place that holds the same archives, by https")
    bring = add_command(
        weights, "import", run_weights_import, "TotalSegmentator's weights from its archives or a folder"
    )
    bring.add_argument("sources", nargs="+", type=Path, metavar="ZIP_OR_FOLDER", help="of both data sets of a task")
    for command in (pull, bring):
        command.add_argument("--by", metavar="NAME", help="who answers for them; without it, who types this")
        command.add_argument("--sums", type=Path, metavar="FILE", help="the site's list, as sha256sum writes it")
        command.add_argument("--replace", action="store_true", help="take other bytes than those pinned before")


def run_weights_status(_: argparse.Namespace) -> int:
    """`osteogate weights status`: verifies, but loads nothing."""
    from worker.segmentation.weights import BUILT_IN, verify, weights_in_force

    root = weights_in_force(Settings())
    folder = verify(root or BUILT_IN)
    print(f"{folder.name}  sha256 {folder.sha256}  {root or 'built in'}")
    if folder.imported:
        print(f"imported by {folder.imported['imported_by']} at {folder.imported['imported_at']}")
    return 0


def run_weights_verify(options: argparse.Namespace) -> int:
    """`osteogate weights verify`: what `status` says, after both networks have loaded as well."""
    quiet_libraries()
    from worker.segmentation import load_segmenter
    from worker.segmentation.weights import weights_in_force

    load_segmenter(weights_in_force(Settings()), "cpu")
    return run_weights_status(options)


def run_weights_pull(options: argparse.Namespace) -> int:
    """`osteogate weights pull`: the published archives over https, then as `import`."""
    import tempfile

    from rich.progress import Progress

    from worker.segmentation import pulling
    from worker.segmentation.theirs import RELEASES

    task = pulling.task_named(options.task)
    settings = Settings()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    releases = options.releases or RELEASES
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=settings.data_dir) as folder:
        with Progress(console=Console(stderr=True)) as progress:
            bars: dict[str, Any] = {}

            def tell(name: str, done: int, total: int | None) -> None:
                if name not in bars:
                    bars[name] = progress.add_task(name, total=total)
                progress.update(bars[name], completed=done)

            archives = pulling.fetch(task, Path(folder), tell, releases=releases)
        return _import_weights(settings, archives, options)


def run_weights_import(options: argparse.Namespace) -> int:
    """`osteogate weights import`."""
    return _import_weights(Settings(), options.sources, options)


def _import_weights(settings: Settings, sources: Sequence[Path], options: argparse.Namespace) -> int:
    """Check, pin and put in force; the audit row in the same transaction where there is a database."""
    quiet_libraries()
    from service.store.engine import has_schema
    from service.workflow.weights import record_import
    from worker.segmentation.importing import prepare

    by = who_types()
    person = options.by or by.actor
    into = settings.weights_dir or settings.data_dir / "weights"
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with prepare(sources, into, site_sums=options.sums, replace=options.replace) as prepared:
        if has_schema(settings.sqlalchemy_url):
            with open_store(settings).transaction() as session:
                folder = prepared.install(by=person, at=by.now)
                record_import(session, prepared.task.name, folder.sha256, prepared.archives, by, person)
        else:
            folder = prepared.install(by=person, at=by.now)
            print("there is no database yet: only IMPORT.json says who imported them", file=sys.stderr)
    print(f"{folder.name}  sha256 {folder.sha256}  {into}")
    print("each worker uses them from its next start")
    return 0
