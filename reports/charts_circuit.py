"""The circuit: where the top heads take the refusal direction from, through which earlier heads, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from reports import theme
from reports.charts import MAIN, PINNED, Figure, View, differences, filled, head_name, is_pinned, opacity_where, outline
from reports.data import Row, RunData
from reports.escape import visible
from reports.evidence import first_of
from reports.numbers import count, plain

REGION_AT = {"instruction": 0.0, "suffix": 0.9, "system": 1.7, "bos": 2.3, "chat": 2.9}
TOKENS_FROM, HEADS_AT, APART, MLPS_AT, END_AT = 4.0, 3.2, 0.6, 2.2, 3.6  # APART: heads of one layer side by side
BOTTOM = -2.0
_NARROW = "width < 620"
_UPRIGHT = f"{_NARROW} && datum.y == {BOTTOM}"
_ARM_WORDS = {"none": "without suffix", "adversarial": "with the suffix"}


def circuit(data: RunData, most: float = 0.0) -> Figure | None:
    """Return the graph of paths into the top heads, a view for every arm of the table.

    ``most`` is the least weight that the widest edge stands for: that of another graph that stands beside this one.

    Where arms are compared it is the adversarial one's; the other stands beside it, see `circuit_control`.
    """
    states = _states(data)
    views: list[tuple[str, str, str | None]] = [(arm, arm, None) for arm in states]
    views += [(name, "adversarial", arm) for name, arm in differences(states)]
    caption = (
        "Up: layers. Left to right: where the top heads look from chat[−1] (regions of the prompt), earlier heads and "
        "MLPs at the chat tokens, the top heads, MLPs at chat[−1], the refusal direction. An edge's width is the root "
        "of what passes along r̂; solid edges towards refusal, dashed ones away. Paths are exact with attention frozen; "
        "shown: edges of at least 2 % of what the top heads bring (or MLPs write) on the select split, with weights of "
        f"the report split. Hover over an edge for its interval and what it is in the other arm."
        f"{_averaged(data)}"
    )
    return _figure(data, "circuit", "Circuit into the refusal direction", caption, states, views, most)


def largest_edge(data: RunData) -> float:
    """Return the largest weight of any edge, by size."""
    return max((abs(row["weight"]) for edges in _states(data).values() for row in edges.values()), default=0.0)


def _averaged(data: RunData) -> str:
    number = max(
        (row.get("n_suffixes") or 0 for row in data.table("circuit") if row["arm"] == "adversarial"), default=0
    )
    if number == 0:  # a run of an earlier version
        return first_of(data)
    return "" if number < 2 else f" Means over {count(number, 'suffix', 'suffixes')}."


def circuit_control(data: RunData) -> Figure | None:
    """Return the other arm's graph for every comparison, to stand beside the adversarial one's on the same scale."""
    states = _states(data)
    views = [(name, arm, "adversarial") for name, arm in differences(states)]
    caption = "The other arm of the comparison, widths on the same scale."
    return _figure(data, "circuit-control", "The same without it, or with a control", caption, states, views)


Key = tuple[Any, ...]
Edges = dict[Key, Row]


def _states(data: RunData) -> dict[str, Edges]:
    """The edges of every arm."""
    names = ("kind", "source_layer", "source_head", "position", "region", "target_layer", "target_head")
    found: dict[str, Edges] = {}
    for row in data.table("circuit"):
        if row["weight"] and "−" not in row["arm"]:  # what is 0 is no edge, as of a suffix where there is none
            found.setdefault(row["arm"], {})[tuple(row[name] for name in names)] = row
    return {arm: found[arm] for arm in theme.arm_order(set(found))}


def _figure(
    data: RunData,
    name: str,
    title: str,
    caption: str,
    states: dict[str, Edges],
    wanted: Sequence[tuple[str, str, str | None]],
    least: float = 0.0,
) -> Figure | None:
    """A figure of views (label, arm that is drawn, arm that its edges are compared with)."""
    if not wanted:
        return None
    keys = [key for edges in states.values() for key in edges]
    layers = data.summary.n_layers
    end = data.summary.direction.layer if data.summary.direction else layers
    top = 2 + max([end, *(key[5] for key in keys if key[5] is not None)])
    tokens = min((key[3] for key in keys if key[3] is not None), default=-1)
    most = max(least, largest_edge(data)) or 1.0
    slots = _slots(keys)
    say = "Graph of layers against sources: edges from regions and earlier heads into the top heads and the direction."
    frame = outline(_chart(top, tokens), 430, say, lines=1, step=620)
    views = []
    for label, arm, against in wanted:
        beside = None if against is None else (_ARM_WORDS.get(against, against), states[against])
        edges = [_edge(key, row, most, end, tokens, slots, beside) for key, row in states[arm].items()]
        spec = filled(frame, [*edges, *_nodes(edges)])
        words = _ARM_WORDS.get(arm, arm)
        views.append(View(words if against is None else f"{label}: {words}", spec, arm=label))
    columns = (("from", "from"), ("to", "to"), ("weight", "along r̂"), ("lo", "CI from"), ("hi", "CI to"))
    return Figure(name, title, caption, say, columns, tuple(views))


Slots = dict[tuple[str, int, int], float]


def _slots(keys: Iterable[Key]) -> Slots:
    """How far a head stands from the first one of its layer and column: early heads, top heads."""
    columns: dict[tuple[str, int], set[int]] = {}
    for kind, layer, head, _, _, target_layer, target_head in keys:
        if kind in ("early → head", "head → direction"):
            columns.setdefault(("early" if kind[0] == "e" else "top", layer), set()).add(head)
        if target_layer is not None:
            columns.setdefault(("early" if kind == "region → early" else "top", target_layer), set()).add(target_head)
    return {
        (column, layer, head): place * min(APART, 0.8 * MLPS_AT / max(1, len(heads) - 1))
        for (column, layer), heads in columns.items()
        for place, head in enumerate(sorted(heads))
    }


def _edge(
    key: Key, row: Row, most: float, end: int, tokens: int, slots: Slots, beside: tuple[str, Edges] | None
) -> Row:
    """One edge with both its ends placed; its words tell its weight in the arm that stands ``beside`` it, too."""
    placed = _placed(key, row["weight"], most, end, tokens, slots)
    placed |= {"lo": row.get("lo"), "hi": row.get("hi"), "tip": f"{placed['tip']}{_ci(row)}"}
    if beside is not None:
        words, others = beside
        other = others.get(key)
        told = "no such edge" if other is None else f"{plain(other['weight'])}{_ci(other)}"
        placed["tip"] += f"\n{words}: {told}"
    return placed


def _ci(row: Row) -> str:
    lo, hi = row.get("lo"), row.get("hi")
    return "" if lo is None or hi is None else f" (CI {plain(lo)} to {plain(hi)})"


def _placed(key: Key, weight: float, most: float, end: int, tokens: int, slots: Slots) -> Row:
    kind, layer, head, token, region, target_layer, target_head = key
    heads_at = TOKENS_FROM - tokens * 1.0 + HEADS_AT
    at_token = None if token is None else TOKENS_FROM + (token - tokens)
    place = f" at chat[{str(token).replace('-', '−')}]"
    target = None if target_layer is None else head_name(target_layer, target_head)
    if kind == "mlp → direction":
        start, stop = (heads_at + MLPS_AT, layer), (heads_at + END_AT, end)
        return _row(f"MLP {layer} at chat[−1]", "refusal direction", start, stop, weight, most, f"MLP {layer}")
    if kind == "head → direction":
        source = head_name(layer, head)
        start, stop = (heads_at + slots["top", layer, head], layer), (heads_at + END_AT, end)
        return _row(source, "refusal direction", start, stop, weight, most, source)
    assert target is not None
    start = (REGION_AT.get(region, REGION_AT["chat"]), BOTTOM)
    if kind == "region → early":
        assert at_token is not None
        stop = (at_token - slots["early", target_layer, target_head], target_layer)
        return _row(visible(region), target + place, start, stop, weight, most, target)
    to_head = (heads_at + slots["top", target_layer, target_head], target_layer)
    if kind == "region → head":
        return _row(visible(region), target, start, to_head, weight, most, target)
    assert at_token is not None
    if kind == "early → head":
        source = head_name(layer, head) + place
        start = (at_token - slots["early", layer, head], layer)
        # pinned with either of its heads
        return _row(source, target, start, to_head, weight, most, target) | {"also": head_name(layer, head)}
    source = ("embedding" if layer is None else f"MLP {layer}") + place
    start = (at_token + 0.35, BOTTOM if layer is None else layer)
    return _row(source, target, start, to_head, weight, most, target)


def _row(
    source: str,
    target: str,
    start: tuple[float, float],
    stop: tuple[float, float],
    weight: float,
    most: float,
    name: str,
) -> Row:
    return {
        "from": source, "to": target, "weight": weight, "sign": "−" if weight < 0 else "+",
        "share": (abs(weight) / most) ** 0.5,
        "x": start[0], "y": start[1], "x2": stop[0], "y2": stop[1], "name": name, "also": None, "node": None,
        "tip": f"{source} → {target}: {plain(weight)}",
    }  # fmt: skip


def _nodes(edges: list[Row]) -> list[Row]:
    """The ends of the edges, each once."""
    found: dict[tuple[str, float, float], Row] = {}
    for edge in edges:
        for label, x, y in ((edge["from"], edge["x"], edge["y"]), (edge["to"], edge["x2"], edge["y2"])):
            bare = label.split(" at chat")[0]
            is_head = bare.startswith("L") and ".H" in bare
            side = "right" if bare.startswith("MLP") else "under" if y == BOTTOM else "above"
            found[label, x, y] = {
                "node": label, "label": bare, "x": x, "y": y, "name": bare if is_head else "", "sign": None,
                "kind": "head" if is_head else "other", "tip": label, "side": side,
            }  # fmt: skip
    rows: dict[tuple[bool, float], list[Row]] = {}
    for node in found.values():
        if node["kind"] == "head":
            rows.setdefault((node["node"] != node["label"], node["y"]), []).append(node)
    # heads of one layer: the first one's label to the left, the others' in turn under and above
    for row in rows.values():
        for i, node in enumerate(sorted(row, key=lambda node: node["x"])):
            node["side"] = ("under", "above")[i % 2] if i else "left"
    return list(found.values())


def _chart(top: int, tokens: int) -> Any:
    right = TOKENS_FROM - tokens + HEADS_AT + END_AT + 0.6
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[-0.6, right], nice=False))
    y = alt.Y(
        "y:Q",
        title="layer",
        axis=alt.Axis(tickMinStep=1, grid=False, values=list(range(0, top, 5))),
        scale=alt.Scale(domain=[BOTTOM - 3.4, top], nice=False),
    )
    legend = alt.Legend(
        orient="bottom", title="towards (+) or away from (−) refusal", titleLimit=400
    )  # one for colour and dash
    near = f"pinned == '' || {is_pinned('name')} || {is_pinned('also')}"
    base = alt.Chart(MAIN)
    edges = (
        base.mark_rule(strokeCap="round")
        .transform_filter("datum.node == null")
        .encode(
            x=x,
            y=y,
            x2=alt.X2("x2:Q"),
            y2=alt.Y2("y2:Q"),
            size=alt.Size("share:Q", scale=alt.Scale(domain=[0, 1], range=[0.4, 9]), legend=None),
            color=alt.Color(
                "sign:N",
                scale=alt.Scale(domain=["+", "−"], range=["#d8773a", "#3f8fca"]),
                legend=legend,
            ),
            strokeDash=alt.StrokeDash(
                "sign:N", scale=alt.Scale(domain=["+", "−"], range=[[1, 0], [5, 4]]), legend=legend
            ),
            opacity=opacity_where(near, 0.75, 0.08),
            tooltip=alt.Tooltip("tip:N", title="edge"),
        )
    )
    nodes = base.mark_point(size=55, filled=True, style="marked").transform_filter("datum.node != null")
    marks = nodes.encode(
        x=x, y=y,
        shape=alt.Shape("kind:N", scale=alt.Scale(domain=["head", "other"], range=["circle", "square"]), legend=None),
        opacity=opacity_where(f"datum.kind == 'other' || {near}", 1, 0.25),
        tooltip=alt.Tooltip("tip:N", title="node"),
    )  # fmt: skip
    labels = (
        base.mark_text(
            # on a phone labels are smaller, and those of sources stand upright, else they run into each other
            fontSize=alt.expr(f"{_NARROW} ? 8 : 10"),
            angle=alt.expr(f"{_UPRIGHT} ? 270 : 0"),
            align=alt.expr(f"datum.side == 'left' || {_UPRIGHT} ? 'right' : datum.side == 'right' ? 'left' : 'center'"),
            dx=alt.expr(f"datum.side == 'left' || {_UPRIGHT} ? -7 : datum.side == 'right' ? 7 : 0"),
            dy=alt.expr(f"datum.side == 'above' ? -9 : datum.side == 'under' && !({_UPRIGHT}) ? 15 : 4"),
        )
        .transform_filter("datum.node != null")
        .encode(
            x=x,
            y=y,
            text=alt.Text("label:N"),
            opacity=opacity_where(f"datum.kind == 'other' || {near}", 1, 0.2),
        )
    )
    return alt.layer(edges, marks, labels).add_params(PINNED)
