"""Everything the page shows, as one context for the template and one JSON-ready payload for its script."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports import defences, direction, mechanism, text, theme
from reports.attention import prompt_views
from reports.charts import Figure, head_name, position_label
from reports.data import Row, RunData, missing_lines
from reports.escape import lean, visible
from reports.evidence import adversarial_count
from reports.numbers import count, plain, plain_ci, seconds
from reports.pinned import pinned_heads
from reports.schema import Suffix


@dataclass(frozen=True)
class Budget:
    """How much of the bulky material the page carries: prompts with patterns, characters of a reply, reply rows."""

    patterns: int
    reply_chars: int
    rows: int


BUDGETS = (Budget(8, 1200, 1500), Budget(4, 400, 1000), Budget(2, 160, 500), Budget(1, 0, 200), Budget(0, 0, 0))
"""From generous to bare; the first that fits the size limit is used."""

SUFFIX_ROWS = 200
KINDS = {"harmful": 0, "harmless": 1, "lookalike": 2}
TEXT_CHARS = 4000


def clip(value: str, limit: int) -> str:
    """Return text cut to ``limit`` characters with a note of how much is left out."""
    return (
        value if len(value) <= limit else f"{value[:limit]} … ({len(value) - limit} more characters in the run folder)"
    )


def payload(data: RunData, charts: dict[str, Figure], budget: Budget) -> dict[str, Any]:
    """Return what the page's script reads: chart specs, themes, prompt views, replies. Floats have 4 digits."""
    return {
        "themes": {name: theme.vega_config(name) for name in ("light", "dark")},
        "figures": {name: figure_payload(figure) for name, figure in charts.items()},
        "prompts": prompt_views(data, budget.patterns),
        "replies": replies(data, budget),
        "pinned": pinned_heads(data),
    }


def figure_payload(figure: Figure) -> dict[str, Any]:
    """Return a figure as the page's script reads it."""
    return {
        "columns": figure.columns,
        "views": [
            {"label": view.label, "spec": shown_spec(view.spec), "measure": view.measure, "arm": view.arm}
            for view in figure.views
        ],
    }


def shown_spec(value: Any) -> Any:
    """Return a spec with every string made visible: arm names and the like come from files."""
    if isinstance(value, str):
        return visible(value, newlines=True)  # a tooltip's own lines
    if isinstance(value, dict):
        return {key: shown_spec(item) for key, item in value.items()}
    return [shown_spec(item) for item in value] if isinstance(value, list) else value


def replies(data: RunData, budget: Budget) -> dict[str, Any]:
    """Return the replies grouped by prompt; equal texts are stored once and referred to by index."""
    prompts = {prompt.id: prompt for prompt in data.prompts}
    texts: dict[str | None, int] = {}  # None: only in the run folder
    verdicts: dict[str, int] = {}
    grouped: dict[Any, dict[str, Any]] = {}
    arms: dict[str, set[str]] = {}
    for row in data.table("replies"):
        entry = grouped.get(row["prompt_id"])
        if entry is None:
            if len(grouped) >= budget.rows:
                continue
            prompt = prompts.get(row["prompt_id"])
            entry = {
                "id": visible(str(row["prompt_id"])),
                "text": clip(visible(prompt.text if prompt else ""), TEXT_CHARS),
                "topic": visible((prompt.topic or "") if prompt else ""),
                "kind": visible(row["kind"] or ""),
                "split": visible(row["split"] or ""),
                "cells": {},
                "rates": {},
                "fate": "",
            }
            grouped[row["prompt_id"]] = entry
        arm = visible(row["arm"] or "")
        arms.setdefault(entry["kind"], set()).add(arm)
        shown = clip(visible(row["reply"] or "", newlines=True), budget.reply_chars) if budget.reply_chars else None
        entry["cells"].setdefault(arm, []).append(
            [
                visible(str(row["suffix_id"])) if row["suffix_id"] is not None else "",
                verdicts.setdefault(visible(row["verdict"] or "no verdict"), len(verdicts)),
                None if row["refused"] is None else bool(row["refused"]),
                row["refusal_score"],
                texts.setdefault(shown, len(texts)),
            ]
        )
    for entry in grouped.values():
        entry["rates"] = {arm: _rate(cell) for arm, cell in entry["cells"].items()}
        entry["fate"] = _fate(entry)
    total = len({row["prompt_id"] for row in data.table("replies")})
    return {
        "rows": list(grouped.values()),
        "arms": {
            kind: theme.arm_order(arms[kind]) for kind in sorted(arms, key=lambda kind: (KINDS.get(kind, 9), kind))
        },
        "texts": list(texts),
        "verdicts": list(verdicts),
        "left_out": total - len(grouped),
    }


