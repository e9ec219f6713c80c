"""What a study can spread over workers: attacks of a pool, replies of arm × suffix, traces of arm × suffix."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from suffix_analysis import attacking
from suffix_analysis.config import StudyConfig
from suffix_analysis.directions import Direction
from suffix_analysis.inputs import fast_dtype
from suffix_analysis.parallel import side_by_side, worker_model
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import Suffix
from suffix_analysis.replies import Cell, reply_rows
from suffix_analysis.runs import read_jsonl, read_suffixes, write_jsonl, write_suffixes
from suffix_analysis.traces import Traces, trace


def run_pool(
    folder: Path,
    train: Sequence[Prompt],
    held_out: Sequence[Prompt],
    tokens: Sequence[int],
    config: StudyConfig,
    on_done: Callable[[int], None],
) -> list[Suffix]:
    """Run the pool's attacks that are not finished; each result is written into ``folder`` as it comes.

    A finished attack never runs again. For arguments and errors see :func:`suffix_analysis.parallel.side_by_side`.
    """
    folders = [attacking.pool_folder(folder, number) for number in range(config.n_attacks)]
    left = [number for number, own in enumerate(folders) if not (own / "suffix.jsonl").exists()]
    parts = [(number, list(train), list(held_out), list(tokens)) for number in left]
    found = side_by_side(attack_task, parts, config, lambda i: f"Attack {left[i] + 1} of {config.n_attacks}")
    for done, (i, (suffix, steps)) in enumerate(found, 1 + config.n_attacks - len(left)):
        own = folders[left[i]]
        own.mkdir(parents=True, exist_ok=True)
        write_jsonl(own / "steps.jsonl", steps)
        write_suffixes(own / "suffix.jsonl", [suffix])
        on_done(done)
    return [read_suffixes(own / "suffix.jsonl")[0] for own in folders]


def attack_task(
    config: StudyConfig, number: int, train: list[Prompt], held_out: list[Prompt], tokens: list[int]
) -> tuple[Suffix, list[dict[str, Any]]]:
    """One attack in a worker: the suffix and its steps."""
    with tempfile.TemporaryDirectory(prefix="suffix-analysis-attack-") as scratch:
        suffix = attacking.one_attack(worker_model(config), number, train, held_out, tokens, config, Path(scratch))
        return suffix, read_jsonl(Path(scratch) / "steps.jsonl")


def answer(
    cells: Sequence[Cell], tokens: Sequence[int], length: int, config: StudyConfig
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Replies of every cell as they come, each with its cell's number."""
    parts = [(list(some), suffix, arm, list(tokens), length) for arm, suffix, some in cells]
    return side_by_side(reply_task, parts, config, lambda i: f"Answering the {cells[i][0]} arm")


def reply_task(
    config: StudyConfig, prompts: list[Prompt], suffix: Suffix | None, arm: str, tokens: list[int], length: int
) -> list[dict[str, Any]]:
    """Replies of one arm with one suffix in a worker, in the fast precision."""
    model = worker_model(config)
    return reply_rows(model.twin(fast_dtype(config, model)), prompts, suffix, arm, tokens, length)


def trace_all(
    jobs: Sequence[tuple[Sequence[Prompt], str]],
    direction: Direction,
    config: StudyConfig,
    on_prompts: Callable[[int], None],
) -> list[Traces]:
    """Traces of every (prompts, suffix), in order."""
    parts = [(list(prompts), suffix, direction) for prompts, suffix in jobs]
    found: dict[int, Traces] = {}
    for i, traces in side_by_side(trace_task, parts, config, lambda i: f"Tracing part {i + 1} of {len(jobs)}"):
        found[i] = traces
        on_prompts(len(jobs[i][0]))
    return [found[i] for i in range(len(jobs))]


def trace_task(config: StudyConfig, prompts: list[Prompt], suffix: str, direction: Direction) -> Traces:
    """Traces of one arm with one suffix in a worker."""
    return trace(worker_model(config), prompts, direction, suffix=suffix)
