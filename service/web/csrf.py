"""Tokens that prove a form came from one of our own pages.

The browser holds a random nonce in an HttpOnly, SameSite=Strict cookie; the page holds HMAC(secret, nonce).
A page of another origin can make the browser send the cookie, but cannot know the token. The secret lives as
long as the process: after a restart an open page must be reloaded once. The cookie opens nothing by itself.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from fastapi import HTTPException, Request, Response

COOKIE = "osteogate_nonce"
HEADER = "x-csrf-token"


class Forms:
    """Issues and checks the tokens of one process."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def nonce(self, request: Request) -> str:
        """The browser's nonce, or a new one for a browser that has none."""
        held = request.cookies.get(COOKIE, "")
        return held if len(held) == 43 else secrets.token_urlsafe(32)

    def token(self, nonce: str) -> str:
        """What the page carries for this nonce."""
        return hmac.new(self._secret, nonce.encode(), hashlib.sha256).hexdigest()

    def remember(self, request: Request, response: Response, nonce: str) -> None:
        """Lay the nonce into the browser."""
        behind_tls = request.url.scheme == "https"
        response.set_cookie(COOKIE, nonce, httponly=True, samesite="strict", secure=behind_tls, path="/")

    def check(self, request: Request, sent: str | None) -> None:
        """403 unless the token (form field or header) belongs to the browser's nonce."""
        held = request.cookies.get(COOKIE, "")
        token = sent or request.headers.get(HEADER) or ""
        if not held or not hmac.compare_digest(self.token(held).encode(), token.encode()):
            raise HTTPException(403, "This form is no longer current. Reload the page and try again.")
