"""What the page tells of one pinned head or layer: a record for each, small enough to hold all of them."""

from __future__ import annotations

from typing import Any

from reports.charts import head_name, layer_name
from reports.data import Row, RunData
from reports.escape import visible
from reports.mechanism import FACTOR_WORDS
from reports.numbers import count, digits_of, plain_ci
from reports.theme import arm_order

REGIONS = ("instruction", "suffix", "chat", "system", "bos")
"""What a pinned head's attention is shown to; "bos" is only in findings/shift.parquet, so of top heads."""

FIRST = "to the first token"
"""Where idle heads park their attention: the BOS token, or the first of the system prompt or the template. It is in one
of the regions, too."""


def pinned_heads(data: RunData) -> dict[str, Any]:
    """Return column headings and, by head and by layer, a label, what it is, a row per arm, factors and notes.

    A row holds what the head writes along r̂ and its attention by region; each is a number, or [number, lo, hi]. A
    layer's are the sum of what its heads write and the mean of their attention; its notes tell what its MLP writes.
    """
    found: dict[str, dict[str, Any]] = {}
    ranks = {(row["layer"], row["head"]): row["rank"] for row in data.table("top_heads")}

    def of(layer: int, head: int) -> dict[str, Any]:
        name, rank = head_name(layer, head), ranks.get((layer, head))
        label = f"{name} (top {rank})" if rank else name
        about = f"rank {rank} on the select split" if rank else "not among the top heads"
        return found.setdefault(name, {"label": label, "about": about, "arms": {}, "factors": [], "notes": []})

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
        of(row["layer"], row["head"])["notes"].append(_ablated(row))
    names = {head_name(layer, head): rank for (layer, head), rank in ranks.items()}
    shown = {name: found[name] for name in sorted(found, key=lambda name: names.get(name) or len(found) + 1)}
    shown |= _layers(data, found)
    for entry in shown.values():
        entry["arms"] = {arm: entry["arms"][arm] for arm in arm_order(entry["arms"].keys())}
    columns = ["writes along r̂", *(f"attention to {region}" for region in regions), FIRST]
    return {"columns": columns, "heads": shown}


def _layers(data: RunData, heads: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A record for every layer whose heads are known, in their order."""
    of_layer: dict[int, list[dict[str, Any]]] = {}
    for layer, head in sorted({(row["layer"], row["head"]) for row in data.table("heads")}):
        if head_name(layer, head) in heads:
            of_layer.setdefault(layer, []).append(heads[head_name(layer, head)])
    terms = {(visible(row["arm"]), row["layer"], row["term"]): row for row in data.table("terms")}
    found = {}
    for layer, records in of_layer.items():
        name = layer_name(layer)
        entry: dict[str, Any] = {
            "label": f"{name} (all heads)", "about": f"all {count(len(records), 'head')} of this layer: the sum of "
            "what they write, the mean of their attention", "arms": {}, "factors": [], "notes": [],
        }  # fmt: skip
        for arm in records[0]["arms"]:
            rows = [record["arms"][arm] for record in records if arm in record["arms"]]
            attention = [_mean([_number(value) for value in column]) for column in list(zip(*rows, strict=True))[1:]]
            known = terms.get((arm, layer, "attention"))
            writes = [_number(row[0]) for row in rows]
            total = None if None in writes else sum(value for value in writes if value is not None)
            entry["arms"][arm] = [_bounded(known, "mean", "lo", "hi") if known else total, *attention]
        told = [(arm, row) for (arm, at, term), row in terms.items() if (at, term) == (layer, "MLP")]
        order = arm_order({arm for arm, _ in told})
        entry["notes"] = [
            f"Its MLP writes along r̂ ({arm}): {plain_ci(row['mean'], row['lo'], row['hi'], digits_of(row['mean']))}."
            for arm, row in sorted(told, key=lambda pair: order.index(pair[0]))
        ]
        found[name] = entry
    return found


def _ablated(row: Row) -> str:
    """What ablating a head alone does, in words; an interval and a p value only where they were computed."""
    value, lo, hi = row["projection_effect"], row.get("projection_lo"), row.get("projection_hi")
    run = "without a suffix" if row["run"] == "none" else "with the suffix"
    p = row["projection_p"]
    level = "" if p is None else f", p {'< 0.001' if p < 0.001 else f'= {p:.2g}'} adjusted for all heads"
    change = ("+" if (value or 0) > 0 else "") + plain_ci(value, lo, hi, digits_of(value))
    return f"Ablated alone {run}: projection {change}{level}."


def _number(value: Any) -> float | None:
    return value[0] if isinstance(value, list) else value


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) and known else None


def _bounded(row: Row, key: str, lo: str, hi: str) -> Any:
    bounds = (row.get(lo), row.get(hi))
    return row[key] if None in bounds else [row[key], *bounds]
