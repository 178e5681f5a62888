"""The name and version that every result carries."""

from __future__ import annotations

from importlib.metadata import version


def software_version() -> str:
    """For instance "osteogate 0.1.0"."""
    return f"osteogate {version('osteogate')}"
