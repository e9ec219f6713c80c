"""Last-position forwards over many prompts, with the prefix that all of them share computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.scorer import cache_argument, contiguous_head, fresh, prefix_cache
from suffix_analysis.generate import batches, left_pad, pad_token

TOKEN_BUDGET = 4096


def shared_prefix(rows: Sequence[Int[Tensor, " _"]]) -> int:
    """Number of leading tokens that all prompts have in common, leaving at least one token of each."""
    shortest = min(len(row) for row in rows)
    if len(rows) == 1:
        return 0
    stacked = torch.stack([row[: shortest - 1] for row in rows])
    same = (stacked == stacked[0]).all(dim=0)
    return int(same.long().cumprod(0).sum())


@torch.no_grad()
def last_logits(hf: Any, tokenizer: Any, rows: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, "prompt vocab"]:
    """Next-token logits at the last position of every prompt (chat[-1]), in float32 and in order.

    The shared prefix (system prompt, turn header) is run once and its keys and values are repeated for every batch.
    Hooks that are on the model act on the prefix as on the rest, so an intervention at every position stays exact.
    """
    n_prefix = shared_prefix(rows)
    prefix = prefix_cache(hf, rows[0][:n_prefix])
    rests = [row[n_prefix:] for row in rows]
    logits: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in batches([len(rest) + n_prefix for rest in rests], TOKEN_BUDGET):
        padded = left_pad([rests[i] for i in group], pad_token(tokenizer), hf.device)
        extra: dict[str, Any] = {}
        if prefix is not None:
            ones = torch.ones(len(group), n_prefix, dtype=torch.long, device=hf.device)
            padded["attention_mask"] = torch.cat([ones, padded["attention_mask"]], dim=1)
            padded["position_ids"] = padded["position_ids"] + n_prefix
            extra = {cache_argument(hf): fresh(prefix, len(group)), "use_cache": True}
        with contiguous_head(hf):
            out = hf(**padded, **extra, logits_to_keep=1)
        for i, row in zip(group, out.logits[:, -1].float(), strict=True):
            logits[i] = row
    return torch.stack(logits)
