"""Addresses of ours that a request may name: where to go after logging in, where a button was."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any
from urllib.parse import urlencode, urlsplit

LOGIN = "/login"
LOGOUT = "/logout"
DOCS = "/api/docs"
WORKLIST = "/"


class Ended(StrEnum):
    """What a session's end took away from whoever had it."""

    PAGE = "page"  # what they looked at
    FORM = "form"  # what they sent: nothing was done with it


def local_path(told: str) -> str:
    """A path of ours, or the worklist: a link must not send people who logged in to another site."""
    foreign = not told.startswith("/") or told.startswith("//") or "\\" in told or not told.isprintable()
    return WORKLIST if foreign or told.startswith((LOGIN, LOGOUT)) else told


def worklist_path(told: str) -> str:
    """The worklist as it was filtered, sorted and turned, and nothing else."""
    path, _, query = local_path(told).partition("?")
    return f"{WORKLIST}?{query}" if path == WORKLIST and query else WORKLIST


def came_from(headers: Mapping[str, str], name: str = "referer") -> str:
    """The page of ours that a browser says this request came from, or the worklist."""
    try:
        told = urlsplit(headers.get(name, ""))
    except ValueError:
        return WORKLIST
    if not told.netloc or told.netloc.lower() != headers.get("host", "").lower():
        return WORKLIST
    return local_path(f"{told.path}?{told.query}" if told.query else told.path or WORKLIST)


def login_path(target: str, ended: Ended | None = None) -> str:
    """The login page that leads on to `target`, and says what became of the session."""
    told: dict[str, Any] = {} if target == WORKLIST else {"next": target}
    if ended is not None:
        told["ended"] = ended.value
    return f"{LOGIN}?{urlencode(told, safe='/')}" if told else LOGIN
