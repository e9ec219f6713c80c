"""Last-position forwards over many prompts, with the prefix that all of them share computed once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.caches import cache_argument, fresh, prefix_cache
from attacks.memory import most_tokens
from attacks.precision import contiguous_head
from suffix_analysis.batching import (
    REPLY_BUDGET,
    TOKEN_BUDGET,
    Batch,
    in_order,
    prefix_batches,
)
from suffix_analysis.interventions import ablate, add
from suffix_analysis.models import Model

Context = contextlib.AbstractContextManager[None]


def run_batch(hf: Any, batch: Batch, prefix: Any, kept: int = 1) -> Float[Tensor, "prompt kept vocab"]:
    """Next-token logits at the last ``kept`` positions of every prompt of a batch, in the model's precision."""
    extra: dict[str, Any] = {}
    if prefix is not None:
        extra = {cache_argument(hf): fresh(prefix, len(batch.arguments["input_ids"])), "use_cache": True}
    with contiguous_head(hf):
        out = hf(**batch.arguments, **extra, logits_to_keep=kept)
    logits: Tensor = out.logits
    return logits


def _last(hf: Any, batch: Batch, prefix: Any) -> Float[Tensor, "prompt vocab"]:
    return run_batch(hf, batch, prefix)[:, -1].float()


@torch.no_grad()
def last_logits(hf: Any, tokenizer: Any, rows: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, "prompt vocab"]:
    """Next-token logits at the last position of every prompt (chat[-1]), in float32 and in order.

    The shared prefix (system prompt, turn header) is run once and its keys and values are repeated for every batch.
    Hooks that are on the model act on the prefix as on the rest, so an intervention at every position stays exact.
    """
    n_prefix, groups = prefix_batches(hf, tokenizer, rows)
    prefix = prefix_cache(hf, rows[0][:n_prefix])
    return in_order([(batch, _last(hf, batch, prefix)) for batch in groups])


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
    n_prefix, groups = prefix_batches(model.hf, model.tokenizer, rows, leave=places)
    prefix = prefix_cache(model.hf, rows[0][:n_prefix])
    for batch in groups:

        def catch(x: Tensor, hook: Any, layer: int, group: list[int] = batch.members) -> None:
            seen[layer] += 1
            keep(layer, group, x[:, -places:].cpu())

        hooks = [(name, functools.partial(catch, layer=layer)) for name, layer in names.items()]
        with model.bridge.hooks(fwd_hooks=hooks):
            run_batch(model.hf, batch, prefix)
    missing = [layer for layer, count in seen.items() if count != len(groups)]
    assert not missing, f"hooks that never fired, at layers {missing}"


def _times(batch: Batch, count: int) -> Batch:
    """The batch's rows ``count`` times, one whole batch after the other."""
    return Batch(batch.members, {name: x.repeat(count, 1) for name, x in batch.arguments.items()})


def _at_once(hf: Any, n_prefix: int, groups: Sequence[Batch]) -> int:
    """Vectors that run together: few, long forwards are cheaper than many short ones, as far as memory allows."""
    run = max(batch.arguments["input_ids"].numel() for batch in groups)
    held = max(len(batch.members) * n_prefix for batch in groups)
    return max(1, min(TOKEN_BUDGET // run, most_tokens(hf, REPLY_BUDGET) // (run + held)))


def _logits_of_each(
    model: Model,
    prefix_ids: Int[Tensor, " prefix"],
    groups: Sequence[Batch],
    vectors: Float[Tensor, "vector d_model"],
    change: Callable[[Float[Tensor, "row d_model"]], Context],
    around: Callable[[int, int], Context] = lambda batch, count: contextlib.nullcontext(),
) -> Float[Tensor, "vector prompt vocab"]:
    """Last logits under each of the vectors: ``change`` intervenes with one vector a row.

    ``around`` stands about the forward of a batch (by number) for so many vectors, but not about the prefix's.
    """
    out = []
    for some in vectors.split(_at_once(model.hf, len(prefix_ids), groups)):
        with change(some):
            prefix = prefix_cache(model.hf, prefix_ids, rows=len(some))
        parts = []
        for number, batch in enumerate(groups):
            with change(some.repeat_interleave(len(batch.members), dim=0)), around(number, len(some)):
                logits = _last(model.hf, _times(batch, len(some)), prefix)
            parts.append((batch, logits.unflatten(0, (len(some), -1))))
        out.append(in_order(parts))
    return torch.cat(out)


def ablated_logits(
    model: Model, rows: Sequence[Int[Tensor, " _"]]
) -> Callable[[Float[Tensor, "vector d_model"]], Float[Tensor, "vector prompt vocab"]]:
    """A function from vectors to the last logits of all prompts with each of the vectors ablated."""
    n_prefix, groups = prefix_batches(model.hf, model.tokenizer, rows)

    @torch.no_grad()
    def run(vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector prompt vocab"]:
        return _logits_of_each(model, rows[0][:n_prefix], groups, vectors, lambda each: ablate(model, each))

    return run


@torch.no_grad()
def added_logits(
    model: Model, rows: Sequence[Int[Tensor, " _"]], alpha: float = 1.0, layers: Iterable[int] | None = None
) -> Callable[[Float[Tensor, "vector d_model"], int], Float[Tensor, "vector prompt vocab"]]:
    """A function from (vectors, layer) to the last logits with α · each of the vectors added at that layer's input.

    Nothing changes below the layer, so those blocks run once, here, and are skipped afterwards (the prefix, one row a
    vector, runs whole). ``layers``: those that will be asked for (all if left out); only their inputs are kept.
    """
    n_prefix, groups = prefix_batches(model.hf, model.tokenizer, rows)
    plain = prefix_cache(model.hf, rows[0][:n_prefix])
    inputs: list[dict[int, Tensor]] = []

    def keep(x: Tensor, hook: Any, layer: int) -> None:
        inputs[-1][layer] = x

    wanted = sorted(set(range(model.n_layers) if layers is None else layers))
    hooks = [(f"blocks.{layer}.hook_resid_pre", functools.partial(keep, layer=layer)) for layer in wanted]
    with model.bridge.hooks(fwd_hooks=hooks):
        for batch in groups:
            inputs.append({})
            run_batch(model.hf, batch, plain)

    @torch.no_grad()
    def run(vectors: Float[Tensor, "vector d_model"], layer: int) -> Float[Tensor, "vector prompt vocab"]:
        def skip(number: int, count: int) -> Context:
            return skipped(model, layer, inputs[number][layer].repeat(count, 1, 1))

        def change(each: Tensor) -> Context:
            return add(model, each, layer, alpha)

        return _logits_of_each(model, rows[0][:n_prefix], groups, vectors, change, skip)

    return run


@contextlib.contextmanager
def skipped(model: Model, layer: int, state: Tensor) -> Iterator[None]:
    """Blocks below ``layer`` do nothing while the context lasts; block ``layer`` gets ``state``."""
    # the bridge passes attributes on to what it wraps, so that is what has to be changed and put back
    blocks = [block.original_component for block in model.bridge.blocks][:layer]
    placed = [vars(block).get("forward") for block in blocks]  # accelerate's, where it spread the model
    given: Any = (state,) if model.blocks_give_tuples else state
    try:
        for block in blocks:
            block.forward = lambda *args, **kwargs: given
        yield
    finally:
        for block, own in zip(blocks, placed, strict=True):
            if own is None:
                vars(block).pop("forward", None)
            else:
                block.forward = own
