"""Batches: every prompt once, within the budget, with the least padding."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from attacks import memory
from suffix_analysis.batching import batches, prefix_batches
from tests import tiny


def cost(groups: list[list[int]], lengths: list[int], each: int) -> int:
    return sum(each + len(group) * max(lengths[i] for i in group) for group in groups)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_of_the_sorted_prompts_is_cheaper(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(9)]
    found = batches(lengths, 10**6, batch_cost=20)
    assert sorted(i for group in found for i in group) == list(range(9))
    order = sorted(range(9), key=lambda i: lengths[i])
    cheapest = min(
        cost([order[a:b] for a, b in itertools.pairwise([0, *cuts, 9])], lengths, 20)
        for n in range(9)
        for cuts in itertools.combinations(range(1, 9), n)
    )
    assert cost(found, lengths, 20) == cheapest


def test_the_budget_counts_padding_and_what_is_shared() -> None:
    lengths = [3, 9, 9, 4, 8, 1]
    for shared in (0, 10):
        for group in batches(lengths, 40, shared=shared, batch_cost=1000):
            assert len(group) == 1 or len(group) * (max(lengths[i] for i in group) + shared) <= 40
    assert batches([50, 60], 40) == [[0], [1]]
    assert batches([]) == []


def test_prompts_longer_than_the_sliding_window_keep_their_prefix() -> None:
    """Padding between prefix and rest would push the prefix out of the window."""
    hf, tokenizer = tiny.hf_model("mistral", sliding_window=12), SimpleNamespace(pad_token_id=0)
    rows = [torch.arange(10), torch.cat([torch.arange(8), torch.tensor([20])])]
    assert prefix_batches(hf, tokenizer, rows)[0] == 8
    assert prefix_batches(hf, tokenizer, rows, new_tokens=3)[0] == 0


def test_batches_are_smaller_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny.hf_model("llama")
    each = memory.cached_bytes(hf.config, 4) + memory.run_bytes(hf.config, 4)
    assert memory.cached_bytes(hf.config, 4) == 3 * 2 * 4 * 2 * 8  # blocks, keys and values, bytes, heads, d_head
    rows = [torch.arange(10) + 50 * i for i in range(6)]
    assert len(prefix_batches(hf, tiny.tokenizer(), rows)[1]) == 1
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * 20 * each)
    assert [len(batch.members) for batch in prefix_batches(hf, tiny.tokenizer(), rows)[1]] == [2, 2, 2]
