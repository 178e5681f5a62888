"""The pictures of a report, as PNG: scatter, Bland-Altman, ROC, calibration, subgroups."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from models.evaluation.paper import PRINTED_PERCENT
from models.evaluation.statistics import agreement, association
from models.evaluation.table import Array, Table
from models.evaluation.tasks import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NETWORK, COMPARED, QUIET = "#0b5563", "#b8632a", "#8d99a2"
TITLES = {"osteopenia": "Osteopenia", "osteoporosis": "Osteoporosis", "tbs_impaired": "TBS \u2264 1.31"}
STYLES: Mapping[str, tuple[str, str, str]] = {  # label, colour, line
    "network": ("network", NETWORK, "-"),
    "hu": ("CT attenuation", COMPARED, "-"),
    "gbm": ("gradient boosting", QUIET, "-"),
    "oracle": ("oracle", QUIET, ":"),
}


def draw_plots(document: Mapping[str, Any], table: Table, tasks: Mapping[str, Task | None]) -> dict[str, bytes]:
    """Each plot's PNG by name; ROC only where a task has both classes."""
    plots = {
        "scatter": _scatter(table),
        "bland_altman": _bland_altman(table),
        "calibration": _calibration(document["calibration"]),
    }
    told = {name: task for name, task in tasks.items() if task is not None and 0 < task.truth.sum() < len(task.truth)}
    if told:
        plots["roc"] = _roc(told, document["per_patient"])
    if document["subgroups"]:
        plots["subgroups"] = _subgroups(document["subgroups"])
    return plots


def _scatter(table: Table) -> bytes:
    """Estimates against truth: the network's BMD and TBS, and the comparator."""
    panels = [("Network: BMD", table.bmd, table.bmd_dl, "BMD by DXA (g/cm²)", "BMD estimated (g/cm²)", NETWORK)]
    if table.tbs is not None and table.tbs_dl is not None:
        panels.append(("Network: TBS", table.tbs, table.tbs_dl, "TBS by DXA", "TBS estimated", NETWORK))
    panels.append(("Comparator: CT attenuation", table.bmd, table.hu, "BMD by DXA (g/cm²)", "HU", COMPARED))
    figure, axes = _canvas(len(panels), (4.5 * len(panels), 4.4))
    for one, (title, x, y, x_label, y_label, colour) in zip(axes, panels, strict=True):
        r = association(y, x)["r"]
        one.scatter(x, y, s=9, alpha=_alpha(len(x)), color=colour, edgecolors="none")
        one.set(title=title if r is None else f"{title}, r = {r:.2f}", xlabel=x_label, ylabel=y_label)
        if colour == NETWORK:
            _diagonal(one, x, y)
    return _png(figure)


def _bland_altman(table: Table) -> bytes:
    """Error against the mean of estimate and truth, with the bias and the limits of agreement."""
    panels = [("BMD (g/cm²)", table.bmd_dl, table.bmd)]
    if table.tbs is not None and table.tbs_dl is not None:
        panels.append(("TBS", table.tbs_dl, table.tbs))
    figure, axes = _canvas(len(panels), (5.5 * len(panels), 4.2))
    for one, (title, estimate, truth) in zip(axes, panels, strict=True):
        one.scatter(
            (estimate + truth) / 2, estimate - truth, s=9, alpha=_alpha(len(truth)), color=NETWORK, edgecolors="none"
        )
        figures = agreement(estimate, truth)
        lines = [(figures["mean_error"], "mean", "-")]
        if figures["limits_of_agreement"] is not None:
            low, high = figures["limits_of_agreement"]
            lines += [(low, "\u22121.96 SD", "--"), (high, "+1.96 SD", "--")]
        for value, label, line in lines:
            one.axhline(value, color=COMPARED, linewidth=1.2, linestyle=line)
            text = f"{label} {value:+.3f}".replace("-", "\u2212")
            one.annotate(
                text, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 4), textcoords="offset points",
                ha="right", fontsize=9, color=COMPARED,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )  # fmt: skip
        one.set(title=f"Bland-Altman: {title}", xlabel="mean of estimate and DXA", ylabel="estimate \u2212 DXA")
    return _png(figure)


