"""Colours, dashes and shapes of the charts, and their Vega configuration in light and dark."""

from __future__ import annotations

from typing import Any

from reports.schema import ARMS

DASHES: dict[str, list[int]] = {
    "none": [1, 0],
    "adversarial": [1, 0],
    "random": [6, 3],
    "shuffled": [2, 2],
    "failed": [8, 2, 2, 2],
    "benign": [10, 4],
    "harmless": [3, 3],
    "harmless+adversarial": [6, 2, 1, 2],
    "lookalike": [1, 3],
}
SHAPES = {
    "none": "circle",
    "adversarial": "diamond",
    "random": "triangle-up",
    "shuffled": "triangle-down",
    "failed": "cross",
    "benign": "square",
    "harmless": "circle",
    "harmless+adversarial": "diamond",
    "lookalike": "square",
}
POSITION_COLOURS = ["#d55e00", "#3b8bc4", "#2aa77f", "#c06ba0", "#b8902a", "#6c7fd8", "#8a8f98", "#a8643c"]
"""Mid tones that stand out on white and on near-black alike."""

_ARM_COLOURS = {
    "light": ["#2b2f36", "#c84e00", "#0068a8", "#2f8fc9", "#b05a8d", "#00805c", "#7b818a", "#9a7400", "#6a51b8"],
    "dark": ["#e9ebee", "#ff8a4c", "#5fb0ee", "#9ad4f7", "#e79dc9", "#46cfa2", "#9aa1ab", "#e9bd4a", "#b3a2f2"],
}
_DIVERGING = {
    "light": ["#3f8fca", "#a9cfea", "#f6f6f4", "#f2c3a2", "#dd7e3e"],
    "dark": ["#2f86c9", "#1f4f78", "#1d2126", "#74401f", "#c4682a"],
}
_INK = {"light": ("#1f2328", "#59616b", "#e3e6ea"), "dark": ("#e8eaed", "#a3abb5", "#31363d")}
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


def arm_order(arms: set[str]) -> list[str]:
    """Return the arms in the page's order, unknown ones last and by name."""
    return [arm for arm in ARMS if arm in arms] + sorted(arms - set(ARMS))


def arm_domain(arms: set[str]) -> list[str]:
    """Return the colour domain: every known arm keeps its place, so that an arm has one colour in all charts."""
    return [*ARMS, *sorted(arms - set(ARMS))]


def vega_config(name: str) -> dict[str, Any]:
    """Return the Vega-Lite configuration of a theme, ``light`` or ``dark``."""
    ink, quiet, line = _INK[name]
    return {
        "background": "transparent",
        "font": _FONT,
        "view": {"stroke": None},
        "range": {"category": _ARM_COLOURS[name], "diverging": _DIVERGING[name]},
        "axis": {
            "labelColor": quiet,
            "titleColor": quiet,
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
            "titlePadding": 8,
            "gridColor": line,
            "domain": False,
            "tickColor": line,
            "tickSize": 4,
        },
        "axisY": {"ticks": False, "labelPadding": 6},
        "legend": {
            "labelColor": quiet,
            "titleColor": quiet,
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
            "symbolStrokeWidth": 2,
            "labelLimit": 150,
        },
        "text": {"color": ink},
        "rule": {"color": quiet},
        "line": {"strokeWidth": 2},
        "style": {"marked": {"stroke": ink, "color": ink}},
    }
