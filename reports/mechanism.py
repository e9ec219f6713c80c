"""How the suffix acts: causal tests as a figure, what carries the fall in projection as tables and in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import altair as alt

from reports import theme
from reports.charts import MAIN, Figure, View, finish
from reports.data import Row, RunData
from reports.numbers import count, percent, percent_ci, plain

SETS = ("top heads", "random heads", "all heads", "the direction")
_WORDS = {"top": "top heads", "random": "random heads", "all": "all heads", "none": "the direction"}
_NOT_SHOWN = ("nothing changed",)
FACTOR_WORDS = {
    "query": "chat[-1] asks for something else (query)",
    "dilution": "the suffix's keys take part in the softmax (dilution)",
    "chat keys": "the chat tokens' own keys changed",
    "displacement": "chat[-1] stands further away (position)",
    "scale": "the norm behind attention scales otherwise",
}


def causal_tests(data: RunData) -> Figure | None:
    """Return the share of the suffix's effect that each intervention on the attacked run undoes."""
    rows = [_shown(row) for row in data.table("causal") if row["on"] == "attacked" and row["test"] not in _NOT_SHOWN]
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
        f"With the suffix present, on {count(rows[0]['n_prompts'], 'report prompt')}: the share of its effect that "
        "each intervention at the chat tokens undoes (1 = as without it). Heads were chosen on the select split; "
        "random ones are as many of the same layers. Edges cut before the softmax leave their mass to the others; "
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


def _shown(row: Row) -> Row:
    dose = "" if row.get("dose") in (None, 1.0) else f" by {percent(row['dose'])}"
    heads = _WORDS.get(row["heads"], str(row["heads"]))
    what = f"{row['test']}{dose}" + ("" if row["heads"] == "none" else f", {heads}")
    return {**row, "what": what, "set": heads}


def _chart(rows: list[Row], order: list[str], key: str) -> dict[str, Any]:
    base = alt.Chart(MAIN).encode(
        y=alt.Y("what:N", sort=order, title=None, axis=alt.Axis(labelLimit=330)),
        color=alt.Color(
            "set:N", scale=alt.Scale(domain=list(SETS), range=theme.POSITION_COLOURS[: len(SETS)]),
            legend=alt.Legend(orient="bottom", title=None),
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
        x=f"{key}:Q", shape=alt.Shape("set:N", scale=alt.Scale(domain=list(SETS)), legend=None)
    )
    shown = [row for row in rows if row[key] is not None]
    say = f"Dots with intervals: share of the suffix's effect that {len(order)} interventions undo."
    return finish(alt.layer(bar, dot), shown, 22 * len(order), say)


def context(data: RunData) -> dict[str, Any]:
    """Return the template's rows: what carries the fall, why the instruction counts less, the tests with replies."""
    summed = [row for row in data.table("factors") if row["layer"] == -1]
    return {
        "carried": [_share_row(row, row["term"]) for row in data.table("carried")],
        "factors": [
            _share_row(row, FACTOR_WORDS.get(row["factor"], str(row["factor"])))
            for row in summed
            if row["factor"] != "scale" or row["value"]
        ],
        "replied": [
            {
                "what": _shown(row)["what"] if row["test"] not in _NOT_SHOWN else "left alone",
                "on": "with the suffix" if row["on"] == "attacked" else "without it",
                "score": f"{plain(row['score_before'])} → {plain(row['score_after'])}",
                "refused": percent_ci(row["refused"], row["refused_lo"], row["refused_hi"]),
            }
            for row in data.table("causal")
            if row.get("refused") is not None
        ],
    }


def _share_row(row: Row, name: str) -> dict[str, str]:
    share = "–"
    if row["share"] is not None:
        share = percent_ci(row["share"], row["share_lo"], row["share_hi"])
    return {
        "name": name,
        "value": plain(row["value"]),
        "ci": f"{plain(row['lo'])} to {plain(row['hi'])}",
        "share": share,
    }


def sentences(data: RunData) -> Iterator[str]:
    """Yield what the causal tests and the split of the fall say, where the tables are there."""
    carried = {row["term"]: row for row in data.table("carried")}
    top = carried.get("top heads")
    factors = {row["factor"]: row for row in data.table("factors") if row["layer"] == -1}
    clauses = []
    if top and top["share"] is not None:
        clauses.append(
            "The top heads carry "
            f"{percent_ci(top['share'], top['share_lo'], top['share_hi'])} of the fall in projection"
        )
    query, dilution = factors.get("query"), factors.get("dilution")
    if query and dilution and query["share"] is not None and dilution["share"] is not None:
        clauses.append(
            "of the change in what they bring from the instruction "
            f"{percent_ci(query['share'], query['share_lo'], query['share_hi'])} comes from a changed query and "
            f"{percent_ci(dilution['share'], dilution['share_lo'], dilution['share_hi'])} from dilution"
        )
    if clauses:
        yield "; ".join(clauses) + "."
    rows = [row for row in data.table("causal") if row["on"] == "attacked" and row.get("refused") is not None]
    before = next((row for row in rows if row["test"] == "nothing changed"), None)
    told = [
        (words, row)
        for row in rows
        for test, heads, words in (
            ("projection restored", "none", "giving the projection back"),
            ("suffix edges cut, mass renormalised", "all", "cutting all edges from the suffix to the chat tokens"),
        )
        if row["test"] == test and row["heads"] == heads and (row.get("dose") in (None, 1.0))
    ]
    if before and told:
        yield (
            f"With the suffix present, {percent(before['refused'])} of these prompts are refused; "
            + "; ".join(
                f"{words} brings that to {percent_ci(row['refused'], row['refused_lo'], row['refused_hi'])}"
                for words, row in told
            )
            + "."
        )
