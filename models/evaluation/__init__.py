"""How good a package is: the paper's statistics on a cohort with known truth (report.json, report.html, plots).

Yoshida 2023 reports, per vertebra, Pearson's r of the network and of CT attenuation (HU, the comparator) with
BMD and TBS, and per patient the detection of osteopenia (%YAM < 80), osteoporosis (%YAM < 70) and impaired
microarchitecture (TBS <= 1.31). A patient's value is the mean over L1-L4. What a cohort can't tell is null,
never invented: %YAM needs the young-adult mean of the cohort's own scanner and population, and TBS a package that
measures it and a cohort that knows it of every vertebra. Statistics come
from scipy, statsmodels and scikit-learn.

    table        truth and estimates, a row per vertebra
    statistics   association, agreement, normality, calibration, regression, power
    tasks        what is detected per patient;  detection: ROC area, cuts, rates
    subgroups    the paper's Table 4, coverage of the prediction intervals
    comparators  gradient boosting on hand-made features, the oracle
    paper        what the paper prints, and its sample size
    plots, page  for people
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.evaluation.comparators import Comparators, compare
from models.evaluation.detection import area, detection
from models.evaluation.page import page
from models.evaluation.paper import gap_closed, paper_percent, paper_sized
from models.evaluation.plots import draw_plots
from models.evaluation.statistics import (
    agreement,
    association,
    calibration,
    correlation_power,
    distribution,
    error_regression,
)
from models.evaluation.subgroups import by_group, coverage, detection_tests
from models.evaluation.table import Array, Names, Table, told
from models.evaluation.tasks import Definition, Task, make_tasks, yoshida
from models.package import Manifest, ModelPackage
from models.readout import Readout
from models.training import Cohort, estimate_cohort, train_package

__all__ = [
    "Definition",
    "Table",
    "agreement",
    "association",
    "detection",
    "evaluate",
    "evaluate_package",
    "gap_closed",
    "paper_percent",
    "report",
    "train_package",
    "whose",
    "yoshida",
]


def evaluate(
    package: ModelPackage,
    cohort_dir: Path,
    out: Path,
    *,
    folds: tuple[int, ...] | None = None,
    definitions: Mapping[str, Definition] | None = None,
    comparators_from: Path | None = None,
) -> dict[str, Any]:
    """Judge a package on a cohort (or some of its folds); writes report.json, report.html and the plots.

    `definitions` say who has osteopenia and osteoporosis, for young adults of the population that the cohort comes
    from; without them the cohort's own cohort.json is asked, and failing that their rows stay null.
    `comparators_from` is a cohort to fit the comparators on; without it they are cross-fitted by patient.
    """
    cohort = Cohort.read(cohort_dir)
    chosen = np.arange(len(cohort.rows)) if folds is None else cohort.where(folds)
    predicted = estimate_cohort(package, cohort, chosen)
    other = None if comparators_from is None else (Cohort.read(comparators_from), comparators_from)
    comparators = compare(cohort, chosen, cohort_dir, other)
    table = make_table(cohort, chosen, predicted.astype(np.float64), comparators, Readout.of(package))
    definitions = definitions or _own_definitions(cohort)
    document = {
        "model": package.name,
        "model_sha256": package.sha256,
        "synthetic_only": package.manifest.synthetic_only,
        "targets": list(package.manifest.targets),
        "cohort": {
            "provenance": cohort.provenance,
            "seed": cohort.facts.get("seed"),
            "tbs_known": table.tbs is not None,
            "sha256": cohort.sha256,
            "folds": None if folds is None else list(folds),
            "learned_from": _learned_from(package.manifest, cohort),
        },
        **whose(cohort, chosen),
        "definitions": None if definitions is None else {name: one.to_dict() for name, one in definitions.items()},
        **report(table, package.manifest, definitions),
        "comparators": dict(comparators.account),
    }
    write(document, table, make_tasks(table, definitions), out)
    return document


def _own_definitions(cohort: Cohort) -> dict[str, Definition] | None:
    """Those that cohort.json holds; the paper's where it knows young adults alone."""
    told = cohort.facts.get("definitions")
    if told:
        return {name: Definition.from_dict(one) for name, one in told.items()}
    young_adults = cohort.facts.get("young_adult_bmd")
    return yoshida(young_adults) if young_adults else None


