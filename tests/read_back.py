"""Our DICOM objects as others read them: dicom3tools' validator, dcmtk's dump, highdicom's reader."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import highdicom as hd

from tests.conftest import absent


def errors_of_dciodvfy(path: Path, iod: str) -> list[str]:
    """What dicom3tools' validator calls an error in this object, which it must take for an `iod`."""
    program = shutil.which("dciodvfy") or absent("dicom3tools' dciodvfy")
    report = subprocess.run([program, str(path)], capture_output=True, check=False)
    lines = (report.stdout + report.stderr).decode("utf-8", "replace").splitlines()
    assert any(line.strip() == iod for line in lines), lines
    # releases older than DICOM 2022e do not know SyntheticData
    return [line for line in lines if line.startswith("Error") and "(0x0008,0x001c)" not in line]


def dsrdump(path: Path) -> bytes:
    """The report's text in its own character set (dcmtk converts ISO 2022 IR 87 only with some libraries)."""
    program = shutil.which("dsrdump") or absent("dcmtk's dsrdump")
    dump = subprocess.run([program, str(path)], capture_output=True, check=False)
    assert dump.returncode == 0, dump.stderr.decode()
    return dump.stdout


def groups(path: Path) -> tuple[dict[str, Any], Any]:
    """The volumetric groups by vertebra, and the patient's group, as highdicom reads them."""
    report = hd.sr.srread(path).content
    rois = {group.tracking_identifier: group for group in report.get_volumetric_roi_measurement_groups()}
    others = {group.tracking_identifier: group for group in report.get_image_measurement_groups()}
    return rois, others["Patient"]


def numbers(group: Any) -> dict[Any, float]:
    """The measurements of one group by concept."""
    return {item.name: item.value for item in group.get_measurements()}


def texts(item: Any) -> list[str]:
    """Every text below a content item."""
    found = [str(item.TextValue)] if "TextValue" in item else []
    return found + [text for child in item.get("ContentSequence", []) for text in texts(child)]
