"""`osteogate`, one command; each subcommand calls one function, which its module keeps beside its arguments.

The only package that builds `Settings`, and the only one of `service` that may reach into `worker` and `models`:
lazily, inside the subcommand that needs them, so that the service image runs without torch.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from rich.console import Console

from service.cli import dxa, installation, models, people, phantom, processes, studies, training, weights
from service.cli.shared import DISCLAIMER, Handler

# In the order of their help.
PARTS = (installation, people, dxa, processes, studies, phantom, training, models, weights)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status is 0 on success, 1 on a failure that is told, 2 on wrong usage."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    handler: Handler = options.handler
    _start_logging(logging.INFO if handler in processes.PROCESSES else logging.WARNING)
    try:
        return handler(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    except _told() as error:
        Console(stderr=True).print(f"osteogate: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1


def _start_logging(level: int) -> None:
    """Processes log what they do; commands at a terminal print their answer and log only what is amiss."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for wordy in ("pynetdicom", "highdicom", "httpx"):  # at INFO several lines an instance
        logging.getLogger(wordy).setLevel(logging.WARNING)


def _told() -> tuple[type[Exception], ...]:
    """Errors whose message is the answer; anything else is our bug and shows its traceback."""
    from service.domain.errors import OsteogateError
    from service.supervise import AlreadyRunning

    return (OsteogateError, AlreadyRunning, ValueError, OSError)


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="osteogate", description=f"Opportunistic bone screening on CT. {DISCLAIMER}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for part in PARTS:
        part.add_commands(commands)
    return parser
