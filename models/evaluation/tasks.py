"""What is detected per patient: osteopenia, osteoporosis, impaired microarchitecture.

Density is judged by definitions: the paper's, or those of a site's criteria and its young adults, which decide who is
referred there. A patient of whose sex no young adults are known is not counted, rather than counted as well.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from models.evaluation.table import Array, Bools, Table, told

TBS_IMPAIRED = 1.31  # Yoshida 2023: TBS <= 1.31
OSTEOPENIA_YAM = 80.0  # Yoshida 2023: %YAM < 80
OSTEOPOROSIS_YAM = 70.0  # Yoshida 2023: %YAM < 70
DENSITY = ("osteopenia", "osteoporosis")
DIGITS = 9  # "at the threshold" must not hang on the last bit of a division


@dataclass(frozen=True)
class Definition:
    """Who has it: a patient whose mean BMD lies below the threshold of the sex, or at it where it is inclusive."""

    words: str  # "YOSHIDA_2023: < 80 % YAM"
    young_adult_bmd: Mapping[str, float]  # by sex ("F", "M"), g/cm2
    cut_g_cm2: Mapping[str, float]  # by sex
    inclusive: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As a report, a run's manifest and cohort.json hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Read back what `to_dict` wrote."""
        return cls(
            str(stored["words"]),
            {sex: float(value) for sex, value in stored["young_adult_bmd"].items()},
            {sex: float(value) for sex, value in stored["cut_g_cm2"].items()},
            bool(stored["inclusive"]),
        )

    def percent(self, sex: str) -> float:
        """%YAM per g/cm2; NaN where no young adults of this sex are known."""
        known = sex in self.cut_g_cm2 and sex in self.young_adult_bmd
        return 100.0 / self.young_adult_bmd[sex] if known else np.nan

    def met(self, above: Array) -> Bools:
        """Of densities in %YAM above the threshold."""
        rounded = np.round(above, DIGITS)
        return rounded <= 0 if self.inclusive else rounded < 0


def yoshida(young_adult_bmd: Mapping[str, float]) -> dict[str, Definition]:
    """The paper's definitions for young adults of these means (g/cm2, by sex)."""
    return {
        name: Definition(
            f"Yoshida 2023: < {limit:g} % YAM",
            dict(young_adult_bmd),
            {sex: limit / 100 * mean for sex, mean in young_adult_bmd.items()},
        )
        for name, limit in zip(DENSITY, (OSTEOPENIA_YAM, OSTEOPOROSIS_YAM), strict=True)
    }


@dataclass(frozen=True)
class Task:
    """Who has it, by the truth; who is called by the estimate held against the same definition; and scores.

    `who` [patients] are those of whom it can be told; every other array holds those alone.
    """

    truth: Bools
    called: Bools
    score: Array  # the network's; rises with disease, in the quantity's own unit times -1
    others: Mapping[str, Array]  # the comparators' scores: hu, gbm, oracle
    unit: str
    who: Bools

    def part(self, members: Bools) -> "Task":
        """Only these of all patients."""
        pick = members[self.who]
        others = {name: values[pick] for name, values in self.others.items()}
        return Task(self.truth[pick], self.called[pick], self.score[pick], others, self.unit, self.who[members])


def make_tasks(table: Table, definitions: Mapping[str, Definition] | None) -> dict[str, Task | None]:
    """The three tasks; None is what cannot be told: TBS, or density without definitions for any patient's sex."""
    others = {"hu": -table.by_patient(table.hu)}
    true, seen = told(table.by_patient, table.tbs), told(table.by_patient, table.tbs_dl)
    tbs = None
    if true is not None and seen is not None:
        more = {name: -found for name, found in _by_patient(table, "tbs").items()}
        everybody = np.ones(len(true), dtype=np.bool_)
        tbs = Task(_impaired(true), _impaired(seen), -seen, others | more, "TBS", everybody)
    found = definitions or {}
    density = {name: _density_task(table, found[name], others) if name in found else None for name in DENSITY}
    return {**density, "tbs_impaired": tbs}


def _impaired(tbs: Array) -> Bools:
    return np.round(tbs, DIGITS) <= TBS_IMPAIRED


def _density_task(table: Table, definition: Definition, others: Mapping[str, Array]) -> Task | None:
    """Scores are %YAM where the threshold is one %YAM for both sexes, else %YAM above each patient's threshold."""
    if "sex" not in table.groups:
        return None
    sexes = [str(sex) for sex in table.groups["sex"][table.first_rows]]
    percent = np.array([definition.percent(sex) for sex in sexes])
    who = np.isfinite(percent)
    if not who.any():
        return None
    percent = percent[who]
    limit = np.array([definition.cut_g_cm2[sex] for sex in np.array(sexes)[who]]) * percent
    same = np.ptp(limit) < 10.0**-DIGITS

    def above(bmd: Array) -> Array:
        over: Array = table.by_patient(bmd)[who] * percent - limit
        return over

    def score(bmd: Array) -> Array:
        return -above(bmd) - (limit if same else 0.0)

    known = {
        short: score(table.comparators[name])
        for short, name in _comparators("bmd").items()
        if name in table.comparators
    }
    return Task(
        definition.met(above(table.bmd)),
        definition.met(above(table.bmd_dl)),
        score(table.bmd_dl),
        {name: values[who] for name, values in others.items()} | known,
        "%YAM" if same else "%YAM above the threshold",
        who,
    )


def _comparators(target: str) -> dict[str, str]:
    return {"gbm": f"gbm_{target}", "oracle": f"oracle_{target}"}


def _by_patient(table: Table, target: str) -> dict[str, Array]:
    return {
        short: table.by_patient(table.comparators[name])
        for short, name in _comparators(target).items()
        if name in table.comparators
    }
