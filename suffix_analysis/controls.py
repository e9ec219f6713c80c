"""The study's control suffixes: random, shuffled and benign texts as long as the attack's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import attacks
from suffix_analysis.attacking import conversation
from suffix_analysis.config import StudyConfig
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import Suffix

CONTROLS = ("random", "shuffled", "benign")


def make_controls(
    model: Model,
    suffixes: Sequence[Suffix],
    prompts: Sequence[Prompt],
    config: StudyConfig,
    note: Callable[[str], None],
    arms: Sequence[str] = CONTROLS,
) -> list[Suffix]:
    """Random, shuffled and benign suffixes with the first suffix's token count; ``note`` is told what fell short.

    Shuffled are all of the suffixes, as evenly as the count allows.
    """
    slots = [attacks.build_slot(model.tokenizer, conversation(model, p.text), config.target, "x") for p in prompts[:4]]
    length, count = suffixes[0].n_tokens, config.n_controls

    def random_ones() -> list[tuple[str, tuple[int, ...]]]:
        n_rows = model.hf.get_input_embeddings().weight.shape[0]
        return attacks.random_suffixes(model.tokenizer, slots, count, length, config.seed + 1, n_rows)

    def shuffled() -> list[tuple[str, tuple[int, ...]]]:
        shares = [count // len(suffixes) + (i < count % len(suffixes)) for i in range(len(suffixes))]
        return [
            pair
            for suffix, share in zip(suffixes, shares, strict=True)
            if share
            for pair in attacks.shuffled_suffixes(
                model.tokenizer, slots, torch.tensor(suffix.ids), share, config.seed + 2
            )
        ]

    def benign() -> list[tuple[str, tuple[int, ...]]]:
        return attacks.benign_suffixes(model.tokenizer, slots, count, length)

    made = {arm: make() for arm, make in zip(CONTROLS, (random_ones, shuffled, benign), strict=True) if arm in arms}
    for arm, found in made.items():
        if len(found) < count:
            note(f"Only {len(found)} of {count} {arm} suffixes survive re-tokenisation.")
    return [
        Suffix(id=f"{arm}-{i}", arm=arm, text=text, ids=ids, n_tokens=len(ids), seed=config.seed)
        for arm, found in made.items()
        for i, (text, ids) in enumerate(found, 1)
    ]
