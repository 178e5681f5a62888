"""The evaluation's statistics against the paper's print, numpy and by hand."""

import json
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pytest

from models.evaluation import Table, gap_closed, report, write
from models.evaluation.detection import area, detection, rates, resampled_areas
from models.evaluation.paper import PRINTED_PERCENT, paper_percent, paper_percents, paper_sized
from models.evaluation.statistics import (
    agreement,
    association,
    calibration,
    correlation_power,
    distribution,
    error_regression,
    resampled_correlations,
)
from models.evaluation.subgroups import detection_tests
from models.evaluation.tasks import Task, make_tasks, yoshida
from tests.models.test_evaluation import manifest, table

# Yoshida 2023: the only 2 x 2 tables of 52 patients that its printed rates allow, and those rates.
COUNTS = {"osteopenia": (13, 1, 4, 34), "osteoporosis": (4, 0, 3, 45), "tbs_impaired": (11, 4, 10, 27)}
PRINTED = {
    "osteopenia": (93, 90, 77, 97, 11, 7, 90),
    "osteoporosis": (100, 94, 57, 100, 6, 0, 94),
    "tbs_impaired": (73, 73, 52, 87, 27, 27, 73),
}


def rounded_once(share: float) -> int:
    return int(Decimal(repr(100 * share)).quantize(Decimal(1), ROUND_HALF_UP))


@pytest.mark.parametrize("name", list(COUNTS))
def test_the_papers_counts_give_every_percentage_it_prints(name: str) -> None:
    assert sum(COUNTS[name]) == 52
    assert paper_percents(*COUNTS[name]) == PRINTED[name] == PRINTED_PERCENT[name]


def test_only_the_osteopenia_column_needs_rounding_twice() -> None:
    names = ("sensitivity", "specificity", "ppv", "npv", "fpr", "fnr", "accuracy")
    plain = {column: tuple(rounded_once(rates(*counts)[name]) for name in names) for column, counts in COUNTS.items()}
    assert plain["osteoporosis"] == PRINTED["osteoporosis"]
    assert plain["tbs_impaired"] == PRINTED["tbs_impaired"]
    assert plain["osteopenia"] == (93, 89, 76, 97, 11, 7, 90)
    assert (paper_percent(34, 38), paper_percent(13, 17), paper_percent(1, 200)) == (90, 77, 1)


def test_rates_have_wilson_intervals_and_no_rate_without_a_denominator() -> None:
    found = rates(4, 0, 3, 45)
    z = 1.959964
    assert found["sensitivity_ci"] == pytest.approx([4 / (4 + z**2), 1.0], abs=1e-6)  # Wilson's at 4 of 4
    nobody = rates(0, 0, 0, 5)
    assert (nobody["sensitivity"], nobody["ppv"], nobody["fnr_ci"]) == (None, None, None)
    assert nobody["specificity"] == 1.0


def test_delongs_interval_is_that_of_the_placements() -> None:
    draw = np.random.default_rng(1)
    truth = np.repeat([True, False], [15, 37])
    score = truth + draw.normal(0, 1, 52)
    wins = score[truth][:, None] > score[~truth][None, :]
    error = np.sqrt(wins.mean(axis=1).var(ddof=1) / 15 + wins.mean(axis=0).var(ddof=1) / 37)  # DeLong 1988
    found = area(truth, score)
    assert found["auc"] == pytest.approx(wins.mean())
    expected = [found["auc"] - 1.959964 * error, min(1.0, found["auc"] + 1.959964 * error)]
    assert found["auc_ci_delong"] == pytest.approx(expected, abs=1e-6)
    assert 0.5 < found["power"] <= 1


def test_cuts_by_youden_and_closest_to_the_corner() -> None:
    # Specificity 0.5 at sensitivity 1 (Youden 0.5, distance 0.5); 0.7 at 0.75 (Youden 0.45, distance 0.39).
    truth = np.repeat([True, False], [4, 10])
    score = np.array([9.0, 8, 7, 3, 9.5, 8.5, 7.5, 5, 4, 2, 1, 0.5, 0.3, 0.2])
    found = detection(truth, score, score >= 8.2)
    assert (found["sensitivity"], found["specificity"], found["cut"]) == (1.0, 0.5, -3.0)
    assert (found["closest"]["sensitivity"], found["closest"]["specificity"], found["closest"]["cut"]) == (
        0.75, 0.7, -7.0,
    )  # fmt: skip
    assert (found["defined"]["tp"], found["defined"]["fp"]) == (1, 2)


