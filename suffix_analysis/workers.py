"""What a study can spread over workers: attacks of a pool, replies of arm × suffix, traces of arm × suffix."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from suffix_analysis.attacking import Plan, finished, make_attack, steps_of
from suffix_analysis.config import StudyConfig
from suffix_analysis.directions import Direction
from suffix_analysis.files import write_jsonl
from suffix_analysis.inputs import fast_dtype
from suffix_analysis.judges import judge_named
from suffix_analysis.parallel import side_by_side, worker_model
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import Suffix
from suffix_analysis.replies import Cell, reply_rows
from suffix_analysis.runs import write_suffixes
from suffix_analysis.traces import Job, Traces, trace

JOURNALS = ("checkpoint.json", "steps.jsonl")  # of an attack that is not finished


def attack_all(
    plans: Sequence[Plan],
    tokens: Sequence[int],
    config: StudyConfig,
    on_done: Callable[[int], None],
    on_failed: Callable[[Plan, str], None] | None = None,
    weights: Mapping[str, str] | None = None,
) -> list[Suffix]:
    """Make the planned attacks that are not finished; each result is written into its folder as it comes.

    A finished attack never runs again, an unfinished one goes on from what its folder holds. Workers that see that
    folder work in it, step by step; others send what they have made when it is finished. For ``weights`` and errors see
    `suffix_analysis.parallel.side_by_side`; with ``on_failed`` attacks that fail are left out.
    """
    left = [plan for plan in plans if not plan.result.exists()]
    lost = None if on_failed is None else lambda i, why: on_failed(left[i], why)
    parts = [(_at_home(plan), list(tokens), _begun(plan)) for plan in left]
    found = side_by_side(attack_task, parts, config, lambda i: left[i].name, lost, weights)
    for done, (i, (suffix, steps)) in enumerate(found, 1 + len(plans) - len(left)):
        if not left[i].result.exists():  # the worker did not see the folder
            write_jsonl(left[i].folder / "steps.jsonl", steps)
            write_suffixes(left[i].result, [suffix])
        on_done(done)
    return [finished(plan) for plan in plans if on_failed is None or plan.result.exists()]


def _at_home(plan: Plan) -> Plan:
    """The plan with its folder made and named from the root, so that a worker sees it if it can."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    return replace(plan, folder=plan.folder.resolve())


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other worker is at work in an attack's folder, such as one whose run was killed a moment ago."""
    with (folder / ".attack.lock").open("a") as handle:
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _begun(plan: Plan) -> dict[str, bytes]:
    """What an attack's folder holds of one that was interrupted."""
    return {name: path.read_bytes() for name in JOURNALS if (path := plan.folder / name).is_file()}


def attack_task(
    config: StudyConfig, plan: Plan, tokens: list[int], begun: dict[str, bytes]
) -> tuple[Suffix, list[dict[str, Any]]]:
    """One attack in a worker, gone on with from what was ``begun``: the suffix and its steps."""
    if plan.folder.is_dir():
        with _alone(plan.folder):
            return make_attack(worker_model(config), plan, tokens), steps_of(plan)
    with tempfile.TemporaryDirectory(prefix="suffix-analysis-attack-") as scratch:
        here = replace(plan, folder=Path(scratch))
        for name, content in begun.items():
            (here.folder / name).write_bytes(content)
        return make_attack(worker_model(config), here, tokens), steps_of(here)


def answer(
    cells: Sequence[Cell],
    tokens: Sequence[int],
    length: int,
    config: StudyConfig,
    weights: Mapping[str, str] | None = None,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Replies of every cell as they come, each with its cell's number."""
    parts = [(list(some), suffix, arm, list(tokens), length) for arm, suffix, some in cells]
    return side_by_side(reply_task, parts, config, lambda i: f"Answering the {cells[i][0]} arm", weights=weights)


def reply_task(
    config: StudyConfig, prompts: list[Prompt], suffix: Suffix | None, arm: str, tokens: list[int], length: int
) -> list[dict[str, Any]]:
    """Replies of one arm with one suffix in a worker, in the fast precision."""
    model = worker_model(config)
    judge = judge_named(config.judge)
    return reply_rows(model.twin(fast_dtype(config, model)), prompts, suffix, arm, tokens, length, judge)


def trace_all(
    jobs: Sequence[Job], direction: Direction, config: StudyConfig, weights: Mapping[str, str] | None = None
) -> Iterator[tuple[int, Traces]]:
    """Traces of every (prompts, suffix) as they come, each with its number."""
    parts = [(list(prompts), suffix, direction) for prompts, suffix in jobs]
    return side_by_side(trace_task, parts, config, lambda i: f"Tracing part {i + 1} of {len(jobs)}", weights=weights)


def trace_task(config: StudyConfig, prompts: list[Prompt], suffix: str, direction: Direction) -> Traces:
    """Traces of one arm with one suffix in a worker."""
    return trace(worker_model(config), prompts, direction, suffix=suffix)
