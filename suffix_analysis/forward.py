"""Last-position forwards over many prompts, with the prefix that all of them share computed once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.caches import cache_argument, fresh, prefix_cache
from attacks.precision import contiguous_head
from suffix_analysis.generate import batches, left_pad, pad_token
from suffix_analysis.interventions import add
from suffix_analysis.models import Model

TOKEN_BUDGET = 4096


def shared_prefix(rows: Sequence[Int[Tensor, " _"]]) -> int:
    """Number of leading tokens that all prompts have in common, leaving at least one token of each."""
    shortest = min(len(row) for row in rows)
    if len(rows) == 1:
        return 0
    stacked = torch.stack([row[: shortest - 1] for row in rows])
    same = (stacked == stacked[0]).all(dim=0)
    return int(same.long().cumprod(0).sum())


@dataclass(frozen=True)
class Batch:
    """Prompts that run together: their places in the list, and the arguments of the forward (without the cache)."""

    members: list[int]
    arguments: dict[str, Tensor]


def prefix_batches(hf: Any, tokenizer: Any, rows: Sequence[Int[Tensor, " _"]]) -> tuple[int, list[Batch]]:
    """The length of the shared prefix, and batches of what follows it, padded on the left."""
    n_prefix = shared_prefix(rows)
    rests = [row[n_prefix:] for row in rows]
    made = []
    for group in batches([len(rest) + n_prefix for rest in rests], TOKEN_BUDGET):
        padded = left_pad([rests[i] for i in group], pad_token(tokenizer), hf.device)
        if n_prefix:
            ones = torch.ones(len(group), n_prefix, dtype=torch.long, device=hf.device)
            padded["attention_mask"] = torch.cat([ones, padded["attention_mask"]], dim=1)
            padded["position_ids"] = padded["position_ids"] + n_prefix
        made.append(Batch(group, padded))
    return n_prefix, made


def run_batch(hf: Any, batch: Batch, prefix: Any) -> Float[Tensor, "prompt vocab"]:
    """Next-token logits at the last position of every prompt of a batch, in float32."""
    extra: dict[str, Any] = {}
    if prefix is not None:
        extra = {cache_argument(hf): fresh(prefix, len(batch.members)), "use_cache": True}
    with contiguous_head(hf):
        out = hf(**batch.arguments, **extra, logits_to_keep=1)
    logits: Tensor = out.logits[:, -1].float()
    return logits


@torch.no_grad()
def last_logits(hf: Any, tokenizer: Any, rows: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, "prompt vocab"]:
    """Next-token logits at the last position of every prompt (chat[-1]), in float32 and in order.

    The shared prefix (system prompt, turn header) is run once and its keys and values are repeated for every batch.
    Hooks that are on the model act on the prefix as on the rest, so an intervention at every position stays exact.
    """
    n_prefix, groups = prefix_batches(hf, tokenizer, rows)
    prefix = prefix_cache(hf, rows[0][:n_prefix])
    return _in_order([(batch, run_batch(hf, batch, prefix)) for batch in groups])


def _in_order(parts: list[tuple[Batch, Tensor]]) -> Tensor:
    order = torch.tensor([i for batch, _ in parts for i in batch.members])
    return torch.cat([logits for _, logits in parts])[order.argsort()]


@torch.no_grad()
def block_inputs(
    model: Model,
    rows: Sequence[Int[Tensor, " _"]],
    places: int,
    keep: Callable[[int, list[int], Float[Tensor, "prompt place d_model"]], None],
) -> None:
    """Call ``keep(layer, prompts, states)`` for every block's input and, as layer ``n_layers``, what leaves the last.

    States are of the last ``places`` tokens of each prompt, place −1 being chat[-1], in the model's precision.
    """
    last = model.n_layers
    names = {f"blocks.{layer}.hook_resid_pre": layer for layer in range(last)}
    names[f"blocks.{last - 1}.hook_resid_post"] = last
    seen = dict.fromkeys(names.values(), 0)
    groups = batches([len(row) for row in rows], TOKEN_BUDGET)
    for group in groups:

        def catch(x: Tensor, hook: Any, layer: int, group: list[int] = group) -> None:
            seen[layer] += 1
            keep(layer, group, x[:, -places:].cpu())

        hooks = [(name, functools.partial(catch, layer=layer)) for name, layer in names.items()]
        padded = left_pad([rows[i] for i in group], pad_token(model.tokenizer), model.hf.device)
        with contiguous_head(model.hf), model.bridge.hooks(fwd_hooks=hooks):
            model.hf(**padded, logits_to_keep=1)
    missing = [layer for layer, count in seen.items() if count != len(groups)]
    assert not missing, f"hooks that never fired, at layers {missing}"


@torch.no_grad()
def added_logits(
    model: Model, rows: Sequence[Int[Tensor, " _"]], alpha: float = 1.0
) -> Callable[[Float[Tensor, " d_model"], int], Float[Tensor, "prompt vocab"]]:
    """A function from (vector, layer) to the last logits with α · vector added at that layer's input.

    Nothing changes below the layer, so those blocks run once, here, and are skipped afterwards (the prefix, one row,
    runs whole).
    """
    n_prefix, groups = prefix_batches(model.hf, model.tokenizer, rows)
    prefix = prefix_cache(model.hf, rows[0][:n_prefix])
    inputs: list[list[Tensor]] = []

    def keep(x: Tensor, hook: Any) -> None:
        inputs[-1].append(x)

    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.n_layers)]
    with model.bridge.hooks(fwd_hooks=[(name, keep) for name in names]):
        for batch in groups:
            inputs.append([])
            run_batch(model.hf, batch, prefix)

    @torch.no_grad()
    def run(vector: Float[Tensor, " d_model"], layer: int) -> Float[Tensor, "prompt vocab"]:
        parts = []
        with add(model, vector, layer, alpha):
            own_prefix = prefix_cache(model.hf, rows[0][:n_prefix])
            for batch, states in zip(groups, inputs, strict=True):
                with _skipped(model, layer, states[layer]):
                    parts.append((batch, run_batch(model.hf, batch, own_prefix)))
        return _in_order(parts)

    return run


@contextlib.contextmanager
def _skipped(model: Model, layer: int, state: Tensor) -> Iterator[None]:
    """Blocks below ``layer`` do nothing; block ``layer`` gets ``state``."""
    # the bridge passes attributes on to what it wraps, so that is what has to be changed and put back
    blocks = [block.original_component for block in model.bridge.blocks][:layer]
    try:
        for block in blocks:
            block.forward = lambda *args, **kwargs: state
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
