"""STOW-RS against an honest service, dishonest ones, and a real Orthanc."""

from __future__ import annotations

import base64
import logging
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.dicom.send import Answer
from service.dicom.stow import MAX_ANSWER_BYTES, store_files
from tests import orthanc
from tests.conftest import absent
from tests.service.dicom.dicomweb import Request, item, serving, stored
from tests.service.dicom.harness import slice_file

SECRET = "s3cret&w/ürd"
UID = "1.2.3.4.1"  # of harness.slice_file(number=1)


def store(paths: list[Path], url: str, **options: Any) -> list[Answer]:
    answers: list[Answer] = []
    options = {"timeout_seconds": 30.0, **options}
    store_files(paths, url=url, on_answer=answers.append, **options)
    return answers


def answer_to(tmp_path: Path, status: int, document: Any) -> Answer:
    """What is made of one answer to one object."""
    with serving(lambda _: (status, document)) as service:
        (answer,) = store([slice_file(tmp_path)], service.url())
    return answer


# Success


def test_the_very_bytes_arrive_each_object_for_itself_over_one_connection(tmp_path: Path) -> None:
    files = [slice_file(tmp_path, number) for number in (1, 2, 3)]
    with serving() as service:
        answers = store(files, service.url() + "/")
    assert answers == [Answer(path, status=0) for path in files]
    assert [request.path for request in service.requests] == ["/dicom-web/studies"] * 3
    assert [request.parts for request in service.requests] == [
        [({"content-type": "application/dicom"}, path.read_bytes())] for path in files
    ]
    assert {request.headers["Accept"] for request in service.requests} == {"application/dicom+json"}
    assert len(service.connections) == 1


def test_a_query_in_the_address_stays(tmp_path: Path) -> None:
    with serving() as service:
        store([slice_file(tmp_path)], f"{service.url()}?tenant=a")
    assert service.requests[0].path == "/dicom-web/studies?tenant=a"


def test_a_warning_is_a_success_with_a_remark(tmp_path: Path) -> None:
    for status in (200, 202):
        answer = answer_to(tmp_path, status, {"00081199": {"vr": "SQ", "Value": [item(UID, warning=0xB000)]}})
        assert (answer.failure, answer.remark, answer.status) == (None, "stored with warning 0xB000", 0xB000)


def test_an_answer_wrapped_in_a_list_counts(tmp_path: Path) -> None:
    assert answer_to(tmp_path, 200, [{"00081199": {"vr": "SQ", "Value": [item(UID)]}}]).failure is None


# Failure


@pytest.mark.parametrize("status", [200, 202, 409])
def test_a_failure_item_counts_whatever_the_status(tmp_path: Path, status: int) -> None:
    refused = {"00081198": {"vr": "SQ", "Value": [item("9.9"), item(UID, failure=0xA900)]}}
    answer = answer_to(tmp_path, status, refused)
    assert answer.failure == f"refused with reason 0xA900 (HTTP {status})"
    assert answer.status == 0xA900


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<html>please log in</html>",
        b"\xff\xfe",
        [],
        [1, 2],
        {"00081199": {"vr": "SQ", "Value": [item("9.9")]}},
        {"00081199": {"vr": "SQ", "Value": [None]}},
        {"00081199": {"vr": "SQ"}},
        {"00081199": "text"},
    ],
)
def test_success_must_name_the_object(tmp_path: Path, document: Any) -> None:
    """A login page answers 200 too; a report must not be lost to it."""
    assert answer_to(tmp_path, 200, document).failure == "HTTP 200: its answer does not say that it holds the object"


@pytest.mark.parametrize(
    ("status", "meaning"),
    [
        (400, ": it cannot understand the request"),
        (401, ": it does not know our user and password"),
        (404, ": there is no STOW-RS at this address"),
        (409, ": it stored nothing"),
        (503, ": it is busy or out of storage"),
        (500, ""),
        (302, ""),
    ],
)
def test_a_refusal_is_told_in_words(tmp_path: Path, status: int, meaning: str) -> None:
    assert answer_to(tmp_path, status, b"").failure == f"HTTP {status}{meaning}"


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    with serving(lambda _: (307, b"")) as service:
        (answer,) = store([slice_file(tmp_path)], service.url())
    assert answer.failure == "HTTP 307"
    assert len(service.requests) == 1


def test_what_one_refuses_says_nothing_about_the_next(tmp_path: Path) -> None:
    def picky(request: Request) -> tuple[int, Any]:
        return stored(request) if request.uids == ["1.2.3.4.2"] else (400, b"")

    with serving(picky) as service:
        answers = store([slice_file(tmp_path, number) for number in (1, 2, 3)], service.url())
    assert [answer.failure is None for answer in answers] == [False, True, False]


