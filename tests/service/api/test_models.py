"""Models by HTTP and on their pages: seen by everybody, moved by an ml-admin, and only through the gate."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from service.api.guard import MAX_BODY_BYTES, MAX_PACKAGE_BYTES, most_bytes
from service.store.tables import AuditRow
from service.workflow.model import REFERENCE
from service.workflow.models import ModelLine
from service.workflow.packages import Library
from tests.service.web.installation import Installation, installed
from tests.service.workflow import toy_models

API = "/api/v1/models"
ZIP = {"content-type": "application/zip"}
PAGE = {"accept": "text/html"}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Installation]:
    with installed(tmp_path / "data", empty=True) as opened:
        yield opened


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(exist_ok=True)


def candidate(site: Installation, folder: Path, version: str = "1", **changes: object) -> ModelLine:
    kept = Library.of(site.settings).keep_run(toy_models.run(folder / f"run{version}", version, **changes))
    return toy_models.registered(site.store, kept)


def actions(site: Installation) -> list[tuple[str, str, str]]:
    with site.store.reading() as session:
        rows = session.scalars(select(AuditRow).where(AuditRow.action.startswith("model")).order_by(AuditRow.id))
        return [(row.action, row.subject, row.actor) for row in rows]


def test_a_model_is_promoted_by_its_reason_and_rolled_back_by_one_call(site: Installation, tmp_path: Path) -> None:
    first = site.client.get(API).json()
    assert first["in_force"]["name"] == REFERENCE
    assert first["rollback_to"] is None
    line = candidate(site, tmp_path)
    shown = site.client.get(f"{API}/{line.id}").json()
    assert (shown["promotable"], shown["verdict"]["passed"], shown["against"]) == (True, True, [])
    assert {check["code"] for check in shown["verdict"]["checks"]} >= {"GATE_SENSITIVITY", "GATE_BIAS"}
    for body in ({}, {"reason": ""}, {"reason": "x" * 1001}, {"reason": "y", "force": True}, {"reason": "  "}):
        assert site.client.post(f"{API}/{line.id}/promote", json=body).status_code in (409, 422), body
    assert site.client.get(API).json()["in_force"]["name"] == REFERENCE
    done = site.client.post(f"{API}/{line.id}/promote", json={"reason": "unbiased here", "person": "Dr. Ito"})
    assert (done.status_code, done.json()["in_force"]) == (200, True)
    again = site.client.post(f"{API}/{line.id}/promote", json={"reason": "once more"})
    assert (again.status_code, "already" in again.json()["detail"]) == (409, True)
    found = site.client.get(API).json()
    assert found["in_force"]["sha256"] == line.sha256
    assert found["rollback_to"]["name"] == REFERENCE
    assert [(move["action"], move["reason"]) for move in found["history"]] == [
        ("promote", "unbiased here"), ("shipped", None),
    ]  # fmt: skip
    back = site.client.post(f"{API}/rollback", json={"reason": "too many flags"})
    assert (back.status_code, back.json()["name"]) == (200, REFERENCE)
    nothing = site.client.post(f"{API}/rollback", json={"reason": "too many flags"})
    assert nothing.status_code == 409
    moved = [one for one in actions(site) if one[0] in ("model.promote", "model.rollback")]
    assert moved == [("model.promote", f"model:{line.id}", "local"), ("model.rollback", "model:1", "local")]


def test_a_shut_gate_answers_with_every_reason_and_the_try_is_audited(site: Installation, tmp_path: Path) -> None:
    line = candidate(site, tmp_path, n_patients_synthetic=60, n_patients_real=0)
    answer = site.client.post(f"{API}/{line.id}/promote", json={"reason": "it looks good"})
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert [one["code"] for one in answer.json()["reasons"]] == ["GATE_SYNTHETIC", "GATE_FEW_PATIENTS"]
    assert ("model.promote.refused", f"model:{line.id}", "local") in actions(site)
    assert site.client.get(API).json()["in_force"]["name"] == REFERENCE
    for path in (f"{API}/77", f"{API}/77/export"):
        assert site.client.get(path).status_code == 404
    assert site.client.post(f"{API}/77/promote", json={"reason": "r"}).status_code == 404
    assert site.client.post(f"{API}/{line.id}/promote", data={"reason": "r"}).status_code in (415, 422)


def test_a_package_goes_out_and_comes_in_at_another_site(site: Installation, tmp_path: Path) -> None:
    line = candidate(site, tmp_path)
    out = site.client.get(f"{API}/{line.id}/export")
    assert (out.status_code, out.headers["content-type"]) == (200, "application/zip")
    assert f'filename="site-1-{line.sha256[:12]}.osteogate.zip"' in out.headers["content-disposition"]
    assert "signature.json" in zipfile.ZipFile(io.BytesIO(out.content)).namelist()
    assert site.client.get(f"{API}/1/export").status_code == 409  # what ships
    (tmp_path / "away").mkdir()
    with installed(tmp_path / "away", empty=True) as away:
        assert away.client.post(f"{API}/import", content=out.content).status_code == 415
        taken = away.client.post(f"{API}/import", content=out.content, headers=ZIP)
        assert taken.status_code == 201, taken.text
        model = taken.json()
        assert (model["origin"], model["verdict"], model["promotable"]) == ("imported", None, False)
        assert model["provenance"]["signature"] == "foreign"
        refused = away.client.post(f"{API}/{model['id']}/promote", json={"reason": "they say it is good"})
        assert [one["code"] for one in refused.json()["reasons"]] == ["GATE_NOT_JUDGED"]
        spoilt = out.content.replace(b"safetensors", b"safetensorz", 1)
        for content in (spoilt, out.content[:500], b"", b"PK"):
            answer = away.client.post(f"{API}/import", content=content, headers=ZIP)
            assert (answer.status_code, answer.json()["detail"].startswith("Not taken: ")) == (422, True)
        page = away.client.get(f"/models/{model['id']}", headers=PAGE).text
        assert "osteogate models judge" in page
        assert "of another site, which this one cannot check" in page
    assert most_bytes(f"{API}/import") == MAX_PACKAGE_BYTES
    assert most_bytes(f"{API}/1/promote") == MAX_BODY_BYTES


def test_a_candidate_goes_into_shadow_and_out_again(site: Installation, tmp_path: Path) -> None:
    line = candidate(site, tmp_path, n_patients_real=0)
    path = f"{API}/{line.id}/shadow"
    assert site.client.post(path, json={}).json()["shadow_since"] is not None
    assert site.client.get(f"{API}/{line.id}").json()["agreement"] == {
        "since": "2026-11-23T09:30:00Z", "bmd_g_cm2": None, "tbs": None,
    }  # fmt: skip
    page = site.client.get(f"/models/{line.id}", headers=PAGE).text
    assert "No study yet" in page
    assert "End the shadow" in page
    assert site.client.post(path, json={"shadow": False}).json()["shadow_since"] is None
    assert site.client.post(path, json={"shadow": False}).status_code == 409
    assert site.client.post(f"{API}/1/shadow", json={}).status_code == 409
    assert site.client.post(f"{API}/77/shadow", json={}).status_code == 404
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', page)
    assert found
    form = {"csrf": found[1], "wanted": "begin"}
    assert "End the shadow" in site.client.post(f"/models/{line.id}/shadow", data=form, headers=PAGE).text


def test_the_pages_tell_who_and_why_and_the_forms_move_the_pointer(site: Installation, tmp_path: Path) -> None:
    page = site.client.get("/models", headers=PAGE).text
    assert "No other model yet" in page
    assert "for people the CT attenuation decides" in page
    shut = candidate(site, tmp_path, "1", calibration__bmd__slope=0.5)
    good = candidate(site, tmp_path, "2")
    page = site.client.get("/models", headers=PAGE).text
    assert "GATE_CALIBRATION" in page
    assert "0.8 to 1.2 is allowed" in page
    assert f'action="/models/{good.id}/promote"' in page
    assert f'action="/models/{shut.id}/promote"' not in page
    detail = site.client.get(f"/models/{shut.id}", headers=PAGE).text
    assert "ge Revolution CT (88 patients, BMD × 1.052). On any other one its intervals are wider" in detail
    assert detail.count('class="row-failed"') == 1
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', page)
    assert found
    form = {"reason": "<b>agrees</b> with DXA", "csrf": found[1]}
    assert site.client.post(f"/models/{good.id}/promote", data={"reason": "no token"}).status_code == 403
    assert site.client.post(f"/models/{good.id}/promote", data={**form, "reason": " "}).status_code == 422
    refused = site.client.post(f"/models/{shut.id}/promote", data=form, headers=PAGE)
    assert (refused.status_code, "0.8 to 1.2 is allowed" in refused.text) == (409, True)
    done = site.client.post(f"/models/{good.id}/promote", data=form, headers=PAGE)
    assert "In force: <a" in done.text
    assert "&lt;b&gt;agrees&lt;/b&gt; with DXA" in done.text
    assert f"Roll back to {REFERENCE}" in done.text
    assert "network_gate_passed" in done.text
    back = site.client.post("/models/rollback", data=form, headers=PAGE)
    assert "Brought back" in back.text
    file = {"file": ("x.zip", b"PK", "application/zip")}
    assert site.client.post("/models/import", data={"csrf": found[1]}, files=file).status_code == 422
    assert site.client.get("/models/77", headers=PAGE).status_code == 404
    whole = site.client.get(f"{API}/{good.id}/export").content
    taken = site.client.post(
        "/models/import", data={"csrf": found[1]}, files={"file": ("x.zip", whole, "application/zip")}, headers=PAGE
    )
    assert (taken.status_code, taken.url.path) == (200, f"/models/{good.id}")
