"""Suffixes that were found elsewhere, and the controls that are put beside suffixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from suffix_analysis.config import StudyConfig
from suffix_analysis.controls import make_controls
from suffix_analysis.errors import UserError
from suffix_analysis.inputs import given_suffixes
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import Suffix
from tests import tiny

ATTACKS = ("red green blue tea", "one two three four")


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    """A file of suffixes."""
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(number: int, arm: str = "adversarial", text: str = ATTACKS[0]) -> dict[str, str]:
    return {"id": f"{arm}-{number}", "arm": arm, "text": text}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([row(1, "adverserial")], "of the arm 'adverserial'; the arms are adversarial, random"),
        ([row(1), row(1, text=ATTACKS[1])], "two suffixes with the id 'adversarial-1'"),
        ([row(1, "random")], "no suffix of the adversarial arm"),
        ([{"ids": [10**9, 5]}], "row 1 has ids that are no whole numbers from 0 to 699"),
        ([{"ids": [-5]}], "no whole numbers"),
        ([{"ids": [1.5]}], "no whole numbers"),
        ([{"ids": "5 6"}], "no whole numbers"),
        ([row(1) | {"ids": [40, 41]}], "its text has other ids"),
        ([row(1) | {"text": None}], "holds no text and no ids"),
        ([row(1) | {"text": " "}], "holds no text and no ids"),
        ([row(1) | {"text": 5}], "holds no text and no ids"),
        ([row(1) | {"text": "a \ud800"}], "holds no text and no ids"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, rows: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(UserError, match=told):
        given_suffixes(written(tmp_path, *rows), tiny.model("llama"))


def test_shuffled_controls_are_of_all_suffixes_and_the_others_have_the_firsts_length(tmp_path: Path) -> None:
    model = tiny.model("llama")
    suffixes = given_suffixes(written(tmp_path, row(1), row(2, text=ATTACKS[1])), model)
    prompts = [Prompt("a", "Bake a cake", "harmful", "select"), Prompt("b", "Sing", "harmful", "select")]
    told: list[str] = []
    controls = make_controls(model, suffixes, prompts, StudyConfig(n_controls=3), told.append)
    assert not told
    assert [s.arm for s in controls] == ["random"] * 3 + ["shuffled"] * 3 + ["benign"] * 3
    assert len({s.id for s in controls}) == 9
    assert {s.n_tokens for s in controls if s.arm != "shuffled"} == {suffixes[0].n_tokens}

    def bag(suffix: Suffix) -> list[int]:
        return sorted(suffix.ids)

    shuffled = [bag(s) for s in controls if s.arm == "shuffled"]
    assert shuffled == [bag(suffixes[0]), bag(suffixes[0]), bag(suffixes[1])]


def test_suffixes_come_as_strings_as_ids_or_as_both(tmp_path: Path) -> None:
    model = tiny.model("llama")
    chat = model.chat("Write a poem", ATTACKS[0])
    ids = chat.ids[chat.regions["suffix"]].tolist()
    by_ids = given_suffixes(written(tmp_path, {"ids": ids}), model)
    assert [(s.id, s.arm, s.text, list(s.ids)) for s in by_ids] == [("adversarial-1", "adversarial", ATTACKS[0], ids)]
    assert given_suffixes(written(tmp_path, {"ids": ids, "text": ATTACKS[0]}), model) == by_ids
    marked = "\ufeff" + json.dumps(ATTACKS[0])
    for name, content in (("a.txt", "\n".join(ATTACKS)), ("a.json", json.dumps(ATTACKS)), ("b.jsonl", marked)):
        (tmp_path / name).write_text(content, encoding="utf-8")
        found = given_suffixes(tmp_path / name, model)
        assert [s.text for s in found] == list(ATTACKS[: len(found)]) and found[0] == by_ids[0]


def test_a_cut_off_file_of_suffixes_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, row(1), row(2, text=ATTACKS[1]))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        given_suffixes(path, tiny.model("llama"))


def test_a_file_that_is_not_there_is_called_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no suffixes file"):
        given_suffixes(tmp_path / "none.jsonl", tiny.model("llama"))


def test_a_csv_file_may_hold_ids(tmp_path: Path) -> None:
    model, path = tiny.model("llama"), tmp_path / "s.csv"
    chat = model.chat("Write a poem", "x y z")
    ids = chat.ids[chat.regions["suffix"]].tolist()
    path.write_text(f'text,ids\nx y z,"{ids}"\nx y,\n')
    first, second = given_suffixes(path, model)
    assert list(first.ids) == ids and second.text == "x y"
    path.write_text('text,ids\nx y z,"[1, oops"\n')
    with pytest.raises(UserError, match="row 1 has ids that are no whole numbers"):
        given_suffixes(path, model)


def test_names_that_are_given_are_not_given_twice(tmp_path: Path) -> None:
    path = written(tmp_path, row(2), {"text": ATTACKS[1]}, {"text": "a b c d"})
    assert [s.id for s in given_suffixes(path, tiny.model("llama"))] == [
        "adversarial-2",
        "adversarial-3",
        "adversarial-4",
    ]


@pytest.mark.parametrize(
    ("given", "found"), [(None, None), ("", None), ([], ()), (["p1"], ("p1",)), ("['p1', 'p2']", ("p1", "p2"))]
)
def test_what_a_suffix_was_trained_on_is_kept_as_it_is_said(tmp_path: Path, given: Any, found: Any) -> None:
    (suffix,) = given_suffixes(written(tmp_path, row(1) | {"trained_on": given}), tiny.model("llama"))
    assert suffix.trained_on == found


def test_what_a_suffix_was_trained_on_is_a_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 1 has trained_on = 5; give a list of prompt ids"):
        given_suffixes(written(tmp_path, row(1) | {"trained_on": 5}), tiny.model("llama"))
