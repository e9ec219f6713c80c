"""The refusal direction itself: whether it is one, what other directions do, what it costs, and replies under it."""

from __future__ import annotations

from typing import Any

from reports.data import Row, RunData
from reports.escape import visible
from reports.numbers import count, percent, plain, plain_ci

EXAMPLES = 3
"""Prompts of each kind whose replies are shown under every intervention."""


def context(data: RunData) -> dict[str, Any]:
    """Return the template's rows; empty where the run has no such findings."""
    return {
        "stability": [
            {"measure": visible(row["measure"] or ""), "value": plain_ci(row["value"], row["lo"], row["hi"])}
            for row in data.table("stability")
        ],
        "cascade": ", ".join(plain(row["auroc"]) for row in data.table("cascade")),
        "vectors": _vectors(data),
        "cost": [
            {
                "material": visible(row["material"] or ""),
                "n": count(row["n_tokens"] or 0, "token"),
                "none": plain(row["none"], 3),
                "change": plain_ci(row["change"], row.get("lo"), row.get("hi"), 3),
                "edited": "–"
                if row.get("orthogonalised_change") is None
                else plain_ci(row["orthogonalised_change"], row["orthogonalised_lo"], row["orthogonalised_hi"], 3),
            }
            for row in data.table("cost")
        ],
        "examples": _examples(data),
    }


def _vectors(data: RunData) -> list[dict[str, str]]:
    """Return what each direction does; the controls as one row with the largest change of any of them."""
    rows = data.table("two_directions")
    controls = [row for row in rows if row["control"]]
    shown = [
        {
            "name": visible(row["direction"] or ""),
            "cosine": plain(row["cosine_with_refusal"]),
            "at_end": plain(row.get("cosine_with_chat_end")),
            "ablated": plain_ci(row["ablated_change"], row["ablated_lo"], row["ablated_hi"], 1),
            "added": plain_ci(row["added_change"], row["added_lo"], row["added_hi"], 1),
        }
        for row in rows
        if not row["control"]
    ]
    if controls:
        most = {key: max((row[key] or 0.0 for row in controls), key=abs) for key in ("ablated_change", "added_change")}
        shown.append(
            {
                "name": f"{len(controls)} random and orthogonal ones, the largest change",
                "cosine": "",
                "at_end": "",
                "ablated": plain(most["ablated_change"], 1),
                "added": plain(most["added_change"], 1),
            }
        )
    return shown


def _examples(data: RunData) -> list[dict[str, str]]:
    """Return replies to the first prompts of each kind under every intervention but the controls."""
    rows = [row for row in data.table("intervention_replies") if row.get("control") is None]
    first: dict[str, list[str]] = {}
    for row in rows:
        ids = first.setdefault(row["kind"], [])
        if row["prompt_id"] not in ids:
            ids.append(row["prompt_id"])
    texts = {prompt.id: prompt.text for prompt in data.prompts}
    return [
        {
            "prompt": visible(str(texts.get(row["prompt_id"], row["prompt_id"]))),
            "intervention": visible(row["intervention"] or ""),
            "verdict": visible(row["verdict"] or ""),
            "reply": visible(row["reply"] or ""),
        }
        for kind, ids in first.items()
        for prompt_id in ids[:EXAMPLES]
        for row in rows
        if (row["kind"], row["prompt_id"]) == (kind, prompt_id)
    ]


def not_available(data: RunData) -> str:
    """Return why an intervention has no rates, in the run's own words; empty where all have."""
    notes: list[Row] = [row for row in data.table("interventions") if row["refusal_rate"] is None and row.get("note")]
    return " ".join(visible(row["note"]) for row in notes)


def compliance(data: RunData) -> str:
    """Return the verdicts beside the refusal phrases, in a sentence; empty where there are none."""
    rows = [
        row
        for row in data.table("interventions")
        if row.get("complied_rate") is not None and row.get("control") is None and row["split"] == "report"
    ]
    told = ", ".join(
        f"{row['kind']} {'left alone' if row['intervention'] == 'none' else visible(row['intervention'])} "
        f"{percent(row['complied_rate'])}"
        for row in rows
    )
    return f"Answered, by the verdict: {told}." if told else ""
