"""Whether halving helps a universal attack: `python benchmarks/halving.py` (it goes on where it was interrupted)."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import cyclopts
import pandas as pd
import torch
from gcg import SETTINGS, TARGET, instructions, mean_interval, model_in

import attacks

app = cyclopts.App(help=__doc__)
VARIANTS: dict[str, dict[str, Any]] = {"all conversations": {"halving": False}, "halving": {"halving": True}}
KEY = ["variant", "group", "seed", "width"]


@app.default
def halving(
    n: int = 6,
    size: int = 3,
    seed: int = 0,
    steps: int = 30,
    width: int = 32,
    group: list[int] | None = None,
    out: str = "benchmarks/halving.csv",
) -> None:
    """Loss at equal work of one suffix for ``size`` instructions, for ``n`` groups of them; table and CSV.

    The search that scores every candidate on all conversations makes ``steps`` steps; halving goes on until it has done
    as much work (FLOP), which does not depend on what else runs. Two processes may share the work by ``--group``.
    """
    hf, tokenizer = model_in(torch.float32)
    path = Path(out)
    texts = instructions(n * size)
    for i, (name, changes) in itertools.product(group or range(n), VARIANTS.items()):
        done = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*KEY, "step", "best_loss", "tflop"])
        same = done[(done.group == i) & (done.seed == seed) & (done.width == width)]
        if name in set(same.variant):
            continue
        budget = float(same[same.variant == "all conversations"].tflop.max()) if changes["halving"] else float("inf")
        plan = {"search_width": width, **SETTINGS, "seed": seed} | changes
        config = attacks.GCGConfig(num_steps=steps if budget == float("inf") else 4 * steps, **plan)
        rows, work = [], 0.0
        for step in attacks.GCG(hf, tokenizer, texts[i::n], [TARGET] * size, config).steps():
            work += step.flops / 1e12
            rows.append([name, i, seed, width, step.step, round(step.best_loss, 4), round(work, 4)])
            if work >= budget:
                break
        table = pd.DataFrame(rows, columns=done.columns)
        table.to_csv(path, mode="a", header=not path.exists(), index=False)
        print(f"  group {i}: {name} {step.best_loss:.3f} after {step.step} steps", flush=True)
    summary(pd.read_csv(path))


def summary(done: Any) -> None:
    """How much lower halving's loss is at equal work, mean with its 95 % interval over groups."""
    runs = {key: rows.sort_values("step") for key, rows in done.groupby(KEY)}
    pairs = [pair for name, *pair in runs if name == "halving"]
    for share in (0.3, 0.5, 1.0):

        def reached(name: str, pair: Any, share: float = share) -> float:
            rows = runs[name, *pair]
            budget = share * runs["all conversations", *pair].tflop.max()
            return float(rows[rows.tflop <= 1.02 * budget].iloc[-1].best_loss)

        gains = [reached("all conversations", pair) - reached("halving", pair) for pair in pairs]
        line = f"after {share:.0%} of the work: lower by {statistics.fmean(gains):+.3f}"
        if len(gains) > 1:
            low, high = mean_interval(gains)
            line += f" [{low:+.3f}, {high:+.3f}]"
        print(f"{line}, {sum(gain > 0 for gain in gains)} of {len(gains)}")


if __name__ == "__main__":
    app()
