"""The phantom that networks were judged on is the one that ships."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from models.phantom import densitometer, freeze
from models.phantom.freeze import FROZEN, fingerprint, witnesses
from models.phantom.patient import draw

CHANGED = (
    "the phantom changed: networks, comparators and tables must be made anew with it (models/REFERENCE.md), then "
    "`python -m models.phantom.freeze` records it"
)


def test_the_parameters_are_the_frozen_ones() -> None:
    assert fingerprint() == json.loads(FROZEN.read_text())["fingerprint"], CHANGED


def test_the_pixels_are_the_frozen_ones() -> None:
    for frozen, now in zip(json.loads(FROZEN.read_text())["witnesses"], witnesses(), strict=True):
        for name, value in frozen.items():
            tolerance = 0.5 if name.endswith("_hu") else 0.003  # processors round differently; a dial moves more
            assert now[name] == pytest.approx(value, abs=tolerance), f"{name}: {CHANGED}"


def test_a_dial_that_is_turned_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint.__wrapped__()
    monkeypatch.setattr(freeze, "PATIENTS", 1)
    monkeypatch.setattr(densitometer, "PRODIGY", replace(densitometer.PRODIGY, blur_mm=0.36))
    turned = fingerprint.__wrapped__()
    monkeypatch.setattr(densitometer, "PRODIGY", replace(densitometer.PRODIGY, blur_mm=0.35))
    assert turned not in (before, fingerprint.__wrapped__())


def test_frozen_json_is_written_and_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freeze, "witnesses", lambda: [{"L1_hu": 1.0}])
    freeze.freeze(tmp_path / "frozen.json")
    assert json.loads((tmp_path / "frozen.json").read_text()) == {
        "fingerprint": fingerprint(),
        "witnesses": [{"L1_hu": 1.0}],
    }


def test_no_witness_carries_noise() -> None:
    assert draw(freeze.FIRST_SEED, noise_hu=0).acquisition.noise_hu == 0
