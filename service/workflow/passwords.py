"""Passwords: hashed by argon2id (RFC 9106), checked in constant time, never more than a few at once."""

from __future__ import annotations

import threading
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from service.domain.access import AccessError, name_key

MIN_CHARACTERS = 12
MAX_CHARACTERS = 1024  # no one types more, and hashing a megabyte costs us, not the sender

# RFC 9106, second recommended option: 64 MiB, 3 passes, 4 lanes. It is what argon2-cffi takes by default.
_HASHER = PasswordHasher()
_AT_ONCE = threading.BoundedSemaphore(2)  # 64 MiB each: a flood of logins waits instead of eating the memory


def hashed(password: str, name: str) -> str:
    """The hash that is kept of a new password.

    Raises:
        AccessError: the password is too short, too long, or the user's own name.
    """
    if not MIN_CHARACTERS <= len(password) <= MAX_CHARACTERS:
        raise AccessError(f"a password has {MIN_CHARACTERS} to {MAX_CHARACTERS} characters")
    if name_key(password) == name_key(name):
        raise AccessError("the name is no password")
    with _AT_ONCE:
        return _HASHER.hash(password)


def fits(password: str, password_hash: str | None) -> bool:
    """True when this is the password behind the hash; without a hash it takes as long and is False."""
    if len(password) > MAX_CHARACTERS:
        return False
    with _AT_ONCE:
        try:
            right = _HASHER.verify(password_hash or _nobodys(), password)
        except (VerificationError, InvalidHashError):
            return False
    return right and password_hash is not None


@cache
def _nobodys() -> str:
    """What an unknown name is checked against, so that the time tells nobody which names exist."""
    return _HASHER.hash("the password of nobody")
