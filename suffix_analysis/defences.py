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

from suffix_analysis.detectors import TAIL, Harmfulness
from suffix_analysis.directions import Direction
from suffix_analysis.models import Model

Head = tuple[int, int]  # (layer, head)


@dataclass
class Place:
    """Where the present forward stands.

    ``in_chat``: it ends in the template's chat tokens, so it is a prompt, neither a shared prefix nor a reply's token.
    ``user`` then marks the tokens of the user's texts among those that run.
    """

    n_chat: int
    in_chat: bool = False
    user: Bool[Tensor, "row token"] | None = None


@contextlib.contextmanager
def watched_place(model: Model) -> Iterator[Place]:
    """Keep a :class:`Place` up to date while forwards run."""
    example = model.chat("x")
    chat_ids = example.ids[example.regions["chat"]]
    n_before = int(example.regions["instruction"].nonzero()[0])
    place = Place(len(chat_ids))

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Int[Tensor, "row token"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        ends = ids[:, -place.n_chat :]
        place.in_chat = ends.shape[1] == place.n_chat and bool((ends == chat_ids.to(ids.device)).all())
        if not place.in_chat:
            return
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        at = (mask.cumsum(dim=1) - 1)[:, -ids.shape[1] :]
        place.user = (at >= n_before) & mask[:, -ids.shape[1] :].bool()
        place.user[:, -place.n_chat :] = False

    handle = model.hf.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield place
    finally:
        handle.remove()


@contextlib.contextmanager
def damped(model: Model, heads: Sequence[Head], strength: float, tail: int = TAIL) -> Iterator[None]:
    """The chat tokens attend less to the ``tail`` tokens before them, in ``heads``; the others take over the mass.

    A pattern p becomes (1 − ``strength``) p on those tokens and is scaled to sum to 1. Strength 0 changes nothing, bit
    for bit; 1 cuts the edges.

    Raises:
        ValueError: the strength is not between 0 and 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it must be between 0 and 1")
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    with watched_place(model) as place:

        def weaken(pattern: Tensor, hook: Any, which: list[int]) -> Tensor | None:
            if not place.in_chat:
                return None
            pattern = pattern.clone()
            end = pattern.shape[3] - place.n_chat
            rows = pattern[:, which, -place.n_chat :]
            factor = torch.ones(rows.shape[3], device=rows.device, dtype=rows.dtype)
            factor[max(0, end - tail) : end] = 1 - strength
            # what is left of a row's mass: never 0, because every chat token also attends to itself
            left = 1 - (rows * (1 - factor)).sum(dim=-1, keepdim=True)
            pattern[:, which, -place.n_chat :] = rows * factor / left
            return pattern

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
) -> Iterator[None]:
    """The projection at the chat tokens goes to the harmful prompts' mean at the direction's layer.

    With ``harmfulness`` only in prompts whose harmfulness − refusal (see :mod:`suffix_analysis.detectors`) lies above
    ``threshold``; both are read in the same forward, so this costs nothing. ``strength`` is the share of the way: 0
    changes nothing, bit for bit.
    """
    layer, unit = direction.layer, direction.unit.to(model.hf.device)
    low, high = (float(means[layer] @ direction.unit) for means in (direction.means_harmless, direction.means_harmful))
    with watched_place(model) as place:

        def restore(x: Float[Tensor, "row token d_model"], hook: Any) -> Tensor | None:
            if not place.in_chat or strength == 0:
                return None
            chat = x[:, -place.n_chat :]
            step = strength * (high - chat.float() @ unit)
            if harmfulness is not None:
                step = step * fires(x, low, high)[:, None]
            return torch.cat([x[:, : -place.n_chat], chat + (step[..., None] * unit).to(x.dtype)], dim=1)

        def fires(x: Tensor, low: float, high: float) -> Bool[Tensor, " row"]:
            assert harmfulness is not None and place.user is not None
            along = x.float() @ harmfulness.unit.to(x.device)
            most = along.masked_fill(~place.user.to(x.device), float("-inf")).max(dim=1).values
            harm = (most - harmfulness.harmless) / (harmfulness.harmful - harmfulness.harmless)
            refusal = (x[:, -1].float() @ unit - low) / (high - low)
            return harm - refusal > threshold

        with model.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", restore)]):
            yield
