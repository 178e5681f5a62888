"""DXA results by HTTP: one as JSON, files as CSV or JSON, and the page's form."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from service.api.guard import MAX_BODY_BYTES, MAX_FILE_BYTES, most_bytes
from service.domain.reasons import Code, Reason
from service.store.tables import AuditRow
from service.workflow import dxa_reports
from tests.dxa_report import ENHANCED_SR
from tests.service.domain.test_dxa import GE
from tests.service.web import seed
from tests.service.web.installation import Installation, installed
from tests.service.workflow import workbench

API = "/api/v1/dxa"
CSV = {"content-type": "text/csv"}
RESULT: dict[str, Any] = {
    "patient_id": "P1",
    "scan_date": "2026-03-04",
    "manufacturer": "GE",
    "model": "Prodigy",
    "levels": {
        "L1": {"bmd_g_cm2": 0.9, "bmc_g": 9.9, "area_cm2": 11.0, "tbs": 1.31},
        "L2": {"bmd_g_cm2": 0.95, "bmc_g": 11.4, "area_cm2": 12.0, "validity": "implant"},
        "L3": {"bmd_g_cm2": 1.0, "bmc_g": 14.0, "area_cm2": 14.0},
    },
    "total": {"bmd_g_cm2": 0.956},
}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Installation]:
    with installed(tmp_path, empty=True) as opened:
        yield opened


def test_one_result_is_stored_once(site: Installation) -> None:
    first = site.client.post(API, json=RESULT)
    assert first.status_code == 201, first.text
    assert first.json()["by_area_g_cm2"] == pytest.approx(23.9 / 25)
    assert first.json()["mean_g_cm2"] == pytest.approx(0.95)
    second = site.client.post(API, json=RESULT)
    assert (second.status_code, second.json()["duplicate"]) == (200, True)
    contradiction = site.client.post(API, json={**RESULT, "model": "iDXA"})
    assert contradiction.status_code == 409
    assert contradiction.json()["reasons"][0]["code"] == "DXA_CONTRADICTS"
    stored = site.client.get(API, params={"patient_id": "P1"}).json()
    assert stored["total"] == 1
    assert stored["items"][0]["manufacturer"] == "GE Lunar"
    assert [level["validity"] for level in stored["items"][0]["levels"]] == ["valid", "implant", "valid"]
    with site.store.reading() as session:
        line = session.scalars(select(AuditRow).where(AuditRow.action == "dxa.accept")).one()
    assert (line.actor, line.peer_address) == ("local", "testclient")
    assert line.detail == {"patient_id": "P1", "referrals_closed": 0}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"total": {"bmd_g_cm2": 1.2}}, "DXA_TOTAL_MISMATCH"),
        ({"scan_date": "2027-01-01"}, "DXA_DATE"),
        ({"patient_id": " "}, "DXA_PATIENT_MISSING"),
        ({"levels": {"L1": {"bmd_g_cm2": 900}}, "total": {}}, "DXA_UNIT"),
    ],
)
def test_a_refused_result_tells_its_reasons(site: Installation, changes: dict[str, Any], code: str) -> None:
    answer = site.client.post(API, json={**RESULT, **changes})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert [reason["code"] for reason in answer.json()["reasons"]] == [code]


@pytest.mark.parametrize(
    "changes",
    [{"levels": {}}, {"levels": {"L9": {}}}, {"region": "hip"}, {"bmd": 1}, {"levels": {"L1": {"bmd_g_cm2": "NaN"}}}],
)
def test_a_result_of_another_shape_is_no_result(site: Installation, changes: dict[str, Any]) -> None:
    assert site.client.post(API, json={**RESULT, **changes}).status_code == 422
    assert site.client.get(API).json()["total"] == 0


def test_a_file_comes_as_csv_or_as_json(site: Installation) -> None:
    refused = site.client.post(f"{API}/import", content=GE, headers=CSV)
    assert refused.status_code == 422
    document = refused.json()
    assert (document["imported"], document["status"]) == (False, 422)
    assert [(row["line"], row["reason"]["code"]) for row in document["refused"]] == [(2, "DXA_DEVICE_MISSING")]
    done = site.client.post(f"{API}/import", params={"model": "Prodigy"}, content=GE, headers=CSV)
    assert done.status_code == 200, done.text
    assert done.json()["accepted"] == 1
    body = {"csv": GE.replace("P1,", "P2,"), "model": "Prodigy", "name": "spine.csv"}
    assert site.client.post(f"{API}/import", json=body).json()["accepted"] == 1
    mapped = {"csv": "ID;B\nP3;0,9\n", "columns": {"patient_id": "ID", "L1.bmd": "B"}, "scan_date": "2026-01-02"}
    whole = {**mapped, "manufacturer": "Norland", "model": "XR-46"}
    assert site.client.post(f"{API}/import", json=whole).json()["accepted"] == 1
    assert site.client.get(API).json()["total"] == 3


def test_what_is_no_file_is_told_so(site: Installation) -> None:
    assert site.client.post(f"{API}/import", content=b"\xff\xfe\xff", headers=CSV).status_code == 422
    assert site.client.post(f"{API}/import", json={"csv": 1}).status_code == 422
    assert site.client.post(f"{API}/import", content=b"{", headers={"content-type": "application/json"})\
        .status_code == 422  # fmt: skip
    assert site.client.post(f"{API}/import", data={"csv": GE}).status_code == 415  # no foreign page's form


def test_a_file_may_be_larger_than_anything_else(site: Installation) -> None:
    heading, _, rows = GE.partition("\n")
    many = heading + "\n" + "".join(rows.replace("P1,", f"P{number},") for number in range(200))
    assert MAX_BODY_BYTES < len(many) < MAX_FILE_BYTES
    done = site.client.post(f"{API}/import", params={"model": "Prodigy"}, content=many, headers=CSV)
    assert done.json()["accepted"] == 200
    assert site.client.post(API, content=many, headers=CSV).status_code == 413
    assert most_bytes(f"{API}/import/x") == MAX_BODY_BYTES


def test_the_page_takes_a_file_and_tells_what_was_refused(site: Installation) -> None:
    page = site.client.get("/dxa", headers={"accept": "text/html"}).text
    assert "No DXA results yet" in page
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', page)
    assert found
    file = {"file": ("<b>spine.csv", GE, "text/csv")}
    assert site.client.post("/dxa", files=file).status_code == 403
    refused = site.client.post("/dxa", data={"csrf": found[1]}, files=file)
    assert refused.status_code == 422
    assert "Nothing was imported" in refused.text
    assert "DXA_DEVICE_MISSING" in refused.text
    assert "<b>spine" not in refused.text
    done = site.client.post("/dxa", data={"csrf": found[1], "model": "Prodigy"}, files=file)
    assert done.status_code == 200
    assert "0.983" in done.text
    assert "GE Lunar" in done.text


def test_a_dxa_that_follows_its_ct_closes_the_referral_and_an_earlier_one_does_not(tmp_path: Path) -> None:
    with installed(tmp_path) as site:
        both = {"synthetic": True}
        followed = {"patient_id": patient(seed.REFER), "scan_date": "2026-11-23", **both}
        before = {"patient_id": patient(seed.LATE), "scan_date": "2026-11-01", **both}
        assert site.client.post(API, json={**RESULT, **followed}).status_code == 201
        assert site.client.post(API, json={**RESULT, **before}).status_code == 201
        assert state(site, seed.REFER) == "dxa-done"
        assert state(site, seed.LATE) == "ordered"
        found = site.client.get(f"{API}/pairing").json()
        assert {(one["study_uid"], one["days"]) for one in found["pairs"]} == {(seed.REFER, 0), (seed.LATE, -22)}
        assert all("L2" not in one["levels"] for one in found["pairs"])  # the DXA left it out
        assert found["why"] == {"PAIR_NO_DXA": 10}
        alone = {"patient_id": "NO-CT", "scan_date": "2026-11-02", **both}
        assert site.client.post(API, json={**RESULT, **alone}).status_code == 201
        assert site.client.get(f"{API}/pairing").json()["cut_ids"] == []
        padded = f"00{patient(seed.LATE)}"
        assert site.client.post(API, json={**RESULT, **alone, "patient_id": padded}).status_code == 201
        assert site.client.get(f"{API}/pairing").json()["cut_ids"] == [[padded, patient(seed.LATE)]]
        page = site.client.get("/pairing", headers={"accept": "text/html"}).text
        assert "1 patient ID of DXA results may have lost leading zeros" in page
        assert "NO-CT" in page.partition('id="unused"')[2].partition("</section>")[0]
        assert "same day" in page
        assert "22 days earlier" in page
        for told in (page, site.client.get("/dxa", headers={"accept": "text/html"}).text):
            assert "<td>2 Nov 2026</td>" in told or '<td class="when">2 Nov 2026</td>' in told
            assert not re.search(r">\d{4}-\d{2}-\d{2}<", told)
        assert "PAIR_NO_DXA" in page
        with site.store.reading() as session:
            line = session.scalars(select(AuditRow).where(AuditRow.action == "referral.dxa-done")).one()
        assert (line.subject, line.actor) == (seed.REFER, "local")


def patient(study_uid: str) -> str:
    """The patient ID that the seed gives a study."""
    return f"P{study_uid.rpartition('.')[2].zfill(5)}"


def state(site: Installation, study_uid: str) -> str:
    found: str = site.client.get(f"/api/v1/studies/{study_uid}").json()["referral"]["state"]
    return found


def test_what_became_of_a_densitometers_report_stands_on_both_pages(site: Installation) -> None:
    one = workbench.slices(study="1.2.77", series="1.2.77.1", n=1)[0]
    report = replace(one, sop_class_uid=ENHANCED_SR, modality="SR", has_pixels=False)
    workbench.deliver(site.store, [report], workbench.START)
    page = site.client.get("/dxa", headers={"accept": "text/html"}).text
    assert "to be read" in page.partition('id="reports"')[2]
    reasons = (Reason(Code.DXA_UNIT, "L1: bmd_g_cm2 has the unit '<b>'"),)
    with site.store.transaction() as session:
        assert dxa_reports.settle(session, 1, reasons, workbench.START, 365)
    page = site.client.get("/dxa", headers={"accept": "text/html"}).text
    told = page.partition('id="reports"')[2]
    assert "DXA_UNIT" in told
    assert "the unit &#39;&lt;b&gt;&#39;" in told
    assert "DXA_UNIT" in site.client.get("/intake", headers={"accept": "text/html"}).text
    assert 'osteogate_dxa_reports{state="refused"} 1' in site.client.get("/metrics").text
