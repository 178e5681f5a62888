"""With users nothing opens to nobody: sessions for people, keys for programs, rights for both, forms with tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from httpx import Response
from sqlalchemy import func, select, text

from service.api.app import create_app, require_lock
from service.domain.access import GRANTS, Right, Role
from service.domain.errors import ConfigurationError
from service.domain.policy import DEFAULT_POLICY
from service.settings import Settings
from service.store.engine import Store, make_engine
from service.store.tables import AuditRow
from service.web import words
from service.web.addresses import local_path
from service.web.desk import Needs
from service.web.login import MAX_WRONG_OF_A_NAME
from service.web.tries import MAX_WRONG, Pace
from service.workflow import passwords, people
from service.workflow.people import By
from tests.service.web import seed
from tests.service.web.installation import installed
from tests.service.workflow import workbench

API = "/api/v1"
HOST = "https://osteogate.hospital.example"
PASSWORD = "correct horse battery"
PAGE = {"accept": "text/html"}
OPEN = {"/login", "/logout", "/account", f"{API}/health/live", f"{API}/health/ready"}


@pytest.fixture(autouse=True)
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "_HASHER", PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))


class Site:
    """A seeded installation with one user of each role, reached over TLS by a name that is not this machine's."""

    def __init__(self, client: TestClient, store: Store, clock: workbench.Clock) -> None:
        self.client, self.store, self.clock = client, store, clock

    @property
    def app(self) -> FastAPI:
        assert isinstance(self.client.app, FastAPI)
        return self.client.app

    def token(self, path: str = "/login") -> str:
        found = re.search(r'name="csrf" value="([0-9a-f]+)"', self.client.get(path, headers=PAGE).text)
        assert found, path
        return found[1]

    def log_in(self, name: str, password: str = PASSWORD, **more: str) -> Response:
        self.client.cookies.delete("osteogate_session")
        form = {"name": name, "password": password, "csrf": self.token(), **more}
        return self.client.post("/login", data=form, headers=PAGE)

    def key(self, role: Role) -> dict[str, str]:
        with self.store.transaction() as session:
            by = By("shell:root", self.clock(), None)
            key = people.create_key(session, role.value, frozenset({role}), by, expires_at=None)
        return {"Authorization": f"Bearer {key}"}

    def lines(self) -> int:
        with self.store.reading() as session:
            return session.scalar(select(func.count()).select_from(AuditRow)) or 0

    def last(self, action: str) -> AuditRow:
        with self.store.reading() as session:
            wanted = select(AuditRow).where(AuditRow.action == action).order_by(AuditRow.id.desc())
            found = session.scalars(wanted.limit(1)).one()
            session.expunge(found)
            return found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    clock = workbench.Clock()
    with installed(tmp_path) as opened:
        with opened.store.transaction() as session:
            for role in Role:
                people.add_user(session, role.value, frozenset({role}), PASSWORD, By("shell:root", clock(), None))
        settings = opened.settings.model_copy(update={"web_host": "0.0.0.0"})
        app = create_app(settings, opened.store, DEFAULT_POLICY, clock=clock)
        with TestClient(app, base_url=HOST, raise_server_exceptions=False, follow_redirects=False) as client:
            yield Site(client, opened.store, clock)


def test_nothing_opens_to_nobody(site: Site) -> None:
    for path in (f"{API}/worklist", f"{API}/audit", "/metrics", "/api/openapi.json", "/worklist.csv"):
        answer = site.client.get(path)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.headers["content-type"] == "application/problem+json"
        assert "Yamada" not in answer.text
    answer = site.client.get(f"/studies/{seed.REFER}?x=1", headers=PAGE)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/login?next=/studies/{seed.REFER}%3Fx%3D1")
    poll = site.client.get("/", headers={**PAGE, "HX-Request": "true"})
    assert (poll.status_code, poll.headers["hx-redirect"]) == (401, "/login?ended=page")
    for path in (f"{API}/health/live", f"{API}/health/ready", "/static/osteogate.css", "/login"):
        assert site.client.get(path).status_code == 200, path