def test_resampled_correlations_are_those_of_repeated_rows() -> None:
    draw = np.random.default_rng(2)
    x, y, codes = draw.normal(5, 1, 12), draw.normal(100, 9, 12), np.repeat(np.arange(4), 3)
    copies = np.array([[2.0, 0, 1, 1], [1, 1, 1, 1]])
    rows = np.concatenate([np.flatnonzero(codes == patient) for patient in (0, 0, 2, 3)])
    expected = [np.corrcoef(x[rows], y[rows])[0, 1], np.corrcoef(x, y)[0, 1]]
    assert resampled_correlations(x, y, codes, copies) == pytest.approx(expected)


def test_copies_of_a_vertebra_add_nothing_to_the_patients_interval() -> None:
    draw = np.random.default_rng(4)
    x = draw.normal(size=30)
    y = x + draw.normal(size=30)
    once = association(x, y)
    fourfold = association(np.repeat(x, 4), np.repeat(y, 4), np.repeat([f"P{i}" for i in range(30)], 4))
    assert fourfold["r_ci_patient"] == pytest.approx(once["r_ci_patient"])
    assert np.ptp(fourfold["r_ci"]) < 0.6 * np.ptp(fourfold["r_ci_patient"])


def test_agreement_holds_the_bias_between_its_intervals() -> None:
    toy = table()
    found = agreement(toy.bmd_dl, toy.bmd, toy.patients)
    error = toy.bmd_dl - toy.bmd
    assert found["limits_of_agreement"] == pytest.approx(
        [error.mean() - 1.96 * error.std(ddof=1), error.mean() + 1.96 * error.std(ddof=1)]
    )
    for name in ("mean_error_ci", "mean_error_ci_patient"):
        assert found[name][0] < found["mean_error"] < found[name][1]
    assert found["wilcoxon_p"] < 0.05  # 0.02 g/cm2 was added to every estimate
    assert agreement(toy.bmd, toy.bmd)["t_test_p"] is None


def test_normality_is_told_from_its_absence() -> None:
    draw = np.random.default_rng(6)
    assert distribution(draw.normal(size=300))["shapiro_p"] > 0.05
    assert distribution(draw.exponential(size=300))["shapiro_p"] < 1e-6
    many = distribution(draw.normal(size=6000))
    assert many["shapiro_w"] > 0.99
    assert many["shapiro_p"] is None


def test_calibration_finds_slope_and_intercept() -> None:
    draw = np.random.default_rng(7)
    estimate = draw.uniform(0.6, 1.4, 400)
    found = calibration(estimate, 0.1 + 0.8 * estimate + draw.normal(0, 0.01, 400))
    assert found["slope"] == pytest.approx(0.8, abs=0.01)
    assert found["intercept"] == pytest.approx(0.1, abs=0.01)
    assert sum(part["n"] for part in found["bins"]) == 400
    assert found["bins"][0]["estimate"] < found["bins"][-1]["estimate"]


def test_regression_finds_what_the_error_depends_on() -> None:
    draw = np.random.default_rng(8)
    patients = np.repeat([f"P{number}" for number in range(60)], 4)
    bmi, age = np.repeat(draw.normal(22, 3, 60), 4), np.repeat(draw.normal(60, 9, 60), 4)
    vendor = np.repeat(draw.choice(["canon", "philips", "siemens"], 60), 4)
    error = 0.01 * (bmi - 22) - 0.05 * (vendor == "siemens") + draw.normal(0, 0.02, 240)
    found = error_regression(error, patients, {"age": age, "bmi": bmi}, {"vendor": vendor})
    assert found is not None
    assert found["terms"]["bmi"]["coefficient"] == pytest.approx(0.01, abs=0.002)
    assert found["terms"]["vendor[siemens]"]["coefficient"] == pytest.approx(-0.05, abs=0.02)
    assert found["joint"]["vendor"]["p"] < 1e-6
    assert found["terms"]["bmi"]["p_clustered"] < 1e-6
    assert found["reference"] == {"vendor": "canon"}
    assert error_regression(error, patients, {"bmi": bmi, "again": 2 * bmi}, {}) is None
    assert error_regression(error[:4], patients[:4], {"bmi": bmi[:4], "age": age[:4]}, {"vendor": vendor[:4]}) is None


def test_power_of_a_correlation_is_that_of_fishers_z() -> None:
    found = correlation_power(0.3, 85)  # ((1.960 + 0.842) / atanh 0.3)^2 + 3 = 84.9 for a power of 0.80
    assert found is not None
    assert found["power"] == pytest.approx(0.80, abs=0.01)
    assert found["smallest_r"] == pytest.approx(0.30, abs=0.005)


