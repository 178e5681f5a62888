"""`osteogate`, one command; each subcommand calls one function.

The only module that builds `Settings`, and the only one of `service` that may reach into `worker` and `models`:
lazily, inside the subcommand that needs them, so that the service image runs without torch.
"""

from __future__ import annotations

import argparse
import getpass
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from service.settings import Settings

if TYPE_CHECKING:
    from service.domain.policy import Policy
    from service.store.engine import Store
    from service.workflow.models import ModelLine
    from service.workflow.people import By

Handler = Callable[[argparse.Namespace], int]
WEB_GRACE_SECONDS = 10  # for the requests in hand at a shutdown
DISCLAIMER = "Investigational. Not a medical device. Confirm with DXA."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status is 0 on success, 1 on a failure that is told, 2 on wrong usage."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    handler: Handler = options.handler
    _start_logging(logging.INFO if handler in PROCESSES else logging.WARNING)
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
    _add_installation(commands)
    _add_processes(commands)
    _add_single(commands)
    _add_models(commands)
    return parser


def _command(commands: Any, name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(handler=handler)
    return command


# --- an installation ---------------------------------------------------------------------------------------------


def _add_installation(commands: Any) -> None:
    demo = _command(commands, "demo", run_demo, "a whole installation in a fresh folder, fed with digital patients")
    demo.add_argument("--patients", type=int, default=7, metavar="N")
    demo.add_argument("--seed", type=int, default=1, metavar="S")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write truth, results, addresses and timings")
    demo.add_argument("--stay", action="store_true", help="leave it running until Ctrl-C")
    up = _command(commands, "up", run_up, "the embedded installation, until Ctrl-C")
    up.add_argument("--data", type=Path, metavar="DIR", help="the data folder (OSTEOGATE_DATA_DIR)")
    database = commands.add_parser("db", help="the database").add_subparsers(required=True, metavar="ACTION")
    _command(database, "upgrade", run_db_upgrade, "bring the database to this version's schema")
    _add_people(commands)
    _add_dxa(commands)
    _command(commands, "doctor", run_doctor, "check this installation's parts and say what is amiss")
    health = _command(commands, "health", run_health, "ask one process of this machine whether it does its work")
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
    _policy(settings)  # one that cannot be used is told here, in one line, not by five processes in their logs
    console = Console()
    stopping = _until_signalled()
    with sole_owner(settings.data_dir):
        upgrade(settings.sqlalchemy_url)
        _require_lock(settings)
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


# --- DXA results ---------------------------------------------------------------------------------------------------


def _add_dxa(commands: Any) -> None:
    dxa = commands.add_parser("dxa", help="DXA results").add_subparsers(required=True, metavar="ACTION")
    bring = _command(dxa, "import", run_dxa_import, "DXA results from a CSV of GE Lunar, Hologic APEX or NHANES")
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
    policy = _policy(settings)
    with _store(settings).transaction() as session:
        report = dxa.import_csv(
            session,
            text,
            defaults,
            _shell(),
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


# --- users and keys ------------------------------------------------------------------------------------------------


def _add_people(commands: Any) -> None:
    user = commands.add_parser("user", help="who may log in").add_subparsers(required=True, metavar="ACTION")
    add = _command(user, "add", run_user_add, "a new user; the password is asked for, or read from a file or a pipe")
    _name_and_roles(add)
    _password_file(add)
    _command(user, "list", run_user_list, "every user with roles and state")
    roles = _command(user, "roles", run_user_roles, "other roles for a user, in place of the old ones")
    _name_and_roles(roles)
    password = _command(user, "password", run_user_password, "another password; every session of the user ends")
    password.add_argument("name", metavar="NAME")
    _password_file(password)
    disable = _command(user, "disable", run_user_disable, "let a user in no more; every session ends now")
    disable.add_argument("name", metavar="NAME")
    enable = _command(user, "enable", run_user_enable, "let a disabled user in again")
    enable.add_argument("name", metavar="NAME")

    key = commands.add_parser("key", help="API keys").add_subparsers(required=True, metavar="ACTION")
    create = _command(key, "create", run_key_create, "a new API key, printed this once and kept as a hash only")
    _roles(create)
    create.add_argument("--name", metavar="NAME", help="by which the audit knows it; without one it is numbered")
    create.add_argument("--days", type=int, metavar="N", help="until it expires; without it never")
    _command(key, "list", run_key_list, "every key with roles, state and last use")
    revoke = _command(key, "revoke", run_key_revoke, "let a key open nothing any more")
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

    roles, store = roles_named(options.roles), _store(Settings())
    password = _new_password(options.password_file)
    with store.transaction() as session:
        name = people.add_user(session, options.name, roles, password, _shell())
    print(f"{name}: {', '.join(sorted(roles))}")
    return 0


def run_user_list(_: argparse.Namespace) -> int:
    """`osteogate user list`."""
    from service.workflow import people

    with _store(Settings()).reading() as session:
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
    with _store(Settings()).transaction() as session:
        people.set_roles(session, options.name, roles, _shell())
    return 0


def run_user_password(options: argparse.Namespace) -> int:
    """`osteogate user password`."""
    from service.workflow import people

    store, password = _store(Settings()), _new_password(options.password_file)
    with store.transaction() as session:
        people.set_password(session, options.name, password, _shell())
    return 0


def run_user_disable(options: argparse.Namespace) -> int:
    """`osteogate user disable`."""
    from service.workflow import people

    with _store(Settings()).transaction() as session:
        people.disable(session, options.name, _shell())
    return 0


def run_user_enable(options: argparse.Namespace) -> int:
    """`osteogate user enable`."""
    from service.workflow import people

    with _store(Settings()).transaction() as session:
        people.enable(session, options.name, _shell())
    return 0


def run_key_create(options: argparse.Namespace) -> int:
    """`osteogate key create`: the key alone on standard output, so that a script can keep it."""
    from service.domain.access import roles_named
    from service.workflow import people

    if options.days is not None and options.days < 1:
        raise ValueError("--days takes a whole number above 0")
    roles, by = roles_named(options.roles), _shell()
    expires_at = None if options.days is None else by.now + timedelta(days=options.days)
    with _store(Settings()).transaction() as session:
        label = options.name or f"key {len(people.keys(session)) + 1}"
        key = people.create_key(session, label, roles, by, expires_at=expires_at)
    print(key)
    told = f"{label}: {', '.join(sorted(roles))}. It is shown this once; send it as Authorization: Bearer."
    print(told, file=sys.stderr)
    return 0


def run_key_list(_: argparse.Namespace) -> int:
    """`osteogate key list`."""
    from service.workflow import people

    now = _shell().now
    with _store(Settings()).reading() as session:
        for key in people.keys(session):
            used = f"last used {key.used_at:%Y-%m-%d %H:%M} UTC" if key.used_at else "never used"
            until = f", until {key.expires_at:%Y-%m-%d}" if key.expires_at else ""
            print(f"{key.label}  {', '.join(key.roles)}  {key.state(now)}{until}, {used}")
    return 0


def run_key_revoke(options: argparse.Namespace) -> int:
    """`osteogate key revoke`."""
    from service.workflow import people

    with _store(Settings()).transaction() as session:
        people.revoke_key(session, options.name, _shell())
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


def _shell() -> By:
    """Who types this, for the audit: the account of the machine, which is no user of ours."""
    from service.workflow.clock import utc_now
    from service.workflow.people import By

    try:
        account = getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        account = str(os.getuid())
    return By(f"shell:{account}"[:64], utc_now())


def _require_lock(settings: Settings) -> None:
    from service.api.app import require_lock

    store = _store(settings)
    try:
        require_lock(settings, store)
    finally:
        store.close()


# --- the processes -----------------------------------------------------------------------------------------------


def _add_processes(commands: Any) -> None:
    _command(commands, "listen", run_listen, "the DICOM C-STORE listener")
    _command(commands, "steward", run_steward, "closes quiet studies and rings the bell for waiting work")
    _command(commands, "web", run_web, "the pages and the API")
    worker = _command(commands, "worker", run_worker, "a Celery worker that screens studies, or one that trains")
    worker.add_argument(
        "--queue",
        choices=("screen", "train"),
        default="screen",
        help="'train' takes training runs, niced, and no study",
    )


def run_listen(_: argparse.Namespace) -> int:
    """`osteogate listen`."""
    from service.dicom.listener import Listener
    from service.workflow.intake import Door

    settings, store = Settings(), None
    stopping = _until_signalled()
    store = _store(settings)
    door = Door(store, settings)
    listener = Listener(settings, door.commit, door.refuse)
    listener.start()
    try:
        stopping.wait()
    finally:
        listener.stop()
    return 0


def run_steward(_: argparse.Namespace) -> int:
    """`osteogate steward`."""
    from service.steward import Steward, serve
    from service.workflow.bell import Bell
    from service.workflow.pulse import Pulse

    settings = Settings()
    stopping = _until_signalled()
    bell = Bell(settings.celery_url)
    beat = Pulse(settings.pulses, "steward").beat
    store = _store(settings)
    steward = Steward(store, settings, _policy(settings), bell.ring, beat=beat, ring_training=bell.ring_training)
    if not serve(steward, store, settings, stopping):
        logging.shutdown()
        os._exit(0)  # pynetdicom's threads would hold the process for as long as a peer hangs
    return 0


def run_web(_: argparse.Namespace) -> int:
    """`osteogate web`."""
    import uvicorn

    from service.api.app import create_app

    settings = Settings()
    _require_lock(settings)
    app = create_app(settings, _store(settings), _policy(settings))
    uvicorn.run(
        app,
        host=settings.web_host,
        port=settings.web_port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=WEB_GRACE_SECONDS,
    )
    return 0


def run_worker(options: argparse.Namespace) -> int:
    """`osteogate worker`."""
    from worker.app import run_worker

    settings = Settings()
    run_worker(settings, _store(settings), _policy(settings), options.queue)
    return 0


PROCESSES: tuple[Handler, ...] = (run_listen, run_steward, run_web, run_worker)


# --- single studies ----------------------------------------------------------------------------------------------


def _add_single(commands: Any) -> None:
    send = _command(commands, "send", run_send, "C-STORE files or folders to a DICOM node")
    send.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    send.add_argument("--to", required=True, metavar="HOST:PORT")
    send.add_argument("--called", required=True, metavar="AET")
    send.add_argument("--calling", default="OSTEOGATE", metavar="AET")

    screen = _command(commands, "screen", run_screen, "one CT (DICOM folder or NIfTI) without a server")
    screen.add_argument("path", type=Path, metavar="PATH")
    screen.add_argument(
        "--segmentation", type=Path, metavar="FILE", help="use these vertebrae: a NIfTI label map or a DICOM SEG"
    )
    screen.add_argument("--out", type=Path, required=True, metavar="DIR")

    phantom = commands.add_parser("phantom", help="digital patients").add_subparsers(required=True, metavar="WHAT")
    study = _command(phantom, "study", run_phantom_study, "a digital patient as a DICOM CT series with its truth")
    study.add_argument("--seed", type=int, required=True, metavar="S")
    study.add_argument("--out", type=Path, required=True, metavar="DIR")
    study.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    cohort = _command(phantom, "cohort", run_phantom_cohort, "training crops of digital patients with their truth")
    cohort.add_argument("--seed", type=int, required=True, metavar="S")
    cohort.add_argument("--patients", type=int, required=True, metavar="N")
    cohort.add_argument("--out", type=Path, required=True, metavar="DIR")
    cohort.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    cohort.add_argument(
        "--masks", type=int, default=2, metavar="N", help="cuts of every vertebra: the true mask, and N - 1 rough ones"
    )
    cohort.add_argument(
        "--enriched-share", type=float, default=0.0, metavar="F", help="share of patients drawn evenly over all BMD"
    )
    hospital = _command(
        phantom, "hospital", run_phantom_hospital, "CTs and DXA results of a hospital's digital patients"
    )
    hospital.add_argument("--seed", type=int, required=True, metavar="S")
    hospital.add_argument("--patients", type=int, required=True, metavar="N")
    hospital.add_argument("--out", type=Path, required=True, metavar="DIR")
    hospital.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    hospital.add_argument(
        "--mix-up", type=float, default=0.0, metavar="F", help="share of the DXA results under another patient's ID"
    )
    hospital.add_argument("--processes", type=int, metavar="N", help="side by side; one for each core by default")
    calibration = _command(phantom, "report", run_phantom_report, "a cohort beside the paper's printed figures")
    calibration.add_argument("--cohort", type=Path, required=True, metavar="DIR")
    calibration.add_argument("--out", type=Path, required=True, metavar="DIR")
    reference = _command(phantom, "reference", run_phantom_reference, "the young-adult reference of digital patients")
    reference.add_argument("--seed", type=int, required=True, metavar="S")
    reference.add_argument("--patients", type=int, required=True, metavar="N", help="of each sex")

    acceptance = _command(commands, "acceptance", run_acceptance, "measure the pipeline on digital patients, here")
    acceptance.add_argument("--patients", type=int, default=50, metavar="N")
    acceptance.add_argument("--seed", type=int, metavar="S", help="of the first patient")
    acceptance.add_argument("--json", type=Path, metavar="FILE")


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
    _quiet_libraries()
    from worker.screen import screen_path
    from worker.start import make_pipeline

    settings = Settings()
    document = screen_path(
        options.path,
        options.out,
        lambda: make_pipeline(settings, options.segmentation),
        _policy(settings),
        at=datetime.now().astimezone(),
    )
    print(json.dumps({"decision": document["decision"], "patient": document["patient"]}, indent=2, ensure_ascii=False))
    print(f"{options.out / 'result.json'}  ({DISCLAIMER})")
    return 0


def run_acceptance(options: argparse.Namespace) -> int:
    """`osteogate acceptance`."""
    _quiet_libraries()
    from worker.acceptance import FIRST_SEED, run
    from worker.start import make_pipeline

    first = FIRST_SEED if options.seed is None else options.seed
    report = run(
        make_pipeline(Settings()), range(first, first + options.patients), lambda done: print(done, flush=True)
    )
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


def run_phantom_study(options: argparse.Namespace) -> int:
    """`osteogate phantom study`."""
    from models.phantom.study import make_study

    print(make_study(options.seed, options.out, _pairs(options.settings)))
    return 0


def run_phantom_cohort(options: argparse.Namespace) -> int:
    """`osteogate phantom cohort`."""
    from models.phantom.cohort import make_cohort

    settings = _pairs(options.settings)
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
            _pairs(options.settings),
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


# --- models and weights ------------------------------------------------------------------------------------------


def _add_models(commands: Any) -> None:
    train = _command(commands, "train", run_train, "train a model package on a cohort")
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
        type=_names,
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
    evaluate = _command(commands, "evaluate", run_evaluate, "evaluate a model package on a cohort")
    evaluate.add_argument("--model", required=True, metavar="PACKAGE", help="a folder, an id, or 'active'")
    evaluate.add_argument("--cohort", type=Path, required=True, metavar="DIR")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR")
    evaluate.add_argument(
        "--comparators-from", type=Path, metavar="DIR", help="a cohort to fit the comparators on (else cross-fitted)"
    )
    models = commands.add_parser("models", help="model packages").add_subparsers(required=True, metavar="ACTION")
    _add_registry(models)
    _add_weights(commands)


def _add_weights(commands: Any) -> None:
    weights = commands.add_parser("weights", help="segmentation weights").add_subparsers(
        required=True, metavar="ACTION"
    )
    _command(weights, "status", run_weights_status, "which segmentation weights are in force, and who imported them")
    _command(weights, "verify", run_weights_verify, "hold every file of the weights in force against its pinned sum")
    pull = _command(weights, "pull", run_weights_pull, "fetch TotalSegmentator's published weights and import them")
    pull.add_argument("--task", default="total", metavar="TASK", help="total (the default) or total_v3")
    pull.add_argument("--releases", metavar="URL", help="another place that holds the same archives, by https")
    bring = _command(weights, "import", run_weights_import, "TotalSegmentator's weights from its archives or a folder")
    bring.add_argument("sources", nargs="+", type=Path, metavar="ZIP_OR_FOLDER", help="of both data sets of a task")
    for command in (pull, bring):
        command.add_argument("--by", metavar="NAME", help="who answers for them; without it, who types this")
        command.add_argument("--sums", type=Path, metavar="FILE", help="the site's list, as sha256sum writes it")
        command.add_argument("--replace", action="store_true", help="take other bytes than those pinned before")


def _add_registry(models: Any) -> None:
    _command(models, "list", run_models_list, "the models at hand, the one in force first")
    show = _command(models, "show", run_models_show, "one model's card, and what the gate says of it")
    bring = _command(models, "import", run_models_import, "take a package that another site exported")
    bring.add_argument("file", type=Path, metavar="FILE")
    export = _command(models, "export", run_models_export, "write a model with its reports for another site")
    judge = _command(models, "judge", run_models_judge, "evaluate a model beside the one in force, and ask the gate")
    for command in (show, export, judge):
        command.add_argument("model", metavar="PACKAGE", help="an id, a name with version, or a hash's beginning")
    export.add_argument("--out", type=Path, required=True, metavar="FILE")
    judges = judge.add_mutually_exclusive_group(required=True)
    judges.add_argument("--cohort", type=Path, metavar="DIR", help="patients whom neither learned from")
    judges.add_argument("--run", type=int, metavar="N", help="the locked patients of this training run, cut anew")
    judge.add_argument("--folds", type=_numbers, metavar="F[,F]...", help="these tenths of the cohort only")
    promote = _command(models, "promote", run_models_promote, "put a model that passed the gate in force")
    promote.add_argument("model", metavar="PACKAGE")
    back = _command(models, "rollback", run_models_rollback, "bring back the model that was in force before")
    for command in (promote, back):
        command.add_argument("--reason", required=True, metavar="TEXT")
        command.add_argument("--person", metavar="NAME", help="who stands for it, if that is not who types")


def run_train(options: argparse.Namespace) -> int:
    """`osteogate train`."""
    from models.training import Interrupted, train_package
    from worker.predict import find_device

    if options.refit:
        return run_refit(options)
    stopping = _until_signalled()
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


def run_evaluate(options: argparse.Namespace) -> int:
    """`osteogate evaluate`."""
    from models.evaluation import evaluate_package

    settings = Settings()
    young_adults = _young_adults(options.cohort, _policy(settings))
    package = _package_folder(options.model, settings)
    report = evaluate_package(package, options.cohort, options.out, young_adults, options.comparators_from)
    print(json.dumps(report["per_vertebra"], indent=2))
    print(options.out / "report.html")
    return 0


def _locked_patients(run_id: int, settings: Settings, folder: Path) -> Path:
    """The cohort that judged a training run, cut anew from the stored CTs into `folder`.

    Raises:
        ValueError: there is no such run, or nothing of it is left.
    """
    from service.domain.splits import Part
    from service.workflow import training
    from worker.cohorts import cohort_dir, make_judges

    with _store(settings).reading() as session:
        run, manifest = training.run(session, run_id), training.manifest(session, run_id)
    if run is None or manifest is None:
        raise ValueError(f"no training run {run_id}")
    for lost in make_judges(manifest, run.manifest_sha256, settings, folder):
        print(f"left out: {lost.study_uid} {lost.level or ''} {lost.code}: {lost.text}", file=sys.stderr)
    return cohort_dir(folder, Part.LOCKED)


def _young_adults(cohort: Path, policy: Policy) -> dict[str, float] | None:
    """The young-adult mean BMD by sex that fits a cohort: digital for digital patients, else the site's own choice."""
    from service.domain.bone import REGION, ReferenceOrigin, load_references

    provenance = json.loads((cohort / "cohort.json").read_text(encoding="utf-8")).get("provenance")
    if provenance == "digital":
        entries = [one for one in load_references().entries if one.provenance is ReferenceOrigin.DIGITAL]
    else:
        entries = list(policy.references)
    return {entry.sex: entry.mean_g_cm2 for entry in entries if entry.region == REGION} or None


def _package_folder(told: str, settings: Settings) -> Path:
    """The package that a person means: a folder, or one of the installation's, or one that ships.

    Raises:
        ValueError: there is none.
    """
    from service.workflow import models
    from service.workflow.model import has_registry
    from service.workflow.packages import Library

    if (Path(told) / "manifest.json").is_file():
        return Path(told)
    if has_registry(settings):
        with _store(settings).transaction() as session:
            models.enrol_shipped(session, _shell().now)
            return models.folder(session, models.find(session, told), Library.of(settings))
    from worker.start import package_path  # it loads torch, which the service's image has not

    return package_path(told, settings)


def run_models_list(_: argparse.Namespace) -> int:
    """`osteogate models list`: without an installation the packages that ship."""
    from service.workflow import models
    from service.workflow.clock import utc_now
    from service.workflow.model import has_registry

    settings = Settings()
    if not has_registry(settings):
        from worker.start import packages

        for package in packages():
            print(f"{package.name}  {package.path}")
        return 0
    with _store(settings).transaction() as session:
        found = models.registry(session, utc_now())
    for model in found.models:
        print(f"{model.id}  {model.name}  {model.sha256[:12]}  {model.origin}  {_standing(model)}")
    return 0


def _standing(model: ModelLine) -> str:
    """Where a model stands, in a word or two."""
    if model.in_force:
        return "in force"
    if model.verdict is None:
        return "not judged here"
    return "passed the gate" if model.promotable else "gate shut: " + ", ".join(_codes(model))


def _codes(model: ModelLine) -> list[str]:
    return sorted({reason.code.value for reason in model.against})


def run_models_show(options: argparse.Namespace) -> int:
    """`osteogate models show`."""
    from models.package import ModelPackage
    from service.workflow import models
    from service.workflow.clock import utc_now
    from service.workflow.model import has_registry

    settings = Settings()
    package = ModelPackage.load(_package_folder(options.model, settings))
    print(package.model_card())
    if not has_registry(settings):
        return 0
    with _store(settings).transaction() as session:
        known = models.registry(session, utc_now()).models
    for model in known:
        if model.sha256 == package.sha256:
            print(f"{model.name}  {model.sha256}  {model.origin}  {_standing(model)}")
            for check in model.verdict.checks if model.verdict else ():
                print(f"  {'ok ' if check.passed else 'BAD'} {check.code.value}: {check.text}")
    return 0


def run_models_import(options: argparse.Namespace) -> int:
    """`osteogate models import`."""
    from service.workflow import models
    from service.workflow.packages import Library

    settings = Settings()
    with options.file.open("rb") as file:
        kept = Library.of(settings).receive(file)
    with _store(settings).transaction() as session:
        model = models.enter_imported(session, kept, _shell())
    print(f"{model.id}  {model.name}  {model.sha256[:12]}  signature: {kept.provenance['signature']}")
    print("this site has to judge it before it can be promoted: osteogate models judge", file=sys.stderr)
    return 0


def run_models_export(options: argparse.Namespace) -> int:
    """`osteogate models export`: a file is written whole or not at all."""
    from service.workflow import models
    from service.workflow.packages import Library

    settings, draft = Settings(), options.out.with_name(f".{options.out.name}.draft")
    try:
        with draft.open("xb") as out, _store(settings).transaction() as session:
            model = models.find(session, options.model)
            models.export(session, model, out, _shell(), library=Library.of(settings))
        draft.replace(options.out)
    finally:
        draft.unlink(missing_ok=True)
    print(options.out)
    return 0


def run_models_judge(options: argparse.Namespace) -> int:
    """`osteogate models judge`: 1 where the gate is shut."""
    import tempfile

    from models.evaluation import evaluate
    from models.package import ModelPackage
    from service.workflow import models
    from service.workflow.model import in_force_here
    from service.workflow.packages import Library

    settings = Settings()
    policy, library = _policy(settings), Library.of(settings)
    folders = {"candidate": _package_folder(options.model, settings), "champion": in_force_here(settings).folder}
    with tempfile.TemporaryDirectory() as folder:
        cohort = options.cohort or _locked_patients(options.run, settings, Path(folder) / "run")
        young_adults = _young_adults(cohort, policy)
        reports = {name: Path(folder) / name / "report.json" for name in folders}
        for name, package in folders.items():
            loaded = ModelPackage.load(package)
            evaluate(loaded, cohort, Path(folder) / name, folds=options.folds, young_adult_bmd=young_adults)
        kept = library.keep(folders["candidate"], reports)
    with _store(settings).transaction() as session:
        model = models.judged(session, kept, _shell(), policy=policy)
    for check in model.verdict.checks if model.verdict else ():
        print(f"{'ok ' if check.passed else 'BAD'} {check.code.value}: {check.text}")
    return 0 if model.promotable else 1


def run_models_promote(options: argparse.Namespace) -> int:
    """`osteogate models promote`: every reason where the gate is shut."""
    from service.workflow import models
    from service.workflow.packages import Library

    settings = Settings()
    policy, library = _policy(settings), Library.of(settings)
    try:
        with _store(settings).transaction() as session:
            models.enrol_shipped(session, _shell().now)
            found = models.find(session, options.model)
            model = models.promote(
                session, found, options.reason, _shell(), library=library, policy=policy, person=options.person
            )
    except models.NotPromotable as shut:
        for reason in shut.reasons:
            print(f"{reason.code.value}: {reason.text}", file=sys.stderr)
        print("the gate is shut: nothing was changed", file=sys.stderr)
        return 1
    print(f"{model.name} is in force: each worker takes it with its next study")
    return 0


def run_models_rollback(options: argparse.Namespace) -> int:
    """`osteogate models rollback`."""
    from service.workflow import models

    with _store(Settings()).transaction() as session:
        model = models.rollback(session, options.reason, _shell(), person=options.person)
    print(f"{model.name} is in force: each worker takes it with its next study")
    return 0


def run_weights_status(_: argparse.Namespace) -> int:
    """`osteogate weights status`: verifies, but loads nothing."""
    from worker.pipeline import weights_in_force
    from worker.segmentation.weights import BUILT_IN, verify

    root = weights_in_force(Settings())
    folder = verify(root or BUILT_IN)
    print(f"{folder.name}  sha256 {folder.sha256}  {root or 'built in'}")
    if folder.imported:
        print(f"imported by {folder.imported['imported_by']} at {folder.imported['imported_at']}")
    return 0


def run_weights_verify(options: argparse.Namespace) -> int:
    """`osteogate weights verify`: what `status` says, after both networks have loaded as well."""
    _quiet_libraries()
    from worker.pipeline import weights_in_force
    from worker.segmentation import load_segmenter

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
    _quiet_libraries()
    from service.store.engine import has_schema
    from service.workflow.weights import record_import
    from worker.segmentation.importing import prepare

    by = _shell()
    person = options.by or by.actor
    into = settings.weights_dir or settings.data_dir / "weights"
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with prepare(sources, into, site_sums=options.sums, replace=options.replace) as prepared:
        if has_schema(settings.sqlalchemy_url):
            with _store(settings).transaction() as session:
                folder = prepared.install(by=person, at=by.now)
                record_import(session, prepared.task.name, folder.sha256, prepared.archives, by, person)
        else:
            folder = prepared.install(by=person, at=by.now)
            print("there is no database yet: only IMPORT.json says who imported them", file=sys.stderr)
    print(f"{folder.name}  sha256 {folder.sha256}  {into}")
    print("each worker uses them from its next start")
    return 0


# --- what they share ---------------------------------------------------------------------------------------------


def _store(settings: Settings) -> Store:
    from service.store.engine import Store, make_engine

    settings.data_dir.mkdir(parents=True, exist_ok=True)
    return Store(make_engine(settings.sqlalchemy_url))


def _policy(settings: Settings) -> Policy:
    from service.workflow.rules import policy_in_force

    return policy_in_force(settings)


def _pairs(assignments: Sequence[str]) -> dict[str, str]:
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


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, separated by commas."""
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    """Words, separated by commas."""
    return tuple(part.strip() for part in text.split(","))


def _until_signalled() -> threading.Event:
    """An event that SIGINT and SIGTERM set; handlers run in the main thread and only set it."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    return stopping


def _quiet_libraries() -> None:
    """nnU-Net warns about environment variables that its training would need; we only predict."""
    warnings.filterwarnings("ignore", module=r"nnunetv2|torch|totalsegmentator")


if __name__ == "__main__":
    sys.exit(main())
