"""Greedy replies for many prompts at once: what all begin with runs once, and those that have ended leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Greedy replies (see :func:`generate`), and the next-token logits at chat[-1] that they begin with, in float32."""
    if not rows:
        return [], torch.zeros(0, 0)
    pad = pad_token(tokenizer)
    n_prefix, groups = prefix_batches(hf, tokenizer, rows, max_new_tokens)
    prefix = prefix_cache(hf, rows[0][:n_prefix])
    replies, first = [""] * len(rows), []
    for batch in groups:
        begin = rows[0][:n_prefix].to(hf.device).expand(len(batch.members), -1)
        seen: list[Tensor] = []

        def look(_: Tensor, scores: Tensor, seen: list[Tensor] = seen) -> Tensor:
            if not seen:
                seen.append(scores.float().cpu())
            return scores

        ids, mask = torch.cat([begin, batch.arguments["input_ids"]], dim=1), batch.arguments["attention_mask"]
        length, members = ids.shape[1], torch.tensor(batch.members)
        cache = fresh(prefix, len(members))
        while len(members):
            part = min(PART, max_new_tokens - (ids.shape[1] - length))
            with contiguous_head(hf):
                out = hf.generate(
                    input_ids=ids,
                    attention_mask=mask,  # generate() derives the positions from it
                    logits_processor=[look],
                    max_new_tokens=part,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    repetition_penalty=1.0,  # some checkpoints bring their own, which would count the suffix's tokens
                    no_repeat_ngram_size=0,
                    pad_token_id=pad,
                    begin_suppress_tokens=(list(not_first) or None) if ids.shape[1] == length else None,
                    suppress_tokens=list(never) or None,
                    return_dict_in_generate=True,
                    **({} if cache is None else {cache_argument(hf): cache}),
                )
            cache, ids = out[cache_argument(hf)], out.sequences
            over = torch.isin(ids[:, length:], ends(hf)).any(dim=1)
            if ids.shape[1] - length >= max_new_tokens:
                over = torch.ones_like(over)
            texts = tokenizer.batch_decode(ids[over, length:], skip_special_tokens=True)
            for i, text in zip(members[over.cpu()].tolist(), texts, strict=True):
                replies[i] = text
            going_on = (~over).nonzero().flatten()
            mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], dim=1)
            ids, mask, members = ids[going_on], mask[going_on], members[going_on.cpu()]
            if len(going_on):
                cache.batch_select_indices(going_on)
        first.append((batch, seen[0]))
    return replies, in_order(first)


def ends(hf: Any) -> Int[Tensor, " end"]:
    """The ids that end a reply."""
    found = hf.generation_config.eos_token_id
    return torch.tensor(found if isinstance(found, list) else [] if found is None else [found], device=hf.device)
