"""`phantom report`: how like the paper's patients a digital cohort is, printed figure beside digital figure.

The phantom was set to meet these figures (Yoshida 2023, doi 10.1097/RCT.0000000000001437), so the report proves no
more than that it was set well; it says how hard the digital task is, so that what a network reaches on it can be read
beside the paper's result. Targets: location and spread within 10 %, correlations of the comparator within what issue
and paper allow.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from scipy import stats

Array = npt.NDArray[np.float64]
TEMPLATE = "calibration.html.j2"


@dataclass(frozen=True)
class Row:
    """One figure: the paper's, the cohort's, and how far apart they may be."""

    name: str
    unit: str
    printed: float
    digital: float
    tolerance: float | None  # absolute; None: shown, not asked for

    @property
    def within(self) -> bool | None:
        """Whether the digital figure is as near as asked."""
        return None if self.tolerance is None else abs(self.digital - self.printed) <= self.tolerance


def report(cohort: Path, out: Path) -> dict[str, Any]:
    """Write calibration.json, calibration.png and calibration.html for a cohort folder; returns the document.

    Raises:
        ValueError: the cohort is too small to have a spread.
    """
    with (cohort / "cohort.csv").open(newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    if len(table) < 40:
        raise ValueError(f"{cohort} holds {len(table)} vertebrae: too few to be compared with a cohort of 402 patients")
    facts = json.loads((cohort / "cohort.json").read_text(encoding="utf-8"))
    document = {
        "cohort": facts,
        "patients": len({row["patient_id"] for row in table}),
        "vertebrae": len(table),
        "rows": [asdict(row) | {"within": row.within} for row in rows(table)],
    }
    out.mkdir(parents=True, exist_ok=True)
    picture = plots_png(table)
    (out / "calibration.json").write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (out / "calibration.png").write_bytes(picture)
    (out / "calibration.html").write_text(_page(document), encoding="utf-8")
    return document


def rows(table: Sequence[Mapping[str, str]]) -> list[Row]:
    """Every figure that the paper prints of its cohort, beside the digital one."""
    bmd, tbs, hu = (_numbers(table, name) for name in ("bmd_g_cm2", "tbs", "hu"))
    patients = list({row["patient_id"]: row for row in table}.values())
    age, bmi, days = (_numbers(patients, name) for name in ("age", "bmi", "interval_days"))
    vendors = np.array([row["vendor"] for row in patients])
    men = float(np.mean([row["sex"] == "M" for row in patients]))
    mean_bmd, mean_tbs, mean_hu = (_by_patient(table, name) for name in ("bmd_g_cm2", "tbs", "hu"))
    found = [
        Row("BMD, mean per vertebra", "g/cm2", 1.02, float(bmd.mean()), 0.102),
        Row("BMD, SD per vertebra", "g/cm2", 0.22, float(bmd.std(ddof=1)), 0.022),
        Row("TBS, mean per vertebra", "", 1.36, float(tbs.mean()), 0.136),
        Row("TBS, SD per vertebra", "", 0.13, float(tbs.std(ddof=1)), 0.013),
        Row("CT attenuation, mean per vertebra", "HU", 132, float(hu.mean()), 13.2),
        Row("CT attenuation, SD per vertebra", "HU", 58, float(hu.std(ddof=1)), 5.8),
        Row("r of CT attenuation with BMD", "", 0.60, float(stats.pearsonr(hu, bmd).statistic), 0.07),
        Row("r of CT attenuation with TBS", "", 0.25, float(stats.pearsonr(hu, tbs).statistic), 0.10),
        Row("BMD, SD per patient", "g/cm2", 0.20, float(mean_bmd.std(ddof=1)), None),
        Row("TBS, SD per patient", "", 0.11, float(mean_tbs.std(ddof=1)), None),
        Row("CT attenuation, SD per patient", "HU", 56, float(mean_hu.std(ddof=1)), None),
        Row("TBS <= 1.31, share of patients", "", 15 / 52, float(np.mean(mean_tbs <= 1.31)), None),
        Row("age, median", "years", 63, float(np.median(age)), 4),
        Row("age, lower quartile", "years", 49, float(np.percentile(age, 25)), 5),
        Row("age, upper quartile", "years", 71, float(np.percentile(age, 75)), 4),
        Row("men, share", "", 0.23, men, 0.06),
        Row("BMI, median", "kg/m2", 21.9, float(np.median(bmi)), 0.6),
        Row("CT to DXA, median", "days", 49, float(np.median(days)), 15),
        Row("CT to DXA, lower quartile", "days", 9, float(np.percentile(days, 25)), 5),
        Row("CT to DXA, upper quartile", "days", 121, float(np.percentile(days, 75)), 20),
    ]
    shares = {"canon": 173, "siemens": 136, "philips": 93}
    return found + [
        Row(f"{name.capitalize()}, share", "", count / 402, float(np.mean(vendors == name)), 0.06)
        for name, count in shares.items()
    ]


def plots_png(table: Sequence[Mapping[str, str]]) -> bytes:
    """Six panels: three distributions with the printed mean and SD, age, and the comparator against BMD and TBS."""
    from matplotlib.figure import Figure  # heavy; only a report needs it

    bmd, tbs, hu = (_numbers(table, name) for name in ("bmd_g_cm2", "tbs", "hu"))
    age = _numbers(list({row["patient_id"]: row for row in table}.values()), "age")
    figure = Figure(figsize=(13.5, 7.6), layout="constrained")
    axes = figure.subplots(2, 3)
    panels = (
        (bmd, "BMD (g/cm²)", 1.02, 0.22),
        (tbs, "TBS (simulated)", 1.36, 0.13),
        (hu, "CT attenuation (HU)", 132, 58),
    )
    for one, (values, label, mean, sd) in zip(axes[0], panels, strict=True):
        one.hist(values, bins=40, color="#0b5563", alpha=0.75, density=True, label="digital")
        x = np.linspace(mean - 3.2 * sd, mean + 3.2 * sd, 200)
        one.plot(x, stats.norm.pdf(x, mean, sd), color="#b8632a", label="printed mean and SD, as a normal curve")
        one.set(xlabel=label, yticks=[])
    axes[0][0].set_ylim(top=1.25 * axes[0][0].get_ylim()[1])
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    for one, values, label, printed in (
        (axes[1][0], bmd, "BMD (g/cm²)", 0.60),
        (axes[1][1], tbs, "TBS (simulated)", 0.25),
    ):
        one.scatter(values, hu, s=5, alpha=0.35, color="#0b5563", edgecolors="none")
        r = stats.pearsonr(hu, values).statistic
        one.set(xlabel=label, ylabel="CT attenuation (HU)", title=f"digital r {r:.2f}, printed {printed:.2f}")
    axes[1][2].hist(age, bins=24, color="#0b5563", alpha=0.75)
    for quartile in (49, 63, 71):
        axes[1][2].axvline(quartile, color="#b8632a")
    axes[1][2].set(xlabel="age (years); printed quartiles", yticks=[])
    for one in axes.ravel():
        one.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def _page(document: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    return environment.get_template(TEMPLATE).render(document=document)


def _figure(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.3g}"


def _numbers(table: Sequence[Mapping[str, str]], name: str) -> Array:
    return np.array([float(row[name]) for row in table])


def _by_patient(table: Sequence[Mapping[str, str]], name: str) -> Array:
    patients = np.array([row["patient_id"] for row in table])
    values = _numbers(table, name)
    return np.array([values[patients == patient].mean() for patient in dict.fromkeys(patients)])
