"""`osteogate health PART`: does this process do its work? For supervisors: one sentence, exit status 0 or 1.

Asked from inside the part's own container (or machine), with the part's own settings.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Mapping
from ipaddress import ip_address

from service.domain.errors import OsteogateError
from service.settings import Settings
from service.workflow.pulse import Pulse

PATIENCE_SECONDS = 5.0
OLDEST_BEAT_SECONDS = 120.0  # a round of the steward, or the longest pause of a loaded machine, takes less
READY = "/api/v1/health/ready"
A_ABORT = b"\x07\x00\x00\x00\x00\x04\x00\x00\x00\x00"  # PS3.8 table 9-26


class Unhealthy(OsteogateError):
    """A part of the installation does not do its work; the text says what was seen."""


def check(part: str, settings: Settings) -> str:
    """One sentence about a healthy part.

    Raises:
        Unhealthy: it is not.
    """
    return CHECKS[part](settings)


def _listener(settings: Settings) -> str:
    """An A-ABORT where an A-ASSOCIATE-RQ belongs is answered with an A-ABORT, and recorded nowhere (PS3.8 9.2, Sta2).

    The answer comes from the listener's own loop; that a connection is accepted would say only that the kernel lives.
    A C-ECHO would need an AE title on the list of peers, and without one leave a refusal on `/intake` each time.
    """
    address = _here(settings.dicom_host), settings.dicom_port
    try:
        with socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection:
            connection.sendall(A_ABORT)
            answer = connection.recv(len(A_ABORT))
    except OSError as error:
        raise Unhealthy(f"the listener does not answer on port {settings.dicom_port}: {error}") from error
    if answer[:1] != A_ABORT[:1]:
        raise Unhealthy(f"what answers on port {settings.dicom_port} is no DICOM listener")
    return f"the listener answers on port {settings.dicom_port}"


def _web(settings: Settings) -> str:
    # http.client, not urllib: a proxy that the environment names must never stand between us and ourselves.
    web = http.client.HTTPConnection(_here(settings.web_host), settings.web_port, timeout=PATIENCE_SECONDS)
    try:
        web.request("GET", READY, headers={"Host": "localhost"})
        answer = web.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Unhealthy(f"the pages do not answer on port {settings.web_port}: {error}") from error
    finally:
        web.close()
    if answer.status != http.HTTPStatus.OK:
        raise Unhealthy(f"the pages answer {answer.status} to {READY}")
    return "the pages are ready"


def _steward(settings: Settings) -> str:
    return _pulse(settings, "steward")


def _worker(settings: Settings) -> str:
    return _pulse(settings, "worker")


def _pulse(settings: Settings, part: str) -> str:
    age = Pulse(settings.pulses, part).age_seconds()
    if age is None:
        raise Unhealthy(f"the {part} has shown no pulse yet")
    if age > OLDEST_BEAT_SECONDS:
        raise Unhealthy(f"the {part}'s last pulse is {age:.0f} s old")
    return f"the {part}'s last pulse is {age:.0f} s old"


def _here(host: str) -> str:
    """Where a server that is bound to every address is reached from its own machine."""
    address = ip_address(host)
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"


CHECKS: Mapping[str, Callable[[Settings], str]] = {
    "listener": _listener,
    "web": _web,
    "steward": _steward,
    "worker": _worker,
}
