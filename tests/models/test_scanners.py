"""A site's scanners read mineral differently: each gets its own factor, and a CT from another one is told as such."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from models.evaluation import evaluate
from models.package import TARGETS, ModelPackage, PackageError, Scanner, scanner_name
from models.readout import COLUMNS, PRINTED_BETWEEN, Readout, ScannerFactors, widened
from models.training import Cohort, TrainingConfig, estimate_cohort, refit_for_site, train_package
from models.training.calibration import calibrate
from models.training.readout import adjust_readout, cohort_columns, known_scanners, scanner_factors, with_scanners
from tests.models.test_readout import HERE, RUN, any_readout
from tests.models.tiny import tiny_cohort, tiny_config
from worker.predict import Predictor

Names = npt.NDArray[np.str_]
APART = {"One": 1.15, "Two": 0.95, "Three": 1.0}


def read_by(
    patients: dict[str, int], reads: dict[str, float], seed: int = 7
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32], Names, Names]:
    """Answers and truth [vertebrae, 2], patients and scanners: so many patients of four vertebrae on each scanner."""
    draw = np.random.default_rng(seed)
    scanners = np.repeat([name for name, count in patients.items() for _ in range(count)], 4)
    who = np.repeat([f"P{number}" for number in range(len(scanners) // 4)], 4)
    of_patient = np.repeat(draw.normal(0, 0.04, len(scanners) // 4), 4)
    truth = draw.normal(1.0, 0.2, len(scanners))
    answers = truth * [reads[name] for name in scanners] + of_patient + draw.normal(0, 0.04, len(scanners))
    return np.stack([answers] * 2, axis=1), np.stack([truth] * 2, axis=1).astype(np.float32), who, scanners


def test_a_scanner_s_factor_is_what_its_reading_is_short_of() -> None:
    found = scanner_factors(*read_by({"a": 60, "b": 60, "c": 60}, {"a": 1.1, "b": 0.95, "c": 1.0}))
    assert {name: one.patients for name, one in found.items()} == {"a": 60, "b": 60, "c": 60}
    for name, reads in (("a", 1.1), ("b", 0.95), ("c", 1.0)):
        assert found[name].factors == pytest.approx([1 / reads] * 2, abs=0.015)


def test_scanners_that_read_alike_are_told_apart_less_than_chance_would() -> None:
    found, plain = [], []
    for seed in range(20):
        answers, truth, who, scanners = read_by({"a": 40, "b": 40, "c": 6}, dict.fromkeys("abc", 1.0), seed)
        factors = scanner_factors(answers, truth, who, scanners)
        found += [factors[name].factors[0] - 1 for name in "abc"]
        plain += [truth[scanners == name].mean() / answers[scanners == name].mean() - 1 for name in "abc"]
    assert np.std(found) < 0.7 * np.std(plain)


def test_few_patients_are_believed_less_than_many() -> None:
    reads = {"a": 1.1, "b": 0.9, "few": 1.1}
    for count, least, most in ((1, 0.1, 0.95), (60, 0.97, 1.03)):
        answers, truth, who, scanners = read_by({"a": 60, "b": 60, "few": count}, reads)
        found = scanner_factors(answers, truth, who, scanners)["few"]
        alone = truth[scanners == "few"].mean() / answers[scanners == "few"].mean()
        assert found.patients == count
        assert least < (found.factors[0] - 1) / (alone - 1) < most


def test_a_scanner_of_few_patients_or_without_a_name_is_not_known() -> None:
    draw = np.random.default_rng(3)
    table = draw.normal(size=(160, len(COLUMNS)))
    patients = np.array([f"P{number // 4}" for number in range(160)])
    before = any_readout()
    truth = (before.of_columns(table) + 0.1).astype(np.float32)
    unnamed = adjust_readout(before, table, truth, patients, np.array([""] * 160))
    assert (unnamed.scanners, unnamed.between, unnamed.knows("b")) == ({}, None, True)
    nobody = adjust_readout(before, table, truth, patients, np.array([""] * 144 + ["b"] * 16))
    assert (nobody.scanners, nobody.knows("b"), nobody.knows("")) == ({}, False, False)
    assert dict(zip(TARGETS, nobody.between, strict=True)) == PRINTED_BETWEEN  # type: ignore[arg-type]
    again = Readout.from_json(nobody.to_json(), HERE)
    assert (again.scanners, again.knows("b")) == ({}, False)
    assert np.allclose(nobody.weights, adjust_readout(before, table, truth, patients).weights)
    two = adjust_readout(before, table, truth, patients, np.array(["a"] * 80 + ["b"] * 64 + ["c"] * 16))
    assert set(two.scanners) == {"a", "b"}
    assert [two.knows(name) for name in ("a", "b", "c", "")] == [True, True, False, False]


def test_the_only_scanner_of_a_site_is_known_and_needs_no_factor() -> None:
    """A readout that was bent to one scanner must not be taken for one of all scanners."""
    draw = np.random.default_rng(3)
    table = draw.normal(size=(160, len(COLUMNS)))
    patients = np.array([f"P{number // 4}" for number in range(160)])
    before = any_readout()
    truth = (before.of_columns(table) + 0.1).astype(np.float32)
    one = adjust_readout(before, table, truth, patients, np.array(["a"] * 160))
    assert np.array_equal(one.scanners["a"].factors, [1.0, 1.0])
    assert np.allclose(one.weights, adjust_readout(before, table, truth, patients).weights)
    assert (one.knows("a"), one.knows("b")) == (True, False)
    assert one.between == pytest.approx([0.092, 0.0])
    values = np.array([[1.0, 1.3], [0.8, 1.2]])
    assert one.spread(values, ["a", "b"]) == pytest.approx(np.array([[0.0, 0.0], [0.8 * 0.092, 0.0]]))


def test_an_unknown_scanner_widens_an_interval_as_an_independent_error_does() -> None:
    assert widened(0.1, 0.0) == pytest.approx(0.1)
    draw = np.random.default_rng(0)
    errors = draw.normal(0, 0.05, 200_000) + draw.normal(0, 0.08, 200_000)
    assert (np.abs(errors) <= widened(1.645 * 0.05, 0.08)).mean() == pytest.approx(0.90, abs=0.005)


def test_scanners_that_differ_more_than_printed_are_believed() -> None:
    answers, truth, who, scanners = read_by({"a": 40, "b": 40}, {"a": 1.25, "b": 0.8})
    table = np.zeros((len(answers), len(COLUMNS)))
    table[:, :2] = answers
    made = with_scanners(Readout.unweighed(table), table, truth, who, scanners)
    assert made.between is not None
    assert made.between[0] == pytest.approx(np.sqrt((0.2**2 + 0.25**2) / 2), abs=0.02)


def test_no_measure_comes_to_stand_for_a_scanner() -> None:
    """A column that differs between scanners alone, as a kernel's noise does, says nothing about the bone."""
    draw = np.random.default_rng(4)
    table = draw.normal(size=(400, len(COLUMNS)))
    patients = np.array([f"P{number // 4}" for number in range(400)])
    scanners = np.where(np.arange(400) < 200, "a", "b")
    table[:, 10] = np.where(scanners == "a", 1.0, -1.0) + draw.normal(0, 0.01, 400)
    before = Readout.unweighed(table)
    common = before.of_columns(table) * 0.1 + 1.0
    before = dataclasses.replace(before, weights=before.weights * 0.1, bias=before.bias * 0.1 + 1.0)
    truth = (common * np.where(scanners == "a", 1.1, 0.9)[:, None] + draw.normal(0, 0.02, (400, 2))).astype(np.float32)
    blind = adjust_readout(before, table, truth, patients)
    aware = adjust_readout(before, table, truth, patients, scanners)
    moved = [np.abs(one.weights - before.weights)[:, 10].max() for one in (blind, aware)]
    assert moved[0] > 0.05
    assert moved[1] < 0.01
    assert aware.scanners["a"].factors == pytest.approx([1.1, 1.1], abs=0.02)
    left = aware.of_columns(table, scanners) - truth
    assert np.abs([left[scanners == one].mean(axis=0) for one in "ab"]).max() < 0.01


