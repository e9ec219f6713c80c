"""Prompts in padded batches: similar lengths together, and what all of them begin with taken apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.memory import most_tokens

TOKEN_BUDGET = 4096  # tokens of a batch at most; fewer where memory is short
REPLY_BUDGET = 16384  # the same, while replies are made
BATCH_COST = 128  # one batch more costs about as much as so many tokens (measured on the embedded model, two cores)


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


def batches(
    lengths: Sequence[int], token_budget: int = TOKEN_BUDGET, *, shared: int = 0, batch_cost: int = BATCH_COST
) -> list[list[int]]:
    """Indices in batches of at most ``token_budget`` padded tokens (or of one), similar lengths together.

    The cuts are those with the least padding, where a further batch costs as much as ``batch_cost`` tokens. ``shared``
    more tokens of each prompt are held in memory but not run.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    # least[n]: cost of the best batches of the n shortest; cut[n]: where the last of them begins
    least, cut = [0], [0]
    for n in range(1, len(order) + 1):
        width = lengths[order[n - 1]]
        first = max(0, n - max(1, token_budget // max(1, width + shared)))
        costs = [(least[start] + batch_cost + (n - start) * width, start) for start in range(first, n)]
        cost, start = min(costs)
        least.append(cost)
        cut.append(start)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]


def pad_token(tokenizer: Any) -> int:
    """A token id to pad with; its value never matters, because it is masked."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def shared_prefix(rows: Sequence[Int[Tensor, " _"]], leave: int = 1) -> int:
    """Number of leading tokens that all prompts have in common, leaving at least ``leave`` tokens of each."""
    shortest = min(len(row) for row in rows)
    if len(rows) == 1:
        return 0
    stacked = torch.stack([row[: max(0, shortest - leave)] for row in rows])
    same = (stacked == stacked[0]).all(dim=0)
    return int(same.long().cumprod(0).sum())


_most_shared: ContextVar[int | None] = ContextVar("most_shared", default=None)


@contextlib.contextmanager
def sharing_at_most(n_tokens: int) -> Iterator[None]:
    """No prefix of more than ``n_tokens`` is taken apart meanwhile: hooks find the rest of a prompt in one forward."""
    token = _most_shared.set(n_tokens)
    try:
        yield
    finally:
        _most_shared.reset(token)


@dataclass(frozen=True)
class Batch:
    """Prompts that run together: their places in the list, and the arguments of the forward (without the cache)."""

    members: list[int]
    arguments: dict[str, Tensor]


def prefix_batches(
    hf: Any,
    tokenizer: Any,
    rows: Sequence[Int[Tensor, " _"]],
    new_tokens: int = 0,
    leave: int = 1,
    logits: bool = False,
) -> tuple[int, list[Batch]]:
    """The length of the shared prefix, and batches of what follows it, padded on the left.

    The padding stands between the prefix and the rest, where a sliding window would count it; so nothing is taken apart
    if the longest prompt and ``new_tokens`` more do not fit into the model's window. Every new token runs all batches
    again, so where some are to come there are fewer and larger ones. At least ``leave`` tokens of each prompt are left
    to the batches. ``logits``: not only the last token's are wanted.
    """
    window = getattr(hf.config.get_text_config(), "sliding_window", None)
    longest = max(len(row) for row in rows) + new_tokens
    n_prefix = 0 if window is not None and longest > window else shared_prefix(rows, leave)
    most = _most_shared.get()
    n_prefix = n_prefix if most is None else min(n_prefix, most)
    rests = [row[n_prefix:] for row in rows]
    budget = most_tokens(hf, REPLY_BUDGET if new_tokens else TOKEN_BUDGET, logits)
    made = []
    lengths, cost = [len(rest) for rest in rests], BATCH_COST * (1 + new_tokens)
    for group in batches(lengths, budget, shared=n_prefix + new_tokens, batch_cost=cost):
        padded = left_pad([rests[i] for i in group], pad_token(tokenizer), hf.device)
        if n_prefix:
            ones = torch.ones(len(group), n_prefix, dtype=torch.long, device=hf.device)
            padded["attention_mask"] = torch.cat([ones, padded["attention_mask"]], dim=1)
            padded["position_ids"] = padded["position_ids"] + n_prefix
        made.append(Batch(group, padded))
    return n_prefix, made


def in_order(parts: list[tuple[Batch, Float[Tensor, "*vector _ vocab"]]]) -> Float[Tensor, "*vector prompt vocab"]:
    """What batches gave, as one tensor in the order of the prompts."""
    order = torch.tensor([i for batch, _ in parts for i in batch.members])
    return torch.cat([logits for _, logits in parts], dim=-2)[..., order.argsort(), :]
