"""TotalSegmentator's weights: pinned, refused when anything is amiss, never fetched at run time (fault 24)."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import threading
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from models.weight_files import CHECKPOINT, SUMS_FILE, file_sha256
from service.cli import main
from service.store.engine import Store, make_engine, upgrade
from service.workflow.reading.monitoring import audit
from tests.totalseg import TOTAL, TOTAL_V3, config, tiny, zipped
from worker.segmentation import WeightsError, load_segmenter, pulling, verify
from worker.segmentation.base import L6, S1
from worker.segmentation.cascade import Cascade
from worker.segmentation.importing import prepare
from worker.segmentation.network import load_network
from worker.segmentation.theirs import class_map, environment, folder_name
from worker.segmentation.weights import IMPORT_FILE, Task, WeightsFolder, weights_in_force
from worker.volume import Volume

AT = datetime(2026, 11, 28, 9, 30, tzinfo=UTC)
COARSE, FINE = folder_name(298), folder_name(292)
FINE_PLANS = f"{FINE}/nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres/plans.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny networks of the task `total` in TotalSegmentator's folders."""
    return tiny(TOTAL, tmp_path_factory.mktemp("total"))


@pytest.fixture(scope="module")
def published_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(TOTAL_V3, tmp_path_factory.mktemp("total_v3"))


@pytest.fixture
def archives(published: Path, tmp_path: Path) -> list[Path]:
    """The same as the two published archives: 292, 298."""
    return zipped(published, tmp_path / "archives")


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "data" / "weights"


def bring(
    sources: list[Path], into: Path, *, by: str = "Dr. Sato", replace: bool = False, **more: Path
) -> WeightsFolder:
    with prepare(sources, into, replace=replace, site_sums=more.get("sums")) as prepared:
        return prepared.install(by=by, at=AT)


# ---------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("kind", ["archives", "folder", "one data set folder each"])
def test_both_networks_come_in_pinned_with_the_name_of_who_brought_them(
    kind: str, published: Path, archives: list[Path], into: Path
) -> None:
    each = sorted(published.glob("Dataset*"))
    folder = bring({"archives": archives, "folder": [published]}.get(kind, each), into)
    assert folder == verify(into)
    assert folder.task == TOTAL
    assert (folder.coarse.parent.name, folder.fine.parent.name) == (COARSE, FINE)
    told = json.loads((into / IMPORT_FILE).read_text())
    assert (told["imported_by"], told["imported_at"]) == ("Dr. Sato", "2026-11-28T09:30:00+00:00")
    assert told["archives"] == ({path.name: file_sha256(path) for path in archives} if kind == "archives" else {})
    assert not list(into.rglob("progress.png"))
    assert sorted(path.name for path in into.parent.iterdir()) == ["weights"], "nothing temporary is left"
    assert folder.name == "nnU-Net Dataset298 + Dataset292 (total)"


