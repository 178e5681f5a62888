"""The house stays as README and ARCHITECTURE describe it."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import tomllib

import pytest

import service
from tests.conftest import ROOT

HEAVY = ("torch", "torchvision", "cv2", "totalsegmentator", "nnunetv2", "worker")


def _service_modules() -> list[str]:
    return sorted(module.name for module in pkgutil.walk_packages(service.__path__, "service."))


def test_importing_all_of_service_brings_in_no_torch() -> None:
    modules = _service_modules()
    assert "service.api.app" in modules
    assert "service.dicom.listener" in modules
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_who_only_waits_for_training_runs_or_checks_weights_stays_small() -> None:
    code = (
        "import sys, worker.app, worker.trainer, worker.segmentation.weights\n"
        "print([name for name in ('torch', 'openvino', 'sklearn', 'scipy.stats') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_check_would_notice_torch() -> None:
    code = f"import sys, torch\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "torch" in done.stdout


def test_the_base_install_has_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [line for line in project["dependencies"] if line.lower().startswith(("torch", "opencv", "totalseg"))]
    worker = " ".join(project["optional-dependencies"]["worker"]).lower()
    for package in ("torch", "torchvision", "totalsegmentator", "opencv-python-headless"):
        assert package in worker


@pytest.mark.parametrize(
    "lock", ["requirements.lock", "requirements-service.lock", "requirements-worker.lock", "requirements-uv.lock"]
)
def test_locks_pin_hashes_and_name_no_registry(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "://" not in text
    pins = [line for line in text.splitlines() if "==" in line and not line.startswith(" ")]
    assert pins
    assert text.count("--hash=sha256:") >= len(pins)


def test_the_service_lock_has_no_torch() -> None:
    text = (ROOT / "requirements-service.lock").read_text()
    assert "torch" not in text
    assert "torch==" in (ROOT / "requirements.lock").read_text()


def test_the_arrows_are_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
