"""The pages: what they show, what they refuse, and that names from outside stay inert."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from httpx import Response
from sqlalchemy import select

from service.store.tables import AuditRow, ResultRow
from service.web.pages import HERE, picture_path
from tests.service.web import seed
from tests.service.web.installation import ORIGIN, Installation, delivery_row, installed, own_url, report_row
from tests.service.workflow import workbench

PAGE = {"accept": "text/html"}
EARLIER = f"/studies/{seed.REAL}/results/5"  # superseded by result 9
EVERY_PAGE = [
    "/",
    "/intake",
    "/audit",
    "/dxa",
    "/pairing",
    "/login",
    *(f"/studies/{seed.PREFIX}.{number}" for number in range(1, 13)),
    EARLIER,
    "/studies/1.2.3",
    "/api/docs",
]


@pytest.fixture(scope="module", params=workbench.DATABASES)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("site")
    with installed(folder, database_url=own_url(request.param, folder)) as found:
        yield found


@pytest.fixture(params=workbench.DATABASES)
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Installation]:
    with installed(tmp_path, database_url=workbench.fresh_url(request.param, tmp_path)) as found:
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


@pytest.mark.parametrize(
    ("study", "stands"),
    [(seed.NO_FLAG, True), (seed.BETWEEN, True), (seed.SHORT_VIEW, True), (seed.REFER, False)],
)
def test_where_no_flag_stands_it_says_that_it_rules_nothing_out(site: Installation, study: str, stands: bool) -> None:
    assert ("No flag does not rule out low bone density." in page(site, f"/studies/{study}")) is stands


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


def test_a_page_beyond_the_last_is_the_last(site: Installation) -> None:
    for path in ("/", "/intake", "/audit", "/intake?q=Karl"):
        beyond = page(site, f"{path}{'&' if '?' in path else '?'}page=99")
        assert 'class="card empty"' not in beyond, path
    assert "Yamada" in page(site, "/?page=99")
    refresh = site.client.get("/?page=99", headers={"HX-Request": "true"}).text
    assert "<table" in refresh
    assert "Nothing under this filter" in page(site, "/?q=nobody-of-that-name&page=7")


def test_a_quick_step_leads_back_to_the_worklist_as_it_stood(fresh: Installation) -> None:
    text = page(fresh, "/?tab=refer&q=P0&patients=digital&sort=-bmd")
    back = "/?tab=refer&q=P0&patients=digital&sort=-bmd"
    assert f'name="back" value="{html.escape(back)}"' in text
    answer = press(fresh, f"/studies/{seed.REFER}/referral", action="review", back=back)
    assert (answer.status_code, answer.headers["location"]) == (303, back)


@pytest.mark.parametrize(
    "back", ["https://evil.example/", "//evil.example", "/\\evil.example", "/logout", "/models", "worklist", "/?\nx"]
)
def test_a_quick_step_leads_nowhere_but_to_the_worklist(fresh: Installation, back: str) -> None:
    answer = press(fresh, f"/studies/{seed.REFER}/referral", action="review", back=back)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


def test_a_search_keeps_tab_and_order(site: Installation) -> None:
    search = page(site, "/?tab=refer&sort=-bmd").partition('role="search"')[2].partition("</form>")[0]
    assert '<input type="hidden" name="tab" value="refer">' in search
    assert '<input type="hidden" name="sort" value="-bmd">' in search


def test_the_export_holds_what_the_page_shows(fresh: Installation) -> None:
    text = page(fresh, "/?tab=refer&patients=digital&sort=name")
    [address] = re.findall(r'href="(/worklist\.csv[^"]*)"', text)
    rows = fresh.client.get(html.unescape(address)).text.splitlines()[1:]
    shown = re.findall(r'<a href="/studies/([0-9.]+)"><bdi>', text)
    assert [row.partition(",")[0] for row in rows] == shown
    assert 0 < len(rows) < len(fresh.client.get("/worklist.csv").text.splitlines()) - 1
    with fresh.store.reading() as session:
        first = session.scalars(
            select(AuditRow).where(AuditRow.action == "worklist.export").order_by(AuditRow.id)
        ).first()
    assert first is not None
    assert first.detail == {"rows": len(rows), "tab": "refer", "q": "", "patients": "digital"}


def views(site: Installation, study_uid: str) -> list[AuditRow]:
    with site.store.reading() as session:
        about = select(AuditRow).where(AuditRow.subject == study_uid, AuditRow.action.endswith(".view"))
        return list(session.scalars(about.order_by(AuditRow.id)))


def pictures(site: Installation) -> str:
    """Where the pictures of the one result that has some lie."""
    with site.store.reading() as session:
        rows = session.scalars(select(ResultRow).where(ResultRow.artefacts.is_not(None))).all()
        [result] = [row.id for row in rows if row.study.study_uid == seed.REFER]
    return f"/studies/{seed.REFER}/pictures/{result}"


def test_a_picture_that_is_asked_for_by_itself_leaves_a_trace(fresh: Installation) -> None:
    for name in ("crop-L1.png", "crop-L2.png", "overlay-coronal.png"):
        assert fresh.client.get(f"{pictures(fresh)}/{name}").status_code == 200
    assert fresh.client.get(f"{pictures(fresh)}/crop-L9.png").status_code == 404
    [line] = views(fresh, seed.REFER)
    assert (line.actor, line.action, line.peer_address) == ("local", "picture.view", "testclient")
    assert line.detail == {"result": int(pictures(fresh).rpartition("/")[2]), "picture": "crop-L1.png"}


def test_the_pictures_of_a_page_are_one_view_with_it(fresh: Installation) -> None:
    page(fresh, f"/studies/{seed.REFER}")
    fresh.client.get(f"{pictures(fresh)}/crop-L1.png")
    assert [line.action for line in views(fresh, seed.REFER)] == ["study.view"]


def test_an_old_view_or_somebody_else_s_covers_no_picture(fresh: Installation) -> None:
    with fresh.store.transaction() as session:
        for actor, age, subject in (("local", 11, seed.REFER), ("somebody", 1, seed.REFER), ("local", 1, seed.REAL)):
            at = seed.NOW - timedelta(minutes=age)
            row = AuditRow(
                at=at, actor=actor, action="study.view", subject=subject, detail={}, peer_address="testclient"
            )
            session.add(row)
    fresh.client.get(f"{pictures(fresh)}/crop-L1.png")
    assert views(fresh, seed.REFER)[-1].action == "picture.view"


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
    assert "<h1>Not done</h1>" in again.text
    assert "This referral is marked reviewed already (by local). Nothing was changed." in again.text


def test_what_a_page_refuses_is_told_in_sentences(fresh: Installation) -> None:
    path = f"/studies/{seed.REFER}/referral"
    assert "“action” is missing. Nothing was changed." in press(fresh, path).text
    assert "“action” is not one of the choices that the page offers." in press(fresh, path, action="eat").text
    long = press(fresh, path, action="dismiss", reason="x" * 1001)
    assert "“reason” is longer than 1000 characters." in long.text
    assert "data-not-done" in long.text
    bad = fresh.client.get("/?page=x", headers=PAGE)
    assert (bad.status_code, "There is nothing at this address" in bad.text) == (422, True)
    for answer in (long, bad):
        assert not re.search(r"Input should|String should|body\.|query\.", answer.text)
    program = fresh.client.get("/?page=x").json()
    assert program["errors"][0]["where"] == "query.page"


def test_a_refused_form_leads_back_to_its_page_and_nowhere_else(fresh: Installation) -> None:
    study = f"/studies/{seed.REFER}"
    form = {"csrf": token(fresh), "action": "reopen"}
    for referer, leads in ((f"{ORIGIN}{study}", True), (f"https://evil.example{study}", False)):
        text = fresh.client.post(f"{study}/referral", data=form, headers={**PAGE, "referer": referer}).text
        assert "This referral is open already" in text
        assert (f'href="{study}">Back to the page before' in text) is leads
        assert "evil" not in text


def test_a_person_reads_a_page_where_the_door_itself_refuses(fresh: Installation) -> None:
    foreign = {**PAGE, "origin": "https://evil.example"}
    answer = fresh.client.post(f"/studies/{seed.REFER}/referral", headers=foreign)
    assert (answer.status_code, answer.headers["content-type"]) == (403, "text/html; charset=utf-8")
    assert "must come from Osteogate" in answer.text
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    large = fresh.client.post("/dxa", headers={**PAGE, "origin": ORIGIN, "content-length": str(10**9)})
    assert (large.status_code, "<h1>Too large</h1>" in large.text) == (413, True)


@pytest.mark.parametrize(
    ("path", "place", "current"),
    [
        ("/", "/", "page"),
        ("/models", "/models", "page"),
        ("/models/1", "/models", "true"),
        (f"/studies/{seed.REFER}", "/", "true"),
        ("/pairing", "/dxa", "true"),
    ],
)
def test_the_navigation_says_where_one_is(site: Installation, path: str, place: str, current: str) -> None:
    nav = page(site, path).partition("<nav")[2].partition("</nav>")[0]
    assert re.findall(r'<a href="([^"]+)" aria-current="([a-z]+)"', nav) == [(place, current)]


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


def uncertain(site: Installation, alternative: dict[str, str] | None) -> None:
    """The result in force of one study, with doubtful levels."""
    with site.store.transaction() as session:
        rows = session.scalars(select(ResultRow).where(ResultRow.superseded.is_(False))).all()
        row = next(row for row in rows if row.study.study_uid == seed.REFER)
        anatomy = {**row.document["anatomy"], "numbering": "uncertain", "alternative": alternative}
        row.document = {**row.document, "anatomy": anatomy}


def test_doubtful_levels_are_renumbered_by_their_form(fresh: Installation) -> None:
    path = f"/studies/{seed.REFER}"
    assert "/renumber" not in page(fresh, path)  # certain
    uncertain(fresh, {"T12": "L1", "L1": "L2", "L2": "L3"})
    text = page(fresh, path)
    assert f'action="{path}/renumber"' in text
    assert "T12 is L1, L1 is L2, L2 is L3" in text
    assert press(fresh, f"{path}/renumber", names="alternative").status_code == 422  # why?
    assert press(fresh, f"{path}/renumber", names="5", reason="seen").status_code == 422
    answer = press(fresh, f"{path}/renumber", names="alternative", reason="six lumbar bodies")
    assert (answer.status_code, answer.headers["location"]) == (303, path)
    assert audited(fresh) == ("renumber", seed.REFER)
    assert "/renumber" not in page(fresh, path)  # it waits for the worker
    assert "being measured again" in page(fresh, "/")
    assert re.search(r'<span class="unit">levels</span> <bdi>.*L1 → L2, L2 → L3', page(fresh, "/audit"))
    assert press(fresh, f"{path}/renumber", names="1", reason="again").status_code == 409


def test_levels_that_are_right_as_they_are_are_told_so_in_the_audit(fresh: Installation) -> None:
    uncertain(fresh, None)
    press(fresh, f"/studies/{seed.REFER}/renumber", names="0", reason="counted on the scout")
    assert '<span class="unit">levels</span> <bdi>as they were</bdi>' in page(fresh, "/audit")


def test_what_the_result_does_not_offer_cannot_be_chosen(fresh: Installation) -> None:
    uncertain(fresh, None)
    text = page(fresh, f"/studies/{seed.REFER}")
    assert "As counted from the other end" not in text
    assert press(fresh, f"/studies/{seed.REFER}/renumber", names="alternative", reason="seen").status_code == 409
    assert press(fresh, f"/studies/{seed.REFER}/renumber", names="0", reason="seen").status_code == 303


def audited(site: Installation) -> tuple[str, str]:
    """Action and subject of the latest audit line that is not a view."""
    with site.store.reading() as session:
        lines = session.scalars(select(AuditRow).order_by(AuditRow.id.desc())).all()
    latest = next(line for line in lines if not line.action.endswith(".view"))
    return latest.action, latest.subject


def press(site: Installation, path: str, **form: str) -> Response:
    return site.client.post(path, data={"csrf": token(site), **form}, headers=PAGE, follow_redirects=False)


def test_study_page_says_where_its_result_went(site: Installation) -> None:
    text = page(site, f"/studies/{seed.NO_FLAG}")
    panel = text.partition('id="sent"')[2]
    for words in ("Not delivered yet", "next try at", "5 attempts so far", seed.DOWN, "Never sent there"):
        assert words in panel
    assert re.search(r"archive</strong>.*?Delivered \d\d:\d\d", panel, re.DOTALL)
    report = report_row(site, seed.NO_FLAG, "SR")
    assert f'href="/api/v1/reports/{report.id}/file"' in panel
    assert f'data-copy="{report.sop_instance_uid}"' in panel
    assert 'hx-select="#sent"' in panel  # it looks again by itself while something is on its way


def test_panel_of_a_delivered_result_is_quiet(site: Installation) -> None:
    panel = page(site, f"/studies/{seed.REAL}").partition('id="sent"')[2]
    assert "hx-get" not in panel.partition(">")[0]
    assert "Not delivered" not in panel


@pytest.mark.parametrize("path", ["/intake", f"/studies/{seed.NO_FLAG}"])
def test_addresses_are_shown_without_their_secrets(site: Installation, path: str) -> None:
    text = page(site, path)
    assert "https://archive.example:8443/dicom-web" in text
    assert seed.PASSWORD not in text


def test_object_that_cannot_be_made_says_why(site: Installation) -> None:
    panel = page(site, f"/studies/{seed.SHORT_VIEW}").partition('id="sent"')[2]
    assert "Not made: the slices&#39; headers are gone" in panel
    assert "Make again" in panel
    assert "To be made" in page(site, f"/studies/{seed.SHEET}")


def test_result_that_replaced_another_says_so(site: Installation) -> None:
    text = page(site, f"/studies/{seed.REAL}")
    assert re.search(r"Revision 2 of \d\d:\d\d replaces revision 1 of \d\d:\d\d\.", text)
    assert f'href="{EARLIER}"' in text
    assert "Objects of superseded results (2)" in text


def test_superseded_result_can_be_looked_at(site: Installation) -> None:
    text = page(site, EARLIER)
    assert "revision 2 of" in text.partition("no longer stands")[2]
    assert "Mark reviewed" not in text
    assert "/rerun" not in text
    assert f"/api/v1/studies/{seed.REAL}/result?result_id=5" in text
    assert "builtin" in text  # the segmenter of that time
    in_force = site.client.get(f"/studies/{seed.REAL}/results/9", follow_redirects=False)
    assert in_force.headers["location"] == f"/studies/{seed.REAL}"
    assert site.client.get(f"/studies/{seed.NO_FLAG}/results/5").status_code == 404


def test_supplied_segmentation_is_named(site: Installation) -> None:
    text = page(site, f"/studies/{seed.REAL}").partition('id="provenance"')[2].partition("</section>")[0]
    assert "Supplied with the study" in text
    assert "Spine labels" in text
    assert "AI_ROUTER" in text
    assert f"{seed.REAL}.90.1" in text


@pytest.mark.parametrize("path", ["/intake?q=Svensson", f"/studies/{seed.REAL}"])
def test_objects_that_came_back_are_no_refusals(site: Installation, path: str) -> None:
    text = page(site, path)
    for words in ("ours, came back: ignored", "segmentation used", "segmentation not used"):
        assert words in text
    assert re.search(r'<code class="code code-plain">OWN_OUTPUT<', text)


def test_object_is_sent_again_by_its_button(fresh: Installation) -> None:
    row = delivery_row(fresh, seed.NO_FLAG, "SR", "archive")
    assert f'action="/deliveries/{row.id}/resend"' in page(fresh, f"/studies/{seed.NO_FLAG}")
    answer = press(fresh, f"/deliveries/{row.id}/resend")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/studies/{seed.NO_FLAG}#sent")
    again = delivery_row(fresh, seed.NO_FLAG, "SR", "archive")
    assert (again.state, again.due_at, again.delivered_at) == ("waiting", seed.NOW, None)
    assert audited(fresh) == ("delivery.resend", seed.NO_FLAG)


def test_object_on_the_wire_is_not_sent_twice(fresh: Installation) -> None:
    row = delivery_row(fresh, seed.LATE, "SR", "pacs")
    assert f'action="/deliveries/{row.id}/resend"' not in page(fresh, f"/studies/{seed.LATE}")
    answer = press(fresh, f"/deliveries/{row.id}/resend")
    assert answer.status_code == 409
    assert "It is being sent at this moment." in answer.text


def test_object_is_sent_to_a_destination_that_came_later(fresh: Installation) -> None:
    report = report_row(fresh, seed.NO_FLAG, "SEG")
    assert press(fresh, f"/reports/{report.id}/send", destination="research").status_code == 303
    assert delivery_row(fresh, seed.NO_FLAG, "SEG", "research").state == "waiting"
    assert audited(fresh) == ("delivery.send", seed.NO_FLAG)
    unmade = report_row(fresh, seed.SHEET, "SR")
    assert press(fresh, f"/reports/{unmade.id}/send", destination="research").status_code == 409


def test_nothing_is_sent_to_a_destination_that_is_not_configured(fresh: Installation) -> None:
    row = delivery_row(fresh, seed.XSS, "SR", seed.REMOVED)
    assert f'action="/deliveries/{row.id}/resend"' not in page(fresh, f"/studies/{seed.XSS}")
    report = report_row(fresh, seed.NO_FLAG, "SR")
    for path, form in (
        (f"/deliveries/{row.id}/resend", {}),
        (f"/reports/{report.id}/send", {"destination": "nobody"}),
        (f"/outbox/{seed.REMOVED}/retry", {}),
    ):
        answer = press(fresh, path, **form)
        assert answer.status_code == 409
        assert "OSTEOGATE_DESTINATIONS does not name" in answer.text


def test_object_is_made_again_by_its_button(fresh: Installation) -> None:
    report = report_row(fresh, seed.SHORT_VIEW, "SR")
    assert press(fresh, f"/reports/{report.id}/remake").status_code == 303
    again = report_row(fresh, seed.SHORT_VIEW, "SR")
    assert (again.state, again.last_error) == ("waiting", None)
    assert audited(fresh) == ("report.remake", seed.SHORT_VIEW)
    assert press(fresh, f"/reports/{report.id}/remake").status_code == 409


def test_intake_tells_in_one_look_which_destination_is_away(site: Installation) -> None:
    panel = page(site, "/intake").partition('id="destinations"')[2].partition("</section>")[0]
    found = dict(re.findall(r'<h3>([\w-]+)</h3><span class="chip[^>]*>.*?</svg>([^<]+)<', panel))
    assert found["archive"] == "Everything delivered"
    assert found["research"] == "Nothing sent yet"
    assert found[seed.REMOVED] == "No longer configured"
    assert re.fullmatch(r"Failing since \d\d:\d\d", found["pacs"])
    assert "6 objects wait here; nothing is lost. Next try at" in panel
    assert seed.DOWN in panel
    assert "1 object still to be made" in panel
    assert "1 object not made" in panel


@pytest.mark.parametrize(
    ("words", "mark"),
    [
        ("Yamada", "Not delivered yet"),
        ("Svensson", "Delivered"),
        ("Karl", "Report not made"),
        ("Dora", "On its way"),
        ("calc", "Report is being made"),
        ("P00011", "Delivered"),  # only a destination that is gone lacks it
    ],
)
def test_every_study_of_the_intake_carries_its_mark(site: Installation, words: str, mark: str) -> None:
    text = page(site, f"/intake?q={words}")
    assert re.findall(r'class="delivery-mark[^>]*>.*?</svg>([^<]+)<', text) == [mark]


def test_everything_that_waits_for_a_destination_is_tried_now(fresh: Installation) -> None:
    answer = press(fresh, "/outbox/pacs/retry")
    assert (answer.status_code, answer.headers["location"]) == (303, "/intake")
    waiting, sending = (delivery_row(fresh, uid, "SR", "pacs") for uid in (seed.NO_FLAG, seed.LATE))
    assert (waiting.due_at, waiting.attempts, waiting.last_error) == (seed.NOW, 5, seed.DOWN)
    assert sending.due_at > seed.NOW  # a courier holds it
    assert audited(fresh) == ("outbox.retry", "pacs")
    assert "nothing is lost. Next try any moment." in page(fresh, "/intake")


def test_installation_without_destinations_names_the_setting(tmp_path: Path) -> None:
    with installed(tmp_path, destinations="") as lone:
        for path in ("/intake", f"/studies/{seed.NO_FLAG}"):
            text = page(lone, path)
            assert "No destination is configured (<code>OSTEOGATE_DESTINATIONS</code>)" in text
            assert "Send again" not in text


@pytest.mark.parametrize("path", ["/deliveries/1/resend", "/reports/1/remake", "/reports/1/send", "/outbox/pacs/retry"])
def test_buttons_of_the_outbox_need_a_token(site: Installation, path: str) -> None:
    form = {"destination": "research"}
    assert site.client.post(path, data=form).status_code == 403
    assert site.client.post(path, data={**form, "csrf": "0" * 64}).status_code == 403


@pytest.mark.parametrize("path", ["/deliveries/{}/resend", "/reports/{}/remake", "/reports/{}/send"])
def test_unknown_objects(site: Installation, path: str) -> None:
    assert press(site, path.format(999_999), destination="research").status_code == 404
    assert press(site, path.format(2**31), destination="research").status_code == 422


@pytest.mark.parametrize("path", ["/intake", f"/studies/{seed.XSS}"])
def test_answers_of_destinations_stay_inert(site: Installation, path: str) -> None:
    text = page(site, path)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(2)&lt;/script&gt;" in text
    assert not set(text) & set("\x1b\x07\x9b\u202e")
