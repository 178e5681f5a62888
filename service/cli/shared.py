"""What the subcommands share: how one is added, what its arguments mean, and the installation that it works on."""

from __future__ import annotations

import argparse
import getpass
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from service.settings import Settings

if TYPE_CHECKING:
    from service.domain.policy import Policy
    from service.store.engine import Store
    from service.workflow.people import By

Handler = Callable[[argparse.Namespace], int]
DISCLAIMER = "Investigational. Not a medical device. Confirm with DXA."


def add_command(commands: Any, name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
    """One subcommand, whose text stands in the help and above its own."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(handler=handler)
    return command


def key_values(assignments: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE arguments as a mapping.

    Raises:
        ValueError: an argument has no '='.
    """
    pairs = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set takes KEY=VALUE, not {assignment!r}")
        pairs[key.strip()] = value.strip()
    return pairs


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, separated by commas."""
    return tuple(int(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Words, separated by commas."""
    return tuple(part.strip() for part in text.split(","))


def open_store(settings: Settings) -> Store:
    """The installation's database; its data folder is made where there is none."""
    from service.store.engine import Store, make_engine

    settings.data_dir.mkdir(parents=True, exist_ok=True)
    return Store(make_engine(settings.sqlalchemy_url))


def site_policy(settings: Settings) -> Policy:
    """The policy in force here."""
    from service.workflow.rules import policy_in_force

    return policy_in_force(settings)


def require_lock(settings: Settings) -> None:
    """Refuse to serve pages off this machine that nothing locks."""
    from service.api import app

    store = open_store(settings)
    try:
        app.require_lock(settings, store)
    finally:
        store.close()


def who_types() -> By:
    """Who types this, for the audit: the account of the machine, which is no user of ours."""
    from service.workflow.clock import utc_now
    from service.workflow.people import By

    try:
        account = getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        account = str(os.getuid())
    return By(f"shell:{account}"[:64], utc_now())


def until_signalled() -> threading.Event:
    """An event that SIGINT and SIGTERM set; handlers run in the main thread and only set it."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    return stopping


def quiet_libraries() -> None:
    """nnU-Net warns about environment variables that its training would need; we only predict."""
    warnings.filterwarnings("ignore", module=r"nnunetv2|torch|totalsegmentator")
