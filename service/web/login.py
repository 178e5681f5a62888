"""The pages of one's own account: log in, log out, another password."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, HTTPException, Query, Request, Response
from fastapi.responses import RedirectResponse

from service.domain.access import NOBODY, AccessError, name_key
from service.web.addresses import LOGIN, LOGOUT, Ended, local_path
from service.web.desk import Desk, by, peer_address, principal, session_rules
from service.web.pages import Pages
from service.web.tries import MAX_WRONG, WINDOW_SECONDS, Tries
from service.workflow import passwords, people, reading

COOKIE = "osteogate_session"
MAX_WRONG_OF_A_NAME = 30  # from all addresses together; so few that guessing is hopeless, so many that nobody
NAME_WINDOW_SECONDS = 900.0  # locks a colleague out by mistake
WRONG = "Name or password is wrong, or the account is disabled."
TOO_MANY = "Too many wrong passwords. Try again in {wait} s."

WHAT_ENDED = {
    Ended.PAGE: "Your session has ended. Log in to go on where you were.",
    Ended.FORM: "Your session had ended: what you sent was not done. Log in, and send it again.",
}

Token = Annotated[str, Form(max_length=100)]
LastWords = Annotated[str, Form(max_length=10)]
Secret = Annotated[str, Form(max_length=4096)]


def login_router(desk: Desk, pages: Pages) -> APIRouter:
    """Log in, log out, change the password."""
    router = APIRouter(include_in_schema=False)
    addresses = Tries(MAX_WRONG, WINDOW_SECONDS)
    names = Tries(MAX_WRONG_OF_A_NAME, NAME_WINDOW_SECONDS)
    rules = session_rules(desk.settings)

    def form(
        request: Request, target: str, ended: str, told: str | None = None, status: int = 200, wait: int = 0
    ) -> Response:
        last = next((one for one in Ended if one.value == ended), None)
        with desk.store.reading() as session:
            known = {"target": target, "told": told, "users": people.anyone(session)}
        known |= {"ended": last, "what_ended": None if last is None else WHAT_ENDED[last]}
        return pages.render(request, "login.html", known, status, {"Retry-After": str(wait)} if wait else None)

    @router.get(LOGIN)
    def ask(
        request: Request,
        next: Annotated[str, Query(max_length=2000)] = "/",
        ended: Annotated[str, Query(max_length=10)] = "",
    ) -> Response:
        """The form; whoever is in already goes where they wanted to."""
        found = principal(request)
        if found is not None and found.is_user:
            return RedirectResponse(local_path(next), 303)
        return form(request, local_path(next), ended)

    @router.post(LOGIN)
    def enter(
        request: Request,
        name: Annotated[str, Form(max_length=200)],
        password: Secret,
        next: Annotated[str, Form(max_length=2000)] = "/",
        ended: LastWords = "",
        csrf: Token = "",
    ) -> Response:
        """Check name and password, start a session, go on."""
        pages.forms.check(request, csrf)
        address, target = peer_address(request) or "", local_path(next)
        wait = max(addresses.wait_seconds(address), names.wait_seconds(name_key(name)))
        if wait:
            return form(request, target, ended, TOO_MANY.format(wait=wait), 429, wait)
        with desk.store.reading() as session:
            kept = people.password_hash(session, name)
        token = None
        if passwords.fits(password, kept) and kept is not None:
            with desk.store.transaction() as session:
                token = people.start_session(session, name, kept, rules, by(request, desk.clock))
        if token is None:
            addresses.add(address)
            names.add(name_key(name))
            _note_failure(request, name)
            return form(request, target, ended, WRONG, 401)
        response = RedirectResponse(target, 303)
        behind_tls = request.url.scheme == "https"
        # Lax, not Strict: a link to a study in the hospital's other programs must find the reader logged in.
        response.set_cookie(COOKIE, token, httponly=True, samesite="lax", secure=behind_tls, path="/")
        return response

    def _note_failure(request: Request, name: str) -> None:
        """Who could not log in; a name that nobody has is not written down: it may be a password."""
        with desk.store.transaction() as session:
            known = people.known_name(session, name)
            reading.note(
                session,
                at=desk.clock(),
                actor=NOBODY,
                action="login.failed",
                subject="web" if known is None else f"user:{known}",
                detail={},
                peer_address=peer_address(request),
            )

    @router.post(LOGOUT)
    def leave(request: Request, csrf: Token = "") -> Response:
        """End this session."""
        pages.forms.check(request, csrf)
        with desk.store.transaction() as session:
            people.end_session(session, request.cookies.get(COOKIE, ""), by(request, desk.clock))
        response = RedirectResponse(LOGIN, 303)
        response.delete_cookie(COOKIE, path="/", httponly=True, samesite="lax")
        return response

    @router.get("/account")
    def account(request: Request) -> Response:
        """Who one is here, and the form for another password."""
        _user(request)
        return pages.render(request, "account.html", {"told": None, "done": False})

    @router.post("/account")
    def change(request: Request, password: Secret, new: Secret, again: Secret, csrf: Token = "") -> Response:
        """Another password; every other session of the user ends."""
        pages.forms.check(request, csrf)
        name = _user(request)
        told = _changed(request, name, password, new) if new == again else "The two new passwords differ."
        status = 200 if told is None else 422
        return pages.render(request, "account.html", {"told": told, "done": told is None}, status)

    def _changed(request: Request, name: str, password: str, new: str) -> str | None:
        """Why the password stays as it was, or None."""
        wait = names.wait_seconds(name_key(name))
        if wait:
            return TOO_MANY.format(wait=wait)
        with desk.store.reading() as session:
            kept = people.password_hash(session, name)
        if not passwords.fits(password, kept):
            names.add(name_key(name))
            _note_failure(request, name)
            return "The present password is wrong."
        try:
            with desk.store.transaction() as session:
                own = request.cookies.get(COOKIE)
                people.set_password(session, name, new, by(request, desk.clock), keep=own)
        except AccessError as error:
            return f"{str(error)[:1].upper()}{str(error)[1:]}."
        return None

    return router


def _user(request: Request) -> str:
    found = principal(request)
    if found is None or not found.is_user:
        raise HTTPException(403, "Only a user who logged in has an account.")
    return found.name
