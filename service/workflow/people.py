"""Users, sessions and API keys: each use case one function, the change and its audit row in one transaction."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, exists, select
from sqlalchemy.orm import Session

from service.domain.access import AccessError, Principal, Role, name_key, user_name
from service.store.tables import AuditRow, KeyRow, SessionRow, UserRow
from service.workflow import passwords

KEY_PREFIX = "osteogate_"  # lets scanners for leaked secrets recognise one
MAX_LABEL_LENGTH = 60
_TOUCH = timedelta(minutes=1)  # how exactly "last seen" is kept: not every request writes


@dataclass(frozen=True, slots=True)
class By:
    """Who changes something, when, and from where: the same three in every audit row."""

    actor: str
    now: datetime
    peer_address: str | None = None


@dataclass(frozen=True, slots=True)
class SessionRules:
    """How long a session lives: without a person's doing, and at all."""

    idle: timedelta
    longest: timedelta


@dataclass(frozen=True, slots=True)
class UserLine:
    """One user, for people; the hash stays where it is."""

    name: str
    roles: tuple[Role, ...]
    disabled: bool
    created_at: datetime
    last_seen_at: datetime | None


@dataclass(frozen=True, slots=True)
class KeyLine:
    """One API key, for people; the key itself is known to nobody but its holder."""

    label: str
    roles: tuple[Role, ...]
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None
    used_at: datetime | None

    def state(self, now: datetime) -> str:
        """In one word: in force, expired or revoked."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "in force"


# --- users ---------------------------------------------------------------------------------------------------


def anyone(session: Session) -> bool:
    """True when there is a user, disabled or not: from then on nothing opens to nobody in particular."""
    return bool(session.scalar(select(exists().where(UserRow.id.is_not(None)))))


def add_user(session: Session, name: str, roles: frozenset[Role], password: str, by: By) -> str:
    """A new user; the name as it is kept.

    Raises:
        AccessError: the name is taken or cannot be one, or the password is no good.
    """
    kept = user_name(name)
    if _user(session, kept) is not None:
        raise AccessError(f"there is a user {kept!r} already")
    session.add(
        UserRow(
            name=kept,
            name_key=name_key(kept),
            password_hash=passwords.hashed(password, kept),
            roles=_told(roles),
            created_at=by.now,
            password_changed_at=by.now,
        )
    )
    _audit(session, by, "user.add", f"user:{kept}", roles=_told(roles))
    return kept


def set_password(session: Session, name: str, password: str, by: By, *, keep: str | None = None) -> None:
    """Another password; every session of the user ends, but the one with the token `keep`.

    Raises:
        AccessError: there is no such user, or the password is no good.
    """
    user = _known(session, name)
    user.password_hash = passwords.hashed(password, user.name)
    user.password_changed_at = by.now
    _end_sessions(session, user, keep)
    _audit(session, by, "user.password", f"user:{user.name}")


def set_roles(session: Session, name: str, roles: frozenset[Role], by: By) -> None:
    """Other roles, in force with the user's next request."""
    user = _known(session, name)
    before, user.roles = user.roles, _told(roles)
    _audit(session, by, "user.roles", f"user:{user.name}", before=before, after=user.roles)


def disable(session: Session, name: str, by: By) -> None:
    """Let the user in no more; every session ends now."""
    user = _known(session, name)
    user.disabled = True
    _end_sessions(session, user)
    _audit(session, by, "user.disable", f"user:{user.name}")


def enable(session: Session, name: str, by: By) -> None:
    """Let the user in again."""
    user = _known(session, name)
    user.disabled = False
    _audit(session, by, "user.enable", f"user:{user.name}")


def users(session: Session) -> tuple[UserLine, ...]:
    """Every user, by name."""
    return tuple(
        UserLine(
            row.name,
            _roles(row.roles),
            row.disabled,
            row.created_at,
            max((one.seen_at for one in row.sessions), default=None),
        )
        for row in session.scalars(select(UserRow).order_by(UserRow.name_key))
    )


# --- sessions --------------------------------------------------------------------------------------------------


def password_hash(session: Session, name: str) -> str | None:
    """What the password of an enabled user is checked against; None for everybody else."""
    user = _user(session, name)
    return None if user is None or user.disabled else user.password_hash


def start_session(session: Session, name: str, checked_hash: str, rules: SessionRules, by: By) -> str | None:
    """The token of a new session, or None where `disable` or another password came in between.

    The password was checked against `checked_hash` before: hashing must not hold the database.
    """
    user = _user(session, name)
    if user is None or user.disabled or user.password_hash != checked_hash:
        return None
    session.execute(delete(SessionRow).where(SessionRow.created_at < by.now - rules.longest))
    session.execute(delete(SessionRow).where(SessionRow.seen_at < by.now - rules.idle))
    token = secrets.token_urlsafe(32)
    session.add(SessionRow(user_id=user.id, token_sha256=_sha256(token), created_at=by.now, seen_at=by.now))
    _audit(session, By(user.name, by.now, by.peer_address), "login", "web")
    return token


def known_name(session: Session, name: str) -> str | None:
    """The user's name as it is kept; None for a name that nobody has (it may be a mistyped password)."""
    user = _user(session, name)
    return None if user is None else user.name


