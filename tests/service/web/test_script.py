"""What the pages' own script does, in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from service import web
from tests.conftest import absent

SCRIPT = (Path(web.__file__).parent / "static" / "osteogate.js").as_uri()


def shown(folder: Path, **pages: str) -> str:
    """The document after every script has run, begun at the first page; each page's own script comes last."""
    browser = shutil.which("chromium") or absent("chromium")
    for name, body in pages.items():
        (folder / f"{name}.html").write_text(
            f'<!doctype html><meta charset="utf-8"><script src="{SCRIPT}"></script>{body}'
        )
    first = (folder / f"{next(iter(pages))}.html").as_uri()
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    asked = [browser, *options, "--virtual-time-budget=9000", "--dump-dom", first]
    return subprocess.run(asked, capture_output=True, timeout=300, check=True).stdout.decode()


@pytest.mark.peer("chromium")
def test_a_server_that_is_away_is_told_until_it_answers(tmp_path: Path) -> None:
    page = shown(
        tmp_path,
        worklist="""<p id="away"></p><script>
        const tell = (name, detail) => {
          document.dispatchEvent(new CustomEvent(name, { detail }));
          document.body.append(`[${name}: ${document.getElementById("away").textContent}]`);
        };
        tell("htmx:sendError"); tell("htmx:afterRequest", { successful: false });
        tell("htmx:afterRequest", { successful: true }); tell("htmx:responseError"); tell("htmx:timeout");
        </script>""",
    )
    told = re.findall(r"\[htmx:(\w+): (.*?)\]", page)
    assert [name for name, _ in told] == ["sendError", "afterRequest", "afterRequest", "responseError", "timeout"]
    away = r"No connection to Osteogate since \d\d:\d\d\. What you see may be out of date\."
    assert re.fullmatch(away, told[0][1])
    assert told[1][1] == told[0][1]
    assert told[2][1] == ""
    assert told[3][1].startswith("Osteogate does not answer as it should since ")
    assert re.fullmatch(away, told[4][1])


@pytest.mark.peer("chromium")
def test_a_stream_that_stays_away_is_told(tmp_path: Path) -> None:
    page = shown(
        tmp_path,
        run="""<p id="away"></p><div data-events="http://127.0.0.1:9/events"></div><script>
        setTimeout(() => document.body.append(`[at once: ${document.getElementById("away").textContent}]`), 1000);
        setTimeout(() => document.body.append(`[later: ${document.getElementById("away").textContent}]`), 8000);
        </script>""",
    )
    assert "[at once: ]" in page
    assert "[later: No connection to Osteogate since " in page


FORM = """<details><form action="/studies/1/referral" method="post"><input type="hidden" name="csrf" value="old">
<input name="reason"><button name="action" value="dismiss">Dismiss</button></form></details>"""
SEND = """<script>addEventListener("DOMContentLoaded", () => {
  document.addEventListener("submit", (event) => { event.preventDefault(); location.href = "next.html"; });
  document.querySelector("input[name=reason]").value = "DXA last month";
  document.querySelector("button").click();
});</script>"""
GO_ON = """<script>addEventListener("DOMContentLoaded", () => setTimeout(() => {
  location.href = "again.html";
}, 50));</script>"""
SHOW = """<script>addEventListener("DOMContentLoaded", () => setTimeout(() => document.body.append(
  `[${document.querySelector("[name=reason]").value}|${document.querySelector("[name=csrf]").value}|`
  + `${document.querySelector("details").open}|${sessionStorage.length}]`), 50));</script>"""
NOT_DONE = "<p data-not-done>Not done. <span data-kept hidden>kept</span></p>"


@pytest.mark.peer("chromium")
@pytest.mark.parametrize(
    ("between", "who", "told"),
    [
        (NOT_DONE, "anna", "[DXA last month|old|true|0]"),  # it stands in its field again
        ("<p>Done.</p>", "anna", "[|old|false|0]"),  # it was sent
        (NOT_DONE, "otto", "[|old|false|0]"),  # somebody else's words are nobody's business
    ],
)
def test_what_was_typed_comes_back_where_it_was_not_sent(tmp_path: Path, between: str, who: str, told: str) -> None:
    page = shown(
        tmp_path,
        study=f'<body data-me="anna">{FORM}{SEND}',
        next=f"<body>{between}{GO_ON}" if between is NOT_DONE else f'<body data-me="anna">{between}{GO_ON}',
        again=f'<body data-me="{who}">{FORM}{SHOW}',
    )
    assert told in page
    assert ("This is what you typed before. It was not sent." in page) is told.startswith("[DXA")


@pytest.mark.peer("chromium")
def test_nothing_typed_outlives_a_log_out(tmp_path: Path) -> None:
    leave = """<form action="/logout" method="post"><button>Log out</button></form><script>
    addEventListener("DOMContentLoaded", () => {
      document.addEventListener("submit", (event) => event.preventDefault());
      document.querySelector("button").click();
      document.body.append(`[${sessionStorage.length}]`);
    });</script>"""
    page = shown(
        tmp_path, study=f'<body data-me="anna">{FORM}{SEND}', next=f"<body>{NOT_DONE}{GO_ON}", again=f"<body>{leave}"
    )
    assert "[0]" in page
