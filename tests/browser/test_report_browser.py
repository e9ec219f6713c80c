"""The report in a real browser, opened from file:// with no network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from reports import build_report
from tests.fake_run import make_fake_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


@dataclass
class Seen:
    """What the page did: console messages, requests, dialogs, uncaught errors."""

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def quiet(self) -> None:
        """Assert that the page was silent, asked for nothing but itself, and ran nothing foreign."""
        assert self.errors == [] and self.dialogs == []
        assert self.console == []
        # data: and blob: stay inside the page
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert len([url for url in self.requests if url.startswith("file:")]) == 1


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(make_fake_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(make_fake_run(tmp_path_factory.mktemp("hostile"), hostile=True, n_prompts=40))


@pytest.fixture(autouse=True)
def closed_pages(browser: sync_api.Browser) -> Iterator[None]:
    yield
    for context in browser.contexts:
        context.close()


def open_page(
    browser: sync_api.Browser, path: Path, width: int = 1280, scheme: str = "light", fragment: str = ""
) -> tuple[sync_api.Page, Seen]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    page, seen = context.new_page(), Seen()
    page.on("console", lambda message: seen.console.append(message.text))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))

    def dismiss(dialog: sync_api.Dialog) -> None:
        seen.dialogs.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    page.goto(path.as_uri() + (f"#{fragment}" if fragment else ""))
    page.wait_for_selector("html[data-drawn-ms]", timeout=60_000)
    return page, seen


def draw_patterns(page: sync_api.Page) -> None:
    page.evaluate("document.getElementById('cv').scrollIntoView({behavior: 'instant'})")
    page.wait_for_selector("#cv canvas", timeout=60_000)


def test_draws_without_network_or_complaint(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    plots = page.locator("figure .plot")
    assert plots.count() == 12
    for i in range(12):
        assert plots.nth(i).locator("svg path").count() > 3
    print(
        "first figures after",
        page.get_attribute("html", "data-first-ms"),
        "ms; all after",
        page.get_attribute("html", "data-drawn-ms"),
        "ms;",
        f"{report.stat().st_size / 2**20:.2f} MiB",
    )
    draw_patterns(page)
    assert page.locator("#cv .paper").count() == 2
    assert page.locator("#cv canvas").count() == 2 * (8 + 1)
    seen.quiet()


def test_theme_follows_the_system_and_switches(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report, scheme="dark")
    assert page.locator(".plot[data-drawn=dark]").count() == 12
    back = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(back)
    page.click("#theme")
    page.wait_for_selector("html[data-theme=light] #fig-loss .plot[data-drawn=light]")
    assert page.evaluate(back) != dark
    seen.quiet()


def test_views_switch_and_tables_follow(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    figure = page.locator("#fig-heads")
    figure.locator("summary").click()
    page.wait_for_selector("#fig-heads tbody tr")  # the toggle event comes a moment later
    assert figure.locator("tbody tr").count() == 270
    first = figure.locator("tbody tr").first.inner_text()
    page.select_option("#arm", "adversarial − none")
    page.wait_for_function("first => document.querySelector('#fig-heads tbody tr').innerText !== first", arg=first)
    page.locator("#fig-profile").get_by_role("button", name="cosine").click()
    assert page.locator("#fig-profile button[aria-pressed=true]").inner_text() == "cosine"
    page.locator("#fig-head-shift select").select_option(label="write from instruction")
    seen.quiet()


def test_prompt_selector_changes_strips_and_patterns(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    draw_patterns(page)
    before = page.locator("#strips").inner_text()
    page.locator("#prompt").select_option("2")
    assert page.locator("#strips").inner_text() != before
    assert page.locator("#strips .region.suffix .tok").count() == 20
    page.wait_for_selector("#cv canvas")
    seen.quiet()


def test_replies_are_folded_found_and_filtered(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    rows = page.locator("#reply-table tbody tr")
    assert rows.count() == 25
    assert page.locator("#reply-table details[open]").count() == 0
    page.click("#more")
    assert rows.count() == 130
    page.fill("#find", "signature")
    assert 0 < rows.count() < 130
    page.select_option("#which", "flipped")
    assert "refusal" in rows.first.inner_text()
    rows.first.locator("summary").first.click()
    page.wait_for_selector("details.reply")
    reply = rows.first.locator("details.reply").nth(1)
    assert "may be unpleasant" in reply.locator("summary").inner_text()
    assert not reply.locator("p").is_visible()
    reply.locator("summary").click()
    assert reply.locator("p").is_visible()
    seen.quiet()


def test_hostile_text_is_shown_and_never_run(browser: sync_api.Browser, hostile: Path) -> None:
    page, seen = open_page(browser, hostile)
    draw_patterns(page)
    for row in page.locator("#reply-table tbody tr").all()[:6]:
        row.locator("summary").first.click()
    page.wait_for_selector("details.reply")
    for reply in page.locator("details.reply > summary").all()[:30]:
        reply.click()
    page.locator("#fig-candidates summary").click()
    page.hover("#strips .tok >> nth=30")
    page.locator("#fig-profile .plot svg").hover()
    assert "</script><script>alert('x')</script>" in page.locator("pre.suffix-box").inner_text()
    text = page.locator("body").inner_text()
    assert "<img src=x onerror=alert(1)>" in text and "{{ 7*7 }}" in text and "⟨U+202E⟩" in text
    assert page.locator("img, iframe").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    seen.quiet()


@pytest.mark.parametrize("width", [390, 820])
def test_no_sideways_scroll(browser: sync_api.Browser, report: Path, hostile: Path, width: int) -> None:
    for path in (report, hostile):
        page, seen = open_page(browser, path, width=width)
        draw_patterns(page)
        page.locator("#reply-table summary").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        seen.quiet()


def test_keyboard_reaches_the_controls_and_focus_is_seen(browser: sync_api.Browser, report: Path) -> None:
    page, _ = open_page(browser, report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "theme"
    page.keyboard.press("Enter")
    page.wait_for_selector("html[data-theme=dark]")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_every_control_is_reached_by_keyboard_and_none_keeps_the_focus(browser: sync_api.Browser, report: Path) -> None:
    page, _ = open_page(browser, report)
    draw_patterns(page)
    page.evaluate("window.scrollTo(0, 0)")
    every = "[...document.querySelectorAll('a[href], button, select, summary, input, [tabindex=\"0\"]')]"
    usable = set(page.evaluate(f"{every}.map((e, i) => e.checkVisibility() && !e.disabled ? i : -1)")) - {-1}
    assert len(usable) > 40
    reached: set[int] = set()
    for _ in range(2 * len(usable)):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(f"{every}.indexOf(document.activeElement)"))
        if usable <= reached:
            break
    missed = page.evaluate(f"{every}.map(e => e.outerHTML.slice(0, 80))")
    assert [missed[i] for i in sorted(usable - reached)] == []


def pinned_in(page: sync_api.Page) -> str:
    return page.locator("#pinned h3").inner_text() if page.locator("#pinned h3").count() else ""


def test_a_head_clicked_in_the_grid_is_pinned_everywhere(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    draw_patterns(page)
    assert page.locator("#cv canvas").count() == 2 * (8 + 1)
    before = page.locator("#strips").inner_text()
    # the cell of L16.H4: the first of the top heads
    page.evaluate("document.getElementById('fig-heads').scrollIntoView({behavior: 'instant'})")
    cells = page.locator("#fig-heads .plot .mark-rect.role-mark").first.locator("path")
    cells.nth(16 * 9 + 4).click(force=True)  # its sign lies above it
    assert "head=L16.H4" in page.url
    assert pinned_in(page).startswith("L16.H4")
    without, attacked = (page.locator("#pinned p", has_text=f"Ablated alone {run}") for run in ("without", "with the"))
    assert "adjusted for all heads" in without.inner_text()
    assert "p <" not in attacked.inner_text() and "p =" not in attacked.inner_text(), "one suffix allows no p value"
    assert page.input_value("#head") == "L16.H4"
    assert "L16.H4" in page.locator("#strips").inner_text() and page.locator("#strips").inner_text() != before
    page.wait_for_function("document.querySelectorAll('#cv canvas').length === 4")
    faded = page.locator("#fig-circuit .plot .mark-rule path, #fig-circuit .plot .mark-rule line")
    assert {"0.08", "0.75"} <= {faded.nth(i).get_attribute("opacity") for i in range(faded.count())}
    cells.nth(16 * 9 + 4).click(force=True)  # its sign lies above it
    assert pinned_in(page) == "" and "head=" not in page.url
    seen.quiet()


def test_the_address_restores_what_was_chosen(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    page.select_option("#head", "L14.H7")
    page.select_option("#arm", "adversarial")
    page.select_option("#measure", "effect of ablating")
    page.select_option("#prompt", "2")
    address = page.url
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    again = context.new_page()
    again.goto(address)
    again.wait_for_selector("html[data-drawn-ms]", timeout=60_000)
    assert pinned_in(again).startswith("L14.H7")
    assert again.input_value("#arm") == "adversarial" and again.input_value("#measure") == "effect of ablating"
    assert again.input_value("#prompt") == "2"
    assert again.locator("#strips").inner_text() == page.locator("#strips").inner_text()
    again.goto(address.split("#")[0] + "#head=nonsense&prompt=99&arm=<b>")
    again.reload()
    again.wait_for_selector("html[data-drawn-ms]", timeout=60_000)
    assert pinned_in(again) == "" and again.input_value("#prompt") == "0"
    seen.quiet()


def test_one_arm_drives_grid_and_circuit(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    texts = [page.locator(f"#fig-{name} .plot").inner_html() for name in ("heads", "circuit")]
    page.select_option("#arm", "adversarial − none")
    for name, before in zip(("heads", "circuit"), texts, strict=True):
        page.wait_for_function(
            "([name, before]) => document.querySelector(`#fig-${name} .plot`).innerHTML !== before", arg=[name, before]
        )
    seen.quiet()


def test_grid_and_circuit_show_one_arm_or_say_that_there_is_none(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    shown = [page.locator(f"#fig-{name} .switch") for name in ("heads", "circuit")]
    assert [place.inner_text() for place in shown] == ["contribution: none", "without suffix"]
    page.select_option("#measure", "attention to the instruction")  # there is none without a suffix: a difference
    assert page.input_value("#arm") == "adversarial − none" and "arm=adversarial" in page.url
    assert [place.inner_text() for place in shown] == [
        "attention to the instruction: adversarial − none", "adversarial − none",
    ]  # fmt: skip
    page.select_option("#arm", "adversarial − random")
    assert shown[1].inner_text() == "No circuit for this arm (adversarial − random)."
    assert page.locator("#fig-circuit .plot svg").count() == 0
    page.select_option("#arm", "adversarial − none")
    page.wait_for_selector("#fig-circuit .plot svg")
    seen.quiet()


@pytest.mark.parametrize("fragment", ["head=constructor", "head=__proto__&measure=toString&arm=valueOf&profile=length"])
def test_no_fragment_breaks_the_page(browser: sync_api.Browser, report: Path, fragment: str) -> None:
    page, seen = open_page(browser, report, fragment=fragment)
    assert "No head is pinned" in page.locator("#pinned").inner_text()
    assert page.locator("#reply-table tbody tr").count() == 25
    seen.quiet()


def test_links_to_sections_keep_what_was_chosen_and_views_are_in_the_address(
    browser: sync_api.Browser, report: Path
) -> None:
    page, seen = open_page(browser, report)
    page.select_option("#head", "L14.H7")
    page.locator("#fig-profile").get_by_role("button", name="cosine").click()
    page.locator("#fig-head-shift select").select_option(label="write from instruction")
    address = page.url
    page.get_by_role("link", name="Direction", exact=True).click()
    assert page.url == address and page.evaluate("document.activeElement.id") == "direction"
    again, _ = open_page(browser, report, fragment=address.split("#")[1])
    assert pinned_in(again).startswith("L14.H7")
    assert again.locator("#fig-profile button[aria-pressed=true]").inner_text() == "cosine"
    assert again.input_value("#fig-head-shift select") == "write from instruction"
    seen.quiet()


def test_on_a_phone_long_labels_leave_the_room_to_the_chart(browser: sync_api.Browser, report: Path) -> None:
    page, _ = open_page(browser, report, width=390)
    for name in ("causal", "interventions"):
        lines = page.locator(f"#fig-{name} .plot svg .role-axis-grid line")
        boxes = [box["x"] for i in range(lines.count()) if (box := lines.nth(i).bounding_box())]
        assert max(boxes) - min(boxes) > 220, name
    labels = page.locator("#fig-circuit .plot svg .role-mark text")
    sources = [
        labels.nth(i) for i in range(labels.count()) if labels.nth(i).text_content() in ("instruction", "system")
    ]
    assert sources and all("rotate(270)" in (label.get_attribute("transform") or "") for label in sources)


def test_a_prompt_of_the_list_opens_its_tokens(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    button = page.locator("#reply-table .jump").nth(1)
    button.click()
    assert page.input_value("#prompt") == "1" and "prompt=1" in page.url
    assert page.locator("#prompt-replies details.reply").count() == 2
    assert page.locator("#prompt-replies details[open]").count() == 0, "replies stay folded"
    seen.quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: sync_api.Browser, report: Path, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page, _ = open_page(browser, report, scheme=scheme)
    page.select_option("#head", "L16.H4")
    draw_patterns(page)
    found = axe.Axe().run(page)
    serious = [v for v in found.response["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [node["html"][:120] for node in v["nodes"][:3]]) for v in serious] == []


def test_nothing_shifts_while_it_draws(browser: sync_api.Browser, report: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.add_init_script(
        "window.shift = 0; new PerformanceObserver(list => { for (const e of list.getEntries()) if (!e.hadRecentInput)"
        " window.shift += e.value; }).observe({type: 'layout-shift', buffered: true});"
    )
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn-ms]", timeout=60_000)
    assert page.evaluate("window.shift") < 0.1


def test_it_prints(browser: sync_api.Browser, report: Path) -> None:
    page, _ = open_page(browser, report)
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not page.locator("#theme").is_visible()
    assert len(page.pdf()) > 50_000
