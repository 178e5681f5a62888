"""A DICOMweb service for tests: honest about what it was sent, and dishonest on demand."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom import dcmread
from python_multipart.multipart import MultipartParser, parse_options_header

Reply = Callable[["Request"], tuple[int, Any]]  # HTTP status; a document, or bytes as they are


@dataclass
class Request:
    """One request as it came, taken apart."""

    path: str
    headers: dict[str, str]
    parts: list[tuple[dict[str, str], bytes]]

    @property
    def uids(self) -> list[str]:
        """The SOP instance UIDs of the objects in it."""
        return [str(dcmread(BytesIO(content)).SOPInstanceUID) for _, content in self.parts]


@dataclass
class Service:
    """The service's address, what it was sent, and what it shall answer."""

    port: int
    reply: Reply
    requests: list[Request] = field(default_factory=list)
    connections: set[int] = field(default_factory=set)  # ports that requests came from

    def url(self, user: str = "", scheme: str = "http") -> str:
        return f"{scheme}://{user}127.0.0.1:{self.port}/dicom-web"


def stored(request: Request) -> tuple[int, Any]:
    """Everything was stored."""
    return 200, {"00081199": {"vr": "SQ", "Value": [item(uid) for uid in request.uids]}}


def item(uid: str, **reasons: int) -> dict[str, Any]:
    """One item of a Store Instances Response; `warning` and `failure` are its reasons."""
    tags = {"warning": "00081196", "failure": "00081197"}
    made: dict[str, Any] = {"00081155": {"vr": "UI", "Value": [uid]}}
    return made | {tags[name]: {"vr": "US", "Value": [value]} for name, value in reasons.items()}


@contextmanager
def serving(reply: Reply = stored, *, certificate: Path | None = None) -> Iterator[Service]:
    """A service on a free port; `certificate` (with its key, PEM) makes it speak TLS."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kind, options = parse_options_header(self.headers["Content-Type"])
            assert (kind, options[b"type"]) == (b"multipart/related", b"application/dicom")
            request = Request(self.path, dict(self.headers), _parts(body, options[b"boundary"]))
            service.requests.append(request)
            service.connections.add(self.client_address[1])
            status, answer = service.reply(request)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/dicom+json")
            self.send_header("Content-Length", str(len(content)))
            if status // 100 == 3:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    service = Service(server.server_address[1], reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _parts(body: bytes, boundary: bytes) -> list[tuple[dict[str, str], bytes]]:
    """The parts by python-multipart, which knows nothing of how they were put together."""
    parts: list[tuple[dict[str, str], bytearray]] = []
    name, value = bytearray(), bytearray()

    def begin() -> None:
        parts.append(({}, bytearray()))

    def name_data(data: bytes, start: int, end: int) -> None:
        name.extend(data[start:end])

    def value_data(data: bytes, start: int, end: int) -> None:
        value.extend(data[start:end])

    def header_end() -> None:
        parts[-1][0][name.decode().lower()] = value.decode()
        name.clear()
        value.clear()

    def content(data: bytes, start: int, end: int) -> None:
        parts[-1][1].extend(data[start:end])

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": begin,
            "on_header_field": name_data,
            "on_header_value": value_data,
            "on_header_end": header_end,
            "on_part_data": content,
        },
    )
    parser.write(body)
    parser.finalize()
    return [(headers, bytes(data)) for headers, data in parts]
