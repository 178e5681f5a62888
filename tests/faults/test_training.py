"""Training over the broker: a queue of its own, a trainer of its own, and screening that never waits for it."""

from __future__ import annotations

from pathlib import Path

from service.domain.states import RunState
from service.workflow import training
from service.workflow.bell import TRAIN_QUEUE, Bell
from service.workflow.training import RunLine
from tests.faults.site import Site, standing_site
from tests.service.workflow import workbench
from tests.service.workflow.pairs import ask, fill


def line(site: Site, run_id: int) -> RunLine:
    with site.store.reading() as session:
        found = training.run(session, run_id)
    assert found is not None
    return found


def test_a_run_is_taken_by_the_trainer_alone_and_studies_pass_it(tmp_path: Path) -> None:
    """The disk has no room for it: the trainer says so, and the screening worker has never touched it."""
    with standing_site(tmp_path, training_disk_bytes=2**62, max_attempts=1) as site:
        fill(site.store)
        run_id = ask(site.store).id
        assert run_id is not None
        site.steward.step()
        assert b":1" in site.broker.command(f"LLEN {TRAIN_QUEUE}".encode())
        with site.worker("at_once"):
            workbench.queued(site.store, workbench.Clock(), "1.2.3")
            site.work_until(lambda: site.study_state() == "screened", "the study is screened")
        assert (line(site, run_id).state, line(site, run_id).attempts) == (RunState.WAITING, 0)
        with site.worker("trains"):
            site.work_until(lambda: line(site, run_id).state is RunState.FAILED, "the run ends")
        run = line(site, run_id)
        assert run.attempts == 1
        assert "free on the disk" in str(run.last_error)


def test_a_bell_that_cannot_be_rung_for_training_stops_nothing(tmp_path: Path) -> None:
    with standing_site(tmp_path) as site:
        fill(site.store)
        run_id = ask(site.store).id
        site.broker.stop()
        site.steward.step()
        with site.store.reading() as session:
            row = training.run(session, run_id or 0)
        assert row is not None
        assert row.state is RunState.WAITING
        site.broker.start()
        site.steward.step()
        assert b":1" in site.broker.command(f"LLEN {TRAIN_QUEUE}".encode())


def test_the_bell_rings_each_queue(tmp_path: Path) -> None:
    with workbench.broker(tmp_path / "b") as broker:
        bell = Bell(broker.url)
        bell.ring(1)
        bell.ring_training(1)
        bell.ring_training(2)
        bell.close()
        assert broker.messages() == 1
        assert b":2" in broker.command(f"LLEN {TRAIN_QUEUE}".encode())
