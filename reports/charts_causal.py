"""The figure of the causal tests: which share of the suffix's effect each intervention undoes."""

from __future__ import annotations

from typing import Any

import altair as alt

from reports import theme
from reports.charts import MAIN, Figure, View, finish
from reports.data import Row, RunData
from reports.evidence import the_suffixes
from reports.mechanism import UNCHANGED, described
from reports.numbers import count, percent

SETS = ("top heads", "random heads", "all heads", "the direction")


def causal_tests(data: RunData) -> Figure | None:
    """Return the share of the suffix's effect that each intervention on the attacked run undoes."""
    rows = [described(row) for row in data.table("causal") if row["on"] == "attacked" and row["test"] != UNCHANGED]
    most = max((row.get("n_heads") or 0 for row in rows if row["heads"] == "top"), default=0)
    # smaller sets of heads belong to the set-size curve, which is in the table of the run folder
    rows = [row for row in rows if row["heads"] not in ("top", "random") or row.get("n_heads") == most]
    rows = [row for row in rows if row["projection_recovered"] is not None]
    if not rows:
        return None
    order = list(dict.fromkeys(row["what"] for row in rows))
    views = [
        View(label, _chart(rows, order, key))
        for label, key in (("projection", "projection_recovered"), ("refusal score", "score_recovered"))
        if any(row[key] is not None for row in rows)
    ]
    caption = (
        f"With {the_suffixes(rows[0].get('n_suffixes') or 1)} present, on "
        f"{count(rows[0]['n_prompts'], 'report prompt')}: the share of the effect that "
        "each intervention at the chat tokens undoes (1 = as without it). Heads were chosen on the select split; "
        "random ones are as many of the same layers, as far as these have others. Edges cut before the softmax leave "
        "their mass to the others; "
        "after it the mass is gone."
    )
    columns = (
        ("what", "intervention"),
        ("projection_recovered", "projection undone"),
        ("projection_recovered_lo", "CI from"),
        ("projection_recovered_hi", "CI to"),
        ("score_recovered", "refusal score undone"),
        ("score_recovered_lo", "CI from"),
        ("score_recovered_hi", "CI to"),
        ("refused", "refused"),
    )
    say = "Share of the suffix's effect on the projection undone: " + ", ".join(
        f"{row['what']} {percent(row['projection_recovered'])}" for row in rows
    )
    return Figure("causal", "What undoes the suffix", caption, say, columns, tuple(views))


def _chart(rows: list[Row], order: list[str], key: str) -> dict[str, Any]:
    legend = alt.Legend(orient="bottom", title=None, columns=2)  # one for colour and shape
    base = alt.Chart(MAIN).encode(
        y=alt.Y("what:N", sort=order, title=None, axis=alt.Axis(labelLimit=330)),
        color=alt.Color(
            "set:N", scale=alt.Scale(domain=list(SETS), range=theme.POSITION_COLOURS[: len(SETS)]),
            legend=legend,
        ),
        tooltip=[
            alt.Tooltip("what:N", title="intervention"),
            alt.Tooltip(f"{key}:Q", title="undone", format=".0%"),
            alt.Tooltip(f"{key}_lo:Q", title="CI from", format=".0%"),
            alt.Tooltip(f"{key}_hi:Q", title="CI to", format=".0%"),
        ],
    )  # fmt: skip
    axis = alt.Axis(format=".0%", tickCount=6)
    bar = base.mark_rule(strokeWidth=3, opacity=0.5).encode(
        x=alt.X(f"{key}_lo:Q", title="share of the suffix's effect undone", axis=axis), x2=f"{key}_hi:Q"
    )
    dot = base.mark_point(size=60, filled=True, opacity=1).encode(
        x=f"{key}:Q", shape=alt.Shape("set:N", scale=alt.Scale(domain=list(SETS)), legend=legend)
    )
    shown = [row for row in rows if row[key] is not None]
    say = f"Dots with intervals: share of the suffix's effect that {len(order)} interventions undo."
    return finish(alt.layer(bar, dot), shown, 22 * len(order), say, lines=len(order))
