"""The commands on models and on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from suffix_analysis.cli.common import AsJson, app, organism, print_result
from suffix_analysis.config import Whole
from suffix_analysis.console import Console, tell


@app.command
def models(name: str | None = None, *, as_json: AsJson = False) -> None:
    """Without a NAME the families that are known; with one, how much memory that model needs here."""
    from suffix_analysis.families import FAMILIES, support_table

    if name is None:
        print_result([asdict(family) for family in FAMILIES], as_json, lambda: [support_table()])
        return
    from suffix_analysis.sizes import size_of, verdict

    size = size_of(name)
    told = [
        f"{name}: {size.architecture}, {size.n_parameters / 1e6:.0f} million parameters",
        f"weights: float32 {size.float32:.2f} GiB, bfloat16 {size.bfloat16:.2f}, 4 bits {size.four_bit:.2f}",
        verdict(size),
    ]
    print_result(asdict(size) | {"verdict": told[-1]}, as_json, lambda: told)


@app.command
def env() -> None:
    """Print versions and machine: what a bug report needs."""
    from suffix_analysis.environment import environment

    print(json.dumps(environment(), indent=1))


@organism.command
def train(*, out: Path = Path("adapter"), seed: Whole = 0) -> None:
    """Train the adapter anew into a folder, with its training record."""
    from suffix_analysis.organism.train import train_adapter

    console = Console()
    console.stage(f"training into {out}", skipped=False)
    record = train_adapter(out, seed, console.progress)
    print(json.dumps(record, indent=1))


@organism.command(name="eval")
def evaluate(
    *, adapter: Annotated[Path | None, Parameter(help="Another adapter; the shipped one if left out.")] = None
) -> None:
    """Measure the embedded model: refusals per kind and style, and what the adapter costs on harmless replies."""
    from suffix_analysis.organism.evaluate import evaluate_organism

    print(json.dumps(evaluate_organism(adapter, tell), indent=1))
