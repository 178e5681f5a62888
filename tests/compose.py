"""docker-compose.yml and the Dockerfiles as data, and the rules that they must keep.

`broken_rules` and `broken_image_rules` answer with sentences, so that a test can also show that each rule is seen to
be broken on a copy that breaks it.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from service.cli import make_parser
from service.settings import Settings
from tests.conftest import ROOT

Document = dict[str, Any]

FILE = ROOT / "docker-compose.yml"
SERVERS = ("postgres", "redis")  # other people's
LONG_RUNNING = ("postgres", "redis", "listener", "steward", "web", "worker", "trainer")
OURS = ("migrate", "listener", "steward", "web", "worker", "trainer")
HEALTH = {"listener": "listener", "steward": "steward", "web": "web", "worker": "worker", "trainer": "worker"}
COMPUTE_NODE = ("torch", "cv2", "totalsegmentator", "nnunetv2")
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|CREDENTIAL")
VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?::([-?])([^}]*))?\})")


def load() -> Document:
    """The compose file, its anchors and merges resolved; the caller's own copy."""
    document: Document = json.loads(_as_json())
    return document


@functools.cache
def _as_json() -> str:
    return json.dumps(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """Every text of `value` with its variables filled in, as Compose does: ${A}, ${A:-default}, ${A:?error}, $$.

    Raises:
        KeyError: a required variable is not set, or is empty.
    """
    if isinstance(value, dict):
        return {key: interpolate(one, variables) for key, one in value.items()}
    if isinstance(value, list):
        return [interpolate(one, variables) for one in value]
    return VARIABLE.sub(lambda found: _filled(found, variables), value) if isinstance(value, str) else value


def _filled(found: re.Match[str], variables: Mapping[str, str]) -> str:
    dollar, name, mark, text = found.groups()
    if dollar:
        return "$"
    if variables.get(name):
        return variables[name]
    if mark == "-":
        return str(text)
    raise KeyError(f"{name} is required: {text}")


def seconds(duration: str) -> float:
    """A duration such as 90s or 2m."""
    return float(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


# --- the rules of the compose file -------------------------------------------------------------------------------


def broken_rules(document: Document) -> list[str]:
    """What is wrong with a compose file, each a sentence that begins with the name of what it is about."""
    services: Document = document["services"]
    found = [] if set(services) == {*SERVERS, *OURS} else [f"services: {sorted(services)}"]
    for name, service in services.items():
        for rule in RULES:
            found += [f"{name}: {text}" for text in rule(name, service, document)]
    if not document["networks"]["inside"].get("internal"):
        found.append("networks: the inner network leads out")
    found += [f"secrets: {name} is not a file" for name, one in document["secrets"].items() if set(one) != {"file"}]
    return found


def _publishes_little(name: str, service: Document, _: Document) -> Iterator[str]:
    ports = service.get("ports", [])
    if name not in ("listener", "web") and ports:
        yield "publishes a port"
    if "network_mode" in service or (name in (*SERVERS, "worker", "trainer") and service["networks"] != ["inside"]):
        yield "is reached from outside"
    if name == "web" and [str(port).rsplit(":", 2)[0] for port in interpolate(ports, {})] != ["127.0.0.1"]:
        yield "is not published on loopback by default"


def _is_hardened(name: str, service: Document, _: Document) -> Iterator[str]:
    if str(service.get("user", "root")).split(":")[0] in ("root", "0"):
        yield "runs as root"
    if service.get("read_only") is not True or "/tmp" not in service.get("tmpfs", []):
        yield "has a writable root, or no /tmp"
    if service.get("cap_drop") != ["ALL"] or "cap_add" in service or "privileged" in service:
        yield "has capabilities"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield "may gain privileges"
    if any("docker.sock" in str(volume) for volume in service.get("volumes", [])):
        yield "holds the Docker socket"


def _keeps_its_secrets(name: str, service: Document, document: Document) -> Iterator[str]:
    held = set(service.get("secrets", []))
    if not held <= set(document["secrets"]):
        yield "wants a secret that is not declared"
    told = f"{service.get('command')} {service.get('healthcheck', {}).get('test')}"
    for variable, value in service.get("environment", {}).items():
        if SECRET_NAME.search(variable) and not (variable.endswith("_FILE") and str(value).startswith("/run/secrets/")):
            yield f"{variable} is a secret in the environment"
        if re.search(r"//[^/@]*:[^/@]+@", str(value)):
            yield f"{variable} holds a password"
        told += f" {value}"
    for used in set(re.findall(r"/run/secrets/(\w+)", told)) - held:
        yield f"uses the secret {used}, which it does not have"
    if re.search(r"--requirepass|--password", told):
        yield "tells a password on a command line"


def _lives_well(name: str, service: Document, document: Document) -> Iterator[str]:
    services = document["services"]
    for other, need in service.get("depends_on", {}).items():
        if other not in services:
            yield f"waits for {other}, which does not exist"
        elif need["condition"] == "service_healthy" and "healthcheck" not in services[other]:
            yield f"waits for the health of {other}, which has no health check"
    if name in LONG_RUNNING:
        if not service.get("healthcheck", {}).get("test"):
            yield "has no health check"
        if service.get("restart") != "unless-stopped":
            yield "is not started again"
        if seconds(service.get("stop_grace_period", "10s")) < _least_grace(name):
            yield "is killed before it can end by itself"
    elif service.get("restart") != "no":
        yield "is started again though it has ended"


def _least_grace(name: str) -> float:
    from service.cli.processes import WEB_GRACE_SECONDS
    from service.steward import LEAVE_SECONDS
    from worker.jobs import GRACE_SECONDS

    margin = 10.0
    listener = 10.0  # service.dicom.listener.Listener.stop
    own = {"web": WEB_GRACE_SECONDS, "worker": GRACE_SECONDS, "listener": listener, "steward": LEAVE_SECONDS}
    return margin + own.get(name, 10.0)


def _is_pinned(name: str, service: Document, _: Document) -> Iterator[str]:
    if name in SERVERS and not re.fullmatch(r"[\w./-]+:\d+[\w.-]*", service["image"]):
        yield "its image is not pinned"
    if name in OURS:
        file = service.get("build", {}).get("dockerfile", "")
        if file != ("worker/Dockerfile" if name in ("worker", "trainer") else "service/Dockerfile"):
            yield f"is built from {file!r}"
        elif service.get("user") != image(file).user:
            yield "runs as another user than its image"


def _is_ours(name: str, service: Document, _: Document) -> Iterator[str]:
    """Commands, settings, volumes and order of our own processes."""
    if name not in OURS:
        return
    for command in (service["command"], service.get("healthcheck", {}).get("test", ["CMD"])[1:]):
        if command and not _parses(command):
            yield f"`{shlex.join(command)}` is no command of ours"
    if name in HEALTH and service.get("healthcheck", {}).get("test", [])[2:] != ["health", HEALTH[name]]:
        yield "its health check asks another part"
    environment = service["environment"]
    known = {f"OSTEOGATE_{field.upper()}" for field in Settings.model_fields}
    for variable in sorted(set(environment) - known):
        if variable.startswith("OSTEOGATE_"):
            yield f"{variable} is no setting"
    if service.get("volumes") != ["data:/data"] or environment.get("OSTEOGATE_DATA_DIR") != "/data":
        yield "does not share the data"
    if name != "migrate":
        if service["depends_on"].get("migrate", {}).get("condition") != "service_completed_successfully":
            yield "does not wait for the migration"
        if "OSTEOGATE_BROKER_URL" in environment and "redis" not in service["depends_on"]:
            yield "does not wait for the broker"


def _parses(command: Sequence[str]) -> bool:
    try:
        return command[0] == "osteogate" and bool(make_parser().parse_args(command[1:]))
    except SystemExit:
        return False


def _is_fit_for_its_part(name: str, service: Document, _: Document) -> Iterator[str]:
    """What one service alone must have."""
    environment, command = service.get("environment", {}), str(service.get("command", ""))
    if name == "redis":
        wanted = ("--appendonly yes", "--appendfsync everysec", "--maxmemory-policy noeviction", "requirepass")
        for option in wanted:
            if option not in command:
                yield f"has no {option}"
    if name == "postgres" and "scram-sha-256" not in environment.get("POSTGRES_INITDB_ARGS", ""):
        yield "lets in without a password"
    if name == "listener" and ":?" not in environment.get("OSTEOGATE_PEERS", ""):
        yield "does not demand a list of peers"
    if name == "web" and "OSTEOGATE_WEB_PASSWORD_FILE" not in environment:
        yield "is open"
    if name in ("steward", "web") and "OSTEOGATE_DESTINATIONS_FILE" not in environment:
        yield "does not know where results go"
    if name == "worker":
        if command != "['osteogate', 'worker', '--queue', 'screen']":
            yield "does not screen"
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        if not any("gpu" in device.get("capabilities", []) for device in devices):
            yield "has no GPU"
    if name == "trainer" and service.get("profiles") != ["training"]:
        yield "starts though nothing trains yet"


RULES: tuple[Callable[[str, Document, Document], Iterator[str]], ...] = (
    _publishes_little,
    _is_hardened,
    _keeps_its_secrets,
    _lives_well,
    _is_pinned,
    _is_ours,
    _is_fit_for_its_part,
)


# --- the images --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """A Dockerfile: its instructions in order, with continued lines joined."""

    instructions: tuple[tuple[str, str], ...]

    @property
    def final(self) -> tuple[tuple[str, str], ...]:
        """The instructions of the last stage."""
        last = max(at for at, (word, _) in enumerate(self.instructions) if word == "FROM")
        return self.instructions[last:]

    @property
    def user(self) -> str:
        """Who the image's processes run as."""
        return ([text for word, text in self.final if word == "USER"] or ["root"])[-1]

    @property
    def environment(self) -> dict[str, str]:
        """The variables of the last stage."""
        pairs = [pair for word, text in self.final if word == "ENV" for pair in shlex.split(text)]
        return dict(pair.split("=", 1) for pair in pairs)

    def runs(self) -> list[str]:
        """Every RUN of every stage."""
        return [text for word, text in self.instructions if word == "RUN"]

    def sources(self) -> list[str]:
        """What is copied from the build context."""
        copies = [text for word, text in self.instructions if word == "COPY" and not text.startswith("--from=")]
        return [source for text in copies for source in text.split()[:-1]]


@functools.cache
def image(file: str) -> Image:
    """A Dockerfile of ours."""
    return parse_dockerfile((ROOT / file).read_text(encoding="utf-8"))


def parse_dockerfile(text: str) -> Image:
    """Instructions of a Dockerfile."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return Image(tuple((word.upper(), rest.strip()) for word, rest in pairs))


def broken_image_rules(made: Image, lock: str, ignored: Sequence[str]) -> list[str]:
    """What is wrong with an image that must be made of `lock`; `ignored` are the lines of .dockerignore."""
    found = []
    stages = {text.split()[-1] for word, text in made.instructions if word == "FROM" and " AS " in text}
    for word, text in made.instructions:
        base = text.split()[0]
        if word == "FROM" and base not in stages and not re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*", base):
            found.append(f"the base {base} is not pinned")
        if word == "ADD":
            found.append("ADD may fetch and unpack")
        if word in ("ENV", "ARG") and SECRET_NAME.search(text):
            found.append("a secret in the image")
        if word == "RUN":
            found += _install_faults(text)
    if not any("--require-hashes" in run and run.endswith(f"-r {lock}") for run in made.runs()):
        found.append(f"{lock} is not installed with its hashes")
    if any("install" in text and ("uv " in text or "pip" in text) for word, text in made.final if word == "RUN"):
        found.append("packages are installed in the last stage")
    if made.user.split(":")[0] in ("root", "0") or not made.user[0].isdigit():
        found.append("it runs as root, or as a name that Kubernetes cannot check")
    for source in made.sources():
        if not (ROOT / source).exists():
            found.append(f"{source} does not exist")
        if f"!{source}" not in ignored:
            found.append(f"{source} is not in the build context")
    return found


def _install_faults(run: str) -> Iterator[str]:
    for command in run.split("&&"):
        if re.search(r"\bpip install\b", command) and not re.search(r"--require-hashes|--no-deps", command):
            yield f"not hash-checked: {command.strip()}"
        if "uv build" in command and "--require-hashes" not in command:
            yield "what builds the wheel is not pinned"
        if re.search(r"\b(apt-get|apt)\b.*\b(gcc|g\+\+|build-essential|make)\b", command):
            yield "a compiler"


def proof_without_torch() -> str:
    """The RUN of the service image that fails where the compute node's packages can be imported."""
    found = [run for run in image("service/Dockerfile").runs() if all(f"'{name}'" in run for name in COMPUTE_NODE)]
    return found[0]


def build_context_ignores() -> list[str]:
    """The lines of .dockerignore."""
    return (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


def environment_file(path: Path) -> dict[str, str]:
    """NAME=VALUE lines."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
