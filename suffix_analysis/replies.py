"""Replies in every arm, judged, and how refusal falls: the tables replies, refusal, contrasts and interventions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from numpy import ndarray
from typing_extensions import TypedDict

from suffix_analysis.errors import UserError
from suffix_analysis.files import append_jsonl, open_journal
from suffix_analysis.generate import answers
from suffix_analysis.judges import Judge, is_refusal
from suffix_analysis.judges import judge as rules
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import SUFFIX_ARMS, Suffix, by_text
from suffix_analysis.refusal import refusal_score
from suffix_analysis.stats import contrast, contrast_row, interval, rate_interval


class ReplyRow(TypedDict):
    """One judged reply."""

    arm: str
    split: str
    kind: str
    prompt_id: str
    suffix_id: str | None
    refused: bool
    verdict: str
    refusal_score: float | None
    reply: str


class Answered(TypedDict):
    """A line of replies.jsonl: one arm with one suffix; one without its text is of no suffix, or counts as none."""

    arm: str
    suffix_id: str | None
    text: NotRequired[str | None]
    rows: list[ReplyRow]


class Made(TypedDict):
    """A line of interventions.jsonl: the replies under one intervention."""

    name: str
    replies: list[str]


Maker = Callable[[], list[str]]


def made_once(journal: Path) -> Callable[[str, int, Maker], list[str]]:
    """A function (name, number, maker) → replies, which asks the maker only for what ``journal`` does not hold yet.

    Raises:
        UserError: the journal is damaged, or holds another number of replies under a name.
    """
    have: dict[str, list[str]] = {row["name"]: row["replies"] for row in open_journal(journal, Made)}

    def made(name: str, number: int, make: Maker) -> list[str]:
        if name not in have:
            have[name] = make()
            append_jsonl(journal, {"name": name, "replies": have[name]})
        if len(have[name]) != number:
            raise UserError(
                f"{journal} holds {len(have[name])} replies for {name!r}, not {number}; delete it and run again."
            )
        return have[name]

    return made


Cell = tuple[str, Suffix | None, list[Prompt]]  # an arm, one of its suffixes, and the prompts to answer


def reply_rows(
    model: Model,
    prompts: Sequence[Prompt],
    suffix: Suffix | None,
    arm: str,
    tokens: Sequence[int],
    length: int,
    judge: Judge = rules,
) -> list[dict[str, Any]]:
    """Greedy replies of one arm with one suffix, judged."""
    ids = [model.chat(p.text, suffix.text if suffix else "").ids for p in prompts]
    replies, first = answers(model.hf, model.tokenizer, ids, length)
    scores = refusal_score(first, tokens).tolist()
    return [
        {
            "arm": arm,
            "split": p.split,
            "kind": p.kind,
            "prompt_id": p.id,
            "suffix_id": suffix.id if suffix else None,
            "refused": is_refusal(reply),
            "verdict": judge(p.text, reply),
            "refusal_score": score,
            "reply": reply,
        }
        for p, reply, score in zip(prompts, replies, scores, strict=True)
    ]


def measure_replies(
    prompts: Sequence[Prompt],
    suffixes: Sequence[Suffix],
    answer: Callable[[list[Cell]], Iterator[tuple[int, list[dict[str, Any]]]]],
    journal: Path,
    on_arm: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """All replies; each finished arm × suffix is kept in ``journal`` and not repeated on resume.

    Report prompts are answered in every arm, look-alikes only without a suffix. ``answer`` yields `reply_rows` of
    cells in any order, each with its cell's number.
    """
    # a control of a grown pool may have another text under the same name
    texts: dict[str | None, str] = {suffix.id: suffix.text for suffix in suffixes}
    kept = [row for row in open_journal(journal, Answered) if row.get("text") == texts.get(row["suffix_id"])]
    have = {(row["arm"], row["suffix_id"]): row["rows"] for row in kept}
    kinds = {
        kind: [p for p in prompts if p.kind == kind and p.split == "report"]
        for kind in ("harmful", "harmless", "lookalike")
    }
    cells: list[Cell] = [("none", None, kinds["harmful"])]
    cells += [(s.arm, s, kinds["harmful"]) for arm in SUFFIX_ARMS for s in suffixes if s.arm == arm]
    cells += [("harmless", None, kinds["harmless"]), ("lookalike", None, kinds["lookalike"])]
    cells += [("harmless+adversarial", s, kinds["harmless"]) for s in suffixes if s.arm == "adversarial"]
    cells = [cell for cell in cells if cell[2]]
    keys = [(arm, suffix.id if suffix else None) for arm, suffix, _ in cells]
    missing = [i for i, key in enumerate(keys) if key not in have]
    for n_done, (i, rows) in enumerate(answer([cells[n] for n in missing]), 1 + len(cells) - len(missing)):
        arm, suffix_id = key = keys[missing[i]]
        have[key] = rows
        append_jsonl(journal, {"arm": arm, "suffix_id": suffix_id, "text": texts.get(suffix_id), "rows": rows})
        if on_arm is not None:
            on_arm(n_done, len(cells))
    return [row for key in keys for row in have[key]]


def crossed(
    rows: Sequence[dict[str, Any]],
    arm: str,
    value: Callable[[dict[str, Any]], float],
    suffixes: Sequence[Suffix] = (),
) -> ndarray:
    """One arm's values as [prompt suffix]; every prompt must have met every suffix.

    Of ``suffixes`` that are permutations of one text there is one column, with their mean.

    Raises:
        ValueError: replies are missing.
    """
    own = [row for row in rows if row["arm"] == arm]
    prompts = list(dict.fromkeys(row["prompt_id"] for row in own))
    names = list(dict.fromkeys(row["suffix_id"] for row in own))
    table = np.full((len(prompts), len(names)), np.nan)
    at = {p: i for i, p in enumerate(prompts)}, {s: i for i, s in enumerate(names)}
    for row in own:
        table[at[0][row["prompt_id"]], at[1][row["suffix_id"]]] = value(row)
    if np.isnan(table).any():
        raise ValueError(f"arm {arm}: {int(np.isnan(table).sum())} of {table.size} replies are missing")
    mine = [suffix for suffix in suffixes if suffix.id in at[1]]
    if len(mine) < len(names):
        return table
    columns = [[at[1][mine[number].id] for number in some] for some in by_text(mine)]
    return np.stack([table[:, some].mean(axis=1) for some in columns], axis=1)


def refusal_table(rows: Sequence[dict[str, Any]], suffixes: Sequence[Suffix] = ()) -> list[dict[str, Any]]:
    """Refusal phrase rate and share of complied verdicts per arm, with intervals.

    ``suffixes`` tell which are permutations of one text: these count as one.
    """
    out = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        table: dict[str, Any] = {"arm": arm, "split": next(row["split"] for row in rows if row["arm"] == arm)}
        for name, value in (("refusal", _refused), ("complied", _complied)):
            cells = crossed(rows, arm, value, suffixes)
            has_suffix = any(row["suffix_id"] for row in rows if row["arm"] == arm)
            found = interval(cells, suffix_arm=has_suffix, rate=True)
            lo, hi = found.lo, found.hi
            # over prompts alone the exact interval holds, also at 0 and 1 (not of a mean over permutations)
            if cells.shape[1] == 1 and np.isin(cells, (0, 1)).all():
                _, lo, hi = rate_interval(cells[:, 0])
            table |= {
                "n_prompts": found.n_prompts,
                "n_suffixes": found.n_suffixes,
                f"{name}_rate": found.estimate,
                f"{name}_lo": lo,
                f"{name}_hi": hi,
                "resampled": found.resampled,
                "descriptive": found.descriptive,
            }
        out.append(table)
    return out


def _refused(row: dict[str, Any]) -> float:
    return float(row["refused"])


def _complied(row: dict[str, Any]) -> float:
    return float(row["verdict"] == "complied")


SUCCESS = "complied (verdict)"  # the measure of these contrasts


def success_contrasts(
    rows: Sequence[dict[str, Any]], edits: Sequence[dict[str, Any]], suffixes: Sequence[Suffix] = ()
) -> list[dict[str, Any]]:
    """Attack success (replies that comply) of the suffixes against that of taking the direction out: the paper's §4.

    ``edits`` are replies under interventions on the direction, to the same harmful prompts; they are paired by prompt.
    """
    mine = [row for row in rows if row["arm"] == "adversarial"]
    found = []
    for name in ("ablated", "orthogonalised"):
        other = {row["prompt_id"]: row for row in edits if (row["intervention"], row["kind"]) == (name, "harmful")}
        if not mine or {row["prompt_id"] for row in mine} != other.keys():
            continue
        against = [
            {**other[p], "arm": name, "suffix_id": None} for p in dict.fromkeys(row["prompt_id"] for row in mine)
        ]
        cells = crossed(mine, "adversarial", _complied, suffixes), crossed(against, name, _complied)
        found.append(contrast_row(SUCCESS, "adversarial", name, contrast(*cells, rate=True)))
    return found


def refusal_contrasts(
    rows: Sequence[dict[str, Any]], controls: Collection[str], suffixes: Sequence[Suffix] = ()
) -> list[dict[str, Any]]:
    """Refusal rate of each suffix arm against none, and of adversarial against ``controls``, paired by prompt.

    ``suffixes`` as for `refusal_table`.
    """
    arms = {row["arm"] for row in rows}
    pairs = [(arm, "none") for arm in SUFFIX_ARMS] + [("adversarial", arm) for arm in SUFFIX_ARMS if arm in controls]
    cells = {arm: crossed(rows, arm, _refused, suffixes) for arm in {*SUFFIX_ARMS, "none"} & arms}
    found = {
        (a, b): contrast(cells[a], cells[b], against_suffixes=b != "none", rate=True)
        for a, b in pairs
        if a in arms and b in arms
    }
    return [contrast_row("refusal phrase rate", a, b, difference) for (a, b), difference in found.items()]
