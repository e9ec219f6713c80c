"""The demo's figures from a finished run folder: `python benchmarks/demo.py [runs/demo]`.

Wall time and memory come from the run's own record; the report is opened in headless Chromium to time its drawing.
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from suffix_analysis.files import read_json, read_table


def draw_seconds(page: Path) -> float | None:
    """Seconds until every chart of the report is drawn, or None without Chromium and Playwright."""
    chromium = shutil.which("chromium")
    if chromium is None or find_spec("playwright") is None:  # `make demo` installs neither
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(page.resolve().as_uri())
        # an attribute, because the page's content security policy forbids evaluating strings
        tab.wait_for_selector("html[data-drawn-ms]", state="attached", timeout=60_000)
        seconds = float(tab.locator("html").get_attribute("data-drawn-ms") or "nan") / 1000
        browser.close()
    return seconds


def figures(run: Path) -> dict[str, Any]:
    """Everything issue 2 asks of the demo."""
    status = read_json(run / "status.json")
    refusal = {row["arm"]: row for row in read_table(run / "findings" / "refusal.parquet")}
    interventions = {
        row["intervention"]: row["refusal_rate"] for row in read_table(run / "findings" / "interventions.parquet")
    }
    none = refusal["none"]["refusal_rate"]
    out: dict[str, Any] = {f"seconds, {name}": stage["seconds"] for name, stage in status["stages"].items()}
    out["seconds, all stages"] = round(sum(stage["seconds"] for stage in status["stages"].values()), 1)
    out["peak memory, GiB"] = status["peak_gib"]
    out["report, MiB"] = round((run / "report.html").stat().st_size / 2**20, 2)
    out["report drawn in, s"] = draw_seconds(run / "report.html")
    for arm, row in refusal.items():
        out[f"refusal phrase rate, {arm}"] = round(row["refusal_rate"], 3)
    for arm in ("adversarial", "random", "shuffled", "benign"):
        out[f"points lower than none, {arm}"] = round(100 * (none - refusal[arm]["refusal_rate"]), 1)
    for name, rate in interventions.items():
        if name != "none":
            out[f"refused, {name}"] = "not available" if rate is None else round(rate, 3)
    for row in read_table(run / "findings" / "cost.parquet"):
        out[f"nats by ablation, {row['material'][:24]}"] = round(row["change"], 3)
    return out


if __name__ == "__main__":
    for name, value in figures(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")).items():
        print(f"{name:48} {value}")
