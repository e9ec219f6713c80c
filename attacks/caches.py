"""Key-value caches of what stands before the tokens to be run, shared by many forwards."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.precision import contiguous_head


def prefix_cache(model: Any, ids: Int[Tensor, " before"], before: Any = None, rows: int = 1) -> Any:
    """Keys and values of ``ids``, which stand at the beginning or after ``before`` (None when there are none).

    Of ``rows`` equal sequences, for hooks that treat them differently.
    """
    if len(ids) == 0:
        return before
    with torch.no_grad(), contiguous_head(model):
        out = model(
            input_ids=ids.expand(rows, -1).to(model.device),
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(model): fresh(before, rows)},
        )
    return out[cache_argument(model)]


def keeps_tokens(model: Any) -> bool:
    """Whether all blocks keep keys and values of tokens: a state of another kind can be neither shared nor derived."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ()
    attention = all("attention" in kind and "linear" not in kind for kind in kinds)
    return attention and bool(getattr(text, "num_attention_heads", 0))


def cache_argument(model: Any) -> str:
    """The forward's name for the key-value cache: transformers renamed ``past_key_values`` to ``cache`` in 5.2x."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def fresh(cache: Any, batch: int, drop: int = 0, since: int = 0) -> Any:
    """A copy of ``cache`` for ``batch`` sequences, without its last ``drop`` tokens.

    Blocks before ``since`` will not run, so their part is not repeated.

    A cache of several sequences is repeated one by one: the first, as often as needed, then the second.

    A forward appends to the cache it is given, so never share one. Plain attention layers append by making new tensors,
    so theirs are shared and expanded, not copied; other kinds of layers are copied.
    """
    if cache is None:
        return None
    if not _plain(cache):
        copied = copy.deepcopy(cache)
        times = batch // next(len(layer.keys) for layer in cache.layers if layer.is_initialized)
        if times > 1:
            copied.batch_repeat_interleave(times)
        return copied
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for index, layer in enumerate(copied.layers):
        if drop:
            layer.crop(-drop)
        if index >= since and layer.is_initialized and batch > len(layer.keys):
            layer.keys, layer.values = (_repeated(x, batch) for x in (layer.keys, layer.values))
    return copied


def _repeated(x: Float[Tensor, "row head token d_head"], batch: int) -> Float[Tensor, "batch head token d_head"]:
    return x.expand(batch, -1, -1, -1) if len(x) == 1 else x.repeat_interleave(batch // len(x), dim=0)


def croppable(cache: Any, more: int = 0) -> bool:
    """Whether tokens can be dropped from the cache's end once it holds ``more`` of them.

    Not from sliding windows that have lost their beginning.
    """
    if cache is None or not _plain(cache):
        return False
    return all(not layer.is_sliding or layer.get_seq_length() + more < layer.sliding_window for layer in cache.layers)


def _plain(cache: Any) -> bool:
    from transformers.cache_utils import DynamicLayer

    return all(isinstance(layer, DynamicLayer) for layer in cache.layers)