def test_it_survives_the_package_and_a_damaged_factor_is_refused() -> None:
    known = {"canon Aquilion ONE": ScannerFactors(np.array([1.1, 0.99]), 40)}
    made = dataclasses.replace(any_readout(), scanners=known, between=np.array([0.1, 0.02]))
    read = Readout.from_json(made.to_json(), HERE)
    assert read.scanners["canon Aquilion ONE"].patients == 40
    assert np.array_equal(read.scanners["canon Aquilion ONE"].factors, [1.1, 0.99])
    assert np.array_equal(read.between, [0.1, 0.02])  # type: ignore[arg-type]
    assert not {"scanners", "between_scanners"} & json.loads(any_readout().to_json()).keys()
    for factor in (0.0, -1.0, float("nan")):
        stored = json.loads(made.to_json())
        stored["scanners"]["canon Aquilion ONE"]["tbs"] = factor
        with pytest.raises(PackageError, match="canon Aquilion ONE that is not above 0"):
            Readout.from_json(json.dumps(stored), HERE)
    stored = json.loads(made.to_json())
    stored["between_scanners"]["tbs"] = -0.1
    with pytest.raises(PackageError, match="spread between scanners"):
        Readout.from_json(json.dumps(stored), HERE)
    del stored["between_scanners"]
    with pytest.raises(PackageError, match="between_scanners"):
        Readout.from_json(json.dumps(stored), HERE)


