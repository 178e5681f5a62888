"""What the paper excludes, found in the pixels and in the outlines: each vertebra is left out with its cause.

`find` measures the bodies once and asks each room: fractures (heights), densities (metal, cement, sclerosis),
scoliosis (Cobb) and contrast medium (vessels, kidneys). It answers with values; nothing here raises for odd anatomy.
How often it is right is measured by `python -m worker.findings.evaluate` and told in models/SEGMENTATION.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from service.domain.policy import FindingsPolicy
from service.domain.reasons import Code, Reason
from service.domain.result import Heights, ReferenceHu
from worker.findings.bodies import Body, measure_bodies
from worker.findings.contrast import NATIVE, Enhancement, measure_enhancement, phase
from worker.findings.densities import Densities, measure_densities
from worker.findings.fractures import Loss, losses
from worker.findings.scoliosis import cobb_deg
from worker.findings.tissues import reference_tissues
from worker.located import Located
from worker.segmentation.base import LEVEL_IDS
from worker.volume import Volume

__all__ = ["Findings", "find"]


@dataclass(frozen=True)
class Findings:
    """Everything found on one CT; levels by name, L1 to L4."""

    heights: Mapping[str, Heights]
    exclusions: Mapping[str, tuple[Reason, ...]]
    notes: tuple[str, ...]
    refusals: tuple[Reason, ...]  # of the CT as a whole
    cobb_deg: float | None
    contrast: str | None
    reference_hu: ReferenceHu
    bodies: Mapping[int, Body] = field(default_factory=dict)  # by class id: everything that could be measured


def find(volume: Volume, located: Located, whole: Iterable[int], policy: FindingsPolicy) -> Findings:
    """Look at the vertebrae that are wholly in view (class ids): those above and below L1-L4 are rulers."""
    labels, bodies = located.labels, measure_bodies(volume.hu, located, whole)
    lost = losses(bodies)
    exclusions: dict[str, tuple[Reason, ...]] = {}
    notes: list[str] = []
    for name, label in LEVEL_IDS.items():
        if label in bodies:
            dense = measure_densities(volume.hu, volume.affine, labels, bodies[label], policy)
            foreign = _foreign(name, dense, policy)
            exclusions[name] = (*foreign, *_fracture(name, lost[label]))
            notes += _height_notes(name, lost[label])
    standing = {label: body for label, body in bodies.items() if label not in lost or not lost[label].excludes}
    angle, found = cobb_deg(standing), measure_enhancement(volume.hu, volume.affine, labels, bodies)
    contrast = phase(found, policy)
    fat, muscle = reference_tissues(volume.hu, volume.affine, labels, bodies)
    return Findings(
        heights={name: _heights(bodies[label]) for name, label in LEVEL_IDS.items() if label in bodies},
        exclusions=exclusions,
        notes=(*notes, *_surgery_notes(exclusions), *_curve_notes(angle, policy), *_contrast_notes(contrast)),
        refusals=(*_too_curved(angle, policy), *_enhanced(contrast, found)),
        cobb_deg=None if angle is None else round(angle, 1),
        contrast=contrast,
        reference_hu=ReferenceHu(_rounded(found.vessels_hu), _rounded(muscle), _rounded(fat)),
        bodies=bodies,
    )


def _rounded(hu: float | None) -> float | None:
    return None if hu is None else round(hu, 1)


def _heights(body: Body) -> Heights:
    anterior, middle, posterior = (round(height, 1) for height in body.heights_mm)
    return Heights(anterior, middle, posterior)


def _fracture(name: str, lost: Loss) -> list[Reason]:
    if not lost.excludes:
        return []
    what = f"{name} has lost {lost.loss:.0%} of its height ({lost.kind}, grade {lost.grade})"
    return [Reason(Code.FRACTURE, f"{what}, give or take {lost.error:.0%}.")]


def _height_notes(name: str, lost: Loss) -> list[str]:
    if lost.excludes or lost.grade < 1:
        return []
    return [f"{name}: {lost.loss:.0%} less height ({lost.kind}), give or take {lost.error:.0%}: not excluded."]


def _foreign(name: str, dense: Densities, policy: FindingsPolicy) -> list[Reason]:
    """Metal hides cement, and either hides sclerosis: one cause is enough."""
    if dense.metal_mm3 >= policy.metal_mm3:
        text = f"{name}: {dense.metal_mm3:.0f} mm3 above {policy.metal_hu:.0f} HU in the vertebra or close to it."
        return [Reason(Code.METAL, text)]
    if dense.cement_mm3 >= policy.cement_mm3:
        text = f"{name}: {dense.cement_mm3:.0f} mm3 above {policy.cement_hu:.0f} HU within the body."
        return [Reason(Code.CEMENT, text)]
    if dense.sclerosis_hu >= policy.sclerosis_hu:
        text = f"{name}: the bone under an endplate is {dense.sclerosis_hu:.0f} HU denser than the body's middle."
        return [Reason(Code.SCLEROSIS, text)]
    return []


def _surgery_notes(exclusions: Mapping[str, tuple[Reason, ...]]) -> list[str]:
    treated = [name for name, found in exclusions.items() if {r.code for r in found} & {Code.METAL, Code.CEMENT}]
    return [f"Signs of earlier surgery at {', '.join(treated)}."] if treated else []


def _curve_notes(angle: float | None, policy: FindingsPolicy) -> list[str]:
    if angle is None or not policy.cobb_noted_deg <= angle < policy.cobb_severe_deg:
        return []
    return [f"The spine is curved sideways: Cobb {angle:.0f} degrees."]


def _too_curved(angle: float | None, policy: FindingsPolicy) -> list[Reason]:
    if angle is None or angle < policy.cobb_severe_deg:
        return []
    limit = f"{policy.cobb_severe_deg:.0f} degrees and more are not assessed."
    return [Reason(Code.SCOLIOSIS, f"The spine is curved sideways: Cobb {angle:.0f} degrees; {limit}")]


def _contrast_notes(contrast: str | None) -> list[str]:
    return ["Vessels and kidneys are not in view: contrast medium could not be ruled out."] if contrast is None else []


def _enhanced(contrast: str | None, found: Enhancement) -> list[Reason]:
    if contrast in (None, NATIVE):
        return []
    seen = (("vessels", found.vessels_hu), ("kidneys", found.kidneys_hu))
    values = ", ".join(f"{what} {value:.0f} HU" for what, value in seen if value is not None)
    return [Reason(Code.CONTRAST_IN_PIXELS, f"The pixels show contrast medium ({contrast}: {values}).")]
