"""The paper's tables on tiny models: controls that are controls, costs by their definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from suffix_analysis import paper_table
from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.generate import generate
from suffix_analysis.interventions import ablate, random_directions
from suffix_analysis.models import Model
from suffix_analysis.paper_table import (
    cross_entropy,
    measure_cost,
    measure_interventions,
    reply_pairs,
    text_pairs,
)
from suffix_analysis.prompts import Prompt
from suffix_analysis.replies import made_once
from tests import tiny

PROMPTS = [
    Prompt(f"{kind}-{i}", text, kind, "report")
    for kind, texts in {
        "harmful": ["Pick a lock", "Break a window now"],
        "harmless": ["Bake a cake", "Sing about the sea", "Name a tree"],
    }.items()
    for i, text in enumerate(texts)
]


def some_direction(model: Model) -> Direction:
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1)) * 3
    zeros = torch.zeros(model.n_layers + 1, model.d_model)
    return Direction(vector, -1, 1, [], zeros, zeros, (5,), {})


def test_random_directions_are_orthogonal_as_long_and_repeatable() -> None:
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 7
    made = random_directions(vector, 3, seed=4)
    for other in made:
        assert float(other.norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
        assert abs(float(other @ vector)) < 1e-3
    assert not torch.allclose(made[0], made[1])
    assert all(torch.equal(a, b) for a, b in zip(made, random_directions(vector, 3, seed=4), strict=True))


def test_replies_that_are_there_are_not_made_again() -> None:
    model = tiny.model("llama")
    plain = {p.id: f"I'm sorry, not {p.id}" for p in PROMPTS}
    _, replies = measure_interventions(model, some_direction(model), PROMPTS, 4, plain=plain)
    told = {row["prompt_id"]: row["reply"] for row in replies if row["intervention"] == "none"}
    assert told == {key: plain[key] for key in told}
    assert told
    assert all(row["reply"] != plain[row["prompt_id"]] for row in replies if row["intervention"] != "none")


def test_interventions_that_were_made_before_a_crash_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = tiny.model("llama"), []

    def interrupted(*args: Any) -> list[str]:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(args)
        return generate(*args)

    def measure() -> Any:
        once = made_once(tmp_path / "interventions.jsonl")
        return measure_interventions(model, some_direction(model), PROMPTS, 4, n_controls=2, made=once)

    whole = measure_interventions(model, some_direction(model), PROMPTS, 4, n_controls=2)
    monkeypatch.setattr(paper_table, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure()
    monkeypatch.setattr(paper_table, "generate", lambda *args: made.append(args) or generate(*args))
    assert measure() == whole
    assert len(made) == len(whole[0]), "each line once: two random directions of the same name are two lines"


def test_table_has_every_line_and_the_replies_behind_it() -> None:
    model = tiny.model("llama")
    rows, replies = measure_interventions(model, some_direction(model), PROMPTS, 6, n_controls=2)
    names = [(row["intervention"], row["kind"]) for row in rows]
    assert names[:7] == [
        ("none", "harmful"),
        ("ablated", "harmful"),
        ("orthogonalised", "harmful"),
        ("set to the harmless mean", "harmful"),
        ("none", "harmless"),
        ("added", "harmless"),
        ("set to the harmful mean", "harmless"),
    ]
    controls = [
        ("random direction ablated", "harmful"),
        ("random direction added", "harmless"),
        ("random direction set to the harmless mean", "harmful"),
        ("random direction set to the harmful mean", "harmless"),
    ]
    assert names[7:] == controls * 2
    texts = {(r["intervention"], r["prompt_id"], r["control"]): r["reply"] for r in replies}
    assert len(texts) == len(replies) == 4 * 2 + 3 * 3 + 2 * 2 * (2 + 3)
    # the same edit in three ways gives the same words: this direction's means are 0
    for i in range(2):
        for other in ("orthogonalised", "set to the harmless mean"):
            assert texts["ablated", f"harmful-{i}", None] == texts[other, f"harmful-{i}", None]
    with ablate(model, some_direction(model).vector):
        wanted = generate(model.hf, model.tokenizer, [model.chat("Pick a lock").ids], 6)
    assert texts["ablated", "harmful-0", None] == wanted[0]


def test_a_report_split_without_prompts_of_a_kind_is_named() -> None:
    model = tiny.model("llama")
    some = [p for p in PROMPTS if p.kind == "harmful"]
    with pytest.raises(UserError, match="no harmless prompts in the report split"):
        measure_interventions(model, some_direction(model), some, 4)


def test_what_a_model_does_not_allow_is_said_in_its_line() -> None:
    model = tiny.model("gemma2")
    rows, _ = measure_interventions(model, some_direction(model), PROMPTS, 4)
    row = next(row for row in rows if row["intervention"] == "orthogonalised")
    assert row["refusal_rate"] is None
    assert "not available" in row["note"]


def test_cross_entropy_is_the_definition() -> None:
    model = tiny.model("qwen3")
    chats = [model.chat("Bake a cake").ids, model.chat("Name a very tall tree").ids]
    pairs = [(chats[0], torch.tensor([7, 8, 9])), (chats[1], torch.tensor([10]))]
    losses = []
    for before, after in pairs:
        with torch.no_grad():
            logits = model.hf(input_ids=torch.cat([before, after])[None]).logits[0]
        losses += torch.nn.functional.cross_entropy(logits[len(before) - 1 : -1], after, reduction="none").tolist()
    assert cross_entropy(model.hf, model.tokenizer, pairs) == pytest.approx(sum(losses) / 4, abs=1e-5)


def test_replies_that_are_kept_as_text_get_the_ids_back_that_they_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that hold the space before a word lose it at a text's beginning, and gain it where they are encoded."""
    model = Model("tiny", tiny.hf_model("llama"), tiny.metaspace_tokenizer())
    (prompt, *_) = (p for p in PROMPTS if p.kind == "harmless")
    text, chat = "Write a letter about the sea", model.chat(prompt.text)
    joined, spaced = (
        model.tokenizer(chat.text + start + text, add_special_tokens=False).input_ids[len(chat.ids) :]
        for start in ("", " ")
    )
    assert joined != spaced and all(model.tokenizer.decode(ids) == text for ids in (joined, spaced))
    for made in (joined, spaced):
        logits = torch.zeros(1, 700)
        logits[0, made[0]] = 1.0
        monkeypatch.setattr(paper_table, "last_logits", lambda hf, tok, rows, logits=logits: logits)
        ((before, found),) = reply_pairs(model, [prompt], {prompt.id: text})
        assert torch.equal(before, chat.ids) and found.tolist() == made
    assert reply_pairs(model, [prompt], {prompt.id: ""}) == []


def test_text_is_cut_into_windows_and_its_cost_reported() -> None:
    model = tiny.model("llama")
    text = "The sea is wide and the trees are tall. " * 40
    pairs = text_pairs(model, text)
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    assert sum(len(a) + len(b) for a, b in pairs) == len(ids)
    rows = measure_cost(model, some_direction(model), PROMPTS, text)
    assert [row["material"] for row in rows] == ["the model's own replies to harmless prompts", "the text given"]
    assert rows[1]["n_tokens"] == len(ids) - len(pairs)
    assert rows[1]["change"] == pytest.approx(rows[1]["ablated"] - rows[1]["none"])
    assert rows[1]["change"] != 0
    for row in rows:  # where nothing stands behind the matrices, weights without the direction cost what ablation costs
        assert row["orthogonalised_change"] == pytest.approx(row["change"], abs=1e-5)
    (post,) = measure_cost(tiny.model("gemma2"), some_direction(tiny.model("gemma2")), PROMPTS)
    assert post["orthogonalised_change"] is None and post["change"] != 0
