"""What every request passes before any route sees it, and every response after.

Without users and without a password the pages are open to whoever reaches the loopback port, so the guard keeps
other web sites from reaching it through the user's own browser: the Host header must name this machine (DNS
rebinding). Otherwise any Host will do: a browser sends cookie and password to the origin alone that they belong to.
In both cases a request that changes something must come from our own origin (request forgery).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from ipaddress import ip_address
from urllib.parse import urlsplit

from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.entrance import HEALTH, Admitted, Entrance
from service.api.password import Turned
from service.api.problems import DATABASE_AWAY, MEDIA_TYPE, RETRY_SOON, problem_bytes, wants_page
from service.domain.access import LOCAL
from service.web.desk import PRINCIPAL_KEY
from service.web.tries import Pace

log = logging.getLogger(__name__)

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
TOO_LARGE = "The body is larger than anything that is sent here."
MAX_BODY_BYTES = 64 * 1024  # the largest thing that anyone sends us here is a reason of 1000 characters,
MAX_FILE_BYTES = 32 * 1024 * 1024  # files of DXA results aside
FILES = frozenset({"/api/v1/dxa/import", "/dxa"})
MAX_PACKAGE_BYTES = 1024 * 1024 * 1024  # and model packages, which never lie in memory
PACKAGES = frozenset({"/api/v1/models/import", "/models/import"})

POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
# Swagger UI carries its own icons as data: pictures.
DOCS_POLICY = POLICY.replace("img-src 'self'", "img-src 'self' data:")

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


ErrorPage = Callable[[Request, int, str, Mapping[str, str] | None], Response]


class BodyTooLargeError(Exception):
    """The body grew past its limit while it was read."""


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(
        self, app: ASGIApp, entrance: Entrance, pace: Pace, note: Callable[[str, str], None], page: ErrorPage
    ) -> None:
        """`entrance` says who asks; `note` writes its events, with the address they came from, to the audit.

        `page` makes what a person reads of a refusal; a program gets a problem document.
        """
        self._page = page
        self._app = app
        self._entrance = entrance
        self._pace = pace
        self._note = note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, pass on, and make an honest answer of whatever breaks inside."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, scope["path"])
        found = await self._admitted(scope)
        if isinstance(found, Turned):
            await self._refuse(scope, receive, answer, found.status, found.detail, found.headers)
            return
        scope[PRINCIPAL_KEY] = found.principal
        refusal = _refusal(scope, any_host=found.any_host)
        if refusal is not None:
            await self._refuse(scope, receive, answer, *refusal)
            return
        wait = 0 if scope["path"] in HEALTH else self._pace.wait_seconds(_who(scope, found))
        if wait:
            slower = {"Retry-After": str(wait)}
            await self._refuse(scope, receive, answer, 429, "Too many requests. Slow down.", slower)
            return
        try:
            await self._app(scope, _limited(receive, answer, most_bytes(scope["path"])), answer.send)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if answer.started:
                raise
            await self._refuse(scope, receive, answer, 500, "Something broke here. It has been logged.")

    async def _refuse(
        self,
        scope: Scope,
        receive: Receive,
        answer: _Answer,
        status: int,
        detail: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """A page for a person, a problem document for a program; a redirection needs neither."""
        person = status >= HTTPStatus.BAD_REQUEST and wants_page(Headers(scope=scope), scope["path"])
        if not person or "www-authenticate" in {name.lower() for name in headers or {}}:
            await answer.problem(status, detail, headers)
            return
        await self._page(Request(scope), status, detail, headers)(scope, receive, answer.send)

    async def _admitted(self, scope: Scope) -> Admitted | Turned:
        """Who asks, or why they are turned away."""
        try:
            found = await run_in_threadpool(self._entrance.admit, scope)
        except OperationalError:
            return Turned(HTTPStatus.SERVICE_UNAVAILABLE, DATABASE_AWAY, RETRY_SOON)
        except Exception:
            log.exception("who asks for %s could not be told", scope["path"])
            return Turned(HTTPStatus.INTERNAL_SERVER_ERROR, "Something broke here. It has been logged.", {})
        if isinstance(found, Turned) and found.event is not None:
            address = _address(scope)
            log.warning("%s from %s", found.event, address)
            try:
                await run_in_threadpool(self._note, found.event, address)
            except Exception:  # the database is away: the answer stays the same
                log.exception("%s could not be written to the audit", found.event)
        return found


class _Answer:
    """Sends the response with our headers on it."""

    def __init__(self, send: Send, path: str) -> None:
        self._send = send
        self._path = path
        self.started = False
        self.body_too_large = False

    async def send(self, message: Message) -> None:
        if self.body_too_large:  # whatever the route made of the body that we cut off
            if not self.started:
                await self.problem(413, TOO_LARGE)
            return
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            policy = DOCS_POLICY if self._path == "/api/docs" else POLICY
            headers.setdefault("Content-Security-Policy", policy)
            static = self._path.startswith("/static/")
            headers.setdefault("Cache-Control", "public, max-age=300" if static else "no-store")
        await self._send(message)

    async def problem(self, status: int, detail: str, more: Mapping[str, str] | None = None) -> None:
        body = problem_bytes(status, detail)
        headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
        headers += [(name.lower().encode(), value.encode()) for name, value in (more or {}).items()]
        self.body_too_large = False
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
        self.body_too_large = status == 413


def _address(scope: Scope) -> str:
    return str(scope["client"][0]) if scope.get("client") else ""


def _who(scope: Scope, found: Admitted) -> str:
    """Whose requests are counted together: a user's or a key's from everywhere, nobody's by address."""
    known = found.principal
    return known.name if known is not None and known != LOCAL else _address(scope)


def _refusal(scope: Scope, *, any_host: bool) -> tuple[int, str] | None:
    """Why a request may not pass, or None."""
    headers = Headers(scope=scope)
    if not any_host and not is_loopback_name(headers.get("host", "")):
        return 421, "Osteogate answers only to the loopback names of this machine (localhost, 127.0.0.1)."
    if scope["method"] in SAFE_METHODS:
        return None
    if not from_our_origin(headers, scope["scheme"]):
        return 403, "A request that changes something must come from Osteogate's own pages."
    if not _small(headers.get("content-length", "0"), most_bytes(scope["path"])):
        return 413, TOO_LARGE
    return None


def is_loopback_name(host: str) -> bool:
    """True for localhost and loopback addresses, with or without a port."""
    try:
        parts = urlsplit(f"//{host}")
        name, _ = parts.hostname, parts.port
    except ValueError:
        return False
    if not name or parts.username is not None or parts.path:
        return False
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def from_our_origin(headers: Mapping[str, str], scheme: str) -> bool:
    """True unless the browser says that another origin sent this; a script sends neither header."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None and site not in ("same-origin", "none"):
        return False
    return origin is None or origin.lower() == f"{scheme}://{headers.get('host', '')}".lower()


def most_bytes(path: str) -> int:
    """The largest body that an address takes."""
    if path in PACKAGES:
        return MAX_PACKAGE_BYTES
    return MAX_FILE_BYTES if path in FILES else MAX_BODY_BYTES


def _small(length: str, most: int) -> bool:
    return length.isascii() and length.isdigit() and int(length[:20]) <= most


def _limited(receive: Receive, answer: _Answer, most: int) -> Receive:
    """`receive` that stops a body without (or with a false) Content-Length at the limit."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            answer.body_too_large = True
            raise BodyTooLargeError
        return message

    return counted
