"""Training: cohort -> batches -> steps -> best epoch -> calibrated package.

cohort.py          vertebrae with their truth
configuration.py   what is trained on whom, and how; the shipped configurations by name
batches.py         training images, augmentation
loop.py            learning rate, step, evaluate, log, checkpoint
calibration.py     prediction intervals
packaging.py       a run becomes a model package
"""

from models.training.batches import augmented, batches, training_images
from models.training.calibration import conformal_intervals
from models.training.cohort import Cohort, stored_field, write_cohort
from models.training.configuration import (
    MemberPlan,
    TrainingConfig,
    known_configurations,
    load_configuration,
)
from models.training.loop import Interrupted, Run, Trained, correlation, learning_rate, predict_cohort, train
from models.training.packaging import flatness, package_run, train_package
from models.training.readout import estimate_cohort
from models.training.refit import refit_for_site, refit_package

__all__ = [
    "Cohort",
    "Interrupted",
    "MemberPlan",
    "Run",
    "Trained",
    "TrainingConfig",
    "augmented",
    "batches",
    "conformal_intervals",
    "correlation",
    "estimate_cohort",
    "flatness",
    "known_configurations",
    "learning_rate",
    "load_configuration",
    "package_run",
    "predict_cohort",
    "refit_for_site",
    "refit_package",
    "stored_field",
    "train",
    "train_package",
    "training_images",
    "write_cohort",
]
