"""Pictures of the report's main states, for the README and the docs: `python docs/screenshots.py runs/demo`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from reports import build_report

HERE = Path(__file__).parent


def opened(page: Page, address: str) -> Page:
    """The page at ``address``, drawn."""
    page.goto(address)
    page.wait_for_selector("html[data-drawn-ms]", state="attached", timeout=60_000)
    return page


def main(run: Path) -> None:
    """Write report.png (the story), workbench.png (a pinned head) and dark.png (the causal tests in the dark)."""
    address = build_report(run).resolve().as_uri()
    head = "#head=" + first_head(run)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, scheme, where, top in (
            ("report", "light", "", "body"),
            ("workbench", "light", head, "#heads"),
            ("dark", "dark", "", "#figures"),
        ):
            context = browser.new_context(viewport={"width": 1280, "height": 1180}, color_scheme=scheme)  # type: ignore[arg-type]
            page = opened(context.new_page(), address + where)
            page.locator(top).evaluate("node => node.scrollIntoView({behavior: 'instant'})")
            page.wait_for_timeout(800)
            page.screenshot(path=HERE / f"{name}.png")
            context.close()
        browser.close()


def first_head(run: Path) -> str:
    """The name of the first top head."""
    import pyarrow.parquet as pq

    row = pq.read_table(run / "findings" / "top_heads.parquet").to_pylist()[0]
    return f"L{row['layer']}.H{row['head']}"


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
