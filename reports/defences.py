"""Detectors and mitigations: their tables in words, and the figure of attack success against over-refusal."""

from __future__ import annotations

from typing import Any

import altair as alt

from reports import theme
from reports.charts import MAIN, Figure, View, finish, tips
from reports.data import Row, RunData
from reports.escape import visible
from reports.numbers import NBSP, count, percent, percent_ci, plain, plain_ci

KINDS = ("defence", "control", "no defence")


def context(data: RunData) -> dict[str, Any]:
    """Return the template's rows of both tables; empty where `suffix-analysis defend` has not run."""
    tested = {row["defence"] for row in data.table("adaptive")}
    first = next(iter(data.table("mitigations")), None)
    return {
        "counts": "" if first is None else _counts(first),
        "timing": _timing(first),
        "detectors": [_detector_row(row) for row in data.table("detectors")],
        "mitigations": [_mitigation_row(row, tested) for row in data.table("mitigations")],
        "adaptive": "" if adaptive_curves(data) else adaptive(data),  # the figure's caption says it otherwise
    }


def adaptive(data: RunData) -> str:
    """Return what attacks on the defended model reached, in sentences; that none was run, where none was."""
    last = {row["defence"]: row for row in data.table("adaptive") if row["not_refused"] is not None}
    if not last:
        return "Adaptive attack: not tested."
    prices = {row["defence"]: row for row in data.table("adaptive_budget")}
    told = "; ".join(
        f"{visible(name)}: target loss {plain(row['target_loss'])}, {percent(row['not_refused'])} of the select "
        f"prompts not refused{_price(prices.get(name))}"
        + ("" if row.get("success") is None else f", {_success(row)} of {row['n_final']} report prompts answered")
        for name, row in last.items()
    )
    row = next(iter(last.values()))
    return (
        f"Attacks that know the defence, one each, {count(row['step'], 'step')} on "
        f"{count(row['n_train'], 'instruction')}, tried on {count(row['n_prompts'], 'other select prompt')}: {told}. "
        "Not refused: the reply does not open as a refusal; answered: by the verdict, with the best suffix. "
        "Descriptive."
    )


def _success(row: Row) -> str:
    return percent_ci(row["success"], row.get("success_lo"), row.get("success_hi"))


def _price(row: Row | None) -> str:
    if row is None:
        return ""
    if row["steps_to_half"] is None:
        return f" (half of them never within {count(row['n_steps'], 'step')})"
    return f" (half of them first at step{NBSP}{row['steps_to_half']})"


def adaptive_curves(data: RunData) -> Figure | None:
    """Return what attacks on defended models reach against steps: prompts not refused, and the target's loss."""
    rows = [row for row in data.table("adaptive") if row["not_refused"] is not None and row["target_loss"] is not None]
    if not rows:
        return None
    names = list(dict.fromkeys(row["defence"] for row in rows))
    legend = alt.Legend(orient="bottom", title=None, columns=1, labelLimit=420)
    scale = alt.Scale(domain=names, range=theme.POSITION_COLOURS[: len(names)])
    base = alt.Chart(MAIN).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, grid=False), scale=alt.Scale(nice=False)),
        color=alt.Color("defence:N", scale=scale, legend=legend),
        shape=alt.Shape("defence:N", scale=alt.Scale(domain=names), legend=legend),
        tooltip=tips(
            ("defence:N", "defence"), ("step:Q", "step"), ("not_refused:Q", "not refused"),
            ("target_loss:Q", "target loss"),
        ),
    )  # fmt: skip
    axis = alt.Axis(format=".0%", tickCount=5)
    share = alt.Y("not_refused:Q", title="other select prompts not refused", axis=axis, scale=alt.Scale(domain=[0, 1]))
    loss = alt.Y("target_loss:Q", title="loss, nats per target token", scale=alt.Scale(zero=False))
    say = "Attacks on defended models, at their last step: " + ", ".join(
        f"{name} {percent(next(row for row in reversed(rows) if row['defence'] == name)['not_refused'])} not refused"
        for name in names
    )
    views = tuple(
        View(label, finish(base.mark_line(point={"size": 60}).encode(y=y), rows, 240, say))
        for label, y in (("not refused", share), ("target loss", loss))
    )
    columns = (
        ("defence", "defence"), ("step", "step"), ("not_refused", "not refused"), ("target_loss", "target loss"),
        ("fires", "its detector fires"),
    )  # fmt: skip
    caption = f"All have the same budget and begin with the same neutral text (step 0). {adaptive(data)}"
    return Figure("adaptive", "What a defence costs an attacker who knows it", caption, say, columns, views)


def _detector_row(row: Row) -> dict[str, str]:
    return {
        "name": visible(row["detector"] or "") + (" (needs likelihoods)" if row.get("likelihood") else ""),
        "against": visible(row["against"] or ""),
        "auroc": plain_ci(row["auroc"], row["lo"], row["hi"], 3),
        "caught_1": percent_ci(row["caught_1"], row.get("caught_1_lo"), row.get("caught_1_hi")),
        "caught_5": percent_ci(row["caught_5"], row.get("caught_5_lo"), row.get("caught_5_hi")),
        "false": percent_ci(
            row.get("false_positives_1"), row.get("false_positives_1_lo"), row.get("false_positives_1_hi")
        ),
        "false_5": percent_ci(
            row.get("false_positives_5"), row.get("false_positives_5_lo"), row.get("false_positives_5_hi")
        ),
        "n": f"{row['n_prompts']} × {row['n_suffixes']}, {row['n_others']}{_descriptive(row)}",
        "marks": "–" if row.get("n_marks") is None else str(row["n_marks"]),
    }


