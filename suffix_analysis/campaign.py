"""Campaigns: attacks on many instructions, with many seeds and settings, and the table of what they reached."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from suffix_analysis.attacking import Plan, best_step, numbered, split_for_attack, steps_of
from suffix_analysis.config import VARIED, CampaignConfig
from suffix_analysis.pool import attack_all
from suffix_analysis.prompts import Prompt, prompts_of
from suffix_analysis.records import Suffix
from suffix_analysis.refusal import refused
from suffix_analysis.stats import interval

if TYPE_CHECKING:
    from suffix_analysis.study import Study


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
    cells = list(itertools.product(groups, seeds, config.settings()))
    plans, told = [], []
    for number, (group, seed, settings) in enumerate(cells, 1):
        own = replace(config, seed=seed, n_instructions=len(group), vary=(), **settings)
        name = f"Attack {number} of {len(cells)}"
        where = folder / "attacks" / str(number)
        plans.append(Plan(name, own, group, tuple(held_out), where, each=config.each))
        told.append({"attack": number, "instructions": [p.id for p in group], "seed": seed, **settings})
    return plans, told


def campaign(study: Study) -> tuple[list[Suffix], list[dict[str, Any]], list[str]]:
    """Make a campaign's attacks: its suffixes, a row for each, and sentences on those that failed."""
    config = study.precise
    assert isinstance(config, CampaignConfig)
    harmful = prompts_of(study.prompts(), "harmful", "select", None)
    flags = refused(study.fast, harmful, study.refusal_tokens()).tolist()
    plans, told = campaign_plans(study.folder, harmful, flags, config)
    failed: dict[str, str] = {}
    suffixes = numbered(attack_all(study, plans, lambda plan, why: failed.update({plan.name: why})))
    cells = list(zip(plans, told, strict=True))
    made = [cell for cell in cells if cell[0].name not in failed]
    rows = [row | outcome(s, steps_of(plan), plan) for (plan, row), s in zip(made, suffixes, strict=True)]
    return suffixes, rows, [_told(plan, row, failed[plan.name]) for plan, row in cells if plan.name in failed]


def _told(plan: Plan, row: dict[str, Any], why: str) -> str:
    settings = ", ".join(f"{name} = {row[name]}" for name in VARIED if name in row)
    return f"{plan.name}{f' ({settings})' if settings else ''} failed: {why}"


def outcome(suffix: Suffix, steps: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """What an attack reached, at the step that its suffix is of, and what it took."""
    row = best_step(steps, plan)
    return {
        "suffix_id": suffix.id,
        "arm": suffix.arm,
        "text": suffix.text,
        "loss": row["loss"],
        "flipped": row["flipped"] / len(plan.train),  # of the instructions that it was trained on
        "select_refusal": row["select_refusal"],
        "step": row["step"],
        "seconds": sum(step["seconds"] for step in steps),
        "tflop": sum(step["flops"] for step in steps) / 1e12,
    }


def by_settings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss, flipped share and refusals left for each combination of settings.

    Intervals resample instructions and seeds (METHODS §5), both of which are few, so they are descriptive; None where
    there is one attack alone.
    """
    names = [name for name in VARIED if name in rows[0]]
    found = []
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in names) == key]
        line: dict[str, Any] = dict(zip(names, key, strict=True)) | {"n_attacks": len(own)}
        for measure in ("loss", "flipped", "select_refusal"):
            cells = _cells(own, measure)
            if cells.shape[0] == 1:  # one group of instructions: seeds are what varies
                cells = cells.T
            at = interval(cells, rate=measure != "loss")
            known = cells.size > 1
            line |= {
                measure: at.estimate,
                f"{measure}_lo": at.lo if known else None,
                f"{measure}_hi": at.hi if known else None,
            }
        found.append(line)
    return found


def _cells(rows: Sequence[dict[str, Any]], measure: str) -> Float[ndarray, "instruction seed"]:
    groups = list(dict.fromkeys(tuple(row["instructions"]) for row in rows))
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    at = {(tuple(row["instructions"]), row["seed"]): row[measure] for row in rows}
    return np.array([[at[group, seed] for seed in seeds] for group in groups], dtype=float)
