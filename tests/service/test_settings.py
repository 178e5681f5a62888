"""Settings: secrets come from files and go nowhere; nothing is open off loopback by mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kombu import Connection
from sqlalchemy import make_url

from service.settings import Settings
from service.supervise import environment_of

SECRET = "s3cret p@ss:/w%rd?#ä"
PASSWORD = "twelve-signs"


def secret(folder: Path, text: str = f"{SECRET}\n") -> Path:
    file = folder / "secret"
    file.write_text(text, encoding="utf-8")
    return file


def refusal(**values: Any) -> str:
    """What a person is told about settings that cannot be."""
    with pytest.raises(ValueError, match="Settings") as raised:
        Settings(**values)
    return str(raised.value)


def test_the_database_password_comes_from_its_file(tmp_path: Path) -> None:
    url = "postgresql://osteogate@db.example:5432/osteogate?sslmode=require"
    settings = Settings(database_url=url, database_password_file=secret(tmp_path))
    found = make_url(settings.sqlalchemy_url)
    assert found.password == SECRET
    assert found == make_url(url).set(password=SECRET)  # host, port, user and query as they were
    assert SECRET not in repr(settings)


def test_the_broker_password_comes_from_its_file(tmp_path: Path) -> None:
    settings = Settings(broker_url="redis://broker.example:6379/0", broker_password_file=secret(tmp_path))
    found = Connection(settings.celery_url)
    assert (found.password, found.hostname, found.port) == (SECRET, "broker.example", 6379)
    assert SECRET not in repr(settings)


def test_without_a_database_url_its_password_file_is_not_needed(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database_password_file=secret(tmp_path))
    assert settings.sqlalchemy_url.startswith("sqlite:///")


@pytest.mark.parametrize(
    ("url", "text", "words"),
    [
        ("postgresql://u:other@db/x", SECRET, "without a password"),
        ("sqlite:///x.sqlite3", SECRET, "with a host"),
        ("postgresql://u@db/x", "\n", "is empty"),
    ],
)
def test_a_password_that_cannot_be_put_in_is_told_without_it(tmp_path: Path, url: str, text: str, words: str) -> None:
    settings = Settings(database_url=url, database_password_file=secret(tmp_path, text))
    with pytest.raises(ValueError, match=words) as raised:
        _ = settings.sqlalchemy_url
    assert SECRET not in str(raised.value)


def test_a_missing_secret_is_told_by_name(tmp_path: Path) -> None:
    settings = Settings(broker_url="redis://b", broker_password_file=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"OSTEOGATE_BROKER_PASSWORD_FILE.*nowhere cannot be read"):
        _ = settings.celery_url


def test_a_password_for_everybody_has_its_length(tmp_path: Path) -> None:
    assert "fewer than 12" in refusal(web_host="0.0.0.0", web_password_file=secret(tmp_path, "elevensigns\n"))
    settings = Settings(web_host="0.0.0.0", web_password_file=secret(tmp_path, f"{PASSWORD}\n"))
    assert settings.web_password == PASSWORD
    assert Settings().web_password is None


def test_off_loopback_the_listener_needs_peers() -> None:
    assert "OSTEOGATE_PEERS" in refusal(dicom_host="0.0.0.0")
    assert Settings(dicom_host="0.0.0.0", peers="PACS").peers[0].ae_title == "PACS"


def test_destinations_come_from_a_file_with_remarks(tmp_path: Path) -> None:
    text = (
        "# results go home\npacs=dicom://PACS@10.0.0.5:4242\nweb=https://u:pw@dicom.example/rs, b=dicom://B@b:104\n\n"
    )
    settings = Settings(destinations_file=secret(tmp_path, text))
    assert [one.name for one in settings.destinations] == ["pacs", "web", "b"]
    assert settings.destinations[1].url == "https://u:pw@dicom.example/rs"
    assert Settings(destinations_file=secret(tmp_path, "# none\n")).destinations == ()


def test_a_destination_is_known_by_its_scheme_however_it_is_written() -> None:
    pacs, web = Settings(destinations="a=DICOM://PACS@10.0.0.5:104,b=HTTPS://u:pw@dicom.example/rs").destinations
    assert (pacs.is_dicomweb, web.is_dicomweb) == (False, True)
    assert web.address == "https://dicom.example/rs"


@pytest.mark.parametrize(
    "address", ["dicom://PACS@h:104/x", "dicom://@h:104", f"dicom://{'A' * 17}@h:104", "dicom://P@h"]
)
def test_a_dicom_address_is_a_title_a_host_and_a_port(address: str) -> None:
    assert "AETITLE@host:port" in refusal(destinations=f"a={address}")


@pytest.mark.parametrize(
    "values",
    [
        {"destinations": f"https://u:{SECRET}@dicom.example/rs"},
        {"destinations": f"a=dicom://PACS:{SECRET}@10.0.0.5:104"},
        {"destinations": f"a=ftp://u:{SECRET}@dicom.example/rs"},
        {"destinations": f"bad name=https://u:{SECRET}@dicom.example/rs"},
        {"database_url": f"postgresql://u:{SECRET}@db/x", "dicom_host": "0.0.0.0"},
        {"database_url": f"postgresql://u:{SECRET}@db/x", "device": "abacus"},
    ],
)
def test_no_secret_stands_in_a_refusal(values: dict[str, str]) -> None:
    told = refusal(**values)
    assert SECRET not in told
    assert SECRET[:6] not in told


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a compose file may pass `${OSTEOGATE_POLICY_FILE:-}` on."""
    for name in ("POLICY_FILE", "WEB_PASSWORD_FILE", "DEVICE", "QUIET_SECONDS", "PEERS"):
        monkeypatch.setenv(f"OSTEOGATE_{name}", "")
    assert Settings() == Settings.model_construct(**{name: one.default for name, one in Settings.model_fields.items()})


def test_children_of_up_find_the_same_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, destinations = secret(tmp_path), tmp_path / "destinations"
    destinations.write_text("pacs=dicom://PACS@10.0.0.5:4242\n")
    settings = Settings(
        data_dir=tmp_path,
        database_url="postgresql://u@db/x",
        database_password_file=file,
        broker_url="redis://b",
        broker_password_file=file,
        web_password_file=file,
        destinations_file=destinations,
    )
    environment = environment_of(settings)
    assert SECRET not in str(environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings
