"""What every room's tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from tests.installations import Installation

ROOT = Path(__file__).resolve().parent.parent


def absent(what: str) -> NoReturn:
    """Skip, visibly, on a user's machine; fail where every peer is required (CI)."""
    if os.environ.get("OSTEOGATE_REQUIRE_PEERS") == "1":
        pytest.fail(f"{what} is required here and absent")
    pytest.skip(f"{what} is absent")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real cases made by others; skipped, visibly, where it is absent."""
    folder = Path(os.environ.get("OSTEOGATE_REAL_DATA", ROOT.parent / "shared" / "real-data"))
    if not folder.is_dir():
        absent("the folder of real cases (OSTEOGATE_REAL_DATA)")
    return folder


@pytest.fixture(scope="session")
def storescu() -> str:
    """dcmtk's real C-STORE sender."""
    return shutil.which("storescu") or absent("dcmtk's storescu")


@pytest.fixture(scope="session")
def digital_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digital patient as `osteogate phantom study` writes it: *.dcm, labels.nii.gz, truth.json."""
    from models.phantom.study import make_study

    return make_study(4711, tmp_path_factory.mktemp("digital"), {"sex": "F", "age": "68", "bmd_g_cm2": "0.95"})


@pytest.fixture(params=["embedded", "postgresql-redis"])
def installation(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Installation]:
    """A whole installation of either size, not yet started; see tests/installations.py."""
    from tests.installations import installed

    with installed(request.param, tmp_path) as found:
        yield found