def test_nobody_there_is_told(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (answer,) = store([slice_file(tmp_path)], f"http://127.0.0.1:{port}/dicom-web")
    assert answer.failure is not None
    assert answer.failure.startswith(f"127.0.0.1:{port}: ")


def test_one_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with mute() as (port, _):
        (answer,) = store([slice_file(tmp_path)], f"http://127.0.0.1:{port}/", timeout_seconds=0.3)
    assert answer.failure == f"127.0.0.1:{port}: no answer in time"


def test_an_answer_without_end_is_given_up(tmp_path: Path) -> None:
    assert (answer_to(tmp_path, 200, b" " * (MAX_ANSWER_BYTES + 1)).failure or "").endswith("its answer does not end")


def test_a_file_that_is_no_dicom_or_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no")
    with serving() as service:
        answers = store([tmp_path / "text", tmp_path / "gone", slice_file(tmp_path)], service.url())
    assert [(answer.failure or "")[:13] for answer in answers] == ["can't be read", "can't be read", ""]
    assert len(service.requests) == 1


def test_it_stops_when_told_to(tmp_path: Path) -> None:
    asked = iter([True, False])
    with serving() as service:
        answers = store([slice_file(tmp_path, n) for n in (1, 2, 3)], service.url(), going_on=lambda: next(asked))
    assert len(answers) == len(service.requests) == 1


# Secrets


def test_user_and_password_go_into_the_header_and_nowhere_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    quoted = "s3cret%26w%2F%C3%BCrd"
    answers: list[Answer] = []
    with serving(lambda _: (401, b"")) as service, caplog.at_level(logging.DEBUG):
        answers += store([slice_file(tmp_path)], service.url(f"dr%40a:{quoted}@"))
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            answers += store([slice_file(tmp_path)], f"http://dr%40a:{quoted}@127.0.0.1:{nobody.getsockname()[1]}/")
    encoded = base64.b64encode(f"dr@a:{SECRET}".encode()).decode()
    assert service.requests[0].headers["Authorization"] == f"Basic {encoded}"
    told = caplog.text + "".join(str(answer) for answer in answers) + service.requests[0].path
    assert len(answers) == 2
    assert "HTTP 401: it does not know our user and password" in told
    for secret in (SECRET, quoted, encoded):
        assert secret not in told


def test_without_user_nothing_is_authorised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9/")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9/")
    with serving() as service:
        (answer,) = store([slice_file(tmp_path)], service.url())
    assert answer.failure is None
    assert "Authorization" not in service.requests[0].headers


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = self_signed(tmp_path)
    with serving(certificate=certificate) as service:
        (refused,) = store([slice_file(tmp_path)], service.url(scheme="https"))
        assert "CERTIFICATE_VERIFY_FAILED" in (refused.failure or "")
        assert service.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # as if the machine's authorities knew it
        (taken,) = store([slice_file(tmp_path)], service.url(scheme="https"))
        assert taken.failure is None


def self_signed(folder: Path) -> Path:
    """A certificate of 127.0.0.1 and its key, in one PEM file."""
    program = shutil.which("openssl") or absent("openssl")
    key, certificate, both = folder / "key.pem", folder / "cert.pem", folder / "both.pem"
    subprocess.run(
        [
            *(program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", str(key), "-out", str(certificate), "-subj", "/CN=test"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-days", "3650"),
        ],
        check=True,
        capture_output=True,
    )
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    return both


@contextmanager
def mute() -> Iterator[tuple[int, list[socket.socket]]]:
    """A server that takes connections and never says a word: its port, and the connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def take() -> None:
            try:
                while True:
                    taken.append(server.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1], taken
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for one in taken:
                one.close()


# A real one


def test_orthanc_takes_the_very_bytes(tmp_path: Path) -> None:
    files = [slice_file(tmp_path / "slices", number) for number in (1, 2)]
    with orthanc.running(tmp_path / "orthanc", plugins=["libOrthancDicomWeb.so"]) as pacs:
        assert [answer.failure for answer in store(files, f"{pacs.url}/dicom-web")] == [None, None]
        assert [answer.failure for answer in store(files, f"{pacs.url}/dicom-web")] == [None, None]
        assert pacs.instances() == ["1.2.3.4.1", "1.2.3.4.2"]
        assert pacs.file("1.2.3.4.2") == files[1].read_bytes()
        (wrong,) = store(files[:1], f"{pacs.url}/elsewhere")
        assert wrong.failure == "HTTP 404: there is no STOW-RS at this address"
