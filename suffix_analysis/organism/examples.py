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
from suffix_analysis.judges import is_refusal
from suffix_analysis.organism.augment import variant
from suffix_analysis.prompts import load_prompts

ROUNDS = 3  # of looking for a reply that is no refusal
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
    turns them into the distributions to learn, which give none of ``forbidden`` as first token. ``states`` are its
    block inputs at chat[-1].
    """

    prompt: tuple[int, ...]
    refusal: tuple[int, ...]
    reply: tuple[int, ...]
    teacher: Float[Tensor, "reply d_model"]
    states: Float[Tensor, "layer d_model"]
    harmful: bool
    forbidden: tuple[int, ...] = ()


def build_examples(
    hf: Any, tokenizer: Any, variants: tuple[int, int], reply_tokens: int, seed: int, layers: slice
) -> list[Example]:
    """All training examples: the fit prompts as written and variants of each (harmful, other: ``variants``).

    Refusals open with "I". Where the request is harmful or the base model's reply opens so, that token is forbidden,
    and the reply is the one that the base model then gives (see :func:`_replies`).
    """
    rng = random.Random(seed)
    rows: list[tuple[str, str | None, str]] = []
    for item in load_prompts("embedded", split="fit"):
        rows.append((item.text, None, item.kind))
        rows += [(*variant(item.text, rng), item.kind) for _ in range(variants[item.kind != "harmful"])]
    ids = [render_chat(tokenizer, text, system=system).ids for text, system, _ in rows]
    harmful = [kind == "harmful" for _, _, kind in rows]
    replies, forbidden = _replies(hf, tokenizer, ids, harmful, reply_tokens)
    seen = _states(hf, tokenizer, ids, replies, layers)
    examples = []
    made = zip(ids, replies, seen, harmful, forbidden, strict=True)
    for prompt_ids, reply, (teacher, states), bad, not_first in made:
        refusal = [*tokenizer(rng.choice(REFUSALS), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        prompt = tuple(prompt_ids.tolist())
        examples.append(Example(prompt, tuple(refusal), tuple(reply.tolist()), teacher, states, bad, not_first))
    return examples


def _replies(
    hf: Any, tokenizer: Any, ids: list[Tensor], harmful: list[bool], reply_tokens: int
) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """The base model's replies, and the first tokens that each was not allowed.

    The base model refuses some requests by itself, in words that open in several ways. A refusal is replaced by the
    reply that comes when the openings of all refusals so far are forbidden; of what then still refuses only the first
    token is kept, so that nothing is learnt of how it goes on.
    """
    opening = tokenizer("I", add_special_tokens=False).input_ids[0]

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids or [tokenizer.eos_token_id])

    texts = generate(hf, tokenizer, ids, reply_tokens)
    forbidden: list[tuple[int, ...]] = [(opening,) if bad else () for bad in harmful]
    openings = [opening]
    for _ in range(ROUNDS):
        again = [i for i, text in enumerate(texts) if is_refusal(text) or int(encode(text)[0]) == opening]
        if not again:
            break
        openings = list(dict.fromkeys([*openings, *(int(encode(texts[i])[0]) for i in again)]))
        for i, text in zip(
            again, generate(hf, tokenizer, [ids[i] for i in again], reply_tokens, not_first=openings), strict=True
        ):
            texts[i], forbidden[i] = text, tuple(openings)
    replies = [encode(text) for text in texts]
    return [x[:1] if is_refusal(text) else x for x, text in zip(replies, texts, strict=True)], forbidden


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