def _fate(entry: dict[str, Any]) -> str:
    """Return whether a prompt that is refused is so with the suffix too (kept), or not (flipped); else nothing."""
    bare, attacked = {
        "harmful": ("none", "adversarial"),
        "harmless": ("harmless", "harmless+adversarial"),
    }.get(entry["kind"], ("", ""))
    before, after = (entry["rates"].get(arm) for arm in (bare, attacked))
    if before is None or after is None or before[0] < 0.5:
        return ""
    return "kept" if after[0] >= 0.5 else "flipped"


def _rate(cell: list[list[Any]]) -> list[float] | None:
    """Return the share of an arm's replies to one prompt that refuse, and their mean refusal score: to sort by."""
    refused = [reply[2] for reply in cell if reply[2] is not None]
    scores = [reply[3] for reply in cell if isinstance(reply[3], (int, float)) and math.isfinite(reply[3])]
    return [sum(refused) / len(refused), sum(scores) / max(1, len(scores))] if refused else None


def context(data: RunData, charts: dict[str, Figure], budget: Budget) -> dict[str, Any]:
    """Return the template's variables; every string that came from a file is made visible here."""
    summary = data.summary
    chosen = next((suffix for suffix in data.suffixes if suffix.id == summary.suffix_id), None)
    chosen = chosen or next((suffix for suffix in data.suffixes if suffix.arm == "adversarial"), None)
    named = summary.embedded and summary.model == "embedded"
    return {
        "run": visible(data.name),
        "model": "the embedded model (SmolLM2-135M-Instruct + refusal adapter)" if named else visible(summary.model),
        "suffix": None if chosen is None else clip(visible(chosen.text), TEXT_CHARS),
        "pool": adversarial_count(data),
        "facts": facts(data, chosen),
        "headline": text.headline(data),
        "figures": charts,
        "checked": text.checked(data),
        "not_checked": text.not_checked(data),
        "unfinished": unfinished(data),
        "missing": missing_lines(data),
        "has_patterns": bool(data.patterns) and budget.patterns > 0,
        "has_replies": bool(data.table("replies")) and budget.rows > 0,
        "suffixes": [_suffix_row(suffix) for suffix in data.suffixes[:SUFFIX_ROWS]],
        "suffixes_left_out": max(0, len(data.suffixes) - SUFFIX_ROWS),
        "contrasts": [_contrast_row(row) for row in data.table("contrasts")],
        "mechanism_contrasts": [_contrast_row(row) for row in mechanism.against_controls(data)],
        "top_heads": [
            (row["rank"], head_name(row["layer"], row["head"]), plain(row["select_contribution"]))
            for row in sorted(data.table("top_heads"), key=lambda row: row["rank"] or 0)
        ],
        "mechanism": mechanism.context(data),
        "defences": defences.context(data),
        "direction": direction.context(data),
        "abilities": [_ability_row(row) for row in data.table("abilities")],
        "runners": runners_up(data),
        "config": clip(visible(data.config, newlines=True), 20_000),
        "versions": versions(data.env),
        "timing": timing(data),
        "repeat": repeat_command(data.place, data.name),
        "export": export_command(data.place),
        "trimmed": budget is not BUDGETS[0],
    }


def facts(data: RunData, chosen: Suffix | None) -> list[str]:
    """Return short facts for the line under the title."""
    summary = data.summary
    lines = [f"{count(summary.n_layers, 'layer')} × {count(summary.n_heads, 'head')}, width {summary.d_model}"]
    if chosen is not None:
        number = adversarial_count(data)
        which = f"first of {count(number, 'suffix', 'suffixes')}:" if number > 1 else "suffix"
        lines.append(f"{which} {visible(str(chosen.id))}, {count(chosen.n_tokens, 'token')}")
        if chosen.trained_on:
            lines.append(f"trained on {count(len(chosen.trained_on), 'prompt')}")
    if summary.target and not data.settings().get("suffixes"):  # given suffixes were made for a target unknown here
        lines.append(f"target “{clip(visible(summary.target), 60)}”")
    if summary.direction:
        d = summary.direction
        lines.append(f"direction at layer {d.layer}, {position_label(d.position, d.token)}")
    return lines


def _suffix_row(suffix: Suffix) -> dict[str, Any]:
    return {
        "id": visible(str(suffix.id)),
        "arm": visible(suffix.arm),
        "n_tokens": suffix.n_tokens,
        "loss": plain(suffix.loss, 3),
        "trained_on": len(suffix.trained_on) if suffix.trained_on else None,
        "text": clip(visible(suffix.text), 400),
        "ids": " ".join(str(token) for token in suffix.ids[:200]),
        "seed": suffix.seed,
    }


