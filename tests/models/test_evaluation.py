"""The evaluation on a toy table, against scipy and by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from models.evaluation import (
    Definition,
    Table,
    agreement,
    association,
    detection,
    evaluate,
    evaluate_package,
    make_table,
    report,
    train_package,
    whose,
    yoshida,
)
from models.evaluation.comparators import compare
from models.evaluation.subgroups import coverage
from models.evaluation.tasks import make_tasks
from models.package import Interval, Manifest
from models.training import Cohort
from tests.models.tiny import tiny_cohort, tiny_config


def table(patients: int = 12) -> Table:
    draw = np.random.default_rng(3)
    count = patients * 4
    bmd = draw.uniform(0.6, 1.4, count)
    tbs = draw.uniform(1.1, 1.6, count)
    return Table(
        patients=np.repeat([f"P{number}" for number in range(patients)], 4),
        bmd=bmd,
        tbs=tbs,
        hu=100 * bmd + draw.normal(0, 20, count),
        bmd_dl=bmd + draw.normal(0.02, 0.05, count),
        tbs_dl=tbs + draw.normal(0, 0.05, count),
        groups={"sex": np.repeat(["F", "M"] * (patients // 2), 4)},
    )


def manifest() -> Manifest:
    intervals = (Interval(1, 0.1, 0.1), Interval(4, 0.05, 0.05))
    return Manifest(
        "t", "1", "resnet18", ("bmd_g_cm2", "tbs"), {}, {}, True, {}, intervals, 0.9, "2026-01-01T00:00:00+00:00"
    )


def test_correlation_and_interval_are_scipys_and_fishers() -> None:
    toy = table()
    found = association(toy.hu, toy.bmd)
    r = stats.pearsonr(toy.hu, toy.bmd).statistic
    assert found["r"] == pytest.approx(r)
    half = 1.959964 / np.sqrt(len(toy.bmd) - 3)
    assert found["r_ci"] == pytest.approx([np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half)])


def test_errors_are_estimate_minus_truth() -> None:
    found = agreement(np.array([1.1, 1.3, 1.5, 1.6]), np.array([1.0, 1.2, 1.4, 1.7]))
    assert found["mean_error"] == pytest.approx(0.05)
    assert found["mean_absolute_error"] == pytest.approx(0.1)


def test_what_cannot_be_told_is_null() -> None:
    assert association(np.ones(9), np.arange(9.0))["r"] is None
    assert detection(np.zeros(9, dtype=bool), np.arange(9.0))["auc"] is None
    figures = report(table(), manifest=None)
    assert figures["per_patient"]["osteopenia"] is None
    assert figures["intervals"] is None
    assert figures["per_vertebra"]["gbm_bmd"] is None


def test_detection_by_hand() -> None:
    truth = np.array([True, True, False, False, False])
    found = detection(truth, np.array([5.0, 3.0, 4.0, 2.0, 1.0]))
    assert found["auc"] == pytest.approx(5 / 6)
    assert (found["tp"], found["fn"], found["fp"], found["tn"]) in [(1, 1, 0, 3), (2, 0, 1, 2)]
    assert found["sensitivity"] + found["specificity"] - 1 == pytest.approx(2 / 3, abs=0.2)
    low, high = found["auc_ci"]
    assert 0 <= low <= found["auc"] <= high <= 1


def test_report_counts_patients_and_uses_their_means() -> None:
    toy = table()
    figures = report(toy, manifest(), yoshida({"F": 1.2, "M": 1.2}))
    assert (figures["n_patients"], figures["n_vertebrae"]) == (12, 48)
    means = [toy.bmd[start : start + 4].mean() for start in range(0, 48, 4)]
    assert figures["per_patient"]["osteopenia"]["n_positive"] == sum(100 * mean / 1.2 < 80 for mean in means)
    assert figures["intervals"]["bmd_coverage"] == pytest.approx((np.abs(toy.bmd_dl - toy.bmd) <= 0.1).mean())
    assert figures["subgroups"]["sex"]["F"]["bmd"]["n"] == 24
    json.dumps(figures, allow_nan=False)


def test_a_patient_without_young_adults_is_not_counted_and_hides_nobody() -> None:
    toy = table()
    sexes = np.where(toy.patients == "P0", "O", toy.groups["sex"])
    one = replace(toy, groups={**toy.groups, "sex": sexes})
    figures = report(one, manifest(), yoshida({"F": 1.2, "M": 1.2}))
    whole = report(toy, manifest(), yoshida({"F": 1.2, "M": 1.2}))
    assert figures["per_patient"]["osteopenia"]["n"] == 11
    first = toy.by_patient(toy.bmd)[0] / 1.2 < 0.8
    counted = [found["per_patient"]["osteopenia"]["n_positive"] for found in (figures, whole)]
    assert counted[0] == counted[1] - first
    assert figures["subgroups"]["sex"]["O"]["detection"]["osteopenia"]["n"] == 0
    assert figures["per_patient"]["tbs_impaired"]["n"] == 12
    json.dumps(figures, allow_nan=False)


def test_a_site_s_own_thresholds_and_young_adults_decide_who_is_counted() -> None:
    """T -2.5 at or below, another SD for each sex: 0.95 and 0.70 g/cm2."""
    young, cut = {"F": 1.2, "M": 1.2}, {"F": 0.95, "M": 0.70}
    toy = table()
    bmd = toy.bmd.copy()
    bmd[:4] = 0.95  # the first, a woman, lies at her threshold
    toy = replace(toy, bmd=bmd)
    sexes = toy.groups["sex"][toy.first_rows]
    expected = [mean <= cut[sex] + 1e-12 for mean, sex in zip(toy.by_patient(bmd), sexes, strict=True)]
    found = report(toy, None, {"osteopenia": Definition("site: T <= -2.5", young, cut, inclusive=True)})
    assert sexes[0] == "F"
    assert found["per_patient"]["osteopenia"]["n_positive"] == sum(expected)
    strict = report(toy, None, {"osteopenia": Definition("site: T < -2.5", young, cut)})
    assert strict["per_patient"]["osteopenia"]["n_positive"] == sum(expected) - 1
    assert found["per_patient"]["osteopenia"]["unit"] == "%YAM above the threshold"
    assert found["per_patient"]["osteoporosis"] is None


def test_a_row_without_a_scanner_hides_no_other(tmp_path: Path) -> None:
    cohort = Cohort.read(tiny_cohort(tmp_path / "cohort", patients=10, gains={"One": 1.0, "Two": 1.0}))
    rows = tuple({**row, "scanner": "" if row["patient_id"] == "P0" else row["scanner"]} for row in cohort.rows)
    some = replace(cohort, rows=rows)
    groups = make_table(some, np.arange(40), cohort.targets.astype(np.float64)).groups
    assert {str(name): int((groups["scanner"] == name).sum()) for name in set(groups["scanner"])} == {
        "canon One": 16, "canon Two": 20, "unknown": 4,
    }  # fmt: skip


def test_train_then_evaluate_as_a_user_would(tmp_path: Path) -> None:
    cohort = tiny_cohort(tmp_path / "cohort")
    settings = tmp_path / "config.json"
    settings.write_text(json.dumps(tiny_config(epochs=1).to_dict()))
    package = train_package(cohort, tmp_path / "tiny", settings)
    document = evaluate_package(package.path, cohort, tmp_path / "out", yoshida({"F": 1.2, "M": 1.2}))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == document
    assert document["n_patients"] == 10
    assert document["model_sha256"] == package.sha256
    assert (document["n_patients_real"], document["n_patients_synthetic"]) == (0, 10)
    assert document["cohort"]["sha256"] == Cohort.read(cohort).sha256
    assert document["cohort"]["learned_from"] is True
    others = tiny_cohort(tmp_path / "others", patients=12)
    assert evaluate_package(package.path, others, tmp_path / "again")["cohort"]["learned_from"] is False
    low, high = document["per_vertebra"]["bmd"]["mean_absolute_error_ci_patient"]
    assert low <= document["per_vertebra"]["bmd"]["mean_absolute_error"] <= high
    assert document["per_patient"]["osteopenia"]["auc"] is not None
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert document["per_vertebra"]["gbm_bmd"]["n"] == 40
    assert document["per_vertebra"]["oracle_bmd"] is None
    assert "interval" not in document["subgroups"]  # cohort.csv gives no interval_days
    assert "<script" not in page
    assert "not a medical device" in page
    for plot in ("scatter", "bland_altman", "roc", "calibration", "subgroups"):
        assert (tmp_path / "out" / f"{plot}.png").stat().st_size > 5_000
    held_out = evaluate(package, cohort, tmp_path / "fold", folds=(9,))
    assert held_out["n_patients"] == 1
    assert held_out["cohort"]["folds"] == [9]
    assert held_out["per_patient"]["osteopenia"] is None  # no young-adult reference given


def test_a_cohort_that_knows_the_interval_is_split_by_it(tmp_path: Path) -> None:
    cohort = Cohort.read(tiny_cohort(tmp_path / "cohort"))
    rows = tuple({**row, "interval_days": str(10 * int(row["seed"]))} for row in cohort.rows)
    chosen = np.arange(len(rows))
    made = make_table(replace(cohort, rows=rows), chosen, cohort.targets.astype(np.float64))
    assert made.numbers["interval_days"][-1] == 90
    assert list(made.groups["interval"][[0, -1]]) == ["short", "long"]
    assert (made.groups["interval"] == "short").sum() == 20
    rows[0]["interval_days"] = ""  # type: ignore[index]
    assert "interval" not in make_table(replace(cohort, rows=rows), chosen, cohort.targets.astype(np.float64)).groups


def test_people_are_counted_only_where_somebody_says_so(tmp_path: Path) -> None:
    digital = Cohort.read(tiny_cohort(tmp_path / "cohort"))
    everybody = np.arange(len(digital.rows))
    assert whose(digital, everybody) == {"n_patients_real": 0, "n_patients_synthetic": 10}
    site = replace(digital, facts={"provenance": "site"})
    assert whose(site, everybody[:4]) == {"n_patients_real": 1, "n_patients_synthetic": 0}
    said = ["0", "1", "", "what?", "FALSE"] + ["0"] * 5
    rows = tuple({**row, "synthetic": said[index // 4]} for index, row in enumerate(site.rows))
    assert whose(replace(site, rows=rows), everybody) == {"n_patients_real": 8, "n_patients_synthetic": 2}
    assert whose(replace(digital, rows=rows), everybody) == {"n_patients_real": 7, "n_patients_synthetic": 3}


def test_a_cohort_that_knows_its_scanners_is_judged_by_them(tmp_path: Path) -> None:
    cohort = Cohort.read(tiny_cohort(tmp_path / "cohort"))
    rows = tuple({**row, "scanner": f"Model {index // 20}"} for index, row in enumerate(cohort.rows))
    everybody = np.arange(len(rows))
    made = make_table(replace(cohort, rows=rows), everybody, cohort.targets.astype(np.float64))
    assert sorted(set(made.groups["scanner"])) == ["canon Model 0", "canon Model 1"]
    assert "scanner" not in make_table(cohort, everybody, cohort.targets.astype(np.float64)).groups


def test_a_hospital_that_knows_no_bmi_is_judged_all_the_same(tmp_path: Path) -> None:
    cohort = Cohort.read(tiny_cohort(tmp_path / "cohort"))
    rows = tuple({**row, "bmi": ""} for row in cohort.rows)
    site, chosen = replace(cohort, rows=rows), np.arange(len(rows))
    made = make_table(site, chosen, cohort.targets.astype(np.float64))
    assert set(made.numbers) == {"age"}
    assert set(made.groups) == {"vendor", "sex", "age"}
    estimates = compare(site, chosen, tmp_path / "cohort", None).estimates
    assert np.isfinite(estimates["gbm_bmd"]).all()


def of_patients(vertebrae: list[int], errors: list[float]) -> Table:
    """So many vertebrae of each patient, all with the patient's own error."""
    who = np.repeat([f"P{number}" for number in range(len(vertebrae))], vertebrae)
    error = np.repeat(errors, vertebrae)
    truth = np.linspace(0.8, 1.2, len(who))
    return Table(who, truth, truth + 0.4, 100 * truth, truth + error, truth + 0.4 + error, {})


