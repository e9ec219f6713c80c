"""Refusal phrases and the offline verdict."""

from __future__ import annotations

import pytest

from suffix_analysis.judges import REFUSAL_PHRASES, is_refusal, judge


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
