"""How often the last ribs are seen at the right vertebra, measured on digital patients.

    python -m worker.ribs_evaluate --patients 6 --first-seed 620000

draws as many patients of each kind (five, four and six lumbar bodies, short ribs on L1, no ribs at all), renders the
box around T12 to S1 on the CT's own voxels, and looks for ribs with the true outlines. Native and contrast-enhanced
CTs, slices of 3 and 1.5 mm. Development saw seeds from 610000 on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.phantom.grid import Grid
from models.phantom.patient import Patient, draw
from models.phantom.render import render
from models.phantom.scanner import scan, scanner_rng
from models.phantom.settings import Setting
from models.phantom.spine import spine_bounds
from worker.anatomy import last_ribs, measure_shapes
from worker.volume import Volume

KINDS: dict[str, dict[str, Setting]] = {
    "five lumbar bodies": {},
    "four": {"lumbar_count": 4},
    "six": {"lumbar_count": 6},
    "five, short ribs on L1": {"t13_ribs": True},
    "five, no ribs": {"ribs": False},
}
STRIDE = 100  # between the seeds of two kinds
PHASES = ("native", "arterial", "native", "portal")
BESIDE_MM, AHEAD_MM, BEHIND_MM, BELOW_MM, ABOVE_MM = 60.0, 20.0, 15.0, 20.0, 12.0


@dataclass(frozen=True)
class Seen:
    """What was seen of one patient's last ribs."""

    kind: str
    seed: int
    last: str | None


def look(kind: str, seed: int) -> Seen:
    """Render one patient and look for ribs."""
    slice_mm = 3.0 if seed % 3 else 1.5
    patient = draw(seed, slice_mm=slice_mm, contrast_phase=PHASES[seed % len(PHASES)], **KINDS[kind])
    rendered = render(patient, box(patient))
    volume = Volume(scan(rendered, patient, scanner_rng(patient)).astype(np.float32), rendered.affine)
    return Seen(kind, seed, last_ribs(volume, rendered.labels, measure_shapes(rendered.labels, volume)))


def box(patient: Patient) -> Grid:
    """T12 to S1 and what lies beside them, as much above and below as a CT of T12 to S1 shows."""
    low, high = spine_bounds(patient, "T12", "S1")
    pixel = patient.acquisition.fov_mm / 512
    return Grid.covering(
        (low[0] - BESIDE_MM, low[1] - AHEAD_MM, low[2] - BELOW_MM),
        (high[0] + BESIDE_MM, high[1] + BEHIND_MM, high[2] + ABOVE_MM),
        (patient.acquisition.slice_mm, pixel, pixel),
    )


def table(found: Sequence[Seen]) -> str:
    """Counts by kind, as Markdown."""
    lines = ["| spine | CTs | last ribs at T12 | at L1 | elsewhere | none seen |", "|---|---|---|---|---|---|"]
    for kind in KINDS:
        seen = [one.last for one in found if one.kind == kind]
        counts = [seen.count("T12"), seen.count("L1"), seen.count(None)]
        elsewhere = len(seen) - sum(counts)
        lines.append(f"| {kind} | {len(seen)} | {counts[0]} | {counts[1]} | {elsewhere} | {counts[2]} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m worker.ribs_evaluate", description=__doc__)
    parser.add_argument("--patients", type=int, default=6, help="of each kind")
    parser.add_argument("--first-seed", type=int, default=620_000)
    given = parser.parse_args(arguments)
    found = []
    for place, kind in enumerate(KINDS):
        first = given.first_seed + STRIDE * place
        for seed in range(first, first + given.patients):
            found.append(look(kind, seed))
            print(f"seed {seed}: {kind}: {found[-1].last}", flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