def _learned_from(manifest: Manifest, cohort: Cohort) -> bool:
    """Whether the package has learned from this cohort, or set its intervals by it."""
    told = manifest.training
    return cohort.sha256 in (told.get("cohort_sha256"), told.get("calibration_cohort_sha256"))


def whose(cohort: Cohort, chosen: npt.NDArray[np.int64]) -> dict[str, int]:
    """How many of the chosen patients are people, and how many digital: a gate may count people only.

    cohort.csv may say it of every row (`synthetic`, 1 or 0); where it does not, the cohort's provenance does.
    """
    digital = {row["patient_id"] for row in (cohort.rows[index] for index in chosen) if _is_digital(row, cohort)}
    return {"n_patients_real": len(set(cohort.patients[chosen]) - digital), "n_patients_synthetic": len(digital)}


def _is_digital(row: Mapping[str, str], cohort: Cohort) -> bool:
    """Whatever is not said to be a person's is not counted as one."""
    said = row.get("synthetic", "").strip().lower()
    return said not in ("0", "false") if said else cohort.provenance != "site"


def evaluate_package(
    package_path: Path,
    cohort_dir: Path,
    out: Path,
    definitions: Mapping[str, Definition] | None = None,
    comparators_from: Path | None = None,
) -> dict[str, Any]:
    """`evaluate` for a package by its folder; its files are verified first."""
    package = ModelPackage.load(package_path)
    return evaluate(package, cohort_dir, out, definitions=definitions, comparators_from=comparators_from)


def write(document: Mapping[str, Any], table: Table, tasks: Mapping[str, Task | None], out: Path) -> None:
    """report.json (strict: a NaN raises), report.html, and each plot as a PNG."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    plots = draw_plots(document, table, tasks)
    for name, picture in plots.items():
        (out / f"{name}.png").write_bytes(picture)
    (out / "report.html").write_text(page(document, plots), encoding="utf-8")


def report(
    table: Table, manifest: Manifest | None, definitions: Mapping[str, Definition] | None = None
) -> dict[str, Any]:
    """The figures of report.json; without definitions nothing is told of osteopenia and osteoporosis."""
    tasks = make_tasks(table, definitions)
    patients = len(table.first_rows)
    means = {name: told(table.by_patient, values) for name, values in _quantities(table).items()}
    per_patient: dict[str, Any] = {
        "bmd": told(agreement, means["bmd_dl"], means["bmd"]),
        "tbs": told(agreement, means["tbs_dl"], means["tbs"]),
        "hu_bmd": told(association, means["hu"], means["bmd"]),
        "hu_tbs": told(association, means["hu"], means["tbs"]),
        **_compared(table, lambda values: table.by_patient(values), None),
        **{name: None if task is None else _detected(task) for name, task in tasks.items()},
    }
    return {
        "n_patients": patients,
        "n_vertebrae": len(table.bmd),
        "per_vertebra": {
            "bmd": agreement(table.bmd_dl, table.bmd, table.patients),
            "tbs": told(agreement, table.tbs_dl, table.tbs, patients=table.patients),
            "hu_bmd": association(table.hu, table.bmd, table.patients),
            "hu_tbs": told(association, table.hu, table.tbs, patients=table.patients),
            **_compared(table, lambda values: values, table.patients),
        },
        "per_patient": per_patient,
        "subgroups": by_group(table, tasks, manifest),
        "subgroup_splits": {name: float(np.median(values[table.first_rows])) for name, values in table.numbers.items()},
        "subgroup_tests": detection_tests(table, tasks),
        "regression": _regressions(table),
        "calibration": {
            "bmd": calibration(table.bmd_dl, table.bmd),
            "tbs": told(calibration, table.tbs_dl, table.tbs),
        },
        "intervals": None if manifest is None else coverage(table, manifest),
        "power": {
            name: None if per_patient[name] is None else correlation_power(per_patient[name]["r"], patients)
            for name in ("bmd", "tbs", "hu_bmd")
        },
        "paper_sized": paper_sized(table, {name: task for name, task in tasks.items() if task is not None}),
        "distribution": {name: told(distribution, values) for name, values in _quantities(table).items()},
        "distribution_per_patient": {name: told(distribution, values) for name, values in means.items()},
    }


def _quantities(table: Table) -> dict[str, Array | None]:
    return {"bmd": table.bmd, "tbs": table.tbs, "hu": table.hu, "bmd_dl": table.bmd_dl, "tbs_dl": table.tbs_dl}


def _compared(table: Table, view: Callable[[Array], Array], patients: Names | None) -> dict[str, Any]:
    """Boosting's and the oracle's agreement with the truth, null where they were not fitted."""
    found: dict[str, Any] = {}
    for name in ("gbm_bmd", "gbm_tbs", "oracle_bmd", "oracle_tbs", "midline_oracle_bmd", "midline_oracle_tbs"):
        estimate = table.comparators.get(name)
        truth = table.bmd if name.endswith("bmd") else table.tbs
        found[name] = told(agreement, told(view, estimate), told(view, truth), patients=patients)
    return found


def _detected(task: Task) -> dict[str, Any]:
    others = {name: area(task.truth, task.others[name]) if name in task.others else None for name in _OTHERS}
    return {**detection(task.truth, task.score, task.called), "unit": task.unit, "comparators": others}


_OTHERS = ("hu", "gbm", "oracle")


def _regressions(table: Table) -> dict[str, Any]:
    """The paper's Table 5, per vertebra: the error on age, sex, BMI, vendor and, where known, the interval."""
    groups = {name: table.groups[name] for name in ("sex", "vendor") if name in table.groups}
    errors = {"bmd": table.bmd_dl - table.bmd, "tbs": told(np.subtract, table.tbs_dl, table.tbs)}
    return {
        name: None if error is None else error_regression(error, table.patients, table.numbers, groups)
        for name, error in errors.items()
    }


