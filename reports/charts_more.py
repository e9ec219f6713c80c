"""The workbench's charts: head grid, per-head shift, candidate directions, loss curve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import altair as alt

from reports import theme
from reports.charts import (
    MAIN,
    SHIFT_ARMS,
    Figure,
    View,
    attention_shift,
    dots,
    dots_height,
    finish,
    interventions,
    position_label,
    projection_profile,
    refusal_rates,
)
from reports.charts_causal import causal_tests
from reports.data import Row, RunData

GLYPH_FROM = 0.12
"""Heads below this share of the largest |contribution| carry no sign glyph."""
MAX_POINTS = 500


def figures(data: RunData) -> dict[str, Figure]:
    """Return every figure that the run's findings allow, by id."""
    makers: tuple[Callable[[RunData], Figure | None], ...] = (
        refusal_rates,
        projection_profile,
        attention_shift,
        interventions,
        head_grid,
        head_shift,
        causal_tests,
        candidates,
        loss_curve,
    )
    made = (maker(data) for maker in makers)
    return {figure.id: figure for figure in made if figure is not None}


def head_name(layer: int, head: int) -> str:
    """Return the usual name of a head, L16.H4."""
    return f"L{layer}.H{head}"


def head_grid(data: RunData) -> Figure | None:
    """Return layer × head contributions to the projection at chat[-1]: without suffix, with it, and the difference."""
    rows = [row for row in data.table("heads") if row["split"] == "report" and row["contribution"] is not None]
    by_arm: dict[str, dict[tuple[int, int], Row]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[(row["layer"], row["head"])] = row
    top = {(row["layer"], row["head"]): row["rank"] for row in data.table("top_heads")}
    states: list[tuple[str, list[Row]]] = []
    states += [
        (arm, [_cell(row, row["contribution"], top) for row in by_arm[arm].values()])
        for arm in ("none", "adversarial", "random")
        if arm in by_arm
    ]
    for against in ("none", "random"):
        pairs = by_arm.get("adversarial", {}), by_arm.get(against, {})
        if all(pairs):
            both = sorted(pairs[0].keys() & pairs[1].keys())
            cells = [
                _cell(
                    {**pairs[0][k], "lo": None, "hi": None},
                    pairs[0][k]["contribution"] - pairs[1][k]["contribution"],
                    top,
                )
                for k in both
            ]
            states.append((f"adversarial − {against}", cells))
    if not states:
        return None
    bound = max(abs(cell["value"]) for _, cells in states for cell in cells) or 1.0
    say = "Grid of layers and heads: what each head writes along the refusal direction at chat[-1]; + towards, − away."
    views = tuple(View(label, _grid(cells, bound, data, say)) for label, cells in states)
    caption = (
        "What each head writes along the refusal direction at chat[-1], mean over the report split: a share of the "
        "write, not the effect of deleting the head. Ringed: top heads, chosen on the select split, shown on the "
        "report split. One colour scale for all views; + towards refusal, − away from it."
    )
    columns = (
        ("layer", "layer"),
        ("head", "head"),
        ("value", "contribution"),
        ("lo", "CI from"),
        ("hi", "CI to"),
        ("rank", "rank"),
    )
    return Figure("heads", "Contribution of every head", caption, say, columns, views)


def _cell(row: Row, value: float, top: dict[tuple[int, int], int]) -> Row:
    key = (row["layer"], row["head"])
    return {
        "layer": row["layer"],
        "head": row["head"],
        "value": value,
        "lo": row.get("lo"),
        "hi": row.get("hi"),
        "rank": top.get(key),
    }


def _grid(cells: list[Row], bound: float, data: RunData, say: str) -> dict[str, Any]:
    for cell in cells:
        share = cell["value"] / bound
        cell["sign"] = "" if abs(share) < GLYPH_FROM else "+" if share > 0 else "−"
    tips = [
        alt.Tooltip(f"{name}:Q", title=title)
        for name, title in (("layer", "layer"), ("head", "head"), ("value", "contribution"))
    ]
    base = alt.Chart(MAIN).encode(
        x=alt.X(
            "layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True), scale=alt.Scale(paddingInner=0.06)
        ),
        y=alt.Y("head:O", title="head", scale=alt.Scale(paddingInner=0.06)),
        tooltip=tips,
    )
    colour = alt.Color(
        "value:Q",
        scale=alt.Scale(domain=[-bound, bound], domainMid=0, range="diverging", interpolate="rgb"),
        legend=alt.Legend(orient="bottom", title="contribution", gradientLength=180, gradientThickness=8, tickCount=5),
    )
    cell_mark = base.mark_rect(cornerRadius=1).encode(color=colour)
    ring = base.mark_rect(style="marked", fillOpacity=0, strokeWidth=1.5, cornerRadius=1).transform_filter(
        "datum.rank != null"
    )
    glyph = base.mark_text(fontSize=10, fontWeight=600, baseline="middle").encode(text="sign:N")
    step = 20 if data.summary.n_heads <= 16 else 13
    return finish(alt.layer(cell_mark, ring, glyph), cells, step * len({cell["head"] for cell in cells}), say)


def head_shift(data: RunData) -> Figure | None:
    """Return attention and contribution of each top head per region, one view per quantity and region."""
    rows = [row for row in data.table("shift") if row["layer"] != -1 and row["arm"] in SHIFT_ARMS]
    if not rows:
        return None
    ranks = {(row["layer"], row["head"]): row["rank"] for row in data.table("top_heads")}
    keys = sorted({(row["layer"], row["head"]) for row in rows}, key=lambda key: (ranks.get(key, 999), key))
    order = [head_name(*key) for key in keys]
    say = "Attention and contribution of each top head from chat[-1], per region and arm, with 95 % intervals."
    views = []
    for value, words, axis in (
        ("attention", "attention to", "share of the head's attention"),
        ("contribution", "write from", "contribution to the refusal direction"),
    ):
        for region in ("instruction", "suffix", "chat", "system"):
            mine = [
                {**row, "name": head_name(row["layer"], row["head"])}
                for row in rows
                if row["region"] == region and row[value] is not None and (region, row["arm"]) != ("suffix", "none")
            ]
            if mine:
                mine.sort(key=lambda row: (order.index(row["name"]), SHIFT_ARMS.index(row["arm"])))
                chart = dots(mine, "name", order, value, f"{axis}: {region}", percent=value == "attention")
                views.append(View(f"{words} {region}", finish(chart, mine, dots_height(mine, "name"), say)))
    if not views:
        return None
    caption = (
        "From chat[-1]; heads in the order of their contribution on the select split, values of the report split, "
        "bars: 95 % CI. "
        "“Write from” is a share of the write, not the effect of deleting those tokens."
    )
    columns = (
        ("name", "head"),
        ("arm", "arm"),
        ("region", "region"),
        ("attention", "attention"),
        ("attention_lo", "CI from"),
        ("attention_hi", "CI to"),
        ("lift", "lift over length"),
        ("contribution", "contribution"),
    )
    return Figure("head-shift", "Where each top head looks", caption, say, columns, tuple(views))


def candidates(data: RunData) -> Figure | None:
    """Return the candidate directions' scores by layer and position, the chosen one ringed."""
    rows = data.table("candidates")
    if not rows:
        return None
    shown = [
        {
            **row,
            "where": position_label(row["position"], row["token"]),
            "usable": row["status"] in ("chosen", "kept"),
            "token": None,
        }
        for row in rows
    ]
    order = [label for _, label in sorted({(-row["position"], row["where"]) for row in shown})]
    say = "Scores of candidate refusal directions by layer, one line per token position; the chosen one is ringed."
    views = []
    for field, label, title in (
        ("refusal_score", "bypass", "refusal score, direction ablated (lower is better)"),
        ("steering_score", "induce", "refusal score on harmless, direction added (must be ≥ 0)"),
        ("kl_div_score", "KL", "KL divergence at chat[-1], direction ablated (must be ≤ 0.1)"),
    ):
        mine = [row for row in shown if row[field] is not None]
        if mine:
            views.append(View(label, finish(_candidate_chart(mine, order, field, title), mine, 260, say)))
    if not views:
        return None
    caption = (
        "Chosen on the select split: the smallest bypass among candidates that come early enough, keep harmless "
        "behaviour (KL) and induce refusal when added. Hollow points are ruled out."
    )
    columns = (
        ("where", "position"),
        ("layer", "layer"),
        ("refusal_score", "bypass"),
        ("steering_score", "induce"),
        ("kl_div_score", "KL"),
        ("norm", "norm"),
        ("status", "status"),
    )
    return Figure("candidates", "How the direction was chosen", caption, say, columns, tuple(views))


def _candidate_chart(rows: list[Row], order: list[str], field: str, title: str) -> Any:
    colours = [theme.POSITION_COLOURS[i % len(theme.POSITION_COLOURS)] for i in range(len(order))]
    legend = alt.Legend(orient="bottom", columns=3, title=None, symbolOpacity=1)
    base = alt.Chart(MAIN).encode(
        x=alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, grid=False), scale=alt.Scale(nice=False)),
        y=alt.Y(f"{field}:Q", title=title),
        color=alt.Color("where:N", scale=alt.Scale(domain=order, range=colours), legend=legend),
    )
    tips = [
        alt.Tooltip(name, title=words)
        for name, words in (("where:N", "position"), ("layer:Q", "layer"), (f"{field}:Q", "score"))
    ]
    tips.append(alt.Tooltip("status:N", title="status"))
    line = base.mark_line(strokeWidth=1.2, opacity=0.6)
    hollow = (
        base.mark_point(size=26, filled=False, strokeWidth=1.2).transform_filter("!datum.usable").encode(tooltip=tips)
    )
    full = base.mark_point(size=26, filled=True, opacity=1).transform_filter("datum.usable").encode(tooltip=tips)
    chosen = alt.Chart().transform_filter("datum.status == 'chosen'").encode(x="layer:Q", y=f"{field}:Q")
    ring = chosen.mark_point(size=190, filled=False, strokeWidth=2, style="marked")
    name = chosen.mark_text(dy=-16, fontSize=11).encode(text=alt.value("chosen"))
    return alt.layer(line, hollow, full, ring, name, data=MAIN)


