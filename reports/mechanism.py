"""How the suffix acts, in words: what carries the fall in projection, why, and what the causal tests did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reports.data import Row, RunData
from reports.escape import visible
from reports.evidence import CONTROL_WORDS, clearly, over_prompts, projection_change, the_suffixes
from reports.numbers import count, percent, percent_ci, plain, plain_ci
from reports.theme import arm_order

_WORDS = {"top": "top heads", "random": "random heads", "all": "all heads", "none": "the direction"}
UNCHANGED = "nothing changed"
FACTOR_WORDS = {
    "query": "chat[-1] asks for something else (query)",
    "dilution": "the suffix's keys take part in the softmax (dilution)",
    "chat keys": "the chat tokens' own keys changed",
    "displacement": "chat[-1] stands further away (position)",
    "scale": "the norm behind attention scales otherwise",
}


def described(row: Row) -> Row:
    """Return a causal test's row with ``what`` it did in words and the ``set`` of heads it did it to."""
    dose = "" if row.get("dose") in (None, 1.0) else f" by {percent(row['dose'])}"
    heads = _WORDS.get(row["heads"], str(row["heads"]))
    what = f"{row['test']}{dose}" + ("" if row["heads"] == "none" else f", {heads}")
    return {**row, "what": what, "set": heads}


def context(data: RunData) -> dict[str, Any]:
    """Return the template's rows: what carries the fall, why the instruction counts less, the tests with replies."""
    summed = [row for row in data.table("factors") if row["layer"] == -1 and (row["factor"] != "scale" or row["value"])]
    controls = arm_order({row["arm"] for row in (*data.table("carried"), *summed)} - {"adversarial"})
    return {
        "carried": _beside(controls, data.table("carried"), "term", {}),
        "factors": _beside(controls, summed, "factor", FACTOR_WORDS),
        "controls": controls,
        "over": over_prompts(data.table("carried")),
        "replied": [
            {
                "what": described(row)["what"] if row["test"] != UNCHANGED else "left alone",
                "on": "with the suffix" if row["on"] == "attacked" else "without it",
                "score": f"{plain(row['score_before'])} → {plain(row['score_after'])}",
                "refused": _refused(row),
            }
            for row in data.table("causal")
            if row.get("refused") is not None
        ],
    }


_KINDS = {
    "carried": "written by {}",
    "causal score": "{}: score",
    "causal projection": "{}: projection",
}


def _measure(row: Row) -> str:
    if row["kind"] == "factors" and row["measure"] == "all":
        return "less from the instruction, in all"
    return FACTOR_WORDS.get(row["measure"], visible(str(row["measure"])))


def against_controls(data: RunData) -> list[Row]:
    """Return the mechanism's contrasts with their measure in words."""
    return [
        {**row, "measure": _KINDS.get(row["kind"], "{}").format(_measure(row)), "against": _against(row)}
        for row in data.table("mechanism_contrasts")
    ]


def _against(row: Row) -> str:
    """What a row is held against; of random sets, which are taken as they are, how many and how many do less."""
    n, told = row.get("n_sets"), visible(str(row["against"] or ""))
    return told if not n else f"{told} ({n} taken as they are; it does more than {row.get('n_beyond')} of them)"


def _beside(controls: list[str], rows: list[Row], key: str, words: dict[str, str]) -> list[dict[str, Any]]:
    """Return the adversarial arm's parts, each with the same part's value in every control arm."""
    known = {(row["arm"], row[key]): plain_ci(row["value"], row["lo"], row["hi"]) for row in rows}
    return [
        _share_row(row, words.get(row[key], str(row[key])))
        | {"others": [known.get((arm, row[key]), "–") for arm in controls]}
        for row in _attacked(rows)
    ]


def _attacked(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["arm"] == "adversarial"]


def _share_row(row: Row, name: str) -> dict[str, Any]:
    share = "–"
    if row["share"] is not None:
        share = percent_ci(row["share"], row["share_lo"], row["share_hi"])
    return {
        "name": name,
        "value": plain(row["value"]),
        "ci": f"{plain(row['lo'])} to {plain(row['hi'])}",
        "share": share,
    }


FACTOR_NAMES = {
    "query": "a changed query",
    "dilution": "dilution by the suffix's keys",
    "chat keys": "the chat tokens' changed keys",
    "displacement": "the longer distance",
    "scale": "the norm behind attention",
}


def _parts(rows: list[Row], key: str, least: float) -> list[tuple[str, Row]]:
    """Parts with a share of at least ``least`` in size, the largest first; none where a share is no number."""
    if not rows or any(row["share"] is None for row in rows):
        return []
    kept = sorted((row for row in rows if abs(row["share"]) >= least), key=lambda row: -abs(row["share"]))
    return [(FACTOR_NAMES.get(row[key], visible(str(row[key]))), row) for row in kept]


