"""The head grid: layer × head maps of contributions, attention shifts and causal effects."""

from __future__ import annotations

import functools

import altair as alt

from reports import theme
from reports.charts import (
    MAIN,
    OTHER_PROMPTS,
    PINNED,
    Figure,
    Spec,
    View,
    differences,
    dots,
    dots_height,
    filled,
    finish,
    head_name,
    is_pinned,
    opacity_where,
    outline,
    tips,
)
from reports.data import Row, RunData
from reports.evidence import adversarial_count, over_prompts
from reports.numbers import plain
from reports.schema import REGIONS
from reports.text import sum_rows

MEASURES = {
    "contribution": "contribution",
    "attention to the instruction": "attention_instruction",
    "attention to the suffix": "attention_suffix",
    "effect of ablating": None,
}
"""What the grid shows, and the column of findings/heads.parquet whose difference between arms it is."""
GLYPH_FROM = 0.12
"""Heads below this share of the largest |contribution| carry no sign glyph."""


PIN = "Click a head to pin it, a point of the projection profile for a whole layer."
LEVEL = 0.05  # of family-wise tests


def head_grid(data: RunData, bounds: dict[str, float] | None = None) -> Figure | None:
    """Return layer × head maps: contributions, differences, attention shifts and effects of ablating each head.

    ``bounds`` are the least ends of the colour scales, by measure: those of another grid that stands beside this one.
    """
    maps = _maps(data)
    if not maps["contribution"]:
        return None
    say = "Grid of layers and heads: what each head writes along the refusal direction at chat[-1]; + towards, − away."
    views = []
    for measure, bound in grid_bounds(data).items():
        bound = max(bound, (bounds or {}).get(measure, 0.0)) or 1.0
        for arm, cells in maps[measure].items():
            views.append(View(f"{measure}: {arm}", _grid(cells, bound, data, say, measure), measure, arm))
    pool = adversarial_count(data)
    caption = (
        "Contribution: what each head writes along the refusal direction at chat[-1], mean over "
        f"{over_prompts(data.table('heads'))}; a share of the write, not the effect of deleting the head. Attention: "
        "change of the share that chat[-1] gives a region. Effect of ablating: change of the projection when that head "
        "alone gives what it gives harmless prompts on average"
        f"{'' if pool < 2 else f', the first of {pool} suffixes'}. "
        "Ringed: top heads, chosen on the select split. One colour scale for each measure; + and − beside colour. "
        f"{_faded(data)}"
        f"{_tested(data)}{_ranking(data)}{PIN}"
    )
    columns = (
        ("layer", "layer"),
        ("head", "head"),
        ("value", "value"),
        ("lo", "CI from"),
        ("hi", "CI to"),
        ("p", "p (all heads)"),
        ("rank", "rank"),
    )
    return Figure("heads", "Every head", caption, say, columns, tuple(views))


def _tested(data: RunData) -> str:
    """How many heads a pool's suffixes clearly change, family-wise."""
    rows = [row for row in data.table("head_differences") if row["against"] == "none" and row["p"] is not None]
    if not rows:
        return ""
    found = sum(row["p"] <= LEVEL for row in rows)
    return (
        f"{found} of {len(rows)} heads write something else with suffixes like these than without (p ≤ 0.05 over all "
        "heads, for other prompts and suffixes too). "
    )


def _faded(data: RunData) -> str:
    direction = data.summary.direction
    if direction is None or direction.layer >= data.summary.n_layers:
        return ""
    return f"Faded: layers from {direction.layer} on, which come after the direction is read. "


def _ranking(data: RunData) -> str:
    """How far attribution patching agrees with the exact effects of ablating."""
    for row in data.table("ranking"):
        if (row["run"], row["measure"]) == ("none", "projection") and row["rank_correlation"] is not None:
            return (
                "Attribution patching beside the exact effects without a suffix: rank correlation "
                f"{plain(row['rank_correlation'])}, {row['found']} of the {row['k']} largest among its first "
                f"{row['k']}. "
            )
    return ""


def grid_bounds(data: RunData) -> dict[str, float]:
    """Return the largest size of any cell that can reach the direction, by measure: where the colour scales end."""
    return {
        measure: max(
            (abs(cell["value"]) for cells in states.values() for cell in cells if not cell["late"]), default=0.0
        )
        for measure, states in _maps(data).items()
    }


