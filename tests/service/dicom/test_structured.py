"""The content of a received report becomes plain values, whatever a sender writes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.sequence import Sequence

from service.dicom.headers import HeaderError, read_facts
from service.dicom.structured import MAX_DEPTH, read_content
from service.domain.dxa_sr import read_report
from tests import dxa_report
from tests.conftest import absent


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sr")
    return dxa_report.write(dxa_report.report(dxa_report.worded()), folder / "a.dcm")


def test_the_tree_comes_as_it_stands(path: Path) -> None:
    root = read_content(path)
    assert (root.kind, root.name.meaning) == ("CONTAINER", "DXA report")
    spine, hip = root.items
    assert (spine.name.meaning, hip.name.meaning) == ("AP Spine", "Left Femur")
    site, bmd, *_ = spine.items[0].items
    assert (site.kind, site.name.meaning, site.text) == ("TEXT", "Region", "L1")
    assert (bmd.kind, bmd.number, bmd.unit.key, bmd.name.key) == ("NUM", "0.9", "UCUM:g/cm2", "99TEST:1")


def test_too_deep_and_too_large_end_in_an_answer(tmp_path: Path) -> None:
    inner = dxa_report.text(("1", "99TEST", "end"), "x")
    for _ in range(MAX_DEPTH + 5):
        inner = dxa_report.item("CONTAINER", ("1", "99TEST", "box"), inner)
    deep = read_content(dxa_report.write(dxa_report.report([inner]), tmp_path / "deep.dcm"))
    assert not any(item.kind == "TEXT" for item, _ in deep.walk())
    many = [dxa_report.text(("1", "99TEST", "word"), "x" * 200) for _ in range(4000)]
    with pytest.raises(HeaderError, match="larger"):
        read_content(dxa_report.write(dxa_report.report(many), tmp_path / "large.dcm"))


def test_what_is_no_report_has_no_content(tmp_path: Path) -> None:
    bare = dxa_report.report([])
    bare.ContentSequence = Sequence()
    assert read_content(dxa_report.write(bare, tmp_path / "bare.dcm")).items == ()
    (tmp_path / "text.dcm").write_text("no DICOM")
    with pytest.raises(HeaderError):
        read_content(tmp_path / "text.dcm")
    with pytest.raises(OSError, match="absent"):
        read_content(tmp_path / "absent.dcm")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(300, 6000), st.binary(min_size=1, max_size=6)), min_size=1, max_size=6))
def test_broken_bytes_never_raise_anything_else(path: Path, tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place : place + len(value)] = value
    broken = tmp_path / "broken.dcm"
    broken.write_bytes(content)
    try:
        root, facts = read_content(broken), read_facts(broken)
    except HeaderError:
        return
    read_report(root, facts)


@pytest.mark.parametrize("sop_class", [dxa_report.ENHANCED_SR, dxa_report.COMPREHENSIVE_SR])
@pytest.mark.parametrize("manner", [dxa_report.coded, dxa_report.worded])
@pytest.mark.peer("dcmtk, dicom3tools")
def test_the_reports_of_these_tests_are_reports(manner: object, sop_class: str, tmp_path: Path) -> None:
    assert callable(manner)
    file = dxa_report.write(dxa_report.report(manner(), sop_class=sop_class), tmp_path / "a.dcm")
    for program, arguments, wrong in (("dsrdump", [], "E: "), ("dciodvfy", [], "Error")):
        found = shutil.which(program) or absent(program)
        done = subprocess.run([found, *arguments, str(file)], capture_output=True, text=True, check=False)
        told = done.stdout + done.stderr
        assert not [line for line in told.splitlines() if line.startswith(wrong)], told
        if program == "dsrdump":
            assert done.returncode == 0
            assert "0.95" in told
