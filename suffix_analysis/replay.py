"""Replays: the chat tokens run again over the cached keys and values of all that stands before them (METHODS §4).

An intervention whose destinations all lie in the chat region cannot move any earlier state, so a handful of tokens is
all that has to run. That the result equals a full forward is asserted in tests for every family.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attacks.caches import cache_argument, fresh
from attacks.precision import contiguous_head
from suffix_analysis.batching import left_pad, pad_token
from suffix_analysis.chat import REGIONS, Chat
from suffix_analysis.errors import UserError
from suffix_analysis.forward import skipped
from suffix_analysis.generate import continued
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt

Hook = tuple[str, Callable[[Tensor, Any], Tensor | None]]
KEPT = {
    "resid": "hook_resid_pre", "mlp_out": "hook_mlp_out", "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v",
    "z": "attn.hook_z", "pattern": "attn.hook_pattern",
}  # fmt: skip


GROUP = 16  # prompts that are held at once, so that memory does not grow with their number


def groups(prompts: Sequence[Prompt]) -> list[Sequence[Prompt]]:
    """The prompts in groups that are prepared together, each spread over all of them."""
    n = -(-len(prompts) // GROUP)
    return [prompts[i::n] for i in range(n)]


@dataclass(frozen=True)
class Cached:
    """Prompts of which everything before the chat tokens has run.

    ``ids`` and ``positions`` are of the chat tokens; ``mask`` and ``regions`` of all tokens, padded on the left.
    """

    model: Model
    chats: tuple[Chat, ...]
    ids: Int[Tensor, "prompt chat"]
    positions: Int[Tensor, "prompt chat"]
    mask: Int[Tensor, "prompt token"]
    regions: dict[str, Bool[Tensor, "prompt token"]]
    cache: Any

    def __len__(self) -> int:
        return len(self.chats)

    @property
    def n_chat(self) -> int:
        """Chat tokens of every prompt."""
        return self.ids.shape[1]

    @property
    def values(self) -> list[Float[Tensor, "prompt kv_head token d_head"]]:
        """Values of all tokens before the chat region, layer by layer."""
        return [layer.values.to(self.ids.device) for layer in self.cache.layers]


@dataclass(frozen=True)
class Prepared(Cached):
    """Prompts that have run once as they are, with what is needed to change a run and to compare with it.

    Of the chat tokens: ``resid`` holds their states at every block's input and, last, after the last block, ``mlp_out``
    what MLPs wrote; ``q``, ``k`` and ``v`` queries, keys (both before rotation) and values; ``z`` what each head mixed
    from values, ``pattern`` the attention rows. ``logits`` are those at chat[-1].
    """

    resid: Float[Tensor, "prompt depth chat d_model"]
    mlp_out: Float[Tensor, "prompt layer chat d_model"]
    q: Float[Tensor, "prompt layer chat head d_head"]
    k: Float[Tensor, "prompt layer chat kv_head d_head"]
    v: Float[Tensor, "prompt layer chat kv_head d_head"]
    z: Float[Tensor, "prompt layer chat head d_head"]
    pattern: Float[Tensor, "prompt layer head chat token"]
    logits: Float[Tensor, "prompt vocab"]

    def attention_output(self, layer: int, place: int = -1) -> Float[Tensor, "prompt d_model"]:
        """What attention gives at a chat token, before any norm behind it."""
        out: Tensor = self.model.bridge.blocks[layer].attn.o.original_component(self.z[:, layer, place].flatten(1))
        return out.to(self.z.device)


@torch.no_grad()
def prepare(model: Model, chats: Sequence[Chat]) -> Prepared:
    """Run prompts once: everything before the chat tokens into a cache, then the chat tokens, recorded.

    Raises:
        UserError: the prompts end in different numbers of template tokens, one does not fit into the model's context or
            its sliding window, or the attention gives no rows.
    """
    n_chat = _checked(model, chats)
    padded = left_pad([chat.ids for chat in chats], pad_token(model.tokenizer), model.hf.device)
    before = {name: x[:, :-n_chat] for name, x in padded.items()}
    argument = cache_argument(model.hf)
    with contiguous_head(model.hf):
        cache = model.hf(**before, use_cache=True, logits_to_keep=1)[argument]
    width = padded["input_ids"].shape[1]
    regions = {name: torch.zeros(len(chats), width, dtype=torch.bool) for name in REGIONS}
    for row, chat in enumerate(chats):
        for name in REGIONS:
            regions[name][row, width - len(chat.ids) :] = chat.regions[name]
    cached = Cached(
        model=model,
        chats=tuple(chats),
        ids=padded["input_ids"][:, -n_chat:],
        positions=padded["position_ids"][:, -n_chat:],
        mask=padded["attention_mask"],
        regions={name: x.to(model.hf.device) for name, x in regions.items()},
        cache=cache,
    )
    kept: dict[tuple[str, int], Tensor] = {}

    def keep(x: Tensor, hook: Any, key: tuple[str, int]) -> None:
        kept[key] = x.detach().to(model.hf.device)  # layers may lie on several devices

    last = model.n_layers - 1
    names = {(kind, n): f"blocks.{n}.{name}" for kind, name in KEPT.items() for n in range(model.n_layers)}
    names["resid", last + 1] = f"blocks.{last}.hook_resid_post"
    logits = replay(cached, [(name, functools.partial(keep, key=key)) for key, name in names.items()])
    missing = sorted({layer for key in names if key not in kept for layer in [key[1]]})
    if missing:
        raise UserError(f"No attention rows came from layers {missing}; the model's attention cannot be replayed.")
    stacked = {kind: torch.stack([kept[kind, n] for n in range(last + 1 + (kind == "resid"))], dim=1) for kind in KEPT}
    if not bool(torch.isfinite(stacked["resid"]).all()) or not bool(torch.isfinite(logits).all()):
        raise UserError(f"A replay is not finite in {model.hf.dtype}; load the model in float32.")
    kept_too: dict[str, Any] = {**vars(cached), **stacked}
    return Prepared(**kept_too, logits=logits)


def aligned(plain: Prepared, attacked: Prepared) -> Prepared:
    """The attacked run with what only the suffix made tokens of the instruction counted to the suffix.

    Where a template puts a line's end behind the user's text (OLMo 2), an instruction's last sign may be one token with
    it: then, without a suffix, it stands in the template, and with one it is a token more of the instruction.

    Raises:
        UserError: the runs are of different prompts, or a suffix changes an instruction's other tokens.
    """
    if [c.instruction for c in plain.chats] != [c.instruction for c in attacked.chats]:
        raise UserError("The two runs to compare have different instructions; prepare the same prompts in one order.")
    mask, suffix = attacked.regions["instruction"].clone(), attacked.regions["suffix"].clone()
    for row, (before, after) in enumerate(zip(plain.chats, attacked.chats, strict=True)):
        own, there = (chat.ids[chat.regions["instruction"]] for chat in (before, after))
        if not torch.equal(there[: len(own)], own):
            raise UserError(
                f"The instruction {before.instruction[:40]!r} has other tokens with the suffix {after.suffix[:40]!r}, "
                "so the two cannot be compared token by token; leave the prompt out, or take another suffix."
            )
        added = mask[row].nonzero().flatten()[len(own) :]
        mask[row, added], suffix[row, added] = False, True
    return replace(attacked, regions={**attacked.regions, "instruction": mask, "suffix": suffix})


def _checked(model: Model, chats: Sequence[Chat]) -> int:
    """The number of chat tokens, where the prompts can be replayed."""
    if not chats:
        raise UserError("There are no prompts to replay; give at least one.")
    if len({chat.n_chat for chat in chats}) != 1:
        raise UserError("The prompts end in different numbers of template tokens; use one template for all of them.")
    longest = max(len(chat.ids) for chat in chats)
    config = model.hf.config.get_text_config()
    for name, what in (("max_position_embeddings", "takes"), ("sliding_window", "looks back")):
        limit = getattr(config, name, None)
        if limit is not None and longest > limit:
            raise UserError(f"A prompt has {longest} tokens with its suffix; the model {what} {limit}. Shorten it.")
    return chats[0].n_chat


def replay(
    prepared: Cached,
    hooks: Sequence[Hook] = (),
    *,
    copies: int = 1,
    start: int = 0,
    state: Float[Tensor, "prompt chat d_model"] | None = None,
    positions: Int[Tensor, "prompt chat"] | None = None,
) -> Float[Tensor, "row vocab"]:
    """Logits at chat[-1], in float32, when the chat tokens run again under ``hooks``.

    Args:
        prepared: the prompts.
        hooks: (name, function) on the bridge; tensors have a row for every copy, the first prompt's copies first.
        copies: rows of each prompt, for hooks that treat them differently.
        start: blocks before this one do not run; hooks on them do nothing.
        state: what block ``start`` gets then; left out, it is what it got when the prompts were prepared.
        positions: other positions for the chat tokens (their rotation, not their place in the causal mask).
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(prepared.model.bridge.hooks(fwd_hooks=list(hooks)))
        if start:
            if state is None:
                assert isinstance(prepared, Prepared), "without a recorded state no block can be left out"
                state = prepared.resid[:, start]
            stack.enter_context(skipped(prepared.model, start, state.repeat_interleave(copies, dim=0)))
        return _forward(prepared, copies, start, positions).logits[:, -1].float()