def _roc(tasks: Mapping[str, Task], per_patient: Mapping[str, Any]) -> bytes:
    """The network's curve and the comparators', Youden's cut, and the paper's point."""
    from sklearn.metrics import roc_curve

    figure, axes = _canvas(len(tasks), (4.5 * len(tasks), 4.6))
    for one, (name, task) in zip(axes, tasks.items(), strict=True):
        figures = per_patient[name]
        one.plot([0, 1], [0, 1], color="#d5dde4", linewidth=1)
        for curve, score in reversed({"network": task.score, **task.others}.items()):
            label, colour, line = STYLES[curve]
            auc = figures["auc"] if curve == "network" else figures["comparators"][curve]["auc"]
            false_rate, true_rate, _ = roc_curve(task.truth, score)
            width = 2.0 if curve == "network" else 1.2
            one.plot(false_rate, true_rate, line, color=colour, linewidth=width, label=f"{label} {auc:.3f}")
        one.plot(figures["fpr"], figures["sensitivity"], "o", color=NETWORK, markersize=7)
        printed = PRINTED_PERCENT[name]
        one.plot(
            printed[4] / 100, printed[0] / 100, "D", markerfacecolor="white", color="#16242d", markersize=6,
            label="Yoshida 2023, its cut",
        )  # fmt: skip
        one.set(
            title=TITLES[name], xlabel="1 \u2212 specificity", ylabel="sensitivity",
            xlim=(-0.02, 1), ylim=(0, 1.02), aspect="equal",
        )  # fmt: skip
        handles, labels = one.get_legend_handles_labels()
        order = [len(handles) - 2 - index for index in range(len(handles) - 1)] + [len(handles) - 1]
        one.legend(
            [handles[index] for index in order], [labels[index] for index in order],
            loc="lower right", fontsize=9, frameon=False,
        )  # fmt: skip
    return _png(figure)


def _calibration(figures: Mapping[str, Any]) -> bytes:
    """Mean truth against mean estimate in bins of equal size."""
    units = {"bmd": "BMD (g/cm²)", "tbs": "TBS"}
    known = {target: found for target in units if (found := figures[target]) is not None}
    figure, axes = _canvas(len(known), (5.5 * len(known), 4.2))
    for one, (target, found) in zip(axes, known.items(), strict=True):
        unit = units[target]
        x = np.array([part["estimate"] for part in found["bins"]])
        y = np.array([part["truth"] for part in found["bins"]])
        _diagonal(one, x, y)
        one.plot(x, y, "o", color=NETWORK, markersize=6)
        slope = "" if found["slope"] is None else f", slope {found['slope']:.2f}, intercept {found['intercept']:+.2f}"
        one.set(title=f"Calibration: {unit}{slope}", xlabel="mean estimate in the bin", ylabel="mean by DXA")
    return _png(figure)


def _subgroups(subgroups: Mapping[str, Any]) -> bytes:
    """r and mean error of every subgroup, with the intervals over patients."""
    rows = [(f"{factor}: {name}", found) for factor, groups in subgroups.items() for name, found in groups.items()]
    panels = [
        ("BMD: r", "bmd", "r", "r_ci_patient"),
        ("BMD: mean error (g/cm²)", "bmd", "mean_error", "mean_error_ci_patient"),
    ]
    if all(found["tbs"] is not None for _, found in rows):
        panels.append(("TBS: r", "tbs", "r", "r_ci_patient"))
    figure, axes = _canvas(len(panels), (4.5 * len(panels), 1.3 + 0.32 * len(rows)))
    for one, (title, target, value, interval) in zip(axes, panels, strict=True):
        for row, (_, found) in enumerate(rows):
            if found[target][value] is None:
                continue
            if found[target][interval] is not None:
                one.plot(found[target][interval], [row, row], color=NETWORK, linewidth=1.6)
            one.plot(found[target][value], row, "o", color=NETWORK, markersize=5)
        one.set(title=title, ylim=(len(rows) - 0.5, -0.5))
        one.set_yticks(range(len(rows)), [name for name, _ in rows] if one is axes[0] else [""] * len(rows))
        one.grid(axis="x", color="#eaeff2")
        if value == "mean_error":
            one.axvline(0, color=QUIET, linewidth=1)
    return _png(figure)


def _canvas(panels: int, size: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure  # heavy; only a report needs it

    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _diagonal(axes: "Axes", x: Array, y: Array) -> None:
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color=QUIET, linewidth=1, linestyle="--")


def _alpha(points: int) -> float:
    return float(np.clip(200 / points, 0.2, 0.6))


def _png(figure: "Figure") -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
