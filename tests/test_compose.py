"""The production installation: what docker-compose.yml and the Dockerfiles promise, and a rehearsal of all of it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from service.settings import Settings
from tests import compose, rehearsal
from tests.conftest import ROOT, absent
from tests.service.workflow.workbench import eventually

Mutation = Callable[[compose.Document], Any]


# --- the file ----------------------------------------------------------------------------------------------------


def _schema_errors(document: compose.Document) -> list[str]:
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    validator = jsonschema.Draft202012Validator(json.loads(schema.read_text(encoding="utf-8")))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def test_the_file_follows_the_compose_specification() -> None:
    assert _schema_errors(compose.load()) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda services: services["web"].update(healtcheck={}),
        lambda services: services["web"]["healthcheck"].update(interval=["30s"]),
        lambda services: services["worker"]["deploy"]["resources"]["reservations"]["devices"][0].pop("capabilities"),
        lambda services: services["steward"]["depends_on"]["redis"].update(condition="service_up"),
    ],
)
def test_the_schema_is_seen_to_refuse(spoil: Mutation) -> None:
    document = compose.load()
    spoil(document["services"])
    assert _schema_errors(document)


def test_the_file_keeps_every_rule() -> None:
    assert compose.broken_rules(compose.load()) == []


def _set(service: str, key: str, value: Any) -> Mutation:
    return lambda document: document["services"][service].update({key: value})


def _env(service: str, **values: str | None) -> Mutation:
    def spoil(document: compose.Document) -> None:
        environment = document["services"][service]["environment"]
        environment.update({key: value for key, value in values.items() if value is not None})
        for key in [key for key, value in values.items() if value is None]:
            del environment[key]

    return spoil


def _without(service: str, key: str) -> Mutation:
    return lambda document: document["services"][service].pop(key)


BREACHES: list[tuple[Mutation, str]] = [
    (_set("postgres", "ports", ["5432:5432"]), "postgres: publishes a port"),
    (_set("redis", "ports", ["127.0.0.1:6379:6379"]), "redis: publishes a port"),
    (_set("redis", "networks", ["inside", "outside"]), "redis: is reached from outside"),
    (_set("postgres", "network_mode", "host"), "postgres: is reached from outside"),
    (_set("worker", "networks", ["outside"]), "worker: is reached from outside"),
    (_set("web", "ports", ["8080:8080"]), "web: is not published on loopback by default"),
    (_set("web", "ports", ["${WEB_ADDRESS:-0.0.0.0}:8080:8080"]), "web: is not published on loopback by default"),
    (lambda document: document["networks"].update(inside={}), "networks: the inner network leads out"),
    (_without("listener", "user"), "listener: runs as root"),
    (_set("redis", "user", "0:0"), "redis: runs as root"),
    (_set("web", "read_only", False), "web: has a writable root, or no /tmp"),
    (_without("worker", "cap_drop"), "worker: has capabilities"),
    (_set("worker", "privileged", True), "worker: has capabilities"),
    (_without("steward", "security_opt"), "steward: may gain privileges"),
    (_set("web", "volumes", ["data:/data", "/var/run/docker.sock:/s/docker.sock"]), "web: holds the Docker socket"),
    (_env("postgres", POSTGRES_PASSWORD="osteogate"), "postgres: POSTGRES_PASSWORD is a secret in the environment"),
    (
        _env("web", OSTEOGATE_DATABASE_URL="postgresql://u:pw@postgres/x"),
        "web: OSTEOGATE_DATABASE_URL holds a password",
    ),
    (_set("web", "secrets", ["database_password"]), "web: uses the secret web_password, which it does not have"),
    (_set("redis", "secrets", []), "redis: uses the secret broker_password, which it does not have"),
    (_set("redis", "command", ["redis-server --requirepass x"]), "redis: tells a password on a command line"),
    (_set("web", "secrets", ["nothing"]), "web: wants a secret that is not declared"),
    (
        lambda document: document["secrets"].update(web_password={"environment": "X"}),
        "secrets: web_password is not a file",
    ),
    (_without("postgres", "healthcheck"), "postgres: has no health check"),
    (_without("postgres", "healthcheck"), "migrate: waits for the health of postgres, which has no health check"),
    (_without("steward", "healthcheck"), "steward: has no health check"),
    (_set("listener", "restart", "no"), "listener: is not started again"),
    (_set("migrate", "restart", "always"), "migrate: is started again though it has ended"),
    (_without("worker", "stop_grace_period"), "worker: is killed before it can end by itself"),
    (_set("postgres", "image", "postgres"), "postgres: its image is not pinned"),
    (_set("redis", "image", "redis:latest"), "redis: its image is not pinned"),
    (_set("worker", "build", {"dockerfile": "service/Dockerfile"}), "worker: is built from 'service/Dockerfile'"),
    (_set("web", "user", "1000:1000"), "web: runs as another user than its image"),
    (_set("listener", "command", ["osteogate", "listn"]), "listener: `osteogate listn` is no command of ours"),
    (
        _set("trainer", "command", ["osteogate", "worker", "--queue", "x"]),
        "trainer: `osteogate worker --queue x` is no command of ours",
    ),
    (
        lambda document: document["services"]["web"]["healthcheck"].update(test=["CMD", "osteogate", "helth", "web"]),
        "web: `osteogate helth web` is no command of ours",
    ),
    (
        lambda document: document["services"]["web"]["healthcheck"].update(
            test=["CMD", "osteogate", "health", "steward"]
        ),
        "web: its health check asks another part",
    ),
    (_env("web", OSTEOGATE_WEB_HOSTS="0.0.0.0"), "web: OSTEOGATE_WEB_HOSTS is no setting"),
    (_set("worker", "volumes", []), "worker: does not share the data"),
    (_env("web", OSTEOGATE_DATA_DIR="/elsewhere"), "web: does not share the data"),
    (_set("web", "depends_on", {}), "web: does not wait for the migration"),
    (
        _set("worker", "depends_on", {"migrate": {"condition": "service_completed_successfully"}}),
        "worker: does not wait for the broker",
    ),
    (
        _set("web", "depends_on", {"nobody": {"condition": "service_healthy"}}),
        "web: waits for nobody, which does not exist",
    ),
    (_set("redis", "command", ["redis-server"]), "redis: has no --appendonly yes"),
    (_set("redis", "command", ["redis-server"]), "redis: has no --maxmemory-policy noeviction"),
    (_set("redis", "command", ["redis-server"]), "redis: has no requirepass"),
    (_env("postgres", POSTGRES_INITDB_ARGS=""), "postgres: lets in without a password"),
    (_env("listener", OSTEOGATE_PEERS="${OSTEOGATE_PEERS:-}"), "listener: does not demand a list of peers"),
    (_env("web", OSTEOGATE_WEB_PASSWORD_FILE=None), "web: is open"),
    (_env("steward", OSTEOGATE_DESTINATIONS_FILE=None), "steward: does not know where results go"),
    (_set("worker", "deploy", {}), "worker: has no GPU"),
    (_set("worker", "command", ["osteogate", "worker", "--queue", "train"]), "worker: does not screen"),
    (_set("trainer", "profiles", []), "trainer: starts though nothing trains yet"),
    (lambda document: document["services"].pop("trainer"), "services: "),
]


@pytest.mark.parametrize(("spoil", "sentence"), BREACHES, ids=[sentence for _, sentence in BREACHES])
def test_each_rule_is_seen_to_be_broken(spoil: Mutation, sentence: str) -> None:
    document = compose.load()
    spoil(document)
    assert any(found.startswith(sentence) for found in compose.broken_rules(document))


def test_every_setting_named_anywhere_exists() -> None:
    """Also those in comments, in .env.example and in interpolations."""
    known = {f"OSTEOGATE_{field.upper()}" for field in Settings.model_fields}
    for file in ("docker-compose.yml", ".env.example", "service/Dockerfile", "worker/Dockerfile"):
        named = set(re.findall(r"\bOSTEOGATE_[A-Z_]+[A-Z]\b", (ROOT / file).read_text(encoding="utf-8")))
        assert named <= known, file


def test_what_must_be_given_is_demanded() -> None:
    document = compose.load()
    with pytest.raises(KeyError, match="who may send"):
        compose.interpolate(document, {})
    with pytest.raises(KeyError, match="who may send"):
        compose.interpolate(document, {"OSTEOGATE_PEERS": ""})
    example = compose.environment_file(ROOT / ".env.example")
    filled = compose.interpolate(document, example)
    assert filled["services"]["listener"]["environment"]["OSTEOGATE_PEERS"] == example["OSTEOGATE_PEERS"]
    assert not any(compose.SECRET_NAME.search(name) for name in example)


def test_interpolation_is_that_of_compose() -> None:
    found = compose.interpolate({"a": ["$$(x) ${A:-1} ${B:-2}"], "b": 5}, {"A": "x", "B": ""})
    assert found == {"a": ["$(x) x 2"], "b": 5}


# --- the images --------------------------------------------------------------------------------------------------

IMAGES = [("service/Dockerfile", "requirements-service.lock"), ("worker/Dockerfile", "requirements-worker.lock")]


@pytest.mark.parametrize(("file", "lock"), IMAGES)
def test_each_image_keeps_every_rule(file: str, lock: str) -> None:
    assert compose.broken_image_rules(compose.image(file), lock, compose.build_context_ignores()) == []


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("FROM python:3.11-slim-bookworm AS", "FROM python AS", "the base python is not pinned"),
        ("USER 10001:10001", "USER root", "it runs as root"),
        ("USER 10001:10001", "", "it runs as root"),
        (" --require-hashes --only-binary", " --only-binary", "requirements-service.lock is not installed"),
        (" --require-hashes --only-binary", " --only-binary", "not hash-checked"),
        ("-r requirements-service.lock", "-r requirements.lock", "requirements-service.lock is not installed"),
        ("--wheel --require-hashes", "--wheel", "what builds the wheel is not pinned"),
        ("COPY service service/", "COPY servise service/", "servise does not exist"),
        ("COPY service service/", "COPY tests tests/", "tests is not in the build context"),
        ("CMD [", "RUN apt-get install -y gcc\nCMD [", "a compiler"),
        ("CMD [", "RUN pip install --no-deps x\nCMD [", "packages are installed in the last stage"),
        ("HOME=/tmp", "HOME=/tmp OSTEOGATE_WEB_PASSWORD=x", "a secret in the image"),
        ("COPY LICENSE", "ADD x /\nCOPY LICENSE", "ADD may fetch"),
    ],
)
def test_each_image_rule_is_seen_to_be_broken(old: str, new: str, sentence: str) -> None:
    text = (ROOT / "service/Dockerfile").read_text(encoding="utf-8")
    assert old in text
    made = compose.parse_dockerfile(text.replace(old, new))
    found = compose.broken_image_rules(made, "requirements-service.lock", compose.build_context_ignores())
    assert any(one.startswith(sentence) for one in found), found


def test_the_locks_agree() -> None:
    """The images hold the very versions that the tests ran on, and nothing that only the tests need."""
    everything, service, worker = (
        set(re.findall(r"^([\w.-]+==\S+)", (ROOT / lock).read_text(), re.MULTILINE))
        for lock in ("requirements.lock", "requirements-service.lock", "requirements-worker.lock")
    )
    assert service < worker < everything
    assert not any(pin.startswith(("pytest==", "mypy==", "hypothesis==")) for pin in worker)
    assert any(pin.startswith("torch==") for pin in worker)
    assert not any(pin.startswith(("torch", "opencv", "totalseg", "nnunet")) for pin in service)


# --- the rehearsal -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What service/Dockerfile makes, made here by its own instructions."""
    return rehearsal.build_service_image(tmp_path_factory.mktemp("image"))


