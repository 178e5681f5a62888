"""docker-compose.yml played as processes on this machine: every command, variable and health check as written there.

What differs from Docker, and nothing else:

- the names `postgres` and `redis` are 127.0.0.1, and the ports of the file are free ports;
- `/data`, `/run/secrets` and `/tmp` are folders of the test (a `/tmp` for each service);
- PostgreSQL is the test's server, with a role and a database of its own; Redis is started by the file's own command;
- the service image is made in a folder by the instructions of its Dockerfile; the worker runs from the tests' own
  environment; bytecode is compiled when it is first run, not beforehand;
- no user is changed, no capability dropped, no root made read-only: that is Docker's, and unproven here.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from tests import compose
from tests.conftest import ROOT, absent
from tests.service.workflow import workbench

HEALTHY_SECONDS = 240.0  # only what hangs takes so long
ACTOR = "dr.rehearsal"
AE_TITLE = "REHEARSAL"


# --- the service image -------------------------------------------------------------------------------------------


def build_service_image(folder: Path) -> Path:
    """Follow service/Dockerfile's build stage in a folder; the environment that its image would hold."""
    made, build = folder / "osteogate", folder / "build"
    build.mkdir()
    for word, text in compose.image("service/Dockerfile").instructions:
        if word == "COPY" and not text.startswith("--from="):
            _copy(text.split(), build)
        elif word == "RUN" and text.startswith("uv "):
            _run_at_build(text, build, made)
    return made


def proves_itself(environment: Path) -> bool:
    """Whether the image's own check finds nothing of the compute node in an environment."""
    proof = compose.proof_without_torch().replace("/opt/osteogate", str(environment))
    return subprocess.run(["sh", "-c", proof], check=False, capture_output=True).returncode == 0


def _copy(words: Sequence[str], build: Path) -> None:
    *sources, target = words
    for source in sources:
        if (ROOT / source).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "screenshots")
            shutil.copytree(ROOT / source, build / target, ignore=ignore)
        else:
            shutil.copy(ROOT / source, build / target)


