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
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIB = 1024 * 1024
MAX_SOCKET_PATH_BYTES = 100


class Peer(BaseModel):
    """A DICOM node that may send to us: its AE title and, optionally, the addresses it may come from."""

    model_config = ConfigDict(frozen=True)

    ae_title: str = Field(min_length=1, max_length=16)
    network: str | None = None  # an address or CIDR network; None means any address

    def admits(self, ae_title: str, address: str) -> bool:
        """True when this entry names the calling AE title at this address."""
        if ae_title != self.ae_title:
            return False
        return self.network is None or ip_address(address) in ip_network(self.network, strict=False)


class Destination(BaseModel):
    """Where results are sent: a DICOM node (C-STORE) or a DICOMweb service (STOW-RS)."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")  # ours: stands in the outbox and on the pages
    url: str  # dicom://AETITLE@host:port, or http(s)://[user:password@]host[:port]/path, secrets and all

    @model_validator(mode="after")
    def _check(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme == "dicom":
            if not (parts.username and len(unquote(parts.username)) <= 16 and parts.hostname and parts.port):
                raise ValueError(f"destination {self.name}: dicom://AETITLE@host:port is needed")
        elif parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"destination {self.name}: a dicom://, http:// or https:// address is needed")
        return self

    @property
    def is_dicomweb(self) -> bool:
        """STOW-RS rather than C-STORE."""
        return not self.url.startswith("dicom:")

    @property
    def address(self) -> str:
        """The address as people may see it: without user and password."""
        parts = urlsplit(self.url)
        if not self.is_dicomweb:
            return self.url
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"


class Settings(BaseSettings):
    """The settings of one installation; see README, "Settings", for each one's meaning."""

    model_config = SettingsConfigDict(env_prefix="OSTEOGATE_", frozen=True, extra="ignore")

    data_dir: Path = Path("osteogate-data")
    database_url: str = ""  # empty: SQLite in data_dir
    broker_url: str = ""  # empty: the bundled Valkey on a unix socket in data_dir
    policy_file: Path | None = None
    weights_dir: Path | None = None  # None: data_dir/weights where it exists, else the built-in networks
    device: Literal["auto", "cuda", "cpu"] = "auto"

    # DICOM
    ae_title: str = Field(default="OSTEOGATE", min_length=1, max_length=16)
    dicom_host: str = "127.0.0.1"
    dicom_port: int = Field(default=11112, ge=0, le=65535)
    peers: Annotated[tuple[Peer, ...], NoDecode] = ()  # "AET@10.0.0.0/8,AET2"; empty: any AE, loopback only
    destinations: Annotated[tuple[Destination, ...], NoDecode] = ()  # "pacs=dicom://AET@10.0.0.5:4242,..."
    quiet_seconds: float = Field(default=30.0, gt=0)
    incomplete_patience_seconds: float = Field(default=300.0, gt=0)

    # Limits of intake (RULES 3)
    max_pdu_bytes: int = Field(default=128 * 1024, ge=4096)
    max_instance_bytes: int = Field(default=256 * MIB, ge=1024)
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

    # Web
    web_host: str = "127.0.0.1"
    web_port: int = Field(default=8080, ge=0, le=65535)

    # The outbox
    delivery_retry_seconds: float = Field(default=10.0, gt=0)  # the first back-off; doubled by every failure
    delivery_retry_ceiling_seconds: float = Field(default=3600.0, gt=0)
    delivery_timeout_seconds: float = Field(default=60.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _parse_lists(cls, values: dict[str, object]) -> dict[str, object]:
        parsers: dict[str, Callable[[str], BaseModel]] = {"peers": _peer, "destinations": _destination}
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
        if not ip_address(self.web_host).is_loopback:
            raise ValueError("OSTEOGATE_WEB_HOST must be a loopback address: this release has no users yet")
        if not self.peers and not ip_address(self.dicom_host).is_loopback:
            raise ValueError("OSTEOGATE_PEERS must name the allowed AE titles before listening off loopback")
        return self

    @property
    def sqlalchemy_url(self) -> str:
        """The database in force."""
        return self.database_url or f"sqlite:///{self.data_dir.resolve() / 'osteogate.sqlite3'}"

    @property
    def celery_url(self) -> str:
        """The broker in force."""
        return self.broker_url or f"redis+socket://{self.broker_socket}"

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
    def results_dir(self) -> Path:
        """Where pictures and label maps of results are kept."""
        return self.data_dir.resolve() / "results"


def _destination(entry: str) -> Destination:
    name, equals, url = entry.partition("=")
    if not equals:
        raise ValueError(f"OSTEOGATE_DESTINATIONS: {entry!r} is not name=address")
    return Destination(name=name.strip(), url=url.strip())


def _peer(entry: str) -> Peer:
    ae_title, _, network = entry.partition("@")
    return Peer(ae_title=ae_title.strip(), network=network.strip() or None)