UNKNOWN = "unknown"  # the group of those of whom a row does not tell it: they are judged like any other group


def make_table(
    cohort: Cohort,
    chosen: npt.NDArray[np.int64],
    predicted: Array,
    comparators: Comparators | None = None,
    readout: Readout | None = None,
) -> Table:
    """The chosen vertebrae of a cohort beside their predictions [chosen, targets] (BMD g/cm2 and, maybe, TBS)."""
    rows = [cohort.rows[index] for index in chosen]
    known = [name for name in ("age", "bmi", "interval_days") if all(row.get(name) for row in rows)]
    numbers = {name: np.array([float(row[name]) for row in rows]) for name in known}  # no CT tells a BMI, for one
    patients = cohort.patients[chosen]
    told = {name: [row.get(name) for row in rows] for name in ("vendor", "sex")}
    told["scanner"] = [str(scanner) for scanner in cohort.scanners[chosen]]
    groups = {name: np.array([one or UNKNOWN for one in values]) for name, values in told.items() if any(values)}
    halves = {"age": ("young", "senior"), "bmi": ("low", "high"), "interval": ("short", "long")}
    for name, (below, above) in halves.items():
        values = numbers.get("interval_days" if name == "interval" else name)
        if values is not None:
            groups[name] = np.where(values <= _patients_median(values, patients), below, above)
    known = [name for name in ("bmd_g_cm2", "tbs", "hu") if name != "tbs" or all(row[name] for row in rows)]
    truth = {name: np.array([float(row[name]) for row in rows]) for name in known}
    return Table(
        patients=patients,
        bmd=truth["bmd_g_cm2"],
        tbs=truth.get("tbs"),
        hu=truth["hu"],
        bmd_dl=predicted[:, 0],
        tbs_dl=predicted[:, 1] if predicted.shape[1] > 1 else None,
        groups=groups,
        numbers=numbers,
        comparators={} if comparators is None else comparators.estimates,
        spread={} if readout is None else _spread(readout, predicted, cohort.scanners[chosen]),
    )


def _spread(readout: Readout, predicted: Array, scanners: Names) -> dict[str, Array]:
    return dict(zip(("bmd", "tbs"), readout.spread(predicted, scanners).T, strict=False))


def _patients_median(values: Array, patients: Names) -> float:
    """The median over patients, each counted once."""
    return float(np.median(values[np.unique(patients, return_index=True)[1]]))
