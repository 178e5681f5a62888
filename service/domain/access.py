"""Who may do what: roles, the rights that each grants, and a name with its roles.

A table of values, so that a person can read in one place what a role opens. Nothing is inherited: a person who
looks after both the referrals and the archive has both roles.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from service.domain.errors import OsteogateError

MAX_NAME_LENGTH = 64  # of an actor in the audit
NOBODY = "nobody"  # in the audit: somebody who could not say who they are
RESERVED_NAMES = frozenset({"osteogate", "local", NOBODY})  # what the audit calls our own doing, and that of no user


class Role(StrEnum):
    """What a user or an API key is for."""

    VIEWER = "viewer"
    CLINICIAN = "clinician"
    PACS_ADMIN = "pacs-admin"
    ML_ADMIN = "ml-admin"


class Right(StrEnum):
    """One thing that a role may open."""

    READ = "read"  # worklist, studies, results, intake, outbox, reports
    REFER = "refer"  # steps of the referral loop, other names for the levels
    OPERATE = "operate"  # measure again, send again, retry a destination
    DXA = "dxa"  # bring DXA results in
    MODELS = "models"  # promote models, roll back, take packages in and out
    AUDIT = "audit"  # read who did what
    WATCH = "watch"  # how the model does, and whether a scanner has changed
    TRAIN = "train"  # start, watch, cancel and resume training runs


GRANTS: Mapping[Role, frozenset[Right]] = {
    Role.VIEWER: frozenset({Right.READ}),
    Role.CLINICIAN: frozenset({Right.READ, Right.REFER, Right.DXA, Right.WATCH}),
    Role.PACS_ADMIN: frozenset({Right.READ, Right.OPERATE, Right.AUDIT}),
    Role.ML_ADMIN: frozenset({Right.READ, Right.DXA, Right.TRAIN, Right.MODELS, Right.AUDIT, Right.WATCH}),
}


class AccessError(OsteogateError):
    """A user, a role or a key that cannot be; the message is for people."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: the name that stands in the audit, and the roles."""

    name: str
    roles: frozenset[Role]
    is_user: bool = False  # a person who logged in, with a password to change and a session to end
    is_key: bool = False  # a program

    def may(self, right: Right | str) -> bool:
        """True when one of the roles grants the right."""
        return any(right in GRANTS[role] for role in self.roles)


EVERY_ROLE = frozenset(Role)
LOCAL = Principal("local", EVERY_ROLE)  # whoever sits at this machine, where there are no users yet


def roles_named(names: Iterable[str]) -> frozenset[Role]:
    """The roles of these names, at least one.

    Raises:
        AccessError: an unknown one, or none.
    """
    told = list(names)
    unknown = sorted(set(told) - set(Role))
    if unknown or not told:
        known = ", ".join(Role)
        raise AccessError(f"roles are {known}; not {', '.join(unknown) or 'none at all'}")
    return frozenset(Role(name) for name in told)


def user_name(told: str) -> str:
    """The name as it will stand in the audit.

    A colon is left to those who are no users (`key:`, `shell:`), so that no user can pass for one of them.

    Raises:
        AccessError: what a name may not be.
    """
    name = unicodedata.normalize("NFKC", told).strip()
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable() or ":" in name:
        raise AccessError(f"a name has 1 to {MAX_NAME_LENGTH} printable characters and no colon")
    if name.casefold() in RESERVED_NAMES:
        raise AccessError(f"{name!r} stands in the audit for what no user did")
    return name


def name_key(name: str) -> str:
    """What makes two names the same: case and width do not tell people apart."""
    return unicodedata.normalize("NFKC", name).strip().casefold()
