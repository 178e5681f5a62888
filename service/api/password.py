"""One password for everybody, asked for by HTTP Basic authentication (RFC 7617), until users with roles exist.

The user name is free: it is what a person says of themselves, and the audit writes it down as that.
"""

from __future__ import annotations

import binascii
import hmac
import time
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256

OPEN_PATHS = frozenset({"/api/v1/health/live", "/api/v1/health/ready"})  # supervisors ask, and learn nothing else
MAX_WRONG = 20  # from one address within the window; then nothing is looked at
WINDOW_SECONDS = 60.0
MAX_REMEMBERED = 4096
MAX_NAME_LENGTH = 64  # of an actor in the audit
OUR_OWN_NAME = "osteogate"  # stands in the audit where no person acted


@dataclass(frozen=True, slots=True)
class Turned:
    """A request turned away; `event` is for the audit, None where the same was just written."""

    status: int
    detail: str
    headers: Mapping[str, str]
    event: str | None = None


class Gate:
    """Lets in who knows the password, and slows down who guesses."""

    def __init__(self, password: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._digest = _digest(password)
        self._clock = clock
        self._wrong: dict[str, deque[float]] = {}

    def admit(self, authorization: str | None, address: str) -> str | Turned:
        """The name of the person who asks, or why they are turned away."""
        tries = self._lately(address)
        if len(tries) >= MAX_WRONG:
            wait = max(1, round(tries[0] + WINDOW_SECONDS - self._clock()))
            return Turned(429, "Too many wrong passwords from this address.", {"Retry-After": str(wait)})
        if authorization is None:
            return _unknown(None)
        name, password = _credentials(authorization)
        right = hmac.compare_digest(_digest(password), self._digest)
        if right and _is_a_name(name):
            return name
        tries.append(self._clock())
        self._remember(address, tries)
        return _unknown({1: "password.wrong", MAX_WRONG: "password.locked"}.get(len(tries)))

    def _lately(self, address: str) -> deque[float]:
        tries = self._wrong.get(address, deque())
        while tries and self._clock() - tries[0] >= WINDOW_SECONDS:
            tries.popleft()
        return tries

    def _remember(self, address: str, tries: deque[float]) -> None:
        if len(self._wrong) >= MAX_REMEMBERED:
            self._wrong.clear()
        self._wrong[address] = tries


def _unknown(event: str | None) -> Turned:
    challenge = {"WWW-Authenticate": 'Basic realm="Osteogate", charset="UTF-8"'}
    return Turned(401, "A name and the password are needed.", challenge, event)


def _credentials(authorization: str) -> tuple[str, str]:
    """Name and password; both empty where the header is none of ours."""
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return "", ""
    try:
        text = b64decode(encoded.strip(), validate=True).decode()
    except (binascii.Error, ValueError):
        return "", ""
    name, _, password = text.partition(":")
    return name.strip(), password


def _is_a_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable() and name.casefold() != OUR_OWN_NAME


def _digest(password: str) -> bytes:
    return sha256(password.encode()).digest()
