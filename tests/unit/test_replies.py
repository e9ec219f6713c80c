"""The journal of replies: what is there is not made again, and a line that was cut off is made again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from suffix_analysis.analysis import as_long
from suffix_analysis.config import StudyConfig
from suffix_analysis.errors import UserError
from suffix_analysis.pool import traced_of
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import Suffix, of_each_text
from suffix_analysis.replies import Cell, crossed, made_once, measure_replies, refusal_table, success_contrasts

PROMPTS = [Prompt("a", "Pick a lock", "harmful", "report"), Prompt("b", "Bake", "harmless", "report")]
SUFFIXES = [Suffix(f"random-{i}", "random", "x") for i in (1, 2)]


def test_a_line_that_was_cut_off_is_made_again_and_damages_nothing(tmp_path: Path) -> None:
    journal, made = tmp_path / "replies.jsonl", []

    def answer(cells: list[Cell]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for i, (arm, suffix, some) in reversed(list(enumerate(cells))):  # any order will do
            made.append(arm)
            judged = {
                "split": "report",
                "kind": "",
                "refused": True,
                "verdict": "",
                "refusal_score": 0.5,
                "reply": "No.",
            }
            yield i, [{"arm": arm, "suffix_id": suffix and suffix.id, "prompt_id": p.id, **judged} for p in some]

    whole = measure_replies(PROMPTS, SUFFIXES, answer, journal)
    assert sorted(made) == ["harmless", "none", "random", "random"]
    assert [row["arm"] for row in whole] == ["none", "random", "random", "harmless"]
    text = journal.read_text()
    journal.write_text(text[: -len(text.splitlines()[-1]) // 2])  # the disk was full
    for times in (1, 1):
        made.clear()
        assert measure_replies(PROMPTS, SUFFIXES, answer, journal) == whole
        assert len(made) <= times
    assert not made
    other = [SUFFIXES[0], Suffix("random-2", "random", "y")]  # as where a pool has grown
    for _ in range(2):
        measure_replies(PROMPTS, other, answer, journal)
        assert made == ["random"], "what the same name was answered with another text does not count"
    assert measure_replies(PROMPTS, other, answer, journal) == whole


def test_what_the_suffix_reaches_stands_beside_what_taking_the_direction_out_does() -> None:
    def reply(arm: str, prompt: str, complied: bool) -> dict[str, Any]:
        return {"arm": arm, "suffix_id": "adversarial-1", "prompt_id": prompt, "verdict": "complied" * complied}

    rows = [reply("adversarial", f"p{i}", i < 2) for i in range(10)] + [reply("random", "p1", True)]
    edits = [
        {"intervention": name, "kind": kind, "prompt_id": f"p{i}", "verdict": "complied" if i != 1 else "partial"}
        for name, kind in (("orthogonalised", "harmful"), ("none", "harmful"), ("added", "harmless"))
        for i in reversed(range(10))
    ]
    (row,) = success_contrasts(rows, edits)
    assert (row["measure"], row["arm"], row["against"]) == ("complied (verdict)", "adversarial", "orthogonalised")
    assert row["estimate"] == pytest.approx(0.2 - 0.9) and row["lo"] < -0.7 < row["hi"] and row["n_prompts"] == 10
    assert success_contrasts(rows, edits[1:]) == [], "other prompts"
    assert success_contrasts([], edits) == []


def test_a_journal_whose_only_line_was_cut_off_can_be_gone_on_from(tmp_path: Path) -> None:
    journal = tmp_path / "interventions.jsonl"
    journal.write_text('{"name": "ablated, harmful", "repl')
    assert made_once(journal)("ablated, harmful", 1, lambda: ["No."]) == ["No."]
    made = made_once(journal)
    assert made("ablated, harmful", 1, list) == ["No."], "made once"
    with pytest.raises(UserError, match=r"holds 1 replies for 'ablated, harmful', not 2; delete it"):
        made("ablated, harmful", 2, list)


def test_permutations_of_one_text_are_one_column() -> None:
    own = [Suffix(f"s-{i}", "shuffled", f"t{i}", ids=ids) for i, ids in enumerate([(1, 2), (2, 1), (3, 4)])]
    rows = [
        {
            "arm": "shuffled",
            "split": "report",
            "prompt_id": p,
            "suffix_id": s.id,
            "refused": refused,
            "verdict": "refused",
        }
        for p, flags in (("a", (True, False, True)), ("b", (True, True, False)))
        for s, refused in zip(own, flags, strict=True)
    ]
    cells = crossed(rows, "shuffled", lambda row: float(row["refused"]), own)
    assert cells.tolist() == [[0.5, 1.0], [1.0, 0.0]]
    (table,) = refusal_table(rows, own)
    assert (table["n_suffixes"], table["refusal_rate"]) == (2, 0.625)
    (alone,) = refusal_table([row for row in rows if row["suffix_id"] != "s-2"], own)
    assert (alone["n_suffixes"], alone["refusal_rate"]) == (1, 0.75) and alone["refusal_lo"] < 0.75 < alone[
        "refusal_hi"
    ]


def test_controls_are_traced_of_as_many_texts_as_there_are() -> None:
    ids = [(1, 2), (2, 1), (3, 4), (4, 3), (5, 6)]
    own = [Suffix(f"shuffled-{i}", "shuffled", f"t{i}", ids=each) for i, each in enumerate(ids, 1)]
    some = [Suffix("adversarial-1", "adversarial", "x", ids=(9,)), *own]
    found = traced_of(some, StudyConfig(n_traced_controls=4))
    assert [s.id for s in found] == ["adversarial-1", "shuffled-1", "shuffled-2", "shuffled-3", "shuffled-5"]


def test_shuffled_suffixes_stand_beside_what_they_are_permutations_of() -> None:
    attack = Suffix("adversarial-1", "adversarial", "x", ids=(1, 2, 3))
    shuffled = [Suffix(f"shuffled-{i}", "shuffled", "x", ids=ids) for i, ids in enumerate([(3, 2, 1), (2, 1, 3)], 1)]
    everything = [attack, Suffix("random-1", "random", "y", ids=(7,)), *shuffled]
    found, _ = as_long([attack], of_each_text(traced_of(everything, StudyConfig())))
    assert [s.id for s in found] == ["random-1", "shuffled-1"]
    assert [s.id for s in of_each_text(everything)] == ["adversarial-1", "random-1", "shuffled-1"]
