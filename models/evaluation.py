"""How good a package is: the paper's statistics on a cohort with known truth (report.json, report.html).

Yoshida 2023 reports, per vertebra, Pearson's r of the network and of CT attenuation (HU, the comparator) with
BMD and TBS, and per patient the detection of osteopenia (%YAM < 80), osteoporosis (%YAM < 70) and impaired
microarchitecture (TBS <= 1.31). A patient's value is the mean over L1-L4. What a cohort can't tell is null,
never invented: %YAM needs the young-adult mean of the cohort's own scanner and population. Statistics come
from scipy and scikit-learn.
"""

import base64
import html
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from models.inputs import InputConfig
from models.package import Manifest, ModelPackage
from models.resnet50 import load_network
from models.training import Cohort, predict_cohort, train_package

__all__ = ["Table", "evaluate", "evaluate_package", "report", "train_package"]

Array = npt.NDArray[np.float64]

TBS_IMPAIRED = 1.31  # Yoshida 2023: TBS <= 1.31
OSTEOPENIA_YAM = 80.0  # Yoshida 2023: %YAM < 80
OSTEOPOROSIS_YAM = 70.0  # Yoshida 2023: %YAM < 70
BOOTSTRAP = 1000


@dataclass(frozen=True)
class Table:
    """Truth and estimates, a row per vertebra."""

    patients: npt.NDArray[np.str_]
    bmd: Array  # g/cm2, truth
    tbs: Array
    hu: Array
    bmd_dl: Array  # the network
    tbs_dl: Array
    groups: Mapping[str, npt.NDArray[np.str_]]  # vendor, sex, age, bmi: the subgroup of each vertebra

    def by_patient(self, values: Array) -> Array:
        """The mean over each patient's vertebrae, in order of first appearance."""
        return np.array([values[self.patients == patient].mean() for patient in dict.fromkeys(self.patients)])