def test_a_database_that_is_away_opens_nothing_and_the_process_still_lives(site: Site) -> None:
    with site.store.transaction() as session:
        session.execute(text("ALTER TABLE users RENAME TO gone"))
    assert site.client.get(f"{API}/health/live").status_code == 200
    answer = site.client.get(f"{API}/worklist")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert site.client.get("/", headers={**PAGE, "HX-Request": "true"}).status_code == 503


def test_a_person_logs_in_works_and_logs_out(site: Site) -> None:
    answer = site.log_in("Clinician", next=f"/studies/{seed.REFER}")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/studies/{seed.REFER}")
    cookie = next(one for one in answer.headers.get_list("set-cookie") if one.startswith("osteogate_session="))
    for word in ("HttpOnly", "SameSite=lax", "Secure", "Path=/"):
        assert word in cookie
    page = site.client.get(f"/studies/{seed.REFER}", headers=PAGE)
    assert page.status_code == 200
    assert "Log out" in page.text
    token = site.token(f"/studies/{seed.REFER}")
    done = site.client.post(f"/studies/{seed.REFER}/referral", data={"action": "review", "csrf": token})
    assert done.status_code == 303
    line = site.last("referral.review")
    assert (line.actor, line.subject, line.peer_address, line.at) == (
        "clinician",
        seed.REFER,
        "testclient",
        site.clock(),
    )
    assert site.client.post("/logout", data={"csrf": "0" * 64}).status_code == 403
    assert site.client.post("/logout", data={"csrf": token}).headers["location"] == "/login"
    assert site.client.get("/", headers=PAGE).status_code == 303


def test_a_stolen_cookie_is_worth_nothing_after_logging_out(site: Site) -> None:
    site.log_in("viewer")
    stolen = site.client.cookies["osteogate_session"]
    site.client.post("/logout", data={"csrf": site.token("/")})
    site.client.cookies.set("osteogate_session", stolen)
    assert site.client.get("/", headers=PAGE).status_code == 303


def test_wrong_passwords_and_unknown_names_are_told_alike(site: Site) -> None:
    wrong, unknown = site.log_in("viewer", "not the password"), site.log_in("hunter2 hunter2", PASSWORD)
    assert wrong.status_code == unknown.status_code == 401
    alert = re.compile(r'role="alert">(.*?)</p>', re.DOTALL)
    assert alert.findall(wrong.text) == alert.findall(unknown.text) != []
    assert "set-cookie" not in wrong.headers or "osteogate_session" not in str(wrong.headers)
    with site.store.reading() as session:
        lines = session.scalars(select(AuditRow).where(AuditRow.action == "login.failed")).all()
    assert [line.subject for line in lines] == ["user:viewer", "web"]
    assert "hunter2" not in str([(line.subject, line.detail) for line in lines])


def test_guessing_ends(site: Site) -> None:
    for _ in range(MAX_WRONG):
        assert site.log_in("viewer", "a guess").status_code == 401
    answer = site.log_in("viewer")
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    assert MAX_WRONG_OF_A_NAME > MAX_WRONG


def test_a_form_without_its_token_is_refused(site: Site) -> None:
    assert site.client.post("/login", data={"name": "viewer", "password": PASSWORD}).status_code == 403
    site.log_in("clinician")
    path = f"/studies/{seed.REFER}/referral"
    assert site.client.post(path, data={"action": "review"}).status_code == 403
    token = site.token(f"/studies/{seed.REFER}")
    foreign = {"origin": "https://evil.example"}
    assert site.client.post(path, data={"action": "review", "csrf": token}, headers=foreign).status_code == 403
    # The API takes no form at all, so that a session's cookie alone changes nothing from a foreign page.
    assert site.client.post(f"{API}{path}", data={"action": "review"}).status_code in (415, 422)
    assert site.client.post(f"{API}{path}", content='{"action": "review"}', headers={"content-type": "text/plain"})\
        .status_code in (415, 422)  # fmt: skip
    assert site.client.post(f"{API}{path}", json={"action": "review"}, headers=foreign).status_code == 403
    assert site.client.post(f"{API}{path}", json={"action": "review"}).status_code == 200


