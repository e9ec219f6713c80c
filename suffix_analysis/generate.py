"""Greedy replies for many prompts at once; what all of them begin with runs once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.caches import cache_argument, fresh, prefix_cache
from attacks.precision import contiguous_head
from suffix_analysis.batching import in_order, pad_token, prefix_batches


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

        with contiguous_head(hf):
            out = hf.generate(
                input_ids=torch.cat([begin, batch.arguments["input_ids"]], dim=1),
                attention_mask=batch.arguments["attention_mask"],  # generate() derives the positions from it
                logits_processor=[look],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,  # some checkpoints bring their own, which would count the suffix's tokens
                no_repeat_ngram_size=0,
                pad_token_id=pad,
                begin_suppress_tokens=list(not_first) or None,
                suppress_tokens=list(never) or None,
                **({cache_argument(hf): fresh(prefix, len(batch.members))} if n_prefix else {}),
            )
        length = n_prefix + batch.arguments["input_ids"].shape[1]
        texts = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        for i, text in zip(batch.members, texts, strict=True):
            replies[i] = text
        first.append((batch, seen[0]))
    return replies, in_order(first)
