"""Intake: instances a second of our listener beside dcmtk's storescp, with the same two senders, in one run.

    python -m tests.bench.bench_intake [--instances N] [--senders N]

Ours does more for each instance than storescp does: hash, fsync, rename, directory fsync, header facts and a
committed database row before Success. storescp writes a file. Slices are 512 x 512 x 16 bit.
"""

from __future__ import annotations

import argparse
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from service.dicom.listener import Listener
from service.dicom.send import send_files
from service.settings import Settings
from service.store.engine import Store, make_engine, upgrade
from service.workflow.intake import Door
from tests.conftest import of_dcmtk
from tests.service.dicom.harness import slice_file

Address = tuple[str, int]
Sender = Callable[[Path, Address], None]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=100, help="instances of each sender")
    parser.add_argument("--senders", type=int, default=4, help="concurrent senders in the second half")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return
    with tempfile.TemporaryDirectory() as temporary:
        report(Path(temporary), arguments.instances, arguments.senders)


def report(folder: Path, instances: int, senders: int) -> None:
    """Print one table."""
    folders = [make_slices(folder / f"study-{number}", instances, number) for number in range(senders)]
    rows: list[tuple[str, int, float, float | None]] = []
    store_name = "none"
    for sender_name, send in available_senders().items():
        for count in (1, senders):
            with our_listener(folder / f"ours-{len(rows)}") as (address, store):
                ours, store_name = rate(send, folders[:count], address), store
            with dcmtk_storescp(folder / f"storescp-{len(rows)}") as storescp:
                theirs = rate(send, folders[:count], storescp) if storescp else None
            rows.append((sender_name, count, ours, theirs))
    print(f"intake, 512 x 512 x 16 bit, {instances} instances a sender, store: {store_name}, {platform.machine()}")
    print(f"{'sender':<18}{'senders':>8}{'ours /s':>10}{'storescp /s':>13}{'ratio':>8}")
    for name, count, ours, theirs in rows:
        beside = f"{theirs:>13.1f}{ours / theirs:>8.2f}" if theirs else f"{'absent':>13}{'':>8}"
        print(f"{name:<18}{count:>8}{ours:>10.1f}{beside}")


def make_slices(folder: Path, instances: int, study: int) -> Path:
    """One study of noise, which no file system can compress."""
    generator = np.random.default_rng(study)
    for number in range(instances):
        pixels = generator.integers(0, 2**16, 512 * 512, dtype=np.uint16).tobytes()
        slice_file(
            folder, number, Rows=512, Columns=512, PixelData=pixels, StudyInstanceUID=f"1.2.3.{study}",
            SeriesInstanceUID=f"1.2.3.{study}.1", SOPInstanceUID=f"1.2.3.{study}.1.{number}",
        )  # fmt: skip
    return folder


def available_senders() -> dict[str, Sender]:
    """Our sender, and dcmtk's where it is installed."""
    senders: dict[str, Sender] = {"osteogate send": send_with_ours}
    if of_dcmtk("storescu"):
        senders["dcmtk storescu"] = send_with_storescu
    return senders


def send_with_ours(folder: Path, address: Address) -> None:
    """Send one folder; a failure ends the measurement."""
    failed = send_files([folder], host=address[0], port=address[1], called="OSTEOGATE").failed
    if failed:
        raise RuntimeError(failed[0][1])


def send_with_storescu(folder: Path, address: Address) -> None:
    """The same with dcmtk."""
    command = [
        of_dcmtk("storescu") or "storescu",
        "-xe",
        "-aec",
        "OSTEOGATE",
        "+sd",
        address[0],
        str(address[1]),
        str(folder),
    ]
    subprocess.run(command, check=True, capture_output=True)


def rate(send: Sender, folders: Sequence[Path], address: Address) -> float:
    """Instances a second, all senders together."""
    errors: list[BaseException] = []

    def run(folder: Path) -> None:
        try:
            send(folder, address)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(folder,)) for folder in folders]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(1 for folder in folders for _ in folder.iterdir()) / (time.perf_counter() - started)


@contextmanager
def our_listener(folder: Path) -> Iterator[tuple[Address, str]]:
    """Our listener in a process of its own, as storescp is."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.bench.bench_intake", "--serve", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port, store_name = process.stdout.readline().split()
        yield ("127.0.0.1", int(port)), store_name
    finally:
        process.terminate()
        process.communicate()


def serve(folder: Path) -> None:
    """The process that is measured: a listener on a fresh SQLite store, until SIGTERM."""
    settings = Settings(data_dir=folder, dicom_port=0, disk_floor_bytes=0)
    upgrade(settings.sqlalchemy_url)
    door = Door(Store(make_engine(settings.sqlalchemy_url)), settings)
    listener = Listener(settings, door.commit, door.refuse)
    listener.start()
    print(listener.address[1], "SQLite", flush=True)
    signal.pause()


@contextmanager
def dcmtk_storescp(folder: Path) -> Iterator[Address | None]:
    """dcmtk's storescp, forking for concurrent senders; None where it is absent."""
    program = of_dcmtk("storescp")
    if program is None:
        yield None
        return
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([program, "--fork", "-aet", "OSTEOGATE", "-od", str(folder), str(port)])
    try:
        wait_for(port)
        yield "127.0.0.1", port
    finally:
        process.terminate()
        process.wait()


def wait_for(port: int) -> None:
    """Until somebody listens there."""
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError("storescp does not listen")


if __name__ == "__main__":
    main()