def _counts(row: Row) -> str:
    """Return how many prompts and suffixes the mitigations were measured with, as a sentence with its blank."""
    prompts, suffixes = count(row["n_prompts"], "report prompt"), count(row["n_suffixes"], "suffix", "suffixes")
    return f"Mitigations: {prompts}, each with {suffixes}{_descriptive(row)}. "


def _descriptive(row: Row) -> str:
    return " (descriptive)" if row.get("descriptive") else ""


def _mitigation_row(row: Row, tested: set[str]) -> dict[str, str]:
    return {
        "name": visible(row["defence"] or "") + (" (control)" if row.get("control") else ""),
        "success": percent_ci(row["success"], row["success_lo"], row["success_hi"]),
        "refused": percent(row["refused"]),
        "harmless": percent(row.get("harmless")),
        "seconds": "–" if row.get("seconds") is None else f"{plain(1000 * row['seconds'], 1)}{NBSP}ms",
        "fires": _fires(row),
        "lookalike": "–"
        if row["lookalike"] is None
        else percent_ci(row["lookalike"], row["lookalike_lo"], row["lookalike_hi"]),
        "cost": "–" if row["cost"] is None else plain_ci(row["cost"], row.get("cost_lo"), row.get("cost_hi"), 3),
        "slower": percent(row["slower"]),
        "taken": percent(row.get("taken")),
        "adaptive": "one attack" if row["defence"] in tested else "not tested",
    }


def _fires(row: Row) -> str:
    """Return in which share of attacked prompts, look-alikes and harmless ones the detector fires; a dash without."""
    if row.get("fires_attacked") is None:
        return "–"
    return ", ".join(percent(row.get(f"fires_{kind}")) for kind in ("attacked", "lookalike", "harmless"))


def _timing(row: Row | None) -> str:
    """Return what times a token are measured beside, as a sentence with its blank."""
    if row is None:
        return ""
    beside = "as TransformerLens had wrapped it already" if row.get("wrapped") else "as it was loaded"
    at_once = "" if row.get("n_timed") is None else f", {count(row['n_timed'], 'reply', 'replies')} at once"
    return f"Slower: time a token{at_once}, beside the model {beside}. "


def _unbeaten(row: Row, rows: list[Row], over: str) -> bool:
    """Return whether no defence is as good in both and better in one of them; controls are none."""
    ours = [other for other in rows if other["kind"] != KINDS[1]]
    place = (row["success"], row[over])
    return row in ours and not any(
        other["success"] <= place[0] and other[over] <= place[1] and (other["success"], other[over]) != place
        for other in ours
    )


def trade_off(data: RunData) -> Figure | None:
    """Return attack success against refused look-alikes, a dot for every defence: the lower left is better.

    Where a run has no look-alikes harmless prompts take their place.
    """
    over = "lookalike" if any(row["lookalike"] is not None for row in data.table("mitigations")) else "harmless"
    words = {"lookalike": "look-alikes refused", "harmless": "harmless prompts refused"}[over]
    rows = [
        {**row, "kind": KINDS[2] if row["defence"] == "none" else KINDS[1] if row.get("control") else KINDS[0]}
        for row in data.table("mitigations")
        if row["success"] is not None and row.get(over) is not None
    ]
    if not rows:
        return None
    legend = alt.Legend(orient="bottom", title=None)
    axis = alt.Axis(format=".0%", tickCount=5)
    places = alt.Chart(MAIN).encode(
        x=alt.X(f"{over}:Q", title=words, axis=axis, scale=alt.Scale(zero=True, padding=12)),
        y=alt.Y("success:Q", title="attack success", axis=axis, scale=alt.Scale(domain=[0, 1])),
    )
    base = places.encode(
        color=alt.Color(
            "kind:N", scale=alt.Scale(domain=list(KINDS), range=theme.POSITION_COLOURS[: len(KINDS)]), legend=legend
        ),
        shape=alt.Shape("kind:N", scale=alt.Scale(domain=list(KINDS)), legend=legend),
        tooltip=tips(
            ("defence:N", "defence"), ("success:Q", "attack success"), (f"{over}:Q", words),
            ("cost:Q", "nats on harmless replies"),
        ),
    )  # fmt: skip
    say = f"Attack success and {words}: " + ", ".join(
        f"{row['defence']} {percent(row['success'])} and {percent(row[over])}" for row in rows
    )
    caption = (
        f"{count(rows[0]['n_prompts'], 'report prompt')}, {count(rows[0]['n_suffixes'], 'suffix', 'suffixes')} that "
        "nothing was fitted with. Success: answered, by the verdict. The lower left is better; the dashed line joins "
        "the defences that none equals in one and beats in the other."
    )
    columns = (
        ("defence", "defence"), ("success", "attack success"), ("success_lo", "CI from"), ("success_hi", "CI to"),
        ("lookalike", "look-alikes refused"), ("harmless", "harmless refused"), ("cost", "nats"), ("slower", "slower"),
    )  # fmt: skip
    rows = [row | {"best": _unbeaten(row, rows, over)} for row in rows]
    line = places.mark_line(interpolate="step-after", strokeDash=[4, 3], strokeWidth=1.2, color="#888")
    chart = line.transform_filter("datum.best") + base.mark_point(size=90, filled=True, opacity=1)
    return Figure(
        "defences", "What defences buy and cost", caption, say, columns, (View("all", finish(chart, rows, 260, say)),)
    )