def test_each_task_has_the_class_map_of_its_own(
    published: Path, published_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class 2 of the vertebrae network is S1 in `total` and a sixth lumbar body in `total_v3`."""
    bring([published], tmp_path / "a")
    bring([published_v3], tmp_path / "b")
    monkeypatch.setattr("worker.segmentation.network.fastest_volume", lambda *_: None)  # nothing is computed here
    first, second = load_segmenter(tmp_path / "a", "cpu"), load_segmenter(tmp_path / "b", "cpu")
    assert isinstance(first, Cascade)
    assert isinstance(second, Cascade)
    assert (first.fine.label_ids[2], second.fine.label_ids[2]) == (S1, L6)
    assert (first.coarse.label_ids[26], second.coarse.label_ids[26]) == (S1, L6)
    assert first.fine.label_ids[1] == second.fine.label_ids[1] == 25
    assert (first.task, second.task) == (TOTAL, TOTAL_V3)


def test_archives_may_come_one_after_the_other_once_their_partner_is_there(archives: list[Path], into: Path) -> None:
    before = bring(archives, into)
    assert bring([archives[0]], into).sha256 != before.sha256  # IMPORT.json names another archive
    assert verify(into).task == TOTAL


def test_another_task_takes_the_place_of_the_first(published: Path, published_v3: Path, into: Path) -> None:
    bring([published], into)
    assert bring([published_v3], into).task == TOTAL_V3
    assert sorted(path.name[:10] for path in into.glob("Dataset*")) == ["Dataset832", "Dataset837"]


def test_a_checkpoint_as_numpy_1_wrote_it_is_read(published: Path, tmp_path: Path) -> None:
    """The published ones keep their loss log as numpy scalars, whose module had another name then."""
    root = shutil.copytree(published, tmp_path / "old")
    path = next(root.glob(f"{FINE}/*/{CHECKPOINT}"))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["logging"] = {"train_losses": [np.float64(0.5), np.float32(0.25)], "epoch": [np.int64(3)]}
    torch.save(checkpoint, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in content if name.endswith("data.pkl"))
    assert b"numpy._core.multiarray" in content[pickled]
    content[pickled] = content[pickled].replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    assert load_network(path.parents[1], torch.device("cpu")).classes == 27


# -------------------------------------------------------------------------------------------- what is refused


def test_half_of_them_is_refused(archives: list[Path], into: Path) -> None:
    with pytest.raises(WeightsError, match="Dataset298"):
        bring([archives[0]], into)
    assert not into.exists()


@pytest.mark.parametrize("name", ["plans.json", "dataset.json", "checkpoint_final.pth"])
def test_an_archive_that_lacks_a_file_is_refused_and_names_it(name: str, archives: list[Path], into: Path) -> None:
    rewrite(archives[0], leave_out=name)
    with pytest.raises(WeightsError, match=name):
        bring(archives, into)


def test_a_truncated_archive_and_one_with_a_flipped_byte_are_refused(archives: list[Path], into: Path) -> None:
    whole = archives[0].read_bytes()
    archives[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=rf"{archives[0].name} is incomplete or altered"):
        bring(archives, into)
    at = len(whole) // 3
    archives[0].write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(WeightsError, match=archives[0].name):
        bring(archives, into)
    assert not into.exists()


@pytest.mark.parametrize(
    "name", ["../../outside.json", "/etc/outside.json", "a\\..\\..\\outside.json", "C:/outside.json"]
)
def test_an_archive_that_points_out_of_itself_is_refused_whole(name: str, archives: list[Path], into: Path) -> None:
    with zipfile.ZipFile(archives[0], "a") as archive:
        archive.writestr(name, "{}")
    with pytest.raises(WeightsError, match="points out of the archive"):
        bring(archives, into)
    assert not list(into.parent.rglob("outside.json"))


def test_a_link_in_an_archive_is_refused(archives: list[Path], into: Path) -> None:
    link = zipfile.ZipInfo(FINE_PLANS.replace("plans", "link"))
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archives[0], "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(WeightsError, match="points out of the archive"):
        bring(archives, into)


def test_another_data_set_is_refused(published: Path, tmp_path: Path, into: Path) -> None:
    other = shutil.copytree(published / FINE, tmp_path / "Dataset297_TotalSegmentator_total_3mm_1559subj")
    with pytest.raises(WeightsError, match="none of the data sets"):
        bring([other], into)
    renamed = shutil.copytree(published / FINE, tmp_path / "x" / "Dataset292_of_somebody_else")
    with pytest.raises(WeightsError, match=f"is not {FINE}"):
        bring([renamed, published / COARSE], into)
    with pytest.raises(WeightsError, match="does not exist"):
        bring([tmp_path / "nowhere.zip"], into)


def test_networks_of_two_tasks_are_no_pair(published: Path, published_v3: Path, into: Path) -> None:
    pair = [published / FINE, published_v3 / folder_name(837)]
    with pytest.raises(WeightsError, match="do not belong together"):
        bring(pair, into)


def test_a_network_under_the_name_of_another_task_is_refused(published: Path, published_v3: Path, into: Path) -> None:
    """The folder says 832, dataset.json says what 292 says: class 2 would be read as another vertebra."""
    wrong = shutil.copytree(published / FINE, into.parent / folder_name(832))
    with pytest.raises(WeightsError, match=r"class 2 is vertebrae_S1 .* vertebrae_L6"):
        bring([wrong, published_v3 / folder_name(837)], into)


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(published: Path, tmp_path: Path, into: Path) -> None:
    root = shutil.copytree(published, tmp_path / "evil")

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "ran"),)

    torch.save({"network_weights": {}, "init_args": {}, "x": Payload()}, next(root.glob(f"{FINE}/*/{CHECKPOINT}")))
    with pytest.raises(WeightsError, match="plain weights"):
        bring([root], into)
    assert not (tmp_path / "ran").exists()


def test_other_bytes_than_at_the_first_import_need_a_word(published: Path, tmp_path: Path, into: Path) -> None:
    before = bring([published], into)
    other = shutil.copytree(published, tmp_path / "other")
    (other / FINE_PLANS).write_text((other / FINE_PLANS).read_text() + " ")
    with pytest.raises(WeightsError, match=r"plans\.json is not the file that was pinned at its first import"):
        bring([other], into)
    assert verify(into).sha256 == before.sha256, "the weights in force stand"
    assert bring([other], into, by="Dr. Mori", replace=True).sha256 != before.sha256


@pytest.mark.parametrize("what", ["archives", "files"])
def test_a_sites_list_decides(what: str, published: Path, archives: list[Path], tmp_path: Path, into: Path) -> None:
    listed = archives if what == "archives" else [path for path in published.rglob("*") if path.is_file()]
    name = (lambda path: path.name) if what == "archives" else (lambda path: path.relative_to(published).as_posix())
    lines = [f"{file_sha256(path)}  {name(path)}" for path in listed]
    sums = tmp_path / "site.sha256"
    sums.write_text("\n".join(lines) + "\n")
    assert bring(archives, into, sums=sums).task == TOTAL
    sums.write_text("\n".join(["0" * 64 + lines[0][64:], *lines[1:]]) + "\n")
    with pytest.raises(WeightsError, match="site's list"):
        bring(archives, tmp_path / "second", sums=sums)
    sums.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(WeightsError, match="not in the site's list"):
        bring(archives, tmp_path / "third", sums=sums)


# ------------------------------------------------------------------------------------------- at every start


@pytest.mark.parametrize("name", [IMPORT_FILE, FINE_PLANS, SUMS_FILE])
def test_what_was_altered_or_lost_after_the_import_stops_the_start(
    name: str, published: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.settings import Settings

    bring([published], into)
    monkeypatch.setenv("OSTEOGATE_DATA_DIR", str(into.parent))
    assert weights_in_force(Settings()) == into
    (into / name).write_text((into / name).read_text().replace("a", "e", 1))
    with pytest.raises(WeightsError, match="is altered" if name == SUMS_FILE else rf"{Path(name).name} is altered"):
        load_segmenter(weights_in_force(Settings()), "cpu")
    (into / name).unlink()
    with pytest.raises(WeightsError, match=Path(name).name):
        load_segmenter(weights_in_force(Settings()), "cpu")


def test_an_import_that_was_killed_half_way_is_refused_not_passed_over(
    published: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.settings import Settings

    bring([published], into)

    def killed(*_: object) -> Path:
        raise KeyboardInterrupt

    with prepare([published], into) as prepared, monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared.install(by="Dr. Sato", at=AT)
    monkeypatch.setenv("OSTEOGATE_DATA_DIR", str(into.parent))
    with pytest.raises(WeightsError, match=SUMS_FILE):
        load_segmenter(weights_in_force(Settings()), "cpu")
    assert bring([published], into).task == TOTAL


def test_no_network_is_needed_or_asked_for(published: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported weights load, are verified and segment with every socket refused (fault 25, RULES 10)."""
    bring([published], into)
    asked: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network at all")

    for name in ("socket.connect", "socket.connect_ex", "create_connection", "getaddrinfo"):
        owner, _, attribute = name.rpartition(".")
        monkeypatch.setattr(socket.socket if owner else socket, attribute, refuse)
    hu = np.full((16, 16, 16), -1000, dtype=np.float32)
    hu[4:12, 4:12, 4:12] = 300
    volume = Volume(hu, np.diag([6.0, 6.0, 6.0, 1.0])[:, [2, 1, 0, 3]])
    assert load_segmenter(into, "cpu").segment(volume).labels.shape == hu.shape
    assert asked == []


def test_totalsegmentators_own_code_gets_our_home_and_posts_nothing(tmp_path: Path) -> None:
    told = environment(tmp_path / "home", tmp_path / "weights")
    assert told == {"TOTALSEG_HOME_DIR": str(tmp_path / "home"), "TOTALSEG_WEIGHTS_PATH": str(tmp_path / "weights")}
    assert json.loads((tmp_path / "home" / "config.json").read_text())["send_usage_stats"] is False


# ----------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OSTEOGATE_DATA_DIR", str(tmp_path / "site"))
    return tmp_path / "site"


def test_import_tells_writes_the_audit_and_is_in_force(
    settings: Path, archives: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings.mkdir()
    from service.settings import Settings

    url = Settings().sqlalchemy_url
    upgrade(url)
    assert main(["weights", "import", *map(str, archives), "--by", "Dr. Sato"]) == 0
    assert main(["weights", "status"]) == 0
    assert main(["weights", "verify"]) == 0
    out = capsys.readouterr().out
    folder = verify(settings / "weights")
    assert out.count(folder.sha256) == 3
    assert out.count("imported by Dr. Sato at ") == 2
    store = Store(make_engine(url))
    try:
        with store.reading() as session:
            line = audit(session, subject="weights:total").items[0]
    finally:
        store.close()
    assert (line.action, line.detail["person"], line.detail["sha256"]) == ("weights.import", "Dr. Sato", folder.sha256)
    assert line.actor.startswith("shell:")
    assert set(line.detail["archives"]) == {path.name for path in archives}


def test_a_refusal_is_one_line_and_leaves_no_audit(
    settings: Path, archives: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "import", str(archives[0])]) == 1
    told = capsys.readouterr().err
    assert "Dataset298" in told
    assert "Traceback" not in told
    assert main(["weights", "import", *map(str, archives)]) == 0
    assert "no database yet" in capsys.readouterr().err


@pytest.fixture
def mirror(published: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server of this machine with the archives where TotalSegmentator's releases have them."""
    root = tmp_path / "releases"
    zipped(published, root / "v2.0.0-weights")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path.startswith("/elsewhere/"):
                self.send_response(302)
                self.send_header("Location", "http://192.0.2.1/weights.zip")
                self.end_headers()
            elif self.path.startswith("/short/"):
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"PK")
            else:
                super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", root
        server.shutdown()
        thread.join()


def test_pull_fetches_pins_and_imports(
    settings: Path, mirror: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "pull", "--releases", mirror[0], "--by", "Dr. Sato"]) == 0
    folder = verify(settings / "weights")
    assert folder.sha256 in capsys.readouterr().out
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in mirror[1].rglob("*.zip")}
    assert folder.imported["archives"] == sums
    assert [path.name for path in settings.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("task", "releases", "words"),
    [
        ("total_v3", "{mirror}", "answers 404"),
        ("total", "{mirror}/short", "weights import"),
        ("total", "{mirror}/elsewhere", "not an https address"),
        ("total", "http://weights.example", "not an https address"),
        ("total", "http://127.0.0.1:1", "weights import"),
        ("total_v9", "{mirror}", "no task"),
    ],
)
def test_a_pull_that_fails_says_what_to_do_and_changes_nothing(
    task: str,
    releases: str,
    words: str,
    settings: Path,
    mirror: tuple[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = releases.format(mirror=mirror[0])
    assert main(["weights", "pull", "--task", task, "--releases", place]) == 1
    assert words in capsys.readouterr().err.replace("\n", " ")
    assert not (settings / "weights").exists()


def test_the_published_archives_lie_where_totalsegmentator_says() -> None:
    url = pulling.archive_url(292)
    assert url == f"https://github.com/wasserth/TotalSegmentator/releases/download/v2.0.0-weights/{FINE}.zip"
    assert pulling.archive_url(832).endswith(f"/v3.0.0-weights/{folder_name(832)}.zip")


# -------------------------------------------------------------------------------------------------- helpers


def rewrite(archive: Path, *, leave_out: str) -> None:
    """The archive again without one file."""
    with zipfile.ZipFile(archive) as whole:
        kept = {name: whole.read(name) for name in whole.namelist() if not name.endswith(leave_out)}
    with zipfile.ZipFile(archive, "w") as less:
        for name, data in kept.items():
            less.writestr(name, data)


def test_the_tables_are_those_of_the_installed_package() -> None:
    tasks: list[Task] = [TOTAL, TOTAL_V3]
    for task in tasks:
        for dataset in task.datasets:
            names = class_map(task, dataset)
            assert sorted(names) == list(range(len(names)))
            assert config(task, dataset).classes == tuple(names[index] for index in range(len(names)))
