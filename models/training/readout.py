"""Fitting a package's readout, in two steps, so that no answer is weighed where it was learned by heart.

1. Measures alone -> targets, by ridge regression on the patients that trained the network (the measures did not
   learn from them).
2. The network's answers and those estimates -> targets, by ridge regression on the patients that it never trained on.

Both are linear, and so is what they make together: one map (`models.readout`). Where no network has seen anybody, on a
site's own pairs, a readout that stands is adjusted instead: what is missing in it is learned (`adjust_readout`), and
how each of the site's scanners reads (`scanner_factors`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from models.inputs import InputConfig
from models.package import TARGETS, ModelPackage
from models.readout import PRINTED_BETWEEN, Readout, ScannerFactors, Values, columns, standardised, standards
from models.resnet50 import Floats, PackageNetwork, load_network
from models.training.cohort import Cohort, Ints
from models.training.configuration import TrainingConfig
from models.training.loop import predict_cohort

PENALTIES = np.logspace(-2, 4, 13)
FEWEST = 20  # vertebrae for either step
PATIENT_FOLDS = 5  # in which an adjustment is tried out
SCANNER_PATIENTS = 5  # fewer tell nothing about a scanner


@dataclass(frozen=True)
class Line:
    """y = bias + weights . z of standardised columns."""

    weights: Values
    bias: float


def estimate_cohort(
    package: ModelPackage, cohort: Cohort, chosen: Ints, device: torch.device | None = None, *, variant: int = 0
) -> Floats:
    """The package's estimates [chosen, targets], as prediction gives them."""
    device = device or torch.device("cpu")
    config = InputConfig.from_dict(package.manifest.input)
    network = load_network(package, device)
    answers = predict_cohort(network, cohort, chosen, config, "fp32", device, variant=variant)
    readout = Readout.of(package)
    if readout is None:
        return answers
    table = cohort_columns(cohort, chosen, answers, variant=variant)
    weighed: Floats = readout.of_columns(table, cohort.scanners[chosen]).astype(np.float32)
    return weighed


def weigh(network: PackageNetwork, cohort: Cohort, config: TrainingConfig, device: torch.device) -> Readout | None:
    """The readout of a network that was trained on the cohort: see `models.training.readout`.

    The measures are learned from every outline of the training patients, rough ones too; the network's share from the
    patients that it never trained on, with the outlines that it will be judged by. None where the configuration wants
    no readout, or the patients are too few for one.
    """
    material = _material(network, cohort, config, device)
    if material is None:
        return None
    patients, scanners = cohort.patients[material.unseen], cohort.scanners[material.unseen]
    return with_scanners(material.fitted(), material.table, material.truth, patients, scanners)


def weigh_apart(network: PackageNetwork, cohort: Cohort, config: TrainingConfig, device: torch.device) -> Floats | None:
    """What `weigh` says of those who are to calibrate it [vertebrae, targets], each by a readout fitted without them.

    None where nobody who calibrates has fitted it.
    """
    material = None if apart_already(config) else _material(network, cohort, config, device)
    if material is None:
        return None
    judged = cohort.where(config.calibration_folds)
    table, scanners = material.table, cohort.scanners[material.unseen]
    patients = cohort.patients[material.unseen]
    told = np.full((len(cohort.patients), len(network.targets)), np.nan)
    for others, left_out in GroupKFold(PATIENT_FOLDS).split(table, groups=patients):
        truth = material.truth[others]
        fitted = with_scanners(material.fitted(others), table[others], truth, patients[others], scanners[others])
        told[material.unseen[left_out]] = fitted.of_columns(table[left_out], scanners[left_out])
    alone = judged[np.isnan(told[judged]).any(axis=1)]  # those who only calibrate
    if len(alone):
        answers = predict_cohort(network, cohort, alone, config.input, "fp32", device)
        whole = with_scanners(material.fitted(), table, material.truth, patients, scanners)
        told[alone] = whole.of_columns(cohort_columns(cohort, alone, answers), cohort.scanners[alone])
    found: Floats = told[judged].astype(np.float32)
    return found


def apart_already(config: TrainingConfig) -> bool:
    """Whether nobody who calibrates fits the readout."""
    return config.readout == "none" or not set(config.members[0].validation) & set(config.calibration_folds)


@dataclass(frozen=True)
class _Material:
    """What a readout is fitted to: columns and truth of those whom the network learned, and of those it never saw."""

    learned: Values
    learned_truth: Floats
    unseen: Ints  # of the cohort
    table: Values  # of the unseen
    truth: Floats
    targets: tuple[str, ...]

    def fitted(self, rows: Ints | slice = slice(None)) -> Readout:
        """The readout of these of the unseen."""
        return fit_readout(self.learned, self.learned_truth, self.table[rows], self.truth[rows], self.targets)


