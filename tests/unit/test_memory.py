"""Batch sizes from memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attacks import memory
from attacks.memory import TOKEN_BUDGET, candidate_bytes, free_bytes, most_candidates


def model(device: str = "cuda", dtype: torch.dtype = torch.float32) -> Any:
    """Shapes alone; no GPU is needed to name one."""
    config = SimpleNamespace(
        num_key_value_heads=2, num_attention_heads=4, head_dim=8, hidden_size=32, num_hidden_layers=3,
        intermediate_size=48,
    )  # fmt: skip
    return SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: config),
        get_output_embeddings=lambda: SimpleNamespace(weight=torch.empty(1000, 32, device="meta")),
        dtype=dtype,
        device=torch.device(device),
    )


def test_half_of_the_free_memory_is_used_and_never_less_than_one_candidate() -> None:
    each = candidate_bytes(model(), 30, 70, 10)
    assert most_candidates(model(), 30, 70, 10, 200 * each) == 100
    assert most_candidates(model(), 30, 70, 10, each) == 1


def test_processes_side_by_side_divide_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_tasks", 1)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    memory.share_memory(4)
    assert memory.own_bytes(torch.device("cpu")) == 250
    assert most_candidates(model(), 30, 70, 10, 200 * candidate_bytes(model(), 30, 70, 10)) == 100, "half of its part"
    memory.share_memory(0)
    assert memory.own_bytes(torch.device("cpu")) == 1000


def test_logits_and_caches_are_counted() -> None:
    each = candidate_bytes(model(), 30, 70, 10)
    assert candidate_bytes(model(), 30, 70, 11) - each == 2 * 4 * 1000
    assert candidate_bytes(model(), 30, 71, 10) - each == 2 * 4 * (2 * 8) * 3
    half = candidate_bytes(model(dtype=torch.bfloat16), 30, 70, 10)
    assert half - 2 * 4 * 10 * 1000 == (each - 2 * 4 * 10 * 1000) / 2


@pytest.mark.parametrize("n_run", [1, 30, 4000])
def test_on_a_cpu_batches_stop_where_larger_ones_gain_nothing(n_run: int) -> None:
    assert most_candidates(model("cpu"), n_run, 5000, 1, 10**15) == TOKEN_BUDGET // n_run
    assert most_candidates(model("cuda"), n_run, 5000, 1, 10**15) > TOKEN_BUDGET // n_run


def test_this_machine_has_free_memory() -> None:
    assert free_bytes(torch.device("cpu")) > 2**28
