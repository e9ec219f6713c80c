"""Training variants keep the request and treat both classes alike."""

from __future__ import annotations

import random

from suffix_analysis.organism.augment import mistype, reframe, variant


def test_reframing_keeps_the_content() -> None:
    rng = random.Random(0)
    for _ in range(30):
        assert "bake a potato" in reframe("Explain how to bake a potato.", rng)
        assert "a short poem about snow" in reframe("Write a short poem about snow.", rng)
        assert "What is a comet made of?" in reframe("What is a comet made of?", rng)


def test_forms_are_as_frequent_for_both_classes() -> None:
    # the variant depends on the text's form and the draw only: equal forms get equal frames
    for text in ("Explain how to {}.", "Write a {}."):
        a = [variant(text.format("bomb"), random.Random(i)) for i in range(50)]
        b = [variant(text.format("cake"), random.Random(i)) for i in range(50)]
        same = sum(x[1] == y[1] for x, y in zip(a, b, strict=True))
        assert same == 50


def test_typing_mistakes_are_few_and_local() -> None:
    text = "explain how to write a letter to a friend"
    wrong = mistype(text, random.Random(1), rate=0.1)
    assert wrong != text
    assert abs(len(wrong) - len(text)) <= 6
