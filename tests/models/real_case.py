"""The real CT of ../shared/real-data (never part of the product); absent -> the test is skipped, visibly."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

_ROOT = Path(__file__).resolve().parents[2]
_CASE = "totalsegmentator-example-ct"
_REPORT = "spine_report/example_ct_report"


@dataclass(frozen=True)
class RealCase:
    """Arrays [k, j, i]; affine (k, j, i) -> LPS."""

    hu: npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint8]
    bodies: npt.NDArray[np.bool_]
    affine: npt.NDArray[np.float64]


def real_case() -> RealCase:
    """The case, or a visible skip."""
    folder = Path(os.environ.get("OSTEOGATE_REAL_DATA", _ROOT.parent / "shared" / "real-data")) / _CASE
    if not folder.is_dir():
        pytest.skip(f"the real case is not at {folder}")
    return _load(folder)


@cache
def _load(folder: Path) -> RealCase:
    image = nib.load(folder / "example_ct.nii.gz")  # i, j, k in RAS
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    kji = np.eye(4)[:, [2, 1, 0, 3]]

    def array(name: str) -> npt.NDArray[np.float32]:
        return np.ascontiguousarray(np.asarray(nib.load(folder / name).dataobj).transpose(2, 1, 0))

    return RealCase(
        hu=array("example_ct.nii.gz").astype(np.float32),
        labels=array(f"{_REPORT}/totalseg.nii.gz").astype(np.uint8),
        bodies=array(f"{_REPORT}/totalseg_vertebrae_body.nii.gz") == 1,
        affine=to_lps @ image.affine @ kji,
    )
