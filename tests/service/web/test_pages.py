"""The pages: what they show, what they refuse, and that names from outside stay inert."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.web.pages import HERE, picture_path
from tests.service.web import seed
from tests.service.web.installation import ORIGIN, Installation, installed

PAGE = {"accept": "text/html"}
EVERY_PAGE = [
    "/",
    "/intake",
    *(f"/studies/{seed.PREFIX}.{number}" for number in range(1, 13)),
    "/studies/1.2.3",
    "/api/docs",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("site")) as found:
        yield found


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Installation]:
    with installed(tmp_path) as found:
        yield found


def page(site: Installation, path: str) -> str:
    answer = site.client.get(path, headers=PAGE)
    assert answer.status_code in (200, 404), answer.text
    return answer.text


def test_worklist_tells_who_what_and_why(site: Installation) -> None:
    text = page(site, "/")
    assert "Yamada, Hanako 山田 花子" in text
    assert "Consider DXA" in text
    assert "below 70 %" in text
    assert "0.65–0.77" in text
    assert "Digital patient" in text
    assert "network trained on digital patients only" in text


def test_tabs_count_and_filter(site: Installation) -> None:
    text = page(site, "/?tab=refer")
    assert "Yamada" in text
    assert "Phantom, Otto" not in text
    assert re.search(r"Consider DXA <span class=\"count\">4</span>", text)
    assert "Nothing under this filter" in page(site, "/?q=nobody-of-that-name")


def test_refresh_by_htmx_gives_the_table_alone(site: Installation) -> None:
    text = site.client.get("/", headers={"HX-Request": "true"}).text
    assert "<table" in text
    assert "<html" not in text


def test_empty_worklist_says_how_to_begin(tmp_path: Path) -> None:
    with installed(tmp_path, empty=True) as empty:
        assert "osteogate send" in page(empty, "/")
        assert "Nothing has come in yet" in page(empty, "/intake")


def test_study_page_shows_decision_values_bands_and_provenance(site: Installation) -> None:
    text = page(site, f"/studies/{seed.REFER}")
    assert "Decided by the network&#39;s BMD" in text
    assert 'class="band band-low"' in text
    assert "3f3f3f3f3f…" in text
    assert "3f" * 32 in text
    assert "SLICES_THICK" in text
    assert "KERNEL_NOT_ALLOWED" in text
    assert text.count("/crop-L") == 8  # four pictures, each a link too


def test_real_patient_is_decided_by_attenuation(site: Installation) -> None:
    text = page(site, f"/studies/{seed.REAL}")
    assert "Decided by the CT-attenuation rule on L1" in text
    assert "stand beside it as investigational" in text
    assert "no reference in force" in text  # %YAM withheld


def test_decision_that_is_about_to_change_says_so(site: Installation) -> None:
    assert "about to be replaced" in page(site, f"/studies/{seed.LATE}")


def test_intake_tells_every_series_and_what_was_turned_away(site: Installation) -> None:
    text = page(site, "/intake")
    for word in ("CONTRAST_TAGGED", "LOCALIZER", "running, attempt 2 of 3", "quarantined after 3 attempts"):
        assert word in text
    assert "AE_NOT_ALLOWED" in text
    assert "0xA900" in text
    assert re.search(r"refused once measured.*?LEVEL_OUT_OF_VIEW", text, re.DOTALL)
    filtered = page(site, "/intake?q=CONTRAST_TAGGED")
    assert "Phantom, Vera" in filtered
    assert "Phantom, Otto" not in filtered


@pytest.mark.parametrize("path", EVERY_PAGE)
def test_no_page_carries_inline_script_or_style(site: Installation, path: str) -> None:
    answer = site.client.get(path, headers=PAGE)
    text = answer.text
    assert not re.search(r"<style|\sstyle=|\son\w+\s*=\s*[\"']|javascript:", text)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", text))
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", text)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "same-origin"
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", [path for path in EVERY_PAGE if path != "/api/docs"])
def test_wording(site: Installation, path: str) -> None:
    text = page(site, path)
    assert "Investigational. Not a medical device. Confirm with DXA." in text
    assert "normal" not in text.lower()
    assert "diagnos" not in text.lower().replace("not a diagnosis", "")


def test_templates_know_no_forbidden_word() -> None:
    for template in (HERE / "templates").iterdir():
        text = template.read_text().lower().replace("not a diagnosis", "")
        assert "normal" not in text, template
        assert "diagnos" not in text, template
        assert "|safe" not in text.replace(" ", ""), template


@pytest.mark.parametrize("path", ["/", "/intake", f"/studies/{seed.XSS}"])
def test_names_from_outside_stay_inert(site: Installation, path: str) -> None:
    text = page(site, path)
    assert "<script>alert" not in text
    assert "<b>Bold" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_search_words_stay_inert(site: Installation) -> None:
    assert "<img" not in page(site, '/intake?q="><img src=x>').partition("<main")[2].partition("<table")[0]


def test_pictures_of_a_result(site: Installation) -> None:
    answer = site.client.get(f"/studies/{seed.REFER}/pictures/1/crop-L1.png")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    "path",
    [
        f"/studies/{seed.REFER}/pictures/1/labels.nii.gz",
        f"/studies/{seed.REFER}/pictures/1/..%2f..%2fosteogate.sqlite3",
        f"/studies/{seed.REFER}/pictures/1/%2e%2e%2fcrop-L1.png",
        f"/studies/{seed.REFER}/pictures/2/crop-L1.png",  # another study's result
        f"/studies/{seed.NO_FLAG}/pictures/1/crop-L1.png",
        "/studies/..%2f..%2fetc/pictures/1/crop-L1.png",
        "/static/..%2f..%2fpages.py",
    ],
)
def test_nothing_else_is_served_from_the_disk(site: Installation, path: str) -> None:
    assert site.client.get(path).status_code == 404


def test_folder_that_leads_out_of_the_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "crop-L1.png").write_bytes(b"secret")
    assert picture_path(tmp_path / "results", "..", "crop-L1.png") is None


def token(site: Installation) -> str:
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', page(site, f"/studies/{seed.REFER}"))
    assert found
    return found[1]


def test_referral_moves_by_its_form(fresh: Installation) -> None:
    form = {"action": "review", "csrf": token(fresh)}
    path = f"/studies/{seed.REFER}/referral"
    answer = fresh.client.post(path, data=form, headers={"origin": ORIGIN}, follow_redirects=False)
    assert answer.status_code == 303
    assert "referral-reviewed" in page(fresh, f"/studies/{seed.REFER}")
    again = fresh.client.post(path, data=form, headers=PAGE)
    assert again.status_code == 409
    assert "<h1>Conflict</h1>" in again.text


def test_form_without_a_token_is_refused(fresh: Installation) -> None:
    for sent in ({}, {"csrf": "0" * 64}):
        answer = fresh.client.post(f"/studies/{seed.REFER}/referral", data={"action": "review", **sent})
        assert answer.status_code == 403
    token(fresh)  # a cookie alone is not enough either
    assert fresh.client.post(f"/studies/{seed.REFER}/referral", data={"action": "review"}).status_code == 403
    assert "referral-open" in page(fresh, f"/studies/{seed.REFER}")


def test_quarantined_study_can_be_tried_again(fresh: Installation) -> None:
    form = {"csrf": token(fresh)}
    answer = fresh.client.post(f"/studies/{seed.QUARANTINED}/rerun", data=form, follow_redirects=False)
    assert answer.status_code == 303
    assert "waiting for the worker" in page(fresh, "/intake?q=Gustav")