def test_a_patients_mean_is_held_against_the_width_for_its_own_number_of_vertebrae() -> None:
    """0.1 for one vertebra, 0.05 for four: an error of 0.07 lies within the first and beyond the second."""
    found = coverage(of_patients([4, 4, 1, 4], [0.07, 0.07, 0.07, 0.04]), manifest())
    for name in ("bmd", "tbs"):
        assert found[f"{name}_coverage"] == 1.0
        assert found[f"patient_{name}_coverage"] == 0.5  # the single vertebra, and the one of 0.04


def test_an_impaired_tbs_begins_at_its_limit_and_a_low_yam_below_it() -> None:
    """Yoshida 2023: TBS <= 1.31, %YAM < 80, %YAM < 70; of the truth and of the estimate alike."""
    toy = of_patients([1] * 4, [0.0] * 4)
    tbs = np.array([1.31, 1.31 + 1e-8, 1.30, 1.50])
    bmd = 1.17 * np.array([0.7, 0.8, 0.7 - 1e-8, 0.8 - 1e-8])  # 100 x (0.8 x 1.17) / 1.17 is 80.00000000000001
    values = {"tbs": tbs, "tbs_dl": tbs[::-1].copy(), "bmd": bmd, "bmd_dl": bmd[::-1].copy()}
    tasks = make_tasks(replace(toy, **values, groups={"sex": np.repeat("F", 4)}), yoshida({"F": 1.17}))
    for name, expected in (
        ("tbs_impaired", [True, False, True, False]),
        ("osteopenia", [True, False, True, True]),
        ("osteoporosis", [False, False, True, False]),
    ):
        task = tasks[name]
        assert task is not None
        assert task.truth.tolist() == expected
        assert task.called.tolist() == expected[::-1]


def test_who_stands_on_the_median_belongs_to_the_lower_half(tmp_path: Path) -> None:
    """Of an odd number of patients one does; halves are of patients, whatever their number of vertebrae."""
    cohort = Cohort.read(tiny_cohort(tmp_path / "cohort"))
    rows = tuple({**row, "interval_days": str(10 * int(row["seed"]))} for row in cohort.rows)
    chosen = np.flatnonzero(np.isin(cohort.patients, ["P1", "P2", "P3", "P5", "P8"]))
    chosen = np.concatenate([chosen, np.repeat(chosen[-1], 20)])  # P8 has many
    made = make_table(replace(cohort, rows=rows), chosen, cohort.targets[chosen].astype(np.float64))
    for name, below, above in (("age", "young", "senior"), ("bmi", "low", "high"), ("interval", "short", "long")):
        halves = dict(zip(made.patients.tolist(), made.groups[name].tolist(), strict=True))
        assert halves == {"P1": below, "P2": below, "P3": below, "P5": above, "P8": above}
