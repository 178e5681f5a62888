"""What the network is held against: gradient boosting on hand-made features, and the oracle.

The boosting sees what a radiologist's ruler would give (FEATURES) of a vertebra's slabs, and the fat over the spine.
The oracle sees a digital patient's true parameters (parameters.csv), which no one can see, and that fat as the CT shows
it: how far the information allows. The midline oracle does without those of which the midsagittal slab shows nothing:
how far it allows a network that sees this slab alone.
Both are judged on patients they were not fitted on: cross-fitted by patient, or fitted on another cohort.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from sklearn.base import BaseEstimator
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from models.crop import OUTSIDE_HU, PIXEL_MM
from models.evaluation.table import Array, Ints, Names
from models.training import Cohort

FOLDS = 5
FEWEST = 20  # vertebrae to fit on
CORE_PX = 3  # eroded: the mask's rim of 3.5 mm, mostly cortex and partial volume
LAGS_PX = (1, 2, 4)
PARAMETERS = "parameters.csv"
BESIDE = "beside_"  # parameters of what lies beside the midsagittal slab
FAT = "fat_over_spine_cm"  # `models.soft_tissue`, a column of the cohort; empty in cohorts from before it
OF_PATIENT = ("hu_disc", "age_years", "sex_male", "bmi", FAT)
OF_SLABS = (
    "hu_mean", "hu_sd", "hu_p5", "hu_p25", "hu_p50", "hu_p75", "hu_p95", "hu_beside",
    "core_mean", "core_sd", "core_p10", "core_p90",
    "gradient_mean", "gradient_sd", "variogram_1px", "variogram_2px", "variogram_4px", "log_energy",
    "area_mm2", "height_mm", "depth_mm",
)  # fmt: skip
FEATURES = OF_PATIENT + OF_SLABS


@dataclass(frozen=True)
class Comparators:
    """The estimates by name (gbm, oracle, midline_oracle; _bmd, _tbs), and how they came about."""

    estimates: Mapping[str, Array] = field(default_factory=dict)
    account: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Examples:
    """Vertebrae to fit on, or to estimate: features (or parameters), truth, and whose they are."""

    values: Array  # [vertebrae, columns]
    targets: Array  # [vertebrae, 2]: BMD g/cm2, TBS (NaN where it is not known)
    patients: Names

    def of(self, columns: list[int]) -> "Examples":
        """The same vertebrae with these columns alone."""
        return Examples(self.values[:, columns], self.targets, self.patients)

    def knows(self, column: int) -> bool:
        """Whether every vertebra has this target."""
        return not np.isnan(self.targets[:, column]).any()

    @property
    def told(self) -> list[int]:
        """The columns that at least one vertebra has a value of: no CT tells a BMI, for one."""
        return np.flatnonzero(~np.isnan(self.values).all(axis=0)).tolist()

    @property
    def folds(self) -> GroupKFold | None:
        """Folds by patient; None for one patient or hardly any vertebra."""
        count = min(FOLDS, len(set(self.patients)))
        return GroupKFold(count) if count > 1 and len(self.patients) >= FEWEST else None


def compare(cohort: Cohort, chosen: Ints, folder: Path, other: tuple[Cohort, Path] | None) -> Comparators:
    """Boosting, and the oracle where `folder` holds parameters.csv, for the chosen vertebrae.

    `other` (a cohort and its folder) is what they are fitted on; without it they are cross-fitted.

    Raises:
        ValueError: the other cohort shares a patient with this one, or a vertebra has no parameters.
    """
    estimates: dict[str, Array] = {}
    account: dict[str, Any] = {
        "fitted_on": f"this cohort, cross-fitted by patient in at most {FOLDS} folds", "features": list(FEATURES),
        "gbm": "HistGradientBoostingRegressor", "oracle": None, "midline_oracle": None,
    }  # fmt: skip
    learn: Examples | None = None
    if other is not None:
        shared = set(cohort.patients[chosen]) & set(other[0].patients)
        if shared:
            raise ValueError(f"patients in both cohorts, {min(shared)} for one: the comparators would know them")
        account["fitted_on"] = f"another cohort: {other[1].resolve().name}, seed {other[0].facts.get('seed')}"
        learn = _slab_examples(other[0], np.arange(len(other[0].rows)))
    seen = _slab_examples(cohort, chosen)
    for column, target in enumerate(("bmd", "tbs")):
        found = _estimates(_boosting, seen, learn, column)
        if found is not None:
            estimates[f"gbm_{target}"] = found
    if (folder / PARAMETERS).exists():
        account |= _oracles(cohort, chosen, folder, other, estimates)
    return Comparators(estimates, account)


def slab_features(slabs: npt.NDArray[np.int16]) -> Array:
    """Of slabs [slabs, rows, columns] HU the features `OF_SLABS`, NaN for an empty mask."""
    middle = slabs[len(slabs) // 2].astype(np.float64)
    inside = middle > OUTSIDE_HU
    if not inside.any():
        return np.full(len(OF_SLABS), np.nan)
    box = ndimage.find_objects(inside.astype(np.uint8))[0]
    hu, inside = middle[box], np.pad(inside[box], CORE_PX)
    core = ndimage.binary_erosion(inside, iterations=CORE_PX)[CORE_PX:-CORE_PX, CORE_PX:-CORE_PX]
    inside = inside[CORE_PX:-CORE_PX, CORE_PX:-CORE_PX]
    core = core if core.any() else inside
    bone, marrow = hu[inside], hu[core]
    slope = np.hypot(*np.gradient(np.where(inside, hu, bone.mean())))[core] if min(hu.shape) > 1 else np.zeros(1)
    blob = ndimage.gaussian_laplace(np.where(inside, hu, bone.mean()), 1.0)[core]
    beside = np.delete(slabs, len(slabs) // 2, axis=0)
    return np.array([
        bone.mean(), bone.std(), *np.percentile(bone, [5, 25, 50, 75, 95]),
        beside[beside > OUTSIDE_HU].mean() if (beside > OUTSIDE_HU).any() else np.nan,
        marrow.mean(), marrow.std(), *np.percentile(marrow, [10, 90]),
        slope.mean(), slope.std(), *(_variogram(hu, core, lag) for lag in LAGS_PX), np.square(blob).mean(),
        inside.sum() * PIXEL_MM**2, hu.shape[0] * PIXEL_MM, hu.shape[1] * PIXEL_MM,
    ])  # fmt: skip


def _variogram(hu: Array, core: npt.NDArray[np.bool_], lag: int) -> float:
    """Half the mean squared difference of pixels `lag` apart, both in the core; NaN without such a pair."""
    down = core[lag:] & core[:-lag]
    back = core[:, lag:] & core[:, :-lag]
    steps = np.concatenate([(hu[lag:] - hu[:-lag])[down], (hu[:, lag:] - hu[:, :-lag])[back]])
    return float(np.square(steps).mean() / 2) if len(steps) else np.nan


def _slab_examples(cohort: Cohort, chosen: Ints) -> Examples:
    """The FEATURES of mask variant 0, as the network is judged on it."""
    rows = [cohort.rows[index] for index in chosen]
    hu, age, bmi = np.array([[float(row[name] or "nan") for name in ("hu", "age", "bmi")] for row in rows]).T
    male = np.array([row["sex"] == "M" for row in rows], dtype=float)
    patient = np.stack([hu, age, male, bmi, cohort.fat_over_spine_cm[chosen]], axis=1)
    slabs = np.array([slab_features(cohort.slabs[index, 0]) for index in chosen])
    values = np.concatenate([patient, slabs], axis=1)
    return Examples(values, cohort.targets[chosen].astype(np.float64), cohort.patients[chosen])


def _estimates(make: Callable[[], BaseEstimator], seen: Examples, learn: Examples | None, column: int) -> Array | None:
    """Fitted on `learn` and applied to `seen`, or cross-fitted in `seen`; None where that is too small.

    None too where not every vertebra that would be learned from has the target.
    """
    if not (learn or seen).knows(column):
        return None
    told = (learn or seen).told
    seen, learn = seen.of(told), None if learn is None else learn.of(told)
    with threadpool_limits(1):  # a few thousand rows: threads that wait for each other cost more than they do
        if learn is not None:
            estimate: Array = make().fit(learn.values, learn.targets[:, column]).predict(seen.values)
            return estimate
        if seen.folds is None:
            return None
        crossed: Array = cross_val_predict(
            make(), seen.values, seen.targets[:, column], groups=seen.patients, cv=seen.folds
        )
        return crossed


def _boosting() -> BaseEstimator:
    return HistGradientBoostingRegressor(
        learning_rate=0.05, max_iter=200, max_leaf_nodes=15, min_samples_leaf=10, early_stopping=False, random_state=0
    )


def _ridge() -> BaseEstimator:
    return make_pipeline(
        SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler(), RidgeCV(np.logspace(-3, 4, 15))
    )


def _oracles(
    cohort: Cohort, chosen: Ints, folder: Path, other: tuple[Cohort, Path] | None, estimates: dict[str, Array]
) -> dict[str, Any]:
    """Adds the estimates of both oracles; returns their accounts by name."""
    columns, values = _true_and_fat(folder, cohort, chosen)
    seen = Examples(values, cohort.targets[chosen].astype(np.float64), cohort.patients[chosen])
    learn = None
    if other is not None:
        everyone = np.arange(len(other[0].rows))
        other_columns, other_values = _true_and_fat(other[1], other[0], everyone)
        if other_columns != columns:
            raise ValueError(f"{other[1] / PARAMETERS} has other columns than {folder / PARAMETERS}")
        learn = Examples(other_values, other[0].targets.astype(np.float64), other[0].patients)
    told = (learn or seen).told
    midline = [number for number in told if not columns[number].startswith(BESIDE)]
    return {
        name: {
            "columns": [columns[number] for number in used],
            **_oracle(name, seen.of(used), None if learn is None else learn.of(used), estimates),
        }
        for name, used in (("oracle", told), ("midline_oracle", midline))
    }


def _true_and_fat(folder: Path, cohort: Cohort, chosen: Ints) -> tuple[tuple[str, ...], Array]:
    """`read_parameters`, and what the CT shows of the fat over the spine."""
    columns, values = read_parameters(folder, cohort, chosen)
    return (*columns, BESIDE + FAT), np.column_stack([values, cohort.fat_over_spine_cm[chosen]])


def _oracle(name: str, seen: Examples, learn: Examples | None, estimates: dict[str, Array]) -> dict[str, Any]:
    """Adds `name`_bmd and `name`_tbs: boosting or ridge on the parameters, whichever cross-validates better."""
    account: dict[str, Any] = {"model_bmd": None, "model_tbs": None}
    judged = learn or seen
    for column, target in enumerate(("bmd", "tbs")):
        if judged.folds is None or not judged.knows(column):
            continue
        makers = {"gradient boosting": _boosting, "ridge": _ridge}
        crossed = {name: _estimates(make, judged, None, column) for name, make in makers.items()}
        errors = {
            name: float(np.square(found - judged.targets[:, column]).mean())
            for name, found in crossed.items()
            if found is not None
        }
        best = min(errors, key=errors.__getitem__)
        account[f"model_{target}"] = best
        found = crossed[best] if learn is None else _estimates(makers[best], seen, learn, column)
        if found is not None:
            estimates[f"{name}_{target}"] = found
    return account


def read_parameters(folder: Path, cohort: Cohort, chosen: Ints) -> tuple[tuple[str, ...], Array]:
    """The columns of parameters.csv and their values [chosen, columns]; an empty cell is NaN.

    Raises:
        ValueError: the file is missing, a vertebra has no row, or a cell is no number.
    """
    path = folder / PARAMETERS
    if not path.exists():
        raise ValueError(f"{path} is missing: the oracle needs the parameters of both cohorts")
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        columns = tuple(name for name in reader.fieldnames or () if name not in ("patient_id", "level"))
        try:
            known = {
                (row["patient_id"], row["level"]): [float(row[name] or "nan") for name in columns] for row in reader
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a table of numbers by patient_id and level: {error}") from error
    keys = [(cohort.rows[index]["patient_id"], cohort.rows[index]["level"]) for index in chosen]
    missing = [key for key in keys if key not in known]
    if missing:
        raise ValueError(f"{path} has no row for {missing[0][0]} {missing[0][1]}")
    return columns, np.array([known[key] for key in keys], dtype=np.float64).reshape(len(keys), len(columns))
