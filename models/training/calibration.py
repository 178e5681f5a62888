"""90 % prediction intervals by conformal calibration, of a vertebra and of a patient's mean.

Split: errors of the package on patients that neither trained a network nor chose its epoch. Cross: every patient is
judged by the networks of the fold that never trained on it (the out-of-fold errors of CV+, Barber et al. 2021, doi
10.1214/20-AOS1965), while the package answers with the mean over all folds. That is an approximation of CV+: the mean
is steadier than one fold's network, which widens the intervals, and the out-of-fold patients chose the epoch, which
narrows them a little. A cohort of its own serves as split does, with as many patients as it has: the coverage among
further patients scatters by about the square root of 0.09 / n.

Fewer than nine patients have no error that 90 % of further ones would stay below: there Student's t takes over, as wide
as so few can tell, for errors that are normal about 0.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from models.package import Interval
from models.readout import Readout
from models.resnet50 import Floats
from models.training.cohort import Cohort, Ints
from models.training.readout import cohort_columns

COVERAGE = 0.90
FEWEST = math.ceil(COVERAGE / (1 - COVERAGE) - 1e-9)  # patients: with fewer, no order statistic holds so many
LEVELS = 4


def conformal_intervals(errors: Floats, patients: npt.NDArray[np.str_]) -> tuple[Interval, ...]:
    """Conformal half-widths of the mean over 1..4 vertebrae of a patient, from held-out errors [n, targets].

    The quantile is the ceil((n + 1) * 0.9)-th smallest absolute error. Means over fewer than four use the
    patient's consecutive vertebrae, one mean a patient, so that n counts exchangeable patients; single
    vertebrae use all of them. With fewer than FEWEST patients the half-width is Student's.
    """
    groups = [errors[patients == patient] for patient in dict.fromkeys(patients)]
    intervals = []
    for levels in range(1, LEVELS + 1):
        enough = [group for group in groups if len(group) >= levels]
        means = errors if levels == 1 else np.array([group[:levels].mean(axis=0) for group in enough])
        if len(means) == 0:
            continue
        of = _conformal_quantile if len(enough) >= FEWEST else _students_quantile
        width = [float(one) for one in of(np.abs(means), len(enough))]
        intervals.append(Interval(levels, width[0], width[1] if len(width) > 1 else None))
    return tuple(intervals)


@dataclass(frozen=True)
class Calibrated:
    """What a package says of patients that it did not learn from, and the intervals that its errors there ask for."""

    predicted: Floats  # [vertebrae, targets]
    intervals: tuple[Interval, ...]


def calibrate(
    readout: Readout | None,
    cohort: Cohort,
    judged: Ints,
    answers: Floats,
    targets: tuple[str, ...],
    apart: Floats | None = None,
) -> Calibrated:
    """From the networks' answers for these vertebrae of the cohort, weighed by the readout where there is one.

    `apart` are the weighed answers where the judged themselves have fitted the readout: each by one fitted without
    them (`models.training.readout.weigh_apart`).

    Where that tells scanners apart, the intervals are those of patients from the scanners that it knows, if these are
    enough.
    """
    truth, patients, scanners = cohort.truth(targets, judged), cohort.patients[judged], cohort.scanners[judged]
    if readout is None:
        return Calibrated(answers, conformal_intervals(answers - truth, patients))
    table = cohort_columns(cohort, judged, answers)
    predicted = readout.of_columns(table, scanners).astype(np.float32) if apart is None else apart
    known = np.array([readout.knows(scanner) for scanner in scanners])
    if len(set(patients[known])) < FEWEST:  # then everybody: what scanners differ by is in their errors, too
        known = np.ones(len(scanners), dtype=np.bool_)
    return Calibrated(predicted, conformal_intervals((predicted - truth)[known], patients[known]))


def _conformal_quantile(sizes: Floats, patients: int) -> Floats:
    """Per column."""
    rank = min(len(sizes), math.ceil((len(sizes) + 1) * COVERAGE))
    quantile: Floats = np.sort(sizes, axis=0)[rank - 1]
    return quantile


def _students_quantile(sizes: Floats, patients: int) -> Floats:
    """Per column: what a further patient's error stays below in 90 % of all draws of so few patients."""
    quantile: Floats = stats.t.ppf((1 + COVERAGE) / 2, patients) * np.sqrt((sizes**2).mean(axis=0))
    return quantile
