"""`osteogate user | key`: who may do what."""

from __future__ import annotations

import argparse
import getpass
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from service.cli.shared import add_command, open_store, who_types
from service.settings import Settings


def add_commands(commands: Any) -> None:
    """Add them to the command line."""
    user = commands.add_parser("user", help="who may log in").add_subparsers(required=True, metavar="ACTION")
    add = add_command(user, "add", run_user_add, "a new user; the password is asked for, or read from a file or a pipe")
    _name_and_roles(add)
    _password_file(add)
    add_command(user, "list", run_user_list, "every user with roles and state")
    roles = add_command(user, "roles", run_user_roles, "other roles for a user, in place of the old ones")
    _name_and_roles(roles)
    password = add_command(user, "password", run_user_password, "another password; every session of the user ends")
    password.add_argument("name", metavar="NAME")
    _password_file(password)
    disable = add_command(user, "disable", run_user_disable, "let a user in no more; every session ends now")
    disable.add_argument("name", metavar="NAME")
    enable = add_command(user, "enable", run_user_enable, "let a disabled user in again")
    enable.add_argument("name", metavar="NAME")

    key = commands.add_parser("key", help="API keys").add_subparsers(required=True, metavar="ACTION")
    create = add_command(key, "create", run_key_create, "a new API key, printed this once and kept as a hash only")
    _roles(create)
    create.add_argument("--name", metavar="NAME", help="by which the audit knows it; without one it is numbered")
    create.add_argument("--days", type=int, metavar="N", help="until it expires; without it never")
    add_command(key, "list", run_key_list, "every key with roles, state and last use")
    revoke = add_command(key, "revoke", run_key_revoke, "let a key open nothing any more")
    revoke.add_argument("name", metavar="NAME")


def _name_and_roles(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME")
    _roles(command)


def _roles(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--role",
        action="append",
        required=True,
        dest="roles",
        metavar="ROLE",
        help="viewer, clinician, pacs-admin or ml-admin; once for each role",
    )


def _password_file(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="its first line is the password (never an argument: `ps` shows it)",
    )


def run_user_add(options: argparse.Namespace) -> int:
    """`osteogate user add`."""
    from service.domain.access import roles_named
    from service.workflow import people

    roles, store = roles_named(options.roles), open_store(Settings())
    password = _new_password(options.password_file)
    with store.transaction() as session:
        name = people.add_user(session, options.name, roles, password, who_types())
    print(f"{name}: {', '.join(sorted(roles))}")
    return 0


def run_user_list(_: argparse.Namespace) -> int:
    """`osteogate user list`."""
    from service.workflow import people

    with open_store(Settings()).reading() as session:
        found = people.users(session)
    for user in found:
        seen = f"last seen {user.last_seen_at:%Y-%m-%d %H:%M} UTC" if user.last_seen_at else "not logged in"
        print(f"{user.name}  {', '.join(user.roles)}  {'disabled' if user.disabled else seen}")
    if not found:
        print("no users yet: the pages are open to this machine only, or behind one password for everybody")
    return 0


def run_user_roles(options: argparse.Namespace) -> int:
    """`osteogate user roles`."""
    from service.domain.access import roles_named
    from service.workflow import people

    roles = roles_named(options.roles)
    with open_store(Settings()).transaction() as session:
        people.set_roles(session, options.name, roles, who_types())
    return 0


def run_user_password(options: argparse.Namespace) -> int:
    """`osteogate user password`."""
    from service.workflow import people

    store, password = open_store(Settings()), _new_password(options.password_file)
    with store.transaction() as session:
        people.set_password(session, options.name, password, who_types())
    return 0


def run_user_disable(options: argparse.Namespace) -> int:
    """`osteogate user disable`."""
    from service.workflow import people

    with open_store(Settings()).transaction() as session:
        people.disable(session, options.name, who_types())
    return 0


def run_user_enable(options: argparse.Namespace) -> int:
    """`osteogate user enable`."""
    from service.workflow import people

    with open_store(Settings()).transaction() as session:
        people.enable(session, options.name, who_types())
    return 0


def run_key_create(options: argparse.Namespace) -> int:
    """`osteogate key create`: the key alone on standard output, so that a script can keep it."""
    from service.domain.access import roles_named
    from service.workflow import people

    if options.days is not None and options.days < 1:
        raise ValueError("--days takes a whole number above 0")
    roles, by = roles_named(options.roles), who_types()
    expires_at = None if options.days is None else by.now + timedelta(days=options.days)
    with open_store(Settings()).transaction() as session:
        label = options.name or f"key {len(people.keys(session)) + 1}"
        key = people.create_key(session, label, roles, by, expires_at=expires_at)
    print(key)
    told = f"{label}: {', '.join(sorted(roles))}. It is shown this once; send it as Authorization: Bearer."
    print(told, file=sys.stderr)
    return 0


def run_key_list(_: argparse.Namespace) -> int:
    """`osteogate key list`."""
    from service.workflow import people

    now = who_types().now
    with open_store(Settings()).reading() as session:
        for key in people.keys(session):
            used = f"last used {key.used_at:%Y-%m-%d %H:%M} UTC" if key.used_at else "never used"
            until = f", until {key.expires_at:%Y-%m-%d}" if key.expires_at else ""
            print(f"{key.label}  {', '.join(key.roles)}  {key.state(now)}{until}, {used}")
    return 0


def run_key_revoke(options: argparse.Namespace) -> int:
    """`osteogate key revoke`."""
    from service.workflow import people

    with open_store(Settings()).transaction() as session:
        people.revoke_key(session, options.name, who_types())
    return 0


def _new_password(file: Path | None) -> str:
    """A password from a file, from a pipe, or asked for twice at a terminal."""
    if file is not None:
        return _first_line(file.read_text(encoding="utf-8"))
    if not sys.stdin.isatty():
        return _first_line(sys.stdin.readline())
    password = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != password:
        raise ValueError("the two passwords differ")
    return password


def _first_line(text: str) -> str:
    return text.partition("\n")[0].rstrip("\r")
