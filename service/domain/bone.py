"""Bone density in relation to the young: %YAM and T-score, and the references that give them a meaning.

A reference is data with provenance: one TOML file per source in `references/`, and a site's own files in the same
form. For a digital patient it is a simulated cohort of 20 to 44 years; for a real one it must fit device, region and
sex *and* have been verified and chosen by the site. Where none is in force, %YAM and T are withheld, and the reason
says why: a wrong reference is worse than none.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Any

from service.domain.errors import ReferenceDataError

DEVICE = "Lunar"  # what the shipped networks predict: what a GE Lunar Prodigy would have measured (Yoshida 2023)
# Makers, as DXA results name them (`service.domain.dxa.manufacturer_named`), and the device of a reference for each.
DENSITOMETERS = {"GE Lunar": DEVICE, "Hologic": "Hologic", "Norland": "Norland"}
REGION = "L1-L4"
REGION_LEVELS = {REGION: ("L1", "L2", "L3", "L4"), "L2-L4": ("L2", "L3", "L4")}
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
    ages: str
    population: str
    mean_g_cm2: float
    sd_g_cm2: float
    source: str
    version: str  # of this entry: another one for other numbers
    model: str = ""
    verified_by_site: bool = False
    verified_by: str = ""
    verified_on: date | None = None

    @property
    def words(self) -> str:
        """The authority behind %YAM and T, as it stands beside them."""
        device = f"{self.device} {self.model}".strip()
        told = f"{self.key}, version {self.version}: {self.population}, {SEXES[self.sex]}, ages {self.ages}, "
        told += f"{self.region}, {device}; {self.source}"
        if not self.verified_by_site:
            return told
        return f"{told}; verified by {self.verified_by} on {self.verified_on:%Y-%m-%d}"

    @property
    def holds_for(self) -> tuple[object, ...]:
        """All that makes it this reference and no other, its verification aside."""
        numbers = (self.mean_g_cm2, self.sd_g_cm2)
        return (self.key, self.provenance, self.device, self.model, self.region, self.sex, *numbers)


def percent_yam(bmd_g_cm2: float, reference: Reference) -> float:
    """BMD as a percentage of the young adult mean."""
    return 100 * bmd_g_cm2 / reference.mean_g_cm2


def t_score(bmd_g_cm2: float, reference: Reference) -> float:
    """BMD in standard deviations from the young adult mean."""
    return (bmd_g_cm2 - reference.mean_g_cm2) / reference.sd_g_cm2


def reference_words(document: Mapping[str, Any]) -> str | None:
    """The reference behind %YAM and T of a result document, in words; None where they are withheld."""
    used = document["patient"].get("reference")
    return None if used is None else str(used["text"])


# Which reference may be used for whom


def misfits(reference: Reference, sex: str, regions: Sequence[str], device: str = DEVICE) -> tuple[str, ...]:
    """Why this reference may not be chosen for people of one sex, under criteria for these regions, for this device."""
    found = []
    if reference.provenance is not ReferenceOrigin.PUBLISHED:
        found.append("it is a cohort of digital patients, which says nothing about people")
    if reference.device != device:
        found.append(f"it is for {reference.device}, and this site's BMD is {device}'s")
    if reference.region not in regions:
        found.append(f"it is for {reference.region}, and the criteria allow {' or '.join(regions)}")
    if reference.sex != sex:
        found.append(f"it is for {SEXES[reference.sex]}, not for {SEXES[sex]}")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class References:
    """Every reference at hand."""

    entries: tuple[Reference, ...]

    def named(self, key: str) -> Reference | None:
        """The reference of this key; None where there is none."""
        return next((entry for entry in self.entries if entry.key == key), None)

    def digital(self, sex: str) -> Reference | None:
        """The simulated cohort that a digital patient of this sex is compared with."""
        origin = ReferenceOrigin.DIGITAL
        made = (entry for entry in self.entries if entry.provenance is origin and entry.sex == sex)
        return next((entry for entry in made if (entry.device, entry.region) == (DEVICE, REGION)), None)

    def digital_young_adults(self) -> dict[str, Reference]:
        """The simulated cohorts by sex."""
        found = {sex: self.digital(sex) for sex in SEXES}
        return {sex: entry for sex, entry in found.items() if entry is not None}

    def fitting(self, sex: str, regions: Sequence[str], device: str = DEVICE) -> tuple[Reference, ...]:
        """The published ones that a site could verify and choose for patients of this sex."""
        return tuple(entry for entry in self.entries if not misfits(entry, sex, regions, device))


# The data files


def load_references(site_files: Mapping[str, str] | None = None) -> References:
    """The references that ship with Osteogate, and a site's own (file name -> TOML text).

    A site's entry under a shipped key is that entry verified: it must hold the same numbers.

    Raises:
        ReferenceDataError: a file is damaged, or a site's entry contradicts a shipped one.
    """
    entries = dict(_shipped())
    own: set[str] = set()
    for name, text in sorted((site_files or {}).items()):
        for entry in read_references(text, name):
            _check_site_entry(name, entry, entries.get(entry.key), own)
            own.add(entry.key)
            entries[entry.key] = entry
    return References(tuple(entries.values()))


@cache
def _shipped() -> tuple[tuple[str, Reference], ...]:
    folder = resources.files("service.domain").joinpath("references")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    found = [entry for file in files for entry in read_references(file.read_text(encoding="utf-8"), file.name)]
    return tuple((entry.key, entry) for entry in found)


def _check_site_entry(name: str, entry: Reference, shipped: Reference | None, own: set[str]) -> None:
    where = f"references: {name}: {entry.key}"
    if entry.provenance is ReferenceOrigin.DIGITAL:
        raise ReferenceDataError(f"{where}: digital cohorts ship with Osteogate, a site has none of its own")
    if entry.key in own:
        raise ReferenceDataError(f"{where}: stands in two files of this site")
    if shipped is not None and shipped.holds_for != entry.holds_for:
        raise ReferenceDataError(f"{where}: ships with Osteogate with other values; give yours a key of its own")


def read_references(toml_text: str, name: str = "text") -> tuple[Reference, ...]:
    """The entries of one file; `name` tells people which.

    Raises:
        ReferenceDataError: what in the file cannot be used.
    """
    try:
        tables = tomllib.loads(toml_text)
    except tomllib.TOMLDecodeError as error:
        raise ReferenceDataError(f"references: {name}: not valid TOML: {error}") from None
    unknown = set(tables) - {origin.value for origin in ReferenceOrigin}
    if unknown:
        raise ReferenceDataError(f"references: {name}: unknown table {', '.join(sorted(unknown))}")
    found = []
    for origin in ReferenceOrigin:
        entries = tables.get(origin.value, {})
        if not isinstance(entries, Mapping):
            raise ReferenceDataError(f"references: {name}: {origin.value} must hold tables")
        found += [_reference(f"references: {name}: {key}", key, origin, entry) for key, entry in entries.items()]
    return tuple(found)


def digital_section(references: Iterable[Reference]) -> str:
    """The `[digital.*]` tables of references/digital.toml, for the command that measures the simulated cohorts."""
    tables = []
    for entry in references:
        texts = {"device": entry.device, "model": entry.model, "region": entry.region, "sex": entry.sex}
        texts |= {"ages": entry.ages, "population": entry.population, "source": entry.source, "version": entry.version}
        lines = [
            f"[digital.{entry.key}]",
            *(f'{name} = "{_escaped(value)}"' for name, value in texts.items()),
        ]
        lines += [f"mean_g_cm2 = {float(entry.mean_g_cm2)!r}", f"sd_g_cm2 = {float(entry.sd_g_cm2)!r}"]
        tables.append("\n".join([*lines, "verified_by_site = false"]) + "\n")
    return "\n".join(tables)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")


_TEXTS = ("device", "region", "sex", "ages", "population", "source", "version")
_NUMBERS = ("mean_g_cm2", "sd_g_cm2")
_REQUIRED = {*_TEXTS, *_NUMBERS, "verified_by_site"}
_VERIFICATION = ("verified_by", "verified_on")


def _reference(name: str, key: str, origin: ReferenceOrigin, entry: Any) -> Reference:
    if not isinstance(entry, Mapping):
        raise ReferenceDataError(f"{name}: must be a table")
    unknown = set(entry) - {*_REQUIRED, *_VERIFICATION, "model"}
    missing = _REQUIRED - set(entry)
    if unknown or missing:
        raise ReferenceDataError(f"{name}: unknown {sorted(unknown)}, missing {sorted(missing)}")
    if not all(isinstance(entry[text], str) and entry[text].strip() for text in _TEXTS) or entry["sex"] not in SEXES:
        raise ReferenceDataError(f"{name}: {', '.join(_TEXTS)} must be texts, sex F or M")
    if not isinstance(entry.get("model", ""), str):
        raise ReferenceDataError(f"{name}: model must be a text")
    numbers = [entry[number] for number in _NUMBERS]
    if not all(isinstance(number, float) and math.isfinite(number) and number > 0 for number in numbers):
        raise ReferenceDataError(f"{name}: {', '.join(_NUMBERS)} must be numbers above 0, in g/cm2")
    _check_verification(name, origin, entry)
    return Reference(key=key, provenance=origin, **entry)


def _check_verification(name: str, origin: ReferenceOrigin, entry: Mapping[str, Any]) -> None:
    """A verification names who and when, and only a published reference can have one."""
    verified, by, on = entry["verified_by_site"], entry.get("verified_by", ""), entry.get("verified_on")
    if not isinstance(verified, bool):
        raise ReferenceDataError(f"{name}: verified_by_site must be true or false")
    told = isinstance(by, str) and bool(by.strip()) and isinstance(on, date) and not isinstance(on, datetime)
    if verified and not told:
        raise ReferenceDataError(f"{name}: verified_by_site needs verified_by (who) and verified_on (2026-11-23)")
    if not verified and (by or on):
        raise ReferenceDataError(f"{name}: verified_by and verified_on belong to verified_by_site = true only")
    if verified and origin is ReferenceOrigin.DIGITAL:
        raise ReferenceDataError(f"{name}: a digital cohort is not for a site to verify")
