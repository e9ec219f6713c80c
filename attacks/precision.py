"""Which precision is fast on this machine (measured, never guessed from the CPU's name), and what keeps it fast."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch


def _matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds for one mid-sized linear layer (2048 × 576 × 1536), best of five."""
    x = torch.ones(2048, 576, device=device, dtype=dtype)  # not random: the global generator is the caller's
    w = torch.ones(1536, 576, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        torch.nn.functional.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


@functools.cache
def bf16_speedup(device: torch.device) -> float:
    """How many times faster bfloat16 matrix products are than float32 ones on ``device``."""
    return _matmul_seconds(torch.float32, device) / _matmul_seconds(torch.bfloat16, device)


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where it is at least 1.5× as fast as float32 on ``device``, else float32."""
    return torch.bfloat16 if bf16_speedup(torch.device(device)) >= 1.5 else torch.float32


def or_float32(model: Any, added: str = "") -> str:
    """What to do about numbers that are not finite; ``added``: what besides the weights may be broken."""
    if model.dtype != torch.float32:
        return "try float32"
    return f"the model's weights{added and f', or {added},'} are broken"


def stays_put(model: Any) -> bool:
    """Whether a model cannot be copied or cast: it is quantised, or its weights are spread by accelerate."""
    return bool(getattr(model, "is_quantized", False)) or len(set(getattr(model, "hf_device_map", {}).values())) > 1


def copied(model: Any, dtype: torch.dtype) -> Any:
    """A copy of a model with its weights in ``dtype``, as if it had been loaded so.

    Each weight is cast while it is copied, so nothing is held twice. Buffers that no file holds stay as they are:
    rotary frequencies in bfloat16 would place tokens wrongly, the more the longer the text.
    """
    cast: dict[int, Any] = {
        id(weight): torch.nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=weight.requires_grad)
        for weight in model.parameters()
        if weight.is_floating_point()
    }
    saved = model.state_dict().keys()
    cast |= {
        id(x): x.to(dtype, copy=True) for name, x in model.named_buffers() if name in saved and x.is_floating_point()
    }
    return copy.deepcopy(model, cast)


@contextlib.contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Make the vocabulary product see contiguous rows while it runs.

    A bfloat16 product with a slice of hidden states becomes a batched one on a copy of the weight, up to 100× slower.
    The slice of a single row calls itself contiguous but keeps its strides, so it is cloned all the same.
    """

    def clone(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(clone)
    try:
        yield
    finally:
        handle.remove()
