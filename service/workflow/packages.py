"""Model packages on disk: kept under their hash, signed by this site, written to and read from one file.

    <data>/models/<sha256 of the manifest>/package/    the package (models.package)
    <data>/models/<sha256>/report/candidate.json       its evaluation on the locked test set
    <data>/models/<sha256>/report/champion.json        that of the model it was held against, on the same patients
    <data>/models/<sha256>/report/run.json             the SHA-256 of the training run's manifest

An export is a ZIP of exactly these files with `signature.json`: the SHA-256 of each, and an HMAC-SHA256 over them by
the key of the site that wrote it. The key never leaves its site, so another site can check the hashes (nothing was
altered on the way, nothing is missing), but not the signature: it says that the signature is foreign, and its own gate
judges.

Nothing here is executable, and no patient's data leaves: the run's own manifest (study UIDs, labels) stays at home, and
`patient_words` lets the workflow look for identifiers in everything else.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from models.package import MANIFEST, ModelPackage, PackageError
from service.domain.errors import OsteogateError
from service.settings import MIB, Settings

PACKAGE, REPORT = "package", "report"
CANDIDATE, CHAMPION = f"{REPORT}/candidate.json", f"{REPORT}/champion.json"
RUN = "run.json"
SIGNATURE = "signature.json"
FORMAT = 1
MAX_FILES = 64
MAX_FILE_BYTES = 1024 * MIB  # unpacked; our largest, a ResNet50 in fp16, has 47
MAX_TOTAL_BYTES = 2048 * MIB
MAX_REPORT_BYTES = 16 * MIB
MAX_RATIO = 200  # unpacked over packed, of one file: JSON reaches 20
_MEMBER = re.compile(rf"(?:{PACKAGE}|{REPORT})/[A-Za-z0-9_][A-Za-z0-9_.-]{{0,99}}|{re.escape(SIGNATURE)}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1024 * 1024
_WORD = re.compile(r"[^\s\"'`,;:=|()\[\]{}<>/\\]+")
_SHORTEST_WORD = 4  # shorter ones (L1, F) stand everywhere
_SHORTEST_NUMBER = 7  # in prose: shorter ones are years and counts of steps
_TEXTS = (".json", ".md", ".txt", ".csv")


class PackageRefused(OsteogateError):
    """A file that is no package, or an altered one; the message names what is wrong."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A package that lies in the library, verified: what the registry needs to know of it."""

    sha256: str
    name: str
    version: str
    synthetic_only: bool
    finished: bool
    provenance: Mapping[str, Any]
    hashes: Mapping[str, str]
    signature: str
    reports: Mapping[str, Any]  # candidate and champion, where they are there

    @property
    def path(self) -> str:
        """Relative to the library."""
        return self.sha256


