"""Which schedule the study's attack should have: `python benchmarks/schedule.py` (an hour; it goes on where it was)."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import cyclopts
import torch
from scipy import stats

import attacks
from suffix_analysis import attacking, load_model, load_prompts
from suffix_analysis.attacking import Plan, conversation, gcg_config, run_attack, split_for_attack, steps_of
from suffix_analysis.config import StudyConfig
from suffix_analysis.files import read_jsonl
from suffix_analysis.refusal import discover_refusal_tokens, refused

app = cyclopts.App(help=__doc__)
CONSTANT: dict[str, Any] = {
    "n_replace_start": None, "search_width_start": None, "even_positions": False, "momentum": 0.0, "patience": None,
}  # fmt: skip


def variants(width: int) -> dict[str, dict[str, Any]]:
    """Settings that each spend about as much as ``width`` candidates in every step."""
    wide = {"search_width_start": 3 * width // 2, "search_width": 27 * width // 32}
    return {
        "no schedule": CONSTANT,
        "wide first": CONSTANT | wide,
        "narrow first, all changes": {
            "n_replace_start": 3, "search_width_start": 5 * width // 8, "search_width": 9 * width // 8,
            "even_positions": True, "momentum": 0.6, "patience": 12,
        },
    }  # fmt: skip


@app.default
def schedule(
    seed: list[int] | None = None, steps: int = 48, width: int = 64, n: int = 3, out: str = "runs/schedule"
) -> None:
    """One universal suffix on ``n`` select instructions for every schedule and seed, tried on the other select prompts.

    Prints the lowest share of those that was still refused (first token) after half and all of the work (FLOP) that the
    attack without a schedule spends, and how much lower that is than without one: mean and 95 % interval over seeds.
    Each seed has instructions of its own. Two processes may share the work, each with its own ``--seed``.
    """
    attacking.EVAL_EVERY = (4, 4)  # steps between two looks: as close in the first half as in the second
    model = load_model("embedded")
    fast = model.twin(torch.bfloat16)
    kinds = {kind: load_prompts("embedded", split="select", kind=kind) for kind in ("harmful", "harmless")}
    chats = {kind: [model.chat(p.text) for p in prompts] for kind, prompts in kinds.items()}
    tokens = discover_refusal_tokens(fast, chats["harmful"], chats["harmless"])
    whether = refused(fast, kinds["harmful"], tokens).tolist()
    seeds = list(range(4)) if seed is None else seed
    for number in seeds:
        config = StudyConfig(steps=steps, search_width=width, n_instructions=n, seed=number, score_dtype="bfloat16")
        train, held_out = split_for_attack(kinds["harmful"], n, number, whether)
        talks: Any = [conversation(model, p.text) for p in train]
        for name, changes in variants(width).items():
            folder = Path(out) / f"{name.replace(' ', '-')}-{number}"
            plan = Plan(name, config, tuple(train), tuple(held_out), folder)
            folder.mkdir(parents=True, exist_ok=True)
            if len(read(folder)) == steps:
                continue
            settings = replace(gcg_config(model, config), **changes)
            attack = attacks.GCG(model.hf, model.tokenizer, talks, config.target, settings)
            for _ in run_attack(attack, model, plan, tokens):
                pass
            lowest = min(row["select_refusal"] for row in steps_of(plan) if row["select_refusal"] is not None)
            print(f"  seed {number}: {name}: {lowest:.1%}", flush=True)
    table(Path(out), seeds, width)


def read(folder: Path) -> list[dict[str, Any]]:
    """The steps of an attack, none where there is no file."""
    path = folder / "steps.jsonl"
    return read_jsonl(path, journal=True) if path.exists() else []


def table(out: Path, seeds: list[int], width: int) -> None:
    """The lowest refusal at equal work, beside the attack without a schedule."""
    runs = {(name, s): read(out / f"{name.replace(' ', '-')}-{s}") for name in variants(width) for s in seeds}
    base = next(iter(variants(width)))

    def lowest(name: str, number: int, share: float) -> float:
        budget, spent, found = share * sum(row["flops"] for row in runs[base, number]), 0.0, 1.0
        for row in runs[name, number]:
            spent += row["flops"]
            if spent <= 1.02 * budget and row["select_refusal"] is not None:
                found = min(found, row["select_refusal"])
        return found

    for name in variants(width):
        for share, words in ((0.5, "half of the work"), (1.0, "all of it")):
            values = [lowest(name, number, share) for number in seeds]
            gains = [lowest(base, number, share) - value for number, value in zip(seeds, values, strict=True)]
            line = f"{name:28} {words:17} {statistics.fmean(values):6.1%} refused"
            if any(gains) and len(gains) > 1:
                low, high = stats.bootstrap((gains,), statistics.fmean, vectorized=False, rng=0).confidence_interval
                line += f", lower by {statistics.fmean(gains):+.1%} [{low:+.1%}, {high:+.1%}]"
            print(line)


if __name__ == "__main__":
    app()
