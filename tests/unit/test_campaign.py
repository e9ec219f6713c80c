"""Campaigns: which attacks they are made of, and what is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from suffix_analysis.attacking import Plan, has_failed
from suffix_analysis.campaign import by_settings, campaign_plans, outcome
from suffix_analysis.config import CampaignConfig
from suffix_analysis.errors import UsageError
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import Suffix

PROMPTS = [Prompt(id=f"p{i}", text=f"Do the thing number {i}", kind="harmful", split="select") for i in range(9)]


def test_every_instruction_meets_every_seed_and_setting(tmp_path: Path) -> None:
    config = CampaignConfig(
        n_instructions=3, n_attacks=2, seed=5, each=True, vary=("search_width=[8, 16]", "target=['Sure,', 'Yes,']"),
    )  # fmt: skip
    plans, told = campaign_plans(tmp_path, PROMPTS, [True] * len(PROMPTS), config)
    assert len(plans) == 3 * 2 * 2 * 2
    cells = {(p.train[0].id, p.config.seed, p.config.search_width, p.config.target) for p in plans}
    assert len(cells) == len(plans)
    assert {seed for _, seed, _, _ in cells} == {5, 6}
    assert len({plan.folder for plan in plans}) == len(plans)
    held_out = {tuple(p.id for p in plan.held_out) for plan in plans}
    assert len(held_out) == 1, "all suffixes are measured on the same prompts"
    trained = {plan.train[0].id for plan in plans}
    assert not trained & set(*held_out), "and none of them on a prompt that any was trained on"
    assert not any(plan.alone for plan in plans), "budgets must be equal"
    row = told[-1]
    assert row["instructions"] == [plans[-1].train[0].id]
    assert (row["seed"], row["search_width"], row["target"]) == (6, 16, "Yes,")


def test_together_is_one_suffix_for_all(tmp_path: Path) -> None:
    config = CampaignConfig(n_instructions=3, n_attacks=2)
    plans, _ = campaign_plans(tmp_path, PROMPTS, [True] * len(PROMPTS), config)
    assert [len(plan.train) for plan in plans] == [3, 3]
    assert plans[0].train == plans[1].train


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        ("search_width", "write it as"),
        ("search_width=", "write it as"),
        ("a=1\nb=2", "write it as"),
        ("model=['other']", "what may vary is"),
        ("steps=5", "with all of its values"),
        ("steps=[]", "with all of its values"),
        ("steps=[5, 6.5]", "steps is never 6.5; its values are of type int"),
        ("steps=[true]", "is never True"),
        ("target=[1]", "is never 1"),
        ("steps=[0]", "steps is 0"),
    ],
)  # fmt: skip
def test_what_cannot_vary_is_said(vary: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        CampaignConfig(vary=(vary,))


def test_what_is_given_twice_or_ignored_is_refused() -> None:
    for vary in (("steps=[5]", "steps=[6]"), ("steps=[5, 5]",)):
        with pytest.raises(UsageError, match="every setting once"):
            CampaignConfig(vary=vary)
    with pytest.raises(UsageError, match="leave suffixes out"):
        CampaignConfig(suffixes="file.jsonl")


STEPS = [
    {"step": 1, "loss": 0.5, "select_refusal": None, "flipped": None, "seconds": 2.0, "flops": 1e12},
    {"step": 2, "loss": 0.9, "select_refusal": 0.25, "flipped": 0, "seconds": 3.0, "flops": 2e12},
    {"step": 3, "loss": 0.4, "select_refusal": 0.75, "flipped": 1, "seconds": 4.0, "flops": 3e12},
]


@pytest.mark.parametrize(("each", "step", "failed"), [(False, 2, False), (True, 3, False)])
def test_an_attack_is_told_by_its_best_step(tmp_path: Path, each: bool, step: int, failed: bool) -> None:
    """A universal suffix by what it leaves refused of other prompts, one for one instruction by that one first."""
    plan = Plan("It", CampaignConfig(), (PROMPTS[0],), tuple(PROMPTS[1:]), tmp_path, each=each)
    suffix = Suffix("adversarial-1", "adversarial", "b", (1,), 1, trained_on=("p0",))
    row = outcome(suffix, STEPS, plan)
    chosen = STEPS[step - 1]
    assert [row[k] for k in ("step", "loss", "flipped", "select_refusal")] == [
        chosen[k] for k in ("step", "loss", "flipped", "select_refusal")
    ]
    assert (row["seconds"], row["tflop"]) == (9.0, 6.0)
    assert has_failed(chosen, plan) == failed
    assert has_failed(STEPS[1] if each else STEPS[2], plan), "refused where it should not be"


def rows_of(table: list[tuple[str, int, int, float, float]]) -> list[dict[str, Any]]:
    names = ("instructions", "seed", "steps", "loss", "flipped")
    return [dict(zip(names, ([first], *rest), strict=True)) | {"select_refusal": 0.5} for first, *rest in table]


def test_settings_are_compared_over_instructions_and_seeds() -> None:
    rows = rows_of([("a", 0, 5, 2.0, 0.0), ("a", 0, 9, 1.0, 1.0), ("b", 0, 5, 4.0, 0.0), ("b", 0, 9, 2.0, 0.0)])
    first, second = by_settings(rows)
    assert (first["steps"], first["n_attacks"], first["loss"], first["flipped"]) == (5, 2, 3.0, 0.0)
    assert (second["loss"], second["flipped"]) == (1.5, 0.5)
    assert first["loss_lo"] <= 3.0 <= first["loss_hi"]
    assert first["flipped_hi"] > 0.5, "none of two attacks says little"
    every = rows_of([("a", i, 5, float(i), 0.0) for i in range(4)])
    (line,) = by_settings([{k: v for k, v in row.items() if k != "steps"} for row in every])
    assert line["n_attacks"] == 4 and line["loss_lo"] < 1.5 < line["loss_hi"], "seeds vary where instructions do not"
    (alone,) = by_settings(rows[:1])
    assert (alone["loss"], alone["loss_lo"], alone["flipped_hi"]) == (2.0, None, None)


def test_instructions_that_decide_everything_leave_the_interval_wide() -> None:
    """Ten seeds on each of four instructions are four instructions, not forty attacks."""
    rows = rows_of([(name, seed, 5, 1.0, float(name in "ab")) for name in "abcd" for seed in range(10)])
    (line,) = by_settings(rows)
    assert line["flipped"] == 0.5 and line["flipped_hi"] - line["flipped_lo"] > 0.6