def _listed(parts: list[tuple[str, Row]], verb: str, preposition: str) -> str:
    """Shares with their intervals, the first with its verb: 60 % comes from one thing, 30 % from another."""
    told = [
        f"{percent_ci(row['share'], row['share_lo'], row['share_hi'])} {'' if i else verb + ' '}{preposition} {name}"
        for i, (name, row) in enumerate(parts)
    ]
    return told[0] if len(told) == 1 else ", ".join(told[:-1]) + " and " + told[-1]


def _as_much_elsewhere(data: RunData, parts: list[tuple[str, Row]]) -> str:
    """Return which of the parts a control of the same length has as well: those are not this suffix's doing."""
    by_control: dict[str, list[str]] = {}
    for name, row in parts:
        for other in data.table("factors"):
            same = (other["layer"], other["factor"]) == (-1, row["factor"]) and other["arm"] in CONTROL_WORDS
            if same and _told(row) and _told(other) and not _clearly_more(data, row, other):
                by_control.setdefault(CONTROL_WORDS[other["arm"]], []).append(name)
    if not by_control:
        return ""
    control, names = max(by_control.items(), key=lambda item: len(item[1]))
    verb = "has" if control.endswith(" text") else "have"
    return f" ({control}, as long, {verb} no clearly smaller part from {' and '.join(names)})"


def _told(row: Row) -> bool:
    """Whether a part is told from none."""
    return row["lo"] is not None and row["hi"] is not None and not row["lo"] <= 0 <= row["hi"]


def _clearly_more(data: RunData, row: Row, other: Row) -> bool:
    """Whether a part is larger, on its own side, than a control's: by the paired contrast where there is one."""
    sign = 1 if row["value"] > 0 else -1
    paired = next(
        (
            each
            for each in data.table("mechanism_contrasts")
            if (each["kind"], each["measure"], each["against"]) == ("factors", row["factor"], other["arm"])
        ),
        None,
    )
    if paired is not None and paired["lo"] is not None:
        return min(sign * paired["lo"], sign * paired["hi"]) > 0
    return sign * other["value"] < min(abs(row["lo"]), abs(row["hi"]))


def sentences(data: RunData) -> Iterator[str]:
    """Yield what the causal tests and the split of the fall say, where the tables are there."""
    carried = _attacked(data.table("carried"))
    summed = [row for row in _attacked(data.table("factors")) if row["layer"] == -1]
    terms = _parts([row for row in carried if row["term"] != "embedding"], "term", least=0.0)
    factors = _parts(summed, "factor", least=0.1)
    clauses = []
    # shares of a rise, or of what may be none, would read as shares of a fall
    if terms and projection_change(data, "none") < 0 and sum(row["value"] for row in carried) > 0:
        clauses.append(f"Of the fall in projection ({over_prompts(carried)}) {_listed(terms, 'is written', 'by')}")
    # the parts' upper bounds added up: more careful than an interval of their sum, which the table lacks
    upper = [row["hi"] for row in summed]
    if factors and None not in upper and sum(upper) < 0:
        clauses.append(
            f"of what the top heads bring less from the instruction {_listed(factors, 'comes', 'from')}"
            f"{_as_much_elsewhere(data, factors)}"
        )
    if clauses:
        yield "; ".join(clauses) + "."
    rows = [row for row in data.table("causal") if row["on"] == "attacked" and row.get("refused") is not None]
    before = next((row for row in rows if row["test"] == UNCHANGED), None)
    told = [
        (words, row)
        for row in rows
        for test, heads, words in (
            ("projection restored", "none", "giving the projection back"),
            ("random direction moved as far", "none", "the same step along a random direction (a control)"),
            ("suffix edges cut, mass renormalised", "all", "cutting all edges from the suffix to the chat tokens"),
        )
        if row["test"] == test and row["heads"] == heads and (row.get("dose") in (None, 1.0))
    ]
    if before and told:
        number = before.get("n_suffixes") or 1
        yield (
            f"In the causal tests, {count(before['n_prompts'], 'report prompt')}, {_refused(before)} are refused with "
            f"{the_suffixes(number)}; " + "; ".join(_outcome(words, row, before) for words, row in told) + "."
        )


def _refused(row: Row) -> str:
    return percent_ci(row["refused"], row.get("refused_lo"), row.get("refused_hi"))


def _outcome(words: str, row: Row, before: Row) -> str:
    """An effect where the paired change's interval leaves 0 out (or, without it, where the two intervals lie apart)."""
    lo, hi = row.get("refused_change_lo"), row.get("refused_change_hi")
    apart = clearly(row, before, ("refused_lo", "refused_hi")) != 0
    if apart if lo is None or hi is None else not lo <= 0 <= hi:
        return f"{words} brings that to {_refused(row)}"
    return f"{words}: {_refused(row)}, no clear change"