def test_a_program_s_view_stands_in_the_audit_whatever_its_headers_say(site: Site) -> None:
    def views() -> int:
        with site.store.reading() as session:
            return len([row for row in session.scalars(select(AuditRow)) if row.action == "worklist.view"])

    key = site.key(Role.VIEWER)
    before = views()
    for extra in ({}, {"HX-Request": "true"}):
        assert site.client.get("/", headers=key | extra).status_code == 200
    assert views() == before + 2


def test_the_page_that_asks_by_itself_keeps_nobody_logged_in(site: Site) -> None:
    site.log_in("viewer")
    for _ in range(4):
        site.clock.advance(600)
        polled = site.client.get("/", headers={"HX-Request": "true"})
    assert polled.status_code == 401
    site.log_in("viewer")
    for _ in range(4):
        site.clock.advance(600)
        assert site.client.get("/", headers=PAGE).status_code == 200


def test_a_form_of_a_session_that_ended_is_not_done_and_says_so(site: Site) -> None:
    site.log_in("clinician")
    study = f"/studies/{seed.REFER}"
    form = {"action": "dismiss", "reason": "DXA last month", "csrf": site.token(study)}
    site.clock.advance(1900)
    here = {**PAGE, "referer": f"{HOST}{study}?x=1"}
    answer = site.client.post(f"{study}/referral", data=form, headers=here)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/login?next={study}%3Fx%3D1&ended=form")
    login = site.client.get(answer.headers["location"], headers=PAGE).text
    assert "what you sent was not done" in login
    assert "data-not-done" in login
    assert "DXA last month" not in login
    again = {"name": "clinician", "password": "wrong", "ended": "form", "csrf": site.token("/login")}
    assert "data-not-done" in site.client.post("/login", data=again, headers=PAGE).text  # a slip loses nothing
    with site.store.reading() as session:
        assert not [row for row in session.scalars(select(AuditRow)) if row.action.startswith("referral.")]
    program = site.client.post(f"{study}/referral", data=form)
    assert (program.status_code, program.headers["content-type"]) == (401, "application/problem+json")


@pytest.mark.parametrize("referer", ["https://evil.example/studies/1", "//evil.example", "", "https://[", f"{HOST}//x"])
def test_where_a_form_came_from_leads_to_no_other_site(site: Site, referer: str) -> None:
    answer = site.client.post("/dxa", headers={**PAGE, "referer": referer})
    assert answer.headers["location"] == "/login?ended=form"


def test_a_page_whose_session_ended_comes_back_after_logging_in(site: Site) -> None:
    site.log_in("viewer")
    site.clock.advance(1900)
    answer = site.client.get("/intake?q=Karl", headers=PAGE)
    assert answer.headers["location"] == "/login?next=/intake%3Fq%3DKarl&ended=page"
    assert "Your session has ended" in site.client.get(answer.headers["location"], headers=PAGE).text
    refresh = {"HX-Request": "true", "HX-Current-URL": f"{HOST}/?tab=refer"}
    polled = site.client.get("/", headers=refresh)
    assert (polled.status_code, polled.headers["hx-redirect"]) == (401, "/login?next=/%3Ftab%3Drefer&ended=page")
    foreign = {**refresh, "HX-Current-URL": "https://evil.example/"}
    assert site.client.get("/", headers=foreign).headers["hx-redirect"] == "/login?ended=page"
    assert "session" not in site.client.get("/login", headers=PAGE).text.partition("<main")[2]  # nobody's has ended


def test_the_page_of_the_api_leads_to_the_login_and_back(site: Site) -> None:
    answer = site.client.get("/api/docs", headers=PAGE)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=/api/docs")
    assert site.client.get("/api/openapi.json", headers=PAGE).status_code == 401


def test_a_person_without_a_right_reads_a_sentence_and_a_program_its_name(site: Site) -> None:
    site.log_in("viewer")
    page = site.client.get("/training", headers=PAGE)
    assert page.status_code == 403
    assert "Your role does not let you look at or start training runs." in page.text
    assert "train&#39;" not in page.text
    assert "'train'" in site.client.get("/training").json()["detail"]
    assert set(words.RIGHTS) == set(Right)


