"""The last step of a package: the network's answers and the slabs' measures, weighed together by one linear map.

A network learns texture from patients, and there are few of them; what `models.measures` reads needs none. The map is
fitted where the network's answers are honest (`models.training.readout`) and lies in the package as readout.json, every
weight by its name.

A readout that was fitted to a site's pairs may know the site's scanners: HU of bone are mineral times the scanner's
gain, which no picture tells, so each scanner has a factor of its own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from models.measures import NAMES, measures
from models.package import READOUT, TARGETS, ModelPackage, PackageError

Values = npt.NDArray[np.float64]
LEVELS = ("L1", "L2", "L3", "L4")
SURROUNDINGS = ("fat_over_spine_cm",)  # `models.soft_tissue`; readouts from before it have no weight for it
COLUMNS = (*TARGETS, *NAMES, *SURROUNDINGS, *LEVELS)  # the network's answers, the measures, which vertebra it is
# SD of what scanners make of one density, a share: eight scanners differed by 9.2 % (Skornitzke 2022, see
# models/phantom/SOURCES.md). Of TBS nothing is printed: there a site's own scanners alone tell.
PRINTED_BETWEEN = {"bmd_g_cm2": 0.092, "tbs": 0.0}
FURTHEST = 4.0  # standard deviations from the mean of those it was fitted on: nothing is extrapolated beyond


@dataclass(frozen=True)
class ScannerFactors:
    """What the answers of one scanner are multiplied by, and how many patients' pairs say so."""

    factors: Values  # [targets], about 1
    patients: int


