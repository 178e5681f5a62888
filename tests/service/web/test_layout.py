"""How the pages lie on a screen and on paper: nothing cut, everything legible, every area reachable by keyboard."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from service.web.pages import HERE
from tests.conftest import absent
from tests.service.web import seed
from tests.service.web.installation import installed

CSS = (HERE / "static" / "osteogate.css").read_text()
PAGES = ("/", f"/studies/{seed.REFER}", "/intake", "/dxa", "/pairing", "/audit", "/models", "/training", "/performance")


@pytest.mark.parametrize("template", sorted((HERE / "templates").glob("*.html")), ids=lambda path: path.name)
def test_every_area_that_scrolls_is_reached_by_keyboard(template: Path) -> None:
    areas = re.findall(r'<div class="(?:scroll|card table-card|drawing)"[^>]*>', template.read_text())
    for area in areas:
        assert re.search(r' tabindex="0" role="region" aria-label="[^"]+"', area), area


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_closed_rows_and_fields_have_contrast_enough(scheme: int) -> None:
    colours = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root {(.*?)}", CSS, re.S)
    ]
    known = colours[scheme]
    for ground in (known["card"], known["ground"]):
        assert contrast(known["soft"], ground) >= 4.5
        assert contrast(known["field"], ground) >= 3
    for name in ("row-closed", "superseded"):
        rules = re.findall(rf"\.{name}[^{{]*{{([^}}]*)}}", CSS)
        assert rules
        assert not any("opacity" in rule for rule in rules)
    fields = [rule for rule in re.findall(r"[^{}]*\binput\b[^{}]*{[^}]*}", CSS) if "border" in rule]
    assert all("var(--field)" in rule for rule in fields if "border:" in rule or "border-color" in rule)


def document(page: Path, *options: str) -> str:
    """The page's document after every script has run in a real browser."""
    browser = shutil.which("chromium") or absent("chromium")
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    asked = [browser, *always, *options, f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri()]
    return subprocess.run(asked, capture_output=True, timeout=300, check=True).stdout.decode()


def laid_out(folder: Path, widths: tuple[int, ...], pages: dict[str, str]) -> dict[tuple[str, int], int]:
    """How wide each page becomes in a window of each width."""
    static = (HERE / "static").as_uri()
    frames = []
    for number, (path, text) in enumerate(pages.items()):
        bare = re.sub(r"<script[^>]*></script>", "", text).replace('"/static/', f'"{static}/')
        (folder / f"{number}.html").write_text(bare)
        frames += [
            f'<iframe src="{number}.html" width="{wide}" height="700" name="{path}"></iframe>' for wide in widths
        ]
    (folder / "all.html").write_text(
        f"""<!doctype html><meta charset="utf-8">{"".join(frames)}<script>addEventListener("load", () => {{
        document.querySelectorAll("iframe").forEach((one) => document.body.append(
          `[${{one.name}} ${{one.width}} ${{one.contentDocument.documentElement.scrollWidth}}]`));
        }});</script>"""
    )
    told = re.findall(r"\[(/\S*) (\d+) (\d+)\]", document(folder / "all.html"))
    return {(path, int(wide)): int(found) for path, wide, found in told}


@pytest.mark.peer("chromium")
def test_no_page_is_wider_than_its_window(tmp_path: Path) -> None:
    with installed(tmp_path) as site:
        pages = {path: site.client.get(path, headers={"accept": "text/html"}).text for path in PAGES}
    found = laid_out(tmp_path, (390, 768, 1280), pages)
    assert len(found) == 3 * len(PAGES)
    assert {place: wide for place, wide in found.items() if wide > place[1]} == {}


SEEN = """<script>addEventListener("load", () => {
  const seen = (what) => [...document.querySelectorAll(what)].filter((one) => one.offsetWidth > 0).length;
  const edge = document.body.clientWidth + 1;
  const cut = [...document.querySelectorAll("table")].filter((one) => one.getBoundingClientRect().right > edge).length;
  const told = [cut, seen(".button"), seen(".levels .unit"), seen(".worklist .when"), seen(".worklist .unit")];
  document.body.append(`[${told.join(" ")}]`);
});</script></body>"""


@pytest.mark.peer("chromium")
@pytest.mark.parametrize(("path", "told"), [("/", "0 0 0 12 2"), (f"/studies/{seed.REFER}", "0 0 3 0 0")])
def test_paper_holds_every_column_and_no_button(tmp_path: Path, path: str, told: str) -> None:
    """As wide as A4 without its margins; the rules for paper are made those for the screen."""
    paper = CSS.replace("@media screen", "@media speech").replace("@media print", "@media all")
    with installed(tmp_path) as site:
        text = site.client.get(path, headers={"accept": "text/html"}).text
    styled = re.sub(r'<link rel="stylesheet"[^>]*>', lambda _: f"<style>{paper}</style>", text)
    page = tmp_path / "page.html"
    page.write_text(styled.replace("</body>", SEEN))
    assert re.findall(r"\[(\d+(?: \d+){4})\]", document(page, "--window-size=703,1000")) == [told]
