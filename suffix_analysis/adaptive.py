"""Does a defence hold against an attacker who knows it? GCG run on the defended model (METHODS §6)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import attacks
from attacks.config import ScoreDtype
from attacks.scorer import Scorer
from attacks.terms import Term
from suffix_analysis.attacking import conversation, gcg_config
from suffix_analysis.config import StudyConfig
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt
from suffix_analysis.refusal import opens_refusal

EVERY = 5  # steps between two looks at the prompts that the attack has not seen
Defended = Callable[[int], contextlib.AbstractContextManager[None]]


def attack_defended(
    model: Model,
    train: Sequence[Prompt],
    held_out: Sequence[Prompt],
    refusal_tokens: Sequence[int],
    defended: Mapping[str, Defended],
    terms: Mapping[str, Sequence[Term]],
    config: StudyConfig,
    on_step: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Loss and what is not refused against steps, one attack with the same budget and seed on each defended model.

    Every few steps the best suffix so far is looked at: ``target_loss`` is its loss without further terms of the
    objective, so that attacks can be compared, ``not_refused`` the share of unseen prompts whose reply does not open as
    a refusal.

    The defence is on while the attack scores candidates, takes gradients and looks at unseen prompts.

    Args:
        model: the model in the precision of searches; it is wrapped, so it is searched in that precision alone.
        train: instructions that the attack trains on.
        held_out: select instructions that it does not.
        refusal_tokens: ids that open refusals.
        defended: defences by name: functions from the number of tokens behind chat[-1] to a context.
        terms: of the attack's objective, by defence: what the attacker knows to lower, such as a detector's score.
        config: budget and schedule of the attack.
        on_step: called with (done, total).
    """
    assert model.bridge is not None  # wrapped before the attack looks at it
    rows: list[dict[str, Any]] = []
    settings = gcg_config(model, config)
    # without the cache a forward holds the whole prompt, which detectors read
    own: ScoreDtype = "bfloat16" if model.hf.dtype == torch.bfloat16 else "float32"
    settings = replace(settings, use_prefix_cache=False, score_dtype=own)
    talks: Any = [conversation(model, prompt.text) for prompt in train]
    behind = len(attacks.build_slot(model.tokenizer, talks[0], config.target, "x").target_ids) - 1
    for number, (name, context) in enumerate(defended.items()):
        with context(behind):
            attack = attacks.GCG(model.hf, model.tokenizer, talks, config.target, settings, terms.get(name, ()))
        plain = Scorer(model.hf, attack.slots, settings)
        steps = attack.steps()
        for _ in range(config.steps):
            with context(behind):
                step = next(steps)
            row = {
                "defence": name, "step": step.step, "loss": step.loss, "best_loss": step.best_loss,
                "target_loss": None, "not_refused": None,
                "n_prompts": len(held_out), "n_train": len(train), "seed": config.seed,
            }  # fmt: skip
            if step.step % EVERY == 0 or step.step == config.steps:
                _, ids, text = attack.best
                with context(behind):
                    row["target_loss"] = float(plain(torch.tensor([ids]))[0].mean())
                with context(0):
                    refused = opens_refusal(model, [model.chat(p.text, text).ids for p in held_out], refusal_tokens)
                row["not_refused"] = float((~refused).float().mean())
            rows.append(row)
            if on_step is not None:
                on_step(number * config.steps + step.step, len(defended) * config.steps)
    return rows
