"""What the page tells of one pinned head: a record per head, small enough to hold all of them."""

from __future__ import annotations

from typing import Any

from reports.charts import head_name
from reports.data import Row, RunData
from reports.escape import visible
from reports.mechanism import FACTOR_WORDS
from reports.theme import arm_order

REGIONS = ("instruction", "suffix", "chat", "system", "bos")
"""What a pinned head's attention is shown to; "bos" is only in findings/shift.parquet, so of top heads."""

FIRST = "to the first token"
"""Where idle heads park their attention: the BOS token, or the first of the system prompt or the template. It is in one
of the regions, too."""


def pinned_heads(data: RunData) -> dict[str, Any]:
    """Return column headings and, by head, its rank, a row per arm, its factors and its effects when ablated.

    A row holds what the head writes along r̂ and its attention by region; each is a number, or [number, lo, hi].
    """
    found: dict[str, dict[str, Any]] = {}

    def of(layer: int, head: int) -> dict[str, Any]:
        return found.setdefault(head_name(layer, head), {"rank": None, "arms": {}, "factors": [], "effects": []})

    shift = {(row["arm"], row["layer"], row["head"], row["region"]): row for row in data.table("shift")}
    there = {key[-1] for key, row in shift.items() if row["attention"]}
    regions = [region for region in REGIONS if region != "bos" or "bos" in there]
    for row in data.table("heads"):
        if row["split"] == "report":
            values = [_bounded(row, "contribution", "lo", "hi")]
            for region in regions:
                known = shift.get((row["arm"], row["layer"], row["head"], region))
                values.append(
                    _bounded(known, "attention", "attention_lo", "attention_hi")
                    if known
                    else row.get(f"attention_{region}")
                )
            values.append(row.get("attention_first"))
            of(row["layer"], row["head"])["arms"][visible(row["arm"])] = values
    for row in data.table("top_heads"):
        of(row["layer"], row["head"])["rank"] = row["rank"]
    for row in data.table("factors"):
        if row["arm"] == "adversarial" and row["layer"] != -1 and row["value"]:
            of(row["layer"], row["head"])["factors"].append(
                [
                    FACTOR_WORDS.get(row["factor"], visible(row["factor"])),
                    _bounded(row, "value", "lo", "hi"),
                    _bounded(row, "share", "share_lo", "share_hi"),
                ]
            )
    for row in data.table("sweep"):
        of(row["layer"], row["head"])["effects"].append(
            [
                visible(row["run"]),
                [row["projection_effect"], row.get("projection_lo"), row.get("projection_hi")],
                row["projection_p"],
            ]
        )
    for entry in found.values():
        entry["arms"] = {arm: entry["arms"][arm] for arm in arm_order(entry["arms"].keys())}
    ranked = sorted(found, key=lambda name: found[name]["rank"] or len(found) + 1)
    columns = ["writes along r̂", *(f"attention to {region}" for region in regions), FIRST]
    return {"columns": columns, "heads": {name: found[name] for name in ranked}}


def _bounded(row: Row, key: str, lo: str, hi: str) -> Any:
    bounds = (row.get(lo), row.get(hi))
    return row[key] if None in bounds else [row[key], *bounds]
