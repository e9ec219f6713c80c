"""Real prompts for the page: CircuitsVis views and token strips, without the suffix and with it side by side."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reports.charts import head_name
from reports.data import RunData
from reports.errors import ReportError
from reports.escape import token_text, visible
from reports.schema import Pattern

MAX_TOKENS = 120
"""Longer prompts are cropped to this many tokens: destinations and sources nearest to the reply."""
TOKEN_CHARS = 24
TITLES = {"none": "without suffix", "adversarial": "with the suffix", "random": "with a random suffix"}


def circuitsvis_bundle() -> str:
    """Return the JavaScript of CircuitsVis from its installed wheel; its Python, which loads torch, is not imported.

    Raises ReportError where the package is not installed whole.
    """
    found = find_spec("circuitsvis")  # importlib.resources would import it before Python 3.12
    for folder in found.submodule_search_locations or () if found else ():
        script = Path(folder) / "dist" / "cdn" / "iife.js"
        if script.is_file():
            return script.read_text(encoding="utf-8")
    raise ReportError("The circuitsvis package is not installed whole: run `pip install circuitsvis==1.43.3`.")


def prompt_views(data: RunData, max_prompts: int) -> list[dict[str, Any]]:
    """Return one record per prompt: its text and, per arm, tokens, regions, attention in thousandths, contributions.

    Only the lower triangle of a pattern is kept. Prompts come in the file's order, the arm ``none`` first.
    """
    texts = {prompt.id: prompt.text for prompt in data.prompts}
    grouped: dict[Any, list[Pattern]] = {}
    for pattern in data.patterns:
        grouped.setdefault(pattern.prompt_id, []).append(pattern)
    views = []
    for prompt_id, patterns in list(grouped.items())[:max_prompts]:
        patterns.sort(key=lambda pattern: (pattern.arm != "none", pattern.arm != "adversarial", pattern.arm))
        views.append(
            {
                "id": visible(str(prompt_id)),
                "text": visible(texts.get(prompt_id, "")) or visible(str(prompt_id)),
                "arms": (arms := [arm_view(pattern) for pattern in patterns]),
                "most": _most(arms),
            }
        )
    return views


def _most(arms: list[dict[str, Any]]) -> float:
    """Return the attention that gets full colour in all arms: what few tokens exceed but for the first, a sink."""
    weights = [w for arm in arms for head in arm["attention"] for row in head for w in row[1:] if w > 5]
    return max(50, sorted(weights)[int(0.98 * len(weights))] if weights else 1000) / 1000


def arm_view(pattern: Pattern) -> dict[str, Any]:
    """Return one prompt in one arm as page data, cropped to the last MAX_TOKENS tokens."""
    start = max(0, len(pattern.tokens) - MAX_TOKENS)
    tokens = [_clip(token_text(token), TOKEN_CHARS) for token in pattern.tokens[start:]]
    unknown = [[0.0] * len(pattern.tokens)] * len(pattern.heads)
    by_head = [[float(f"{value or 0.0:.3g}") for value in row[start:]] for row in pattern.contribution or unknown]
    regions = runs(pattern.regions[start:])
    return {
        "arm": pattern.arm,
        "title": TITLES.get(pattern.arm) or visible(pattern.arm),
        "suffix": None if pattern.suffix_id is None else visible(str(pattern.suffix_id)),
        "cropped": start,
        "tokens": tokens,
        "regions": regions,
        # counted from the end of their region: the same place in every arm, also where one is cropped
        "places": [f"{name} −{length - i}" for name, length in regions for i in range(length)],
        "heads": [head_name(*head) for head in pattern.heads],
        "attention": [
            [[round(1000 * value) for value in row[start : dest + 1]] for dest, row in enumerate(head) if dest >= start]
            for head in pattern.attention
        ],
        "by_head": by_head,
        "contribution": [float(f"{sum(column):.3g}") for column in zip(*by_head, strict=True)],
    }


def runs(regions: Sequence[str]) -> list[list[Any]]:
    """Return runs of equal region names as [name, number of tokens]."""
    out: list[list[Any]] = []
    for name in regions:
        if out and out[-1][0] == visible(name):
            out[-1][1] += 1
        else:
            out.append([visible(name), 1])
    return out


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
