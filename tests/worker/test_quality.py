"""The quality of an outline: its traits, the scale, whose calibration counts, and a calibration that can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from models.crop import locate
from worker.segmentation import Segmentation
from worker.segmentation.quality import (
    CALIBRATION,
    FEATURES,
    GOOD,
    Calibration,
    Curve,
    Traits,
    _denser,
    read_calibration,
    shipped,
    traits,
)
from worker.segmentation.quality import cases as room
from worker.segmentation.quality.__main__ import calibrate, lenient_limit, sure_limit, table
from worker.segmentation.quality.cases import Case, collect
from worker.segmentation.weights import BUILT_IN, verify
from worker.volume import Volume

SOUND = Traits(overlap=0.9, symmetry=0.8, size=0.05, edge=0.92)
OURS, THEIRS = "a" * 64, "b" * 64


def block(shift: int = 0) -> tuple[Volume, np.ndarray]:
    """A vertebra of boxes in dense bone, and its outline, moved by some voxels of 2 mm."""
    labels = np.zeros((40, 50, 50), dtype=np.uint8)
    labels[10:22, 10:26, 14:36] = 29
    labels[14:18, 26:40, 23:27] = 29
    hu = np.where(labels > 0, 250, 40).astype(np.float32)
    affine = np.array([[0, 0, 2.0, 0], [0, 2.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
    return Volume(hu, affine), np.roll(labels, shift, axis=2)


def seen(shift: int) -> Traits:
    volume, labels = block(shift)
    vertebra = locate(labels, volume.affine, 29)
    return traits(volume, labels, vertebra, {28: 40.0, 29: 40.0, 30: 40.0}, None)


def test_bone_that_ends_elsewhere_than_its_outline_is_seen() -> None:
    right, moved, far = seen(0), seen(2), seen(6)
    assert right.edge == pytest.approx(1.0)
    assert right.size == 0.0
    assert right.overlap is None
    assert right.edge > moved.edge > far.edge


def test_how_much_denser_bone_is_than_its_surroundings_is_mann_and_whitneys_statistic() -> None:
    rng = np.random.default_rng(3)
    bone, around = (rng.integers(low, low + 60, size).astype(np.float32) for low, size in ((30, 400), (10, 250)))
    expected = stats.mannwhitneyu(bone, around).statistic / (bone.size * around.size)  # many ties
    assert _denser(bone, around) == pytest.approx(expected, abs=1e-12)
    assert _denser(bone, around[:0]) == 0.5


def test_size_is_held_against_the_other_lumbar_vertebrae() -> None:
    volume, labels = block()
    vertebra = locate(labels, volume.affine, 29)
    big = traits(volume, labels, vertebra, {28: 40.0, 29: 80.0, 30: 40.0, 32: 500.0}, None)
    assert big.size == pytest.approx(np.log(2.0))
    assert traits(volume, labels, vertebra, {29: 80.0, 30: 40.0}, None).size == 0.0  # one is no measure


def curve(basis: str, sha256: str | None, limit: float) -> Curve:
    count = len(FEATURES[basis])
    return Curve(basis, sha256, (0.0,) * count, (1.0,) * count, (*(0.0,) * (count - 1), 4.0), -3.0, limit)


def test_one_half_is_the_limit_whatever_the_curves_probability_there() -> None:
    for limit in (0.02, 0.6, 0.99):
        scale = curve("outline", None, limit)
        values = [scale.value(replace(SOUND, edge=edge)) for edge in np.linspace(-2.0, 2.0, 41)]
        assert values == sorted(values)
        assert 0 <= values[0] < GOOD < values[-1] <= 1
        for edge in np.linspace(-2.0, 2.0, 41):
            found = replace(SOUND, edge=float(edge))
            assert (scale.value(found) >= GOOD) == (scale.probability(found) >= limit)


def test_an_expectation_counts_only_for_the_weights_that_it_was_calibrated_with() -> None:
    both = Calibration(curve("network", OURS, 0.5), curve("outline", None, 0.5))
    for found, weights, basis in ((SOUND, OURS, "network"), (SOUND, THEIRS, "outline")):
        quality = both.judge(found, weights)
        assert quality is not None
        assert quality.basis == basis
    unknown = both.judge(replace(SOUND, overlap=None), OURS)
    assert unknown is not None
    assert unknown.basis == "outline"
    assert Calibration(both.network, None).judge(SOUND, THEIRS) is None
    assert Calibration(None, None).judge(SOUND, OURS) is None


def test_the_shipped_calibration_reads_and_tells_sound_from_spoilt() -> None:
    stored = json.loads(CALIBRATION.read_text(encoding="utf-8"))
    assert stored["made"]["patients"] > 0
    for sound, edge in ((True, 0.92), (False, 0.5)):
        quality = shipped().judge(replace(SOUND, overlap=None, edge=edge), THEIRS)
        assert quality is not None
        assert (quality.value >= GOOD) is sound


def test_the_shipped_claim_belongs_to_the_shipped_networks() -> None:
    """New weights take a new calibration: without it every outline of ours would silently be judged as anybody's."""
    network = shipped().network
    assert network is not None
    assert network.weights_sha256 == verify(BUILT_IN).sha256
    for sound, overlap in ((True, 0.97), (False, 0.90)):
        quality = shipped().judge(replace(SOUND, overlap=overlap), verify(BUILT_IN).sha256)
        assert quality is not None
        assert quality.basis == "network"
        assert (quality.value >= GOOD) is sound


