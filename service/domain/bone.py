"""Bone density in relation to the young: %YAM and T-score, and the references that give them a meaning.

A reference is data (`references.toml`) with its provenance. For a digital patient it is a simulated cohort
of 20 to 44 years; for a real one it must fit device, region and sex *and* have been verified by the site.
Where none fits, %YAM and T are withheld, and the reason says why: a wrong reference is worse than none.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib import resources
from typing import Any

from service.domain.errors import ReferenceDataError
from service.domain.reasons import Code, Reason

DEVICE = "Lunar"  # the networks predict what a GE Lunar Prodigy would have measured (Yoshida 2023)
REGION = "L1-L4"
SEXES = {"F": "women", "M": "men"}


class ReferenceOrigin(StrEnum):
    """Where a reference comes from."""

    DIGITAL = "digital"  # a cohort of digital patients aged 20 to 44, made by a command of ours
    PUBLISHED = "published"


@dataclass(frozen=True, slots=True)
class Reference:
    """Mean and SD of young adults' areal lumbar BMD, and whom and what they hold for."""

    key: str
    provenance: ReferenceOrigin
    device: str
    region: str
    sex: str  # F or M
    population: str
    mean_g_cm2: float
    sd_g_cm2: float
    source: str
    model: str = ""
    verified_by_site: bool = False

    def fits(self, sex: str | None) -> bool:
        """Made for what the network predicts, in this sex."""
        return (self.device, self.region, self.sex) == (DEVICE, REGION, sex)


def percent_yam(bmd_g_cm2: float, reference: Reference) -> float:
    """BMD as a percentage of the young adult mean."""
    return 100 * bmd_g_cm2 / reference.mean_g_cm2


def t_score(bmd_g_cm2: float, reference: Reference) -> float:
    """BMD in standard deviations from the young adult mean."""
    return (bmd_g_cm2 - reference.mean_g_cm2) / reference.sd_g_cm2


@dataclass(frozen=True, slots=True)
class References:
    """Every reference at hand."""

    entries: tuple[Reference, ...]

    def verified(self, keys: Iterable[str]) -> References:
        """The same, with those that the site vouches for marked as such."""
        marked = set(keys)
        unknown = marked - {entry.key for entry in self.entries if entry.provenance is ReferenceOrigin.PUBLISHED}
        if unknown:
            raise ReferenceDataError(f"verified_references: no published reference {', '.join(sorted(unknown))}")
        return References(
            tuple(replace(entry, verified_by_site=True) if entry.key in marked else entry for entry in self.entries)
        )

    def reference_for(self, sex: str | None, *, synthetic: bool) -> Reference | Reason:
        """The reference that fits this patient, or the reason why there is none."""
        if sex not in SEXES:
            return _withheld("the patient's sex is not given as F or M")
        origin = ReferenceOrigin.DIGITAL if synthetic else ReferenceOrigin.PUBLISHED
        fitting = [entry for entry in self.entries if entry.provenance is origin and entry.fits(sex)]
        wanted = f"{SEXES[sex]}, {DEVICE}, {REGION}"
        if synthetic:
            return fitting[0] if fitting else _withheld(f"no digital young-adult cohort ({wanted}) has been made")
        verified = [entry for entry in fitting if entry.verified_by_site]
        if verified:
            return verified[0]
        if fitting:
            return _withheld(f"{', '.join(entry.key for entry in fitting)} fits, but this site has not verified it")
        return _withheld(f"no reference fits ({wanted})")


def _withheld(why: str) -> Reason:
    return Reason(Code.REFERENCE_WITHHELD, f"% YAM and T-score are withheld: {why}.")


# The data file


def load_references(toml_text: str | None = None) -> References:
    """Read a table of references; without text, the one that ships with Osteogate."""
    if toml_text is None:
        toml_text = resources.files("service.domain").joinpath("references.toml").read_text(encoding="utf-8")
    try:
        tables = tomllib.loads(toml_text)
    except tomllib.TOMLDecodeError as error:
        raise ReferenceDataError(f"references: not valid TOML: {error}") from None
    unknown = set(tables) - {origin.value for origin in ReferenceOrigin}
    if unknown:
        raise ReferenceDataError(f"references: unknown table {', '.join(sorted(unknown))}")
    return References(
        tuple(
            _reference(key, origin, entry)
            for origin in ReferenceOrigin
            for key, entry in tables.get(origin.value, {}).items()
        )
    )


def digital_section(references: Iterable[Reference]) -> str:
    """The `[digital.*]` tables of references.toml, for the command that measures the simulated cohorts."""
    tables = []
    for entry in references:
        texts = {"device": entry.device, "model": entry.model, "region": entry.region, "sex": entry.sex}
        texts |= {"population": entry.population, "source": entry.source}
        lines = [
            f"[digital.{entry.key}]",
            *(f'{name} = "{_escaped(value)}"' for name, value in texts.items()),
        ]
        lines += [f"mean_g_cm2 = {float(entry.mean_g_cm2)!r}", f"sd_g_cm2 = {float(entry.sd_g_cm2)!r}"]
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")


_TEXTS = ("device", "region", "sex", "population", "source")
_NUMBERS = ("mean_g_cm2", "sd_g_cm2")


def _reference(key: str, origin: ReferenceOrigin, entry: Any) -> Reference:
    name = f"references: {origin.value}.{key}"
    if not isinstance(entry, Mapping):
        raise ReferenceDataError(f"{name}: must be a table")
    unknown = set(entry) - {*_TEXTS, *_NUMBERS, "model"}
    missing = {*_TEXTS, *_NUMBERS} - set(entry)
    if unknown or missing:
        raise ReferenceDataError(f"{name}: unknown {sorted(unknown)}, missing {sorted(missing)}")
    if entry["sex"] not in SEXES or not all(isinstance(entry[text], str) and entry[text] for text in _TEXTS):
        raise ReferenceDataError(f"{name}: {', '.join(_TEXTS)} must be texts, sex F or M")
    numbers = [entry[number] for number in _NUMBERS]
    if not all(isinstance(number, float) and math.isfinite(number) and number > 0 for number in numbers):
        raise ReferenceDataError(f"{name}: {', '.join(_NUMBERS)} must be numbers above 0, in g/cm2")
    return Reference(key=key, provenance=origin, **entry)
