"""What to look at before hours are spent: is the prompt the model's own, does it refuse, what will the attack cost?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from attacks.candidates import compat_gradient, token_gradient
from attacks.gcg import GCG, at_step
from attacks.memory import candidate_bytes, free_bytes, memory_for
from attacks.scorer import Scorer
from attacks.slot import PLACEHOLDER, Messages, Slot, turns_of

PROBE = 32  # candidates that are scored to measure the speed; of fewer, starting a forward is a large part
REPLY_TOKENS = 24
FEW_TOKENS = 4


@dataclass(frozen=True)
class SelfTest:
    """What was found. ``replies`` are greedy, without a suffix; ``losses`` are the targets' (nats per token) with the
    initial suffix; ``seconds_per_step`` and ``gib`` (beyond the model's weights) are estimates; ``warnings`` say what
    to do about what looks wrong.
    """

    replies: tuple[str, ...]
    losses: tuple[float, ...]
    seconds_per_step: float
    gib: float
    warnings: tuple[str, ...]


def self_test(attack: GCG) -> SelfTest:
    """Check a constructed attack before its first step."""
    config, model, tokenizer = attack.config, attack.model, attack.tokenizer
    init = config.optim_str_init if isinstance(config.optim_str_init, str) else config.optim_str_init[0]
    warnings = []
    replies = []
    for i, (talk, slot) in enumerate(zip(attack.conversations, attack.slots, strict=True)):
        if not _is_templates_own(tokenizer, talk, slot, init):
            warnings.append(
                f"Conversation {i} is not tokenised as by the tokenizer's own chat template; what is attacked is not "
                "what the model will read."
            )
        replies.append(_reply(model, tokenizer, talk))
        if replies[-1].strip().startswith(tokenizer.decode(slot.target_ids).strip()):
            warnings.append(f"Conversation {i} gets its target without any suffix; there is nothing to attack.")
    ids = attack.slots[0].suffix_ids
    # of the target's words alone, in every conversation
    losses, _ = Scorer(model, attack.slots, replace(config, use_mellowmax=False))(ids[None])
    seconds = _seconds_per_step(attack, ids)
    if seconds * config.num_steps > 3600:
        warnings.append(
            f"{config.num_steps} steps may take {seconds * config.num_steps / 3600:.1f} h; a smaller search_width or "
            "fewer conversations is quicker."
        )
    if float(losses.mean()) > 8:
        warnings.append(
            f"The target's loss is {float(losses.mean()):.1f} nats a token: the model would hardly ever say it; choose "
            "words closer to how it begins its replies."
        )
    gib, free = _gib(attack), free_bytes(model.device) / 2**30
    if gib > free:
        warnings.append(
            f"The largest batch may take {gib:.1f} GiB and {free:.1f} are free; a smaller batch_size or shorter "
            "conversations take less."
        )
    if len(ids) < FEW_TOKENS:
        warnings.append(
            f"The initial suffix {init!r} is {len(ids)} tokens in this vocabulary, and stays as long; more leave the "
            "search more room, e.g. 'x x x x x x x x x x'."
        )
    return SelfTest(tuple(replies), tuple(losses[0].tolist()), seconds, gib, tuple(warnings))


def _seconds_per_step(attack: GCG, ids: Int[Tensor, " suffix"]) -> float:
    """What a step takes: its parts are timed on candidates that differ in one place, as a step's do."""
    config, search, exact = attack.config, attack.search, attack.exact or attack.search
    probe, rows = ids.repeat(PROBE, 1), torch.arange(PROBE)
    probe[rows, rows % len(ids)] = attack.slots[0].target_ids[0]
    leaders, seen = probe[: max(1, config.rescore)], (search.seen_match, exact.seen_match)
    search(probe, ids), exact(leaders, ids)  # the first forward allocates
    scoring = _timed(lambda: search(probe, ids)) / PROBE / search.active
    again = 0.0 if attack.exact is None else _timed(lambda: exact(leaders, ids))
    again += _timed(lambda: search(leaders, ids)) if config.merge > 1 else 0.0

    def differentiate() -> None:
        with memory_for("the gradient on the suffix", attack.model):
            if config.compat:
                compat_gradient(attack.model, attack.slots[0], ids, config)
            else:
                token_gradient(search.model, attack.slots, search.caches, ids, config, attack.terms)

    differentiate()
    gradient = _timed(differentiate)
    search.seen_match, exact.seen_match = seen  # the probe's candidates are not the attack's
    # the width goes in a straight line to its own until half of the steps, so its mean there is that of a quarter
    width = (at_step(config, config.num_steps // 4).search_width + config.search_width) / 2
    passes = sum(0.5**i for i in range(len(attack.slots))) if config.halving else len(attack.slots)
    return width * passes * scoring + again * len(attack.slots) / search.active + gradient


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _with_suffix(talk: Messages, suffix: str) -> list[dict[str, str]]:
    return [turn | {"content": turn["content"].replace(PLACEHOLDER, suffix)} for turn in turns_of(talk)]


def _is_templates_own(tokenizer: Any, talk: Messages, slot: Slot, suffix: str) -> bool:
    text = tokenizer.apply_chat_template(_with_suffix(talk, suffix), tokenize=False, add_generation_prompt=True)
    own = tokenizer(text, add_special_tokens=False).input_ids
    return bool(own == torch.cat([slot.before_ids, slot.suffix_ids, slot.after_ids]).tolist())


@torch.no_grad()
def _reply(model: Any, tokenizer: Any, talk: Messages) -> str:
    turns = [turn | {"content": turn["content"].rstrip()} for turn in _with_suffix(talk, "")]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with memory_for(f"a reply of {REPLY_TOKENS} tokens", model):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=REPLY_TOKENS,
            do_sample=False,
            pad_token_id=pad,
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def _gib(attack: GCG) -> float:
    """The largest batch's memory and the low-precision copy of the weights."""
    search, most = attack.search, 0
    for goal, slot in enumerate(search.slots):
        n_run = len(slot.suffix_ids) + slot.n_behind
        count = attack.config.batch_size or search.most(goal, len(slot.suffix_ids))
        count = min(attack.config.search_width, count)
        total = len(slot.before_ids) + n_run + 1
        most = max(most, count * candidate_bytes(search.model, n_run, total, len(slot.target_ids)))
    twin = 0 if attack.exact is None else search.model.dtype.itemsize * (search.body_weights + search.head_weights)
    return (most + twin) / 2**30
