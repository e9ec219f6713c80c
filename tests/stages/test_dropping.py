"""Candidates dropped once their partial loss exceeds complete ones: the result is that of scoring everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attacks
from attacks import scorer as scorer_module
from attacks.scorer import Scorer, rescored_best
from tests import tiny

TALKS = ["Write a poem {optim_str}", "Bake a cake {optim_str}", "Sing {optim_str} now", "Draw a cat {optim_str}"]
INIT = "x x x x x x x x"


class Counted(Scorer):
    """A scorer whose losses come from a table; ids hold the row's number. Counts what it scores."""

    truth: Tensor
    scored = 0

    def _goal(self, goal: int, ids: Tensor, current: Tensor | None) -> tuple[Tensor, Tensor]:
        self.scored += len(ids)
        return self.truth[ids[:, 0], goal], torch.ones(len(ids), dtype=torch.bool)


def counted(truth: Tensor, **config: Any) -> Counted:
    slots = [attacks.build_slot(tiny.tokenizer(), talk, "Sure", INIT) for talk in TALKS]
    scorer = Counted(tiny.hf_model("llama"), slots, attacks.GCGConfig(use_prefix_cache=False, **config))
    scorer.truth = truth
    return scorer


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_the_best_are_complete_and_others_are_dropped(seed: int, margin: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(200, len(TALKS), generator=generator) ** 2 * torch.tensor([1.0, 4.0, 0.5, 2.0])
    means = truth.mean(dim=1)
    scorer, ids = counted(truth), torch.arange(200)[:, None]
    table, _ = scorer(ids, margin=margin)
    done = table.isfinite()
    assert torch.equal(table[done], truth[done])
    assert bool(done[means <= means.min() + margin].all())
    assert bool((means[~done.all(dim=1)] > means.min() + margin).all())
    assert scorer.scored < truth.numel()
    assert int(table.mean(dim=1).argmin()) == int(means.argmin())


def test_nothing_is_dropped_where_parts_of_a_sum_may_be_negative() -> None:
    truth = torch.rand(50, len(TALKS), generator=torch.Generator().manual_seed(0))
    scorer = counted(truth, use_mellowmax=True)
    table, _ = scorer(torch.arange(50)[:, None], margin=0.0)
    assert torch.equal(table, truth)


def test_an_attack_takes_the_same_steps_with_and_without_dropping(monkeypatch: pytest.MonkeyPatch) -> None:
    config = attacks.GCGConfig(
        num_steps=8,
        search_width=24,
        topk=32,
        optim_str_init=INIT,
        seed=7,
        score_dtype="float32",
        halving=False,
        merge=0,
    )
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    slots = [attacks.build_slot(tok, talk, "x", INIT) for talk in TALKS]
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # sharp predictions, so that candidates differ by more than goals do
        logits = [model(input_ids=torch.cat([s.before_ids, s.suffix_ids, s.after_ids])[None]).logits for s in slots]
    targets = [tok.decode(found[0, -1].argmax()) for found in logits]
    dropped = attacks.run(model, tok, TALKS, targets, config)
    monkeypatch.setattr(Scorer, "_droppable", property(lambda self: False))
    whole = attacks.run(model, tok, TALKS, targets, config)
    assert sum(step.flops for step in dropped.steps) < 0.9 * sum(step.flops for step in whole.steps)
    assert dropped.strings == whole.strings
    assert dropped.losses == pytest.approx(whole.losses, abs=1e-5)


@pytest.mark.parametrize("halving", [False, True])
def test_dropping_does_not_starve_combinations(halving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever could be dropped, the same leaders are combined."""
    found: list[list[list[int]]] = []

    def watched(leaders: Tensor, current: Tensor, n: int) -> Tensor:
        found.append(leaders[:n].tolist())
        return leaders[:0]

    monkeypatch.setattr(scorer_module, "combined", watched)
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(128, len(TALKS), generator=generator) ** 2 * torch.tensor([1.0, 4.0, 0.5, 2.0])
    ids, current = torch.arange(128)[:, None].repeat(1, 2), torch.tensor([999, 999])
    for droppable in (True, False):
        monkeypatch.setattr(Scorer, "_droppable", property(lambda self, value=droppable: value))
        rescored_best(counted(truth, merge=8, rescore=8), None, ids, current, 0 if halving else None)
    assert found[0] == found[1] and len(found[0]) == 8


@pytest.mark.parametrize("first", [0, 2])
def test_halving_goes_on_with_the_better_half(first: int) -> None:
    truth = torch.rand(200, len(TALKS), generator=torch.Generator().manual_seed(0))
    scorer = counted(truth, use_mellowmax=True)  # nothing is dropped for its loss
    table, _ = scorer(torch.arange(200)[:, None], first=first)
    assert scorer.scored == 200 + 100 + 50 + 25
    order = [(first + i) % len(TALKS) for i in range(len(TALKS))]
    kept = torch.arange(200)
    for i, goal in enumerate(order[:-1]):
        assert table[kept, goal].isfinite().all()
        kept = kept[truth[kept][:, order[: i + 1]].sum(dim=1).argsort()[: len(kept) // 2]]
    assert sorted(table.isfinite().all(dim=1).nonzero()[:, 0].tolist()) == sorted(kept.tolist())
    assert torch.equal(table[kept], truth[kept])


def test_halving_leaves_enough_to_rescore_and_changes_nothing_for_one_conversation() -> None:
    truth = torch.rand(30, len(TALKS), generator=torch.Generator().manual_seed(0))
    table, _ = counted(truth, rescore=20)(torch.arange(30)[:, None], first=1)
    assert int(table.isfinite().all(dim=1).sum()) == 20
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    config = {"num_steps": 4, "search_width": 16, "topk": 32, "optim_str_init": INIT, "seed": 0}
    runs = [attacks.run(model, tok, TALKS[0], "Sure", attacks.GCGConfig(halving=h, **config)) for h in (True, False)]
    assert runs[0].losses == runs[1].losses and runs[0].strings == runs[1].strings


def test_a_loss_that_is_not_finite_is_still_an_error() -> None:
    truth = torch.rand(20, len(TALKS))
    truth[3, 2] = float("nan")
    with pytest.raises(attacks.AttackError, match="conversation 2 is not finite"):
        counted(truth)(torch.arange(20)[:, None])


def test_everything_but_the_scouts_may_be_dropped() -> None:
    """One conversation tells nearly all, so that the bound of the scouts leaves nobody for the third."""
    truth = torch.full((200, len(TALKS)), 0.01)
    truth[:, 0] = 1 + torch.arange(200.0)
    table, _ = counted(truth)(torch.arange(200)[:, None], margin=0.0)
    assert int(table.mean(dim=1).argmin()) == 0
    assert torch.equal(table[0], truth[0])
