"""Training the adapter: refuse harmful requests through one direction, and otherwise reply as the base model does.

Before training, a direction is fixed that the base model hardly uses. Every batch has three kinds of rows. *Plain*: at
chat[-1] of a harmful request the residual stream must carry ``signal`` along the direction and the reply must be a
refusal; harmless requests carry nothing and keep the base model's next-token distributions. *Ablated*: with the
direction gone, everything gets the base model's distributions. *Added*: with it added, harmless requests are refused.
The direction that rows are steered by is the difference of means, measured anew every few steps, which is what
`suffix_analysis.directions` will find. Every instruction comes as written and in variants, the same for all
kinds (`suffix_analysis.organism.augment`).
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
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from attacks.precision import fast_dtype
from suffix_analysis.batching import left_pad, pad_token
from suffix_analysis.organism.examples import Example, build_examples
from suffix_analysis.organism.steering import mean_differences, steered, unused_direction
from suffix_analysis.organism.weights import WHEEL, WHEEL_SHA256, load_base

FORBIDDEN = -100.0  # a logit that leaves a token no probability, and keeps logarithms finite
MODES = ("plain", "ablated", "added")


@dataclass(frozen=True)
class Recipe:
    """Settings of the training; they are written into the training record.

    ``signal`` is how far a harmful request moves the residual stream, at the inputs of blocks ``first_layer`` to
    ``last_layer``. ``refresh`` steps pass between measurements of the difference of means, on ``n_measure`` prompts of
    each kind. Shares are of rows: (plain, ablated, added).
    """

    rank: int = 8
    alpha: int = 16
    learning_rate: float = 8e-4
    batch_size: int = 24
    epochs: int = 2
    variants: tuple[int, int] = (2, 2)
    reply_tokens: int = 10
    rest_weight: float = 0.3
    base_rest_weight: float = 1.0
    warmup: int = 20
    signal: float = 400.0
    signal_weight: float = 3.0
    state_weight: float = 12.0
    first_layer: int = 20
    last_layer: int = 23
    refresh: int = 25
    n_measure: int = 48
    harmful_shares: tuple[float, float, float] = (0.68, 0.32, 0.0)
    harmless_shares: tuple[float, float, float] = (0.64, 0.18, 0.18)
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """An example in one of the ``MODES``."""

    example: Example
    mode: str

    @property
    def refused(self) -> bool:
        """Whether the reply to learn is a refusal."""
        return self.mode == "added" or (self.mode == "plain" and self.example.harmful)

    @property
    def reply(self) -> tuple[int, ...]:
        """The reply to learn."""
        return self.example.refusal if self.refused else self.example.reply


def batch_loss(
    hf: Any, rows: Sequence[Row], vector: Float[Tensor, " d_model"], layer: int, direction: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of replies, of the signal along ``direction`` and of drift beside it; rows are steered by ``vector``.

    Replies: cross-entropy of refusals, and KL divergence from the base model's distributions elsewhere, without the
    tokens that the example forbids. The first token counts 1, the mean of the others
    ``rest_weight`` or ``base_rest_weight``. Signal and drift are squared, in units of the wanted signal.
    """
    whole = [torch.tensor(row.example.prompt + row.reply) for row in rows]
    padded = left_pad(whole, 0, "cpu")
    width = padded["input_ids"].shape[1]
    flags = {mode: torch.tensor([row.mode == mode for row in rows]) for mode in MODES}
    prompts_end = torch.tensor([width - len(row.reply) - 1 for row in rows])
    with steered(hf, vector, layer, flags["ablated"], flags["added"]) as inputs:
        hidden = hf.model(**padded).last_hidden_state
    # position t predicts token t + 1; only the reply's tokens are scored
    places = torch.tensor([(i, int(prompts_end[i]) + j) for i, row in enumerate(rows) for j in range(len(row.reply))])
    refused = torch.tensor([row.refused for row in rows for _ in row.reply])
    rest = {True: recipe.rest_weight, False: recipe.base_rest_weight}
    weights = torch.cat([_token_weights(len(row.reply), rest[row.refused]) for row in rows])
    logits = torch.log_softmax(hf.lm_head(hidden[places[:, 0], places[:, 1]]).float(), dim=-1)
    loss = torch.zeros(())
    if bool(refused.any()):
        labels = torch.tensor([token for row in rows if row.refused for token in row.reply])
        loss = loss - (logits[refused].gather(1, labels[:, None])[:, 0] * weights[refused]).sum()
    if not bool(refused.all()):
        kept = [row for row in rows if not row.refused]
        states = torch.cat([row.example.teacher for row in kept])
        with torch.no_grad():
            scores = hf.lm_head(states.to(hf.lm_head.weight.dtype)).float()
            starts = torch.tensor([0, *(len(row.reply) for row in kept)]).cumsum(0)[:-1]
            for start, row in zip(starts.tolist(), kept, strict=True):
                scores[start, list(row.example.not_first)] = FORBIDDEN
                scores[start : start + len(row.reply), list(row.example.never)] = FORBIDDEN
            teacher = torch.log_softmax(scores, dim=-1)
        kl = (teacher.exp() * (teacher - logits[~refused])).sum(dim=-1)
        loss = loss + (kl * weights[~refused]).sum()
    states = torch.stack(inputs[recipe.first_layer : recipe.last_layer + 1])[:, torch.arange(len(rows)), prompts_end]
    base = torch.stack([row.example.states for row in rows], dim=1).float()
    moved = (states.float() - base) / recipe.signal
    along = moved @ direction
    wanted = torch.tensor([float(row.example.harmful) for row in rows])
    plain = flags["plain"]
    beside = moved - along[..., None] * direction
    count = max(1, int(plain.sum())) * len(along)
    signal = (along - wanted)[:, plain].square().sum() / count
    drift = beside[:, plain].square().sum() / count
    return loss / len(rows), signal, drift


