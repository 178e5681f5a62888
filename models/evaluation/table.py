"""Truth and estimates side by side: what every statistic of an evaluation is computed from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Names = npt.NDArray[np.str_]
T = TypeVar("T")


def told(statistic: Callable[..., T], *values: Array | None, patients: Names | None = None) -> T | None:
    """The statistic of these values; None where one of them is not known."""
    if any(one is None for one in values):
        return None
    return statistic(*values) if patients is None else statistic(*values, patients)


def patient_codes(patients: Names) -> Ints:
    """0, 1, 2... for each row's patient, in order of first appearance."""
    _, first, inverse = np.unique(patients, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


@dataclass(frozen=True)
class Table:
    """A row per vertebra; what a cohort does not know is absent from the mappings, never invented."""

    patients: Names
    bmd: Array  # g/cm2, truth
    tbs: Array | None  # None: the cohort does not know it of every vertebra
    hu: Array
    bmd_dl: Array  # the network
    tbs_dl: Array | None  # None: the package does not measure it
    groups: Mapping[str, Names]  # vendor, sex, age, bmi, interval: the subgroup of each vertebra
    numbers: Mapping[str, Array] = field(default_factory=dict)  # age (years), bmi (kg/m2), interval_days
    comparators: Mapping[str, Array] = field(default_factory=dict)  # gbm_bmd, gbm_tbs, oracle_bmd, oracle_tbs
    spread: Mapping[str, Array] = field(default_factory=dict)  # bmd, tbs: SD of scanners that the package doesn't know

    @cached_property
    def codes(self) -> Ints:
        """The number of each row's patient, in order of first appearance."""
        return patient_codes(self.patients)

    @cached_property
    def first_rows(self) -> Ints:
        """The first row of each patient."""
        return np.unique(self.codes, return_index=True)[1]

    def by_patient(self, values: Array) -> Array:
        """The mean over each patient's vertebrae (the paper's patient value), in order of first appearance."""
        return np.bincount(self.codes, weights=values) / np.bincount(self.codes)

    def part(self, rows: Bools) -> "Table":
        """Only these rows."""
        pick = {name: values[rows] for name, values in self.groups.items()}
        tbs, tbs_dl = (None if one is None else one[rows] for one in (self.tbs, self.tbs_dl))
        return Table(
            self.patients[rows], self.bmd[rows], tbs, self.hu[rows], self.bmd_dl[rows], tbs_dl,
            pick,
            {name: values[rows] for name, values in self.numbers.items()},
            {name: values[rows] for name, values in self.comparators.items()},
            {name: values[rows] for name, values in self.spread.items()},
        )  # fmt: skip
