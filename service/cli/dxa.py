"""`osteogate dxa`: DXA results."""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path
from typing import Any

from service.cli.shared import add_command, open_store, site_policy, who_types
from service.settings import Settings


def add_commands(commands: Any) -> None:
    """Add them to the command line."""
    dxa = commands.add_parser("dxa", help="DXA results").add_subparsers(required=True, metavar="ACTION")
    bring = add_command(dxa, "import", run_dxa_import, "DXA results from a CSV of GE Lunar, Hologic APEX or NHANES")
    bring.add_argument("file", type=Path, metavar="FILE")
    bring.add_argument("--mapping", type=Path, metavar="FILE", help="TOML for another layout: our field = its heading")
    bring.add_argument("--manufacturer", default="", metavar="M", help="where the file does not say")
    bring.add_argument("--model", default="", metavar="M", help="where the file does not say")
    bring.add_argument("--scan-date", type=date.fromisoformat, metavar="YYYY-MM-DD", help="of rows without one")
    bring.add_argument("--date-format", default="", metavar="F", help="of strptime, %%m/%%d/%%Y say")
    bring.add_argument("--synthetic", action="store_true", help="results of digital patients")
    bring.add_argument("--skip-refused", action="store_true", help="import the good rows even if others are refused")


def run_dxa_import(options: argparse.Namespace) -> int:
    """`osteogate dxa import`: every refused row on standard error; 1 where nothing was imported."""
    from service.domain.dxa_csv import Defaults
    from service.workflow import dxa

    text = options.file.read_text(encoding="utf-8-sig")
    columns = None if options.mapping is None else _mapping(options.mapping)
    defaults = Defaults(options.manufacturer, options.model, options.scan_date, options.date_format, options.synthetic)
    settings = Settings()
    policy = site_policy(settings)
    with open_store(settings).transaction() as session:
        report = dxa.import_csv(
            session,
            text,
            defaults,
            who_types(),
            window_days=policy.pairing.window_days,
            columns=columns,
            on_refusal=dxa.OnRefusal.SKIP if options.skip_refused else dxa.OnRefusal.STOP,
            name=options.file.name,
        )
    for row in report.refused:
        print(f"line {row.line}: {row.reason.code.value}: {row.reason.text}", file=sys.stderr)
    counts = f"{report.accepted} new, {report.duplicates} known before, {report.passed_over} passed over"
    print(f"{report.layout or 'no known layout'}, {report.rows} rows: {counts}, {len(report.refused)} refused")
    if not report.imported:
        way = (
            "mend the file, or let the good rows in with --skip-refused" if report.layout else "name them by --mapping"
        )
        print(f"nothing was imported: {way}", file=sys.stderr)
    return 0 if report.imported else 1


def _mapping(file: Path) -> dict[str, str]:
    """Our field -> its heading, from a TOML file."""
    import tomllib

    told = tomllib.loads(file.read_text(encoding="utf-8"))
    if not all(isinstance(heading, str) for heading in told.values()):
        raise ValueError(f'{file}: a mapping is lines of  "L1.bmd" = "heading"')
    return told
