"""report.html: one file, no script, nothing fetched; its figures are those of report.json."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from models.evaluation.detection import RATES
from models.evaluation.paper import PRINTED_AUC, PRINTED_PERCENT, PRINTED_R

TASKS = {"osteopenia": "Osteopenia", "osteoporosis": "Osteoporosis", "tbs_impaired": "TBS \u2264 1.31"}
LINES = (
    ("bmd", "BMD: network"), ("hu_bmd", "BMD: CT attenuation"), ("gbm_bmd", "BMD: gradient boosting"),
    ("oracle_bmd", "BMD: oracle"), ("midline_oracle_bmd", "BMD: midline oracle"),
    ("tbs", "TBS: network"), ("hu_tbs", "TBS: CT attenuation"), ("gbm_tbs", "TBS: gradient boosting"),
    ("oracle_tbs", "TBS: oracle"), ("midline_oracle_tbs", "TBS: midline oracle"),
)  # fmt: skip
DASH = "\u2013"
MINUS = "\u2212"


@dataclass(frozen=True)
class KeyFigure:
    """One of the figures on top: ours with its interval on a strip from `low` to 1, the paper's beside it."""

    label: str
    symbol: str  # r or AUC
    value: float | None
    interval: Sequence[float] | None
    printed: float
    low: float

    def x(self, value: float) -> float:
        """Where a value lies on the strip, 0 to 100."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (1 - self.low))), 1)


def key_figures(document: Mapping[str, Any]) -> list[KeyFigure]:
    """What the page says first."""
    vertebra, patient = document["per_vertebra"], document["per_patient"]
    figures = []
    for name, label in (("bmd", "BMD with DXA, per vertebra"), ("tbs", "TBS with DXA, per vertebra")):
        found = vertebra[name] or {"r": None, "r_ci_patient": None}
        figures.append(KeyFigure(label, "r", found["r"], found["r_ci_patient"], PRINTED_R[name], 0.0))
    for name, label in (("osteopenia", "Osteopenia, per patient"), ("osteoporosis", "Osteoporosis, per patient")):
        found = patient[name] or {"auc": None, "auc_ci": None}
        figures.append(KeyFigure(label, "AUC", found["auc"], found["auc_ci"], PRINTED_AUC[name][0], 0.5))
    return figures


def page(document: Mapping[str, Any], plots: Mapping[str, bytes]) -> str:
    """The report of `document` with its plots inside."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "signed": signed, "span": span, "p": p_value, "percent": percent}
    return environment.get_template("report.html.j2").render(
        document=document,
        figures=key_figures(document),
        lines=LINES,
        tasks=_named_tasks(document),
        rates=RATES,
        printed_r=PRINTED_R,
        printed_auc=PRINTED_AUC,
        printed_percent=PRINTED_PERCENT,
        plots={name: base64.b64encode(picture).decode("ascii") for name, picture in plots.items()},
        no_tbs=no_tbs(document),
        people="digital patients" if document["cohort"]["provenance"] == "digital" else "patients of a site",
    )


def _named_tasks(document: Mapping[str, Any]) -> dict[str, str]:
    """Each task with the definition that it was judged by."""
    told = document.get("definitions") or {}
    return {name: f"{label} ({told[name]['words']})" if name in told else label for name, label in TASKS.items()}


def no_tbs(document: Mapping[str, Any]) -> str | None:
    """Why the report tells nothing of TBS; None where it does."""
    if "tbs" not in document.get("targets", ("tbs",)):
        return "TBS not measured by this model"
    return None if document["per_vertebra"]["tbs"] else "this cohort does not know TBS of every vertebra"


def number(value: float | None, digits: int = 2) -> str:
    return DASH if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:+.{digits}f}".replace("-", MINUS)


def span(values: Sequence[float] | None, digits: int = 2) -> str:
    """An interval's ends."""
    return DASH if values is None else f"{number(values[0], digits)} to {number(values[1], digits)}"


def p_value(value: float | None) -> str:
    if value is None:
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.0f}"
