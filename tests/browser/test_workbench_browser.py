"""The workbench in a real browser: one state that measure, arm, head, prompt and address share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reports import build_comparison
from tests.browser.pages import NEEDED, draw_patterns, open_page, pinned_in
from tests.fake_run import make_fake_run

if TYPE_CHECKING:
    from playwright import sync_api

pytestmark = NEEDED


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


@pytest.mark.long
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
    names = ("heads", "circuit", "circuit-control")
    texts = [page.locator(f"#fig-{name} .plot").inner_html() for name in names]
    page.select_option("#arm", "adversarial − random")
    for name, before in zip(names, texts, strict=True):
        page.wait_for_function(
            "([name, before]) => document.querySelector(`#fig-${name} .plot`).innerHTML !== before", arg=[name, before]
        )
    seen.quiet()


@pytest.mark.long
def test_grid_and_circuits_show_one_arm_or_say_that_there_is_none(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    shown = [page.locator(f"#fig-{name} .switch") for name in ("heads", "circuit", "circuit-control")]
    # the page opens on what the suffix changed, attacked beside not attacked
    assert [place.inner_text() for place in shown] == [
        "contribution: adversarial − none", "adversarial − none: with the suffix", "adversarial − none: without suffix",
    ]  # fmt: skip
    half = page.locator("#fig-circuit").bounding_box()
    page.select_option("#arm", "none")
    assert [place.inner_text() for place in shown[:2]] == ["contribution: none", "without suffix"]
    assert not page.locator("#fig-circuit-control").is_visible()
    page.wait_for_function("document.querySelector('#fig-circuit .plot svg')?.getBoundingClientRect().width > 700")
    page.select_option("#measure", "attention to the instruction")  # there is none without a suffix: a difference
    assert page.input_value("#arm") == "adversarial − none" and "measure=attention" in page.url
    page.wait_for_selector("#fig-circuit-control .plot svg")
    whole = page.locator("#fig-circuit").bounding_box()
    assert half and whole and abs(half["width"] - whole["width"]) < 2
    page.select_option("#arm", "adversarial − shuffled")
    assert shown[1].inner_text() == "No circuit for this arm (adversarial − shuffled)."
    assert page.locator("#fig-circuit .plot svg").count() == 0
    page.select_option("#arm", "adversarial − none")
    page.wait_for_selector("#fig-circuit .plot svg")
    seen.quiet()


def test_a_page_that_opens_on_one_arm_can_still_compare(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report, fragment="arm=none")
    assert not page.locator("#fig-circuit-control").is_visible()
    page.select_option("#arm", "adversarial − none")
    page.wait_for_selector("#fig-circuit-control .plot svg")
    seen.quiet()


def test_a_pinned_early_head_keeps_its_own_edges(browser: sync_api.Browser, report: Path) -> None:
    rows = pq.read_table(report.parent / "findings" / "circuit.parquet").to_pylist()
    early = next(row for row in rows if row["kind"] == "early → head")
    page, seen = open_page(browser, report, fragment=f"head=L{early['source_layer']}.H{early['source_head']}")
    edges = page.locator("#fig-circuit .plot .mark-rule path, #fig-circuit .plot .mark-rule line")
    near = [i for i in range(edges.count()) if edges.nth(i).get_attribute("opacity") == "0.75"]
    assert near, "at least the edge that leaves it"
    seen.quiet()


@pytest.mark.long
def test_the_pages_data_and_largest_token_pairs_can_be_taken_away(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    with page.expect_download() as saved:
        page.click("#data")
    data = json.loads(Path(saved.value.path()).read_text("utf-8"))
    assert {"figures", "pinned", "prompts", "replies"} <= set(data)
    draw_patterns(page)
    page.locator("#cv summary", has_text="Largest token pairs").first.click()
    lines = page.locator("#cv details.data").first.locator("tbody tr")
    assert lines.count() == 12
    shares = [float(lines.nth(i).locator("td").last.inner_text().split()[0]) for i in range(12)]
    assert shares == sorted(shares, reverse=True)
    seen.quiet()


@pytest.mark.parametrize("fragment", ["head=constructor", "head=__proto__&measure=toString&arm=valueOf&profile=length"])
def test_no_fragment_breaks_the_page(browser: sync_api.Browser, report: Path, fragment: str) -> None:
    page, seen = open_page(browser, report, fragment=fragment)
    assert "No head is pinned" in page.locator("#pinned").inner_text()
    assert page.locator("#reply-table tbody tr").count() == 25
    seen.quiet()


@pytest.mark.long
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


@pytest.mark.long
def test_every_token_is_in_a_table_that_the_keyboard_opens(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    page.select_option("#head", "L16.H4")
    folds = page.locator("#strips details.data")
    assert folds.count() == 2
    folds.nth(1).locator("summary").focus()
    page.keyboard.press("Enter")
    rows = folds.nth(1).locator("tbody tr")
    rows.first.wait_for()
    assert rows.count() == page.locator("#strips .strip").nth(1).locator(".tok").count()
    heads = folds.nth(1).locator("th").all_inner_texts()
    assert heads == ["token", "region", "along r̂", "attention of chat[−1] in L16.H4"]
    cells = [row.locator("td").all_inner_texts() for row in rows.all()]
    assert [cell[1] for cell in cells].count("suffix") == 20
    assert 99 < sum(float(cell[3].removesuffix(" %")) for cell in cells) < 101
    seen.quiet()


def test_a_top_head_tells_its_attention_with_intervals_and_the_sequences_beginning(
    browser: sync_api.Browser, report: Path
) -> None:
    page, _ = open_page(browser, report)
    page.select_option("#head", "L16.H4")
    pinned = page.locator("#pinned table").first
    assert pinned.locator("th").all_inner_texts() == [
        "arm", "writes along r̂",
        *(f"attention to {region}" for region in ("instruction", "suffix", "chat", "system")), "to the first token",
    ]  # fmt: skip
    cells = pinned.locator("tbody tr").first.locator("td").all_inner_texts()
    assert all(" to " in cell for cell in cells[1:-1]), cells
    page.select_option("#head", "L0.H0")  # not among the top heads: means only
    cells = pinned.locator("tbody tr").first.locator("td").all_inner_texts()
    assert " to " not in cells[2] and cells[-1] == "–"


@pytest.mark.long
def test_two_runs_stand_side_by_side_under_one_control(
    browser: sync_api.Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    runs = [make_fake_run(tmp_path_factory.mktemp("pair") / name, n_prompts=10, seed=i) for i, name in enumerate("ab")]
    (runs[1] / "steps.jsonl").unlink()
    rows = pq.read_table(runs[1] / "findings" / "circuit.parquet").to_pylist()
    rows = [row for row in rows if row["arm"] == "none"]
    pq.write_table(pa.Table.from_pylist(rows), runs[1] / "findings" / "circuit.parquet")
    rates = pq.read_table(runs[0] / "findings" / "refusal.parquet").to_pylist()
    rates = [{**row, "arm": "well-known" if row["arm"] == "benign" else row["arm"]} for row in rates]
    pq.write_table(pa.Table.from_pylist(rates), runs[0] / "findings" / "refusal.parquet")
    page, seen = open_page(browser, build_comparison(*runs))
    assert page.locator("figure").count() == 14
    assert page.locator("figure .plot svg").count() == 13, (
        "the second run has no circuit of the arm that is shown first"
    )
    assert "steps.jsonl" in page.locator(".note", has_text="Missing from this run").inner_text()
    assert page.locator(".note", has_text="Checks that did not hold").count() == 2
    page.select_option("#arm", "adversarial − none")
    shown = [page.locator(f"#fig-{name} .switch").inner_text() for name in ("heads-a", "heads-b", "circuit-a")]
    assert shown == [
        "contribution: adversarial − none", "contribution: adversarial − none", "adversarial − none: with the suffix",
    ]  # fmt: skip
    assert page.locator("#fig-circuit-b .switch").inner_text() == "No circuit for this arm (adversarial − none)."
    page.locator("#fig-refusal-a summary").click()
    page.locator("#fig-refusal-a td", has_text="well-known").wait_for()  # a hyphen, not a minus sign
    page.set_viewport_size({"width": 390, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    seen.quiet()


def test_a_token_is_chosen_by_click_or_list_and_told_head_by_head_in_every_arm(
    browser: sync_api.Browser, report: Path
) -> None:
    page, seen = open_page(browser, report)
    page.locator("#strips details.data summary").first.click()
    token = page.locator("#strips .strip").nth(1).locator(".region.suffix .tok").nth(18)
    token.click()
    assert page.input_value("#token") == "suffix −2" and "token=suffix" in page.url
    assert page.locator("#strips .tok.chosen").count() == 1, "the arm without a suffix has no such token"
    rows = page.locator("#token-heads tbody tr")
    assert rows.count() == 8 and {row.locator("td").nth(2).inner_text() for row in rows.all()} == {token.inner_text()}
    assert page.locator("#strips details.data[open]").count() == 1, "what was opened stays open"
    page.locator("#token").focus()
    page.select_option("#token", "chat −1")
    assert page.locator("#strips .tok.chosen").count() == 2 and rows.count() == 2 * 8
    page.select_option("#head", "L16.H4")
    assert [row.locator("td").nth(1).inner_text() for row in rows.all()] == ["without suffix", "with the suffix"]
    given = rows.nth(1).locator("td").nth(3).inner_text()
    shown = page.locator("#strips .strip").nth(1).locator(".tok").last.get_attribute("title")
    assert shown is not None and shown.endswith(given), "the strip's own value"
    again, _ = open_page(browser, report, fragment=page.url.split("#")[1])
    assert again.input_value("#token") == "chat −1" and again.locator("#strips .tok.chosen").count() == 2
    page.locator("#strips .tok.chosen").first.click()
    assert page.input_value("#token") == "" and rows.count() == 0 and "token=" not in page.url
    seen.quiet()


def test_a_layer_is_pinned_from_the_profile_with_all_its_heads(browser: sync_api.Browser, report: Path) -> None:
    page, seen = open_page(browser, report)
    points = page.locator("#fig-profile .plot .mark-symbol.role-mark path")
    told = [points.nth(i).get_attribute("aria-label") or "" for i in range(points.count())]
    points.nth(next(i for i, words in enumerate(told) if "layer: 16" in words)).click(force=True)
    assert "head=L16" in page.url and page.input_value("#head") == "L16"
    assert pinned_in(page).startswith("L16 · all 9\u00a0heads of this layer")
    assert page.locator("#pinned p", has_text="Its MLP writes along r̂").count() == 2
    shown = page.evaluate(
        "[...document.querySelectorAll('#fig-heads .plot .mark-rect.role-mark')].at(-1)"
        ".querySelectorAll(\"path[opacity='1']\").length"
    )
    assert shown == 9, "every head of the layer is outlined in the grid"
    marked = '#fig-profile .plot .mark-rule.role-mark line[stroke-width="4"][opacity="0.25"]'
    rule = f"document.querySelectorAll('{marked}').length"
    assert page.evaluate(rule) == 1
    assert page.locator("#strips h4").first.inner_text().count("L16.H") >= 1
    page.select_option("#head", "L14.H7")
    assert page.evaluate(rule) == 1, "a head's layer is marked too"
    page.select_option("#head", "")
    assert page.evaluate(rule) == 0
    seen.quiet()
