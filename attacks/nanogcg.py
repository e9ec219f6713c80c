"""nanoGCG 0.2.3: its tokenisation for compatibility mode, and the real package behind the same call."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attacks.config import AttackError, GCGConfig, GCGResult
from attacks.slot import Messages, Slot, render

# the characters that fill nanoGCG's buffer at the start, in its order (the sampled ids depend on it)
INIT_CHARS = list(".,!?;:()[]{}@#$%&*wxyz")


def compat_slot(tokenizer: Any, messages: Messages, target: str, suffix: str) -> Slot:
    """The conversation as nanoGCG tokenises it: each part on its own, the beginning with special tokens.

    Every occurrence of the BOS text is cut from the rendered template when it starts with it. For tokenizers whose
    BOS opens every turn (SmolLM2) that attacks a broken prompt: give it a copy with ``bos_token = None``.

    Raises:
        AttackError: an empty target or suffix.
    """
    if not target.strip():
        raise AttackError("The target is empty; give the words that the reply should begin with, e.g. 'Sure, here is'.")
    if not suffix:
        raise AttackError("The initial suffix is empty; give at least one token.")
    before, after = render(tokenizer, messages)
    bos = tokenizer.bos_token
    if bos and before.startswith(bos):
        before, after = before.replace(bos, ""), after.replace(bos, "")

    def ids(text: str, special: bool = False) -> Int[Tensor, " token"]:
        return torch.tensor(tokenizer(text, add_special_tokens=special).input_ids, dtype=torch.long)

    return Slot(before, "", after, ids(before, special=True), ids(suffix), ids(after), ids(target))


def isolated_survives(tokenizer: Any, ids: Int[Tensor, "cand suffix"]) -> Bool[Tensor, " cand"]:
    """Which suffixes, decoded and encoded on their own, give their ids back (nanoGCG's filter)."""
    texts = tokenizer.batch_decode(ids)
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    return torch.tensor([row == list(back) for row, back in zip(ids.tolist(), encoded, strict=True)])


def run_nanogcg(model: Any, tokenizer: Any, messages: Messages, target: str, config: GCGConfig) -> GCGResult:
    """The same call answered by the installed nanogcg package (0.2.3, prefix cache off: it fails on transformers 5).

    nanogcg seeds Python, numpy and torch globally and leaves deterministic algorithms switched on; all of that is put
    back afterwards.

    Raises:
        AttackError: nanogcg is not installed.
    """
    try:
        import nanogcg
    except ImportError as error:
        raise AttackError("nanogcg is not installed; run: pip install nanogcg==0.2.3") from error
    theirs = nanogcg.GCGConfig(
        num_steps=config.num_steps,
        optim_str_init=config.optim_str_init if isinstance(config.optim_str_init, str) else list(config.optim_str_init),
        search_width=config.search_width,
        batch_size=config.batch_size,
        topk=config.topk,
        n_replace=config.n_replace,
        buffer_size=config.buffer_size,
        use_mellowmax=config.use_mellowmax,
        mellowmax_alpha=config.mellowmax_alpha,
        early_stop=config.early_stop,
        use_prefix_cache=False,
        allow_non_ascii=config.allow_non_ascii,
        filter_ids=config.filter_ids,
        add_space_before_target=config.add_space_before_target,
        seed=config.seed,
        verbosity="WARNING",
    )
    deterministic, states = torch.are_deterministic_algorithms_enabled(), (random.getstate(), np.random.get_state())
    try:
        with torch.random.fork_rng():  # all GPUs' generators too
            found = nanogcg.run(model, tokenizer, messages, target, theirs)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        random.setstate(states[0])
        np.random.set_state(states[1])
    ids = tuple(tokenizer(found.best_string, add_special_tokens=False).input_ids)
    return GCGResult(found.best_loss, found.best_string, found.losses, found.strings, ids, ())
