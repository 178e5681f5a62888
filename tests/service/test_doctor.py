"""The doctor tells what is amiss and never a password."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from argon2 import PasswordHasher

from service.doctor import Finding, examine
from service.domain.access import Role
from service.settings import Settings
from service.store.engine import Store
from service.workflow import passwords, people
from service.workflow.clock import utc_now
from service.workflow.people import By
from tests.service.workflow import workbench
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


# --- users ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hospital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(passwords, "_HASHER", PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
    with workbench.fresh_store("sqlite", tmp_path) as store:
        yield store


def users(folder: Path, **values: str | Path) -> tuple[bool, str]:
    found = findings(folder, **values)["users"]
    return found.good, found.text


def test_without_users_the_doctor_says_who_comes_in(hospital: Store, tmp_path: Path) -> None:
    good, told = users(tmp_path)
    assert good
    assert told == "none yet: the pages are open to whoever is on this machine, and bind to loopback only"
    good, told = users(tmp_path, web_host="10.0.0.5")
    assert (good, "never to 10.0.0.5" in told) == (False, True)
    good, told = users(tmp_path, web_host="10.0.0.5", web_password_file=tmp_path / "password")
    assert (good, "every role is granted" in told) == (True, True)


def test_with_users_there_must_be_somebody_for_each_role(hospital: Store, tmp_path: Path) -> None:
    by, now = By("shell:root", utc_now()), utc_now()
    with hospital.transaction() as session:
        people.add_user(session, "Dr. Tanabe", frozenset({Role.VIEWER, Role.CLINICIAN}), SECRET, by)
    good, told = users(tmp_path)
    assert not good
    assert "try a failed study again (pacs-admin), train or promote a model (ml-admin)" in told
    assert "clinician" not in told
    with hospital.transaction() as session:
        people.add_user(session, "pacs", frozenset({Role.PACS_ADMIN}), SECRET, by)
        people.create_key(session, "lab", frozenset({Role.ML_ADMIN}), by, expires_at=now + timedelta(days=1))
    assert users(tmp_path) == (True, "1 clinician, 1 pacs-admin, 1 ml-admin (users and keys)")
    with hospital.transaction() as session:  # who is let in no more counts for nobody, and the first user stays first
        people.revoke_key(session, "lab", by)
        people.disable(session, "Dr. Tanabe", by)
    good, told = users(tmp_path)
    assert (good, "clinician" in told, "ml-admin" in told, "pacs-admin" in told) == (False, True, True, False)


def test_before_there_is_a_schema_the_users_are_not_known(tmp_path: Path) -> None:
    assert users(tmp_path) == (False, "LookupError: not known before the database has its schema")
