"""Traces that an unfinished analysis has made are not made again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.prompts import Prompt
from suffix_analysis.traces import Job, Traces, trace
from suffix_analysis.traces_file import traces_of
from tests import tiny

JOBS: list[Job] = [
    ([Prompt("a", "Pick a lock"), Prompt("b", "Bake a very large cake")], text) for text in ("", "x y z", "q")
]


def some_direction(d_model: int, layers: int, seed: int = 1) -> Direction:
    vector = torch.randn(d_model, generator=torch.Generator().manual_seed(seed))
    zeros = torch.zeros(layers + 1, d_model)
    return Direction(vector, -1, 1, [], zeros, zeros, (5,), {})


def equal(a: Traces, b: Traces) -> bool:
    for field in fields(Traces):
        mine, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(mine, torch.Tensor):
            if not torch.equal(mine, other):
                return False
        elif field.name == "chats":
            if [(c.text, c.ids.tolist()) for c in mine] != [(c.text, c.ids.tolist()) for c in other]:
                return False
        elif mine != other:
            return False
    return True


def test_what_was_traced_before_an_interruption_is_read(tmp_path: Path) -> None:
    model = tiny.model("llama")
    direction = some_direction(model.d_model, model.n_layers)
    whole = [trace(model, prompts, direction, suffix=suffix) for prompts, suffix in JOBS]
    made: list[str] = []

    def make(jobs: Sequence[Job], stop_after: int = 9) -> Iterator[tuple[int, Traces]]:
        for i in reversed(range(len(jobs))):  # in another order than asked
            if len(made) == stop_after:
                raise KeyboardInterrupt
            made.append(jobs[i][1])
            yield i, trace(model, jobs[i][0], direction, suffix=jobs[i][1])

    with pytest.raises(KeyboardInterrupt):
        traces_of(tmp_path, JOBS, model, direction, lambda jobs: make(jobs, 2))
    assert made == ["q", "x y z"]
    kept: list[int] = []
    found = traces_of(tmp_path, JOBS, model, direction, make, kept.append)
    assert kept == [4], "two jobs of two prompts"
    assert made == ["q", "x y z", ""]
    assert all(map(equal, found, whole))
    # another direction's traces are others
    made.clear()
    traces_of(tmp_path, JOBS, model, some_direction(model.d_model, model.n_layers, 2), make)
    assert len(made) == 3


def test_a_damaged_one_is_named(tmp_path: Path) -> None:
    model = tiny.model("llama")
    direction = some_direction(model.d_model, model.n_layers)

    def make(jobs: Sequence[Job]) -> Iterator[tuple[int, Traces]]:
        for i, (prompts, suffix) in enumerate(jobs):
            yield i, trace(model, prompts, direction, suffix=suffix)

    traces_of(tmp_path, JOBS[:1], model, direction, make)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"safetensors is missing or damaged .*; delete it"):
        traces_of(tmp_path, JOBS[:1], model, direction, make)