def _run_at_build(command: str, build: Path, made: Path) -> None:
    uv = str(ROOT / ".uv" / "bin" / "uv")
    if not Path(uv).exists():
        uv = shutil.which("uv") or absent("uv (make env brings it)")
    command = re.sub(r"^uv ", f"{uv} ", command).replace("/opt/osteogate", str(made)).replace("/build/", f"{build}/")
    command = command.replace("--python python3.11", f"--python {sys.base_prefix}/bin/python3")
    for offline in ("1", "0"):  # what `make env` fetched is at hand; a registry is asked only where it is not
        run = subprocess.run(
            ["sh", "-c", command],
            cwd=build,
            env={**os.environ, "UV_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode == 0:
            return
    raise AssertionError(f"{command}\n{run.stderr}")


# --- the stack ---------------------------------------------------------------------------------------------------


@dataclass
class Stack:
    """The services of the compose file as processes."""

    folder: Path
    image: Path  # of the service
    document: compose.Document
    places: dict[str, str]  # in the container: here; the first that fits
    passwords: dict[str, str]
    web_port: int
    dicom_port: int
    variables: dict[str, str]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    # What the file says

    def order(self) -> list[str]:
        """The services, each after those that it waits for; PostgreSQL runs already."""
        services, order = self.document["services"], ["postgres"]
        while len(order) < len(services):
            order += [
                name for name in services if name not in order and set(services[name].get("depends_on", {})) <= {*order}
            ]
        return order

    def command(self, name: str) -> list[str]:
        """Its command line."""
        service = self.document["services"][name]
        return [self._here(word, name) for word in (*service.get("entrypoint", ()), *service["command"])]

    def health_command(self, name: str) -> list[str]:
        """Its health check's command line."""
        kind, *words = self.document["services"][name]["healthcheck"]["test"]
        words = [self._here(word, name) for word in words]
        return words if kind == "CMD" else ["sh", "-c", *words]

    def environment(self, name: str) -> dict[str, str]:
        """Its variables: the image's, then those of .env, then the file's; nothing of ours but how to compute."""
        service = self.document["services"][name]
        dockerfile = service.get("build", {}).get("dockerfile")
        environment = compose.image(dockerfile).environment if dockerfile else {}
        if "env_file" in service:
            environment |= self.variables
        environment |= {key: str(value) for key, value in service.get("environment", {}).items()}
        environment = {key: self._here(value, name) for key, value in environment.items()}
        programs = Path(sys.executable).parent if name in ("worker", "trainer") else self.image / "bin"
        environment["PATH"] = f"{programs}:{os.environ['PATH']}"
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the image's bytecode is compiled when it is built
        return environment | {key: value for key, value in os.environ.items() if key.startswith("OPENBLAS")}

    def _here(self, text: str, name: str) -> str:
        """What stands for a place in a container, as a place here; in one pass, so that nothing is replaced twice."""
        places = {**self.places, "/tmp": str(self.tmp(name))}
        names = "|".join(map(re.escape, places))
        return re.sub(rf"(?:{names})(?!\w)", lambda found: places[found[0]], text)

    def tmp(self, name: str) -> Path:
        """The service's own /tmp."""
        return self.folder / "tmp" / name

    # Its life

    def start(self) -> None:
        """Start everything in the file's order, waiting for what it says."""
        for name in self.order():
            for other, need in self.document["services"][name].get("depends_on", {}).items():
                if need["condition"] == "service_healthy":
                    self.wait_until_healthy(other)
                else:  # service_completed_successfully
                    assert self.running[other].wait(HEALTHY_SECONDS) == 0, self.log(other)
            if name != "postgres":
                self._start(name)

    def _start(self, name: str) -> None:
        self.tmp(name).mkdir(parents=True)
        with self._log_file(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                self.command(name),
                env=self.environment(name),
                cwd=self.folder / "data",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_healthy(self, name: str) -> bool:
        """Run its health check once."""
        patience = compose.seconds(self.document["services"][name]["healthcheck"]["timeout"])
        try:
            run = subprocess.run(
                self.health_command(name),
                env=self.environment(name),
                cwd=self.folder / "data",
                capture_output=True,
                check=False,
                timeout=patience,
            )
        except subprocess.TimeoutExpired:
            return False
        with self._log_file(f"{name}-health").open("ab") as log:
            log.write(run.stdout + run.stderr)
        return run.returncode == 0

    def wait_until_healthy(self, name: str) -> None:
        """Ask again and again, as Docker does."""
        deadline = time.monotonic() + HEALTHY_SECONDS
        while not self.is_healthy(name):
            if name in self.running:
                assert self.running[name].poll() is None, f"{name} has ended\n{self.log(name)}"
            assert time.monotonic() < deadline, f"{name} is not healthy\n{self.log(name)}{self.log(f'{name}-health')}"
            time.sleep(0.5)

    def run(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        """`docker compose exec NAME COMMAND`."""
        return subprocess.run(
            command,
            env=self.environment(name),
            cwd=self.folder / "data",
            capture_output=True,
            text=True,
            check=False,
            timeout=HEALTHY_SECONDS,
        )

    def stop(self, name: str) -> int:
        """SIGTERM; its exit status. (That the file's grace is enough for our own time limits, the rules check.)"""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(HEALTHY_SECONDS)

    def end(self) -> None:
        """Whatever happened: leave no process."""
        for process in self.running.values():
            process.kill()
            process.wait()

    # What is seen of it

    def _log_file(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def log(self, name: str) -> str:
        """What a service has written."""
        file = self._log_file(name)
        return file.read_text(errors="replace") if file.exists() else ""

    def everything_told(self) -> str:
        """All logs, and the command line and (as `docker inspect` shows them) the variables of every service."""
        told = [file.read_text(errors="replace") for file in sorted((self.folder / "logs").iterdir())]
        told += [_command_line(process.pid) for process in self.running.values() if process.poll() is None]
        told += [str(self.environment(name)) for name in self.document["services"]]
        return "\n".join(told)

    def get(self, path: str, password: str | None = None) -> tuple[int, Any]:
        """Status and document of a page of the API."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.web_port}{path}")
        if password is not None:
            request.add_header("Authorization", "Basic " + base64.b64encode(f"{ACTOR}:{password}".encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


def _command_line(pid: int) -> str:
    """What everybody on the host can see of a process."""
    file = Path(f"/proc/{pid}/cmdline")
    return file.read_text(errors="replace").replace("\0", " ") if file.exists() else ""


@contextmanager
def rehearsed(folder: Path, image: Path) -> Iterator[Stack]:
    """The stack, not yet started, on ports, a database and passwords of its own."""
    passwords = {  # signs that a URL or a shell could stumble over
        "database_password": f"db@:/%{os.urandom(8).hex()}",
        "broker_password": f"broker@:/%{os.urandom(8).hex()}",
        "web_password": f"web: %ä{os.urandom(8).hex()}",
    }
    for name in ("data", "secrets", "tmp", "logs"):
        (folder / name).mkdir()
    for name, secret in passwords.items():
        (folder / "secrets" / name).write_text(f"{secret}\n", encoding="utf-8")
    (folder / "secrets" / "destinations").write_text("# none in the rehearsal\n")
    variables = {
        **compose.environment_file(ROOT / ".env.example"),
        "OSTEOGATE_PEERS": f"{AE_TITLE}@127.0.0.1",
        "OSTEOGATE_DEVICE": "auto",
        "OSTEOGATE_QUIET_SECONDS": "4",
        "OSTEOGATE_INCOMPLETE_PATIENCE_SECONDS": "600",
        "OSTEOGATE_STEWARD_INTERVAL_SECONDS": "0.5",
        "OSTEOGATE_DISK_FLOOR_BYTES": str(64 * 1024 * 1024),
    }
    redis_port, web_port, dicom_port = (str(workbench.free_port()) for _ in range(3))
    with _database(passwords["database_password"]) as (role, host, port, database):
        places = {
            "osteogate@postgres:5432/osteogate": f"{role}@{host}:{port}/{database}",
            "--host=127.0.0.1 --port=5432": f"--host={host} --port={port}",
            "--host=127.0.0.1": f"--host={host}",
            "--port=5432": f"--port={port}",
            "redis:6379": f"127.0.0.1:{redis_port}",
            "6379": redis_port,
            "11112": dicom_port,
            "8080": web_port,
            "--dir /data": f"--dir {folder / 'tmp' / 'redis'}",
            "/data": str(folder / "data"),
            "/run/secrets": str(folder / "secrets"),
        }
        document = compose.interpolate(compose.load(), variables)
        stack = Stack(folder, image, document, places, passwords, int(web_port), int(dicom_port), variables)
        try:
            yield stack
        finally:
            stack.end()


@contextmanager
def _database(password: str) -> Iterator[tuple[str, str, int, str]]:
    """A role with a password and a database of its own on the test's server: role, host, port, database."""
    name = f"osteogate_rehearsal_{os.urandom(6).hex()}"
    try:
        server = psycopg.connect(workbench.POSTGRESQL, autocommit=True, connect_timeout=30)
    except psycopg.OperationalError as error:
        absent(f"PostgreSQL at {workbench.POSTGRESQL}: {error}")
    parts, identifier = urlsplit(workbench.POSTGRESQL), sql.Identifier(name)
    with server:
        server.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(identifier, sql.Literal(password)))
        try:
            server.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(identifier, identifier))
            yield name, parts.hostname or "127.0.0.1", parts.port or 5432, name
        finally:
            server.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(identifier))
            server.execute(sql.SQL("DROP ROLE {}").format(identifier))
