"""The report in a real browser, opened from file:// with no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.pages import NEEDED, draw_patterns, open_page

if TYPE_CHECKING:
    from playwright import sync_api

pytestmark = NEEDED


def test_draws_without_network_or_complaint(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    plots = page.locator("figure .plot")
    assert plots.count() == 14
    for i in range(14):
        assert plots.nth(i).locator("svg path").count() > 3
    draw_patterns(page)
    assert page.locator("#cv .paper").count() == 2
    assert page.locator("#cv canvas").count() == 2 * (8 + 1)
    seen.quiet()


# a fixed piece of work, and the milliseconds it takes where the page is drawn in 1.1 s (benchmarks/README.md)
PACE = """() => { const started = performance.now(), rows = [];
  for (let i = 0; i < 200000; i++) rows.push({ key: `k${(i * 7919) % 1000}`, value: Math.sin(i) });
  rows.sort((a, b) => a.value - b.value); JSON.parse(JSON.stringify(rows)); return performance.now() - started; }"""
USUAL_PACE = 500


@pytest.mark.alone
def test_it_is_drawn_within_a_second_and_a_half(browser: sync_api.Browser, report: Path) -> None:
    """On the machine that the figure was asked for; a slower one gets as much more as it takes for ``PACE``."""
    loads = []
    pace = []
    for _ in range(3):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        pace.append(page.evaluate(PACE))
        session = context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-drawn-ms]", timeout=60_000)
        metrics = {row["name"]: row["value"] for row in session.send("Performance.getMetrics")["metrics"]}
        drawn = int(page.get_attribute("html", "data-drawn-ms") or 1e9)
        loads.append((drawn, round(1000 * metrics["ThreadTime"])))
        context.close()
        if loads[-1][0] <= 1500:
            return
    # the processors were busy with something else in all three: then what counts is the page's own work
    bound = 1500 * max(1, min(pace) / USUAL_PACE)
    told = f"milliseconds until drawn, of those the page's own: {loads}; bound {bound:.0f}"
    assert min(own for _, own in loads) <= bound, told


def test_theme_follows_the_system_and_switches(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report, scheme="dark")
    assert page.locator(".plot[data-drawn=dark]").count() == 14
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
    page.select_option("#arm", "none")
    page.wait_for_function("first => document.querySelector('#fig-heads tbody tr').innerText !== first", arg=first)
    page.locator("#fig-profile").get_by_role("button", name="cosine").click()
    assert page.locator("#fig-profile button[aria-pressed=true]").inner_text() == "cosine"
    page.locator("#fig-head-shift select").select_option(label="write from instruction")
    seen.quiet()


@pytest.mark.long
def test_prompt_selector_changes_strips_and_patterns(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    draw_patterns(page)
    before = page.locator("#strips").inner_text()
    page.locator("#prompt").select_option("2")
    assert page.locator("#strips").inner_text() != before
    assert page.locator("#strips .region.suffix .tok").count() == 20
    page.wait_for_selector("#cv canvas")
    seen.quiet()


@pytest.mark.long
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
    page.fill("#find", "")
    page.select_option("#which", "kept")
    page.click("#more")
    cell = "[...document.querySelectorAll('#reply-table td[title=none]')].map(cell => cell.innerText)"
    assert set(page.evaluate(cell)) == {"■ refusal"}, "refused without the suffix, not only with it"
    seen.quiet()


@pytest.mark.long
def test_the_address_keeps_what_replies_were_looked_for(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    texts = "[...document.querySelectorAll('#reply-table tbody tr')].map(row => row.innerText)"
    page.select_option("#kind", "harmless")
    page.select_option("#sort", label="by text")
    page.fill("#find", "a")
    chosen, address = page.evaluate(texts), page.evaluate("location.hash")
    assert chosen and all(f"{key}=" in address for key in ("kind", "sort", "find")) and "which" not in address
    again, other = open_page(browser, report, fragment=address.removeprefix("#"))
    assert again.evaluate(texts) == chosen
    assert [again.locator(f"#{name}").input_value() for name in ("find", "kind", "which", "sort")] == [
        "a", "harmless", "all", "text"
    ]  # fmt: skip
    again.evaluate("location.hash = 'kind=harmful&which=kept'")
    again.wait_for_function("document.getElementById('kind').value === 'harmful'")
    assert [again.locator(f"#{name}").input_value() for name in ("find", "which", "sort")] == ["", "kept", ""]
    again.select_option("#kind", "harmless")
    assert "kind=harmless" in again.evaluate("location.hash"), "another kind has other arms to sort by"
    foreign, third = open_page(browser, report, fragment="kind=toString&which=none&sort=-nothing&find=zzzz")
    assert [foreign.locator(f"#{name}").input_value() for name in ("kind", "which", "sort")] == ["harmful", "all", ""]
    assert foreign.locator("#reply-table tbody tr").count() == 0
    assert foreign.evaluate("location.hash") == "#find=zzzz"
    for watched in (seen, other, third):
        watched.quiet()


def test_prompts_are_sorted_by_text_and_by_what_was_refused(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    first = page.locator("#reply-table tbody tr").first
    assert "variant 1." in first.inner_text()
    page.select_option("#sort", label="by text")
    assert first.inner_text().startswith("Describe the best way to")
    page.select_option("#sort", label="least refused: adversarial")
    assert "□" in first.locator("td[title=adversarial]").inner_text()
    page.select_option("#sort", label="most refused: adversarial")
    assert "■" in first.locator("td[title=adversarial]").inner_text()
    page.select_option("#kind", "lookalike")
    assert page.input_value("#sort") == "" and page.locator("#sort option").count() == 4
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


@pytest.mark.long
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
    assert page.evaluate("document.activeElement.id") == "data"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "theme"
    page.keyboard.press("Enter")
    page.wait_for_selector("html[data-theme=dark]")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_it_prints(browser: sync_api.Browser, report: Path) -> None:
    page, _ = open_page(browser, report)
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not page.locator("#theme").is_visible()
    assert len(page.pdf()) > 50_000
