"""The doctor tells what is amiss and never a password."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from service.doctor import Finding, examine
from service.settings import Settings
from tests.service.workflow.workbench import broker_binary, eventually, free_port

SECRET = "s3cret:pa@ss/w%rd"


def findings(folder: Path, **values: str | Path) -> dict[str, Finding]:
    file = folder / "password"
    file.write_text(SECRET)
    settings = Settings(
        data_dir=folder,
        disk_floor_bytes=0,
        database_password_file=file,
        broker_password_file=file,
        **values,
    )
    found = examine(settings)
    assert SECRET not in str(found)
    assert "s3cret" not in str(found)
    return {one.part: one for one in found}


def test_servers_that_are_away_are_told_without_their_passwords(tmp_path: Path) -> None:
    port = free_port()
    found = findings(
        tmp_path,
        database_url=f"postgresql://osteogate@127.0.0.1:{port}/osteogate",
        broker_url=f"redis://user@127.0.0.1:{port}/0",
    )
    assert not found["database"].good
    assert f"port {port}" in found["database"].text
    assert found["broker"].text.endswith(f"no answer at redis://127.0.0.1:{port}/0: is the installation running?")


WRONG = "PermissionError: the broker at redis://127.0.0.1:{port}/0 does not take our password"


@pytest.mark.parametrize(("password", "text"), [(SECRET, "answers"), ("another", WRONG)])
def test_a_broker_with_a_password(tmp_path: Path, password: str, text: str) -> None:
    port = free_port()
    command = [
        str(broker_binary()),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--requirepass",
        password,
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path) as server:
        try:
            wanted = text.format(port=port)
            eventually(
                lambda: findings(tmp_path, broker_url=f"redis://127.0.0.1:{port}/0")["broker"].text == wanted, wanted
            )
        finally:
            server.kill()