def test_a_scanner_s_name() -> None:
    assert scanner_name("canon", " Aquilion  ONE ") == "canon Aquilion ONE"
    assert scanner_name(None, "Brand new") == "unknown Brand new"
    assert scanner_name("ge", None) == scanner_name("ge", " ") == ""


# --- in a package -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("scanners")
    config = TrainingConfig.from_dict(tiny_config(**RUN).to_dict() | {"readout": "measures"})
    return train_package(tiny_cohort(folder / "cohort", patients=20), folder / "weighed", config)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cohort(tmp_path_factory.mktemp("site") / "cohort", patients=60, gains=APART)


@pytest.fixture(scope="module")
def refitted(package: ModelPackage, site: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    told = TrainingConfig.from_dict(package.manifest.training["config"])
    apart = {"validation_folds": (8, 9), "calibration_folds": (8, 9)}
    config = dataclasses.replace(told, name="site", start_from=package.sha256, **apart)
    return refit_for_site(package, site, tmp_path_factory.mktemp("made") / "refitted", config)


def test_a_refit_learns_how_each_scanner_of_the_site_reads(refitted: ModelPackage, site: Path) -> None:
    readout = Readout.of(refitted)
    assert readout is not None
    assert {name: one.patients for name, one in readout.scanners.items()} == {
        "canon One": 16, "canon Two": 16, "canon Three": 16,
    }  # fmt: skip
    cohort = Cohort.read(site)
    held_out = cohort.where((8, 9))
    known = estimate_cohort(refitted, cohort, held_out)[:, 0] - cohort.targets[held_out, 0]
    unnamed = dataclasses.replace(cohort, rows=tuple({**row, "scanner": ""} for row in cohort.rows))
    unknown = estimate_cohort(refitted, unnamed, held_out)[:, 0] - cohort.targets[held_out, 0]
    for name in APART:
        here = cohort.scanners[held_out] == f"canon {name}"
        assert abs(known[here].mean()) < 0.05
    apart = [abs(unknown[cohort.scanners[held_out] == f"canon {name}"].mean()) for name in ("One", "Two")]
    assert min(apart) > 0.04
    card = refitted.model_card()
    assert "**Scanners.**" in card
    assert "| canon One | 16 |" in card
    assert re.search(
        r"as scanners differ by [\d.]+% \(BMD\) and [\d.]+% \(TBS\); there the network\s+decides for no", card
    )


def test_networks_that_are_trained_at_a_site_know_its_scanners_too(site: Path, tmp_path: Path) -> None:
    config = TrainingConfig.from_dict(tiny_config(**RUN).to_dict() | {"readout": "measures"})
    made = train_package(site, tmp_path / "trained", config)
    told = {name: one["patients"] for name, one in made.manifest.training["scanners"].items()}
    assert told == {"canon One": 6, "canon Two": 6, "canon Three": 6}  # of those whom the network did not learn from
    assert Predictor(made.path, "cpu").knows(Scanner("canon Two", digital=True))


def test_prediction_knows_where_it_is(refitted: ModelPackage, package: ModelPackage, site: Path) -> None:
    cohort = Cohort.read(site)
    slabs = cohort.slabs[:4, 0].astype(np.float32)
    predictor = Predictor(refitted.path, "cpu")
    assert predictor.scanners == ("canon One", "canon Three", "canon Two")
    factor = Readout.of(refitted).scanners["canon One"].factors[0]  # type: ignore[union-attr]
    one, other, real = Scanner("canon One", digital=True), Scanner("ge Elsewhere", digital=True), Scanner("canon One")
    here, there, people = (
        predictor.predict(slabs, ("L1", "L2", "L3", "L4"), scanner=scanner) for scanner in (one, other, real)
    )
    assert people == there  # no digital patient's scanner is a machine, whatever it is called
    assert [v.bmd_g_cm2 for v in here] == pytest.approx([factor * v.bmd_g_cm2 for v in there])
    known, elsewhere = predictor.patient(here, one), predictor.patient(there, other)
    widths = [(v.bmd_interval[1] - v.bmd_interval[0]) / 2 for v in (known, elsewhere)]
    half = refitted.manifest.interval(4).bmd_g_cm2
    between = Readout.of(refitted).between[0]  # type: ignore[union-attr,index]
    assert widths == pytest.approx([half, widened(half, between * elsewhere.bmd_g_cm2)])
    assert widths[1] > 1.2 * widths[0]
    assert [predictor.knows(scanner) for scanner in (one, other, real)] == [True, False, False]
    usual = Predictor(package.path, "cpu")
    assert (usual.scanners, usual.knows(other), usual.knows(real)) == ((), True, False)


def test_an_evaluation_takes_each_scanner_s_own_intervals(refitted: ModelPackage, tmp_path: Path) -> None:
    """Half of the patients on a scanner that the package does not know."""
    folder = tiny_cohort(tmp_path / "cohort", patients=40, gains={"One": 1.15, "New": 0.92})
    seen = evaluate(refitted, folder, tmp_path / "report")["subgroups"]["scanner"]
    cohort = Cohort.read(folder)
    found = estimate_cohort(refitted, cohort, np.arange(160))[:, 0]
    half, between = refitted.manifest.interval(1).bmd_g_cm2, Readout.of(refitted).between[0]  # type: ignore[union-attr,index]
    halves = {"One": half, "New": widened(half, between * found)}
    for name, allowed in halves.items():
        share = (np.abs(found - cohort.targets[:, 0]) <= allowed)[cohort.scanners == f"canon {name}"].mean()
        assert seen[f"canon {name}"]["intervals"]["bmd_coverage"] == pytest.approx(share)
    assert 0 < seen["canon New"]["intervals"]["bmd_coverage"] < 1


def test_a_patient_counts_once_however_many_vertebrae_tell_of_it() -> None:
    answers, truth, who, scanners = read_by({"a": 6, "b": 6}, {"a": 1.1, "b": 0.95})
    often = np.r_[np.arange(len(who)), np.tile(np.flatnonzero(who == "P2"), 9)]  # one patient, ten times as often
    once = scanner_factors(answers, truth, who, scanners)
    again = scanner_factors(answers[often], truth[often], who[often], scanners[often])
    for name in "ab":
        assert once[name].patients == again[name].patients == 6
        assert again[name].factors == pytest.approx(once[name].factors)
    few = scanners.copy()
    few[(scanners == "b") & ~np.isin(who, ["P6", "P7", "P8", "P9"])] = ""
    assert known_scanners(few, who) == ["a"]  # 16 vertebrae of four patients are four


def test_intervals_are_those_of_patients_from_the_scanners_that_are_known(site: Path) -> None:
    """Right within 0.01 on One and Two, and wrong by 0.5 on Three, which the readout was not fitted to."""
    cohort = Cohort.read(site)
    judged = cohort.where((6, 7, 8, 9))
    known = cohort.scanners[judged] != "canon Three"
    answers = cohort.targets[judged] + np.where(known, 0.01, 0.5)[:, None].astype(np.float32)
    plain = Readout.unweighed(cohort_columns(cohort, judged, answers))
    fitted = {f"canon {name}": ScannerFactors(np.ones(2), 16) for name in ("One", "Two")}
    readout = dataclasses.replace(plain, scanners=fitted, between=np.array([0.1, 0.0]))
    made = calibrate(readout, cohort, judged, answers, readout.targets)
    assert 0 < known.sum() < len(known) == len(made.predicted)
    assert [(one.bmd_g_cm2, one.tbs) for one in made.intervals] == [pytest.approx((0.01, 0.01), abs=1e-4)] * 4
    few = cohort.where((8,))  # six patients, four of them known: too few, and everybody's errors count
    wide = calibrate(readout, cohort, few, answers[np.isin(judged, few)], readout.targets)
    assert wide.intervals[0].bmd_g_cm2 > 0.2
