"""Who asks? Answered for every request before any route sees it.

As soon as there is a user, nothing opens without one: a browser shows its session, a program its API key. Before
that an installation is open to whoever sits at the machine (loopback only), or behind one password for everybody.
The first user ends both, for good: users are never deleted.
"""

from __future__ import annotations

from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import Scope

from service.api.password import Gate, Turned, too_many
from service.api.problems import wants_page
from service.domain.access import EVERY_ROLE, LOCAL, Principal
from service.settings import Settings
from service.store.engine import Store
from service.web.addresses import LOGIN, LOGOUT, Ended, came_from, local_path, login_path
from service.web.desk import session_rules
from service.web.login import COOKIE
from service.web.tries import Tries
from service.workflow import people
from service.workflow.clock import Clock

HEALTH = frozenset({"/api/v1/health/live", "/api/v1/health/ready"})  # supervisors ask, and learn nothing else
BEARER = {"WWW-Authenticate": 'Bearer realm="Osteogate"'}


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request let in. `any_host`: nothing opens without a secret here, so a foreign Host header can do no harm."""

    principal: Principal | None
    any_host: bool


class Entrance:
    """Lets in who has a session or a key, as soon as there are users."""

    def __init__(self, settings: Settings, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._rules = session_rules(settings)
        self._gate = Gate(settings.web_password) if settings.web_password is not None else None
        self._on_loopback = ip_address(settings.web_host).is_loopback
        self._wrong_keys = Tries()
        self._users = False  # once there is a user there always is one

    def admit(self, scope: Scope) -> Admitted | Turned:
        """Who asks, or why they are turned away."""
        headers, path = Headers(scope=scope), scope["path"]
        if path in HEALTH:
            return Admitted(None, any_host=True)  # whether this process lives must not hang on the database
        scheme, _, told = (headers.get("authorization") or "").partition(" ")
        if scheme.lower() == "bearer":
            return self._by_key(told.strip(), scope)
        if not self._locked():
            return self._without_users(headers, scope)
        return self._by_session(headers, scope)

    def _locked(self) -> bool:
        if not self._users:
            with self._store.reading() as session:
                self._users = people.anyone(session)
        return self._users

    def _by_key(self, key: str, scope: Scope) -> Admitted | Turned:
        address = _address(scope)
        wait = self._wrong_keys.wait_seconds(address)
        if wait:
            return too_many(wait)
        now = self._clock()
        with self._store.reading() as session:
            found = people.by_key(session, key, now)
        if found is None:
            event = self._wrong_keys.add(address)
            told = None if event is None else event.replace("password.", "key.")
            return Turned(401, "This API key opens nothing.", BEARER, told)
        principal, stale = found
        if stale:
            with self._store.transaction() as session:
                people.used(session, key, now)
        return Admitted(principal, any_host=self._gate is not None or self._locked())

    def _without_users(self, headers: Headers, scope: Scope) -> Admitted | Turned:
        if self._gate is not None:
            found = self._gate.admit(headers.get("authorization"), _address(scope))
            if isinstance(found, Turned):
                return found
            return Admitted(Principal(found, EVERY_ROLE), any_host=True)
        if not self._on_loopback:
            return Turned(503, "There is no user yet: `osteogate user add` makes the first one.", {})
        return Admitted(LOCAL, any_host=False)

    def _by_session(self, headers: Headers, scope: Scope) -> Admitted | Turned:
        token, now = _token(headers), self._clock()
        found = None
        if token:
            with self._store.reading() as session:
                found = people.by_session(session, token, self._rules, now)
        refresh = "hx-request" in headers  # the page asks by itself: nobody did anything
        if found is not None:
            principal, stale = found
            if stale and not refresh:
                with self._store.transaction() as session:
                    people.seen(session, token, now)
            return Admitted(principal, any_host=True)
        path = scope["path"]
        if path == LOGIN or path.startswith("/static/"):
            return Admitted(None, any_host=True)
        return _turned(headers, scope, had_session=bool(token))


def _turned(headers: Headers, scope: Scope, *, had_session: bool) -> Turned:
    """Whoever has no session: a person is brought to the login page and back, a program is told."""
    path = scope["path"]
    if "hx-request" in headers:
        back = login_path(came_from(headers, "hx-current-url"), Ended.PAGE)
        return Turned(401, "The session has ended.", {"HX-Redirect": back})
    if not wants_page(headers, path):
        return Turned(401, "Log in, or send an API key (Authorization: Bearer).", BEARER)
    if scope["method"] == "GET":
        asked = login_path(local_path(_asked(scope)), Ended.PAGE if had_session else None)
        return Turned(303, "Log in first.", {"Location": asked})
    if path == LOGOUT:
        return Turned(303, "The session has ended.", {"Location": LOGIN})
    back = login_path(came_from(headers), Ended.FORM)
    return Turned(303, "Nothing was done: the session has ended.", {"Location": back})


def _token(headers: Headers) -> str:
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return "" if cookie is None else cookie.value


def _asked(scope: Scope) -> str:
    query = scope.get("query_string", b"").decode("latin-1")
    return f"{scope['path']}?{query}" if query else str(scope["path"])


def _address(scope: Scope) -> str:
    return str(scope["client"][0]) if scope.get("client") else ""