@dataclass(frozen=True, slots=True)
class Library:
    """The folder of packages and the key that signs them."""

    root: Path
    key_file: Path

    @classmethod
    def of(cls, settings: Settings) -> Library:
        """That of an installation."""
        return cls(settings.models_dir, settings.models_key_file)

    # --- keeping ------------------------------------------------------------------------------------------------

    def keep(self, package: Path, reports: Mapping[str, Path], run_manifest: Path | None = None) -> Kept:
        """Copy a package and its reports (`candidate`, `champion`) here; what is here already is verified and kept.

        Of the run's own manifest only its hash is kept: it names studies and patients.

        Raises:
            PackageRefused: a file is missing, altered or unreadable.
        """
        with self._draft() as draft:
            (draft / REPORT).mkdir()
            if run_manifest is not None:
                told = json.dumps({"run_manifest_sha256": _sha256(run_manifest)}) + "\n"
                (draft / REPORT / RUN).write_text(told, encoding="utf-8")
            for name, report in reports.items():
                _read_report(report)
                shutil.copyfile(report, draft / REPORT / f"{name}.json")
            shutil.copytree(package, draft / PACKAGE, ignore=_only_files)
            return self._settle(draft)

    def keep_run(self, run_dir: Path) -> Kept:
        """Keep what a finished training run left: package, reports on candidate and champion, the manifest's hash.

        Raises:
            PackageRefused: a file is missing, altered or unreadable.
        """
        reports = {name: run_dir / REPORT / name / "report.json" for name in ("candidate", "champion")}
        return self.keep(run_dir / PACKAGE, reports, run_dir / MANIFEST)

    def load(self, path: str, hashes: Mapping[str, str], signature: str | None) -> ModelPackage:
        """The package kept at `path`, its own files verified, and everything as it was when this site signed it.

        Raises:
            PackageRefused: a file is missing or altered, or the signature is not this site's.
        """
        folder = self.root / path
        if signature is None or not hmac.compare_digest(self.sign(hashes), signature):
            raise PackageRefused("the registry's hashes do not bear this site's signature")
        _compare(_hashes(folder), hashes)
        return _loaded(folder / PACKAGE)

    def reports(self, path: str) -> dict[str, Any]:
        """The reports kept at `path`, by `candidate` and `champion`."""
        return _reports(self.root / path)

    @contextmanager
    def _draft(self) -> Iterator[Path]:
        """A fresh folder of the library, gone afterwards unless it was settled."""
        self.root.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=self.root))
        try:
            yield draft
        except (PackageError, OSError) as error:
            raise PackageRefused(str(error)) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _settle(self, draft: Path, told_by: Mapping[str, Any] | None = None) -> Kept:
        """Move a draft to where its hash says.

        A package that is there already gets the draft's reports, unless another site made them (`told_by`).
        """
        package = _loaded(draft / PACKAGE)
        home = self.root / package.sha256
        draft.chmod(0o755)  # mkdtemp lets nobody else in; the worker may be another user
        if not home.exists():
            try:
                draft.replace(home)
            except OSError:  # another process was first with the same package
                if not home.exists():
                    raise
        elif told_by is None:
            for report in (draft / REPORT).iterdir():
                report.replace(home / REPORT / report.name)
        return self._described(home, told_by or {})

    def _described(self, home: Path, more: Mapping[str, Any]) -> Kept:
        package = _loaded(home / PACKAGE)
        manifest, hashes = package.manifest, _hashes(home)
        named = ("provenance", "patients", "steps_done", "steps_planned", "scanners")
        told = {name: manifest.training.get(name) for name in named}
        told["networks"] = manifest.training.get("networks_cohort", {}).get("provenance")  # of a refit: not its own
        return Kept(
            sha256=package.sha256,
            name=manifest.name,
            version=manifest.version,
            synthetic_only=manifest.synthetic_only,
            finished=manifest.finished,
            provenance={**told, "created": manifest.created, "targets": list(manifest.targets), **more},
            hashes=hashes,
            signature=self.sign(hashes),
            reports=_reports(home),
        )

    # --- signing ------------------------------------------------------------------------------------------------

    def sign(self, hashes: Mapping[str, str]) -> str:
        """HMAC-SHA256 over the hashes by this site's key, in hexadecimal."""
        told = json.dumps({"format": FORMAT, "hashes": dict(hashes)}, sort_keys=True, separators=(",", ":"))
        return hmac.new(self._key(), told.encode(), hashlib.sha256).hexdigest()

    def key_id(self) -> str:
        """Which key signs here, without telling it."""
        return hashlib.sha256(b"osteogate models key " + self._key()).hexdigest()[:16]

    def _key(self) -> bytes:
        """32 random bytes, made once: the first process to need the key writes it for all."""
        self.key_file.parent.mkdir(parents=True, exist_ok=True)
        if not self.key_file.exists():
            draft = self.key_file.with_name(f".{self.key_file.name}.{secrets.token_hex(8)}")
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_hex(32))
                stream.flush()
                os.fsync(stream.fileno())
            with suppress(FileExistsError):
                os.link(draft, self.key_file)  # whole or not at all, and never over another's
            draft.unlink()
        told = self.key_file.read_text(encoding="ascii").strip()
        if _SHA256.fullmatch(told) is None:
            raise PackageRefused(f"{self.key_file} is no key of 32 bytes in hexadecimal")
        return bytes.fromhex(told)

    # --- export -------------------------------------------------------------------------------------------------

    def export(self, path: str, hashes: Mapping[str, str], signature: str | None, out: IO[bytes]) -> None:
        """Write the package kept at `path` with its reports and `signature.json` as a ZIP.

        Raises:
            PackageRefused: a file is missing or altered.
        """
        self.load(path, hashes, signature)
        signed = {"format": FORMAT, "hashes": dict(hashes), "key": self.key_id(), "hmac_sha256": signature}
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(SIGNATURE, json.dumps(signed, indent=1, sort_keys=True) + "\n")
            for name in sorted(hashes):
                how = zipfile.ZIP_STORED if name.endswith((".safetensors", ".png")) else zipfile.ZIP_DEFLATED
                archive.write(self.root / path / name, name, how)

    def texts(self, path: str, hashes: Mapping[str, str]) -> dict[str, str]:
        """Every file of an export that holds words, by its name."""
        folder = self.root / path
        named = [name for name in sorted(hashes) if name.endswith(_TEXTS)]
        return {name: (folder / name).read_text(encoding="utf-8", errors="replace") for name in named}

    # --- import -------------------------------------------------------------------------------------------------

    def receive(self, file: IO[bytes]) -> Kept:
        """Keep the package in an exported ZIP, every byte checked against its hashes.

        Raises:
            PackageRefused: the file is no such ZIP, would write elsewhere or grow beyond bounds, or was altered.
        """
        with self._draft() as draft:
            (draft / REPORT).mkdir()
            (draft / PACKAGE).mkdir()
            try:
                with zipfile.ZipFile(file) as archive:
                    signed = _unpack(archive, draft)
            except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, zlib.error) as error:
                raise PackageRefused(f"this is no ZIP that can be read: {error}") from error
            hashes, key = signed["hashes"], signed["key"]
            _compare(_hashes(draft), hashes)
            own = key == self.key_id()
            if own and not hmac.compare_digest(self.sign(hashes), signed["hmac_sha256"]):
                raise PackageRefused(f"{SIGNATURE} names this site's key, and does not bear its signature")
            for name in ("candidate", "champion"):
                report = draft / REPORT / f"{name}.json"
                if report.exists():
                    _read_report(report)
            return self._settle(draft, told_by={"signed_by": key, "signature": "this site's" if own else "foreign"})