def test_groups_that_are_called_rightly_equally_often() -> None:
    right = np.tile([True, True, True, False], 30)  # a quarter wrong
    truth = np.tile([True, False], 60)
    task = Task(truth, np.where(right, truth, ~truth), truth.astype(float), {}, "TBS", np.ones(120, dtype=bool))
    toy = table(120)
    even, worse = np.tile(["a", "b"], 60), np.where(right, "good", "bad")
    groups = {"even": np.repeat(even, 4), "worse": np.repeat(worse, 4), "alone": np.repeat(["x"], 480)}
    changed = Table(toy.patients, toy.bmd, toy.tbs, toy.hu, toy.bmd_dl, toy.tbs_dl, groups)
    found = detection_tests(changed, {"tbs_impaired": task, "osteopenia": None})
    assert found["osteopenia"] is None
    tests = found["tbs_impaired"]
    assert tests["worse"]["p_bonferroni"] == pytest.approx(min(1.0, 2 * tests["worse"]["p"]))
    assert tests["worse"]["p"] < 1e-6
    assert tests["worse"]["accuracy"] == {"bad": 0.0, "good": 1.0}
    assert tests["alone"]["p"] is None


def test_the_papers_size_beside_the_whole() -> None:
    toy = table(120)
    truth, score = toy.by_patient(toy.tbs) <= 1.31, -toy.by_patient(toy.tbs_dl)
    who = np.ones(120, dtype=bool)
    found = paper_sized(toy, {"tbs_impaired": Task(truth, truth, score, {}, "TBS", who)})
    assert found is not None
    assert found["r"]["bmd"]["first"]["r"] == pytest.approx(np.corrcoef(toy.bmd[:208], toy.bmd_dl[:208])[0, 1])
    low, high = found["r"]["hu_bmd"]["range"]
    assert low < association(toy.hu, toy.bmd)["r"] < high
    assert found["auc"]["tbs_impaired"]["first"] == pytest.approx(area(truth[:52], score[:52])["auc"])
    who[3] = False  # nobody knows of the fourth: the others count all the same
    some = paper_sized(toy, {"tbs_impaired": Task(truth[who], truth[who], score[who], {}, "TBS", who)})
    assert some is not None
    first = np.flatnonzero(who)[:51]
    assert some["auc"]["tbs_impaired"]["first"] == pytest.approx(area(truth[first], score[first])["auc"])
    assert some["auc"]["tbs_impaired"]["first_positive"] == truth[first].sum()
    assert paper_sized(table(102), {}) is None
    assert np.isnan(resampled_areas(np.array([True, False]), np.array([1.0, 0.0]), np.array([[2.0, 0.0]])))


def test_gap_closed_is_the_share_of_the_way() -> None:
    assert gap_closed(0.80, 0.90, 1.00) == pytest.approx(0.5)
    assert gap_closed(0.80, 0.75, 0.90) == pytest.approx(-0.5)
    assert gap_closed(0.90, 0.95, 0.90) is None


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} in report.json")


def test_a_cohort_of_one_class_and_one_of_one_patient_give_nulls(tmp_path: Path) -> None:
    toy = table()
    alone = toy.part(toy.patients == "P3")
    for name, part in (("healthy", toy), ("alone", alone)):
        definitions = yoshida({"F": 0.5, "M": 0.5})
        figures = report(part, manifest(), definitions)
        assert figures["per_patient"]["osteoporosis"]["auc"] is None
        assert figures["per_patient"]["osteoporosis"]["defined"]["sensitivity"] is None
        document = {
            "model": "<toy>", "model_sha256": "0" * 64, "synthetic_only": True,
            "cohort": {"provenance": "digital", "seed": 1}, **figures,
        }  # fmt: skip
        write(document, part, make_tasks(part, definitions), tmp_path / name)
        text = (tmp_path / name / "report.json").read_text()
        assert json.loads(text, parse_constant=no_constant) == document
        page = (tmp_path / name / "report.html").read_text()
        assert "&lt;toy&gt;" in page
        assert_self_contained(page)
    assert figures["n_patients"] == 1
    assert figures["per_vertebra"]["bmd"]["r_ci_patient"] is None
    assert figures["regression"] == {"bmd": None, "tbs": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write({**document, "bad": float("nan")}, alone, {}, tmp_path / "bad")


def assert_self_contained(page: str) -> None:
    """No script, and nothing that a browser would fetch."""
    assert not re.search(r"<(script|link|iframe|object|embed)\b|@import|url\(|https?:|\bon\w+=", page)
    sources = re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']([^"']*)""", page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