def by_session(session: Session, token: str, rules: SessionRules, now: datetime) -> tuple[Principal, bool] | None:
    """Whose session this is, and whether it is time to write down that they were seen; None: nobody's any more."""
    row = _session(session, token)
    if row is None or row.user.disabled:
        return None
    if now - row.seen_at >= rules.idle or now - row.created_at >= rules.longest:
        return None
    return Principal(row.user.name, frozenset(_roles(row.user.roles)), is_user=True), now - row.seen_at >= _TOUCH


def seen(session: Session, token: str, now: datetime) -> None:
    """Write down that the person behind this session did something."""
    row = _session(session, token)
    if row is not None:
        row.seen_at = now


def end_session(session: Session, token: str, by: By) -> None:
    """Log out."""
    row = _session(session, token)
    if row is not None:
        session.delete(row)
        _audit(session, by, "logout", "web")


# --- API keys ----------------------------------------------------------------------------------------------------


def create_key(session: Session, label: str, roles: frozenset[Role], by: By, *, expires_at: datetime | None) -> str:
    """A new API key, told this once; only its hash is kept.

    Raises:
        AccessError: the label is taken, or cannot be one.
    """
    label = label.strip()
    if not 0 < len(label) <= MAX_LABEL_LENGTH or not label.isprintable():
        raise AccessError(f"a key's name has 1 to {MAX_LABEL_LENGTH} printable characters")
    if session.scalar(select(KeyRow.id).where(KeyRow.label == label)) is not None:
        raise AccessError(f"there is a key {label!r} already; a revoked one keeps its name, the audit knows it by that")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    session.add(
        KeyRow(
            label=label,
            key_sha256=_sha256(key),
            roles=_told(roles),
            created_at=by.now,
            created_by=by.actor,
            expires_at=expires_at,
        )
    )
    until = None if expires_at is None else expires_at.isoformat()
    _audit(session, by, "key.create", f"key:{label}", roles=_told(roles), expires_at=until)
    return key


def revoke_key(session: Session, label: str, by: By) -> None:
    """Let the key open nothing from now on.

    Raises:
        AccessError: there is no such key, or it is revoked already.
    """
    row = session.scalars(select(KeyRow).where(KeyRow.label == label)).one_or_none()
    if row is None:
        raise AccessError(f"there is no key {label!r}")
    if row.revoked_at is not None:
        raise AccessError(f"the key {label!r} is revoked already")
    row.revoked_at = by.now
    _audit(session, by, "key.revoke", f"key:{label}")


def keys(session: Session) -> tuple[KeyLine, ...]:
    """Every key, the newest first."""
    return tuple(
        KeyLine(
            row.label,
            _roles(row.roles),
            row.created_at,
            row.created_by,
            row.expires_at,
            row.revoked_at,
            row.used_at,
        )
        for row in session.scalars(select(KeyRow).order_by(KeyRow.id.desc()))
    )


def by_key(session: Session, key: str, now: datetime) -> tuple[Principal, bool] | None:
    """Whose key this is, and whether it is time to write down that it was used; None: nobody's (any more)."""
    row = _key(session, key)
    if row is None or row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now):
        return None
    stale = row.used_at is None or now - row.used_at >= _TOUCH
    return Principal(f"key:{row.label}", frozenset(_roles(row.roles)), is_key=True), stale


def used(session: Session, key: str, now: datetime) -> None:
    """Write down that the key was used."""
    row = _key(session, key)
    if row is not None:
        row.used_at = now


# --- what they share -----------------------------------------------------------------------------------------------


def _user(session: Session, name: str) -> UserRow | None:
    return session.scalars(select(UserRow).where(UserRow.name_key == name_key(name))).one_or_none()


def _known(session: Session, name: str) -> UserRow:
    user = _user(session, name)
    if user is None:
        raise AccessError(f"there is no user {name!r}")
    return user


def _session(session: Session, token: str) -> SessionRow | None:
    return session.scalars(select(SessionRow).where(SessionRow.token_sha256 == _sha256(token))).one_or_none()


def _key(session: Session, key: str) -> KeyRow | None:
    return session.scalars(select(KeyRow).where(KeyRow.key_sha256 == _sha256(key))).one_or_none()


def _end_sessions(session: Session, user: UserRow, keep: str | None = None) -> None:
    kept = "" if keep is None else _sha256(keep)
    session.execute(delete(SessionRow).where(SessionRow.user_id == user.id, SessionRow.token_sha256 != kept))


def _told(roles: Iterable[Role]) -> list[Any]:
    return sorted(role.value for role in roles)


def _roles(stored: list[Any]) -> tuple[Role, ...]:
    """The roles of a row; one that a newer version knew is left out, not guessed at."""
    return tuple(Role(name) for name in stored if name in set(Role))


def _sha256(secret: str) -> str:
    """Of 256 random bits: there is nothing to guess, and looking it up by its hash compares no secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _audit(session: Session, by: By, action: str, subject: str, **detail: Any) -> None:
    session.add(
        AuditRow(at=by.now, actor=by.actor, action=action, subject=subject, detail=detail, peer_address=by.peer_address)
    )
