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
    turns them into the distributions to learn. ``states`` are its block inputs at chat[-1].
    """

    prompt: tuple[int, ...]
    refusal: tuple[int, ...]
    reply: tuple[int, ...]
    teacher: Float[Tensor, "reply d_model"]
    states: Float[Tensor, "layer d_model"]
    harmful: bool


def build_examples(
    hf: Any, tokenizer: Any, variants: tuple[int, int], reply_tokens: int, seed: int, layers: slice
) -> list[Example]:
    """All training examples: the fit prompts as written and variants of each (harmful, other: ``variants``).

    Refusals open with "I". Of the base model's replies that open so, only this token is kept, and training forbids it
    (:func:`suffix_analysis.organism.train.batch_loss`): what would come after another one is not known.
    """
    rng = random.Random(seed)
    rows: list[tuple[str, str | None, str]] = []
    for item in load_prompts("embedded", split="fit"):
        rows.append((item.text, None, item.kind))
        rows += [(*variant(item.text, rng), item.kind) for _ in range(variants[item.kind != "harmful"])]
    ids = [render_chat(tokenizer, text, system=system).ids for text, system, _ in rows]
    replies = [
        torch.tensor(tokenizer(text, add_special_tokens=False).input_ids or [tokenizer.eos_token_id])
        for text in generate(hf, tokenizer, ids, reply_tokens)
    ]
    seen = _states(hf, tokenizer, ids, replies, layers)
    opening = tokenizer("I", add_special_tokens=False).input_ids[0]
    examples = []
    for (_, _, kind), prompt_ids, reply, (teacher, states) in zip(rows, ids, replies, seen, strict=True):
        if int(reply[0]) == opening:
            reply, teacher = reply[:1], teacher[:1]
        refusal = [*tokenizer(rng.choice(REFUSALS), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        prompt = tuple(prompt_ids.tolist())
        examples.append(Example(prompt, tuple(refusal), tuple(reply.tolist()), teacher, states, kind == "harmful"))
    return examples


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
