"""The same for calls from Python: what a notebook may hand to the library, on tiny models."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attacks
from attacks.config import AttackError
from suffix_analysis import Direction, DirectionConfig, Prompt, Suffix, analyze, find_direction, load_model, trace
from suffix_analysis.errors import UserError
from tests import tiny

FEW = settings(
    max_examples=int(os.environ.get("FUZZ", "60")) // 2, deadline=None, suppress_health_check=list(HealthCheck)
)
MODEL = tiny.model("llama")
WORDS = st.sampled_from(["Pick a lock", "Bake a cake", "Sing"]) | st.sampled_from(
    ["", " ", "\ud800", "a\0b", "é" * 9, "word " * 600]
)
NUMBERS = st.sampled_from([0.0, 1.0, -1.0, math.nan, math.inf, 1e30, 1e-30])
VECTORS = st.builds(
    lambda width, value, one: torch.full((width,), value) * (torch.arange(width) % 3 == 0 if one else 1.0),
    st.sampled_from([MODEL.d_model] * 6 + [0, 1, MODEL.d_model + 1]), st.just(1.0) | NUMBERS, st.booleans(),
)  # fmt: skip


def sentence(error: Exception) -> None:
    assert str(error).strip() and "Traceback" not in str(error)


@FEW
@given(st.lists(WORDS, max_size=3), VECTORS, WORDS, st.integers(-20, 3))
def test_traces_of_anything(prompts: list[str], vector: torch.Tensor, suffix: str, position: int) -> None:
    try:
        found = trace(MODEL, prompts, vector, suffix=suffix, position=position)
    except UserError as error:
        sentence(error)
        return
    assert len(found.chats) == len(prompts) and bool(torch.isfinite(found.projection).all())


def direction(vector: torch.Tensor, position: int, layer: int) -> Direction:
    means = torch.zeros(MODEL.n_layers + 1, MODEL.d_model)
    whole = torch.cat([vector, torch.ones(MODEL.d_model)])[: MODEL.d_model]  # shapes are the type checker's matter
    return Direction(whole, position, layer, [], means + 1, means, (5,), {})


PROMPTS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), WORDS, st.sampled_from(["harmful"] * 3 + ["harmless", "x", ""]),
              st.sampled_from(["report"] * 3 + ["select", "fit", ""])),
    max_size=5,
)  # fmt: skip
SUFFIXES = st.lists(
    WORDS | st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["adversarial", "random", "x"]), WORDS),
    max_size=3,
)


@FEW
@given(PROMPTS, SUFFIXES, VECTORS, st.integers(-20, 3), st.integers(-3, 9), st.integers(-2, 40))
def test_analyses_of_anything(
    prompts: list[Any], suffixes: list[Any], vector: torch.Tensor, position: int, layer: int, n_top: int
) -> None:
    own = [text if isinstance(text, str) else Suffix(*text) for text in suffixes]
    try:
        found = analyze(MODEL, direction(vector, position, layer), [Prompt(*row) for row in prompts], own, n_top=n_top)
    except UserError as error:
        sentence(error)
        return
    assert found.tables["profile"]


FIELDS = DirectionConfig.__dataclass_fields__
KIND: dict[Any, Any] = {int: st.integers(-2, 12), float: st.floats(-1, 2) | NUMBERS, bool: st.booleans()}


@FEW
@given(
    st.lists(WORDS, max_size=1), st.lists(WORDS, max_size=1),
    st.just([40]) | st.none() | st.lists(st.integers(-3, 900), max_size=2),
    st.fixed_dictionaries({}, optional={name: KIND[type(field.default)] for name, field in FIELDS.items()}),
)  # fmt: skip
def test_directions_of_anything(
    harmful: list[str], harmless: list[str], tokens: list[int] | None, chosen: dict[str, Any]
) -> None:
    more = [
        f"the {word} thing" for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    ]
    bad, good = ([*own, *(f"{verb} {text}" for text in more)] for own, verb in ((harmful, "Break"), (harmless, "Bake")))
    try:
        # few prompts of a random model are refused, and no direction of it passes by chance
        loose = {"keep_by_score": False, "kl_threshold": math.inf, "induce_threshold": -math.inf} | chosen
        found = find_direction(MODEL, bad, good, DirectionConfig(**loose), refusal_tokens=tokens)
    except UserError as error:
        sentence(error)
        return
    assert bool(torch.isfinite(found.vector).all())


@FEW
@given(st.text(max_size=30) | st.sampled_from(["..", "~", "~nobody/x", "/", "a/b@", "@", "x" * 400, "embedded "]))
def test_models_of_any_name(name: str) -> None:
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return  # a hub id, for which there is no network here
    try:
        load_model(name)
    except UserError as error:
        sentence(error)


@FEW
@given(st.integers(-3, 40), st.integers(-3, 9), st.sampled_from(["random", "shuffled", "benign"]))
def test_controls_of_any_number_and_length(length: int, count: int, arm: str) -> None:
    tokenizer = tiny.tokenizer()
    slots = [attacks.build_slot(tokenizer, "Pick a lock", "Sure", "x x")]
    try:
        if arm == "random":
            found = attacks.random_suffixes(tokenizer, slots, count, length, 0, 700)
        elif arm == "benign":
            found = attacks.benign_suffixes(tokenizer, slots, count, length)
        else:
            found = attacks.shuffled_suffixes(tokenizer, slots, slots[0].suffix_ids, count, 0)
    except AttackError as error:
        sentence(error)
        return
    assert len(found) <= max(0, count) and all(text.strip() for text, _ in found)
