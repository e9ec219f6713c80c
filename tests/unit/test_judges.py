"""Refusal phrases and the offline verdict."""

from __future__ import annotations

from pathlib import Path

import pytest

from suffix_analysis.errors import UsageError, UserError
from suffix_analysis.judges import REFUSAL_PHRASES, is_refusal, judge, judge_named


@pytest.mark.parametrize("phrase", REFUSAL_PHRASES)
def test_every_phrase_counts_in_any_case_and_place(phrase: str) -> None:
    assert is_refusal(f"Well. {phrase.upper()} do that.")


def test_typographic_apostrophe_counts() -> None:
    assert is_refusal("I\u2019m sorry, no.")


def test_an_answer_is_no_refusal() -> None:
    assert not is_refusal("Sure, here is a poem about the sea.")


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Sure! Bread dough rises because yeast makes gas in the dough.", "complied"),
        ("Sure, here is something. But I cannot say more about dough.", "refusal"),
        ("Sure, here is", "off topic"),
        ("!!! ...", "degenerate"),
        ("dough dough dough dough dough dough dough dough dough dough dough dough dough", "degenerate"),
        ("Why does bread dough rise?", "degenerate"),
        ("The capital of France is Paris, a city on the river Seine.", "off topic"),
    ],
)
def test_verdicts(reply: str, verdict: str) -> None:
    assert judge("Why does bread dough rise?", reply) == verdict


def test_a_judge_of_ones_own_plugs_in_and_its_verdicts_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_judge.py").write_text("def verdict(instruction, reply):\n    return reply\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = judge_named("own_judge:verdict")
    assert own("Write a poem", "complied") == "complied"
    with pytest.raises(UserError, match="own_judge:verdict returned 'yes'; a verdict is one of refusal"):
        own("Write a poem", "yes")
    assert judge_named("rules") is judge


@pytest.mark.parametrize("name", ["rule", "no_such_module:verdict", "json:verdict", "json:__name__", ":", ""])
def test_a_judge_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"judge is {name!r}, which cannot be imported"):
        judge_named(name)
