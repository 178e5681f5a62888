"""Changing a patient until the simulated DXA says what was asked for."""

from __future__ import annotations

from dataclasses import replace

from scipy import optimize

from models.phantom import dxa
from models.phantom.anatomy import Patient

BMD_TOLERANCE_G_CM2, TBS_TOLERANCE = 0.005, 0.01
# the grain's standard deviation over the mean, from hardly any to trabeculae that come and go; the drawn lie within
AMPLITUDES = (0.02, 2.5)
ROUNDS = 8


def met(patient: Patient, bmd_g_cm2: float | None, tbs: float | None) -> Patient:
    """The patient whose simulated DXA meets both; ValueError names what can be reached where it can't.

    A texture that is changed for the TBS leaves the density as it was, or as it is asked for.
    """
    if tbs is not None and bmd_g_cm2 is None:
        bmd_g_cm2 = dxa.measure(patient).bmd_g_cm2
    for _ in range(ROUNDS):
        if tbs is not None:
            patient = _with_tbs(patient, tbs)
        if bmd_g_cm2 is not None:
            patient = _with_bmd(patient, bmd_g_cm2)
        if tbs is None or abs(dxa.measure(patient).tbs - tbs) <= TBS_TOLERANCE:
            return patient
    raise ValueError(f"tbs {tbs:g} and bmd_g_cm2 {bmd_g_cm2:g} cannot be met together in this patient")


def _with_bmd(patient: Patient, target: float) -> Patient:
    """Mineral everywhere times one factor: a densitometer need not answer to it in proportion, so it is asked again."""
    for _ in range(ROUNDS):
        measured = dxa.measure(patient).bmd_g_cm2
        if abs(measured - target) <= 0.5 * BMD_TOLERANCE_G_CM2:
            return patient
        patient = patient.scaled(target / measured)
    raise ValueError(f"bmd_g_cm2 {target:g} cannot be reached in this patient; {measured:.3f} can")


def _with_tbs(patient: Patient, target: float) -> Patient:
    """Finer or coarser relief of the trabeculae: the simulated TBS falls as its amplitude grows."""

    def miss(amplitude: float) -> float:
        return dxa.measure(_grained(patient, amplitude)).tbs - target

    smooth, rough = (miss(amplitude) for amplitude in AMPLITUDES)
    if smooth < 0 or rough > 0:
        reach = f"{target + rough:.2f} to {target + smooth:.2f}"
        raise ValueError(f"tbs must be {reach} in this patient (seed {patient.seed}), not {target:g}")
    return _grained(patient, float(optimize.brentq(miss, *AMPLITUDES, xtol=1e-3, rtol=1e-3)))


def _grained(patient: Patient, amplitude: float) -> Patient:
    texture = replace(patient.bone.texture, amplitude=amplitude)
    return replace(patient, bone=replace(patient.bone, texture=texture))
