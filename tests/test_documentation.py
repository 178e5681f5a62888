"""A setting, command, page, route or reason code that README does not name fails the build."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from models.phantom.settings import KEYS
from service.cli import make_parser
from service.domain.reasons import Code
from service.settings import Settings
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def _commands(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[str]:
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not subparsers:
        yield prefix.strip()
    for action in subparsers:
        for name, child in action.choices.items():
            yield from _commands(child, f"{prefix} {name}")


@pytest.mark.parametrize("command", list(_commands(make_parser())))
def test_every_command_is_documented(command: str) -> None:
    assert f"osteogate {command}" in README


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_is_documented(name: str) -> None:
    assert f"`OSTEOGATE_{name.upper()}`" in README


@pytest.mark.parametrize("code", list(Code))
def test_every_reason_code_is_documented(code: Code) -> None:
    assert f"`{code.value}`" in README


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_a_digital_patient_is_documented(key: str) -> None:
    section = README.partition("`--set` keys of a phantom")[2].partition("\n## ")[0]
    assert f"`{key}`" in section
