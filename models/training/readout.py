"""Fitting a package's readout, in two steps, so that no answer is weighed where it was learned by heart.

1. Measures alone -> targets, by ridge regression on the patients that trained the network (the measures did not
   learn from them).
2. The network's answers and those estimates -> targets, by ridge regression on the patients that it never trained on.

Both are linear, and so is what they make together: one map (`models.readout`).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import RidgeCV
from threadpoolctl import threadpool_limits

from models.inputs import InputConfig
from models.package import TARGETS, ModelPackage
from models.readout import Readout, Values, columns, standardised
from models.resnet50 import Floats, PackageNetwork, load_network
from models.training.cohort import Cohort, Ints
from models.training.configuration import TrainingConfig
from models.training.loop import predict_cohort

PENALTIES = np.logspace(-2, 4, 13)
FEWEST = 20  # vertebrae for either step


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
    weighed: Floats = readout.of_columns(cohort_columns(cohort, chosen, answers, variant=variant)).astype(np.float32)
    return weighed


def weigh(network: PackageNetwork, cohort: Cohort, config: TrainingConfig, device: torch.device) -> Readout | None:
    """The readout of a network that was trained on the cohort: see `models.training.readout`.

    The measures are learned from every outline of the training patients, rough ones too; the network's share from the
    patients that it never trained on, with the outlines that it will be judged by. None where the configuration wants
    no readout, or the patients are too few for one.
    """
    plan = config.members[0]
    learned, unseen = cohort.where(plan.training), cohort.where(plan.validation)
    if config.readout == "none" or min(len(learned), len(unseen)) < FEWEST:
        return None
    targets = network.targets
    nothing = np.full((len(learned), len(targets)), np.nan, dtype=np.float32)  # the network knows them by heart
    variants = cohort.slabs.shape[1]
    seen = np.concatenate([cohort_columns(cohort, learned, nothing, variant=one) for one in range(variants)])
    answers = predict_cohort(network, cohort, unseen, config.input, "fp32", device)
    return fit_readout(
        seen, np.tile(cohort.truth(targets, learned), (variants, 1)), cohort_columns(cohort, unseen, answers),
        cohort.truth(targets, unseen), targets,
    )  # fmt: skip


def cohort_columns(cohort: Cohort, chosen: Ints, answers: Floats, *, variant: int = 0) -> Values:
    """The readout's columns for these vertebrae, with the network's answers for them."""
    slabs = [cohort.slabs[index, variant] for index in chosen]
    return columns(answers, slabs, [cohort.rows[index]["level"] for index in chosen])


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
    together = np.concatenate([learned, unseen])
    together[:, np.isnan(together).all(axis=0)] = 0.0  # of no vertebra: it will weigh nothing
    centre, spread = np.nanmean(together, axis=0), np.nanstd(together, axis=0)
    scale = np.where(spread > 0, spread, 1.0)
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


def _ridge(values: Values, truth: npt.NDArray[np.floating]) -> Line:
    """The penalty by leave-one-out; columns are brought to one scale for it and back again."""
    scale = values.std(axis=0)
    scale[scale == 0] = 1.0
    with threadpool_limits(1):  # a few hundred rows: threads that wait for each other cost more than they do
        fitted = RidgeCV(PENALTIES).fit(values / scale, truth.astype(np.float64))
    return Line(fitted.coef_ / scale, float(fitted.intercept_))
