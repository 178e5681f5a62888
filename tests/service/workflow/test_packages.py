"""Packages on disk: signed, exported without a patient, and taken back only byte for byte."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from service.workflow import packages
from service.workflow.packages import Kept, Library, PackageRefused, patient_words
from tests.service.workflow import toy_models

Members = dict[str, bytes]


@pytest.fixture
def home(tmp_path: Path) -> Library:
    return toy_models.library(tmp_path / "home")


@pytest.fixture
def kept(home: Library, tmp_path: Path) -> Kept:
    return home.keep_run(toy_models.run(tmp_path / "run"))


def exported(at: Library, kept: Kept) -> bytes:
    out = io.BytesIO()
    at.export(kept.path, kept.hashes, kept.signature, out)
    return out.getvalue()


def members(content: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(files: Members) -> io.BytesIO:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    out.seek(0)
    return out


def test_a_run_is_kept_under_its_hash_with_every_files_hash(home: Library, kept: Kept, tmp_path: Path) -> None:
    folder = home.root / kept.sha256
    assert sorted(kept.hashes) == sorted(
        f"{file.parent.name}/{file.name}" for file in folder.rglob("*") if file.is_file()
    )
    assert {"package/weights.safetensors", "package/manifest.json", "report/candidate.json", "report/champion.json"} < {
        *kept.hashes
    }
    assert home.load(kept.path, kept.hashes, kept.signature).sha256 == kept.sha256
    assert sorted(path.name for path in home.root.iterdir()) == [kept.sha256]  # no draft is left
    assert kept.reports["candidate"]["model_sha256"] == kept.sha256
    manifest = (tmp_path / "run" / "manifest.json").read_bytes()
    run = json.loads((folder / "report" / "run.json").read_text())
    assert run == {"run_manifest_sha256": hashlib.sha256(manifest).hexdigest()}
    assert b"4711" not in b"".join(members(exported(home, kept)).values())  # it names studies, and stays at home


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    home = toy_models.library(tmp_path)
    signed: list[str] = []
    threads = [threading.Thread(target=lambda: signed.append(home.sign({}))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(signed) == 8
    assert len(set(signed)) == 1
    assert stat.S_IMODE(home.key_file.stat().st_mode) == 0o600
    assert [file.name for file in home.key_file.parent.iterdir()] == ["models.key"]
    assert home.key_file.read_text() not in (home.key_id(), signed[0])
    home.key_file.write_text("short")
    with pytest.raises(PackageRefused, match="no key"):
        home.sign({})


@pytest.mark.parametrize("name", ["package/weights.safetensors", "package/config.json", "report/candidate.json"])
def test_an_altered_file_is_named(home: Library, kept: Kept, name: str) -> None:
    file = home.root / kept.path / name
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(PackageRefused, match=f"{name} was altered"):
        home.load(kept.path, kept.hashes, kept.signature)
    file.unlink()
    with pytest.raises(PackageRefused, match=f"{name} is missing"):
        home.load(kept.path, kept.hashes, kept.signature)


def test_hashes_that_somebody_wrote_into_the_registry_do_not_pass(home: Library, kept: Kept) -> None:
    with pytest.raises(PackageRefused, match="signature"):
        home.load(kept.path, {**kept.hashes, "package/config.json": "0" * 64}, kept.signature)
    with pytest.raises(PackageRefused, match="signature"):
        home.load(kept.path, kept.hashes, None)


def test_a_run_without_its_report_is_not_kept(home: Library, tmp_path: Path) -> None:
    run = toy_models.run(tmp_path / "run")
    report = run / "report" / "champion" / "report.json"
    report.write_text("[]")
    with pytest.raises(PackageRefused, match="no report"):
        home.keep_run(run)
    report.unlink()
    with pytest.raises(PackageRefused, match="missing"):
        home.keep_run(run)
    assert list(home.root.iterdir()) == []


def test_another_site_checks_the_hashes_and_calls_the_signature_foreign(
    home: Library, kept: Kept, tmp_path: Path
) -> None:
    content = exported(home, kept)
    away = toy_models.library(tmp_path / "away")
    taken = away.receive(io.BytesIO(content))
    assert (taken.sha256, taken.hashes) == (kept.sha256, kept.hashes)
    assert taken.provenance["signature"] == "foreign"
    assert taken.provenance["signed_by"] == home.key_id() != away.key_id()
    assert taken.signature != kept.signature
    assert away.load(taken.path, taken.hashes, taken.signature).sha256 == kept.sha256
    back = home.receive(io.BytesIO(content))
    assert back.provenance["signature"] == "this site's"
    assert home.key_file.read_text().encode() not in content


def test_the_reports_of_another_site_never_replace_our_own(home: Library, kept: Kept) -> None:
    content = exported(home, kept)
    report = home.root / kept.path / "report" / "candidate.json"
    ours = json.loads(report.read_text()) | {"n_patients_real": 61}
    report.write_text(json.dumps(ours))
    assert home.receive(io.BytesIO(content)).reports["candidate"]["n_patients_real"] == 61


def _altered(name: str, change: Callable[[bytes], bytes]) -> Callable[[Members], Members]:
    return lambda files: {**files, name: change(files[name])}


def _signed(change: Callable[[dict[str, object]], None]) -> Callable[[Members], Members]:
    def spoil(files: Members) -> Members:
        told = json.loads(files["signature.json"])
        change(told)
        return {**files, "signature.json": json.dumps(told).encode()}

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_altered("package/weights.safetensors", lambda old: old[:-1] + b"x"), "package/weights.safetensors was alt"),
        (_altered("package/manifest.json", lambda old: old + b" "), "package/manifest.json was altered"),
        (_altered("report/candidate.json", lambda old: old.replace(b"60", b"61")), "report/candidate.json was altered"),
        (lambda files: {k: v for k, v in files.items() if k != "report/champion.json"}, "champion.json is missing"),
        (lambda files: {k: v for k, v in files.items() if k != "package/manifest.json"}, "manifest.json is missing"),
        (lambda files: {k: v for k, v in files.items() if k != "signature.json"}, "signature.json is missing"),
        (lambda files: {**files, "package/extra.json": b"{}"}, "package/extra.json was added"),
        (lambda files: {**files, "../outside": b""}, "no place"),
        (lambda files: {**files, "/etc/cron.d/x": b""}, "no place"),
        (lambda files: {**files, "package/../../x": b""}, "no place"),
        (lambda files: {**files, "package/.hidden": b""}, "no place"),
        (lambda files: {**files, "package/deep/x.json": b""}, "no place"),
        (lambda files: {**files, "package\\x.json": b""}, "no place"),
        (lambda files: {**files, "package/Config.json": b"{}"}, "one name"),
        (lambda files: {**files, "package/zeros.json": bytes(5_000_000)}, "grow"),
        (lambda files: {**files, **{f"package/{n}.json": b"" for n in range(70)}}, "at most"),
        (_signed(lambda told: told.update(format=2)), "format"),
        (_signed(lambda told: told.update(hashes=[])), "no hashes"),
        (_signed(lambda told: told.update(key=1)), "no signature"),
        (_altered("signature.json", lambda _: b"{"), "not JSON"),
        (_altered("signature.json", lambda _: b"[" * 100_000), "not JSON"),
    ],
)
def test_what_is_not_byte_for_byte_what_was_signed_is_refused_by_name(
    home: Library, kept: Kept, tmp_path: Path, spoil: Callable[[Members], Members], words: str
) -> None:
    away = toy_models.library(tmp_path / "away")
    with pytest.raises(PackageRefused, match=words):
        away.receive(zipped(spoil(members(exported(home, kept)))))
    assert list(away.root.iterdir()) == []  # nothing is left, nothing was written elsewhere
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "home", "run"]


def test_our_own_key_with_a_false_signature_is_refused(home: Library, kept: Kept) -> None:
    forged = _signed(lambda told: told.update(hmac_sha256="0" * 64))
    with pytest.raises(PackageRefused, match="does not bear its signature"):
        home.receive(zipped(forged(members(exported(home, kept)))))


def test_links_bombs_and_ciphers_are_refused(
    home: Library, kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = toy_models.library(tmp_path / "away")
    files = members(exported(home, kept))
    link = zipfile.ZipInfo("package/link.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    packed = zipfile.ZipInfo("package/other.json")
    packed.compress_type = zipfile.ZIP_LZMA
    for info, words in ((link, "plain file"), (packed, "not read here")):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
            archive.writestr(info, b"/etc/passwd")
        with pytest.raises(PackageRefused, match=words):
            away.receive(io.BytesIO(out.getvalue()))
    monkeypatch.setattr(packages, "MAX_TOTAL_BYTES", 1000)
    with pytest.raises(PackageRefused, match="more than 1000 bytes"):
        away.receive(zipped(files))


@pytest.mark.parametrize("cut", [0, 10, 400, -30])
def test_what_is_no_zip_or_half_of_one_is_refused(home: Library, kept: Kept, tmp_path: Path, cut: int) -> None:
    away = toy_models.library(tmp_path / "away")
    with pytest.raises(PackageRefused, match="no ZIP"):
        away.receive(io.BytesIO(exported(home, kept)[:cut]))


def test_a_flipped_byte_of_the_weights_is_refused(home: Library, kept: Kept, tmp_path: Path) -> None:
    content = bytearray(exported(home, kept))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        where = archive.getinfo("package/weights.safetensors").header_offset + 80
    content[where] ^= 1
    with pytest.raises(PackageRefused):
        toy_models.library(tmp_path / "away").receive(io.BytesIO(content))


def test_words_in_which_a_patient_could_stand() -> None:
    texts = {
        "report/a.json": '{"n": 1234567, "cohort": {"seen": ["P-1001", "1.2.840.99"]}, "DOE^JANE": "F"}',
        "package/model_card.md": "Yoshida 2023, 3360 steps; patient 99887766.",
        "report/broken.json": "P-2002 {",
    }
    found = patient_words(texts)
    assert {"P-1001", "1.2.840.99", "DOE^JANE", "99887766.", "P-2002"} <= set(found)
    assert not {"1234567", "2023", "3360", "F"} & set(found)
    assert found["P-1001"] == {"report/a.json"}