def test_the_service_image_has_no_torch_and_its_own_check_would_notice(service_image: Path) -> None:
    assert rehearsal.proves_itself(service_image)
    assert not rehearsal.proves_itself(ROOT / ".venv")
    told = subprocess.run(
        [service_image / "bin" / "python", "-I", "-c", "import service, sys; print(service.__file__, sys.prefix)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=service_image,
    )
    assert all(path.startswith(str(service_image)) for path in told.stdout.split())


@pytest.mark.timeout(1500)
def test_the_stack_runs_as_written(service_image: Path, digital_study: Path, storescu: str, tmp_path: Path) -> None:
    """Started in its order until healthy; a CT sent, its result read with the password; ended in order."""
    for program in ("redis-server", "redis-cli", "pg_isready"):
        assert shutil.which(program) or absent(program)
    truth = json.loads((digital_study / "truth.json").read_text())
    with rehearsal.rehearsed(tmp_path, service_image) as stack:
        stack.start()
        for name in compose.LONG_RUNNING:
            stack.wait_until_healthy(name)

        _send(storescu, stack, digital_study)
        result = _result(stack, truth["study_uid"])
        assert result["patient"]["synthetic"] is True
        assert result["patient"]["bmd_g_cm2"] == pytest.approx(0.95, abs=0.3)
        assert result["provenance"]["device"] in ("cpu", "cuda")

        _only_the_password_opens(stack)
        _secrets_stay_secret(stack)
        for name in compose.LONG_RUNNING:
            stack.wait_until_healthy(name)
        _ends_in_order(stack)
        assert not stack.is_healthy("listener")
        assert not stack.is_healthy("web")


def _send(storescu: str, stack: rehearsal.Stack, study: Path) -> None:
    files = [str(file) for file in sorted(study.rglob("*.dcm"))]
    command = [storescu, "-aec", "OSTEOGATE", "-aet", rehearsal.AE_TITLE, "127.0.0.1", str(stack.dicom_port), *files]
    sent = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert sent.returncode == 0, sent.stdout + sent.stderr


def _result(stack: rehearsal.Stack, study_uid: str) -> dict[str, Any]:
    password = stack.passwords["web_password"]

    def complete() -> dict[str, Any] | None:
        status, document = stack.get(f"/api/v1/studies/{study_uid}/result", password)
        done = status == 200 and document["patient"]["levels_used"] == ["L1", "L2", "L3", "L4"]
        return document if done else None

    return eventually(complete, "the study has a result", seconds=480)


def _only_the_password_opens(stack: rehearsal.Stack) -> None:
    assert stack.get("/api/v1/health/ready")[0] == 200
    for password in (None, "not the password", stack.passwords["database_password"]):
        status, told = stack.get("/api/v1/worklist", password)
        assert status == 401
        assert set(told) == {"type", "title", "status", "detail"}
    _, trail = stack.get("/api/v1/audit", stack.passwords["web_password"])
    seen = {(line["action"], line["actor"]) for line in trail["items"]}
    assert ("result.view", rehearsal.ACTOR) in seen
    assert any(action == "password.wrong" for action, _ in seen)
    refusals = [line for line in trail["items"] if line["action"].startswith("refus")]
    assert refusals == []


def _secrets_stay_secret(stack: rehearsal.Stack) -> None:
    doctor = stack.run("steward", "osteogate", "doctor")
    assert "broker: answers" in doctor.stdout
    assert "postgresql, schema" in doctor.stdout
    told = stack.everything_told() + doctor.stdout + doctor.stderr
    assert "Connected to redis://:**@" in told  # as Celery tells its broker
    for secret in stack.passwords.values():
        assert secret not in told
        assert secret[-16:] not in told  # its random part, however the rest is quoted


def _ends_in_order(stack: rehearsal.Stack) -> None:
    ended = {name: stack.stop(name) for name in reversed(stack.order()) if name in stack.running and name != "migrate"}
    assert set(ended) == set(compose.LONG_RUNNING) - {"postgres"}
    for name, status in ended.items():
        assert status in (0, -signal.SIGTERM, 128 + signal.SIGTERM), f"{name}: {status}\n{stack.log(name)}"
