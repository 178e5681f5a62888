"""What is started with an installation, and what when it is first needed."""

from __future__ import annotations

import sys
from pathlib import Path

from service.store.engine import Store, make_engine
from service.supervise import WANTED_SECONDS, Installation, Process
from tests.service.workflow import workbench
from tests.service.workflow.pairs import ask, fill


def test_a_process_that_nobody_wants_yet_is_started_when_somebody_does(tmp_path: Path) -> None:
    wanted: list[bool] = []
    process = Process("trainer", [sys.executable, "-c", ""], tmp_path / "log", {}, lambda: bool(wanted))
    process.begin(100.0)
    assert process.child is None
    assert process.watch(100.0 + WANTED_SECONDS) is None
    wanted.append(True)
    assert process.watch(100.0 + WANTED_SECONDS) is None  # looked at a moment ago
    assert process.watch(100.0 + 2 * WANTED_SECONDS) == "trainer started, as it is needed now"
    assert process.child is not None
    process.child.wait()
    wanted.clear()
    assert "starting it again" in str(process.watch(110.0))
    assert process.watch(120.0) == "trainer started again"  # once it was needed, it is kept
    process.stop(5.0)


def test_the_trainer_waits_for_the_first_run(tmp_path: Path) -> None:
    settings = workbench.settings(tmp_path)
    told: list[str] = []
    trainer = next(one for one in Installation.of(settings, told.append).processes if one.name == "trainer")
    assert list(trainer.command[-2:]) == ["--queue", "train"]
    assert trainer.environment["OSTEOGATE_PULSE_DIR"] != str(settings.pulses)
    assert not trainer.wanted()  # no database yet
    store = Store(make_engine(workbench.fresh_url("sqlite", tmp_path)))
    fill(store)
    assert not trainer.wanted()
    assert ask(store).id == 1
    store.close()
    assert trainer.wanted()
