"""Altair charts as plain Vega-Lite dicts, each with a description, a caption and the columns of its data table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from reports import theme
from reports.data import Row, RunData
from reports.escape import lean, token_text
from reports.numbers import count

Spec = dict[str, Any]
_UNUSED = {"split", "measure"}
SHIFT_ARMS = ("none", "adversarial", "random")
OTHER_PROMPTS = ("harmless", "harmless+adversarial", "lookalike")
"""Arms of other prompts than the harmful ones: nothing of theirs is subtracted prompt by prompt."""


@dataclass(frozen=True)
class View:
    """One state of a figure, chosen by the reader: a button's label and a Vega-Lite spec.

    Views with an ``arm`` (and a ``measure``) are chosen by the workbench's controls instead of by buttons.
    """

    label: str
    spec: Spec
    measure: str | None = None
    arm: str | None = None


@dataclass(frozen=True)
class Figure:
    """A chart on the page: ``columns`` are (field, heading) pairs of the table behind it."""

    id: str
    title: str
    caption: str
    description: str
    columns: tuple[tuple[str, str], ...]
    views: tuple[View, ...]


def outline(chart: Any, height: int, description: str, *, lines: int = 0, step: int = 40) -> Spec:
    """Return the spec of a chart without its rows, as a dict: as wide as its box, no address in it.

    With ``lines``, the number of rows that long labels name, a narrow page puts each label above its row, ``step``
    pixels apart.
    """
    # unchecked: checking every spec against Vega-Lite's schema takes longer than making them (a test does it); and its
    # properties are set on the dict, because every change of an Altair chart copies all of it
    spec: Spec = chart.to_dict(validate=False)
    spec |= {"width": "container", "height": height, "description": description}
    if lines:
        axis = {"labelAlign": "left", "labelPadding": -2, "labelOffset": 9 - step // 2}
        spec["usermeta"] = {"above": {"height": step * lines, "axis": axis}}
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}


def filled(spec: Spec, rows: list[Row]) -> Spec:
    """Return a spec over its rows, floats rounded to 4 digits; views of one outline share all but these."""
    spec = dict(spec)
    spec["datasets"] = {"main": [{k: v for k, v in row.items() if k not in _UNUSED} for row in rows]}
    return dict(lean(spec))


def finish(chart: Any, rows: list[Row], height: int, description: str, *, lines: int = 0, step: int = 40) -> Spec:
    """Return the `outline` of a chart, `filled` with its rows."""
    return filled(outline(chart, height, description, lines=lines, step=step), rows)


MAIN = alt.NamedData("main")
"""Every chart draws from one data set of this name: it is stored once and is the table behind the chart."""


def differences(arms: Iterable[str]) -> list[tuple[str, str]]:
    """Return (name, arm) of the differences that are shown: the adversarial arm less each other on harmful prompts."""
    known = set(arms)
    others = [arm for arm in theme.arm_order(known) if arm not in ("adversarial", *OTHER_PROMPTS)]
    return [(f"adversarial − {arm}", arm) for arm in others if "−" not in arm] if "adversarial" in known else []


PINNED = alt.param(name="pinned", value="")
"""The pinned head's name, or that of a layer; the page's script sets it in every chart that has this parameter."""


def is_pinned(field: str) -> str:
    """Return the Vega expression that the head named in ``field`` is pinned, alone or with its layer."""
    return f"(datum.{field} == pinned || indexof(datum.{field} || '', pinned + '.') == 0)"


def head_name(layer: int, head: int) -> str:
    """Return the usual name of a head, L16.H4."""
    return f"{layer_name(layer)}.H{head}"


def layer_name(layer: int) -> str:
    """Return how a layer is named beside its heads, L16."""
    return f"L{layer}"


def _arm_legend(arms: set[str]) -> alt.Legend:
    return alt.Legend(orient="bottom", columns=3, title=None, values=theme.arm_order(arms), symbolOpacity=1)


def arm_colour(arms: set[str], *, legend: bool) -> alt.Color:
    """Return the arm → colour encoding, the same in every chart."""
    shown = _arm_legend(arms) if legend else None
    return alt.Color("arm:N", scale=alt.Scale(domain=theme.arm_domain(arms), range="category"), legend=shown)


def arm_shape(arms: set[str], *, legend: bool = False) -> alt.Shape:
    """Return the arm → point shape encoding."""
    domain = theme.arm_domain(arms)
    shown = _arm_legend(arms) if legend else None
    return alt.Shape(
        "arm:N", scale=alt.Scale(domain=domain, range=[theme.SHAPES.get(arm, "stroke") for arm in domain]), legend=shown
    )


def opacity_where(test: str, yes: float, no: float) -> alt.OpacityValue:
    """Return the opacity ``yes`` of marks for which the Vega expression ``test`` holds, ``no`` of all others."""
    return alt.OpacityValue(no, condition={"test": test, "value": yes})


def tips(*pairs: tuple[str, str]) -> list[alt.Tooltip]:
    """Return tooltips from (field, title) pairs."""
    return [alt.Tooltip(field, title=title) for field, title in pairs]


def in_ink(layer: Any) -> Any:
    """Return a layer of text without its colour, so that it has the theme's: small text in an arm's is hard to read."""
    layer.encoding.color = alt.Undefined
    return layer


def refusal_rates(data: RunData) -> Figure | None:
    """Return the refusal phrase rate per arm on the report split, dots with 95 % intervals."""
    rows = [row for row in data.table("refusal") if row["split"] == "report" and row["refusal_rate"] is not None]
    if not rows:
        return None
    arms = {row["arm"] for row in rows}
    order = theme.arm_order(arms)
    base = alt.Chart(MAIN).encode(
        y=alt.Y("arm:N", sort=order, title=None, axis=alt.Axis(labelLimit=150)),
        color=arm_colour(arms, legend=False),
        tooltip=tips(
            ("arm:N", "arm"), ("refusal_rate:Q", "rate"), ("refusal_lo:Q", "CI from"), ("refusal_hi:Q", "CI to")
        ),
    )
    axis = alt.Axis(format=".0%", tickCount=5)
    bar = base.mark_rule(strokeWidth=3, opacity=0.55, strokeCap="round").encode(
        x=alt.X("refusal_lo:Q", title="refusal phrase rate", scale=alt.Scale(domain=[0, 1]), axis=axis),
        x2=alt.X2("refusal_hi:Q"),
    )
    dot = base.mark_point(size=75, filled=True, opacity=1).encode(x=alt.X("refusal_rate:Q"), shape=arm_shape(arms))
    label = in_ink(
        base.mark_text(dy=-11, fontSize=10).encode(
            x=alt.X("refusal_rate:Q"), text=alt.Text("refusal_rate:Q", format=".0%")
        )
    )
    say = "Refusal phrase rate per arm, with 95 % intervals: " + ", ".join(
        f"{row['arm']} {100 * row['refusal_rate']:.0f} %"
        for row in sorted(rows, key=lambda row: order.index(row["arm"]))
    )
    sizes = sorted({int(row["n_prompts"]) for row in rows})
    span = count(sizes[0], "prompt") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} prompts"
    caption = f"Share of replies that hold a refusal phrase; report split, {span} an arm; bars: 95 % CI."
    columns = (
        ("arm", "arm"),
        ("refusal_rate", "rate"),
        ("refusal_lo", "CI from"),
        ("refusal_hi", "CI to"),
        ("n_prompts", "prompts"),
        ("n_suffixes", "suffixes"),
        ("complied_rate", "complied"),
        ("resampled", "resampled"),
        ("descriptive", "descriptive"),
    )
    spec = finish(alt.layer(bar, dot, label), rows, max(42 * len(rows), 130), say)
    return Figure("refusal", "Refusal phrase rate", caption, say, columns, (View("all", spec),))


def projection_profile(data: RunData) -> Figure | None:
    """Return the projection on the refusal direction by layer, one view per measure."""
    rows = data.table("profile")
    if not rows:
        return None
    names = {
        "normalised": ("normalised", "normalised projection (0 harmless, 1 harmful)"),
        "cosine": ("cosine", "cosine with the direction"),
        "projection": ("raw", "projection, units of the residual stream"),
    }
    direction = data.summary.direction
    say = "Projection at chat[-1] on the refusal direction by layer, one line per arm, with 95 % bands."
    views = []
    small = _uncertain(rows)
    for measure, (label, title) in names.items():
        mine = [dict(row) for row in rows if row["measure"] == measure and row["mean"] is not None]
        if measure == "normalised":
            mine = [row for row in mine if row["layer"] not in small]
        if mine:
            chart = layer_lines(mine, title, None if direction is None else direction.layer)
            views.append(View(label, finish(chart, mine, 250, say)))
    if not views:
        return None
    caption = (
        "At chat[-1], input of each layer; bands: 95 % CI. The dashed rule marks the layer of the chosen direction."
    )
    if small:
        caption += (
            f" Normalised: {count(len(small), 'layer', 'layers')} left out where the interval without a suffix is "
            "wider than a third of the way from harmless to harmful."
        )
    columns = (
        ("arm", "arm"),
        ("layer", "layer"),
        ("mean", "mean"),
        ("lo", "CI from"),
        ("hi", "CI to"),
        ("n_prompts", "prompts"),
    )
    return Figure("profile", "Projection by layer", caption, say, columns, tuple(views))


def _uncertain(rows: Sequence[Row]) -> set[int]:
    """Return the layers at which normalised values say little: harmful and harmless means hardly differ there.

    Judged by prompts without a suffix: their interval is wider than a third of the way from harmless to harmful.
    """
    return {
        row["layer"]
        for row in rows
        if row["measure"] == "normalised" and row["arm"] in ("none", "harmless") and None not in (row["lo"], row["hi"])
        if row["hi"] - row["lo"] > 1 / 3
    }


def layer_lines(rows: list[Row], title: str, layer: int | None = None) -> Any:
    """Return lines over the layers with their bands, one per arm; ``layer`` gets a rule, a pinned layer a thin one."""
    arms = {row["arm"] for row in rows}
    domain = theme.arm_domain(arms)
    legend = alt.Legend(
        orient="bottom",
        columns=3,
        title=None,
        values=theme.arm_order(arms),
        symbolType="stroke",
        symbolOpacity=1,
        symbolSize=300,
    )
    base = alt.Chart(MAIN).encode(
        x=alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, grid=False), scale=alt.Scale(nice=False)),
        color=arm_colour(arms, legend=True).legend(legend),
    )
    band = base.mark_area(opacity=0.14).encode(y=alt.Y("lo:Q", title=title), y2=alt.Y2("hi:Q"))
    line = base.mark_line().encode(
        y=alt.Y("mean:Q"),
        strokeDash=alt.StrokeDash(
            "arm:N", scale=alt.Scale(domain=domain, range=[theme.DASHES.get(a, [1, 1]) for a in domain]), legend=legend
        ),
    )
    hover = (
        base.mark_circle(size=60, opacity=0, cursor="pointer")
        .transform_calculate(name=_LAYER)
        .encode(
            y=alt.Y("mean:Q"),
            tooltip=tips(
                ("arm:N", "arm"), ("layer:Q", "layer"), ("mean:Q", "mean"), ("lo:Q", "CI from"), ("hi:Q", "CI to")
            ),
        )
    )
    here = f"pinned == {_LAYER} || indexof(pinned, {_LAYER} + '.') == 0"
    pin = alt.Chart(MAIN).mark_rule(strokeWidth=4, aria=False).transform_aggregate(groupby=["layer"])
    layers = [pin.encode(x=alt.X("layer:Q"), opacity=opacity_where(here, 0.25, 0)), band, line, hover]
    if layer is not None:
        for row in [row for row in rows if row["layer"] == layer][:1]:
            row["marked"] = True
        rule = alt.Chart(MAIN).mark_rule(strokeDash=[4, 3]).encode(x=alt.X("layer:Q"))
        layers.insert(0, rule.transform_filter("datum.marked"))
    return alt.layer(*layers).add_params(PINNED)


_LAYER = "('L' + datum.layer)"  # layer_name, in a chart


def dots(
    rows: list[Row], field: str, order: list[str], value: str, title: str, *, percent: bool, pin: bool = False
) -> Any:
    """Return dots with interval bars: rows of ``field``, arms beside each other, ``value`` with _lo and _hi columns.

    With ``pin`` the rows are heads, and all but the pinned one fade.
    """
    arms = {row["arm"] for row in rows}
    axis = alt.Axis(format=".0%", tickCount=5) if percent else alt.Axis(tickCount=5)
    base = alt.Chart(MAIN).encode(
        y=alt.Y(f"{field}:N", sort=order, title=None, scale=alt.Scale(paddingInner=0.35), axis=alt.Axis(grid=False)),
        yOffset=alt.YOffset("arm:N", sort=theme.arm_order(arms)),
        color=arm_colour(arms, legend=True),
        tooltip=tips(
            (f"{field}:N", field),
            ("arm:N", "arm"),
            (f"{value}:Q", title),
            (f"{value}_lo:Q", "CI from"),
            (f"{value}_hi:Q", "CI to"),
        ),
    )
    near = f"pinned == '' || {is_pinned(field)}"
    bar = base.mark_rule(strokeWidth=2.5).encode(
        x=alt.X(f"{value}_lo:Q", title=title, axis=axis), x2=alt.X2(f"{value}_hi:Q"),
        opacity=opacity_where(near, 0.55, 0.12) if pin else alt.OpacityValue(0.55),
    )  # fmt: skip
    dot = base.mark_point(size=42, filled=True).encode(
        x=alt.X(f"{value}:Q"), shape=arm_shape(arms, legend=True),
        opacity=opacity_where(near, 1, 0.2) if pin else alt.OpacityValue(1),
    )  # fmt: skip
    return alt.layer(bar, dot).add_params(PINNED) if pin else alt.layer(bar, dot)


def dots_height(rows: list[Row], field: str) -> int:
    """Return the height in pixels of a ``dots`` chart: a line per arm, a gap between rows of ``field``."""
    arms = len({row["arm"] for row in rows})
    return len({row[field] for row in rows}) * (11 * arms + 12)


def position_label(position: int, token: str | None) -> str:
    """Return ``chat[−1] ⏎``: a position after the instruction with its token made visible."""
    return f"chat[{str(position).replace('-', '−')}] {token_text(token or '')[:14]}"
