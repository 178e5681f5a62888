"""Live performance by API and page, alerts on /intake and /metrics, the reminder on /pairing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from service.domain.access import GRANTS, Right, Role
from service.workflow import people
from service.workflow.people import By
from tests.service.web.installation import Installation, installed
from tests.service.workflow import hospital

DRIFTED = "DRIFT_MUSCLE_HU"  # what 12 HU raise in the draw of this module
HTML = {"accept": "text/html"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("site"), empty=True) as found:
        with found.store.transaction() as session:
            studies = hospital.months(session, 75, shift_from=50)
            hospital.months(session, 12, scanner=hospital.CANON, seed=3)
            hospital.pairs(session, studies[:30], bias=0.1, at=hospital.BEGIN + timedelta(days=60))
        yield found


def test_the_answer_holds_every_figure_and_no_patient(site: Installation) -> None:
    answer = site.client.get("/api/v1/performance")
    assert answer.status_code == 200, answer.text
    document = answer.json()
    (model,) = document["models"]
    everybody, siemens = model["groups"]
    assert (everybody["scanner"], everybody["pairs"], siemens["scanner"]["manufacturer"]) == (None, 30, "SIEMENS")
    figures = everybody["figures"]
    assert figures["mean_error"]["low"] < figures["mean_error"]["value"] < figures["mean_error"]["high"]
    assert figures["mean_error"]["value"] == pytest.approx(0.1, abs=0.03)
    assert len(figures["thirds"]) == 3
    shifted, other = document["scanners"]
    assert DRIFTED in {alert["reason"]["code"] for alert in shifted["alerts"]}
    assert other["alerts"] == []
    assert other["charts"][0]["mean_hu"] is None
    assert document["reminder"] == {
        "since": "2026-01-05T09:00:00Z", "people": 30, "digital": 0, "needed": 300, "run": None, "due": False,
    }  # fmt: skip
    assert "P1.9." not in answer.text


def test_the_page_tells_it_to_people(site: Installation) -> None:
    page = site.client.get("/performance", headers=HTML).text
    assert "SIEMENS SOMATOM, kernel Br40d" in page
    assert DRIFTED in page
    assert "12 of 40 studies of its beginning" in page
    [row] = re.findall(r"<tr[^>]*><td><bdi>SIEMENS SOMATOM, kernel Br40d</bdi></td>.*?</tr>", page)
    assert re.search(r'<span class="tag tag-(failing">reads (high|low)|eligible">within|quiet">not sure)<', row)
    assert "beyond 0.02 g/cm²" in page
    assert "New pairs for a retraining: 30 of people" in page
    assert "normal" not in page.lower()
    assert "P1.9." not in page


@pytest.mark.parametrize("role", [Role.CLINICIAN, Role.ML_ADMIN])
def test_the_way_to_a_retraining_is_for_those_who_may(site: Installation, role: Role) -> None:
    with site.store.transaction() as session:
        by = By("shell:root", hospital.BEGIN, None)
        key = people.create_key(session, role.value, frozenset({role}), by, expires_at=None)
    page = site.client.get("/performance", headers={**HTML, "Authorization": f"Bearer {key}"}).text
    assert "A retraining" in page
    assert ('href="/training"' in page) is (Right.TRAIN in GRANTS[role])


def test_too_few_pairs_are_told_so(tmp_path: Path) -> None:
    with installed(tmp_path, empty=True) as found:
        assert "No result yet" in found.client.get("/performance", headers=HTML).text
        with found.store.transaction() as session:
            studies = hospital.months(session, 5)
            hospital.pairs(session, studies, bias=0.0, at=hospital.BEGIN + timedelta(days=60))
        page = found.client.get("/performance", headers=HTML).text
        assert "5 pairs: too few for a figure, 20 are needed" in page
        assert "Mean error" not in page
        (model,) = found.client.get("/api/v1/performance").json()["models"]
        assert [group["figures"] for group in model["groups"]] == [None, None]


def test_alerts_stand_on_intake_and_among_the_metrics(site: Installation) -> None:
    assert DRIFTED in site.client.get("/intake", headers=HTML).text
    metrics = site.client.get("/metrics").text
    assert f'osteogate_drift_alerts{{code="{DRIFTED}"}} 1' in metrics
    assert 'osteogate_drift_alerts{code="DRIFT_FLAG_RATE"} 0' in metrics
    assert "SOMATOM" not in metrics


def test_the_pairing_page_reminds(site: Installation) -> None:
    assert "30 of people" in site.client.get("/pairing", headers=HTML).text


def test_who_may_look() -> None:
    assert {role for role in Role if Right.WATCH in GRANTS[role]} == {Role.CLINICIAN, Role.ML_ADMIN}
