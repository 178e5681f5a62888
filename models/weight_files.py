"""How segmentation weights lie in a folder: nnU-Net's own layout, every file pinned by its SHA-256.

Needs no torch, so that whoever only waits for work, checks sums or reads a supplied segmentation stays small.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

CONFIGURATION = "3d_fullres"
CHECKPOINT = Path("fold_0") / "checkpoint_final.pth"
SUMS_FILE = "SHA256SUMS"


def write_sums(root: Path) -> Path:
    """Pin every file of the package by SHA-256, in the format of `sha256sum`."""
    files = sorted(path for path in root.rglob("*") if path.suffix in {".json", ".pth"})
    lines = [f"{file_sha256(path)}  {path.relative_to(root).as_posix()}" for path in files]
    sums = root / SUMS_FILE
    sums.write_text("\n".join(lines) + "\n", encoding="ascii")
    return sums


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