def loss_curve(data: RunData) -> Figure | None:
    """Return the attack's loss by step and, where measured, the share of select prompts still refused."""
    steps = [step for step in data.steps if step.loss is not None]
    if not steps:
        return None
    every = max(1, -(-len(steps) // MAX_POINTS))
    kept = [step for number, step in enumerate(steps) if number % every == 0 or step is steps[-1]]
    best_loss = min(step.loss for step in steps if step.loss is not None)
    rows = [{"step": s.step, "loss": s.loss, "best": s.best_loss if s.best_loss is not None else s.loss} for s in kept]
    say = f"Loss of the attack over {len(steps)} steps, from {rows[0]['loss']:.2f} to {best_loss:.2f} at best."
    x = alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, grid=False), scale=alt.Scale(nice=False))
    tips = [alt.Tooltip("step:Q"), alt.Tooltip("loss:Q"), alt.Tooltip("best:Q", title="best so far")]
    base = alt.Chart(MAIN).encode(x=x)
    each = base.mark_line(strokeWidth=1, opacity=0.5, color=theme.POSITION_COLOURS[1]).encode(
        y=alt.Y("loss:Q", title="loss, nats per target token", scale=alt.Scale(zero=False))
    )
    best = base.mark_line(strokeWidth=2.2, color=theme.POSITION_COLOURS[0], interpolate="step-after").encode(y="best:Q")
    hover = base.mark_circle(size=50, opacity=0).encode(y="loss:Q", tooltip=tips)
    views = [View("loss", finish(alt.layer(each, best, hover), rows, 200, say))]
    measured = [{"step": s.step, "refused": s.select_refusal} for s in steps if s.select_refusal is not None]
    if measured:
        line = alt.Chart(MAIN).mark_line(point=True, color=theme.POSITION_COLOURS[0])
        axis = alt.Axis(format=".0%", tickCount=5)
        y = alt.Y("refused:Q", title="select prompts still refused", axis=axis, scale=alt.Scale(domain=[0, 1]))
        views.append(
            View(
                "refusals on select", finish(line.encode(x=x, y=y, tooltip=["step:Q", "refused:Q"]), measured, 200, say)
            )
        )
    caption = (
        "Thin: the loss of each step's candidate. Thick: the best so far. Refusals on select: replies that open with a "
        "refusal token."
    )
    columns = (("step", "step"), ("loss", "loss"), ("best", "best so far"), ("refused", "still refused"))
    return Figure("loss", "The attack's loss", caption, say, columns, tuple(views))
