"""Greedy replies for many prompts at once: left padding, exact position ids, sorted by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from attacks.precision import contiguous_head

TOKEN_BUDGET = 6144  # prompt tokens in one batch


def left_pad(
    rows: Sequence[Int[Tensor, " _"]], pad_id: int, device: torch.device | str
) -> dict[str, Int[Tensor, "prompt token"]]:
    """``input_ids``, ``attention_mask`` and ``position_ids`` of prompts padded on the left to one length.

    Without the mask and the explicit positions padding moves logits by several nats (METHODS §7).
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "position_ids": positions.to(device)}


def batches(lengths: Sequence[int], token_budget: int = TOKEN_BUDGET) -> list[list[int]]:
    """Indices grouped so that a padded batch stays under ``token_budget`` tokens; similar lengths together."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        # sorted ascending, so the newest prompt sets the padded width
        if groups and (len(groups[-1]) + 1) * lengths[i] <= token_budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def pad_token(tokenizer: Any) -> int:
    """A token id to pad with; its value never matters, because it is masked."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


@torch.no_grad()
def generate(
    hf: Any,
    tokenizer: Any,
    rows: Sequence[Int[Tensor, " _"]],
    max_new_tokens: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy replies to tokenised prompts, in order, without special tokens.

    Args:
        hf: a Hugging Face causal language model; hooks on it (ablation, addition) act on generated tokens too.
        tokenizer: its tokenizer.
        rows: prompt ids, one tensor per prompt.
        max_new_tokens: most tokens in a reply.
        on_batch: called with the number of prompts done after each batch.
    """
    replies = [""] * len(rows)
    pad = pad_token(tokenizer)
    for group in batches([len(row) for row in rows]):
        padded = left_pad([rows[i] for i in group], pad, hf.device)
        padded.pop("position_ids")  # generate() derives the same positions from the mask
        with contiguous_head(hf):
            out = hf.generate(
                **padded,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
            )
        texts = tokenizer.batch_decode(out[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(group, texts, strict=True):
            replies[i] = text
        if on_batch is not None:
            on_batch(len(group))
    return replies
