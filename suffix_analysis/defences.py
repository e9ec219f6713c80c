"""Mitigations as context managers: they act at the chat tokens of every prompt that runs, also under ``generate``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from suffix_analysis.causal import Head
from suffix_analysis.detectors import TAIL, Harmfulness
from suffix_analysis.directions import Direction
from suffix_analysis.models import Model


@dataclass
class Place:
    """Where the present forward stands.

    ``chat``: the template's chat tokens among those that run, where it is a prompt (neither a shared prefix nor a
    reply's token). ``user`` then marks the tokens of the user's texts among them.
    """

    chat: slice | None = None
    user: Bool[Tensor, "row token"] | None = None


@contextlib.contextmanager
def watched_place(model: Model, behind: int = 0) -> Iterator[Place]:
    """Keep a :class:`Place` up to date while forwards run.

    ``behind`` tokens stand after chat[-1]: none in a prompt, all of the target but the last in an attack's forwards.
    The gradient of an attack passes embeddings instead of ids; then the chat tokens are taken to be where they must be.
    """
    example = model.chat("x")
    chat_ids = example.ids[example.regions["chat"]]
    n_before = int(example.regions["instruction"].nonzero()[0])
    place = Place()

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Int[Tensor, "row token"] | None = kwargs.get("input_ids", args[0] if args else None)
        first = kwargs["inputs_embeds"] if ids is None else ids
        width, stop = first.shape[1], first.shape[1] - behind
        place.chat = place.user = None
        if stop < len(chat_ids):
            return
        chat = slice(stop - len(chat_ids), stop)
        if ids is not None and not bool((ids[:, chat] == chat_ids.to(ids.device)).all()):
            return
        mask = kwargs.get("attention_mask")
        mask = torch.ones(first.shape[:2], device=first.device) if mask is None else mask
        at = (mask.cumsum(dim=1) - 1)[:, -width:]
        user = (at >= n_before) & mask[:, -width:].bool()
        user[:, chat.start :] = False
        place.chat, place.user = chat, user

    handle = model.hf.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield place
    finally:
        handle.remove()


@contextlib.contextmanager
def damped(
    model: Model, heads: Sequence[Head], strength: float, tail: int = TAIL, *, behind: int = 0
) -> Iterator[None]:
    """The chat tokens attend less to the ``tail`` tokens before them, in ``heads``; the others take over the mass.

    A pattern p becomes (1 − ``strength``) p on those tokens and is scaled to sum to 1. Strength 0 changes nothing, bit
    for bit; 1 cuts the edges. ``behind``: see :func:`watched_place`.

    Raises:
        ValueError: the strength is not between 0 and 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it must be between 0 and 1")
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    with watched_place(model, behind) as place:

        def weaken(pattern: Tensor, hook: Any, which: list[int]) -> Tensor | None:
            if place.chat is None:
                return None
            # keys end where queries end, so the chat tokens stand as far from both ends
            n_queries, n_keys = pattern.shape[2:]
            end = n_keys - (n_queries - place.chat.start)
            changed = pattern.clone()
            rows = pattern[:, which, place.chat]
            factor = torch.ones(n_keys, device=rows.device, dtype=rows.dtype)
            factor[max(0, end - tail) : end] = 1 - strength
            # what is left of a row's mass: never 0, because every chat token also attends to itself
            left = 1 - (rows * (1 - factor)).sum(dim=-1, keepdim=True)
            changed[:, which, place.chat] = rows * factor / left
            return changed

        hooks = [
            (f"blocks.{layer}.attn.hook_pattern", functools.partial(weaken, which=which))
            for layer, which in by_layer.items()
        ]
        with model.bridge.hooks(fwd_hooks=hooks):
            yield


@contextlib.contextmanager
def restored(
    model: Model,
    direction: Direction,
    harmfulness: Harmfulness | None = None,
    threshold: float = 0.0,
    strength: float = 1.0,
    *,
    behind: int = 0,
) -> Iterator[None]:
    """The projection at the chat tokens goes to the harmful prompts' mean at the direction's layer.

    With ``harmfulness`` only in prompts whose harmfulness − refusal (see :mod:`suffix_analysis.detectors`) lies above
    ``threshold``; both are read in the same forward, so this costs nothing. ``strength`` is the share of the way: 0
    changes nothing, bit for bit.
    """
    layer, unit = direction.layer, direction.unit.to(model.hf.device)
    low, high = (float(means[layer] @ direction.unit) for means in (direction.means_harmless, direction.means_harmful))
    with watched_place(model, behind) as place:

        def restore(x: Float[Tensor, "row token d_model"], hook: Any) -> Tensor | None:
            if place.chat is None or strength == 0:
                return None
            step = strength * (high - x[:, place.chat].float() @ unit)
            if harmfulness is not None:
                step = step * fires(x, place.chat.stop - 1)[:, None]
            changed = x.clone()
            changed[:, place.chat] += (step[..., None] * unit).to(x.dtype)
            return changed

        def fires(x: Tensor, last: int) -> Bool[Tensor, " row"]:
            assert harmfulness is not None and place.user is not None
            along = x.float() @ harmfulness.unit.to(x.device)
            most = along.masked_fill(~place.user.to(x.device), float("-inf")).max(dim=1).values
            harm = (most - harmfulness.harmless) / (harmfulness.harmful - harmfulness.harmless)
            refusal = (x[:, last].float() @ unit - low) / (high - low)
            return harm - refusal > threshold

        with model.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", restore)]):
            yield
