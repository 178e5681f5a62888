"""Errors as RFC 9457 problem documents; a browser that asked for a page gets a page instead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import IntegrityError, OperationalError
from starlette.exceptions import HTTPException

from service.domain.errors import OsteogateError
from service.web import words
from service.web.addresses import DOCS, came_from
from service.web.desk import RightMissing
from service.web.pages import Pages

MEDIA_TYPE = "application/problem+json"
DATABASE_AWAY = "The database does not answer. Try again in a moment."
RETRY_SOON = {"Retry-After": "5"}


def problem(status: int, detail: str | None = None, **more: Any) -> dict[str, Any]:
    """A problem document; `more` are its extension members."""
    return {"type": "about:blank", "title": _title(status), "status": status, "detail": detail, **more}


def problem_response(
    status: int, detail: str | None = None, headers: Mapping[str, str] | None = None, **more: Any
) -> JSONResponse:
    """A problem document as a response."""
    return JSONResponse(problem(status, detail, **more), status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def problem_bytes(status: int, detail: str) -> bytes:
    """A problem document for where no response object can be made (the guard)."""
    return json.dumps(problem(status, detail)).encode()


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def wants_page(headers: Mapping[str, str], path: str) -> bool:
    """True for a person in a browser, away from the API; the page that shows the API is a page."""
    away = path == DOCS or not path.startswith(("/api/", "/metrics", "/static/"))
    return away and "text/html" in headers.get("accept", "")


def error_page(
    pages: Pages, request: Request, status: int, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    """What a person reads where something was refused or broke."""
    sent = request.method not in ("GET", "HEAD")
    told = {
        "status": status,
        "title": words.REFUSALS.get(status, "Not done"),
        "detail": detail,
        "sent": sent,
        "untouched": sent and status < HTTPStatus.INTERNAL_SERVER_ERROR,  # beyond, nobody can tell
        "back": came_from(request.headers),
    }
    return pages.render(request, "error.html", told, status, headers)


def install(app: FastAPI, pages: Pages) -> None:
    """Register the handlers of every error that a route can raise."""

    def answer(request: Request, status: int, detail: str, headers: Mapping[str, str] | None) -> Response:
        if wants_page(request.headers, request.url.path):
            return error_page(pages, request, status, detail, headers)
        return problem_response(status, detail, headers, instance=request.url.path)

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> Response:
        detail = error.detail if error.detail != _title(error.status_code) else _PLAIN.get(error.status_code)
        return answer(request, error.status_code, detail or error.detail, error.headers)

    @app.exception_handler(RightMissing)
    def not_granted(request: Request, error: RightMissing) -> Response:
        person = wants_page(request.headers, request.url.path)
        return answer(request, error.status_code, words.not_granted(error.right) if person else error.detail, None)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        if wants_page(request.headers, request.url.path):
            return _misfit_page(request, error)
        told = [_complaint(one) for one in error.errors()]
        return problem_response(422, "The request does not fit.", instance=request.url.path, errors=told)

    def _misfit_page(request: Request, error: RequestValidationError) -> Response:
        """What does not fit, field by field; nothing of what was sent is echoed."""
        parts = [(one.get("loc", ()), one) for one in error.errors()]
        if any(where[:1] != ("body",) for where, _ in parts):
            return error_page(pages, request, 422, "There is nothing at this address: a part of it does not fit.")
        told = dict.fromkeys(words.misfit(str(where[-1]), one["type"], one.get("ctx") or {}) for where, one in parts)
        return error_page(pages, request, 422, " ".join(told))

    @app.exception_handler(OsteogateError)
    def conflict(request: Request, error: OsteogateError) -> Response:
        """What the workflow refuses: a step that the referral's or the study's state does not allow."""
        return answer(request, 409, _sentence(error), None)

    @app.exception_handler(IntegrityError)
    def overtaken(request: Request, error: IntegrityError) -> Response:
        """Two requests stored the same thing at once: one did, and of the other nothing is left."""
        return answer(request, 409, "The same was stored by somebody else at this moment. Look, and try again.", None)

    @app.exception_handler(OperationalError)
    def database_away(request: Request, error: OperationalError) -> Response:
        return answer(request, 503, DATABASE_AWAY, RETRY_SOON)


_PLAIN = {404: "There is nothing at this address.", 405: "This address does not take that method."}


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def _complaint(error: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong and where, without echoing what was sent."""
    where: Sequence[Any] = error.get("loc", ())
    return {"where": ".".join(str(part) for part in where), "text": str(error.get("msg", ""))}
