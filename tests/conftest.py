"""What every room's tests share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from tests.installations import Installation

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side, a core for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """How many tests `make test` runs side by side: each has a core and 3 GiB, as one that holds networks needs."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:  # xdist's own: somebody knows better
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(4, cores, memory // (3 * 2**30)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side, files whose tests may take long come first: at the end none of them is waited for alone."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    usual, longest = float(config.getini("timeout")), dict[Path, float]()
    for item in items:
        marker = item.get_closest_marker("timeout")
        longest[item.path] = max(longest.get(item.path, usual), float(marker.args[0]) if marker else usual)
    items.sort(key=lambda item: -longest[item.path])


def pytest_sessionfinish() -> None:
    """Leave no database behind."""
    if "tests.service.workflow.workbench" in sys.modules:
        from tests.service.workflow import workbench

        workbench.drop_databases()


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
    return of_dcmtk("storescu") or absent("dcmtk's storescu")


def of_dcmtk(program: str) -> str | None:
    """Where dcmtk's program is, or None. In a virtual environment that was activated pynetdicom's scripts of the same
    names come first; they are no peer of ours."""
    own = Path(sys.executable).parent
    return shutil.which(program, path=os.pathsep.join(one for one in os.get_exec_path() if Path(one) != own))


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` fills, once in a run: side by side by whoever comes first, and all read it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        make(made := factory.mktemp(name))
        return made
    import fcntl

    made = factory.getbasetemp().parent / name  # a worker's own folder lies in that of the run
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            make(making := made.with_suffix(".part"))
            making.rename(made)
    return made


@pytest.fixture(scope="session")
def digital_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digital patient as `osteogate phantom study` writes it: *.dcm, labels.nii.gz, truth.json."""
    from models.phantom.study import make_study

    settings = {"sex": "F", "age": "68", "bmd_g_cm2": "0.95"}
    return made_once(tmp_path_factory, "digital", lambda folder: make_study(4711, folder, settings))


@pytest.fixture(params=["embedded", "postgresql-redis"])
def installation(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Installation]:
    """A whole installation of either size, not yet started; see tests/installations.py."""
    from tests.installations import installed

    with installed(request.param, tmp_path) as found:
        yield found