def _material(
    network: PackageNetwork, cohort: Cohort, config: TrainingConfig, device: torch.device
) -> _Material | None:
    """None where the configuration wants no readout, or the patients are too few for one."""
    plan = config.members[0]
    learned, unseen = cohort.where(plan.training), cohort.where(plan.validation)
    if config.readout == "none" or min(len(learned), len(unseen)) < FEWEST or not _enough(cohort, unseen, config):
        return None
    targets = network.targets
    nothing = np.full((len(learned), len(targets)), np.nan, dtype=np.float32)  # the network knows them by heart
    variants = cohort.slabs.shape[1]
    seen = np.concatenate([cohort_columns(cohort, learned, nothing, variant=one) for one in range(variants)])
    answers = predict_cohort(network, cohort, unseen, config.input, "fp32", device)
    table, truth = cohort_columns(cohort, unseen, answers), cohort.truth(targets, unseen)
    learned_truth = np.tile(cohort.truth(targets, learned), (variants, 1))
    return _Material(seen, learned_truth, unseen, table, truth, targets)


def _enough(cohort: Cohort, unseen: Ints, config: TrainingConfig) -> bool:
    """Whether enough stay to fit it to where each fifth of the patients is left out in turn (`weigh_apart`)."""
    if apart_already(config):
        return True
    patients = cohort.patients[unseen]
    if len(set(patients)) < PATIENT_FOLDS:
        return False
    return all(len(others) >= FEWEST for others, _ in GroupKFold(PATIENT_FOLDS).split(patients, groups=patients))


def cohort_columns(cohort: Cohort, chosen: Ints, answers: Floats, *, variant: int = 0) -> Values:
    """The readout's columns for these vertebrae, with the network's answers for them."""
    slabs = [cohort.slabs[index, variant] for index in chosen]
    return columns(answers, slabs, [cohort.rows[index]["level"] for index in chosen], cohort.fat_over_spine_cm[chosen])


def fit_readout(
    learned: Values,
    learned_truth: Floats,
    unseen: Values,
    unseen_truth: Floats,
    targets: tuple[str, ...] = TARGETS,
) -> Readout:
    """From columns of vertebrae that the network trained on, and of some that it never did; truth [n, targets].

    Raises:
        ValueError: there are too few of either.
    """
    if min(len(learned), len(unseen)) < FEWEST:
        raise ValueError(f"a readout needs {FEWEST} vertebrae to learn from and {FEWEST} unseen ones at least")
    answers = len(targets)
    centre, scale = standards(np.concatenate([learned, unseen]))
    learned, unseen = (standardised(values, centre, scale) for values in (learned, unseen))
    measured = [_ridge(learned[:, answers:], learned_truth[:, row]) for row in range(answers)]
    estimates = np.stack([unseen[:, answers:] @ line.weights + line.bias for line in measured], axis=1)
    weights, bias = np.zeros((answers, learned.shape[1])), np.zeros(answers)
    for row in range(answers):
        line = _ridge(np.concatenate([unseen[:, :answers], estimates], axis=1), unseen_truth[:, row])
        shares = line.weights[answers:]
        weights[row, :answers] = line.weights[:answers]
        weights[row, answers:] = sum(share * one.weights for share, one in zip(shares, measured, strict=True))
        bias[row] = line.bias + sum(share * one.bias for share, one in zip(shares, measured, strict=True))
    return Readout(centre, scale, weights, bias, targets)


def adjust_readout(
    before: Readout,
    values: Values,
    truth: Floats,
    patients: npt.NDArray[np.str_],
    scanners: npt.NDArray[np.str_] | None = None,
) -> Readout:
    """The readout, and what these vertebrae [n, columns] show to be missing in it; no network may have seen them.

    The difference to the truth [n, targets] is learned by ridge regression, so with few patients little more than a
    shift is, and never less than what was known before. The penalty is the one that serves patients left out whole.
    Where the `scanners` are told ([n], by `models.package.scanner_name`), it is learned within each of them, so that no
    measure comes to stand for a scanner, and then each scanner's factors are.

    Raises:
        ValueError: there are too few.
    """
    if len(values) < FEWEST or len(set(patients)) < PATIENT_FOLDS:
        raise ValueError(f"a readout needs {FEWEST} vertebrae of {PATIENT_FOLDS} patients at least to adjust it by")
    z = standardised(values, before.centre, before.scale)
    missing = truth - before.of_columns(values)
    spread = z.std(axis=0)  # between scanners, too: what hardly varies within one is not to be stretched
    apart = list(GroupKFold(PATIENT_FOLDS).split(z, groups=patients))
    if scanners is not None and known_scanners(scanners, patients):
        z, missing = _within(z, scanners), _within(missing, scanners)
    lines = [_ridge(z, missing[:, row], apart, spread) for row in range(len(before.targets))]
    weights = before.weights + np.stack([line.weights for line in lines])
    bias = before.bias + np.array([line.bias for line in lines])
    adjusted = Readout(before.centre, before.scale, weights, bias, before.targets)
    return adjusted if scanners is None else with_scanners(adjusted, values, truth, patients, scanners)


