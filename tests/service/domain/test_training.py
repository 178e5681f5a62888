"""A run as it is asked for: what is impossible is told by code, the rest becomes a whole configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from models.training import TrainingConfig
from service.domain.reasons import Code
from service.domain.training import AS_IN_FORCE, Origin, Start, Wanted, configured, objections
from service.workflow.training import shelf

SHELF = shelf()
ORIGIN = SHELF.origin
ASKED = Wanted("a reason", "osteogate")


def told(wanted: Wanted, origin: Origin | None = ORIGIN) -> list[Code]:
    return [reason.code for reason in objections(wanted, SHELF.configurations, origin)]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"targets": ("tbs",)}, Code.TRAINING_TARGETS),
        ({"targets": ("bmd_g_cm2", "hu")}, Code.TRAINING_TARGETS),
        ({"targets": ()}, Code.TRAINING_TARGETS),
        ({"configuration": "../../etc/passwd"}, Code.TRAINING_CONFIGURATION),
        ({"folds": 3}, Code.TRAINING_CONFIGURATION),
        ({"seed": -1}, Code.TRAINING_CONFIGURATION),
        ({"settings": {"epochs": 0}}, Code.TRAINING_CONFIGURATION),
        ({"settings": {"epochs": 2.5}}, Code.TRAINING_CONFIGURATION),
        ({"settings": {"epochs": True}}, Code.TRAINING_CONFIGURATION),
        ({"settings": {"learning_rate": float("nan")}}, Code.TRAINING_CONFIGURATION),
        ({"settings": {"learning_rate": "fast"}}, Code.TRAINING_CONFIGURATION),
        ({"settings": {"architecture": "lenet"}}, Code.TRAINING_CONFIGURATION),
        ({"settings": {"precision": "fp16"}}, Code.TRAINING_CONFIGURATION),
        ({"start": Start.FINE_TUNE, "settings": {"architecture": "resnet18"}}, Code.TRAINING_START),
    ],
)
def test_the_impossible_is_refused(changes: dict[str, Any], code: Code) -> None:
    assert told(replace(ASKED, **changes)) == [code]
    assert told(ASKED) == []


def test_fine_tuning_needs_a_model_and_folds_that_it_has_not_seen() -> None:
    asked = replace(ASKED, start=Start.FINE_TUNE)
    assert ORIGIN is not None
    assert told(asked) == []
    assert told(asked, None) == [Code.TRAINING_START]
    here = replace(ORIGIN, trained_here=True)
    assert told(asked, here) == []
    assert told(replace(asked, folds=5), here) == [Code.TRAINING_START]
    assert told(replace(asked, configuration="yoshida-2023-field"), here) == [Code.TRAINING_START]
    assert told(replace(asked, folds=5), ORIGIN) == []  # other patients made it


def test_bmd_alone_is_learned_anew_or_from_a_model_of_both_and_nothing_is_added_to_it() -> None:
    assert ORIGIN is not None
    alone = replace(ASKED, targets=("bmd_g_cm2",))
    fine = replace(alone, start=Start.FINE_TUNE, configuration="osteogate-fine-tune")
    for wanted in (alone, fine):
        assert told(wanted) == []
        assert TrainingConfig.from_dict(configured(wanted, SHELF.configurations, ORIGIN, "1")).targets == ("bmd_g_cm2",)
    assert "targets" not in configured(ASKED, SHELF.configurations, ORIGIN, "1")
    swapped = replace(ASKED, targets=("tbs", "bmd_g_cm2", "tbs"))
    assert (told(swapped), swapped.learned) == ([], ASKED.targets)
    without = replace(ORIGIN, targets=("bmd_g_cm2",))
    assert told(fine, without) == []
    assert told(replace(fine, targets=ASKED.targets), without) == [Code.TRAINING_START]


REFIT = Wanted("a reason", AS_IN_FORCE, start=Start.REFIT)


def test_a_refit_needs_networks_that_have_not_seen_the_patients_and_nothing_to_set() -> None:
    assert ORIGIN is not None
    assert told(REFIT) == []
    assert told(REFIT, None) == [Code.TRAINING_START]
    assert told(REFIT, replace(ORIGIN, trained_here=True)) == [Code.TRAINING_START]
    midsagittal = replace(ORIGIN, input=SHELF.configurations["yoshida-2023"]["input"])
    assert told(REFIT, midsagittal) == [Code.TRAINING_START]
    for changes in ({"configuration": "osteogate"}, {"settings": {"epochs": 3}}, {"folds": 5}):
        assert told(replace(REFIT, **changes)) == [Code.TRAINING_CONFIGURATION]
    assert told(replace(ASKED, configuration=AS_IN_FORCE)) == [Code.TRAINING_CONFIGURATION]


@pytest.mark.parametrize("name", sorted(SHELF.configurations))
def test_a_refit_keeps_the_configuration_of_the_networks(name: str) -> None:
    """Whatever trained them: one fold, many, or an epoch chosen."""
    assert ORIGIN is not None
    trained = {**SHELF.configurations[name], "input": ORIGIN.input}
    if trained["slab_images"] == 3:
        trained["slab_images"] = 1
    origin = replace(ORIGIN, config=trained)
    config = TrainingConfig.from_dict(configured(REFIT, SHELF.configurations, origin, "12"))
    assert (config.name, config.version, config.start_from) == ("site", "12", ORIGIN.sha256)
    assert (config.epochs, config.architecture) == (trained["epochs"], trained["architecture"])
    assert (config.calibration_folds, config.readout, config.cross_folds) == ((8, 9), "measures", 1)


def test_a_network_of_one_slab_is_fine_tuned_without_a_readout() -> None:
    assert ORIGIN is not None
    midsagittal = replace(ORIGIN, input=SHELF.configurations["yoshida-2023"]["input"])
    wanted = Wanted("a reason", "osteogate-fine-tune", start=Start.FINE_TUNE)
    assert TrainingConfig.from_dict(configured(wanted, SHELF.configurations, midsagittal, "1")).readout == "none"
    assert TrainingConfig.from_dict(configured(wanted, SHELF.configurations, ORIGIN, "1")).readout == "measures"


@pytest.mark.parametrize("name", sorted(SHELF.configurations))
@pytest.mark.parametrize("folds", [None, 1, 2, 5])
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("start", [Start.SCRATCH, Start.FINE_TUNE])
def test_whatever_is_let_through_is_a_configuration(name: str, folds: int | None, keep: str, start: Start) -> None:
    wanted = Wanted("a reason", name, settings={"keep": keep, "epochs": 3}, folds=folds, seed=7, start=start)
    config = TrainingConfig.from_dict(configured(wanted, SHELF.configurations, ORIGIN, "12"))
    assert (config.name, config.version, config.seed, config.epochs, config.keep) == ("site", "12", 7, 3, keep)
    assert config.cross_folds == (folds or SHELF.configurations[name]["cross_folds"])
    if start is Start.FINE_TUNE:
        assert ORIGIN is not None
        assert (config.start_from, config.architecture) == (ORIGIN.sha256, ORIGIN.architecture)
        assert config.input.to_dict() == ORIGIN.input


@pytest.mark.parametrize("name", sorted(SHELF.configurations))
@pytest.mark.parametrize("folds", [None, 1, 2, 5])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_what_hangs_on_a_patient_is_never_judged_on_the_same_one(name: str, folds: int | None, keep: str) -> None:
    """Who trains sets no interval; who chooses the epoch, or fits the readout, does neither."""
    wanted = Wanted("a reason", name, settings={"keep": keep}, folds=folds)
    config = TrainingConfig.from_dict(configured(wanted, SHELF.configurations, ORIGIN, "1"))
    for plan in config.members:
        assert not set(plan.training) & {*plan.validation, *config.calibration_folds}
        assert set(range(10)) == {*plan.training, *plan.validation, *config.calibration_folds}
    if config.cross_folds > 1:
        assert (config.calibration, config.readout) == ("cross", "none")
        judged = {plan.fold: plan.validation for plan in config.members}.values()
        assert sorted(tenth for tenths in judged for tenth in tenths) == list(range(10))
    elif config.keep == "best" or config.readout != "none":
        assert not set(config.validation_folds) & set(config.calibration_folds)


def test_folds_of_a_model_that_was_trained_here_have_seen_every_patient() -> None:
    """Its networks together knew them all, so one fold of them is no better; folds that are not taken don't count."""
    assert ORIGIN is not None
    asked = replace(ASKED, start=Start.FINE_TUNE)
    here = replace(ORIGIN, trained_here=True)
    in_folds = replace(here, config={**here.config, "cross_folds": 5})
    assert told(asked, in_folds) == [Code.TRAINING_START]
    assert told(replace(asked, folds=1), in_folds) == [Code.TRAINING_START]
    assert told(asked, replace(in_folds, trained_here=False)) == []
    assert told(replace(asked, folds=2), here) == [Code.TRAINING_START]
    assert told(replace(asked, configuration="yoshida-2023-field", folds=1), here) == []