@dataclass(frozen=True)
class Readout:
    """y = (bias + weights . z) x the scanner's factor, where z are `columns` in standard deviations of the vertebrae
    that it was fitted on."""

    centre: Values  # [columns]
    scale: Values  # [columns], above 0
    weights: Values  # [targets, columns]
    bias: Values  # [targets], in the targets' own units
    targets: tuple[str, ...] = TARGETS  # of the network whose answers it weighs, and its own
    scanners: Mapping[str, ScannerFactors] = field(default_factory=dict)  # by `scanner_name`: the known ones
    between: Values | None = None  # [targets] SD of what scanners read beside each other; None: told apart nowhere

    def __call__(
        self,
        answers: npt.NDArray[Any],
        slabs: Sequence[npt.NDArray[Any]],
        levels: Sequence[str],
        scanner: str = "",
        fat_cm: Sequence[float] | None = None,
    ) -> Values:
        """The network's answers [n, targets], n slabs [slabs, size, size] HU and n levels -> [n, targets].

        What cannot be measured counts as the mean, as does `fat_cm` (over the spine, of each level) where it is not
        told; a level that is none of LEVELS as a vertebra of unknown name; a scanner that is none of `scanners` as the
        average of those.
        """
        return self.of_columns(columns(answers, slabs, levels, fat_cm), [scanner] * len(levels))

    def of_columns(self, values: Values, scanners: Sequence[str] | npt.NDArray[np.str_] | None = None) -> Values:
        """[n, columns] and the scanner of each vertebra -> [n, targets]; without scanners, as on an unknown one."""
        found: Values = self.bias + standardised(values, self.centre, self.scale) @ self.weights.T
        if scanners is not None and self.scanners:
            found *= np.array([self.factors(scanner) for scanner in scanners]).reshape(found.shape)
        return found

    def knows(self, scanner: str) -> bool:
        """Whether it answers there as on the scanners that it was fitted to; one without `between` tells none apart."""
        return self.between is None or scanner in self.scanners

    def spread(self, values: Values, scanners: Sequence[str] | npt.NDArray[np.str_]) -> Values:
        """SD [n, targets] that a scanner nobody knows adds to the errors of these values; 0 on the known ones."""
        if self.between is None:
            return np.zeros_like(values)
        unknown = np.array([not self.knows(scanner) for scanner in scanners])
        return np.where(unknown[:, None], self.between * np.abs(values), 0.0)

    def factors(self, scanner: str) -> Values:
        """[targets] of this scanner; 1 where it is not known."""
        known = self.scanners.get(scanner)
        return np.ones(len(self.targets)) if known is None else known.factors

    @classmethod
    def of(cls, package: ModelPackage) -> Self | None:
        """The package's readout, if it has one.

        Raises:
            PackageError: its columns are not those that this program computes.
        """
        if READOUT not in package.manifest.files:
            return None
        text = (package.path / READOUT).read_text(encoding="utf-8")
        return cls.from_json(text, package.path / READOUT, package.manifest.targets)

    @classmethod
    def unweighed(cls, values: Values, targets: tuple[str, ...] = TARGETS) -> Self:
        """The network's answers as they are, standardised like these [n, columns]."""
        centre, scale = standards(values)
        weights = np.zeros((len(targets), values.shape[1]))
        for row in range(len(targets)):
            weights[row, row] = scale[row]
        return cls(centre, scale, weights, centre[: len(targets)].copy(), targets)

    @classmethod
    def from_json(cls, text: str, source: Path, targets: tuple[str, ...] = TARGETS) -> Self:
        """Read what `to_json` wrote for these targets; `source` is for the error's text."""
        named = column_names(targets)
        try:
            stored = json.loads(text)
            by_name: Mapping[str, Mapping[str, Any]] = stored["columns"]
            for name in set(SURROUNDINGS) - set(by_name):
                by_name = {**by_name, name: {"centre": 0.0, "scale": 1.0, **dict.fromkeys(targets, 0.0)}}
            if set(by_name) != set(named):
                raise ValueError(f"its columns differ: {', '.join(sorted(set(by_name) ^ set(named))[:3])}")
            table = [by_name[name] for name in named]
            made = cls(
                centre=np.array([float(one["centre"]) for one in table]),
                scale=np.array([float(one["scale"]) for one in table]),
                weights=np.array([[float(one[target]) for one in table] for target in targets]),
                bias=np.array([float(stored["bias"][target]) for target in targets]),
                targets=targets,
                scanners={
                    name: ScannerFactors(np.array([float(one[target]) for target in targets]), int(one["patients"]))
                    for name, one in stored.get("scanners", {}).items()
                },
                between=np.array([float(stored["between_scanners"][target]) for target in targets])
                if {"scanners", "between_scanners"} & set(stored)
                else None,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise PackageError(f"{source} is not a readout of this program: {error}") from error
        if not all(np.isfinite(values).all() for values in (made.centre, made.scale, made.weights, made.bias)):
            raise PackageError(f"{source} holds a value that is no number")
        if (made.scale <= 0).any():
            raise PackageError(f"{source} holds a scale that is not above 0")
        for name, known in made.scanners.items():
            if not (np.isfinite(known.factors) & (known.factors > 0)).all():
                raise PackageError(f"{source} holds a factor of {name} that is not above 0")
        if made.between is not None and not (np.isfinite(made.between) & (made.between >= 0)).all():
            raise PackageError(f"{source} holds a spread between scanners that is below 0, or no number")
        return made

    def to_json(self) -> str:
        """Every column by its name: its mean, its standard deviation, and what one of them adds to each target.

        And every scanner with its factors, and how much scanners differ.
        """
        table = {
            name: {
                "centre": float(self.centre[number]),
                "scale": float(self.scale[number]),
                **{target: float(self.weights[row, number]) for row, target in enumerate(self.targets)},
            }
            for number, name in enumerate(column_names(self.targets))
        }
        stored: dict[str, Any] = {"bias": self._by_target(self.bias), "columns": table}
        if self.scanners:
            stored["scanners"] = self.by_scanner()
        if self.between is not None:
            stored["between_scanners"] = self._by_target(self.between)
        return json.dumps(stored, indent=1, allow_nan=False) + "\n"

    def by_scanner(self) -> dict[str, dict[str, Any]]:
        """Of each scanner how many patients it was fitted to, and its factor for each target."""
        return {
            name: {"patients": known.patients, **self._by_target(known.factors)}
            for name, known in self.scanners.items()
        }

    def _by_target(self, values: Values) -> dict[str, float]:
        return {target: float(values[row]) for row, target in enumerate(self.targets)}


def widened(half: Values | float, sd: Values | float, level: float = 0.90) -> Values:
    """The half-width of an interval that holds this share, where an independent error of this SD comes on top."""
    return np.hypot(half, NormalDist().inv_cdf(0.5 + level / 2) * np.asarray(sd))


def column_names(targets: tuple[str, ...]) -> tuple[str, ...]:
    """COLUMNS as far as a network with these answers has them."""
    return (*targets, *NAMES, *SURROUNDINGS, *LEVELS)


def standards(values: Values) -> tuple[Values, Values]:
    """Mean and standard deviation of each column; 0 and 1 for what no vertebra has, 1 for what does not vary."""
    known = values.copy()
    known[:, np.isnan(known).all(axis=0)] = 0.0
    centre, spread = np.nanmean(known, axis=0), np.nanstd(known, axis=0)
    return centre, np.where(spread > 0, spread, 1.0)


def standardised(values: Values, centre: Values, scale: Values) -> Values:
    """In standard deviations from the mean, none further away than FURTHEST; 0 for what could not be measured."""
    away: Values = np.nan_to_num(np.clip((values - centre) / scale, -FURTHEST, FURTHEST))
    return away


def columns(
    answers: npt.NDArray[Any],
    slabs: Sequence[npt.NDArray[Any]],
    levels: Sequence[str],
    fat_cm: Sequence[float] | npt.NDArray[Any] | None = None,
) -> Values:
    """[n, columns]: the network's answers, the measures, the fat over the spine, and 1 under the vertebra's level."""
    if not len(answers) == len(slabs) == len(levels):
        raise ValueError(f"{len(answers)} answers for {len(slabs)} vertebrae and {len(levels)} levels")
    fat = np.full(len(levels), np.nan) if fat_cm is None else np.asarray(fat_cm, dtype=np.float64)
    measured = np.array([measures(one) for one in slabs]).reshape(len(slabs), len(NAMES))
    named = np.array([[float(level == one) for one in LEVELS] for level in levels]).reshape(len(levels), len(LEVELS))
    return np.concatenate([np.asarray(answers, dtype=np.float64), measured, fat[:, None], named], axis=1)
