"""Losses and gradients of the attack engine against their definitions, and the speed-ups that change neither."""

from __future__ import annotations

import pytest
import torch

import attacks
from attacks import scorer as scorer_module
from attacks.candidates import combined, token_gradient
from attacks.grouping import first_changes, group_by_start
from attacks.scorer import Scorer, rescored_best
from attacks.slot import survives
from tests import tiny
from tests.small_attacks import INIT, SMALL, TALKS, plain_loss


@pytest.mark.parametrize("cache", [True, False])
def test_scores_are_the_definition(family: str, cache: bool) -> None:
    model = tiny.hf_model(family)
    slots = [attacks.build_slot(tiny.tokenizer(), talk, "Sure, here", INIT) for talk in TALKS]
    config = attacks.GCGConfig(use_prefix_cache=cache, batch_size=3)
    ids = slots[0].suffix_ids.repeat(7, 1)
    ids[torch.arange(7), torch.arange(7)] = torch.arange(300, 307)
    losses, _ = Scorer(model, slots, config)(ids)
    exact = torch.tensor([[plain_loss(model, slot, row) for slot in slots] for row in ids])
    torch.testing.assert_close(losses, exact, atol=2e-5, rtol=0)
    # a second call must not see the first one's tokens in its prefix
    torch.testing.assert_close(Scorer(model, slots, config)(ids)[0], losses, atol=1e-6, rtol=0)


def test_sharing_the_unchanged_part_changes_no_loss(family: str) -> None:
    model = tiny.hf_model(family)
    slots = [attacks.build_slot(tiny.tokenizer(), talk, "Sure, here", INIT) for talk in TALKS]
    current = slots[0].suffix_ids
    ids = current.repeat(200, 1)
    where = torch.arange(200) % len(current)
    ids[torch.arange(200), where] = torch.arange(300, 500)
    ids[7] = current
    scorer = Scorer(model, slots, attacks.GCGConfig())
    losses, matched = scorer(ids)
    shared, also = scorer(ids, current)
    torch.testing.assert_close(shared, losses, atol=2e-6, rtol=1e-5)
    assert torch.equal(matched, also)
    assert len(group_by_start(first_changes(ids, current), len(current), 8, 25)) > 1, "nothing was shared"