def test_a_calibration_that_does_not_fit_its_features_is_refused(tmp_path: Path) -> None:
    stored = json.loads(CALIBRATION.read_text(encoding="utf-8"))
    stored["outline"]["mean"] = [0.0]
    (tmp_path / "c.json").write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(ValueError, match="outline"):
        read_calibration(tmp_path / "c.json")
    assert read_calibration(tmp_path / "none.json") == Calibration(None, None)


def test_limits() -> None:
    probability, good = np.linspace(1.0, 0.0, 1000), np.ones(1000, dtype=np.bool_)
    good[500:] = False
    assert sure_limit(probability, good) == pytest.approx(probability[504])  # 500 of 505 are 99 %
    assert sure_limit(probability, ~good) > 1
    assert lenient_limit(probability, good) == pytest.approx(np.quantile(probability[:500], 0.01))


def made_up(seed: int, weights: str) -> Iterator[Case]:
    rng = np.random.default_rng(seed)
    for source in ("network", "strained", "imperfect", "spoilt"):
        for level in ("L1", "L2", "L3", "L4"):
            bad = source == "spoilt" or (source == "strained" and bool(rng.integers(2)))
            dice = rng.uniform(0.5, 0.75) if bad else rng.uniform(0.92, 0.98)
            own = source in ("network", "strained")
            overlap = None if not own else (rng.uniform(0.3, 0.5) if bad else rng.uniform(0.8, 0.95))
            found = Traits(overlap, 0.8, rng.uniform(0, 0.1), rng.uniform(0.4, 0.6) if bad else rng.uniform(0.85, 0.95))
            yield Case(seed, source, "", level, found, float(dice), weights if own else None)


def test_a_calibration_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    class Ours:
        name, sha256 = "ours", OURS

        def segment(self, volume: Volume) -> Segmentation:
            raise AssertionError("never asked here")

    def cases_of(seed: int, segmenter: Ours) -> Iterator[Case]:
        drawn.append(seed)
        return made_up(seed, segmenter.sha256)

    monkeypatch.setattr(room, "cases_of", cases_of)
    file = tmp_path / "cases.jsonl"
    collect(file, range(3), Ours())
    with file.open("a", encoding="utf-8") as out:
        out.write('{"seed": 3, "sou')  # it was stopped while it wrote
    cases = collect(file, range(6), Ours())
    assert drawn == [0, 1, 2, 3, 4, 5]
    assert len(cases) == 6 * 16
    assert collect(file, range(2), Ours()) == [case for case in cases if case.seed < 2]
    assert drawn == [0, 1, 2, 3, 4, 5]
    stored = calibrate(cases, OURS)
    assert stored["network"]["weights_sha256"] == OURS
    assert stored["outline"]["weights_sha256"] is None
    (tmp_path / "c.json").write_text(json.dumps(stored), encoding="utf-8")
    made = read_calibration(tmp_path / "c.json")
    for case in cases:
        quality = made.judge(case.traits, OURS)
        assert quality is not None
        assert (quality.value >= GOOD) == (case.dice >= 0.9), asdict(case)
    assert "| network | network | 24 | 24 | 24 | 24/24: 100.0 (86.2-100.0)" in table(cases, made)