def _contrast_row(row: Row) -> dict[str, Any]:
    """A difference between two arms (or a causal test and its control) as the template shows it."""
    return {
        "measure": visible(row["measure"] or ""),
        "pair": f"{visible(row['arm'] or '')} − {visible(row['against'] or '')}",
        "estimate": plain(row["estimate"]),
        "ci": f"{plain(row['lo'])} to {plain(row['hi'])}",
        "n": f"{row['n_prompts']} × {row['n_suffixes']}",
        "verdict": _verdict(row),
    }


def _verdict(row: Row) -> str:
    if row.get("descriptive"):
        return "descriptive"
    told, bound = row.get("verdict"), row.get("equivalent")
    return f"no larger than {plain(bound)}" if told == "within the bound" else visible(str(told or ""))


def _ability_row(row: Row) -> dict[str, Any]:
    return {
        "task": f"{visible(row['task'] or '')}, {visible(row['metric'] or '')}",
        "intervention": visible(row["intervention"] or ""),
        "value": plain(row["value"], 3)
        if row["value"] is not None
        else visible(str(row.get("note") or "not available")),
        "change": plain_ci(row["change"], row["lo"], row["hi"], 3) if row["change"] is not None else "–",
        "n": row["n"],
    }


def runners_up(data: RunData, limit: int = 8) -> list[dict[str, Any]]:
    """Return the chosen candidate direction and the next best that were allowed, by bypass score."""
    rows = [
        row
        for row in data.table("candidates")
        if row["status"] in ("chosen", "kept") and row["refusal_score"] is not None
    ]
    rows.sort(key=lambda row: (row["status"] != "chosen", row["refusal_score"]))
    return [
        {
            "where": position_label(row["position"], row["token"]),
            "layer": row["layer"],
            "bypass": plain(row["refusal_score"]),
            "induce": plain(row["steering_score"]),
            "kl": plain(row["kl_div_score"], 3),
            "norm": plain(row["norm"], 1),
            "chosen": row["status"] == "chosen",
        }
        for row in rows[:limit]
    ]


def versions(env: Row) -> list[tuple[str, str]]:
    """Return the environment as pairs: machine first, then packages."""
    pairs = [
        (key, visible(str(env[key])))
        for key in ("python", "platform", "cpu", "threads", "bf16_speedup", "git")
        if env.get(key) is not None
    ]
    packages = env.get("packages")
    if isinstance(packages, dict):
        pairs += [(visible(str(name)), visible(str(version))) for name, version in sorted(packages.items())]
    return pairs


_UNFINISHED = {
    "running": "This run had not finished when this page was made: it is still going, or was killed",
    "partly done": "This run stopped before its end, after an error or an interrupt",
    "failed": "This run failed before its end",
}


def unfinished(data: RunData) -> str:
    """Return what to say of a run that is not done, with the stages that are; nothing for one that is."""
    if data.status is None or data.status.state not in _UNFINISHED:
        return ""
    done = ", ".join(visible(name) for name, stage in data.status.stages.items() if stage.state == "done") or "none"
    return (
        f"{_UNFINISHED[data.status.state]}. Stages that are done: {done}. What is shown may be incomplete or from "
        "before; the same command goes on with the run."
    )


def timing(data: RunData) -> list[tuple[str, str]]:
    """Return stage names with their state and duration, then the peak memory."""
    if data.status is None:
        return []
    rows = [
        (visible(name), f"{visible(stage.state)}, {seconds(stage.seconds)}")
        for name, stage in data.status.stages.items()
    ]
    rows.insert(0, ("run", data.status.state))
    if data.status.peak_gib is not None:
        rows.append(("peak memory", f"{plain(data.status.peak_gib, 1)} GiB"))
    return rows


def export_command(place: str) -> str:
    """Return the command that writes figures and tables into a folder; nothing without a place (see below)."""
    return f"suffix-analysis report {shlex.quote(visible(place))} --figures figures" if place else ""


def repeat_command(place: str, name: str) -> str:
    """Return the command that runs the same settings again, into a folder beside this one; nothing without a place.

    It works from where ``place``, the run folder's path, was given.
    """
    if not place:
        return ""
    folder = Path(place)
    again = folder / ".." / f"{name}-again" if folder.name in ("", "..") else folder.with_name(f"{folder.name}-again")
    config, out = (shlex.quote(visible(str(path))) for path in (folder / "config.toml", again))
    return f"suffix-analysis run --config {config} --out {out}"


def assemble(data: RunData, charts: dict[str, Figure], budget: Budget) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (template context, script payload) for one size budget."""
    return context(data, charts, budget), lean(payload(data, charts, budget))
