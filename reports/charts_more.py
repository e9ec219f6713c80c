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
    dots,
    dots_height,
    finish,
    head_name,
    in_ink,
    position_label,
    projection_profile,
    refusal_rates,
    tips,
)
from reports.charts_causal import causal_tests
from reports.charts_circuit import circuit, circuit_control
from reports.charts_heads import attention_shift, head_grid
from reports.charts_lens import logit_lens
from reports.data import Row, RunData
from reports.defences import adaptive_curves, trade_off
from reports.direction import compliance, not_available

MAX_POINTS = 500


def figures(data: RunData) -> dict[str, Figure]:
    """Return every figure that the run's findings allow, by id."""
    makers: tuple[Callable[[RunData], Figure | None], ...] = (
        refusal_rates,
        projection_profile,
        attention_shift,
        interventions,
        head_grid,
        circuit,
        circuit_control,
        head_shift,
        causal_tests,
        logit_lens,
        trade_off,
        adaptive_curves,
        candidates,
        loss_curve,
    )
    made = (maker(data) for maker in makers)
    return {figure.id: figure for figure in made if figure is not None}


def interventions(data: RunData) -> Figure | None:
    """Return the refusal phrase rate with the direction left alone, ablated and added, on the report split."""
    rows = [row for row in data.table("interventions") if row["refusal_rate"] is not None and row["split"] == "report"]
    if not rows:
        return None
    words = {
        "none": "left alone",
        "random direction ablated": "random ablated",
        "random direction added": "random added",
        "random direction set to the harmless mean": "random set to harmless",
        "random direction set to the harmful mean": "random set to harmful",
        "set to the harmless mean": "set to harmless",
        "set to the harmful mean": "set to harmful",
    }
    n_controls = len({row.get("control") for row in rows if row.get("control") is not None})
    controls = {0: "", 1: "; and a random direction of the same length as a control"}
    controlled = controls.get(n_controls, "; and random directions of the same length as controls")

    def what(row: Row) -> str:
        number = f" ({row['control']})" if n_controls > 1 and row.get("control") is not None else ""
        return f"{row['kind']}: {words.get(row['intervention'], row['intervention'])}{number}"

    shown = [{**row, "what": what(row)} for row in rows]
    shown.sort(key=lambda row: (row["kind"], row["intervention"] != "none"))
    order = list(dict.fromkeys(row["what"] for row in shown))
    base = alt.Chart(MAIN).encode(
        y=alt.Y("what:N", sort=order, title=None, axis=alt.Axis(labelLimit=230)),
        color=alt.Color("kind:N", scale=alt.Scale(range=theme.POSITION_COLOURS), legend=None),
        tooltip=tips(
            ("what:N", "direction"), ("refusal_rate:Q", "rate"), ("refusal_lo:Q", "CI from"), ("refusal_hi:Q", "CI to")
        ),
    )
    axis = alt.Axis(format=".0%", tickCount=5)
    bar = base.mark_rule(strokeWidth=3, opacity=0.55).encode(
        x=alt.X("refusal_lo:Q", title="refusal phrase rate", scale=alt.Scale(domain=[0, 1]), axis=axis),
        x2=alt.X2("refusal_hi:Q"),
    )
    dot = base.mark_point(size=75, filled=True, opacity=1).encode(
        x=alt.X("refusal_rate:Q"), shape=alt.Shape("kind:N", legend=None)
    )
    label = in_ink(
        base.mark_text(dy=-11, fontSize=10).encode(
            x=alt.X("refusal_rate:Q"), text=alt.Text("refusal_rate:Q", format=".0%")
        )
    )
    say = "Refusal phrase rate without a suffix: " + ", ".join(
        f"{row['what']} {100 * row['refusal_rate']:.0f} %" for row in shown
    )
    caption = (
        "No suffix: the refusal direction left alone, ablated at every layer, taken out of the weights "
        "(orthogonalised), added at its own layer, or with its projection set to the mean of the other kind of prompts "
        f"at every layer{controlled}. " + " ".join(filter(None, (compliance(data), not_available(data))))
    )
    columns = (
        ("kind", "prompts"),
        ("intervention", "direction"),
        ("alpha", "α"),
        ("refusal_rate", "rate"),
        ("refusal_lo", "CI from"),
        ("refusal_hi", "CI to"),
        ("n_prompts", "n"),
    )
    spec = finish(alt.layer(bar, dot, label), shown, max(52 * len(shown), 130), say, lines=len(order), step=64)
    return Figure("interventions", "The direction itself", caption, say, columns, (View("all", spec),))


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
                chart = dots(mine, "name", order, value, f"{axis}: {region}", percent=value == "attention", pin=True)
                views.append(View(f"{words} {region}", finish(chart, mine, dots_height(mine, "name"), say)))
    if not views:
        return None
    caption = (
        "From chat[-1]; heads in the order of their contribution on the select split, values of the report split, "
        "bars: 95 % CI; a pinned head stands out. "
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
    least, most = (_must(data, *bound) for bound in (("induce_threshold", "≥"), ("kl_threshold", "≤")))
    for field, label, title in (
        ("refusal_score", "bypass", "refusal score, direction ablated (lower is better)"),
        ("steering_score", "induce", f"refusal score on harmless, direction added{least}"),
        ("kl_div_score", "KL", f"KL divergence at chat[-1], direction ablated{most}"),
    ):
        mine = [row for row in shown if row[field] is not None]
        if mine:
            views.append(View(label, finish(_candidate_chart(mine, order, field, title), mine, 260, say)))
    if not views:
        return None
    if apart := _separation(data, shown):
        places = [*order, *({row["where"] for row in apart} - set(order))]
        title = "held-out AUROC of the projection"
        views.append(View("AUROC", finish(_candidate_chart(apart, places, "auroc", title), apart, 260, say)))
    caption = (
        "Chosen on the select split: the smallest bypass among candidates that come early enough, keep harmless "
        "behaviour (KL) and induce refusal when added. Hollow points are ruled out."
    )
    if apart:
        caption += (
            " AUROC: harmful against harmless prompts of the report split along each candidate, and at the "
            "instruction's last token, which no suffix can change."
        )
    unscored = [row["layer"] for row in rows if row["status"] == "too late" and row["refusal_score"] is None]
    if unscored:
        caption += f" Layers from {min(unscored)} on come too late to be chosen and were not scored."
    if any(row["status"] == "does not induce" and row["refusal_score"] is None for row in rows):
        caption += " Bypass and KL were taken only of those that induce refusal."
    columns = (
        ("where", "position"),
        ("layer", "layer"),
        ("refusal_score", "bypass"),
        ("steering_score", "induce"),
        ("kl_div_score", "KL"),
        ("auroc", "AUROC"),
        ("norm", "norm"),
        ("status", "status"),
    )
    return Figure("candidates", "How the direction was chosen", caption, say, columns, tuple(views))


def _separation(data: RunData, candidates: list[Row]) -> list[Row]:
    """How well each candidate's projection tells the report split's harmful prompts from its harmless ones."""
    known = {(row["position"], row["layer"]): row for row in candidates}
    places = {row["position"]: row["where"] for row in candidates}

    def other(position: int) -> Row:
        """What is told of a place that is no candidate: another layer, or before the chat's tokens."""
        return {"where": places.get(position, "instruction[−1]"), "usable": True, "status": None, "token": None}

    found = [row for row in data.table("separation") if row["auroc"] is not None]
    return [{**known.get((row["position"], row["layer"]), other(row["position"])), **row} for row in found]


def _must(data: RunData, name: str, sign: str) -> str:
    """The bound that the settings put on a candidate, in words; nothing where they do not hold it."""
    bound = data.settings().get(name)
    return f" (must be {sign} {bound:g})" if isinstance(bound, (int, float)) else ""


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
    chosen = alt.Chart().transform_filter("datum.status == 'chosen'").encode(x=alt.X("layer:Q"), y=alt.Y(f"{field}:Q"))
    ring = chosen.mark_point(size=190, filled=False, strokeWidth=2, style="marked")
    name = chosen.mark_text(dy=-16, fontSize=11).encode(text=alt.TextValue("chosen"))
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
    best = base.mark_line(strokeWidth=2.2, color=theme.POSITION_COLOURS[0], interpolate="step-after").encode(
        y=alt.Y("best:Q")
    )
    hover = base.mark_circle(size=50, opacity=0).encode(y=alt.Y("loss:Q"), tooltip=tips)
    views = [View("loss", finish(alt.layer(each, best, hover), rows, 200, say))]
    measured = [{"step": s.step, "refused": s.select_refusal} for s in steps if s.select_refusal is not None]
    if measured:
        line = alt.Chart(MAIN).mark_line(point=True, color=theme.POSITION_COLOURS[0])
        axis = alt.Axis(format=".0%", tickCount=5)
        y = alt.Y("refused:Q", title="select prompts still refused", axis=axis, scale=alt.Scale(domain=[0, 1]))
        views.append(
            View(
                "refusals on select",
                finish(
                    line.encode(x=x, y=y, tooltip=[alt.Tooltip("step:Q"), alt.Tooltip("refused:Q")]), measured, 200, say
                ),
            )
        )
    attacks = sum(suffix.arm in ("adversarial", "failed") for suffix in data.suffixes)
    caption = (
        "Thin: the loss of each step's candidate. Thick: the best so far. Refusals on select: replies that open with a "
        f"refusal token.{f' The first of {attacks} attacks.' if attacks > 1 else ''}"
    )
    columns = (("step", "step"), ("loss", "loss"), ("best", "best so far"), ("refused", "still refused"))
    return Figure("loss", "The attack's loss", caption, say, columns, tuple(views))