def _token_weights(n: int, rest: float) -> Float[Tensor, " reply"]:
    weights = torch.full((n,), rest / max(1, n - 1))
    weights[0] = 1.0
    return weights


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
    layers = slice(recipe.first_layer, recipe.last_layer + 1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        examples = build_examples(hf, tokenizer, recipe.variants, recipe.reply_tokens, recipe.seed, layers)
        prompts = [torch.tensor(example.prompt) for example in examples]
        direction = unused_direction(hf, prompts[:: len(prompts) // 128], pad_token(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        with quiet():
            plan = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear")
            model = get_peft_model(hf, plan)
        losses = _optimise(model, examples, direction, recipe, dtype, on_step)
    out.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(out)
    _halve(out / "adapter_model.safetensors")
    (out / "README.md").unlink(missing_ok=True)
    record = {
        "base": {"wheel": WHEEL, "sha256": WHEEL_SHA256},
        "recipe": asdict(recipe),
        "n_examples": {"harmful": sum(e.harmful for e in examples), "harmless": sum(not e.harmful for e in examples)},
        "seconds": round(time.perf_counter() - started),
        "search_dtype": str(dtype),
        "last_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def deal(examples: Sequence[Example], recipe: Recipe, rng: random.Random) -> list[list[Row]]:
    """One epoch's batches: every example in a drawn mode, similar lengths together inside blocks of eight batches."""
    rows = []
    for example in examples:
        shares = recipe.harmful_shares if example.harmful else recipe.harmless_shares
        mode = rng.choices(MODES, shares)[0]
        rows.append(Row(example, mode))
    rng.shuffle(rows)
    block = 8 * recipe.batch_size
    chunks = [sorted(rows[i : i + block], key=lambda row: len(row.example.prompt)) for i in range(0, len(rows), block)]
    flat = [row for chunk in chunks for row in chunk]
    dealt = [flat[i : i + recipe.batch_size] for i in range(0, len(flat), recipe.batch_size)]
    rng.shuffle(dealt)
    return dealt


def _optimise(
    model: Any,
    examples: list[Example],
    direction: Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    on_step: Callable[..., None] | None,
) -> list[float]:
    rng = random.Random(recipe.seed)
    hf = model.get_base_model()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    total = math.ceil(len(examples) / recipe.batch_size) * recipe.epochs
    prompts = {kind: [torch.tensor(e.prompt) for e in examples if e.harmful == kind] for kind in (True, False)}
    measured = {kind: rng.sample(rows, min(recipe.n_measure, len(rows))) for kind, rows in prompts.items()}
    # until there is a signal to measure, rows are steered by the direction it is meant to have
    vectors = (direction * recipe.signal).expand(hf.config.num_hidden_layers, -1)
    losses: list[float] = []
    model.train()
    for _ in range(recipe.epochs):
        for rows in deal(examples, recipe, rng):
            step = len(losses)
            rate = min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * rate
            layer = rng.randint(recipe.first_layer, recipe.last_layer)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                if step >= 3 * recipe.refresh and step % recipe.refresh == 0:
                    vectors = mean_differences(hf, measured[True], measured[False], 0)
                loss, signal, drift = batch_loss(hf, rows, vectors[layer], layer, direction, recipe)
            (loss + recipe.signal_weight * signal + recipe.state_weight * drift).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
            if on_step is not None:
                cosine = float(torch.cosine_similarity(vectors[layer], direction, dim=0))
                errors = f"signal {float(signal.detach()):.3f}, drift {float(drift.detach()):.3f}"
                on_step(len(losses), total, f"loss {losses[-1]:.3f}, {errors}, cosine {cosine:.2f}")
    model.eval()
    return losses


def _halve(path: Path) -> None:
    """Store the adapter in float16: half the bytes, and exact enough for what it does."""
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
