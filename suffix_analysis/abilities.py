"""Other abilities with the direction left alone, ablated and taken out of the weights (the paper, §4.3 and table 3).

The tasks are lm-evaluation-harness's (extra ``eval``); this module only runs them under each intervention and pairs the
answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from suffix_analysis.errors import UserError, first_line
from suffix_analysis.interventions import ablate
from suffix_analysis.models import Model, quiet
from suffix_analysis.orthogonalise import NotAvailable, orthogonalised
from suffix_analysis.stats import contrast

Samples = dict[int, float]


def measure_abilities(
    model: Model,
    vector: Float[Tensor, " d_model"],
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    on_run: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Every metric of every task for the base, ablated and orthogonalised model, with the change from the base.

    The change is paired by question, with its bootstrap interval; metrics without a value per question have none.

    Args:
        model: the model; wrapped in its bridge.
        vector: the direction.
        tasks: names of lm-eval's tasks.
        folder: a folder with further task files (YAML); lm-eval's own are left out then.
        limit: questions of each task at most.
        batch_size: questions at once.
        on_run: called with (done, total) after each intervention.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, or its questions cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("Abilities need lm-eval; run: pip install 'suffix-analysis[eval]'") from error
    assert model.bridge is not None  # wrapped before the harness takes the model
    with quiet():
        manager = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
        harness = HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=batch_size, backend="causal")
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown or not tasks:
        where = (
            "`lm-eval ls tasks` lists them"
            if folder is None
            else f"of the tasks in {folder}, beside which no others count"
        )
        raise UserError(f"There is no task {', '.join(map(repr, unknown)) or 'named'}; {where}.")
    plans: list[tuple[str, Callable[[], contextlib.AbstractContextManager[None]]]] = [
        ("none", contextlib.nullcontext),
        ("ablated", lambda: ablate(model, vector)),
        ("orthogonalised", lambda: orthogonalised(model, vector)),
    ]
    rows: list[dict[str, Any]] = []
    base: dict[tuple[str, str], Samples] = {}
    for done, (name, context) in enumerate(plans, 1):
        try:
            with context(), quiet():
                found = lm_eval.simple_evaluate(
                    model=harness, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=True
                )
        except NotAvailable as reason:
            rows += [
                row | {"intervention": name, "value": None, "stderr": None, "change": None, "lo": None, "hi": None,
                       "note": str(reason)}
                for row in rows
                if row["intervention"] == "none"
            ]  # fmt: skip
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"The tasks {', '.join(tasks)} cannot be run: {first_line(error)}") from error
        else:
            rows += _rows(name, found, base)
        if on_run is not None:
            on_run(done, len(plans))
    return rows


def _rows(intervention: str, found: Any, base: dict[tuple[str, str], Samples]) -> list[dict[str, Any]]:
    """One row per task and metric; the first intervention's values per question are remembered in ``base``."""
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filtering = key.partition(",")
            if not filtering or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{filtering}")
            each = {
                sample["doc_id"]: float(sample[metric])
                for sample in found["samples"].get(task, [])  # a group has none of its own
                if isinstance(sample.get(metric), int | float) and sample.get("filter", filtering) == filtering
            }
            first = base.setdefault((task, key), each)
            change = lo = hi = None
            if first is not each and each and each.keys() == first.keys():
                pair = [np.array([[x[i]] for i in sorted(first)]) for x in (each, first)]
                paired = contrast(pair[0], pair[1])
                change, lo, hi = paired.estimate, paired.lo, paired.hi
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filtering,
                    "intervention": intervention,
                    "n": _questions(found, task),
                    "value": float(value),
                    "stderr": stderr if isinstance(stderr, float) else None,
                    "change": change,
                    "lo": lo,
                    "hi": hi,
                    "note": None,
                }
            )
    return rows


def _questions(found: Any, task: str) -> int:
    """Questions of a task, or of all tasks of a group."""
    if task in found["n-samples"]:
        return int(found["n-samples"][task]["effective"])
    return sum(_questions(found, part) for part in found["group_subtasks"][task])
