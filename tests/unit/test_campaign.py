"""Campaigns: which attacks they are made of, and what is told of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from suffix_analysis.campaign import by_settings, campaign_plans, outcome, settings_of
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
        settings_of(CampaignConfig(vary=(vary,)))
    with pytest.raises(UsageError, match="once"):
        settings_of(CampaignConfig(vary=("steps=[5]", "steps=[6]")))


def test_an_attack_is_told_by_its_best_step() -> None:
    suffix = Suffix("adversarial-1", "adversarial", "b", (1,), 1, trained_on=("p1", "p2"))
    steps = [
        {"step": 1, "loss": 0.5, "select_refusal": None, "flipped": None, "seconds": 2.0, "flops": 1e12},
        {"step": 2, "loss": 0.9, "select_refusal": 0.25, "flipped": 1, "seconds": 3.0, "flops": 2e12},
        {"step": 3, "loss": 0.4, "select_refusal": 0.75, "flipped": 2, "seconds": 4.0, "flops": 3e12},
    ]
    row = outcome(suffix, steps)
    assert (row["step"], row["loss"], row["flipped"], row["select_refusal"]) == (2, 0.9, 0.5, 0.25)
    assert (row["seconds"], row["tflop"]) == (9.0, 6.0)


def test_settings_are_compared_over_their_attacks() -> None:
    rows = [
        {"attack": i, "steps": steps, "loss": loss, "flipped": flipped, "select_refusal": 0.5}
        for i, (steps, loss, flipped) in enumerate([(5, 2.0, 0.0), (9, 1.0, 1.0), (5, 4.0, 0.0), (9, 2.0, 0.0)])
    ]
    first, second = by_settings(rows)
    assert (first["steps"], first["n_attacks"], first["loss"], first["flipped"]) == (5, 2, 3.0, 0.0)
    assert (second["loss"], second["flipped"]) == (1.5, 0.5)
    assert first["loss_lo"] <= 3.0 <= first["loss_hi"]
    assert first["flipped_hi"] > 0.5, "none of two attacks says little"
    (every,) = by_settings([{k: v for k, v in row.items() if k != "steps"} for row in rows])
    assert every["n_attacks"] == 4
