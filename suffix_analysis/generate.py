"""Greedy replies for many prompts at once: what all begin with runs once, and those that have ended leave the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.caches import cache_argument, fresh, prefix_cache
from attacks.precision import contiguous_head
from suffix_analysis.batching import in_order, pad_token, prefix_batches

PART = 8  # tokens after which replies that have ended leave the batch


def generate(
    hf: Any,
    tokenizer: Any,
    rows: Sequence[Int[Tensor, " _"]],
    max_new_tokens: int,
    *,
    not_first: Sequence[int] = (),
    never: Sequence[int] = (),
) -> list[str]:
    """Greedy replies to tokenised prompts, in order, without special tokens.

    Args:
        hf: a Hugging Face causal language model; hooks on it (ablation, addition) act on generated tokens too.
        tokenizer: its tokenizer.
        rows: prompt ids, one tensor per prompt.
        max_new_tokens: most tokens in a reply.
        not_first: token ids that no reply may begin with.
        never: token ids that no reply may hold.
    """
    return answers(hf, tokenizer, rows, max_new_tokens, not_first=not_first, never=never)[0]


@torch.no_grad()
def answers(
    hf: Any,
    tokenizer: Any,
    rows: Sequence[Int[Tensor, " _"]],
    max_new_tokens: int,
    *,
    not_first: Sequence[int] = (),
    never: Sequence[int] = (),
) -> tuple[list[str], Float[Tensor, "prompt vocab"]]:
    """Greedy replies (see `generate`), and the next-token logits at chat[-1] that they begin with, in float32."""
    if not rows:
        return [], torch.zeros(0, 0)
    settings: dict[str, Any] = {
        "suppress_tokens": list(never) or None,
        "begin_suppress_tokens": list(not_first) or None,
    }
    n_prefix, groups = prefix_batches(hf, tokenizer, rows, max_new_tokens)
    prefix = prefix_cache(hf, rows[0][:n_prefix])
    replies, first = [""] * len(rows), []
    for batch in groups:
        begin = rows[0][:n_prefix].to(hf.device).expand(len(batch.members), -1)
        ids = torch.cat([begin, batch.arguments["input_ids"]], dim=1)
        cache = fresh(prefix, len(batch.members))
        mask = batch.arguments["attention_mask"]
        found, logits = continued(hf, pad_token(tokenizer), ids, mask, cache, max_new_tokens, **settings)
        first.append((batch, logits))
        for i, text in zip(batch.members, tokenizer.batch_decode(found, skip_special_tokens=True), strict=True):
            replies[i] = text
    return replies, in_order(first)


def continued(
    hf: Any,
    pad: int,
    ids: Int[Tensor, "row token"],
    mask: Int[Tensor, "row token"],
    cache: Any,
    max_new_tokens: int,
    *,
    begun: int = 0,
    **settings: Any,
) -> tuple[list[Int[Tensor, " _"]], Float[Tensor, "first vocab"]]:
    """The tokens of greedy replies to padded rows, up to what ends them, and the logits of the first new token
    (of no rows, where nothing is left to add).

    In parts of ``PART`` tokens, after each of which the replies that have ended leave the batch.

    Args:
        hf: the model.
        pad: the token that rows are padded with.
        ids: the rows, padded on the left; what stands in ``cache`` already need not be given rightly.
        mask: 0 at padding.
        cache: keys and values of the first tokens; None for none. It is used up.
        max_new_tokens: most tokens that are added to a row.
        begun: tokens at the end of the rows that belong to the replies already.
        **settings: of ``generate``.
    """
    length, stops, name = ids.shape[1], _ends(hf), cache_argument(hf)
    settings = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "repetition_penalty": 1.0,  # some checkpoints bring their own, which would count the suffix's tokens
        "no_repeat_ngram_size": 0,
        "max_length": None,  # a checkpoint's own would bring a warning with every part
        "use_cache": True,  # some checkpoints say no
        "pad_token_id": pad,
        **settings,
    }
    found: list[Tensor] = [ids[0, :0]] * len(ids)
    first: list[Tensor] = []
    going_on = torch.arange(len(ids))

    def look(_: Tensor, scores: Tensor) -> Tensor:
        if not first:
            first.append(scores.float().cpu())
        return scores

    while True:
        n_before = ids.shape[1]
        stopped = torch.isin(ids[:, length - begun :], stops)
        over = stopped.any(dim=1) | (n_before - length >= max_new_tokens)
        for row in over.nonzero().flatten().tolist():
            n_reply = int((~stopped[row]).long().cumprod(0).sum())  # what follows the end is padding
            found[int(going_on[row])] = ids[row, length - begun :][:n_reply]
        if over.all():
            return found, first[0] if first else torch.zeros(0, 0)
        if over.any():
            stay = (~over).nonzero().flatten()
            ids, mask, going_on = ids[stay], mask[stay], going_on[stay.cpu()]
            if cache is not None:
                cache.batch_select_indices(stay.cpu())  # layers may lie on several devices
        with contiguous_head(hf):
            out = hf.generate(
                input_ids=ids,
                attention_mask=mask,  # generate() derives the positions from it
                max_new_tokens=min(PART, max_new_tokens - (n_before - length)),
                return_dict_in_generate=True,
                logits_processor=[look],
                **({} if cache is None else {name: cache}),
                **settings,
            )
        settings = settings | {"begin_suppress_tokens": None}  # later parts do not begin the reply
        cache, ids = out[name], out.sequences
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - n_before)], dim=1)


@contextlib.contextmanager
def endless(hf: Any) -> Iterator[None]:
    """No token ends a reply, so that all have the length that is asked for: for measuring the time of a token."""
    ends, hf.generation_config.eos_token_id = hf.generation_config.eos_token_id, None
    try:
        yield
    finally:
        hf.generation_config.eos_token_id = ends


def _ends(hf: Any) -> Int[Tensor, " end"]:
    """The ids that end a reply."""
    found = hf.generation_config.eos_token_id
    stops = found if isinstance(found, list) else [] if found is None else [found]
    return torch.tensor(stops, dtype=torch.long, device=hf.device)
