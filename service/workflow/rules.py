"""The rules in force at one installation: its policy file and its own young-adult references, read once at start."""

from __future__ import annotations

from pathlib import Path

from service.domain.bone import References, load_references
from service.domain.errors import ReferenceDataError
from service.domain.policy import Policy, load_policy
from service.settings import Settings


def policy_in_force(settings: Settings) -> Policy:
    """The built-in policy with what the site changed and chose.

    Raises:
        PolicyError: the policy file cannot be used, or it chooses a reference that does not fit.
        ReferenceDataError: a file of references cannot be used.
        OSError: a file cannot be read.
    """
    text = "" if settings.policy_file is None else settings.policy_file.read_text(encoding="utf-8")
    return load_policy(text, references_at_hand(settings.references_dir))


def references_at_hand(folder: Path | None) -> References:
    """The references that ship with Osteogate and the site's own: every `*.toml` of its folder.

    Raises:
        ReferenceDataError: the folder holds no such file, or one that cannot be used.
    """
    if folder is None:
        return load_references()
    files = sorted(folder.glob("*.toml"))
    if not files:
        raise ReferenceDataError(f"references: OSTEOGATE_REFERENCES_DIR ({folder}) is no folder with a .toml file")
    return load_references({file.name: file.read_text(encoding="utf-8") for file in files})
