"""A STOW-RS user agent (PS3.18 10.5): objects to a DICOMweb service, their bytes as they are.

One request for each object, over one connection: what a service refuses says nothing about the others. Success is
what the answer says of the object itself (ReferencedSOPSequence), never the HTTP status alone: a login page answers
200 too. User and password of the address go into the Authorization header and nowhere else; redirects are not
followed, the environment's proxies and .netrc not used, and certificates verified against this machine's authorities.
"""

from __future__ import annotations

import json
import secrets
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx

from service.dicom.part10 import NotPart10Error, read_file_meta
from service.dicom.send import Answer

ACCEPT = "application/dicom+json"
MAX_ANSWER_BYTES = 1024 * 1024
_MEANINGS = {
    400: "it cannot understand the request",
    401: "it does not know our user and password",
    403: "our user may not store here",
    404: "there is no STOW-RS at this address",
    409: "it stored nothing",
    413: "the object is too large for it",
    415: "it takes no such objects",
    503: "it is busy or out of storage",
}


class _Unreadable(Exception):
    """The answer is not what PS3.18 10.5.3 asks for."""


def store_files(
    paths: Sequence[Path],
    *,
    url: str,
    on_answer: Callable[[Answer], None],
    going_on: Callable[[], bool] = lambda: True,
    timeout_seconds: float = 60.0,
) -> None:
    """Store every file once, to `url`/studies; `on_answer` hears of each as soon as its fate is known.

    `going_on` is asked before each file is sent; the time-out is that of each of connecting, sending and answering.
    """
    parts = urlsplit(url)
    auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    host = parts.netloc.rpartition("@")[2]
    target = urlunsplit((parts.scheme, host, f"{parts.path.rstrip('/')}/studies", parts.query, ""))
    with httpx.Client(
        auth=auth,
        verify=ssl.create_default_context(),
        trust_env=False,
        follow_redirects=False,
        timeout=timeout_seconds,
    ) as client:
        for path in paths:
            if not going_on():
                return
            on_answer(_store(client, target, path, timeout_seconds))


def _store(client: httpx.Client, target: str, path: Path, timeout_seconds: float) -> Answer:
    try:
        with path.open("rb") as stream:
            uid = read_file_meta(stream).sop_instance_uid
        content = path.read_bytes()
    except (OSError, NotPart10Error) as error:
        return Answer(path, f"can't be read: {error}")
    boundary = secrets.token_hex(16)
    headers = {
        "Accept": ACCEPT,
        "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
    }
    try:
        with client.stream("POST", target, content=_body(content, boundary), headers=headers) as response:
            text = _read(response, time.monotonic() + timeout_seconds)
            return _judge(path, uid, response.status_code, text)
    except (httpx.HTTPError, httpx.InvalidURL, _Unreadable) as error:
        return Answer(path, f"{_host(target)}: {_told(error)}")


def _body(content: bytes, boundary: str) -> bytes:
    """One part of multipart/related (PS3.18 8.6.1.2): the file as it lies on the disk."""
    return b"".join(
        (
            f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode(),
            content,
            f"\r\n--{boundary}--\r\n".encode(),
        )
    )


def _read(response: httpx.Response, until: float) -> bytes:
    content = bytearray()
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            raise _Unreadable("its answer does not end")
        if time.monotonic() > until:
            raise _Unreadable("its answer takes too long")
    return bytes(content)


def _judge(path: Path, uid: str, status: int, text: bytes) -> Answer:
    """What the answer says of this one object (PS3.18 10.5.3 and Annex I.2)."""
    answer = _parsed(text)
    refused = _item(answer, "00081198", uid)
    if refused is not None:
        reason = _number(refused, "00081197")
        return Answer(path, f"refused with reason {_hex(reason)} (HTTP {status})", status=reason)
    stored = _item(answer, "00081199", uid)
    if stored is None or status not in (200, 202):
        meaning = _MEANINGS.get(
            status, "" if status // 100 != 2 else "its answer does not say that it holds the object"
        )
        return Answer(path, f"HTTP {status}" + (f": {meaning}" if meaning else ""))
    warning = _number(stored, "00081196")
    remark = None if warning in (None, 0) else f"stored with warning {_hex(warning)}"
    return Answer(path, remark=remark, status=warning or 0)


def _parsed(text: bytes) -> Mapping[str, Any]:
    """The answer's data set (DICOM JSON model, PS3.18 F); empty where it is none."""
    try:
        answer = json.loads(text)
    except ValueError:  # not JSON, or not even UTF-8
        return {}
    if isinstance(answer, list) and len(answer) == 1:  # some services wrap it
        answer = answer[0]
    return answer if isinstance(answer, dict) else {}


def _item(answer: Mapping[str, Any], tag: str, uid: str) -> Mapping[str, Any] | None:
    """The item of a sequence that refers to our object."""
    for item in _values(answer, tag):
        if isinstance(item, dict) and uid in _values(item, "00081155"):
            return item
    return None


def _number(item: Mapping[str, Any], tag: str) -> int | None:
    value = next(iter(_values(item, tag)), None)
    return value if isinstance(value, int) else None


def _values(item: Mapping[str, Any], tag: str) -> Sequence[Any]:
    element = item.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return values if isinstance(values, list) else []


def _hex(number: int | None) -> str:
    return "unknown" if number is None else f"0x{number:04X}"


def _host(target: str) -> str:
    return urlsplit(target).netloc


def _told(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__
