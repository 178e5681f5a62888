"""The API: answers, problem documents, the guard at the door, audit."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from httpx import Response
from sqlalchemy import text

from service.api.guard import MAX_BODY_BYTES, is_loopback_name
from service.api.schemas import iso_day
from service.api.tabular import safe
from service.store.tables import ReportRow
from tests.service.web import seed
from tests.service.web.installation import ORIGIN, Installation, delivery_row, installed, own_url, report_row
from tests.service.workflow import workbench

API = "/api/v1"


@pytest.fixture(scope="module", params=workbench.DATABASES)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("site")
    with installed(folder, database_url=own_url(request.param, folder)) as found:
        yield found


@pytest.fixture(params=workbench.DATABASES)
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Installation]:
    with installed(tmp_path, database_url=workbench.fresh_url(request.param, tmp_path)) as found:
        yield found


def problem(answer: Response, status: int) -> dict[str, Any]:
    """The problem document of an answer, checked against RFC 9457."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    assert document["type"] == "about:blank"
    assert document["title"]
    return document


def items(site: Installation, **query: Any) -> list[dict[str, Any]]:
    answer = site.client.get(f"{API}/worklist", params=query)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["items"]
    return found


def test_worklist_puts_open_referrals_first(site: Installation) -> None:
    found = items(site)
    assert len(found) == 12
    assert found[0]["study_uid"] == seed.REFER
    assert found[0]["category"] == "refer"
    assert found[0]["referral"]["state"] == "open"
    assert found[0]["values"]["bmd_interval"] == [0.65, 0.77]
    assert found[0]["digital_model"] is True
    assert found[-1]["category"] == "no-flag"


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ({"category": "refer"}, 4),
        ({"category": "not-assessable"}, 3),
        ({"stage": "failed"}, 1),
        ({"state": "receiving"}, 2),
        ({"synthetic": "false"}, 2),
        ({"referral": "ordered"}, 1),
        ({"q": "yamada"}, 1),
        ({"q": "%"}, 0),
        ({"category": "refer", "synthetic": "false"}, 1),
    ],
)
def test_worklist_filters(site: Installation, query: dict[str, str], count: int) -> None:
    assert len(items(site, **query)) == count


def test_worklist_sorts_with_missing_values_last(site: Installation) -> None:
    for sort, turned in (("bmd", False), ("-bmd", True)):
        values = [item["values"]["bmd_g_cm2"] for item in items(site, sort=sort)]
        known = [value for value in values if value is not None]
        assert known == sorted(known, reverse=turned)
        assert values[: len(known)] == known


def test_worklist_pages_do_not_overlap(site: Installation) -> None:
    pages = [items(site, page=page, page_size=5) for page in (1, 2, 3)]
    uids = [item["study_uid"] for page in pages for item in page]
    assert [len(page) for page in pages] == [5, 5, 2]
    assert len(set(uids)) == 12
    assert items(site, page=9, page_size=5) == []


