"""The curves of a training run as drawings: pure geometry, drawn by the template."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.workflow.training import EpochLine

WIDTH, HEIGHT = 640.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 12.0, 30.0
TONES = 6  # colours that the stylesheet has


@dataclass(frozen=True, slots=True)
class Line:
    """One network's curve: the points of an SVG polyline."""

    label: str
    points: str
    tone: int
    dashed: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """A number on an axis and where it stands (pixels)."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One drawing; `summary` tells in words what it shows."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    summary: str
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def charts(epochs: Sequence[EpochLine]) -> tuple[Chart, ...]:
    """Loss and correlation over the epochs; none before the first epoch is complete."""
    if not epochs:
        return ()
    last = epochs[-1]
    loss = _chart(
        "Loss (Huber, standard deviations)",
        epochs,
        {"validation": lambda one: one.validation_loss, "training": lambda one: one.training_loss},
        summary=f"Validation loss of {last.network} after epoch {last.epoch}: {last.validation_loss:.3f}",
        low=0.0,
        high=None,
    )
    told = [f"{name} {value:.2f}" for name, value in (("BMD", last.bmd_r), ("TBS", last.tbs_r)) if value is not None]
    r = _chart(
        "Correlation on validation patients (r)",
        epochs,
        {"BMD": lambda one: one.bmd_r, "TBS": lambda one: one.tbs_r},
        summary=f"r of {last.network} after epoch {last.epoch}: {', '.join(told) or 'not known'}",
        low=None,
        high=1.0,
    )
    return loss, r


def _chart(
    title: str,
    epochs: Sequence[EpochLine],
    values: dict[str, Callable[[EpochLine], float | None]],
    *,
    summary: str,
    low: float | None,
    high: float | None,
) -> Chart:
    networks = list(dict.fromkeys(one.network for one in epochs))
    known = [value for one in epochs for get in values.values() if (value := get(one)) is not None]
    bottom = min([0.0, *known]) if low is None else low
    top = (max(known, default=1.0) if high is None else high) or 1.0
    most = max(max(one.epoch for one in epochs), 2)

    def x(epoch: int) -> float:
        return LEFT + (epoch - 1) / (most - 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = (value - bottom) / ((top - bottom) or 1.0)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for number, network in enumerate(networks):
        for place, (name, get) in enumerate(values.items()):
            own = [(x(one.epoch), get(one)) for one in epochs if one.network == network]
            points = " ".join(f"{at:.1f},{y(value)}" for at, value in own if value is not None)
            if points:
                label = name if len(networks) == 1 else f"{network} {name}"
                lines.append(Line(label, points, number % TONES, dashed=place > 0))
    steps = [bottom + part * (top - bottom) for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
    y_ticks = tuple(Tick(y(value), f"{value:.2f}") for value in steps)
    shown = sorted({1, *(math.ceil(most * part / 4) for part in (1, 2, 3)), most})
    return Chart(title, tuple(lines), tuple(Tick(x(one), str(one)) for one in shown), y_ticks, summary)
