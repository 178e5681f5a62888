"""The worker takes each study with the model that was in force when it was claimed, without a restart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sqlalchemy import func, select

from models.inputs import InputConfig
from models.package import Interval, Manifest, ModelPackage, PackageError, write_package
from models.resnet50 import BonePredictor, NetworkConfig
from service.domain.policy import DEFAULT_POLICY
from service.domain.result import LEVELS, Measurements
from service.store.engine import Store
from service.store.tables import JobRow, ResultRow, ShadowRow
from service.workflow import models
from service.workflow.model import REFERENCE
from service.workflow.models import ModelLine
from service.workflow.packages import Library
from tests.service.workflow import toy_models, workbench
from worker import start
from worker.jobs import JobRunner, Outcome, ScreenRequest
from worker.pipeline import Found, Pipeline, Stopwatch
from worker.predict import Predictor
from worker.start import ModelSwitch, package_path

INPUT = InputConfig(rows=32, columns=32, posterior_shift_px=0, slabs=3)


def constant(folder: Path, version: str, *, synthetic_only: bool = False) -> ModelPackage:
    """A real network (a small one) that answers 0.7 + 0.1 x version g/cm2 whatever it sees."""
    torch.manual_seed(0)
    network = BonePredictor(NetworkConfig("mobilenet_v3_small", channels=INPUT.channels))
    for parameter in network.head.parameters():
        torch.nn.init.zeros_(parameter)
    network.target_mean.copy_(torch.tensor([0.7 + 0.1 * float(version), 1.3]))
    manifest = Manifest(
        "site", version, "mobilenet_v3_small", ("bmd_g_cm2", "tbs"), INPUT.to_dict(), {"provenance": "site"},
        synthetic_only, {}, (Interval(1, 0.1, 0.1),), 0.9, "2026-11-01T00:00:00+00:00",
    )  # fmt: skip
    return write_package(folder, manifest, network.tensors(), f"# site {version}\n")


@dataclass(frozen=True)
class Predicts(Pipeline):
    """The pipeline without images: what the resident network says of four grey vertebrae."""

    def screen(self, request: ScreenRequest) -> Measurements:  # type: ignore[override]
        slabs = SimpleNamespace(hu=np.full((9, 128, 128), 100, dtype=np.int16))
        cut = [Found(name, None, slabs, None) for name in LEVELS]  # type: ignore[arg-type]
        found = self.predictor.predict([one.slabs for one in cut], LEVELS)
        made = workbench.measured()
        levels = {
            name: replace(made.levels[name], bmd_g_cm2=round(one.bmd_g_cm2, 4))
            for name, one in zip(LEVELS, found, strict=True)
        }
        segmentation = SimpleNamespace(segmenter="none", sha256="0" * 64)
        return replace(
            made,
            levels=levels,
            provenance=self._provenance(segmentation),  # type: ignore[arg-type]
            model_synthetic_only=self.predictor.synthetic_only,
            model_gate_passed=self.gate_passed,
            shadow=self._shadowed(cut, "", Stopwatch()),
        )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with workbench.fresh_store("sqlite", tmp_path) as opened:
        yield opened


@dataclass
class Site:
    """A worker beside two candidates."""

    store: Store
    folder: Path
    library: Library
    lines: tuple[ModelLine, ModelLine]
    clock: workbench.Clock
    studies: int = 0

    def promote(self, number: int) -> None:
        toy_models.promoted(self.store, self.lines[number - 1].id, self.library)

    def screen_one(self, screen: Callable[[ScreenRequest], Measurements]) -> Outcome:
        self.studies += 1
        job = workbench.queued(self.store, self.clock, f"1.2.{self.studies}")
        settings = workbench.settings(self.folder)
        runner = JobRunner(self.store, settings, DEFAULT_POLICY, screen, worker="bench", clock=self.clock)
        return runner.run(job)

    def results(self) -> list[tuple[str, float, bool]]:
        with self.store.reading() as session:
            documents = session.scalars(select(ResultRow.document).order_by(ResultRow.id)).all()
        return [
            (one["provenance"]["model"], one["levels"]["L1"]["bmd_g_cm2"], one["provenance"]["model_gate_passed"])
            for one in documents
        ]


@pytest.fixture
def site(store: Store, tmp_path: Path) -> Site:
    library = toy_models.library(tmp_path)
    first, second = (tmp_path / name for name in ("one", "two"))
    one = toy_models.registered(store, library.keep_run(toy_models.run(first, "1", make=constant)))
    kept = library.keep_run(toy_models.run(second, "2", champion=one.sha256, make=constant))
    return Site(store, tmp_path, library, (one, toy_models.registered(store, kept)), workbench.Clock())


def test_the_next_study_takes_the_promoted_model_and_a_running_one_ends_with_its_own(site: Site) -> None:
    torch.set_num_threads(1)
    site.promote(1)
    folder = start.in_force_here(workbench.settings(site.folder)).folder
    predictor = Predictor(folder, "cpu")
    switch = ModelSwitch(workbench.settings(site.folder, device="cpu"), Predicts(None, predictor, "cpu"))  # type: ignore[arg-type]

    def promoted_meanwhile(request: ScreenRequest) -> Measurements:
        site.promote(2)
        return switch(request)

    assert site.screen_one(switch) is Outcome.RECORDED
    assert site.screen_one(promoted_meanwhile) is Outcome.RECORDED
    assert site.screen_one(switch) is Outcome.RECORDED
    with site.store.transaction() as session:
        models.rollback(session, "too many flags", toy_models.BY)
    assert site.screen_one(switch) is Outcome.RECORDED
    assert site.results() == [
        ("site-1", pytest.approx(0.8, abs=1e-3), True),
        ("site-1", pytest.approx(0.8, abs=1e-3), True),
        ("site-2", pytest.approx(0.9, abs=1e-3), True),
        ("site-1", pytest.approx(0.8, abs=1e-3), True),
    ]
    _an_altered_model_fails_its_jobs(site, switch)
    with site.store.transaction() as session:
        models.rollback(session, "too many flags", toy_models.BY)
    _a_shadow_is_kept_beside_and_holds_nothing_up(site, switch)


def _an_altered_model_fails_its_jobs(site: Site, switch: ModelSwitch) -> None:
    """Nothing falls back to the model that is still resident."""
    weights = site.library.root / site.lines[1].sha256 / "package" / "weights.safetensors"
    weights.chmod(0o644)
    site.promote(2)
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"x")
    assert site.screen_one(switch) is Outcome.FAILED
    with site.store.reading() as session:
        error = session.scalars(select(JobRow.last_error).order_by(JobRow.id.desc()).limit(1)).one()
    assert "weights.safetensors was altered" in (error or "")
    weights.write_bytes(content)
    assert site.screen_one(switch) is Outcome.RECORDED
    assert site.results()[-1][0] == "site-2"


def _a_shadow_is_kept_beside_and_holds_nothing_up(site: Site, switch: ModelSwitch) -> None:
    second = site.lines[1]
    with site.store.transaction() as session:
        models.begin_shadow(session, second.id, toy_models.BY, library=site.library)
    assert site.screen_one(switch) is Outcome.RECORDED
    with site.store.reading() as session:
        [said] = session.scalars(select(ShadowRow))
        result = session.scalars(select(ResultRow).order_by(ResultRow.id.desc()).limit(1)).one()
    assert (said.result_id, said.model_id, said.beside_sha256) == (result.id, second.id, site.lines[0].sha256)
    assert said.bmd_g_cm2 == pytest.approx(0.9, abs=1e-3)
    assert result.bmd_g_cm2 == pytest.approx(0.8, abs=1e-3)
    assert second.sha256 not in json.dumps(result.document)
    with site.store.transaction() as session:
        found = models.agreement(session, second.id)
        models.end_shadow(session, second.id, toy_models.BY)
    assert found.bmd_g_cm2 is not None
    assert (found.bmd_g_cm2.n, found.bmd_g_cm2.limits) == (1, None)
    assert found.bmd_g_cm2.mean == pytest.approx(0.1, abs=2e-3)
    assert site.screen_one(switch) is Outcome.RECORDED  # seen by the one in force alone
    with site.store.transaction() as session:
        models.begin_shadow(session, second.id, toy_models.BY, library=site.library)
    (site.library.root / second.sha256 / "package" / "weights.safetensors").write_bytes(b"")
    assert site.screen_one(switch) is Outcome.RECORDED  # a shadow that cannot be loaded is cast by nothing
    with site.store.reading() as session:
        assert session.scalar(select(func.count()).select_from(ShadowRow)) == 1


def test_another_package_in_its_folder_is_not_what_was_put_in_force(site: Site) -> None:
    site.promote(1)
    settings = workbench.settings(site.folder, device="cpu")
    in_force = start.in_force_here(settings)
    with pytest.raises(PackageError, match="not the package that was put in force"):
        start.load_predictor(replace(in_force, sha256="0" * 64), settings)


def test_a_model_can_be_looked_at_before_it_is_in_force(site: Site) -> None:
    site.promote(1)
    settings = workbench.settings(site.folder, device="cpu")
    looks = {told: start.make_pipeline(settings, model=told) for told in (None, "active", "site-1", "site-2")}
    sha256 = {told: pipeline.predictor.sha256 for told, pipeline in looks.items()}
    assert sha256 == {None: site.lines[0].sha256} | {
        told: site.lines[number].sha256 for told, number in (("active", 0), ("site-1", 0), ("site-2", 1))
    }
    assert {told: pipeline.gate_passed for told, pipeline in looks.items()} == {
        None: True, "active": True, "site-1": True, "site-2": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no model package 'site-3'"):
        start.make_pipeline(settings, model="site-3")


def test_packages_are_found_by_folder_name_hash_and_as_the_one_in_force(site: Site, tmp_path: Path) -> None:
    settings = workbench.settings(site.folder)
    one, two = (site.library.root / line.sha256 / "package" for line in site.lines)
    assert package_path("active", settings).name == REFERENCE == package_path("active").name
    site.promote(1)
    assert package_path("active", settings) == one
    assert package_path("site-2", settings) == two
    assert package_path(site.lines[1].sha256[:8], settings) == two
    assert package_path(str(tmp_path / "one" / "package"), settings) == tmp_path / "one" / "package"
    for told in ("site-3", "site", site.lines[1].sha256[:5]):
        with pytest.raises(ValueError, match="no model package"):
            package_path(told, settings)
    with pytest.raises(ValueError, match="no model package"):
        package_path("site-2")
    assert package_path("active", workbench.settings(tmp_path / "nothing")).name == REFERENCE
    assert not (tmp_path / "nothing").exists()
