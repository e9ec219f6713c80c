"""Tasks side by side under Ray, on one machine or on many (extra ``ray``)."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from attacks.memory import share_memory
from suffix_analysis.config import StudyConfig
from suffix_analysis.errors import UserError, first_line
from suffix_analysis.inputs import study_model
from suffix_analysis.models import Model
from suffix_analysis.provenance import difference, model_digests

RETRIES = 3  # of a task whose worker died
KINDS = ("CPU", "GPU")
WAITING = 64  # tasks that Ray is given at once: what is queued is held in memory


def side_by_side(
    task: Callable[..., Any],
    parts: Sequence[tuple[Any, ...]],
    config: StudyConfig,
    name: Callable[[int], str],
    on_failed: Callable[[int, str], None] | None = None,
    weights: Mapping[str, str] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run ``task`` on every part and yield (number of the part, result) as they come.

    Workers need no access to the run folder: they get arguments and return results. A task whose worker died runs
    again. How many run at once follows from ``attack_cpus`` and ``attack_gpus``.

    Args:
        task: a function of a module, called with ``config`` and a part's arguments.
        parts: arguments of every task.
        config: the study's settings.
        name: what a part is called when it fails, as the beginning of a sentence.
        on_failed: told of a task that failed, by number and reason; the others then go on. Without it no task is begun
            after a failure, and what is under way is still yielded.
        weights: digests of the run's model (see `suffix_analysis.provenance`), which a worker's must have.

    Raises:
        UserError: Ray is not installed or its cluster cannot be reached, or a task failed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--executor ray needs Ray; run: pip install 'suffix-analysis[ray]'") from error
    ours = not ray.is_initialized()
    try:
        if ours and parts:
            _reach(config.address)
            ray.init(address=config.address, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"Ray cannot be reached at {config.address or 'this machine'}: {first_line(error)}") from error
    if parts:
        _require([node["Resources"] for node in ray.nodes() if node["Alive"]], config)
    remote = ray.remote(_in_worker).options(
        name=task.__name__, num_cpus=config.attack_cpus, num_gpus=config.attack_gpus, max_retries=RETRIES
    )
    try:
        known = dict(weights or {})
        waiting, pending, failure = list(enumerate(parts)), dict[Any, int](), None
        while waiting or pending:
            while waiting and len(pending) < WAITING:
                number, part = waiting.pop(0)
                pending[remote.remote(task, config, part, known)] = number
            (ready,), _ = ray.wait(list(pending), num_returns=1)
            number = pending.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error  # without Ray's frames around it
                if on_failed is not None:
                    on_failed(number, first_line(cause))
                elif failure is None:
                    failure = UserError(f"{name(number)} failed: {first_line(cause)}")
                    failure.__cause__, waiting = error, []
                continue
            yield number, result
        if failure is not None:
            raise failure
    finally:
        if ours:
            ray.shutdown()


def _reach(address: str | None) -> None:
    """Try a cluster's address: Ray itself goes on waiting for minutes.

    Raises:
        OSError: nothing listens there.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _require(nodes: Sequence[Mapping[str, float]], config: StudyConfig) -> None:
    """Refuse tasks that none of these machines could ever start: Ray would wait for them without a word.

    Raises:
        UserError: says what is asked for and what is there.
    """
    cpus, gpus = config.attack_cpus, config.attack_gpus
    if not any(cpus <= node.get("CPU", 0) and gpus <= node.get("GPU", 0) for node in nodes):
        most = " and ".join(f"{max((node.get(name, 0) for node in nodes), default=0):g} {name}s" for name in KINDS)
        raise UserError(
            f"Each task asks for {cpus} CPUs (--attack-cpus) and {gpus:g} GPUs (--attack-gpus), which no machine of "
            f"Ray's has (at most {most}); ask for fewer, or give another cluster (--address)."
        )


def _in_worker(task: Callable[..., Any], config: StudyConfig, part: tuple[Any, ...], weights: dict[str, str]) -> Any:
    torch.set_num_threads(config.attack_cpus)
    share_memory(_side_by_side(config))
    if weights and (other := difference(_loaded(_loading(config))[1], weights)) is not None:
        raise UserError(
            f"{config.model} on {socket.gethostname()} is another model than the run's: {other} differs; put the same "
            "one there, or name it with its revision."
        )
    return task(config, *part)


def _side_by_side(config: StudyConfig) -> int:
    """How many tasks may share this one's memory: that of its GPU, or this machine's."""
    if config.attack_gpus:
        return max(1, int(1 / config.attack_gpus))
    return max(1, (os.cpu_count() or 1) // config.attack_cpus)


_LOADING = ("model", "adapter", "system", "reply_prefix", "dtype", "four_bit", "score_dtype")


def worker_model(config: StudyConfig) -> Model:
    """The study's model in a worker; the worker's next task finds it loaded."""
    return _loaded(_loading(config))[0]


def _loading(config: StudyConfig) -> StudyConfig:
    """What of the settings says how a worker loads the model."""
    named = {name: getattr(config, name) for name in _LOADING}
    # Ray shows a task the GPUs that it asked for, and no fewer of them where it asked for none
    own = "cuda" if config.attack_gpus else config.device or "cpu"
    return StudyConfig(**named, device="auto" if config.device == "auto" else own)


@functools.lru_cache(maxsize=1)
def _loaded(config: StudyConfig) -> tuple[Model, dict[str, str]]:
    """The model and its digests as it was loaded: a trace wraps its modules, which gives the weights other names."""
    model = study_model(config)
    return model, model_digests(model)