def test_gradient_is_the_slope_of_the_definition(family: str) -> None:
    """d loss / d s of a whole plain forward in which s of another token's embedding is mixed in at one position."""
    model = tiny.hf_model(family)
    slot = attacks.build_slot(tiny.tokenizer(), TALKS[0], "Sure, here", INIT)
    config = attacks.GCGConfig()
    grad = token_gradient(model, [slot], Scorer(model, [slot], config).caches, slot.suffix_ids, config)
    whole = torch.cat([slot.before_ids, slot.suffix_ids, slot.after_ids, slot.target_ids])
    embed, n = model.get_input_embeddings(), len(slot.target_ids)
    for position, token in ((0, 345), (2, 600), (7, 20)):
        share = torch.zeros((), requires_grad=True)
        mixed = embed(whole).detach()
        mixed[len(slot.before_ids) + position] += share * embed(torch.tensor(token)).detach()
        logits = model(inputs_embeds=mixed[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[-n - 1 : -1], slot.target_ids)
        (slope,) = torch.autograd.grad(loss, share)
        assert float(grad[position, token]) == pytest.approx(float(slope), rel=1e-3, abs=1e-5)


def test_low_precision_search_reports_full_precision_losses() -> None:
    model = tiny.hf_model("llama")
    config = attacks.GCGConfig(**{**SMALL, "score_dtype": "bfloat16"})
    found = attacks.run(model, tiny.tokenizer(), TALKS[0], "Sure, here", config)
    slot = attacks.build_slot(tiny.tokenizer(), TALKS[0], "Sure, here", INIT)
    for step in found.steps:
        assert step.loss == pytest.approx(plain_loss(model, slot, torch.tensor(step.ids)), abs=2e-5)
    assert next(model.parameters()).dtype == torch.float32


def test_only_what_the_searchs_error_could_hide_is_scored_again() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    slot = attacks.build_slot(tok, TALKS[0], "Sure, here", INIT)
    config = attacks.GCGConfig(rescore=8)
    exact = Scorer(model, [slot], config)
    search = Scorer(tiny.hf_model("llama", dtype=torch.bfloat16), [slot], config)
    ids = slot.suffix_ids.repeat(40, 1)
    ids[torch.arange(40), torch.arange(40) % 8] = torch.arange(300, 340)
    truth = exact(ids)[0][:, 0]
    winner = ids[int(truth.argmin())].tolist()
    assert rescored_best(search, exact, ids).ids.tolist() == winner
    first = exact.flops
    assert search.error is not None
    assert 0 < search.error < 0.2
    won = rescored_best(search, exact, ids)
    assert won.ids.tolist() == winner
    assert float(won.per_goal) == pytest.approx(float(truth.min()), abs=1e-5)
    assert exact.flops - first < first


def test_combined_leaders_are_the_changes_together() -> None:
    current = torch.tensor([1, 2, 3, 4])
    leaders = torch.tensor([[1, 9, 3, 4], [1, 8, 3, 4], [7, 2, 3, 4], [1, 2, 6, 5], [1, 2, 3, 0]])
    # the second changes what the first has changed already, the fifth what the fourth has
    assert combined(leaders, current, 8).tolist() == [[7, 9, 3, 4], [7, 9, 6, 5]]
    assert combined(leaders, current, 2).tolist() == [[7, 9, 3, 4]]
    assert combined(leaders[:2], current, 8).shape == (0, 4)


def test_the_best_of_single_and_combined_candidates_wins(family: str) -> None:
    model, tok = tiny.hf_model(family), tiny.tokenizer()
    config = attacks.GCGConfig(**{**SMALL, "num_steps": 10}, merge=6)
    attack = attacks.GCG(model, tok, TALKS[:2], "Sure, here", config)
    replaced, before = [], attack.slots[0].suffix_ids.tolist()
    for step in attack.steps():
        assert bool(survives(tok, attack.slots, torch.tensor([step.ids]))[0])
        losses = [plain_loss(model, slot, torch.tensor(step.ids)) for slot in attack.slots]
        assert list(step.per_goal) == pytest.approx(losses, abs=2e-5)
        assert config.search_width <= step.n_candidates <= config.search_width + config.merge - 1
        replaced.append(sum(a != b for a, b in zip(before, step.ids, strict=True)))
        before = list(step.ids)
    assert max(replaced) > 1  # each candidate of its own replaces one


def test_a_combination_that_would_be_tokenised_otherwise_is_refused_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    slot = attacks.build_slot(tok, TALKS[0], "Sure, here", INIT)
    ids = slot.suffix_ids.repeat(8, 1)
    ids[torch.arange(8), torch.arange(8)] = torch.arange(300, 308)
    scorer = Scorer(model, [slot], attacks.GCGConfig(merge=6))
    free = rescored_best(scorer, None, ids, slot.suffix_ids)
    assert (free.n_scored, free.n_refused) == (8 + 5, 0)
    assert int((free.ids != slot.suffix_ids).sum()) > 1, "a combination wins here"

    def one_replaced(rows: torch.Tensor) -> torch.Tensor:
        return (rows != slot.suffix_ids).sum(dim=1) < 2

    kept = rescored_best(scorer, None, ids, slot.suffix_ids, None, one_replaced)
    assert (kept.n_scored, kept.n_refused) == (8, 5)
    assert int((kept.ids != slot.suffix_ids).sum()) == 1
    monkeypatch.setattr(scorer_module, "combined", lambda leaders, current, n: leaders[:3])
    assert rescored_best(scorer, None, ids, slot.suffix_ids).n_scored == 8, (
        "what stands there already is not scored again"
    )


def test_flops_count_every_token_that_is_run() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    slot = attacks.build_slot(tok, TALKS[0], "Sure, here", INIT)
    scorer = Scorer(model, [slot], attacks.GCGConfig())
    scorer(slot.suffix_ids.repeat(3, 1))
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n and "lm_head" not in n)
    n_target = len(slot.target_ids)
    tokens = 3 * (len(slot.suffix_ids) + len(slot.after_ids) + n_target - 1)
    assert scorer.flops == 2 * (body * tokens + head * 3 * n_target)
