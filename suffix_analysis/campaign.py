"""A pool of attacks as tasks of Ray: side by side on one machine or on many (extra ``ray``)."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from suffix_analysis import attacking
from suffix_analysis.config import StudyConfig
from suffix_analysis.errors import UserError, first_line
from suffix_analysis.models import Model, load_model
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import Suffix
from suffix_analysis.runs import read_jsonl, read_suffixes, write_jsonl, write_suffixes

RETRIES = 3  # of a task whose worker died


def run_pool(
    folder: Path,
    train: Sequence[Prompt],
    held_out: Sequence[Prompt],
    tokens: Sequence[int],
    config: StudyConfig,
    on_done: Callable[[int], None],
) -> list[Suffix]:
    """Run the pool's attacks that are not finished; each result is written into ``folder`` as it comes.

    A worker needs no access to the folder: it returns the suffix and the steps. A task whose worker died runs again, a
    finished one never. At most as many tasks are handed to Ray as there are attacks left; how many run at once follows
    from ``attack_cpus`` and ``attack_gpus``.

    Raises:
        UserError: Ray is not installed or its cluster cannot be reached, or an attack failed (its number is named).
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--executor ray needs Ray; run: pip install 'suffix-analysis[ray]'") from error
    folders = [attacking.pool_folder(folder, number) for number in range(config.n_attacks)]
    left = [number for number, own in enumerate(folders) if not (own / "suffix.jsonl").exists()]
    if left:
        ours = not ray.is_initialized()
        try:
            if ours:
                ray.init(address=config.address, include_dashboard=False, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"Ray cannot be reached at {config.address or 'this machine'}: {first_line(error)}"
            ) from error
        try:
            task = ray.remote(attack_task).options(
                num_cpus=config.attack_cpus, num_gpus=config.attack_gpus, max_retries=RETRIES
            )
            given = (list(train), list(held_out), list(tokens), asdict(config))
            pending = {task.remote(number, *given): number for number in left}
            while pending:
                (ready,), _ = ray.wait(list(pending), num_returns=1)
                number = pending.pop(ready)
                try:
                    suffix, steps = ray.get(ready)
                except ray.exceptions.RayError as error:
                    raise UserError(f"Attack {number + 1} of {config.n_attacks} failed: {_cause(error)}") from error
                folders[number].mkdir(parents=True, exist_ok=True)
                write_jsonl(folders[number] / "steps.jsonl", steps)
                write_suffixes(folders[number] / "suffix.jsonl", [suffix])
                on_done(config.n_attacks - len(pending))
        finally:
            if ours:
                ray.shutdown()
    return [read_suffixes(own / "suffix.jsonl")[0] for own in folders]


def _cause(error: Exception) -> str:
    """What went wrong inside the worker, without Ray's frames around it."""
    cause = getattr(error, "cause", None) or error
    return first_line(cause)


def attack_task(
    number: int, train: list[Prompt], held_out: list[Prompt], tokens: list[int], settings: dict[str, Any]
) -> tuple[Suffix, list[dict[str, Any]]]:
    """One attack in a worker: the suffix and its steps."""
    config = StudyConfig(**settings)
    torch.set_num_threads(config.attack_cpus)
    model = _model(config.model, config.adapter, config.dtype, "cuda" if config.attack_gpus else config.device)
    with tempfile.TemporaryDirectory(prefix="suffix-analysis-attack-") as scratch:
        suffix = attacking.one_attack(model, number, train, held_out, tokens, config, Path(scratch))
        return suffix, read_jsonl(Path(scratch) / "steps.jsonl")


@functools.lru_cache(maxsize=1)
def _model(name: str, adapter: str | None, dtype: str, device: str | None) -> Model:
    """The worker's model; the next task of the same worker finds it loaded."""
    return load_model(name, dtype=getattr(torch, dtype), device=device, adapter=adapter)