def evaluate(
    package: ModelPackage,
    cohort_dir: Path,
    out: Path,
    *,
    folds: tuple[int, ...] | None = None,
    young_adult_bmd: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Judge a package on a cohort (or some of its folds); writes report.json, report.html and scatter.png.

    `young_adult_bmd` is the young-adult mean BMD by sex ("F", "M") of the population that the cohort comes
    from; without it the cohort's own cohort.json is asked, and failing that the %YAM rows stay null.
    """
    cohort = Cohort.read(cohort_dir)
    chosen = np.arange(len(cohort.rows)) if folds is None else cohort.where(folds)
    config = InputConfig.from_dict(package.manifest.input)
    device = torch.device("cpu")
    predicted = predict_cohort(load_network(package, device), cohort, chosen, config, "fp32", device)
    table = _table(cohort, chosen, predicted.astype(np.float64))
    references = young_adult_bmd or cohort.facts.get("young_adult_bmd")
    sexes = np.array([cohort.rows[index]["sex"] for index in chosen])
    document = {
        "model": package.name,
        "model_sha256": package.sha256,
        "synthetic_only": package.manifest.synthetic_only,
        "cohort": {"provenance": cohort.provenance, "seed": cohort.facts.get("seed")},
        **report(table, package.manifest, _yam(table, sexes, references)),
    }
    out.mkdir(parents=True, exist_ok=True)
    picture = scatter_png(table)
    (out / "report.json").write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (out / "scatter.png").write_bytes(picture)
    (out / "report.html").write_text(_page(document, picture), encoding="utf-8")
    return document


def evaluate_package(
    package_path: Path, cohort_dir: Path, out: Path, young_adult_bmd: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """`evaluate` for a package by its folder; its files are verified first."""
    return evaluate(ModelPackage.load(package_path), cohort_dir, out, young_adult_bmd=young_adult_bmd)


def report(table: Table, manifest: Manifest | None, yam: tuple[Array, Array] | None) -> dict[str, Any]:
    """The figures of report.json. `yam` is (true, estimated) %YAM per patient."""
    tbs_true, tbs_seen = table.by_patient(table.tbs), table.by_patient(table.tbs_dl)
    low: dict[str, Any] = {"osteopenia": None, "osteoporosis": None}
    if yam is not None:
        low = {
            "osteopenia": detection(yam[0] < OSTEOPENIA_YAM, -yam[1]),
            "osteoporosis": detection(yam[0] < OSTEOPOROSIS_YAM, -yam[1]),
        }
    return {
        "n_patients": len(set(table.patients)),
        "n_vertebrae": len(table.bmd),
        "per_vertebra": {
            "bmd": agreement(table.bmd_dl, table.bmd),
            "tbs": agreement(table.tbs_dl, table.tbs),
            "hu_bmd": association(table.hu, table.bmd),
            "hu_tbs": association(table.hu, table.tbs),
            "gbm_bmd": None,
            "gbm_tbs": None,
        },
        "per_patient": {
            "bmd": agreement(table.by_patient(table.bmd_dl), table.by_patient(table.bmd)),
            "tbs": agreement(tbs_seen, tbs_true),
            "hu_bmd": association(table.by_patient(table.hu), table.by_patient(table.bmd)),
            **low,
            "tbs_impaired": detection(tbs_true <= TBS_IMPAIRED, -tbs_seen),
        },
        "subgroups": {name: _by_group(table, groups) for name, groups in table.groups.items()},
        "intervals": None if manifest is None else _coverage(table, manifest),
        "distribution": {
            name: {"mean": float(values.mean()), "sd": float(values.std(ddof=1)) if len(values) > 1 else None}
            for name, values in (
                ("bmd", table.bmd), ("tbs", table.tbs), ("hu", table.hu),
                ("bmd_dl", table.bmd_dl), ("tbs_dl", table.tbs_dl),
            )
        },
    }  # fmt: skip


def association(estimate: Array, truth: Array) -> dict[str, Any]:
    """Pearson's r with its 95 % interval (Fisher z) and p; null where it is undefined."""
    if len(truth) < 4 or np.ptp(estimate) == 0 or np.ptp(truth) == 0:
        return {"n": len(truth), "r": None, "r_ci": None, "p": None}
    result = stats.pearsonr(estimate, truth)
    interval = result.confidence_interval(0.95)
    return {
        "n": len(truth),
        "r": float(result.statistic),
        "r_ci": [float(interval.low), float(interval.high)],
        "p": float(result.pvalue),
    }


def agreement(estimate: Array, truth: Array) -> dict[str, Any]:
    """Association, and the error's mean, spread and paired t test (estimate minus truth)."""
    error = estimate - truth
    test = stats.ttest_rel(estimate, truth) if len(truth) > 1 and np.ptp(error) > 0 else None
    return {
        **association(estimate, truth),
        "mean_error": float(error.mean()),
        "sd_error": float(error.std(ddof=1)) if len(error) > 1 else None,
        "mean_absolute_error": float(np.abs(error).mean()),
        "t_test_p": None if test is None else float(test.pvalue),
    }


def detection(truth: npt.NDArray[np.bool_], score: Array) -> dict[str, Any]:
    """ROC area with a patient-bootstrap interval, and the rates at Youden's cut; null with one class only."""
    positives = int(truth.sum())
    counts = {"n": len(truth), "n_positive": positives}
    if positives in (0, len(truth)):
        return {**counts, "auc": None, "auc_ci": None, "sensitivity": None, "specificity": None}
    false_rate, true_rate, cuts = roc_curve(truth, score)
    best = int(np.argmax(true_rate - false_rate))
    called = score >= cuts[best]
    tp, fn = int((called & truth).sum()), int((~called & truth).sum())
    fp, tn = int((called & ~truth).sum()), int((~called & ~truth).sum())
    return {
        **counts,
        "auc": float(roc_auc_score(truth, score)),
        "auc_ci": _bootstrap_auc(truth, score),
        "cut": float(-cuts[best]) if np.isfinite(cuts[best]) else None,
        "tp": tp, "fn": fn, "fp": fp, "tn": tn,
        "sensitivity": tp / (tp + fn),
        "specificity": tn / (tn + fp),
        "ppv": tp / (tp + fp) if tp + fp else None,
        "npv": tn / (tn + fn) if tn + fn else None,
        "accuracy": (tp + tn) / len(truth),
    }  # fmt: skip


def _bootstrap_auc(truth: npt.NDArray[np.bool_], score: Array) -> list[float]:
    """95 % percentile interval over resampled patients; resamples that lost a class are left out.

    A resample is a number of copies of each patient, so its area is a weighted mean over the pairs of a
    positive and a negative patient: one if the positive scores higher, one half for a tie.
    """
    draw = np.random.default_rng(0)
    copies = draw.multinomial(len(truth), np.full(len(truth), 1 / len(truth)), size=BOOTSTRAP).astype(float)
    wins = np.sign(score[truth][:, None] - score[~truth][None, :]) / 2 + 0.5  # [positives, negatives]
    positive, negative = copies[:, truth], copies[:, ~truth]
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    areas = ((positive @ wins) * negative).sum(axis=1)[pairs > 0] / pairs[pairs > 0]
    low, high = np.percentile(areas, [2.5, 97.5])
    return [float(low), float(high)]


def _by_group(table: Table, groups: npt.NDArray[np.str_]) -> dict[str, Any]:
    """Correlations within each subgroup (the paper's Table 4)."""
    found = {}
    for name in sorted(set(groups)):
        part = groups == name
        found[str(name)] = {
            "bmd": agreement(table.bmd_dl[part], table.bmd[part]),
            "tbs": agreement(table.tbs_dl[part], table.tbs[part]),
            "hu_bmd": association(table.hu[part], table.bmd[part]),
        }
    return found


def _coverage(table: Table, manifest: Manifest) -> dict[str, Any]:
    """Share of true values inside the package's prediction intervals."""
    one = manifest.interval(1)
    counts = [int((table.patients == patient).sum()) for patient in dict.fromkeys(table.patients)]
    bmd_half = np.array([manifest.interval(count).bmd_g_cm2 for count in counts])
    tbs_half = np.array([manifest.interval(count).tbs for count in counts])
    bmd_error = np.abs(table.by_patient(table.bmd_dl - table.bmd))
    tbs_error = np.abs(table.by_patient(table.tbs_dl - table.tbs))
    return {
        "level": manifest.interval_level,
        "bmd_coverage": float((np.abs(table.bmd_dl - table.bmd) <= one.bmd_g_cm2).mean()),
        "tbs_coverage": float((np.abs(table.tbs_dl - table.tbs) <= one.tbs).mean()),
        "patient_bmd_coverage": float((bmd_error <= bmd_half).mean()),
        "patient_tbs_coverage": float((tbs_error <= tbs_half).mean()),
    }


def _table(cohort: Cohort, chosen: npt.NDArray[np.int64], predicted: Array) -> Table:
    rows = [cohort.rows[index] for index in chosen]
    numbers: Callable[[str], Array] = lambda name: np.array([float(row[name]) for row in rows])  # noqa: E731
    age, bmi = numbers("age"), numbers("bmi")
    return Table(
        patients=cohort.patients[chosen],
        bmd=numbers("bmd_g_cm2"),
        tbs=numbers("tbs"),
        hu=numbers("hu"),
        bmd_dl=predicted[:, 0],
        tbs_dl=predicted[:, 1],
        groups={
            "vendor": np.array([row["vendor"] for row in rows]),
            "sex": np.array([row["sex"] for row in rows]),
            "age": np.where(age <= np.median(age), "young", "senior"),
            "bmi": np.where(bmi <= np.median(bmi), "low", "high"),
        },
    )


def _yam(
    table: Table, sexes: npt.NDArray[np.str_], references: Mapping[str, float] | None
) -> tuple[Array, Array] | None:
    """(true, estimated) %YAM per patient; None without a reference for every sex in the cohort."""
    if references is None or not set(sexes) <= set(references):
        return None
    reference = table.by_patient(np.array([float(references[sex]) for sex in sexes]))
    true = 100.0 * table.by_patient(table.bmd) / reference
    return true, 100.0 * table.by_patient(table.bmd_dl) / reference


# ---------------------------------------------------------------------------------------------------
# For people


def scatter_png(table: Table) -> bytes:
    """Estimates against truth: the network's BMD and TBS, and the comparator."""
    from matplotlib.figure import Figure  # heavy; only a report needs it

    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    panels = (
        ("Network: BMD", table.bmd, table.bmd_dl, "BMD by DXA (g/cm²)", "BMD estimated (g/cm²)", True),
        ("Network: TBS", table.tbs, table.tbs_dl, "TBS by DXA (simulated)", "TBS estimated", True),
        ("Comparator: CT attenuation", table.bmd, table.hu, "BMD by DXA (g/cm²)", "HU", False),
    )
    for axes, (title, x, y, x_label, y_label, same_units) in zip(figure.subplots(1, 3), panels, strict=True):
        r = association(y, x)["r"]
        axes.scatter(x, y, s=9, alpha=0.55, color="#1f5c8b", edgecolors="none")
        axes.set(title=title if r is None else f"{title}, r = {r:.2f}", xlabel=x_label, ylabel=y_label)
        if same_units:
            ends = [min(x.min(), y.min()), max(x.max(), y.max())]
            axes.plot(ends, ends, color="#999999", linewidth=1, linestyle="--")
        axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _page(document: Mapping[str, Any], picture: bytes) -> str:
    """A page in one file, without script."""
    vertebra, patient = document["per_vertebra"], document["per_patient"]
    rows = [
        ("BMD, network", vertebra["bmd"]),
        ("TBS, network", vertebra["tbs"]),
        ("HU with BMD", vertebra["hu_bmd"]),
        ("HU with TBS", vertebra["hu_tbs"]),
        ("BMD, network, patient mean", patient["bmd"]),
        ("TBS, network, patient mean", patient["tbs"]),
    ]
    correlations = "".join(
        f"<tr><td>{name}</td><td>{one['n']}</td><td>{_number(one['r'])}</td><td>{_pair(one['r_ci'])}</td>"
        f"<td>{_number(one.get('mean_error'), 4)}</td></tr>"
        for name, one in rows
    )
    detections = "".join(
        f"<tr><td>{name}</td><td>{_number(one and one['auc'])}</td><td>{_pair(one and one['auc_ci'])}</td>"
        f"<td>{_number(one and one['sensitivity'])}</td><td>{_number(one and one['specificity'])}</td></tr>"
        for name, one in (
            ("Osteopenia (%YAM &lt; 80)", patient["osteopenia"]),
            ("Osteoporosis (%YAM &lt; 70)", patient["osteoporosis"]),
            ("TBS &le; 1.31", patient["tbs_impaired"]),
        )
    )
    covered = document["intervals"]
    coverage = "" if covered is None else (
        f"<p>{covered['level']:.0%} intervals cover {covered['bmd_coverage']:.1%} of vertebrae for BMD and "
        f"{covered['tbs_coverage']:.1%} for TBS.</p>"
    )  # fmt: skip
    kind = "digital patients" if document["cohort"]["provenance"] == "digital" else "patients of a site"
    encoded = base64.b64encode(picture).decode("ascii")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation of {html.escape(document["model"])}</title>
<style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1b2733}}
table{{border-collapse:collapse;margin:1rem 0}}
td,th{{padding:.3rem .9rem;border-bottom:1px solid #d5dde4;text-align:left}}
td+td{{font-variant-numeric:tabular-nums}}img{{max-width:100%}}.note{{color:#5b6b79}}
</style></head><body>
<h1>Evaluation of {html.escape(document["model"])}</h1>
<p class="note">Investigational, not a medical device; confirm with DXA. {document["n_patients"]} {kind},
{document["n_vertebrae"]} vertebrae. TBS is simulated where the patients are digital.</p>
<img alt="Estimates against truth" src="data:image/png;base64,{encoded}">
<h2>Correlation with DXA</h2>
<table><tr><th></th><th>n</th><th>r</th><th>95 % interval</th><th>mean error</th></tr>{correlations}</table>
<h2>Detection per patient</h2>
<table><tr><th></th><th>AUC</th><th>95 % interval</th><th>sensitivity</th><th>specificity</th></tr>
{detections}</table>
{coverage}<p class="note">A dash: this cohort can't tell. Method after Yoshida et al. 2023,
doi 10.1097/RCT.0000000000001437.</p></body></html>
"""


def _number(value: float | None, digits: int = 3) -> str:
    return "&ndash;" if value is None else f"{value:.{digits}f}"


def _pair(values: list[float] | None) -> str:
    return "&ndash;" if values is None else f"{values[0]:.3f} to {values[1]:.3f}"
