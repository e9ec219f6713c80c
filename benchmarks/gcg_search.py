"""Which changes to the search help: `python benchmarks/gcg_search.py` (hours; it goes on where it was interrupted)."""

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

MERGE = {"merge": 8}  # 16 takes the same steps at width 32: combinations of that many never won
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"merge": 0},
    "merge 8": MERGE,
    "merge 8, momentum 0.4": MERGE | {"momentum": 0.4},
    "merge 8, n_replace 3 to 1": MERGE | {"n_replace_start": 3},
    "merge 8, even positions": MERGE | {"even_positions": True},
    "merge 8, patience 5": MERGE | {"patience": 5},
    "merge 8, width 48 to 27": MERGE
    | {"search_width_start": 48, "search_width": 27},  # as many in all as 32 throughout
}
KEY = ["variant", "instruction", "seed", "width"]
HEADER = [*KEY, "step", "seconds", "best_loss", "tflop"]


@app.default
def search(
    n: int = 6,
    seed: list[int] | None = None,
    steps: int = 60,
    width: int = 32,
    out: str = "benchmarks/gcg_search.csv",
) -> None:
    """Loss against time and work of the search's variants: ``n`` instructions × seeds × ``steps``, table and CSV.

    Every attack is read where it has done half as much and as much work (FLOP) as the plain search of that instruction
    and seed did in all. Wins count the attacks in which a variant is then below the plain search; the interval is over
    instructions × seeds. An attack is written to the CSV when it ends, and what the CSV holds is not run again, so two
    processes may share the work, each with its own ``--seed``. Seconds are worth something only where nothing else ran;
    losses and FLOP do not depend on that.
    """
    hf, tokenizer = model_in(torch.float32)
    path = Path(out)
    if not path.exists():
        path.write_text(",".join(HEADER) + "\n")
    held = set(pd.read_csv(path)[KEY].itertuples(index=False, name=None))
    for (i, text), number in itertools.product(enumerate(instructions(n)), [0, 1] if seed is None else seed):
        for name, changes in VARIANTS.items():  # all before the next pair, so that what there is can be compared
            if (name, i, number, width) in held:
                continue
            plan = {"num_steps": steps, "search_width": width, **SETTINGS, "seed": number} | changes
            rows, spent, work = [], 0.0, 0.0
            for step in attacks.GCG(hf, tokenizer, text, TARGET, attacks.GCGConfig(**plan)).steps():
                spent, work = spent + step.seconds, work + step.flops / 1e12
                rows.append([name, i, number, width, step.step, round(spent, 2), round(step.best_loss, 4), work])
            pd.DataFrame(rows).to_csv(path, mode="a", header=False, index=False, float_format="%.4f")
            print(f"  instruction {i}, seed {number}: {name} {step.best_loss:.3f}, {spent:.0f} s", flush=True)
    done = pd.read_csv(path)
    summary(done[done.width == width])


def summary(done: Any) -> None:
    """The table of ``search``: each variant beside the plain search of the same instruction and seed, at equal work.

    After 30 %, half and all of the plain search's work; and beside merging alone, which all variants contain. Only
    pairs that every variant has.
    """
    last = done[done.step == done.step.max()].groupby(["instruction", "seed"]).variant.nunique()
    pairs = [pair for pair, count in last.items() if count == len(VARIANTS)]
    runs = {key: rows.sort_values("step") for key, rows in done.groupby(["variant", "instruction", "seed"])}
    print(f"{len(pairs)} pairs of instruction and seed")

    def reached(name: str, pair: Any, share: float) -> float:
        budget = share * runs["plain", *pair].tflop.iloc[-1]
        rows = runs[name, *pair]
        return float(rows[rows.tflop <= budget].iloc[-1].best_loss)

    for base, share in itertools.product(("plain", "merge 8"), (0.3, 0.5, 1.0)):
        print(f"after {share:.0%} of the plain search's work, better than {base} by")
        for name in VARIANTS:
            losses = [reached(name, pair, share) for pair in pairs]
            gains = [reached(base, pair, share) - loss for pair, loss in zip(pairs, losses, strict=True)]
            line = f"  {name:26} "
            if any(gains) and len(gains) > 1:
                low, high = mean_interval(gains)
                wins = sum(gain > 0 for gain in gains)
                line += f"{statistics.fmean(gains):+.3f} [{low:+.3f}, {high:+.3f}], {wins} of {len(gains)}"
            print(f"{line:60} mean best loss {statistics.fmean(losses):.3f}")


if __name__ == "__main__":
    app()
