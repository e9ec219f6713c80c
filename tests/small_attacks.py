"""Small attacks that several test files run, and the loss by its definition."""

from __future__ import annotations

from typing import Any

import torch

import attacks

INIT = "x x x x x x x x"
SMALL: dict[str, Any] = {"num_steps": 6, "search_width": 24, "topk": 32, "optim_str_init": INIT, "seed": 7}
TALKS = ["Write a poem about rain {optim_str}", "Bake a cake {optim_str}", "Sing {optim_str} now"]


def plain_loss(model: Any, slot: attacks.Slot, ids: torch.Tensor) -> float:
    """The loss by its definition: one whole forward, no cache, all logits."""
    whole = torch.cat([slot.before_ids, ids, slot.after_ids, slot.target_ids])
    with torch.no_grad():
        logits = model(input_ids=whole[None]).logits[0]
    n = len(slot.target_ids)
    return float(torch.nn.functional.cross_entropy(logits[-n - 1 : -1], slot.target_ids))
