"""The errors of the domain, in one tree.

    OsteogateError
    └── ConfigurationError        what a site gave us cannot be used; nothing starts with it
        ├── PolicyError           a policy file: unknown key, wrong type, impossible value (`key` names it)
        └── ReferenceDataError    a file of young-adult references is absent or damaged

Refusing a CT is not an error: it is a `Verdict` or a `Decision` with reasons. Other rooms hang their own
errors (broken input, broken state, absent peers) below `OsteogateError`.
"""

from __future__ import annotations


class OsteogateError(Exception):
    """The root: everything that Osteogate raises on purpose."""


class ConfigurationError(OsteogateError):
    """What a site configured cannot be used."""


class PolicyError(ConfigurationError):
    """A policy cannot be used; `key` is the dotted name of the offending entry."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(f"policy: {key}: {text}" if key else f"policy: {text}")
        self.key = key


class ReferenceDataError(ConfigurationError):
    """The table of young-adult references cannot be used."""