def test_csv_cells_cannot_run(site: Installation) -> None:
    answer = site.client.get(f"{API}/worklist", headers={"accept": "text/csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    rows = {row["study_uid"]: row for row in csv.DictReader(io.StringIO(answer.text))}
    assert len(rows) == 12
    assert rows[seed.SHEET]["patient_name"] == "'" + seed.FORMULA
    assert rows[seed.REFER]["patient_name"] == seed.JAPANESE
    assert rows[seed.REFER]["network_validated_on"] == "digital patients only"
    for row in rows.values():
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in row.values())


def test_csv_download_of_the_page_opens_in_a_spreadsheet(site: Installation) -> None:
    answer = site.client.get("/worklist.csv")
    assert answer.content.startswith(b"\xef\xbb\xbf")
    assert "山田" in answer.text
    assert "attachment" in answer.headers["content-disposition"]


@pytest.mark.parametrize("cell", ["=1", "+1", "-1", "@a", "\ta", "\ra", "  =1", "＝1"])
def test_every_formula_start_is_escaped(cell: str) -> None:
    assert safe(cell) == f"'{cell}"


def test_harmless_cells_stay() -> None:
    assert [safe(cell) for cell in ("a=b", "", None, -3.5)] == ["a=b", "", None, -3.5]


def test_study_has_series_jobs_conflicts_and_refusals(site: Installation) -> None:
    study = site.client.get(f"{API}/studies/{seed.REFER}").json()
    assert [one["eligible"] for one in study["series"]] == [True, False]
    assert study["series"][1]["reasons"][0]["code"] == "KERNEL_NOT_ALLOWED"
    assert study["jobs"][0]["attempts"] == 1
    assert len(study["conflicts"]) == 1
    assert study["refusals"][0]["code"] == "UID_MISMATCH"
    assert study["category"] == "refer"


def test_studies_are_listed(site: Installation) -> None:
    answer = site.client.get(f"{API}/studies", params={"page_size": 3}).json()
    assert answer["total"] == 12
    assert len(answer["items"]) == 3


def test_result_has_every_key_of_the_contract(site: Installation) -> None:
    document = site.client.get(f"{API}/studies/{seed.REFER}/result").json()
    keys = {"study_uid", "series_uid", "revision", "verdict", "levels", "patient", "anatomy", "decision"}
    assert set(document) == keys | {"provenance", "timings_s"}
    assert set(document["levels"]) == {"L1", "L2", "L3", "L4"}
    assert document["decision"]["category"] == "refer"


def test_study_that_no_series_qualified_has_a_result_too(site: Installation) -> None:
    document = site.client.get(f"{API}/studies/{seed.NOT_SCREENED}/result").json()
    assert document["decision"]["category"] == "not-assessable"
    codes = {reason["code"] for reason in document["verdict"]["reasons"]}
    assert "CONTRAST_TAGGED" in codes
    assert document["patient"]["bmd_g_cm2"] is None


@pytest.mark.parametrize(("uid", "state"), [(seed.RECEIVING, "receiving"), (seed.QUEUED, "queued")])
def test_result_on_its_way_is_a_problem_that_says_so(site: Installation, uid: str, state: str) -> None:
    assert state in problem(site.client.get(f"{API}/studies/{uid}/result"), 404)["detail"]


def act(site: Installation, uid: str, **step: Any) -> Response:
    return site.client.post(f"{API}/studies/{uid}/referral", json=step)


def test_asking_for_a_result_that_is_not_there_yet_is_no_view(fresh: Installation) -> None:
    """Whoever waits asks every second; the audit tells what was seen."""
    for uid in (seed.RECEIVING, seed.QUEUED, "1.2.3.4.5"):
        problem(fresh.client.get(f"{API}/studies/{uid}/result"), 404)
    assert fresh.client.get(f"{API}/studies/{seed.REFER}/result").status_code == 200
    trail = fresh.client.get(f"{API}/audit").json()["items"]
    assert [(line["action"], line["subject"]) for line in trail] == [("result.view", seed.REFER)]


def test_referral_loop(fresh: Installation) -> None:
    for action, state in (("review", "reviewed"), ("order", "ordered"), ("dxa-done", "dxa-done")):
        answer = act(fresh, seed.REFER, action=action)
        assert answer.status_code == 200, answer.text
        assert answer.json()["state"] == state
    assert act(fresh, seed.REFER, action="reopen").json()["state"] == "open"
    problem(act(fresh, seed.REFER, action="dismiss"), 422)
    problem(act(fresh, seed.REFER, action="dismiss", reason="  "), 422)
    dismissed = act(fresh, seed.REFER, action="dismiss", reason="DXA in May")
    assert dismissed.json()["reason"] == "DXA in May"
    trail = fresh.client.get(f"{API}/audit", params={"subject": seed.REFER}).json()["items"]
    assert trail[0]["action"] == "referral.dismiss"
    assert trail[0]["actor"] == "local"


def test_step_that_the_state_does_not_allow(fresh: Installation) -> None:
    act(fresh, seed.REFER, action="dismiss", reason="seen")
    problem(act(fresh, seed.REFER, action="order"), 409)
    problem(act(fresh, seed.NO_FLAG, action="review"), 409)  # it has no referral
    problem(act(fresh, "1.2.3", action="review"), 404)
    problem(act(fresh, seed.REFER, action="cure"), 422)
    problem(act(fresh, seed.REFER, action="review", extra=1), 422)


def test_rerun(fresh: Installation) -> None:
    path = f"{API}/studies/{{}}/rerun"
    json = {"content-type": "application/json"}
    answer = fresh.client.post(path.format(seed.QUARANTINED), headers=json)
    assert answer.status_code == 202
    assert answer.json()["state"] == "queued"
    problem(fresh.client.post(path.format(seed.QUARANTINED), headers=json), 409)
    problem(fresh.client.post(path.format("1.2.3"), headers=json), 404)


def test_renumber(fresh: Installation) -> None:
    def ask(uid: str, **body: Any) -> Response:
        return fresh.client.post(f"{API}/studies/{uid}/renumber", json=body)

    for wrong in ({}, {"shift": 1, "levels": {"L1": "L2"}}, {"shift": 3}, {"levels": {"L1": "liver"}}, {"shift": 1.5}):
        problem(ask(seed.REFER, reason="seen", **wrong), 422)
    problem(ask(seed.REFER, shift=1), 422)
    problem(ask(seed.REFER, shift=1, reason="  "), 422)
    problem(ask("1.2.3", shift=1, reason="seen"), 404)
    problem(ask(seed.QUEUED, shift=1, reason="seen"), 409)
    problem(ask(seed.SHORT_VIEW, shift=1, reason="seen"), 409)  # nothing was outlined
    before = fresh.client.get(f"{API}/studies/{seed.REFER}").json()["revision"]
    answer = ask(seed.REFER, levels={"T12": "L1", "L1": "L2", "L2": "L3", "L3": "L4", "L4": "L5"}, reason="seen")
    assert answer.status_code == 202, answer.text
    assert answer.json() == {"study_uid": seed.REFER, "state": "queued", "revision": before + 1}
    assert fresh.client.get(f"{API}/studies/{seed.REFER}/result").status_code == 200  # the old one stands
    trail = fresh.client.get(f"{API}/audit", params={"subject": seed.REFER}).json()["items"]
    told = next(line for line in trail if line["action"] == "renumber")
    assert (told["detail"]["reason"], told["detail"]["levels"]["T12"]) == ("seen", "L1")


def test_errors_are_problem_documents(site: Installation) -> None:
    problem(site.client.get("/api/v1/nothing"), 404)
    problem(site.client.get(f"{API}/studies/1.2.3"), 404)
    problem(site.client.delete(f"{API}/worklist"), 405)
    problem(site.client.get(f"{API}/worklist", params={"page": 0}), 422)
    problem(site.client.get(f"{API}/worklist", params={"sort": "secret"}), 422)
    problem(site.client.get(f"{API}/studies/..%2f..%2fetc"), 404)
    problem(site.client.get(f"{API}/studies/<script>"), 422)
    problem(site.client.post(f"{API}/studies/{seed.REFER}/referral", content=b"{"), 422)


def test_broken_database_is_an_honest_answer(tmp_path: Path) -> None:
    with installed(tmp_path) as broken:
        with broken.store.transaction() as session:
            session.execute(text("ALTER TABLE results RENAME TO gone"))
        problem(broken.client.get(f"{API}/worklist"), 503)
        ready = problem(broken.client.get(f"{API}/health/ready"), 503)
        assert ready["checks"]["database"]["ok"] is False
        assert str(tmp_path) not in str(ready)
        assert broken.client.get(f"{API}/health/live").json()["status"] == "ok"


def test_unforeseen_error_is_a_problem_without_detail(fresh: Installation, monkeypatch: Any) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr("service.workflow.reading.worklist", explode)
    answer = fresh.client.get(f"{API}/worklist")
    problem(answer, 500)
    assert "secret" not in answer.text
    assert "content-security-policy" in answer.headers


def test_ready_and_metrics(site: Installation) -> None:
    ready = site.client.get(f"{API}/health/ready")
    assert ready.json()["status"] == "ok"
    metrics = site.client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'osteogate_studies{state="quarantined"} 1' in metrics.text
    assert 'osteogate_decisions{category="refer"} 4' in metrics.text
    assert "Yamada" not in metrics.text


def test_full_spool_is_not_ready(tmp_path: Path) -> None:
    with installed(tmp_path, disk_floor_bytes=1 << 60) as full:
        ready = problem(full.client.get(f"{API}/health/ready"), 503)
    assert ready["checks"]["spool"]["ok"] is False


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.5:8080", "", "a@localhost"])
def test_foreign_host_names_are_refused(site: Installation, host: str) -> None:
    problem(site.client.get("/", headers={"host": host}), 421)


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1", "127.8.9.1:80", "[::1]:8080"])
def test_loopback_names(host: str) -> None:
    assert is_loopback_name(host)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_requests_of_other_origins_change_nothing(fresh: Installation, headers: dict[str, str]) -> None:
    path = f"{API}/studies/{seed.REFER}/referral"
    problem(fresh.client.post(path, json={"action": "review"}, headers=headers), 403)
    assert fresh.client.get(f"{API}/studies/{seed.REFER}").json()["referral"]["state"] == "open"


def test_our_own_origin_may(fresh: Installation) -> None:
    headers = {"origin": ORIGIN, "sec-fetch-site": "same-origin"}
    path = f"{API}/studies/{seed.REFER}/referral"
    assert fresh.client.post(path, json={"action": "review"}, headers=headers).status_code == 200


def test_body_has_a_limit(site: Installation) -> None:
    path = f"{API}/studies/{seed.REFER}/referral"
    problem(site.client.post(path, content=b" " * (MAX_BODY_BYTES + 1)), 413)
    pieces = (b" " * 8192 for _ in range(MAX_BODY_BYTES // 8192 + 2))  # no Content-Length
    problem(site.client.post(path, content=pieces, headers={"content-type": "application/json"}), 413)


def test_api_takes_json_only(site: Installation) -> None:
    path = f"{API}/studies/{seed.QUARANTINED}/rerun"
    problem(site.client.post(path, headers={"content-type": "text/plain"}), 415)


def test_dates_are_iso_8601(site: Installation) -> None:
    item = site.client.get("/api/v1/worklist", params={"q": "Svensson"}).json()["items"][0]
    assert item["study_date"] == "2026-11-23"
    assert site.client.get(f"/api/v1/studies/{seed.REAL}").json()["study_date"] == "2026-11-23"
    rows = csv.DictReader(io.StringIO(site.client.get("/api/v1/worklist", headers={"accept": "text/csv"}).text))
    assert {row["study_date"] for row in rows} == {"2026-11-23"}
    assert [iso_day(told) for told in ("19500230", "1950", "", None)] == ["19500230", "1950", None, None]


def test_views_and_exports_are_audited(fresh: Installation) -> None:
    fresh.client.get(f"/studies/{seed.REFER}")
    fresh.client.get(f"{API}/studies/{seed.REFER}/result")
    fresh.client.get("/worklist.csv")
    trail = fresh.client.get(f"{API}/audit").json()["items"]
    assert [line["action"] for line in trail] == ["worklist.export", "result.view", "study.view"]
    assert trail[1]["subject"] == seed.REFER


def test_documentation_comes_from_here(site: Installation) -> None:
    document = site.client.get("/api/openapi.json").json()
    for path in ("/worklist", "/studies", "/studies/{study_uid}/referral", "/health/ready", "/audit"):
        assert f"/api/v1{path}" in document["paths"]
    assert "/metrics" in document["paths"]
    page = site.client.get("/api/docs").text
    assert "swagger-ui-bundle.js" in page
    assert "http" not in page
    for name in ("vendor/swagger-ui-bundle.js", "vendor/htmx.min.js", "osteogate.css"):
        assert site.client.get(f"/static/{name}").status_code == 200


JSON = {"content-type": "application/json"}


def test_study_carries_its_objects_and_their_deliveries(site: Installation) -> None:
    reports = site.client.get(f"{API}/studies/{seed.NO_FLAG}").json()["reports"]
    assert {report["kind"] for report in reports} == {"SEG", "SR"}
    report = next(report for report in reports if report["kind"] == "SR")
    row = report_row(site, seed.NO_FLAG, "SR")
    assert (report["id"], report["state"], report["last_error"]) == (row.id, "made", None)
    assert report["sop_instance_uid"] == row.sop_instance_uid
    found = {delivery["destination"]: delivery for delivery in report["deliveries"]}
    assert set(found) == {"archive", "pacs"}
    assert found["archive"]["state"] == "delivered"
    assert found["archive"]["delivered_at"] is not None
    keys = {"id", "destination", "state", "attempts", "due_at", "delivered_at", "last_error"}
    assert set(found["pacs"]) == keys
    assert (found["pacs"]["attempts"], found["pacs"]["last_error"]) == (5, seed.DOWN)


def test_objects_of_superseded_results_stay_listed(site: Installation) -> None:
    study = site.client.get(f"{API}/studies/{seed.REAL}").json()
    assert [result["revision"] for result in study["results"]] == [2, 1]
    newest, oldest = (result["result_id"] for result in study["results"])
    assert [report["result_id"] for report in study["reports"]] == [newest, newest, oldest, oldest]


def test_earlier_result_has_its_document_too(site: Installation) -> None:
    path = f"{API}/studies/{seed.REAL}/result"
    earlier = site.client.get(path, params={"result_id": 5}).json()
    assert (earlier["revision"], earlier["provenance"]["segmenter"]) == (1, "builtin")
    assert site.client.get(path).json()["revision"] == 2
    problem(site.client.get(f"{API}/studies/{seed.NO_FLAG}/result", params={"result_id": 5}), 404)


def test_resend(fresh: Installation) -> None:
    row = delivery_row(fresh, seed.NO_FLAG, "SR", "archive")
    answer = fresh.client.post(f"{API}/deliveries/{row.id}/resend", headers=JSON)
    assert answer.status_code == 202, answer.text
    assert (answer.json()["state"], answer.json()["delivered_at"]) == ("waiting", None)
    trail = fresh.client.get(f"{API}/audit", params={"subject": seed.NO_FLAG}).json()["items"]
    assert trail[0]["action"] == "delivery.resend"
    assert trail[0]["detail"]["destination"] == "archive"
    busy = delivery_row(fresh, seed.LATE, "SR", "pacs")
    problem(fresh.client.post(f"{API}/deliveries/{busy.id}/resend", headers=JSON), 409)
    removed = delivery_row(fresh, seed.XSS, "SR", seed.REMOVED)
    problem(fresh.client.post(f"{API}/deliveries/{removed.id}/resend", headers=JSON), 409)


def test_send_to_a_later_destination(fresh: Installation) -> None:
    path = f"{API}/reports/{report_row(fresh, seed.NO_FLAG, 'SR').id}/send"
    answer = fresh.client.post(path, json={"destination": "research"})
    assert answer.status_code == 202, answer.text
    assert (answer.json()["destination"], answer.json()["state"]) == ("research", "waiting")
    problem(fresh.client.post(path, json={"destination": "nobody"}), 409)
    problem(fresh.client.post(path, json={}), 422)
    problem(fresh.client.post(path, json={"destination": "research", "more": 1}), 422)


def test_remake(fresh: Installation) -> None:
    path = f"{API}/reports/{report_row(fresh, seed.SHORT_VIEW, 'SR').id}/remake"
    answer = fresh.client.post(path, headers=JSON)
    assert answer.status_code == 202, answer.text
    assert (answer.json()["state"], answer.json()["attempts"], answer.json()["last_error"]) == ("waiting", 0, None)
    problem(fresh.client.post(path, headers=JSON), 409)


def test_retry_of_a_destination(fresh: Installation) -> None:
    answer = fresh.client.post(f"{API}/outbox/pacs/retry", headers=JSON)
    assert answer.status_code == 202, answer.text
    assert answer.json() == {"destination": "pacs", "deliveries": 4}  # the two of LATE are on the wire
    problem(fresh.client.post(f"{API}/outbox/{seed.REMOVED}/retry", headers=JSON), 409)


@pytest.mark.parametrize("path", ["deliveries/{}/resend", "reports/{}/remake", "reports/{}/send", "reports/{}/file"])
def test_outbox_refuses_what_it_does_not_know(site: Installation, path: str) -> None:
    def ask(row: object) -> Response:
        address = f"{API}/{path.format(row)}"
        return site.client.get(address) if path.endswith("file") else site.client.post(address, json=body)

    body = {"destination": "research"} if path.endswith("send") else None
    problem(ask(999_999), 404)
    problem(ask(2**31), 422)
    problem(ask("..%2f1"), 404)


@pytest.mark.parametrize("path", ["deliveries/1/resend", "reports/1/remake", "outbox/pacs/retry"])
def test_outbox_takes_no_form_of_another_page(site: Installation, path: str) -> None:
    problem(site.client.post(f"{API}/{path}", headers={"content-type": "text/plain"}), 415)


def test_outbox_tells_each_destination(site: Installation) -> None:
    answer = site.client.get(f"{API}/outbox")
    assert seed.PASSWORD not in answer.text
    outbox = answer.json()
    assert (outbox["to_make"], outbox["not_made"]) == (1, 1)
    found = {line["name"]: line for line in outbox["destinations"]}
    assert list(found) == ["pacs", "archive", "research", seed.REMOVED]
    assert found["pacs"]["flow"] == "failing"
    assert (found["pacs"]["waiting"], found["pacs"]["failing"]) == (6, 4)
    assert found["pacs"]["last_error"] == seed.DOWN
    assert found["pacs"]["last_success_at"] < found["pacs"]["failing_since"]
    assert found["archive"]["flow"] == "clear"
    assert found["archive"]["address"] == "https://archive.example:8443/dicom-web"
    assert found["research"]["flow"] == "unused"
    assert found[seed.REMOVED]["address"] is None
    assert found[seed.REMOVED]["last_error"] == seed.HOSTILE_ANSWER


@pytest.mark.parametrize("kind", ["SR", "SEG"])
def test_object_can_be_downloaded(fresh: Installation, kind: str) -> None:
    row = report_row(fresh, seed.NO_FLAG, kind)
    answer = fresh.client.get(f"{API}/reports/{row.id}/file")
    assert answer.content == seed.REPORT_BYTES
    assert answer.headers["content-type"] == "application/dicom"
    assert f'attachment; filename="osteogate-{kind.lower()}-{row.id}.dcm"' == answer.headers["content-disposition"]
    trail = fresh.client.get(f"{API}/audit", params={"subject": seed.NO_FLAG}).json()["items"]
    assert trail[0]["action"] == "report.export"
    assert trail[0]["detail"] == {"report": row.id, "kind": kind, "sop_instance_uid": row.sop_instance_uid}


@pytest.mark.parametrize(
    "path", ["../secret.dcm", "objects/../../secret.dcm", "{secret}", "link.dcm", "gone.dcm", None]
)
def test_download_never_leaves_the_results(fresh: Installation, path: str | None) -> None:
    secret = fresh.settings.data_dir / "secret.dcm"
    secret.write_bytes(b"secret")
    (fresh.settings.results_dir / "link.dcm").symlink_to(secret)
    row = report_row(fresh, seed.NO_FLAG, "SR")
    with fresh.store.transaction() as session:
        session.get_one(ReportRow, row.id).path = path.format(secret=secret) if path else None
    answer = fresh.client.get(f"{API}/reports/{row.id}/file")
    problem(answer, 404)
    assert "secret" not in answer.text
    assert fresh.client.get(f"{API}/audit", params={"subject": seed.NO_FLAG}).json()["total"] == 0


def test_metrics_of_the_outbox(site: Installation) -> None:
    text = site.client.get("/metrics").text
    for line in (
        'osteogate_outbox_waiting{destination="pacs"} 6',
        'osteogate_outbox_waiting{destination="archive"} 0',
        'osteogate_outbox_waiting{destination="research"} 0',
        'osteogate_outbox_failing{destination="pacs"} 4',
        'osteogate_outbox_oldest_waiting_seconds{destination="pacs"} 480.0',  # NO_FLAG's, made 8 minutes ago
        'osteogate_outbox_oldest_waiting_seconds{destination="archive"} 0.0',
        'osteogate_reports{state="failed"} 1',
    ):
        assert line in text.splitlines()


def test_schemas_of_the_outbox_are_typed(site: Installation) -> None:
    document = site.client.get("/api/openapi.json").json()
    for path in (
        "/deliveries/{delivery_id}/resend",
        "/reports/{report_id}/remake",
        "/reports/{report_id}/send",
        "/outbox/{destination}/retry",
    ):
        answers = document["paths"][f"/api/v1{path}"]["post"]["responses"]
        assert "$ref" in answers["202"]["content"]["application/json"]["schema"]
        assert "application/problem+json" in answers["409"]["content"]
    file = document["paths"]["/api/v1/reports/{report_id}/file"]["get"]["responses"]
    assert "application/dicom" in file["200"]["content"]
    assert "flow" in document["components"]["schemas"]["DestinationShape"]["properties"]
