"""A package proves itself unaltered, and says which file is not."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.package import (
    Interval,
    Manifest,
    Member,
    ModelPackage,
    PackageError,
    write_members,
    write_package,
)


def manifest() -> Manifest:
    return Manifest(
        name="test",
        version="1.0",
        architecture="resnet50",
        targets=("bmd_g_cm2", "tbs"),
        input={"rows": 64},
        training={"provenance": "digital"},
        synthetic_only=True,
        metrics={},
        intervals=(Interval(1, 0.1, 0.2), Interval(4, 0.05, 0.1)),
        interval_level=0.9,
        created="2026-01-01T00:00:00+00:00",
    )


@pytest.fixture
def package(tmp_path: Path) -> ModelPackage:
    tensors = {
        "head.weight": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4),
        "bn.running_var": np.array([1e6, 2.0], dtype=np.float32),
        "bn.num_batches_tracked": np.array(3),
    }
    return write_package(tmp_path / "test-1.0", manifest(), tensors, "# card\n", {"training.json": "{}"})


def test_what_is_written_is_read(package: ModelPackage) -> None:
    again = ModelPackage.load(package.path)
    assert again == package
    assert again.name == "test-1.0"
    assert again.manifest.synthetic_only
    weights = again.weights()
    assert set(weights) == {"head.weight", "bn.running_var"}
    assert np.allclose(weights["head.weight"].ravel(), np.linspace(-1, 1, 8), atol=1e-3)
    assert weights["bn.running_var"][0] == 1e6  # beyond fp16
    assert again.model_card() == "# card\n"


@pytest.mark.parametrize("name", ["weights.safetensors", "model_card.md", "training.json"])
def test_an_altered_file_is_refused_by_name(package: ModelPackage, name: str) -> None:
    content = bytearray((package.path / name).read_bytes())
    content[-1] ^= 1
    (package.path / name).write_bytes(content)
    with pytest.raises(PackageError, match=name):
        ModelPackage.load(package.path)


@pytest.mark.parametrize("name", ["weights.safetensors", "model_card.md", "manifest.json"])
def test_a_missing_file_is_refused_by_name(package: ModelPackage, name: str) -> None:
    (package.path / name).unlink()
    with pytest.raises(PackageError, match=name):
        ModelPackage.load(package.path)


def test_half_a_weight_file_is_refused(package: ModelPackage) -> None:
    weights = package.path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(PackageError, match=r"weights\.safetensors"):
        ModelPackage.load(package.path)


def test_a_broken_manifest_is_refused(package: ModelPackage) -> None:
    (package.path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(PackageError, match=r"manifest\.json"):
        ModelPackage.load(package.path)


def test_a_manifest_cannot_point_outside(package: ModelPackage) -> None:
    path = package.path / "manifest.json"
    values = json.loads(path.read_text())
    values["files"]["../secret"] = "0" * 64
    path.write_text(json.dumps(values))
    with pytest.raises(PackageError, match="outside"):
        ModelPackage.load(package.path)


def test_a_manifest_without_the_weights_hash_is_refused(package: ModelPackage) -> None:
    path = package.path / "manifest.json"
    values = json.loads(path.read_text())
    del values["files"]["weights.safetensors"]
    path.write_text(json.dumps(values))
    with pytest.raises(PackageError, match="no hash"):
        ModelPackage.load(package.path)


def test_another_manifest_is_another_package(package: ModelPackage) -> None:
    path = package.path / "manifest.json"
    path.write_text(path.read_text().replace('"1.0"', '"1.1"'))
    assert ModelPackage.load(package.path).sha256 != package.sha256


def test_a_package_is_never_overwritten(package: ModelPackage) -> None:
    with pytest.raises(PackageError, match="never overwritten"):
        write_package(package.path, manifest(), {}, "")
    assert ModelPackage.load(package.path) == package


def test_intervals_by_number_of_levels(package: ModelPackage) -> None:
    assert package.manifest.interval(4).bmd_g_cm2 == 0.05
    assert package.manifest.interval(2).bmd_g_cm2 == 0.1  # not calibrated: the widest


@pytest.mark.parametrize("width", ["NaN", "Infinity", "-0.05"])
def test_an_interval_that_is_none_is_refused(package: ModelPackage, width: str) -> None:
    path = package.path / "manifest.json"
    path.write_text(path.read_text().replace('"bmd_g_cm2": 0.05', f'"bmd_g_cm2": {width}'))
    with pytest.raises(PackageError, match="half-width"):
        ModelPackage.load(package.path)


def test_the_service_can_read_packages_without_torch_or_scipy() -> None:
    code = "import sys, models.package; print([m for m in ('torch', 'scipy', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_weights_are_stored_in_half_precision_and_statistics_whole(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(0, 0.05, 1000).astype(np.float32)
    statistics = np.random.default_rng(1).normal(0, 300, 1000).astype(np.float32)
    tensors = {"conv.weight": weights, "bn.running_mean": statistics, "target_mean": statistics}
    again = write_package(tmp_path / "half", manifest(), tensors, "# card\n").weights()
    assert np.array_equal(again["conv.weight"], weights.astype(np.float16).astype(np.float32))
    assert np.abs(again["conv.weight"] - weights).max() < 1e-4
    assert np.array_equal(again["bn.running_mean"], statistics)
    assert np.array_equal(again["target_mean"], statistics)
    with pytest.raises(PackageError, match=r"conv\.weight"):
        write_package(tmp_path / "over", manifest(), {"conv.weight": np.array([1e6])}, "# card\n")


def test_the_first_format_is_still_read(package: ModelPackage) -> None:
    path = package.path / "manifest.json"
    values = json.loads(path.read_text()) | {"format": 1, "training": {"steps_done": 3840, "best_epoch": 46}}
    path.write_text(json.dumps({name: values[name] for name in set(values) - {"members", "test_time", "finished"}}))
    old = ModelPackage.load(package.path)
    assert old.manifest.format == 1
    assert old.manifest.members == (Member("weights.safetensors", 0, ("bmd_g_cm2", "tbs"), 3840, 46),)
    assert old.manifest.finished
    assert old.manifest.test_time == "none"
    assert old.weights().keys() == package.weights().keys()


def test_another_format_is_refused(package: ModelPackage) -> None:
    path = package.path / "manifest.json"
    path.write_text(path.read_text().replace('"format": 5', '"format": 6'))
    with pytest.raises(PackageError, match="format 6, this program reads 1, 2, 3, 4, 5"):
        ModelPackage.load(package.path)


def two_members() -> tuple[Manifest, dict[str, dict[str, np.ndarray]]]:
    members = (Member("a.safetensors", 0, ("bmd_g_cm2",), 7, 1), Member("b.safetensors", 0, ("tbs",), 9, 2))
    tensors = {member.file: {"head.weight": np.full((1, 4), member.steps)} for member in members}
    return dataclasses.replace(manifest(), members=members), tensors


def test_each_member_has_a_file_of_its_own(tmp_path: Path) -> None:
    several, tensors = two_members()
    package = write_members(tmp_path / "several", several, tensors, "# card\n", {"curves.png": b"\x89PNG"})
    assert package.manifest.members == several.members
    assert package.weights("b.safetensors")["head.weight"][0, 0] == 9
    (package.path / "b.safetensors").unlink()
    with pytest.raises(PackageError, match=r"b\.safetensors"):
        ModelPackage.load(package.path)


def test_members_that_predict_too_little_are_refused(tmp_path: Path) -> None:
    several, tensors = two_members()
    lacking = dataclasses.replace(several, members=several.members[:1])
    with pytest.raises(PackageError, match="do not predict"):
        write_members(tmp_path / "lacking", lacking, tensors, "# card\n")


def test_only_an_unfinished_package_gives_way(tmp_path: Path) -> None:
    several, tensors = two_members()
    unfinished = dataclasses.replace(several, finished=False)
    write_members(tmp_path / "p", unfinished, tensors, "# first\n")
    write_members(tmp_path / "p", several, tensors, "# second\n")
    assert ModelPackage.load(tmp_path / "p").model_card() == "# second\n"
    with pytest.raises(PackageError, match="never overwritten"):
        write_members(tmp_path / "p", several, tensors, "# third\n")
