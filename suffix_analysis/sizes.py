"""How much memory a model takes, from its configuration alone: nothing of its weights is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attacks.memory import free_bytes
from suffix_analysis.errors import UserError, first_line
from suffix_analysis.models import quiet, source_of
from suffix_analysis.placement import Device

GIB = 2**30
# what forwards over a batch of prompts need beside the weights, measured on the demo (4.0 GiB with 0.8 of weights)
WORK_GIB = 3.0


@dataclass(frozen=True)
class Size:
    """A model's size and what this machine has free, in GiB.

    ``needed`` is for a whole study: the weights, a bfloat16 copy of float32 ones for searching, and the batches.
    """

    name: str
    architecture: str
    n_parameters: int
    float32: float
    bfloat16: float
    needed_float32: float
    needed_bfloat16: float
    free_ram: float
    free_gpu: float | None


def size_of(name: str) -> Size:
    """Estimate a model's memory.

    Args:
        name: as for :func:`suffix_analysis.models.load_model`; GGUF files are counted as if unpacked.

    Raises:
        UserError: there is no such model, or its configuration cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, kwargs = source_of(name)
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(source, **kwargs)
            hf = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The configuration of {name!r} cannot be read: {first_line(error)}") from error
    count = sum(p.numel() for p in hf.parameters())  # shared weights count once
    full, half = 4 * count / GIB, 2 * count / GIB
    cuda = torch.cuda.is_available()
    return Size(
        name=name,
        architecture=config.get_text_config().model_type,
        n_parameters=count,
        float32=full,
        bfloat16=half,
        needed_float32=full + half + WORK_GIB,
        needed_bfloat16=half + WORK_GIB,
        free_ram=free_bytes(torch.device("cpu")) / GIB,
        free_gpu=free_bytes(torch.device("cuda")) / GIB if cuda else None,
    )


def require_fit(name: str, dtype: torch.dtype, device: Device, four_bit: bool = False) -> None:
    """Refuse a model whose weights alone are larger than the memory that is free where they would go.

    Raises:
        UserError: says how much is needed and free, and what to do.
    """
    size = size_of(name)
    each = 0.5 if four_bit else dtype.itemsize
    needed = each * size.n_parameters / GIB
    free, where = _free(size, device)
    if needed > free:
        how = "4 bits" if four_bit else str(dtype).removeprefix("torch.")
        raise UserError(
            f"{name!r} does not fit: its weights in {how} take {needed:.1f} GiB, and {free:.1f} GiB of "
            f"{where} are free; load it in fewer bits (--dtype bfloat16, --four-bit), or "
            "spread it with --device auto over GPUs, memory and disk."
        )


def _free(size: Size, device: Device = None) -> tuple[float, str]:
    """GiB that are free where a model would go, and what that memory is called."""
    if device == "cpu" or size.free_gpu is None:
        return size.free_ram, "memory"
    return size.free_gpu, "GPU memory"


def verdict(size: Size) -> str:
    """One sentence: whether the model fits this machine, and in which precision."""
    free, where = _free(size)
    for precision, needed in (("float32", size.needed_float32), ("bfloat16", size.needed_bfloat16)):
        if needed <= free:
            return f"It fits in {precision}: about {needed:.1f} GiB of {free:.1f} GiB free {where}."
    needed = size.needed_bfloat16
    return f"It does not fit: even in bfloat16 it needs about {needed:.1f} GiB; {free:.1f} GiB of {where} are free."
