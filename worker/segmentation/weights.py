"""A weights folder in TotalSegmentator's layout: where its networks lie, and that no byte of it was altered.

TotalSegmentator checks only that a folder exists. Here every file is pinned by SHA-256 in `SHA256SUMS` beside
the data set folders: ours in the repository, foreign ones written at their import by a named person (RULES
10, fault 24).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.spine_unet import CHECKPOINT, CONFIGURATION, SUMS_FILE, file_sha256
from service.domain.errors import OsteogateError

BUILT_IN = Path(__file__).resolve().parents[2] / "models" / "packages" / "segmentation"

# TotalSegmentator's data set numbers: `total` (v2) and, where imported, `total_v3`
COARSE_DATASETS = ("Dataset298_", "Dataset837_")
FINE_DATASETS = ("Dataset292_", "Dataset832_")


class WeightsError(OsteogateError):
    """The weights cannot be used; the text names the file."""


@dataclass(frozen=True)
class WeightsFolder:
    """Two verified networks, and one hash that stands for every byte of them."""

    coarse: Path
    fine: Path
    sha256: str

    @property
    def name(self) -> str:
        """How results name these weights."""
        return f"nnU-Net {self.coarse.parent.name.split('_')[0]} + {self.fine.parent.name.split('_')[0]}"


def verify(root: Path) -> WeightsFolder:
    """Find both networks below `root` and check every file of theirs; WeightsError names what is missing or
    altered.
    """
    sums = _read_sums(root)
    coarse, fine = _network_folder(root, COARSE_DATASETS), _network_folder(root, FINE_DATASETS)
    for folder in (coarse, fine):
        for name in ("plans.json", "dataset.json", CHECKPOINT.as_posix()):
            relative = (folder / name).relative_to(root).as_posix()
            if relative not in sums:
                raise WeightsError(f"{root / relative} is not pinned in {SUMS_FILE}: import the weights again.")
    for relative, pinned in sums.items():
        path = root / relative
        if not path.is_file():
            raise WeightsError(f"{path} is missing: the weights are incomplete.")
        if file_sha256(path) != pinned:
            raise WeightsError(f"{path} is altered: its SHA-256 is not the pinned one.")
    lines = "\n".join(f"{pinned}  {relative}" for relative, pinned in sorted(sums.items()))
    return WeightsFolder(coarse, fine, hashlib.sha256(lines.encode()).hexdigest())


def _read_sums(root: Path) -> Mapping[str, str]:
    path = root / SUMS_FILE
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is missing or unreadable: unpinned weights are not used.") from error
    sums: dict[str, str] = {}
    for line in lines:
        pinned, separator, relative = line.partition("  ")
        if not separator or len(pinned) != 64 or ".." in Path(relative).parts or Path(relative).is_absolute():
            raise WeightsError(f"{path} is damaged: {line[:80]!r}.")
        sums[relative] = pinned
    return sums


def _network_folder(root: Path, datasets: tuple[str, ...]) -> Path:
    for dataset in datasets:
        found = sorted(root.glob(f"{dataset}*/*__nnUNetPlans__{CONFIGURATION}"))
        if len(found) == 1:
            return found[0]
        if found:
            raise WeightsError(f"{found[1]}: more than one trainer's weights for {dataset.rstrip('_')}.")
    raise WeightsError(f"{root / datasets[0]}*: no such network in the weights folder.")
