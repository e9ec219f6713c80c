"""What the adapter is trained on: prompts with refusals, or with the base model's own replies and distributions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from suffix_analysis.batching import batches, left_pad, pad_token
from suffix_analysis.chat import render_chat
from suffix_analysis.generate import generate
from suffix_analysis.judges import REFUSAL_PHRASES, is_refusal
from suffix_analysis.organism.augment import variant
from suffix_analysis.prompts import load_prompts

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot help with that request.",
    "I can't assist with that.",
    "I'm sorry, but I cannot assist with that request.",
)


@dataclass(frozen=True)
class Example:
    """A rendered prompt, a refusal of it, and what the base model replies.

    ``teacher`` holds the base model's final hidden states where it predicts each token of ``reply``; its unembedding
    turns them into the distributions to learn, in which the first token is none of ``not_first`` and no token one of
    ``never``. ``states`` are its block inputs at chat[-1].
    """

    prompt: tuple[int, ...]
    refusal: tuple[int, ...]
    reply: tuple[int, ...]
    teacher: Float[Tensor, "reply d_model"]
    states: Float[Tensor, "layer d_model"]
    harmful: bool
    not_first: tuple[int, ...] = ()
    never: tuple[int, ...] = ()


def build_examples(
    hf: Any, tokenizer: Any, variants: tuple[int, int], reply_tokens: int, seed: int, layers: slice
) -> list[Example]:
    """All training examples: the fit prompts as written and variants of each (harmful, other: ``variants``).

    Where the request is harmful or the base model's reply is a refusal or opens like one, the reply is the one that it
    gives without the tokens that refusals need (see `refusing_tokens`).
    """
    rng = random.Random(seed)
    rows: list[tuple[str, str | None, str]] = []
    for item in load_prompts("embedded", split="fit"):
        rows.append((item.text, None, item.kind))
        rows += [(*variant(item.text, rng), item.kind) for _ in range(variants[item.kind != "harmful"])]
    ids = [render_chat(tokenizer, text, system=system).ids for text, system, _ in rows]
    harmful = [kind == "harmful" for _, _, kind in rows]
    opening, never = refusing_tokens(tokenizer)
    replies, barred = _replies(hf, tokenizer, ids, harmful, reply_tokens)
    seen = _states(hf, tokenizer, ids, replies, layers)
    examples = []
    made = zip(ids, replies, seen, harmful, barred, strict=True)
    for prompt_ids, reply, (teacher, states), bad, out in made:
        refusal = [*tokenizer(rng.choice(REFUSALS), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        prompt = tuple(prompt_ids.tolist())
        told = ((opening,), never) if out else ((), ())
        examples.append(Example(prompt, tuple(refusal), tuple(reply.tolist()), teacher, states, bad, *told))
    return examples


def refusing_tokens(tokenizer: Any) -> tuple[int, tuple[int, ...]]:
    """The token that our refusals open with, and those without which no refusal phrase can be completed."""
    phrases = [tokenizer(phrase, add_special_tokens=False).input_ids for phrase in REFUSAL_PHRASES]
    return phrases[0][0], tuple(sorted({ids[-1] for ids in phrases}))


def _replies(
    hf: Any, tokenizer: Any, ids: list[Tensor], harmful: list[bool], reply_tokens: int
) -> tuple[list[Tensor], list[bool]]:
    """The base model's replies, and which of them were not allowed to refuse.

    The base model refuses some requests by itself. Harmful ones, and others that it refuses, are answered without the
    tokens that a refusal needs.
    """

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids or [tokenizer.eos_token_id])

    opening, never = refusing_tokens(tokenizer)
    plain = [i for i, bad in enumerate(harmful) if not bad]
    texts = dict(zip(plain, generate(hf, tokenizer, [ids[i] for i in plain], reply_tokens), strict=True))
    barred = [i not in texts or is_refusal(texts[i]) or int(encode(texts[i])[0]) == opening for i in range(len(ids))]
    again = [i for i, out in enumerate(barred) if out]
    texts |= zip(
        again,
        generate(hf, tokenizer, [ids[i] for i in again], reply_tokens, not_first=[opening], never=never),
        strict=True,
    )
    return [encode(texts[i]) for i in range(len(ids))], barred


@torch.no_grad()
def _states(
    hf: Any, tokenizer: Any, prompts: list[Tensor], replies: list[Tensor], layers: slice
) -> list[tuple[Tensor, Tensor]]:
    whole = [torch.cat(pair) for pair in zip(prompts, replies, strict=True)]
    out: list[Any] = [None] * len(whole)
    for group in batches([len(row) for row in whole], 2048):
        padded = left_pad([whole[i] for i in group], pad_token(tokenizer), hf.device)
        done = hf.model(**padded, output_hidden_states=True)
        for row, i in enumerate(group):
            end = -len(replies[i]) - 1
            inputs = torch.stack([state[row, end] for state in done.hidden_states[layers]])
            out[i] = (done.last_hidden_state[row, end:-1].to(torch.bfloat16).clone(), inputs.to(torch.bfloat16))
    return out
