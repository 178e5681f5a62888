"""`osteogate doctor`: looks at each part of an installation and says, in a sentence, what is amiss."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_address

from redis import Redis
from redis.exceptions import AuthenticationError, ConnectionError
from sqlalchemy import inspect, text

from models.package import ModelPackage, PackageError
from service.domain.access import Role
from service.settings import MIB, Settings
from service.store.engine import Store, make_engine
from service.workflow import people
from service.workflow.clock import utc_now
from service.workflow.model import in_force_here
from service.workflow.rules import policy_in_force

PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class Finding:
    """One part of the installation and whether it is fit to run."""

    part: str
    good: bool
    text: str


def examine(settings: Settings) -> list[Finding]:
    """Examine every part; one that cannot even be examined is a finding, never an exception."""
    checks: dict[str, Callable[[Settings], str]] = {
        "data folder": _data_folder,
        "database": _database,
        "broker": _broker,
        "policy": _policy,
        "model": _model,
        "users": _users,
        "worker packages": _worker_packages,
    }
    return [_finding(part, check, settings) for part, check in checks.items()]


def _finding(part: str, check: Callable[[Settings], str], settings: Settings) -> Finding:
    try:
        return Finding(part, True, check(settings))
    except Exception as error:
        return Finding(part, False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else part}")


def _data_folder(settings: Settings) -> str:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.data_dir).free
    if free < settings.disk_floor_bytes:
        raise OSError(f"{free // MIB} MiB free, below the floor of {settings.disk_floor_bytes // MIB} MiB")
    return f"{settings.data_dir.resolve()}, {free // MIB} MiB free"


def _database(settings: Settings) -> str:
    engine = make_engine(settings.sqlalchemy_url)
    try:
        if not inspect(engine).has_table("alembic_version"):
            raise LookupError("no schema yet: `osteogate up` makes it, or `osteogate db upgrade`")
        with engine.connect() as connection:
            version = connection.execute(text("select version_num from alembic_version")).scalar_one()
    finally:
        engine.dispose()
    return f"{engine.dialect.name}, schema {version}"


def _broker(settings: Settings) -> str:
    url = settings.celery_url.replace("redis+socket://", "unix://")
    seen = re.sub(r"//.*@", "//", url)  # without user and password
    with Redis.from_url(url, socket_timeout=PATIENCE_SECONDS, socket_connect_timeout=PATIENCE_SECONDS) as broker:
        try:
            broker.ping()
        except AuthenticationError as error:
            raise PermissionError(f"the broker at {seen} does not take our password") from error
        except ConnectionError as error:
            raise ConnectionError(f"no answer at {seen}: is the installation running?") from error
    return "answers"


def _policy(settings: Settings) -> str:
    policy = policy_in_force(settings)
    default = " (the default)" if settings.policy_file is None else ""
    references = ", ".join(reference.key for reference in policy.references) or "none"
    return f"{policy.label}{default}, references for real patients: {references}"


def _model(settings: Settings) -> str:
    model = in_force_here(settings)
    package = ModelPackage.load(model.folder)
    if package.sha256 != model.sha256:
        raise PackageError(f"{model.folder} is not the package that was put in force")
    told = f"{model.name} in force, {model.sha256[:12]}; {'passed' if model.gate_passed else 'has not passed'} the gate"
    site = policy_in_force(settings).pairing.densitometer
    if package.manifest.densitometer != site:
        told += f"; it predicts what {package.manifest.densitometer} measures, and this site pairs {site}: "
        told += "% YAM and T-score are withheld until a model was retrained on its pairs"
    return told


NEEDED = {
    Role.CLINICIAN: "work the worklist",
    Role.PACS_ADMIN: "try a failed study again",
    Role.ML_ADMIN: "train or promote a model",
}


def _users(settings: Settings) -> str:
    """Who may come in, and whether there is somebody, or a key, for what only a role may do."""
    with closing(Store(make_engine(settings.sqlalchemy_url))) as store, store.reading() as session:
        if not inspect(session.connection()).has_table("users"):
            raise LookupError("not known before the database has its schema")
        users, keys, anyone = people.users(session), people.keys(session), people.anyone(session)
    if not anyone:
        return _nobody(settings)
    now = utc_now()
    may = [one.roles for one in users if not one.disabled]
    may += [one.roles for one in keys if one.revoked_at is None and (one.expires_at is None or one.expires_at > now)]
    if missing := [role for role in NEEDED if not any(role in roles for roles in may)]:
        told = ", ".join(f"{NEEDED[role]} ({role.value})" for role in missing)
        raise LookupError(f"nobody may {told}: `osteogate user add NAME --role ROLE`, or `osteogate user roles`")
    counts = (f"{sum(role in roles for roles in may)} {role.value}" for role in NEEDED)
    return f"{', '.join(counts)} (users and keys)"


def _nobody(settings: Settings) -> str:
    if settings.web_password_file is not None:
        return "none yet: one password for everybody (OSTEOGATE_WEB_PASSWORD_FILE), every role is granted"
    if not ip_address(settings.web_host).is_loopback:
        raise LookupError(
            f"none yet, nor a password for everybody: pages are served to loopback only, never to {settings.web_host}"
        )
    return "none yet: the pages are open to whoever is on this machine, and bind to loopback only"


def _worker_packages(settings: Settings) -> str:
    missing = [name for name in ("torch", "torchvision", "nnunetv2", "cv2") if find_spec(name) is None]
    if missing:
        raise ImportError(f"not installed: {', '.join(missing)} (needed where a worker runs: the extra 'worker')")
    return "installed"
