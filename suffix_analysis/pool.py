"""The study's attack stage: a pool of equal attacks, or suffixes that were found elsewhere, with their controls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attacks import AttackError
from suffix_analysis.attacking import (
    Plan,
    Progress,
    make_attack,
    numbered,
    split_for_attack,
)
from suffix_analysis.config import StudyConfig
from suffix_analysis.controls import CONTROLS, make_controls
from suffix_analysis.errors import UserError, first_line
from suffix_analysis.inputs import given_suffixes
from suffix_analysis.prompts import Prompt, prompts_of
from suffix_analysis.provenance import weights_of
from suffix_analysis.records import Suffix, by_text
from suffix_analysis.refusal import refused

if TYPE_CHECKING:
    from suffix_analysis.study import Study


def study_suffixes(study: Study) -> list[Suffix]:
    """All suffixes of a study, controls included."""
    prompts, config, model = study.prompts(), study.config, study.model
    harmful = prompts_of(prompts, "harmful", "select", None)
    if config.suffixes is not None:
        given = given_suffixes(Path(config.suffixes), model)
        own = [s for s in given if s.arm == "adversarial"]
        lacking = [arm for arm in CONTROLS if arm not in {s.arm for s in given}]
        return [*given, *make_controls(model, own, harmful, config, study.skip, lacking)]
    train, held_out = split_for_attack(
        harmful, config.n_instructions, config.seed, refused(study.fast, harmful, study.refusal_tokens()).tolist()
    )
    suffixes = attack_all(study, pool_plans(study.folder, train, held_out, study.precise))
    ranked = sorted(suffixes, key=lambda suffix: (suffix.arm == "failed", suffix.loss or 0.0))
    flipping = [suffix for suffix in ranked if suffix.arm == ranked[0].arm]
    return [*numbered(suffixes), *make_controls(model, flipping, held_out, config, study.skip)]


def pool_plans(folder: Path, train: Sequence[Prompt], held_out: Sequence[Prompt], config: StudyConfig) -> list[Plan]:
    """``n_attacks`` equal attacks with seeds of their own; the first one's files stand in the run folder itself."""
    return [
        Plan(
            name=f"Attack {number + 1} of {config.n_attacks}",
            config=replace(config, seed=config.seed + number),
            train=tuple(train),
            held_out=tuple(held_out),
            folder=folder if number == 0 else folder / "attacks" / str(number + 1),
            alone=config.n_attacks == 1,
        )
        for number in range(config.n_attacks)
    ]


def attack_all(
    study: Study, plans: Sequence[Plan], on_failed: Callable[[Plan, str], None] | None = None
) -> list[Suffix]:
    """Make the planned attacks, here one after the other or side by side under Ray; finished ones are read.

    With ``on_failed`` attacks that fail are told and left out, and the others go on.
    """
    config, tokens = study.precise, study.refusal_tokens()
    if config.executor == "ray":
        from suffix_analysis import workers

        if torch.cuda.is_available() and not config.attack_gpus and config.device in (None, "auto"):
            study.narrator.say("Tasks under Ray use no GPU unless they ask for one: --attack-gpus 1, or a part of it.")
        return workers.attack_all(
            plans, tokens, config, lambda done: study.narrator.progress(done, len(plans), "attacks done"), on_failed,
            weights_of(study.folder),
        )  # fmt: skip
    found, before, total = [], 0, sum(plan.config.steps for plan in plans)
    for number, plan in enumerate(plans):

        def tell(progress: Progress, plan: Plan = plan, before: int = before) -> None:
            study.narrator.progress(before + progress.step.step, total, progress.line(len(plan.train)))

        say = study.narrator.say if number == 0 else lambda sentence: None
        try:
            found.append(make_attack(study.model, plan, tokens, tell, say))
        except (UserError, AttackError) as error:
            if on_failed is None:
                raise
            on_failed(plan, first_line(error))
        before += plan.config.steps
    return found


def traced_of(suffixes: Sequence[Suffix], config: StudyConfig) -> list[Suffix]:
    """What is traced: all that an attack has made, failed ones too, and the first controls of each arm, of as many
    texts as there are."""
    traced = [s for s in suffixes if s.arm in ("adversarial", "failed")]
    for arm in dict.fromkeys(s.arm for s in suffixes if s not in traced):
        own = [s for s in suffixes if s.arm == arm]
        rounds = itertools.chain.from_iterable(itertools.zip_longest(*by_text(own)))
        first = [number for number in rounds if number is not None][: config.n_traced_controls]
        traced += [own[number] for number in sorted(first)]
    return traced
