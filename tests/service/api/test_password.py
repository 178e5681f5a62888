"""The one password: nothing without it, a name in the audit with it, and no patience with guessing."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from httpx import Response

from service.api.app import create_app
from service.api.password import Gate, Turned
from service.domain.access import MAX_NAME_LENGTH
from service.domain.policy import DEFAULT_POLICY
from service.settings import Settings
from service.web.tries import MAX_WRONG, WINDOW_SECONDS
from tests.service.web import seed
from tests.service.web.installation import Installation, installed

API = "/api/v1"
PASSWORD = "correct horse: bättery"
HOST = "http://osteogate.hospital.example:8080"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Installation]:
    """A seeded installation behind a password, reached by a name that is not this machine's."""
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n", encoding="utf-8")
    with installed(tmp_path) as opened:
        settings = Settings(data_dir=tmp_path, disk_floor_bytes=1, web_host="0.0.0.0", web_password_file=file)
        app = create_app(settings, opened.store, DEFAULT_POLICY, clock=lambda: seed.NOW)
        with TestClient(app, base_url=HOST, raise_server_exceptions=False) as client:
            yield Installation(client, opened.store, settings)


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


def get(site: Installation, path: str = f"{API}/worklist", **headers: str) -> Response:
    return site.client.get(path, headers=headers)


def actions(site: Installation) -> list[tuple[str, str]]:
    trail = get(site, f"{API}/audit", **basic("auditor", PASSWORD)).json()["items"]
    return [(line["action"], line["actor"]) for line in trail]


@pytest.mark.parametrize(
    "path",
    ["/", "/intake", f"/studies/{seed.REFER}", f"{API}/worklist", f"{API}/audit", "/metrics", "/api/docs",
     "/api/openapi.json", "/worklist.csv", "/static/osteogate.css", f"{API}/health/live/", f"{API}/health/ready/x",
     "/nothing"],
)  # fmt: skip
def test_nothing_opens_without_the_password(site: Installation, path: str) -> None:
    answer = get(site, path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Basic realm="Osteogate", charset="UTF-8"'
    assert answer.headers["content-type"] == "application/problem+json"
    assert "content-security-policy" in answer.headers
    assert "Yamada" not in answer.text


@pytest.mark.parametrize("path", [f"{API}/health/live", f"{API}/health/ready"])
def test_supervisors_need_none(site: Installation, path: str) -> None:
    assert get(site, path).json()["status"] == "ok"


def test_the_password_opens_everything_under_any_host_name(site: Installation) -> None:
    for path in ("/", f"/studies/{seed.REFER}", f"{API}/worklist", "/metrics", "/static/osteogate.css"):
        assert get(site, path, **basic("dr.tanabe", PASSWORD)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        basic("dr.tanabe", "wrong"),
        basic("dr.tanabe", ""),
        basic("dr.tanabe", PASSWORD + " "),
        basic("", PASSWORD),
        basic("a\nb", PASSWORD),
        basic("osteogate", PASSWORD),  # the audit's word for what no person did
        basic("x" * (MAX_NAME_LENGTH + 1), PASSWORD),
        {"Authorization": "Basic"},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic " + base64.b64encode(b"\xff:\xff").decode()},
    ],
)
def test_anything_else_is_turned_away_alike(site: Installation, headers: dict[str, str]) -> None:
    answer = get(site, **headers)
    assert answer.status_code == 401
    assert answer.json() == get(site).json()


def test_the_name_stands_in_the_audit(site: Installation) -> None:
    headers = basic("Dr. Tanabe 田邊", PASSWORD)
    get(site, f"/studies/{seed.REFER}", **headers)
    path = f"{API}/studies/{seed.REFER}/referral"
    assert site.client.post(path, json={"action": "review"}, headers=headers).status_code == 200
    assert {("study.view", "Dr. Tanabe 田邊"), ("referral.review", "Dr. Tanabe 田邊")} <= set(actions(site))


def test_the_password_does_not_excuse_another_origin(site: Installation) -> None:
    headers = basic("dr.tanabe", PASSWORD)
    path = f"{API}/studies/{seed.REFER}/referral"
    foreign = {**headers, "origin": "https://evil.example"}
    assert site.client.post(path, json={"action": "review"}, headers=foreign).status_code == 403
    own = {**headers, "origin": HOST}
    assert site.client.post(path, json={"action": "review"}, headers=own).status_code == 200


def test_guessing_is_audited_once_and_then_refused(site: Installation) -> None:
    for _ in range(MAX_WRONG):
        assert get(site, **basic("guesser", "a guess")).status_code == 401
    locked = get(site, **basic("dr.tanabe", PASSWORD))
    assert locked.status_code == 429
    assert 0 < int(locked.headers["retry-after"]) <= WINDOW_SECONDS
    with site.store.reading() as session:
        from service.workflow import reading

        lines = reading.audit(session, subject="web", number=1, size=50).items
    assert [line.action for line in lines] == ["password.locked", "password.wrong"]
    assert "a guess" not in str(lines)
    assert "guesser" not in str(lines)  # some type their password where the name belongs


def test_the_answer_is_the_same_when_the_audit_cannot_be_written(
    site: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise ConnectionError("the database is away")

    monkeypatch.setattr("service.workflow.reading.note", explode)
    assert get(site, **basic("guesser", "a guess")).status_code == 401


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_gate_opens_again_and_locks_only_the_one_who_guessed() -> None:
    clock = Clock()
    gate = Gate(PASSWORD, clock)
    wrong, right = basic("x", "wrong")["Authorization"], basic("x", PASSWORD)["Authorization"]
    found = [gate.admit(wrong, "10.0.0.1") for _ in range(MAX_WRONG + 1)]
    assert [one.status for one in found if isinstance(one, Turned)] == [401] * MAX_WRONG + [429]
    assert gate.admit(right, "10.0.0.2") == "x"
    assert isinstance(gate.admit(right, "10.0.0.1"), Turned)
    clock.now += WINDOW_SECONDS
    assert gate.admit(right, "10.0.0.1") == "x"


def test_asking_without_a_password_is_no_guess() -> None:
    gate = Gate(PASSWORD, Clock())
    for _ in range(MAX_WRONG + 1):
        turned = gate.admit(None, "10.0.0.1")
        assert isinstance(turned, Turned)
        assert (turned.status, turned.event) == (401, None)
    assert gate.admit(basic("x", PASSWORD)["Authorization"], "10.0.0.1") == "x"