def with_scanners(
    readout: Readout, values: Values, truth: Floats, patients: npt.NDArray[np.str_], scanners: npt.NDArray[np.str_]
) -> Readout:
    """The readout with a factor for every scanner that enough of these vertebrae come from, and how they differ.

    Where scanners are named, and each has too few, none is known: that they read alike is more than so few can tell.
    """
    known = known_scanners(scanners, patients)
    printed = np.array([PRINTED_BETWEEN[target] for target in readout.targets])
    if not known:
        return replace(readout, between=printed) if (scanners != "").any() else readout
    named = np.where(np.isin(scanners, known), scanners, "")
    factors = scanner_factors(readout.of_columns(values), truth, patients, named)
    own = np.sqrt(np.mean([(one.factors - 1) ** 2 for one in factors.values()], axis=0))
    return replace(readout, scanners=factors, between=np.maximum(own, printed))


def scanner_factors(
    answers: Values, truth: Floats, patients: npt.NDArray[np.str_], scanners: npt.NDArray[np.str_]
) -> dict[str, ScannerFactors]:
    """What each named scanner's answers [n, targets] are to be multiplied by, from its patients' means.

    A factor is believed as far as its patients bear it: it is drawn towards 1 by a ridge penalty, the one that serves
    patients left out. That is Buhlmann's credibility (1967): n patients count n / (n + penalty), where the penalty is
    the scatter of patients over that of scanners. The only scanner of a site needs no factor: the readout is its own.
    """
    who = sorted(set(zip(patients.tolist(), scanners.tolist(), strict=True)))
    rows = [(patients == patient) & (scanners == scanner) for patient, scanner in who]
    told = np.array([answers[row].mean(axis=0) for row in rows])
    missing = np.array([truth[row].mean(axis=0) for row in rows]) - told
    names = sorted({scanner for _, scanner in who if scanner})
    on = np.array([[scanner == name for name in names] for _, scanner in who], dtype=np.float64)
    factors = np.ones((len(names), told.shape[1]))
    for target in range(told.shape[1] if len(names) > 1 else 0):
        ridge = RidgeCV(PENALTIES, fit_intercept=False).fit(on * told[:, target, None], missing[:, target])
        factors[:, target] += ridge.coef_
    return {name: ScannerFactors(factors[row], int(on[:, row].sum())) for row, name in enumerate(names)}


def known_scanners(scanners: npt.NDArray[np.str_], patients: npt.NDArray[np.str_]) -> list[str]:
    """The named scanners with enough patients."""
    names = sorted(set(scanners.tolist()) - {""})
    return [name for name in names if len(set(patients[scanners == name])) >= SCANNER_PATIENTS]


def _within(values: Values, groups: npt.NDArray[np.str_]) -> Values:
    """The values with every group's mean moved to the mean of all (the "within" estimator of panel data)."""
    moved: Values = values + values.mean(axis=0)
    for group in set(groups.tolist()):
        moved[groups == group] -= values[groups == group].mean(axis=0)
    return moved


def _ridge(
    values: Values,
    truth: npt.NDArray[np.floating],
    apart: Sequence[tuple[Ints, Ints]] | None = None,
    spread: Values | None = None,
) -> Line:
    """The penalty by leave-one-out, or by these splits; columns are brought to one scale for it and back again.

    `spread` is that scale; without it, each column's own.
    """
    scale = values.std(axis=0) if spread is None else spread.copy()
    scale[scale == 0] = 1.0
    with threadpool_limits(1):  # a few hundred rows: threads that wait for each other cost more than they do
        fitted = RidgeCV(PENALTIES, cv=apart).fit(values / scale, truth.astype(np.float64))
    return Line(fitted.coef_ / scale, float(fitted.intercept_))
