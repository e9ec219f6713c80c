"""What the page tells of one pinned head: a record per head, small enough to hold all of them."""

from __future__ import annotations

from typing import Any

from reports.charts import head_name
from reports.data import RunData
from reports.escape import visible
from reports.mechanism import FACTOR_WORDS
from reports.theme import arm_order

COLUMNS = (
    ("contribution", "along r̂"),
    ("attention_instruction", "instruction"),
    ("attention_suffix", "suffix"),
    ("attention_chat", "chat"),
    ("attention_system", "system"),
)
"""What a pinned head shows for every arm: column of findings/heads.parquet and heading."""


def pinned_heads(data: RunData) -> dict[str, Any]:
    """Return column headings and, by head, its rank, a row per arm, its factors and its effects when ablated."""
    found: dict[str, dict[str, Any]] = {}

    def of(layer: int, head: int) -> dict[str, Any]:
        return found.setdefault(head_name(layer, head), {"rank": None, "arms": {}, "factors": [], "effects": []})

    for row in data.table("heads"):
        if row["split"] == "report":
            values = [row.get(key) for key, _ in COLUMNS]
            of(row["layer"], row["head"])["arms"][visible(row["arm"])] = [*values, row.get("lo"), row.get("hi")]
    for row in data.table("top_heads"):
        of(row["layer"], row["head"])["rank"] = row["rank"]
    for row in data.table("factors"):
        if row["layer"] != -1 and row["value"]:
            of(row["layer"], row["head"])["factors"].append(
                [FACTOR_WORDS.get(row["factor"], visible(row["factor"])), row["value"], row["share"]]
            )
    for row in data.table("sweep"):
        of(row["layer"], row["head"])["effects"].append(
            [visible(row["run"]), row["projection_effect"], row["projection_p"]]
        )
    for entry in found.values():
        entry["arms"] = {arm: entry["arms"][arm] for arm in arm_order(entry["arms"].keys())}
    return {"columns": [words for _, words in COLUMNS], "heads": found}
