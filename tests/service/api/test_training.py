"""Training runs by HTTP: asked for, refused with reasons, watched, stopped; and their pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from service.domain.states import RunStage
from service.store.tables import AuditRow
from service.workflow import training, training_work
from service.workflow.model import REFERENCE
from service.workflow.training import Lost, Outcome
from service.workflow.training_work import RunClaim
from tests.service.web.installation import Installation, installed
from tests.service.workflow.pairs import NOW, PATIENTS, SMALL, fill

API = "/api/v1/training-runs"
ASKED = {"reason": "the first pairs", "people": "digital", "settings": {"epochs": 2}, "seed": 3}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Installation]:
    with installed(tmp_path, empty=True, policy=SMALL, training_disk_bytes=1) as opened:
        fill(opened.store)
        yield opened


def ask(site: Installation, **changes: Any) -> Any:
    return site.client.post(API, json={**ASKED, **changes})


def claim(site: Installation, run_id: int = 1) -> RunClaim:
    with site.store.transaction() as session:
        held = training_work.claim(
            session, run_id, worker="w", now=NOW, lease_seconds=60, deadline_seconds=60, max_attempts=3
        )
    assert held is not None
    return held


def learn(site: Installation, held: RunClaim, epochs: int) -> None:
    points = [
        {
            "network": "fold0",
            "epoch": epoch,
            "step": 5 * epoch,
            "training_loss": 1 / epoch,
            "validation_loss": 2 / epoch,
            "bmd_r": 0.1 * epoch,
            "tbs_r": None,
        }
        for epoch in range(1, epochs + 1)
    ]
    told = {"network": "fold0", "epoch": epochs, "epochs": 4, "steps_done": 5 * epochs, "steps_planned": 20}
    with site.store.transaction() as session:
        training_work.progress(session, held, RunStage.TRAINING, told, points)


def finish(site: Installation, held: RunClaim) -> None:
    outcome = Outcome("training/1/package", "ab" * 32, "training/1/report/candidate", "c", "reference", "cd" * 32)
    with site.store.transaction() as session:
        training_work.finish(session, held, outcome, NOW)


def events(text: str) -> list[tuple[str, Any]]:
    found = re.findall(r"event: (\w+)\ndata: (.*)\n", text)
    return [(name, json.loads(data)) for name, data in found]


def test_a_run_is_asked_for_watched_and_finished(site: Installation) -> None:
    before = site.client.get(API).json()
    survey = {one["people"]: one for one in before["survey"]}
    assert survey["digital"]["reasons"] == []
    assert sum(survey["digital"]["scanners"].values()) == survey["digital"]["patients"]
    assert survey["digital"]["patients"] + survey["digital"]["locked"] == survey["digital"]["pairs"] == PATIENTS
    assert {one["code"] for one in survey["patients"]["reasons"]} == {"TRAINING_TOO_FEW", "TRAINING_LOCKED_TOO_FEW"}
    created = ask(site)
    assert created.status_code == 201, created.text
    run = created.json()
    assert created.headers["location"] == f"{API}/{run['id']}"
    assert (run["state"], run["configuration"], run["start"], run["share"]) == ("waiting", "osteogate", "scratch", None)
    held = claim(site, run["id"])
    learn(site, held, 2)
    shown = site.client.get(f"{API}/{run['id']}").json()
    assert (shown["state"], shown["stage"], shown["share"], len(shown["curve"])) == ("running", "training", 0.5, 2)
    finish(site, held)
    assert site.client.get(API).json()["items"][0]["package_sha256"] == "ab" * 32
    frozen = site.client.get(f"{API}/{run['id']}/manifest").json()
    assert training.content_hash(frozen) == run["manifest_sha256"]
    with site.store.reading() as session:
        wanted = select(AuditRow).where(AuditRow.action == "training.create")
        line = session.scalars(wanted).one()
        exported = session.scalars(select(AuditRow).where(AuditRow.action == "training.export")).one()
    assert (line.actor, line.peer_address, line.detail["reason"]) == ("local", "testclient", "the first pairs")
    assert exported.detail == {"pairs": PATIENTS}


def test_a_refit_is_asked_for_without_a_configuration(site: Installation) -> None:
    created = ask(site, start="refit", settings={})
    assert created.status_code == 201, created.text
    run = created.json()
    assert (run["start"], run["configuration"]) == ("refit", "as-in-force")
    frozen = site.client.get(f"{API}/{run['id']}/manifest").json()
    assert (frozen["start"], frozen["start_from"]) == ("refit", REFERENCE)
    assert frozen["configuration"]["name"] == "site"
    assert frozen["configuration"]["calibration_folds"] == [8, 9]


@pytest.mark.parametrize(
    ("changes", "status", "codes"),
    [
        ({"people": "patients"}, 409, ["TRAINING_TOO_FEW", "TRAINING_LOCKED_TOO_FEW"]),
        ({"configuration": "none"}, 422, ["TRAINING_CONFIGURATION"]),
        ({"settings": {"epochs": 0, "colour": "red"}}, 422, ["TRAINING_CONFIGURATION", "TRAINING_CONFIGURATION"]),
        ({"targets": ["tbs"]}, 422, ["TRAINING_TARGETS"]),
        ({"folds": 4}, 422, ["TRAINING_CONFIGURATION"]),
        ({"start": "fine-tune", "settings": {"heads": "separate"}}, 422, ["TRAINING_START"]),
        ({"start": "refit"}, 422, ["TRAINING_CONFIGURATION"]),  # epochs of what?
    ],
)
def test_a_refusal_is_a_problem_with_reasons(
    site: Installation, changes: dict[str, Any], status: int, codes: list[str]
) -> None:
    answer = ask(site, **changes)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    told = answer.json()
    assert [one["code"] for one in told["reasons"]] == codes
    assert told["detail"] == told["reasons"][0]["text"]
    assert site.client.get(API).json()["items"] == []


def test_what_is_no_request_is_refused_before_the_rules(site: Installation) -> None:
    for changes in ({"reason": ""}, {"reason": "  "}, {"seed": -1}, {"start": "champion"}, {"unknown": 1}):
        assert ask(site, **changes).status_code == 422
    assert site.client.post(API, content="reason=x", headers={"content-type": "text/plain"}).status_code in (415, 422)
    for path in (f"{API}/7", f"{API}/7/manifest", f"{API}/7/events"):
        assert site.client.get(path).status_code == 404
    for step in ("cancel", "resume"):
        assert site.client.post(f"{API}/7/{step}").status_code == 404


def test_one_run_goes_at_a_time_and_can_be_cancelled_and_resumed(site: Installation) -> None:
    run_id = ask(site).json()["id"]
    again = ask(site)
    assert (again.status_code, again.json()["reasons"][0]["code"]) == (409, "TRAINING_GOING")
    assert site.client.post(f"{API}/{run_id}/resume").status_code == 409
    assert site.client.post(f"{API}/{run_id}/cancel").json()["state"] == "cancelled"
    assert site.client.post(f"{API}/{run_id}/cancel").status_code == 409
    assert site.client.post(f"{API}/{run_id}/resume").json()["state"] == "waiting"
    claim(site, run_id)
    running = site.client.post(f"{API}/{run_id}/cancel").json()
    assert (running["state"], running["cancel_asked"]) == ("running", True)


def test_without_room_no_run_begins(tmp_path: Path) -> None:
    with installed(tmp_path, empty=True, policy=SMALL, training_disk_bytes=2**62) as site:
        fill(site.store)
        answer = ask(site)
        assert (answer.status_code, answer.json()["reasons"][0]["code"]) == (507, "TRAINING_DISK")


def test_events_tell_what_is_new_and_end_with_the_run(site: Installation) -> None:
    run_id = ask(site).json()["id"]
    held = claim(site, run_id)
    learn(site, held, 2)
    finish(site, held)
    answer = site.client.get(f"{API}/{run_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = events(answer.text)
    assert [name for name, _ in told] == ["epoch", "epoch", "progress", "end"]
    assert told[1][1]["validation_loss"] == 1.0
    assert told[2][1]["state"] == told[3][1]["state"] == "finished"
    (last,) = re.findall(r"id: (\d+)\n", answer.text)[-1:]
    later = site.client.get(f"{API}/{run_id}/events", headers={"last-event-id": last})
    assert [name for name, _ in events(later.text)] == ["progress", "end"]  # known points are not told again
    odd = site.client.get(f"{API}/{run_id}/events", headers={"last-event-id": b"\xb2"})
    assert len(events(odd.text)) == 4


# --- pages --------------------------------------------------------------------------------------------------------


def token(page: str) -> str:
    return re.findall(r'name="csrf" value="([0-9a-f]+)"', page)[0]


def test_the_page_says_why_no_run_can_start(tmp_path: Path) -> None:
    with installed(tmp_path, empty=True) as site:
        page = site.client.get("/training").text
        assert page.count("TRAINING_TOO_FEW") == 4  # patients and digital patients, BMD and TBS and BMD alone
        assert "50 are needed" in page
        form = {"csrf": token(page), "reason": "<b>try</b>", "people": "digital"}
        refused = site.client.post("/training", data=form)
        assert refused.status_code == 422
        assert "The run was not started" in refused.text
        assert "&lt;b&gt;try&lt;/b&gt;" in refused.text
        assert site.client.post("/training", data={**form, "csrf": "no"}).status_code == 403
        blank = site.client.post("/training", data={**form, "reason": "  "})
        assert (blank.status_code, "The run was not started" in blank.text) == (422, False)


def test_a_refit_by_the_page_takes_no_configuration_whatever_the_form_says(site: Installation) -> None:
    page = site.client.get("/training").text
    assert "the model in force, its readout alone" in page
    form = {"csrf": token(page), "reason": "a new scanner", "start": "refit", "configuration": "osteogate"}
    form |= {"people": "digital"}
    sent = site.client.post("/training", data=form, follow_redirects=False)
    assert (sent.status_code, sent.headers["location"]) == (303, "/training/1")
    run = site.client.get("/api/v1/training-runs/1").json()
    assert (run["start"], run["configuration"]) == ("refit", "as-in-force")


def test_a_run_by_the_page_with_its_curves(site: Installation) -> None:
    page = site.client.get("/training").text
    assert 'href="/training"' in page
    form = {"csrf": token(page), "reason": "by hand", "people": "digital", "epochs": "4", "folds": "", "seed": "1"}
    form |= {"targets": "bmd_g_cm2"}
    sent = site.client.post("/training", data=form, follow_redirects=False)
    assert sent.status_code == 303, sent.text
    address = sent.headers["location"]
    run_id = int(address.rpartition("/")[2])
    held = claim(site, run_id)
    assert "<polyline" not in site.client.get(address).text
    assert "BMD alone, no TBS" in site.client.get(address).text
    assert site.client.get(f"/api/v1/training-runs/{run_id}").json()["targets"] == ["bmd_g_cm2"]
    learn(site, held, 3)
    with site.store.transaction() as session:
        training_work.note_lost(session, held, [Lost("1.2.826.3", None, "TRAINING_CT_GONE", "<i>gone</i>")])
    page = site.client.get(address).text
    assert f'data-events="{API}/{run_id}/events"' in page
    assert page.count("<polyline") == 3  # two losses, and BMD: TBS has no r
    assert "Validation loss of fold0 after epoch 3: 0.667" in page
    assert "&lt;i&gt;gone&lt;/i&gt;" in page
    part = site.client.get(address, headers={"hx-request": "true"}).text
    assert "<html" not in part
    assert 'id="run"' in part
    cancelled = site.client.post(f"{address}/cancel", data={"csrf": token(page)}, follow_redirects=False)
    assert cancelled.headers["location"] == address
    assert "Stops after this step" in site.client.get(address).text
    finish(site, held)
    page = site.client.get(address).text
    assert "data-events" not in page
    assert "Candidate" in page
    assert "Run 1" in site.client.get("/training").text