def _forward(prepared: Cached, copies: int, start: int, positions: Tensor | None) -> Any:
    hf, rows = prepared.model.hf, len(prepared) * copies
    at = prepared.positions if positions is None else positions
    with contiguous_head(hf):
        return hf(
            input_ids=prepared.ids.repeat_interleave(copies, dim=0),
            attention_mask=prepared.mask.repeat_interleave(copies, dim=0),
            position_ids=at.repeat_interleave(copies, dim=0),
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(hf): fresh(prepared.cache, rows, since=start)},
        )


@torch.no_grad()
def reply(prepared: Cached, hooks: Sequence[Hook], length: int) -> list[str]:
    """Greedy replies after the chat tokens have run under ``hooks``, which do not act on the reply's own tokens.

    Raises:
        UserError: the model would change its rotation within a reply and run everything again without the hooks.
    """
    hf, tokenizer = prepared.model.hf, prepared.model.tokenizer
    width, turn = prepared.mask.shape[1], getattr(hf.config, "original_max_position_embeddings", None)
    if turn is not None and width <= turn < width + length:
        raise UserError(f"A prompt has {width} tokens; the model rotates otherwise from {turn} on. Shorten it.")
    with prepared.model.bridge.hooks(fwd_hooks=list(hooks)):
        out = _forward(prepared, 1, 0, None)
    first = out.logits[:, -1:].argmax(dim=-1)
    ids = torch.cat([prepared.mask, first], dim=1)  # the cache holds all but the first token of the reply
    mask = torch.cat([prepared.mask, torch.ones_like(first)], dim=1)
    cache = out[cache_argument(hf)]
    found, _ = continued(hf, pad_token(tokenizer), ids, mask, cache, length - 1, begun=1)
    return [str(text) for text in tokenizer.batch_decode(found, skip_special_tokens=True)]
