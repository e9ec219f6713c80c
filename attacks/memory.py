"""How many candidates fit into memory at once."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from attacks.config import AttackError

SHARE = 0.5  # of the free memory that a batch may take
_tasks = 1  # processes like this one on the machine (or on its GPU), among which that is divided
WANT = re.compile(
    r"out of memory|(can't|cannot) allocate|not enough memory|failed to allocate|alloc_failed", re.IGNORECASE
)
LOGIT_BUDGET = 2**27  # on a CPU: logits held at once (512 MB in float32)
TOKEN_BUDGET = 8192  # on a CPU: tokens in one forward; larger batches gain nothing there and only cost memory


def free_bytes(device: torch.device) -> int:
    """Memory that is free on ``device`` now."""
    if device.type == "cuda":
        # what the allocator keeps for this process is free to it
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + own
    return int(psutil.virtual_memory().available)


def own_bytes(device: torch.device) -> int:
    """This process's part of it (see `share_memory`)."""
    return free_bytes(device) // _tasks


def share_memory(tasks: int) -> None:
    """Let this process's batches take only one of ``tasks`` parts of the memory, for as many processes side by side."""
    global _tasks
    _tasks = max(1, tasks)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed for want of memory: on a GPU a kind of error of its own, on a CPU a plain one."""
    return isinstance(error, torch.OutOfMemoryError) or bool(WANT.search(str(error)))


def out_of_memory(what: str, model: Any) -> AttackError:
    """The error that says for ``what`` memory did not suffice, and what to do."""
    free = free_bytes(model.device) / 2**30
    return AttackError(
        f"There is not enough memory on {model.device} for {what} ({free:.1f} GiB are free); take a smaller model or a "
        "lower precision, shorter conversations, or fewer of them."
    )


@contextlib.contextmanager
def memory_for(what: str, model: Any) -> Iterator[None]:
    """Turn running out of memory into an `AttackError` that names ``what`` was to be done.

    Raises:
        AttackError: the memory was not enough.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(what, model) from error


def candidate_bytes(model: Any, n_run: int, n_total: int, n_target: int) -> int:
    """What one candidate takes in a forward over its last ``n_run`` of ``n_total`` tokens with ``n_target`` logits.

    Logits and their softmax in float32, keys and values of all tokens, and one block's activations.
    """
    config, size = model.config, model.dtype.itemsize
    logits = 2 * 4 * n_target * model.get_output_embeddings().weight.shape[0]
    return logits + n_total * cached_bytes(config, size) + n_run * run_bytes(config, size)


def cached_bytes(config: Any, itemsize: int) -> int:
    """What the keys and values of one token take in all blocks."""
    text = config.get_text_config()
    if not getattr(text, "num_attention_heads", None):  # a state-space model keeps no token
        return 0
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * itemsize * int(heads * d_head * text.num_hidden_layers)


def run_bytes(config: Any, itemsize: int) -> int:
    """What one token's activations in one block take while a forward runs."""
    text = config.get_text_config()
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return itemsize * int(6 * text.hidden_size + 3 * wide)


def most_tokens(model: Any, most: int, logits: bool = False) -> int:
    """Tokens that run and are cached at once: what half of the free memory holds, at most ``most``, at least 1.

    ``logits``: each of them gives its logits, which are then taken to float32.
    """
    size = model.dtype.itemsize
    each = cached_bytes(model.config, size) + run_bytes(model.config, size)
    each += (size + 4) * model.get_output_embeddings().weight.shape[0] if logits else 0
    return max(1, min(most, int(SHARE * own_bytes(model.device)) // each))


def most_candidates(model: Any, n_run: int, n_total: int, n_target: int, free: int) -> int:
    """Candidates in one forward: what half of ``free`` holds and, on a CPU, no more than is of use; at least 1."""
    most = SHARE * free // candidate_bytes(model, n_run, n_total, n_target)
    if model.device.type == "cpu":
        vocab = model.get_output_embeddings().weight.shape[0]
        most = min(most, LOGIT_BUDGET // (vocab * n_target), TOKEN_BUDGET // n_run)
    return max(1, int(most))
