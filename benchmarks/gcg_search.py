"""Which changes to the search help: `python benchmarks/gcg_search.py` (hours; it goes on where it was interrupted)."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import cyclopts
import pandas as pd
import torch
from gcg import SETTINGS, TARGET, instructions, model_in
from scipy import stats

import attacks

app = cyclopts.App(help=__doc__)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "merge 8": {"merge": 8},
    "even positions": {"even_positions": True},
    "momentum 0.4": {"momentum": 0.4},
    "n_replace 3 to 1": {"n_replace_start": 3},
    "topk 64": {"topk": 64},
    "patience 5": {"patience": 5},
    "width 96 to 53": {"search_width_start": 96, "search_width": 53},  # as many candidates in all as 64 throughout
    "width 32": {"search_width": 32, "num_steps": 110},  # about as much work
}


HEADER = "variant,instruction,seed,width,step,seconds,best_loss,tflop"


@app.default
def search(
    n: int = 6,
    seeds: int = 2,
    steps: int = 60,
    width: int = 64,
    variants: list[str] | None = None,
    out: str = "benchmarks/gcg_search.csv",
) -> None:
    """Loss against time and work of the search's variants: ``n`` instructions × ``seeds`` × ``steps``, table and CSV.

    Every attack is read where it has done as much work (FLOP) as the plain search of that instruction and seed did in
    all. Wins count the attacks in which a variant is then below the plain search; the interval is over instructions ×
    seeds. Attacks that the CSV holds already are not run again. Seconds are worth something only where nothing else
    ran; losses and FLOP do not depend on that.
    """
    hf, tokenizer = model_in(torch.float32)
    path = Path(out)
    done = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=HEADER.split(","))
    for (i, text), seed in itertools.product(enumerate(instructions(n)), range(seeds)):
        for name in variants or VARIANTS:
            plan = {"num_steps": steps, "search_width": width, **SETTINGS, "seed": seed} | VARIANTS[name]
            here = (done.variant == name) & (done.instruction == i) & (done.seed == seed) & (done.width == width)
            if done.step[here].max() == plan["num_steps"]:
                continue
            rows, spent, work = [], 0.0, 0.0
            for step in attacks.GCG(hf, tokenizer, text, TARGET, attacks.GCGConfig(**plan)).steps():
                spent, work = spent + step.seconds, work + step.flops / 1e12
                rows.append([name, i, seed, width, step.step, round(spent, 2), round(step.best_loss, 4), work])
            done = pd.concat([done[~here], pd.DataFrame(rows, columns=done.columns)])
            done.to_csv(path, index=False, float_format="%.4f")
            print(f"  instruction {i}, seed {seed}: {name} {step.best_loss:.3f}, {spent:.0f} s", flush=True)
    summary(done[done.width == width])


def summary(done: Any) -> None:
    """The table of ``search``: each variant beside the plain search of the same instruction and seed, at equal work."""
    runs = {key: rows.sort_values("step") for key, rows in done.groupby(["variant", "instruction", "seed"])}
    for name in VARIANTS:
        gains, losses, seconds = [], [], []
        for (variant, *rest), rows in runs.items():
            plain = runs.get(("plain", *rest))
            if variant != name or plain is None:
                continue
            within = rows[rows.tflop <= plain.tflop.iloc[-1]].iloc[-1]
            losses.append(within.best_loss)
            gains.append(plain.best_loss.iloc[-1] - within.best_loss)
            seconds.append(within.seconds)
        if not gains:
            continue
        told = "        "
        if any(gains) and len(gains) > 1:
            found = stats.bootstrap((gains,), statistics.fmean, n_resamples=2000, vectorized=False, random_state=0)
            low, high = found.confidence_interval
            wins = sum(gain > 0 for gain in gains)
            told = f"better by {statistics.fmean(gains):+.3f} [{low:+.3f}, {high:+.3f}], {wins} of {len(gains)}"
        mean, took = statistics.fmean(losses), statistics.median(seconds)
        print(f"{name:18} mean best loss {mean:.3f} in {took:.0f} s (median); {told}")


if __name__ == "__main__":
    app()
