"""Campaigns: attacks on many instructions, with many seeds and settings, and the table of what they reached."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from suffix_analysis.attacking import Plan, best_step, numbered, split_for_attack, steps_of
from suffix_analysis.config import CampaignConfig
from suffix_analysis.errors import UsageError
from suffix_analysis.pool import attack_all, refused
from suffix_analysis.prompts import Prompt, prompts_of
from suffix_analysis.records import Suffix
from suffix_analysis.stats import interval

if TYPE_CHECKING:
    from suffix_analysis.study import Study

VARIED = ("target", "suffix_tokens", "steps", "search_width", "topk")  # what an attack's settings are


def settings_of(config: CampaignConfig) -> list[dict[str, Any]]:
    """All combinations of the settings that are to vary.

    Raises:
        UsageError: not written as ``name=[value, value]``, or nothing that an attack is set by.
    """
    given: dict[str, list[Any]] = {}
    for text in config.vary:
        try:
            ((name, values),) = tomllib.loads(text).items()
        except (tomllib.TOMLDecodeError, ValueError) as error:
            raise UsageError(f"vary is {text!r}; write it as search_width=[64, 128].") from error
        if name not in VARIED:
            raise UsageError(f"vary is {text!r}; what may vary is {', '.join(VARIED)}.")
        if not isinstance(values, list) or not values or name in given:
            raise UsageError(f"vary is {text!r}; give every setting once, with all of its values, as {name}=[…, …].")
        kind = type(getattr(config, name))
        wrong = [value for value in values if type(value) is not kind]
        if wrong:
            raise UsageError(
                f"vary is {text!r}, but {name} is never {wrong[0]!r}; its values are of type {kind.__name__}."
            )
        given[name] = values
    found = [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]
    for settings in found:
        replace(config, **settings)  # says which value is wrong
    return found


def campaign_plans(
    folder: Path, harmful: Sequence[Prompt], refused: Sequence[bool], config: CampaignConfig
) -> tuple[list[Plan], list[dict[str, Any]]]:
    """Every group of instructions × seed × settings, and what is special about each.

    With ``each``, ``n_instructions`` instructions are attacked one by one, otherwise all together. The prompts on which
    suffixes are measured are the same for all.
    """
    train, held_out = split_for_attack(harmful, config.n_instructions, config.seed, refused)
    groups = [(prompt,) for prompt in train] if config.each else [tuple(train)]
    seeds = range(config.seed, config.seed + config.n_attacks)
    cells = list(itertools.product(groups, seeds, settings_of(config)))
    plans, told = [], []
    for number, (group, seed, settings) in enumerate(cells, 1):
        own = replace(config, seed=seed, n_instructions=len(group), **settings)
        name = f"Attack {number} of {len(cells)}"
        plans.append(Plan(name, own, group, tuple(held_out), folder / "attacks" / str(number)))
        told.append({"attack": number, "instructions": [p.id for p in group], "seed": seed, **settings})
    return plans, told


def campaign(study: Study) -> tuple[list[Suffix], list[dict[str, Any]]]:
    """Make a campaign's attacks: its suffixes, and a row for each."""
    config = study.precise
    assert isinstance(config, CampaignConfig)
    settings_of(config)  # complains before a model is asked
    harmful = prompts_of(study.prompts(), "harmful", "select", None)
    plans, told = campaign_plans(study.folder, harmful, refused(study, harmful), config)
    suffixes = numbered(attack_all(study, plans))
    return suffixes, [row | outcome(s, steps_of(plan)) for row, s, plan in zip(told, suffixes, plans, strict=True)]


def outcome(suffix: Suffix, steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What an attack reached, at the step that its suffix is of, and what it took."""
    row = best_step(steps)
    return {
        "suffix_id": suffix.id,
        "arm": suffix.arm,
        "text": suffix.text,
        "loss": row["loss"],
        "flipped": row["flipped"] / len(suffix.trained_on),  # of the instructions that it was trained on
        "select_refusal": row["select_refusal"],
        "step": row["step"],
        "seconds": sum(step["seconds"] for step in steps),
        "tflop": sum(step["flops"] for step in steps) / 1e12,
    }


def by_settings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss, flipped share and refusals left for each combination of settings, with intervals over its attacks.

    Attacks are few and share their prompts, so the intervals describe these attacks.
    """
    names = [name for name in VARIED if name in rows[0]]
    found = []
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in names) == key]
        line: dict[str, Any] = dict(zip(names, key, strict=True)) | {"n_attacks": len(own)}
        for measure in ("loss", "flipped", "select_refusal"):
            cells = np.array([[row[measure]] for row in own], dtype=float)
            at = interval(cells, suffix_arm=False, rate=measure != "loss")
            line |= {measure: at.estimate, f"{measure}_lo": at.lo, f"{measure}_hi": at.hi}
        found.append(line)
    return found