def _maps(data: RunData) -> dict[str, dict[str, list[Row]]]:
    """The cells of every map, by measure and arm."""
    rows = [row for row in data.table("heads") if row["split"] == "report" and row["contribution"] is not None]
    by_arm: dict[str, dict[tuple[int, int], Row]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[(row["layer"], row["head"])] = row
    top = {(row["layer"], row["head"]): row["rank"] for row in data.table("top_heads")}
    maps: dict[str, dict[str, list[Row]]] = {measure: {} for measure in MEASURES}
    for arm in theme.arm_order(by_arm.keys() - set(OTHER_PROMPTS)):
        maps["contribution"][arm] = [_cell(row, row["contribution"], top, keep=True) for row in by_arm[arm].values()]
    for name, against in differences(by_arm):
        for measure, key in MEASURES.items():
            cells = _difference(by_arm, against, key, top) if key else []
            if cells:
                maps[measure][name] = cells
        tested = {(r["layer"], r["head"]): r for r in data.table("head_differences") if r["against"] == against}
        for cell in maps["contribution"].get(name, []):
            found = tested.get((cell["layer"], cell["head"]), {})
            cell |= {column: found.get(column) for column in ("lo", "hi", "p")}
    for run in ("none", "adversarial"):
        own = [row for row in data.table("sweep") if row["run"] == run and row["projection_effect"] is not None]
        if own:
            cells = [
                _cell(row, row["projection_effect"], top)
                | {"p": row["projection_p"], "lo": row.get("projection_lo"), "hi": row.get("projection_hi")}
                for row in own
            ]
            maps["effect of ablating"][run] = cells
    # what is written from the direction's layer on comes after it is read
    end = data.summary.direction.layer if data.summary.direction else data.summary.n_layers
    for cell in (cell for states in maps.values() for cells in states.values() for cell in cells):
        cell["late"] = cell["layer"] >= end
    return maps


def _difference(
    by_arm: dict[str, dict[tuple[int, int], Row]], against: str, key: str, top: dict[tuple[int, int], int]
) -> list[Row]:
    """The adversarial arm minus another, head by head."""
    ours, theirs = by_arm.get("adversarial", {}), by_arm.get(against, {})
    both = sorted(ours.keys() & theirs.keys())
    pairs = [(ours[k], theirs[k]) for k in both if ours[k].get(key) is not None and theirs[k].get(key) is not None]
    return [_cell(mine, mine[key] - other[key], top) for mine, other in pairs]


def _cell(row: Row, value: float, top: dict[tuple[int, int], int], *, keep: bool = False) -> Row:
    layer, head = row["layer"], row["head"]
    return {
        "layer": layer, "head": head, "name": head_name(layer, head), "value": value,
        "lo": row.get("lo") if keep else None, "hi": row.get("hi") if keep else None, "rank": top.get((layer, head)),
    }  # fmt: skip


def _grid(cells: list[Row], bound: float, data: RunData, say: str, measure: str) -> Spec:
    for cell in cells:
        share = cell["value"] / bound
        cell["sign"] = "" if abs(share) < GLYPH_FROM else "+" if share > 0 else "−"
    fields = tuple(field for field in ("lo", "hi", "p", "rank") if any(cell.get(field) is not None for cell in cells))
    step = 20 if data.summary.n_heads <= 16 else 13
    return filled(_outline(measure, bound, fields, step * len({cell["head"] for cell in cells}), say), cells)


@functools.lru_cache(maxsize=32)  # a dozen views share a few outlines, and Altair takes 0.3 s for one
def _outline(measure: str, bound: float, fields: tuple[str, ...], height: int, say: str) -> Spec:
    """The map of a measure without its cells; ``fields`` are told beside a cell's name and value."""
    words = {"lo": "CI from", "hi": "CI to", "p": "p (all heads)"}
    base = alt.Chart(MAIN).encode(
        x=alt.X(
            "layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True), scale=alt.Scale(paddingInner=0.06)
        ),
        y=alt.Y("head:O", title="head", scale=alt.Scale(paddingInner=0.06)),
        tooltip=tips(
            ("name:N", "head"), ("value:Q", measure), *((f"{field}:Q", words.get(field, field)) for field in fields)
        ),
    )
    colour = alt.Color(
        "value:Q",
        scale=alt.Scale(domain=[-bound, bound], domainMid=0, range="diverging", interpolate="rgb"),
        legend=alt.Legend(orient="bottom", title=measure, gradientLength=180, gradientThickness=8, tickCount=5),
    )
    cell_mark = base.mark_rect(cornerRadius=1, cursor="pointer").encode(
        color=colour, opacity=opacity_where("datum.late", 0.3, 1)
    )
    ring = base.mark_rect(style="marked", fillOpacity=0, strokeWidth=1.5, cornerRadius=1).transform_filter(
        "datum.rank != null"
    )
    pin = base.mark_rect(style="marked", fillOpacity=0, strokeWidth=4, cornerRadius=1).encode(
        opacity=opacity_where(is_pinned("name"), 1, 0)
    )
    glyph = base.mark_text(fontSize=10, fontWeight=600, baseline="middle").encode(text=alt.Text("sign:N"))
    return outline(alt.layer(cell_mark, ring, pin, glyph).add_params(PINNED), height, say)


def attention_shift(data: RunData) -> Figure | None:
    """Return where the top heads together look from chat[-1]: share of attention per region and arm."""
    rows = [
        {**row, "arm": arm}
        for (arm, region), row in sum_rows(data).items()
        if region in REGIONS and (arm, region) != ("none", "suffix") and not arm.startswith("harmless")
    ]
    if not rows:
        return None
    regions = [
        name
        for name in ("instruction", "suffix", "chat", "system", "bos")
        if any(r["region"] == name and r["attention"] for r in rows)
    ]
    rows = sorted((r for r in rows if r["region"] in regions), key=lambda r: (regions.index(r["region"]), r["arm"]))
    heads = len(data.table("top_heads")) or len({(r["layer"], r["head"]) for r in data.table("shift")}) - 1
    say = f"Share of the attention of {heads} top heads from chat[-1] to each region, per arm, with 95 % intervals."
    caption = (
        f"Mean over the {heads} heads chosen on the select split, on {over_prompts(data.table('shift'))}. Compare with "
        "the other texts: length alone draws attention. The first token, where idle heads look, is in its region here."
    )
    columns = (
        ("region", "region"),
        ("arm", "arm"),
        ("attention", "attention"),
        ("attention_lo", "CI from"),
        ("attention_hi", "CI to"),
        ("lift", "lift over length"),
        ("contribution", "contribution (sum)"),
    )
    chart = dots(rows, "region", regions, "attention", "share of attention", percent=True)
    return Figure(
        "shift",
        "Attention of the top heads",
        caption,
        say,
        columns,
        (View("all", finish(chart, rows, dots_height(rows, "region"), say)),),
    )
