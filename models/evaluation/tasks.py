"""What is detected per patient: osteopenia, osteoporosis, impaired microarchitecture."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from models.evaluation.table import Array, Bools, Names, Table, told

TBS_IMPAIRED = 1.31  # Yoshida 2023: TBS <= 1.31
OSTEOPENIA_YAM = 80.0  # Yoshida 2023: %YAM < 80
OSTEOPOROSIS_YAM = 70.0  # Yoshida 2023: %YAM < 70


@dataclass(frozen=True)
class Task:
    """Who has it, by the truth; who is called by the estimate held against the same definition; and scores."""

    truth: Bools  # [patients]
    called: Bools
    score: Array  # the network's; rises with disease, in the quantity's own unit times -1
    others: Mapping[str, Array]  # the comparators' scores: hu, gbm, oracle
    unit: str


def make_tasks(table: Table, yam: tuple[Array, Array] | None) -> dict[str, Task | None]:
    """The three tasks; None is what cannot be told: TBS, or %YAM without `yam`, (true, estimated) per patient."""
    others = {"hu": -table.by_patient(table.hu)}
    true, seen = told(table.by_patient, table.tbs), told(table.by_patient, table.tbs_dl)
    tbs = None
    if true is not None and seen is not None:
        more = {name: -found for name, found in _by_patient(table, "tbs").items()}
        tbs = Task(true <= TBS_IMPAIRED, seen <= TBS_IMPAIRED, -seen, others | more, "TBS")
    tasks: dict[str, Task | None] = {"osteopenia": None, "osteoporosis": None}
    if yam is not None:
        true, estimated = yam
        percent = true / table.by_patient(table.bmd)  # per g/cm2: 100 over the patient's young-adult mean
        more = {name: -found * percent for name, found in _by_patient(table, "bmd").items()}
        for name, limit in (("osteopenia", OSTEOPENIA_YAM), ("osteoporosis", OSTEOPOROSIS_YAM)):
            tasks[name] = Task(true < limit, estimated < limit, -estimated, others | more, "%YAM")
    return {**tasks, "tbs_impaired": tbs}


def percent_yam(table: Table, sexes: Names, references: Mapping[str, float] | None) -> tuple[Array, Array] | None:
    """(true, estimated) %YAM per patient; None without a reference (g/cm2) for every sex in the cohort."""
    if references is None or not set(sexes) <= set(references):
        return None
    reference = table.by_patient(np.array([float(references[sex]) for sex in sexes]))
    return 100.0 * table.by_patient(table.bmd) / reference, 100.0 * table.by_patient(table.bmd_dl) / reference


def _by_patient(table: Table, target: str) -> dict[str, Array]:
    names = {"gbm": f"gbm_{target}", "oracle": f"oracle_{target}"}
    return {
        short: table.by_patient(table.comparators[name]) for short, name in names.items() if name in table.comparators
    }
