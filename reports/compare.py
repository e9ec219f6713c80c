"""Two runs on one page: two models or two suffixes side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from reports import build, theme
from reports.charts import Figure
from reports.charts_circuit import circuit, largest_edge
from reports.charts_heads import MEASURES, PIN, grid_bounds, head_grid
from reports.charts_more import figures
from reports.data import Row, RunData, read_run
from reports.escape import lean, visible
from reports.evidence import find
from reports.numbers import percent_ci, plain_ci
from reports.page import BUDGETS, context, figure_payload
from reports.redact import redact as redacted

TOLD = ("run", "model", "suffix", "pool", "facts", "headline", "unfinished", "missing", "failed")
SHOWN = ("refusal", "profile", "shift", "causal", "heads", "circuit", "interventions")


def build_comparison(
    first: Path,
    second: Path,
    out: Path | None = None,
    *,
    redact: bool = False,
    on_unusable: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a page that shows two runs side by side and return its path (default: beside the first run's report).

    With ``redact`` it has a name of its own, so that it replaces no page that is not. ``on_unusable`` is told of every
    file that is damaged and so not shown.

    Raises ReportError where a run cannot be read or the page cannot be written.
    """
    if out is not None:
        build.prepare(Path(out))
    runs = [read_run(Path(run)) for run in (first, second)]
    if redact:
        runs = [redacted(run) for run in runs]
    name = f"compare-{runs[1].name}{'-redacted' if redact else ''}.html"
    target = Path(out) if out is not None else Path(first) / name
    build.write(target, render(runs[0], runs[1]))
    for run in runs:
        for file, why in run.unusable.items():
            on_unusable(f"{run.name}, {file}: {why}")
    return target


def render(first: RunData, second: RunData) -> bytes:
    """Return the page as UTF-8 bytes."""
    sides: list[dict[str, Any]] = []
    both = [grid_bounds(run) for run in (first, second)]
    widest = max(largest_edge(run) for run in (first, second))
    bounds = {measure: max(found[measure] for found in both) for measure in MEASURES}
    charts: dict[str, Figure] = {}
    for letter, data in (("a", first), ("b", second)):
        own = figures(data)
        if (graph := circuit(data, widest)) is not None:  # an edge is as wide on both sides
            ending = " Hover over an edge for its interval and what it is in the other arm."
            own["circuit"] = replace(graph, caption=graph.caption.replace(ending, " Widths are on one scale."))
        if "heads" in own:  # colours mean the same on both sides; there is nothing to pin a head in
            grid = head_grid(data, bounds)
            assert grid is not None
            own["heads"] = replace(grid, caption=grid.caption.removesuffix(PIN))
        charts |= {f"{name}-{letter}": own[name] for name in SHOWN if name in own}
        told = context(data, own, BUDGETS[-1])
        told["failed"] = [line for line in told["checked"] if line.passed is False]
        sides.append({key: told[key] for key in TOLD})
    names = [name for name in SHOWN if f"{name}-a" in charts or f"{name}-b" in charts]
    payload: dict[str, Any] = {
        "themes": {name: theme.vega_config(name) for name in ("light", "dark")},
        "figures": {name: figure_payload(figure) for name, figure in charts.items()},
        "prompts": [],
        "replies": {"rows": [], "arms": {}, "texts": [], "verdicts": [], "left_out": 0},
        "pinned": {"columns": [], "heads": {}},
    }
    variables = {"sides": sides, "figures": _named(charts), "names": names, "rows": differences(first, second)}
    return build.page("compare.html.j2", variables, lean(payload))


def _named(charts: dict[str, Figure]) -> dict[str, dict[str, Any]]:
    """The figures as the template's macro reads them, under the ids they have on this page."""
    return {name: {**vars(figure), "id": name} for name, figure in charts.items()}


def differences(first: RunData, second: RunData) -> list[tuple[str, str, str]]:
    """Return (quantity, in the first run, in the second) for what both runs hold."""
    rows: list[tuple[str, str, str]] = []

    def add(words: str, table: str, shown: Any, **wanted: object) -> None:
        found = [find(run.table(table), **wanted) for run in (first, second)]
        if all(found):
            rows.append((words, *(shown(row) for row in found)))

    def rate(row: Row) -> str:
        return percent_ci(row["refusal_rate"], row["refusal_lo"], row["refusal_hi"])

    arms = {row["arm"] for run in (first, second) for row in run.table("refusal")}
    for arm in theme.arm_order(arms):
        add(f"refused, {visible(arm)}", "refusal", rate, arm=arm, split="report")
    for name, kind in (("ablated", "harmful"), ("added", "harmless")):
        add(f"refused, direction {name}, {kind} prompts", "interventions", rate, intervention=name, kind=kind)
    depths = {run.summary.direction.layer if run.summary.direction else None for run in (first, second)}
    for arm in theme.arm_order(arms) if len(depths) == 1 else ():
        (layer,) = depths
        add(
            f"normalised projection at layer {layer}, {visible(arm)}", "profile",
            lambda row: plain_ci(row["mean"], row["lo"], row["hi"]), arm=arm, layer=layer, measure="normalised",
        )  # fmt: skip
    for term in ("top heads", "other heads", "MLPs"):
        add(
            f"share of the fall, {term}", "carried",
            lambda row: percent_ci(row["share"], row["share_lo"], row["share_hi"]), arm="adversarial", term=term,
        )  # fmt: skip
    for factor in ("query", "dilution"):
        add(
            f"share of the instruction's loss, {factor}", "factors",
            lambda row: percent_ci(row["share"], row["share_lo"], row["share_hi"]),
            arm="adversarial", layer=-1, factor=factor,
        )  # fmt: skip
    return rows
