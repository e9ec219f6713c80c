"""Traces in the run folder while an analysis is unfinished, so that none is made twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.files import write_tensors
from suffix_analysis.models import Model
from suffix_analysis.traces import Job, Traces

Made = Iterable[tuple[int, Traces]]
TENSORS = [f.name for f in fields(Traces) if f.name not in ("chats", "rows", "identity", "closure")]


def traces_of(
    folder: Path,
    jobs: Sequence[Job],
    model: Model,
    direction: Direction,
    make: Callable[[Sequence[Job]], Made],
    on_kept: Callable[[int], None] = lambda n: None,
) -> list[Traces]:
    """Traces of every job: read where ``folder`` holds them, otherwise made, and kept there as they come.

    Args:
        folder: where they are kept; its files are named by what they are traces of.
        jobs: what to trace.
        model: the model that the traces are of.
        direction: the direction, likewise.
        make: traces the jobs that it is given and yields each with its number among them, in any order.
        on_kept: called with the number of prompts whose traces are there.

    Raises:
        UserError: a kept file is damaged, or one cannot be written.
    """
    paths = [folder / f"{_name(job, direction)}.safetensors" for job in jobs]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    on_kept(sum(len(prompts) for i, (prompts, _) in enumerate(jobs) if i not in missing))
    found: dict[int, Traces] = {}
    for number, traces in make([jobs[i] for i in missing]):
        save_traces(paths[missing[number]], traces)
        found[missing[number]] = traces
    return [found[i] if i in found else load_traces(paths[i], model, job) for i, job in enumerate(jobs)]


def _name(job: Job, direction: Direction) -> str:
    prompts, suffix = job
    digest = hashlib.sha256(direction.vector.float().numpy().tobytes())
    for text in (suffix, *(p.text for p in prompts)):
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:24]


def save_traces(path: Path, traces: Traces) -> None:
    """Write traces without rows; the conversations are rendered again when they are read."""
    tensors = {name: getattr(traces, name).contiguous() for name in TENSORS}
    meta = {"identity": repr(traces.identity), "closure": repr(traces.closure)}
    write_tensors(path, tensors, meta)


def load_traces(path: Path, model: Model, job: Job) -> Traces:
    """Read the traces of a job.

    Raises:
        UserError: missing, damaged, or of another model.
    """
    prompts, suffix = job
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as handle:
            meta = handle.metadata()
        size = (len(prompts), model.n_layers)
        if tensors["contribution"].shape[:2] != size:
            raise ValueError(f"{list(tensors['contribution'].shape[:2])} prompts and layers instead of {list(size)}")
        chats = tuple(model.chat(p.text, suffix) for p in prompts)
        own = {name: tensors[name] for name in TENSORS}
        return Traces(chats=chats, rows=(), identity=float(meta["identity"]), closure=float(meta["closure"]), **own)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); delete it and run again.") from error
