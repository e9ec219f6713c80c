"""Further objective terms: what they read, their gradient, and that an attack follows them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attacks
from attacks.candidates import token_gradient
from attacks.scorer import Scorer
from attacks.terms import Projection, SuffixAttention, Term
from tests import tiny

INIT = "x x x x x x x x"
TALK = "Write a poem about rain {optim_str}"


def direction(model: Any) -> torch.Tensor:
    return torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(3))


def count_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def whole(slot: attacks.Slot, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([slot.before_ids, ids, slot.after_ids, slot.target_ids])[None]


def plain_projection(model: Any, slot: attacks.Slot, ids: torch.Tensor) -> float:
    """The projection by its definition: one whole forward and its hidden states."""
    with torch.no_grad():
        states = model(whole(slot, ids), output_hidden_states=True).hidden_states[1][0]
    place = len(slot.before_ids) + len(ids) + len(slot.after_ids) - 1
    r = direction(model)
    return float(states[place] @ (r / r.norm()))


def plain_attention(model: Any, slot: attacks.Slot, ids: torch.Tensor) -> float:
    """Mean attention from the template's tokens to the suffix by its definition."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        rows = torch.stack(model(whole(slot, ids), output_attentions=True).attentions)[:, 0]
    model.set_attn_implementation("sdpa")
    start = len(slot.before_ids)
    stop = start + len(ids)
    return float(rows[:, :, stop : stop + len(slot.after_ids), start:stop].sum(-1).mean())


@pytest.mark.parametrize("kind", ["projection", "attention"])
def test_terms_are_their_definition_and_add_to_the_loss(family: str, kind: str) -> None:
    model = tiny.hf_model(family)
    slot = attacks.build_slot(tiny.tokenizer(), TALK, "Sure, here", INIT)
    term: Term = Projection(direction(model), 1, 0.5) if kind == "projection" else SuffixAttention(weight=0.5)
    plain = plain_projection if kind == "projection" else plain_attention
    ids = slot.suffix_ids.repeat(5, 1)
    ids[torch.arange(5), torch.arange(5)] = torch.arange(300, 305)
    alone, _ = Scorer(model, [slot], attacks.GCGConfig())(ids)
    hooks = count_hooks(model)
    both, _ = Scorer(model, [slot], attacks.GCGConfig(), (term,))(ids, slot.suffix_ids)
    assert count_hooks(model) == hooks
    wanted = torch.tensor([[plain(model, slot, row)] for row in ids])
    torch.testing.assert_close(both - alone, 0.5 * wanted, atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["projection", "attention"])
def test_gradient_includes_the_term(kind: str) -> None:
    model = tiny.hf_model("llama", tie_word_embeddings=False)
    slot = attacks.build_slot(tiny.tokenizer(), TALK, "Sure, here", INIT)
    term: Term = Projection(direction(model), 1, 50.0) if kind == "projection" else SuffixAttention(weight=50.0)
    config = attacks.GCGConfig()
    caches = Scorer(model, [slot], config).caches
    grad = token_gradient(model, [slot], caches, slot.suffix_ids, config, (term,))
    embed = model.get_input_embeddings()
    scorer = Scorer(model, [slot], config, (term,))
    for position, token in ((0, 345), (5, 600)):
        # central difference of the score when a little of another token is mixed into the embedding row
        row, eps = int(slot.suffix_ids[position]), 1e-2
        probe = slot.suffix_ids.clone()
        probe[position] = 699  # a row of its own, so that only this position changes
        original = embed.weight.data[699].clone()
        scores = []
        for share in (eps, -eps):
            embed.weight.data[699] = embed.weight.data[row] + share * embed.weight.data[token]
            scores.append(float(scorer(probe[None])[0]))
        embed.weight.data[699] = original
        slope = (scores[0] - scores[1]) / (2 * eps)
        assert float(grad[position, token]) == pytest.approx(slope, rel=0.05, abs=2e-3)


def test_an_attack_follows_the_term() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    slot = attacks.build_slot(tok, TALK, "Sure", INIT)
    config = attacks.GCGConfig(num_steps=8, search_width=24, topk=32, optim_str_init=INIT, seed=1)
    before = plain_projection(model, slot, slot.suffix_ids)
    found = attacks.run(model, tok, TALK, "Sure", config, terms=[Projection(direction(model), 1, 100.0)])
    reached = plain_projection(model, slot, torch.tensor(found.best_ids))
    without = attacks.run(model, tok, TALK, "Sure", config)  # the same seed
    assert reached < before and reached < plain_projection(model, slot, torch.tensor(without.best_ids))


def test_bad_terms_are_named() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    term = Projection(direction(model), 99)
    with pytest.raises(attacks.AttackError, match="layer 99 does not exist"):
        attacks.run(model, tok, TALK, "Sure", attacks.GCGConfig(optim_str_init=INIT), terms=[term])
    bad = {
        r"layers is \(99,\); the model has blocks 0 to 2": SuffixAttention(layers=(99,)),
        r"layers is \(\)": SuffixAttention(layers=()),
        r"shape \[3\]": Projection(torch.ones(3), 1),
        "length 0": Projection(torch.zeros(32), 1),
    }
    for told, other in bad.items():
        with pytest.raises(attacks.AttackError, match=told):
            attacks.run(model, tok, TALK, "Sure", attacks.GCGConfig(optim_str_init=INIT), terms=[other])
    with pytest.raises(attacks.AttackError, match="compat mode"):
        attacks.run(model, tok, TALK, "Sure", attacks.GCGConfig.nanogcg(optim_str_init=INIT), terms=[term])
