"""Every setting of an installation: one frozen class, environment prefix `OSTEOGATE_`.

Built only in `service.cli` (and by tests) and passed inward; nothing else reads the environment.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import quote, unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.domain.training import KEEP_SECONDS

MIB = 1024 * 1024
MAX_SOCKET_PATH_BYTES = 100
MIN_WEB_PASSWORD_CHARACTERS = 12


class Peer(BaseModel):
    """A DICOM node that may send to us: its AE title and, optionally, the addresses it may come from."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    ae_title: str = Field(min_length=1, max_length=16)
    network: str | None = None  # an address or CIDR network; None means any address

    def admits(self, ae_title: str, address: str) -> bool:
        """True when this entry names the calling AE title at this address."""
        if ae_title != self.ae_title:
            return False
        return self.network is None or ip_address(address) in ip_network(self.network, strict=False)


class Destination(BaseModel):
    """Where results are sent: a DICOM node (C-STORE) or a DICOMweb service (STOW-RS)."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)  # an address may hold a password

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")  # ours: stands in the outbox and on the pages
    url: str  # dicom://AETITLE@host:port, or http(s)://[user:password@]host[:port]/path, secrets and all

    @model_validator(mode="after")
    def _check(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme == "dicom":
            title = unquote(parts.username or "")
            more = parts.password is not None or parts.path.strip("/") or parts.query
            if not (1 <= len(title) <= 16 and parts.hostname and parts.port) or more:
                raise ValueError(f"destination {self.name}: dicom://AETITLE@host:port is needed")
        elif parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"destination {self.name}: a dicom://, http:// or https:// address is needed")
        return self

    @property
    def is_dicomweb(self) -> bool:
        """STOW-RS rather than C-STORE."""
        return urlsplit(self.url).scheme != "dicom"

    @property
    def address(self) -> str:
        """The address as people may see it: without user and password."""
        parts = urlsplit(self.url)
        if not self.is_dicomweb:
            return self.url
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"


class Settings(BaseSettings):
    """The settings of one installation; see README, "Settings", for each one's meaning.

    A setting named `..._file` that stands for a secret is read when it is needed and kept nowhere: the environment of
    a process is no secret (`docker inspect` shows it), the files under /run/secrets are.
    """

    model_config = SettingsConfigDict(
        env_prefix="OSTEOGATE_", frozen=True, extra="ignore", env_ignore_empty=True, hide_input_in_errors=True
    )

    data_dir: Path = Path("osteogate-data")
    database_url: str = ""  # empty: SQLite in data_dir
    database_password_file: Path | None = None  # holds the password that database_url leaves out
    broker_url: str = ""  # empty: the bundled Valkey on a unix socket in data_dir
    broker_password_file: Path | None = None  # holds the password that broker_url leaves out
    pulse_dir: Path | None = None  # None: data_dir/pulse; where steward and worker show that they are alive
    policy_file: Path | None = None
    references_dir: Path | None = None  # a site's own young-adult references, *.toml
    weights_dir: Path | None = None  # None: data_dir/weights where it exists, else the built-in networks
    device: Literal["auto", "cuda", "cpu"] = "auto"
    prediction_precision: Literal["fp32", "auto", "bf16"] = "fp32"

    # DICOM
    ae_title: str = Field(default="OSTEOGATE", min_length=1, max_length=16)
    dicom_host: str = "127.0.0.1"
    dicom_port: int = Field(default=11112, ge=0, le=65535)
    peers: Annotated[tuple[Peer, ...], NoDecode] = ()  # "AET@10.0.0.0/8,AET2"; empty: any AE, loopback only
    destinations: Annotated[tuple[Destination, ...], NoDecode] = ()  # "pacs=dicom://AET@10.0.0.5:4242,..."
    destinations_file: Path | None = None  # the same text in a file, for addresses with passwords
    quiet_seconds: float = Field(default=30.0, gt=0)
    incomplete_patience_seconds: float = Field(default=300.0, gt=0)

    # Limits of intake (RULES 3)
    max_pdu_bytes: int = Field(default=128 * 1024, ge=4096)
    max_instance_bytes: int = Field(default=512 * MIB, ge=1024)
    max_instances_per_study: int = Field(default=10_000, ge=1)
    max_associations: int = Field(default=32, ge=1)
    max_associations_per_peer: int = Field(default=8, ge=1)
    idle_seconds: float = Field(default=60.0, gt=0)
    minimum_bytes_per_second: int = Field(default=1024, ge=0)
    handshake_seconds: float = Field(default=10.0, gt=0)
    disk_floor_bytes: int = Field(default=1024 * MIB, ge=0)

    # Work
    lease_seconds: float = Field(default=60.0, gt=0)
    job_deadline_seconds: float = Field(default=1800.0, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    steward_interval_seconds: float = Field(default=2.0, gt=0)
    rering_seconds: float = Field(default=30.0, gt=0)

    # Training runs
    training_deadline_seconds: float = Field(default=604_800.0, gt=0)  # from a run's first step to its last
    training_disk_bytes: int = Field(default=4096 * MIB, ge=0)  # that must be free before a run begins
    training_keep_seconds: float = Field(default=KEEP_SECONDS, ge=0)  # how long a run that stopped can be resumed

    # Web
    web_host: str = "127.0.0.1"
    web_port: int = Field(default=8080, ge=0, le=65535)
    web_password_file: Path | None = None  # everybody's password (HTTP Basic), until the first user exists
    web_requests_per_minute: int = Field(default=1200, ge=60)  # of one user, key or, without users, address
    session_idle_seconds: float = Field(default=1800.0, ge=60)  # a browser in which nobody does anything is logged out
    session_seconds: float = Field(default=43_200.0, ge=60)  # and at the latest after this

    # The outbox
    delivery_retry_seconds: float = Field(default=10.0, gt=0)  # the first back-off; doubled by every failure
    delivery_retry_ceiling_seconds: float = Field(default=3600.0, gt=0)
    delivery_timeout_seconds: float = Field(default=60.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _parse_lists(cls, values: dict[str, object]) -> dict[str, object]:
        parsers: dict[str, Callable[[str], BaseModel]] = {"peers": _peer, "destinations": _destination}
        if values.get("destinations_file"):
            values = {**values, "destinations": _destinations_in(Path(str(values["destinations_file"])))}
        for name, parse in parsers.items():
            text = values.get(name)
            if isinstance(text, str):
                entries = [entry.strip() for entry in text.split(",") if entry.strip()]
                values = {**values, name: tuple(parse(entry) for entry in entries)}
        return values

    @model_validator(mode="after")
    def _destinations_have_names_of_their_own(self) -> Self:
        names = [destination.name for destination in self.destinations]
        if len(set(names)) != len(names):
            raise ValueError("OSTEOGATE_DESTINATIONS names a destination twice")
        return self

    @model_validator(mode="after")
    def _open_only_on_loopback(self) -> Self:
        _ = self.web_password  # too short or unreadable: told now; whether it is needed, `service.api.app` knows
        if not self.peers and not ip_address(self.dicom_host).is_loopback:
            raise ValueError("OSTEOGATE_PEERS must name the allowed AE titles before listening off loopback")
        return self

    @property
    def sqlalchemy_url(self) -> str:
        """The database in force, password and all: not for people's eyes."""
        if not self.database_url:
            return f"sqlite:///{self.data_dir.resolve() / 'osteogate.sqlite3'}"
        return _with_password(self.database_url, self.database_password_file, "OSTEOGATE_DATABASE_PASSWORD_FILE")

    @property
    def celery_url(self) -> str:
        """The broker in force, password and all: not for people's eyes."""
        if not self.broker_url:
            return f"redis+socket://{self.broker_socket}"
        return _with_password(self.broker_url, self.broker_password_file, "OSTEOGATE_BROKER_PASSWORD_FILE")

    @property
    def web_password(self) -> str | None:
        """What every request must know, or None: the pages are open (and on loopback only).

        Raises:
            ValueError: the file cannot be read, or the password is too short.
        """
        if self.web_password_file is None:
            return None
        password = _secret(self.web_password_file, "OSTEOGATE_WEB_PASSWORD_FILE")
        if len(password) < MIN_WEB_PASSWORD_CHARACTERS:
            least = MIN_WEB_PASSWORD_CHARACTERS
            raise ValueError(f"the password in OSTEOGATE_WEB_PASSWORD_FILE has fewer than {least} characters")
        return password

    @property
    def broker_socket(self) -> Path:
        """Unix socket of the bundled broker; its path may hold 107 bytes, so a deep folder gets a short one."""
        inside = self.data_dir.resolve() / "broker" / "broker.sock"
        if len(os.fsencode(inside)) <= MAX_SOCKET_PATH_BYTES:
            return inside
        digest = hashlib.sha256(os.fsencode(inside)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"osteogate-{os.getuid()}-{digest}" / "broker.sock"

    @property
    def spool_dir(self) -> Path:
        """Where received instances are kept."""
        return self.data_dir.resolve() / "spool"

    @property
    def pulses(self) -> Path:
        """Where the files lie whose age says that steward and worker are alive."""
        return self.pulse_dir or self.data_dir.resolve() / "pulse"

    @property
    def models_dir(self) -> Path:
        """Where the packages lie that were trained or imported here."""
        return self.data_dir.resolve() / "models"

    @property
    def models_key_file(self) -> Path:
        """The key that signs this site's packages; made when first needed."""
        return self.data_dir.resolve() / "keys" / "models.key"

    @property
    def results_dir(self) -> Path:
        """Where pictures and label maps of results are kept."""
        return self.data_dir.resolve() / "results"

    @property
    def training_dir(self) -> Path:
        """Where training runs keep their crops, checkpoints, packages and reports, a folder each by its number."""
        return self.data_dir.resolve() / "training"


def _destination(entry: str) -> Destination:
    name, equals, url = entry.partition("=")
    if not equals:  # the entry itself is not told: it may hold a password
        raise ValueError("OSTEOGATE_DESTINATIONS: an entry is not name=address")
    return Destination(name=name.strip(), url=url.strip())


def _peer(entry: str) -> Peer:
    ae_title, _, network = entry.partition("@")
    return Peer(ae_title=ae_title.strip(), network=network.strip() or None)


def _destinations_in(file: Path) -> str:
    """The destinations in a file, one a line or separated by commas; lines that start with # are remarks."""
    lines = _read(file, "OSTEOGATE_DESTINATIONS_FILE").splitlines()
    return ",".join(line for line in lines if not line.lstrip().startswith("#"))


def _with_password(url: str, file: Path | None, setting: str) -> str:
    """The URL with the file's password in it.

    Raises:
        ValueError: the file cannot be read or is empty, the URL has a password already, or none can be put into it.
    """
    if file is None:
        return url
    parts = urlsplit(url)
    if parts.hostname is None or parts.password is not None:
        raise ValueError(f"{setting} needs an address with a host and without a password")
    user, _, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}:{quote(_secret(file, setting), safe='')}@{host}").geturl()


def _secret(file: Path, setting: str) -> str:
    """The secret that a file holds, without the line end that editors and `echo` leave."""
    secret = _read(file, setting).rstrip("\r\n")
    if not secret:
        raise ValueError(f"{setting}: {file} is empty")
    return secret


def _read(file: Path, setting: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}: {file} cannot be read ({type(error).__name__})") from None
