"""nanoGCG 0.2.3: its tokenisation for compatibility mode, and the real package behind the same call."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attacks.config import AttackError, GCGConfig, GCGResult
from attacks.inputs import Conversations, pair_up
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
        raise AttackError(f"The target is empty ({target!r}); give the words that the reply is to begin with.")
    if not suffix:
        raise AttackError("The initial suffix is empty; give at least one token.")
    before, after = render(tokenizer, messages)
    bos = tokenizer.bos_token
    if bos and before.startswith(bos):
        before, after = before.replace(bos, ""), after.replace(bos, "")

    def ids(text: str, special: bool = False) -> Int[Tensor, " token"]:
        return torch.tensor(tokenizer(text, add_special_tokens=special).input_ids, dtype=torch.long)

    return Slot(before, "", after, ids(before, special=True), ids(suffix), ids(after), ids(target))


def with_template(tokenizer: Any) -> Any:
    """The tokenizer, or a copy that writes turns one after the other where it has no chat template."""
    if tokenizer.chat_template:
        return tokenizer
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return bare


def isolated_survives(tokenizer: Any, ids: Int[Tensor, "cand suffix"]) -> Bool[Tensor, " cand"]:
    """Which suffixes, decoded and encoded on their own, give their ids back (nanoGCG's filter)."""
    texts = tokenizer.batch_decode(ids)
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    return torch.tensor([row == list(back) for row, back in zip(ids.tolist(), encoded, strict=True)])


def run_nanogcg(
    model: Any, tokenizer: Any, messages: Conversations, target: str | list[str], config: GCGConfig | None = None
) -> GCGResult:
    """The same call answered by the installed nanogcg package (0.2.3, prefix cache off: it fails on transformers 5).

    nanogcg seeds Python, numpy and torch globally and leaves deterministic algorithms switched on; all of that is put
    back afterwards. It tells no steps and no ids: ``steps`` is empty, and ``best_ids`` are the best string's.

    Raises:
        AttackError: nanogcg is not installed, or there are several conversations.
    """
    config = config or GCGConfig()
    conversations, targets = pair_up(messages, target)
    if len(conversations) > 1:
        raise AttackError("nanoGCG knows one conversation at a time; attacks.run makes a universal suffix.")
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
    states = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with torch.random.fork_rng():  # all GPUs' generators too
            # a copy where it has no template: nanogcg writes one into the tokenizer that it is given
            found = nanogcg.run(model, with_template(tokenizer), conversations[0], targets[0], theirs)
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        random.setstate(states[0])
        np.random.set_state(states[1])
    ids = tuple(tokenizer(found.best_string, add_special_tokens=False).input_ids)
    return GCGResult(found.best_loss, found.best_string, found.losses, found.strings, ids, ())