def patient_words(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """The words in which a patient's identifier could stand, each with the files that hold it.

    Of JSON only texts and keys: a number in a report is a figure, and identifies nobody.
    """
    found: dict[str, set[str]] = {}
    for name, text in texts.items():
        is_json = name.endswith(".json")
        for passage in _passages(_document(text)) if is_json else (text,):
            for word in (passage.strip(), *_WORD.findall(passage)):
                shortest = _SHORTEST_NUMBER if word.isdigit() and not is_json else _SHORTEST_WORD
                if len(word) >= shortest:
                    found.setdefault(word, set()).add(name)
    return found


def _document(text: str) -> Any:
    """JSON as its values; what is none, as one text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _passages(document: Any) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    elif isinstance(document, Mapping):
        for key, value in document.items():
            yield key
            yield from _passages(value)
    elif isinstance(document, list):
        for value in document:
            yield from _passages(value)


# --- files --------------------------------------------------------------------------------------------------------


def _only_files(folder: str, names: list[str]) -> list[str]:
    """What is not copied with a package: folders and links have no place in one."""
    return [name for name in names if not (path := Path(folder) / name).is_file() or path.is_symlink()]


def _loaded(folder: Path) -> ModelPackage:
    try:
        return ModelPackage.load(folder)
    except PackageError as error:
        raise PackageRefused(str(error)) from error


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of package and reports, by its name in an export."""
    files = [file for part in (PACKAGE, REPORT) for file in (folder / part).iterdir()]
    return {f"{file.parent.name}/{file.name}": _sha256(file) for file in sorted(files)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _compare(found: Mapping[str, str], told: Mapping[str, str]) -> None:
    for name in sorted({*found, *told}):
        if name not in found:
            raise PackageRefused(f"{name} is missing")
        if name not in told:
            raise PackageRefused(f"{name} was added: no hash was signed for it")
        if found[name] != told[name]:
            raise PackageRefused(f"{name} was altered: its SHA-256 is not the one that was signed")


def _read_report(file: Path) -> dict[str, Any]:
    """report.json of `osteogate evaluate`."""
    if not file.is_file():
        raise PackageRefused(f"{file} is missing")
    if file.stat().st_size > MAX_REPORT_BYTES:
        raise PackageRefused(f"{file.name} is larger than any report")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PackageRefused(f"{file.name} is not JSON") from error
    if not isinstance(found, dict):
        raise PackageRefused(f"{file.name} is no report")
    return found


def _reports(folder: Path) -> dict[str, Any]:
    names = ("candidate", "champion")
    files = {name: folder / REPORT / f"{name}.json" for name in names}
    return {name: _read_report(file) for name, file in files.items() if file.is_file()}


def _unpack(archive: zipfile.ZipFile, draft: Path) -> dict[str, Any]:
    """Write the members below `draft`, once all of them were looked at; what `signature.json` says."""
    members = archive.infolist()
    _check_members(members)
    left = MAX_TOTAL_BYTES
    for member in members:
        if member.filename == SIGNATURE:
            continue
        with archive.open(member) as packed, (draft / member.filename).open("xb") as out:
            left -= _pour(packed, out, min(member.file_size, left), member.filename)
    if MANIFEST not in {Path(member.filename).name for member in members}:
        raise PackageRefused(f"{PACKAGE}/{MANIFEST} is missing")
    return _signature(archive)


def _check_members(members: list[zipfile.ZipInfo]) -> None:
    """Before a byte is written: only names that we write, no links, nothing that grows beyond bounds."""
    names = [member.filename for member in members]
    if len(names) > MAX_FILES:
        raise PackageRefused(f"{len(names)} files are in it; a package has at most {MAX_FILES}")
    if len({name.casefold() for name in names}) != len(names):
        raise PackageRefused("two files in it have one name")
    if SIGNATURE not in names:
        raise PackageRefused(f"{SIGNATURE} is missing")
    for member in members:
        name = member.filename
        if _MEMBER.fullmatch(name) is None:
            raise PackageRefused(f"{name[:100]!r} has no place in a package")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            raise PackageRefused(f"{name} is no plain file")
        if member.flag_bits & 0x1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise PackageRefused(f"{name} is encrypted, or packed in a way that is not read here")
        small = MAX_FILE_BYTES if name.startswith(f"{PACKAGE}/") else MAX_REPORT_BYTES
        if member.file_size > small:
            raise PackageRefused(f"{name} would have {member.file_size} bytes; {small} are allowed")
        if member.file_size > MAX_RATIO * max(member.compress_size, 1024):
            raise PackageRefused(f"{name} would grow {MAX_RATIO} times and more when unpacked")
    if sum(member.file_size for member in members) > MAX_TOTAL_BYTES:
        raise PackageRefused(f"it would have more than {MAX_TOTAL_BYTES} bytes unpacked")


def _pour(packed: IO[bytes], out: IO[bytes], most: int, name: str) -> int:
    """Copy at most as many bytes as were announced; how many they were."""
    poured = 0
    while chunk := packed.read(_CHUNK):
        poured += len(chunk)
        if poured > most:
            raise PackageRefused(f"{name} has more bytes than it says")
        out.write(chunk)
    return poured


def _signature(archive: zipfile.ZipFile) -> dict[str, Any]:
    try:
        told = json.loads(archive.read(SIGNATURE))
    except (ValueError, RecursionError) as error:
        raise PackageRefused(f"{SIGNATURE} is not JSON") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise PackageRefused(f"{SIGNATURE} has another format than {FORMAT}")
    hashes = told.get("hashes")
    if not isinstance(hashes, dict) or not all(_is_hash(one) for one in hashes.values()):
        raise PackageRefused(f"{SIGNATURE} gives no hashes")
    if not all(isinstance(told.get(name), str) and len(told[name]) <= 64 for name in ("key", "hmac_sha256")):
        raise PackageRefused(f"{SIGNATURE} bears no signature")
    return told


def _is_hash(told: Any) -> bool:
    return isinstance(told, str) and _SHA256.fullmatch(told) is not None