def test_another_password_needs_the_present_one(site: Site) -> None:
    site.log_in("viewer")
    new = "another long password"
    form = {"password": "wrong", "new": new, "again": new, "csrf": site.token("/account")}
    assert "present password is wrong" in site.client.post("/account", data=form).text
    form["password"] = PASSWORD
    assert "differ" in site.client.post("/account", data={**form, "again": "x"}).text
    assert "12 to" in site.client.post("/account", data={**form, "new": "short", "again": "short"}).text
    assert site.client.post("/account", data=form).status_code == 200
    assert site.client.get("/", headers=PAGE).status_code == 200  # this session goes on
    assert site.log_in("viewer").status_code == 401
    assert site.log_in("viewer", new).status_code == 303


@pytest.mark.parametrize(
    ("told", "path"),
    [
        ("/studies/1.2?x=1", "/studies/1.2?x=1"),
        ("https://evil.example", "/"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("/login?next=/login", "/"),
        ("/a\nb", "/"),
    ],
)
def test_nobody_is_sent_to_another_site(told: str, path: str) -> None:
    assert local_path(told) == path


def test_a_key_opens_the_api_and_stands_in_the_audit(site: Site) -> None:
    headers = site.key(Role.CLINICIAN)
    assert site.client.get(f"{API}/worklist", headers=headers).status_code == 200
    done = site.client.post(f"{API}/studies/{seed.REFER}/referral", json={"action": "review"}, headers=headers)
    assert done.status_code == 200
    assert site.last("referral.review").actor == "key:clinician"
    for wrong in ("Bearer", "Bearer x", headers["Authorization"] + "x"):
        assert site.client.get(f"{API}/worklist", headers={"Authorization": wrong}).status_code == 401
    assert site.last("key.wrong").actor == "nobody"
    with site.store.transaction() as session:
        people.revoke_key(session, "clinician", By("shell:root", site.clock(), None))
    assert site.client.get(f"{API}/worklist", headers=headers).status_code == 401


def test_who_asks_too_often_waits(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "service.api.app.Pace", lambda _most: Pace(2, window_seconds=1e6)
    )  # whatever the machine's pace
    app = create_app(Settings(data_dir=tmp_path, disk_floor_bytes=1), site.store, DEFAULT_POLICY, clock=site.clock)
    slow, other = site.key(Role.VIEWER), site.key(Role.ML_ADMIN)
    with TestClient(app, base_url=HOST) as client:
        found = [client.get("/metrics", headers=slow) for _ in range(3)]
        assert [answer.status_code for answer in found] == [200, 200, 429]
        assert int(found[2].headers["retry-after"]) > 0
        assert client.get("/metrics", headers=other).status_code == 200
        assert client.get(f"{API}/health/live", headers=slow).status_code == 200


def test_the_window_of_requests_moves_on() -> None:
    now = [100.0]
    pace = Pace(2, window_seconds=60.0, clock=lambda: now[0])
    assert [pace.wait_seconds("a") for _ in range(3)] == [0, 0, 60]
    assert pace.wait_seconds("b") == 0
    now[0] += 45
    assert pace.wait_seconds("a") == 15
    now[0] += 15
    assert pace.wait_seconds("a") == 0


def _routes(routes: Iterable[Any]) -> Iterator[APIRoute]:
    """Every route of ours, those of included routers too."""
    for route in routes:
        if isinstance(route, APIRoute) and route.path not in OPEN:
            yield route
        elif hasattr(route, "original_router"):
            yield from _routes(route.original_router.routes)


def _right(route: APIRoute) -> Right:
    needs = [one.dependency for one in route.dependencies if isinstance(one.dependency, Needs)]
    assert len(needs) == 1, f"{route.path} does not say which right it needs"
    return needs[0].right


BODIES: dict[str, dict[str, Any]] = {
    "referral": {"action": "review"},
    "send": {"destination": "pacs"},
}


def test_every_route_says_which_right_it_needs_and_turns_away_who_lacks_it(site: Site) -> None:
    """A route that forgets fails here; so does one that changes something for a mere reader."""
    keys = {role: site.key(role) for role in Role}
    tried = 0
    for route in _routes(site.app.routes):
        right = _right(route)
        for method in route.methods - {"HEAD"}:
            assert method == "GET" or right is not Right.READ, f"{method} {route.path} changes something"
            path = re.sub(r"{[a-z_]*id}", "1", route.path.replace("{study_uid}", seed.REFER))
            path = path.replace("{destination}", "pacs").replace("{name}", "crop-L1.png")
            for role, headers in keys.items():
                if right in GRANTS[role]:
                    continue
                before = site.lines()
                body = BODIES.get(path.rpartition("/")[2], {})
                answer = site.client.request(method, path, json=body if method != "GET" else None, headers=headers)
                assert answer.status_code == 403, f"{role}: {method} {path}"
                assert site.lines() == before
                tried += 1
    assert tried > 30


def test_a_reader_sees_no_buttons(site: Site) -> None:
    site.log_in("viewer")
    for path in ("/", f"/studies/{seed.REFER}", "/intake"):
        page = site.client.get(path, headers=PAGE).text
        assert 'href="/audit"' not in page
        assert re.findall(r'<form[^>]*method="post"', page) == ['<form class="who-am-i" action="/logout" method="post"']
    site.log_in("pacs-admin")
    assert 'href="/audit"' in site.client.get("/intake", headers=PAGE).text
    page = site.client.get("/audit", headers=PAGE).text
    assert "user:ml-admin" in page
    assert "login" in page


def test_once_there_is_a_user_the_password_for_everybody_opens_nothing(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("the password of everybody\n")
    with installed(tmp_path, empty=True) as opened:
        settings = Settings(data_dir=tmp_path, disk_floor_bytes=1, web_password_file=file)
        app = create_app(settings, opened.store, DEFAULT_POLICY, clock=lambda: seed.NOW)
        basic = ("anybody", "the password of everybody")
        with TestClient(app, base_url=HOST) as client:
            assert client.get(f"{API}/worklist", auth=basic).status_code == 200
            with opened.store.transaction() as session:
                people.add_user(session, "first", frozenset({Role.VIEWER}), PASSWORD, By("shell:root", seed.NOW, None))
            assert client.get(f"{API}/worklist", auth=basic).status_code == 401
            with opened.store.transaction() as session:
                people.disable(session, "first", By("shell:root", seed.NOW, None))
            assert client.get(f"{API}/worklist", auth=basic).status_code == 401


def test_a_database_without_tables_is_told_in_one_sentence(tmp_path: Path) -> None:
    store = Store(make_engine(f"sqlite:///{tmp_path / 'empty.sqlite3'}"))
    with pytest.raises(ConfigurationError, match="not migrated"):
        require_lock(Settings(data_dir=tmp_path, web_host="0.0.0.0"), store)
    store.close()


def test_without_users_the_pages_bind_to_loopback_only(tmp_path: Path) -> None:
    with installed(tmp_path, empty=True) as opened:
        require_lock(Settings(data_dir=tmp_path), opened.store)
        outside = Settings(data_dir=tmp_path, web_host="0.0.0.0")
        with pytest.raises(ConfigurationError, match="osteogate user add"):
            require_lock(outside, opened.store)
        app = create_app(outside, opened.store, DEFAULT_POLICY)
        with TestClient(app, base_url="http://127.0.0.1:8080") as client:
            assert client.get(f"{API}/worklist").status_code == 503
        file = tmp_path / "password"
        file.write_text("the password of everybody\n")
        require_lock(Settings(data_dir=tmp_path, web_host="0.0.0.0", web_password_file=file), opened.store)
        with opened.store.transaction() as session:
            people.add_user(session, "first", frozenset({Role.VIEWER}), PASSWORD, By("shell:root", seed.NOW, None))
        require_lock(outside, opened.store)
