"""One password for everybody, asked for by HTTP Basic authentication (RFC 7617), until the first user exists.

The user name is free: it is what a person says of themselves, and the audit writes it down as that.
"""

from __future__ import annotations

import binascii
import hmac
import time
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from service.domain.access import MAX_NAME_LENGTH, RESERVED_NAMES
from service.web.tries import Tries


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
        self._tries = Tries(clock=clock)

    def admit(self, authorization: str | None, address: str) -> str | Turned:
        """The name of the person who asks, or why they are turned away."""
        wait = self._tries.wait_seconds(address)
        if wait:
            return too_many(wait)
        if authorization is None:
            return _unknown(None)
        name, password = _credentials(authorization)
        right = hmac.compare_digest(_digest(password), self._digest)
        if right and _is_a_name(name):
            return name
        return _unknown(self._tries.add(address))


def too_many(wait_seconds: int) -> Turned:
    """The answer to somebody who guessed too often."""
    return Turned(429, "Too many wrong passwords from this address.", {"Retry-After": str(wait_seconds)})


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
    return 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable() and name.casefold() not in RESERVED_NAMES


def _digest(password: str) -> bytes:
    return sha256(password.encode()).digest()
