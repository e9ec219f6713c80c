"""Mitigations as context managers: they act at the chat tokens of every prompt that runs, also under ``generate``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attacks.caches import cache_argument
from attacks.terms import decoder_layers
from suffix_analysis.batching import sharing_at_most
from suffix_analysis.causal import Head
from suffix_analysis.chat import Chat
from suffix_analysis.detectors import TAIL, Harmfulness, harm_without_refusal, peak
from suffix_analysis.directions import Direction, chat_means
from suffix_analysis.errors import UserError
from suffix_analysis.models import Model


@dataclass
class Place:
    """Where the present forward stands; None where no row holds a whole prompt (a shared prefix, a reply's token).

    ``chat`` marks the template's chat tokens of every row among the tokens that run, ``last`` is the place of chat[-1]
    among them, and ``user`` marks the tokens of the users' texts among all keys, cached ones included.
    """

    chat: Bool[Tensor, "row token"] | None = None
    last: Int[Tensor, " row"] | None = None
    user: Bool[Tensor, "row key"] | None = None

    @property
    def queries(self) -> slice:
        """The tokens that run from the first chat token of any row to the last one."""
        assert self.chat is not None
        at = self.chat.any(dim=0).nonzero().flatten()
        return slice(int(at[0]), int(at[-1]) + 1)


@dataclass
class Firings:
    """In which prompts a detector has fired since that was last taken; to be handed to `restored`."""

    seen: list[Bool[Tensor, " row"]] = field(default_factory=list)

    def __call__(self, rows: Bool[Tensor, " row"]) -> None:
        """The rows of one forward."""
        self.seen.append(rows)

    def take(self) -> float | None:
        """The share of them in which it fired, None where it was not asked; they are forgotten."""
        found = float(torch.cat(self.seen).double().mean()) if self.seen else None
        self.seen.clear()
        return found


@contextlib.contextmanager
def watched_place(model: Model, behind: int = 0) -> Iterator[Place]:
    """Keep a `Place` up to date while forwards run.

    Chat tokens are recognised by their ids, wherever they stand in a row, so a reply may follow them. The gradient of
    an attack passes embeddings instead of ids: there ``behind`` tokens stand after chat[-1] (all of the target but the
    last). No prefix that holds a user's tokens is shared between prompts meanwhile, because what is read at those
    tokens must run together with chat[-1].

    Raises:
        UserError: in a forward whose mask is not one of rows and tokens, or behind a cache that holds part of a prompt.
    """
    example = model.chat("x")
    chat_ids = example.ids[example.regions["chat"]]
    # the first chat token can melt into the text before it in some tokenizers; the others cannot
    known = chat_ids[1:] if len(chat_ids) > 2 else chat_ids
    n_before = int(example.regions["instruction"].nonzero()[0])
    place, names = Place(), (cache_argument(model.hf), "past_key_values")  # the older name is taken, too
    seen: WeakSet[Any] = WeakSet()  # caches whose prompts ran as a whole

    def ends(ids: Int[Tensor, "row token"] | None, width: int, n_rows: int) -> Int[Tensor, " row"]:
        """The place of chat[-1] in every row, −1 where it holds none."""
        if ids is None:
            return torch.full((n_rows,), width - behind - 1 if width - behind >= len(chat_ids) else -1)
        if width < len(known):
            return torch.full((n_rows,), -1)
        found = (ids.unfold(1, len(known), 1) == known.to(ids.device)).all(dim=-1)
        places = torch.arange(found.shape[1], device=ids.device) + len(known) - 1
        return torch.where(found, places, -1).max(dim=1).values

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Int[Tensor, "row token"] | None = kwargs.get("input_ids", args[0] if args else None)
        first = kwargs["inputs_embeds"] if ids is None else ids
        n_rows, width = first.shape[:2]
        last = ends(ids, width, n_rows).to(first.device)
        place.chat = place.last = place.user = None
        cache = next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
        if cache is not None and cache not in seen and (cached := cache.get_seq_length()) > n_before:
            raise UserError(
                f"A mitigation has to meet a whole prompt in one forward, and {cached} tokens of this one stand in a "
                "cache that it has not seen; run the prompt without past_key_values."
            )
        if int(last.max()) < 0:
            return
        if cache is not None:
            seen.add(cache)
        tokens = torch.arange(width, device=first.device)
        place.last = last
        place.chat = (tokens <= last[:, None]) & (tokens > last[:, None] - len(chat_ids)) & (last[:, None] >= 0)
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise UserError(
                "A mitigation has to know which tokens are padding: give the model an attention mask of rows and "
                "tokens (generate with cache_implementation='static' makes another; leave that out)."
            )
        if mask is None:
            n_keys = width + (0 if cache is None else cache.get_seq_length())
            mask = torch.ones(n_rows, n_keys, device=first.device)
        keys = torch.arange(mask.shape[1], device=first.device)
        before_chat = keys < (mask.shape[1] - width) + last[:, None] - len(chat_ids) + 1
        place.user = mask.bool() & (mask.cumsum(dim=1) - 1 >= n_before) & before_chat

    def keep(_: Any, __: tuple[Any, ...], output: Any) -> None:
        made = next((getattr(output, name) for name in names if getattr(output, name, None) is not None), None)
        if place.chat is not None and made is not None:  # a model that is given none makes one
            seen.add(made)

    handles = model.hf.register_forward_pre_hook(note, with_kwargs=True), model.hf.register_forward_hook(keep)
    try:
        with sharing_at_most(n_before):
            yield place
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def damped(
    model: Model, heads: Sequence[Head], strength: float, tail: int = TAIL, *, before: bool = False, behind: int = 0
) -> Iterator[None]:
    """The chat tokens attend less to the last ``tail`` tokens of the user's text, in ``heads``; others take the mass.

    A pattern p becomes (1 − ``strength``) p on those tokens and is scaled to sum to 1. Strength 0 changes nothing, bit
    for bit; 1 cuts the edges. With ``before``, as a control, as much mass is taken from the user's tokens before them
    instead, or all that is there. ``behind``: see `watched_place`.

    Raises:
        ValueError: the strength is not between 0 and 1.
        UserError: the model has no such head, or a forward has a mask that is not one of rows and tokens.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it must be between 0 and 1")
    for layer, head in heads:
        if not (0 <= layer < model.n_layers and 0 <= head < model.n_heads):
            raise UserError(
                f"There is no head ({layer}, {head}); {model.name} has layers 0 to {model.n_layers - 1} with heads 0 to"
                f" {model.n_heads - 1}."
            )
    if strength == 0:  # not even the batches are others
        yield
        return
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    with watched_place(model, behind) as place:

        def weaken(pattern: Tensor, hook: Any, which: list[int]) -> Tensor | None:
            if place.chat is None or place.user is None:
                return None
            at = place.queries
            user = place.user[:, -pattern.shape[3] :].to(pattern.device)
            ends = user & (user.flip(1).cumsum(dim=1).flip(1) <= tail)
            rows = pattern[:, which, at].float()  # a row of bfloat16 sums to 1 only within a tenth
            taken = strength * ends[:, None, None] * rows
            if before:
                there = (user & ~ends)[:, None, None] * rows
                mass = there.sum(dim=-1, keepdim=True).clamp(min=1e-30)
                taken = there * (taken.sum(dim=-1, keepdim=True) / mass).clamp(max=1)
            left = rows - taken
            # a row whose mass was all there, to the last bit, stays empty
            left = left / left.sum(dim=-1, keepdim=True).clamp(min=1e-30)
            chat = place.chat[:, None, at, None].to(pattern.device)
            changed = pattern.clone()
            changed[:, which, at] = torch.where(chat, left.to(pattern.dtype), pattern[:, which, at])
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
    levels: Float[Tensor, " chat"],
    harmfulness: Harmfulness | None = None,
    threshold: float = 0.0,
    strength: float = 1.0,
    *,
    along: Float[Tensor, " d_model"] | None = None,
    behind: int = 0,
    fired: Firings | None = None,
) -> Iterator[None]:
    """At the direction's layer the projection at every chat token goes to ``levels``, the harmful prompts' means there.

    With ``harmfulness`` only in prompts whose harmfulness − refusal (see `suffix_analysis.detectors`) lies above
    ``threshold``; both are read in the same forward, so this costs nothing. ``strength`` is the share of the way: 0
    changes nothing, bit for bit. ``along``: the same steps are taken along this direction instead, as a control.
    ``fired`` is told in which of the prompts of a forward the detector fires. It acts on the prompt alone, not on the
    tokens of a reply.

    Raises:
        UserError: a forward has a mask that is not one of rows and tokens.
    """
    if strength == 0:  # not even the batches are others
        yield
        return
    layer, unit = direction.layer, direction.unit.to(model.hf.device)
    to = unit if along is None else (along / along.norm()).to(unit)
    with watched_place(model, behind) as place:

        def restore(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            if place.chat is None or place.last is None:
                return None
            x: Float[Tensor, "row token d_model"] = args[0] if args else kwargs["hidden_states"]
            at = place.queries
            tokens = torch.arange(at.start, at.stop, device=x.device)
            first = place.last.to(x.device)[:, None] - len(levels) + 1
            wanted = levels.to(x.device)[(tokens - first).clamp(0, len(levels) - 1)]
            step = strength * (wanted - x[:, at].float() @ unit.to(x.device)) * place.chat[:, at].to(x.device)
            if harmfulness is not None:
                now = fires(x)
                step = step * now[:, None]
                if fired is not None:
                    fired(now[place.last.to(x.device) >= 0].cpu())
            changed = x.clone()
            changed[:, at] += (step[..., None] * to.to(x.device)).to(x.dtype)
            return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

        def fires(x: Tensor) -> Bool[Tensor, " row"]:
            assert harmfulness is not None and place.user is not None and place.last is not None
            along_harm = x.float() @ harmfulness.unit.to(x.device)
            user = place.user[:, -x.shape[1] :].to(x.device)
            harm = peak(along_harm, user)
            here = x[torch.arange(len(x), device=x.device), place.last.to(x.device)].float()
            return harm_without_refusal(direction, harmfulness, harm, here @ unit.to(x.device)) > threshold

        # on the block itself: the model need not be wrapped, which takes time in every forward
        handle = decoder_layers(model.hf)[layer].register_forward_pre_hook(restore, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def harmful_levels(model: Model, direction: Direction, harmful: Sequence[Chat]) -> Float[Tensor, " chat"]:
    """The mean projection of harmful prompts at every chat position, at the direction's layer."""
    means, _ = chat_means(model, harmful)
    return means[direction.layer].float() @ direction.unit
