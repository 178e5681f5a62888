"""The whole pipeline on unseen digital patients: the small version of `osteogate acceptance`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from models.resnet50 import load_network
from service.settings import Settings
from worker import acceptance
from worker.acceptance import FIRST_SEED, LevelOutcome, PatientOutcome, run, summary
from worker.compiled import TorchEngine
from worker.pipeline import Pipeline
from worker.segmentation import Segmentation, Segmenter
from worker.segmentation.base import LabelArray
from worker.segmentation.cascade import Cascade
from worker.start import make_pipeline
from worker.volume import Volume

PATIENTS, AGAIN = 5, 3  # the first three are seen by more than one test


@dataclass
class Remembering:
    """The shipped segmenter, asked once about each CT."""

    segmenter: Segmenter
    answers: dict[bytes, Segmentation] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.segmenter.name

    @property
    def sha256(self) -> str:
        return self.segmenter.sha256

    def segment(self, volume: Volume) -> Segmentation:
        ct = hashlib.sha256(volume.hu.tobytes() + volume.affine.tobytes()).digest()
        if ct not in self.answers:
            self.answers[ct] = self.segmenter.segment(volume)
        return self.answers[ct]


@pytest.fixture(scope="module", autouse=True)
def _rendered_once() -> Iterator[None]:
    known: dict[int, tuple[Volume, LabelArray]] = {}
    make = acceptance.digital_patient

    def made(seed: int) -> tuple[Volume, LabelArray]:
        found = known.get(seed) or make(seed)
        if seed < FIRST_SEED + AGAIN:
            known[seed] = found
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acceptance, "digital_patient", made)
        yield


@pytest.fixture(scope="module")
def remembering(tmp_path_factory: pytest.TempPathFactory) -> Remembering:
    return Remembering(make_pipeline(Settings(data_dir=tmp_path_factory.mktemp("shipped"))).segmenter)


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return make_pipeline(Settings(data_dir=tmp_path))


def test_the_shipped_networks_pass(pipeline: Pipeline, remembering: Remembering) -> None:
    report = run(replace(pipeline, segmenter=remembering), range(FIRST_SEED, FIRST_SEED + PATIENTS))
    assert report["mean_dice"] >= 0.85
    assert report["levels_right"] == 1.0
    assert report["wrong_and_certain"] == 0
    assert report["bmd_r"] >= 0.7
    assert report["bmd_r"] > report["hu_bmd_r"]
    assert report["bmd_r_by_true_masks"] == pytest.approx(report["bmd_r"], abs=0.1)
    assert report["passed"]


def test_randomised_segmentation_fails(pipeline: Pipeline) -> None:
    assert isinstance(pipeline.segmenter, Cascade)
    coarse, fine = pipeline.segmenter.coarse, pipeline.segmenter.fine
    for network in (coarse, fine):
        _randomise(network.module.parameters())
    spoilt = replace(pipeline.segmenter, coarse=replace(coarse, compiled=None), fine=replace(fine, compiled=None))
    report = run(replace(pipeline, segmenter=spoilt), [FIRST_SEED])  # what was compiled keeps weights of its own
    assert not report["passed"]
    assert report["mean_dice"] < 0.5


def test_a_randomised_predictor_fails(pipeline: Pipeline, remembering: Remembering) -> None:
    cpu = torch.device("cpu")
    network = load_network(pipeline.predictor.package, cpu)
    _randomise(network.parameters())
    pipeline.predictor._engine = TorchEngine(network, cpu, "fp32")
    pipeline.predictor.readout = None  # its measures alone follow bone well enough to pass with three patients
    report = run(replace(pipeline, segmenter=remembering), range(FIRST_SEED, FIRST_SEED + AGAIN))
    assert not report["passed"]
    assert report["mean_dice"] >= 0.85  # only the predictor was spoilt


def test_failing_figures_do_not_pass() -> None:
    def patient(bmd: float, hu: float, true: float, *, right: bool = True) -> PatientOutcome:
        level = LevelOutcome("L1", 0.9, true, 1.3, bmd, 1.3, hu)
        return PatientOutcome(1, right, True, (level,))

    good = [patient(0.8, 100, 0.8), patient(1.0, 90, 1.0), patient(1.2, 150, 1.2), patient(0.9, 160, 0.9)]
    assert summary(good)["passed"]
    assert not summary([patient(*figures, right=False) for figures in ((0.8, 1, 0.8), (1.0, 2, 1.1))])["passed"]
    hu_is_better = [patient(0.8, 80, 0.8), patient(1.1, 100, 1.0), patient(1.1, 120, 1.2), patient(0.9, 90, 0.9)]
    assert not summary(hu_is_better)["passed"]


def test_a_biased_predictor_does_not_pass() -> None:
    def patient(bmd: float, true: float) -> PatientOutcome:
        return PatientOutcome(1, True, True, (LevelOutcome("L1", 0.9, true, 1.3, bmd, 1.3, 100 * (2 - true)),))

    true = (0.8, 1.0, 1.2, 0.9)
    assert summary([patient(one + 0.02, one) for one in true])["passed"]
    assert not summary([patient(one + 0.1, one) for one in true])["passed"]


def _randomise(parameters: Iterator[torch.nn.Parameter]) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0.0, 0.05)
