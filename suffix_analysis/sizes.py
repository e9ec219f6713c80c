"""How much memory a model takes, from its configuration alone: nothing of its weights is read."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from attacks.memory import cached_bytes, free_bytes, run_bytes
from suffix_analysis.batching import REPLY_BUDGET
from suffix_analysis.errors import UserError, first_line
from suffix_analysis.models import BROKEN, quiet, source_of
from suffix_analysis.placement import Device, is_spread

GIB = 2**30
# what a study needs beside weights and batches, measured on the demo (3.2 GiB with 0.8 of weights and 0.4 of keys)
BASE_GIB = 2.0
FOUR_BIT = 0.5 + 4 / 64  # bytes a weight: four bits, and a float32 scale for 64 of them; bitsandbytes' default


@dataclass(frozen=True)
class Size:
    """A model's size and what this machine has free, in GiB.

    ``float32``, ``bfloat16`` and ``four_bit`` are the weights; embedding and head stay in bfloat16 where the rest has
    four bits. ``needed_…`` is for a whole study: the weights, a bfloat16 copy of float32 ones for searching, and the
    largest batches. ``free_gpu`` is the present GPU's, ``free_gpus`` all GPUs' together (both None without one).
    """

    name: str
    architecture: str
    n_parameters: int
    float32: float
    bfloat16: float
    four_bit: float
    needed_float32: float
    needed_bfloat16: float
    needed_four_bit: float
    free_ram: float
    free_disk: float
    free_gpu: float | None
    free_gpus: float | None


def size_of(name: str) -> Size:
    """Estimate a model's memory.

    Args:
        name: as for `suffix_analysis.models.load_model`; GGUF files are counted as if unpacked.

    Raises:
        UserError: there is no such model, or its configuration cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, kwargs = source_of(name, weights=False)
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **kwargs)
            hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except BROKEN as error:
        raise UserError(f"The configuration of {name!r} cannot be read: {first_line(error)}") from error
    count = sum(p.numel() for p in hf.parameters())  # shared weights count once
    outer = {id(part.weight): part.weight.numel() for part in (hf.get_input_embeddings(), hf.get_output_embeddings())}
    ends, inner = sum(outer.values()), count - sum(outer.values())
    full, half, quarter = 4 * count / GIB, 2 * count / GIB, (2 * ends + FOUR_BIT * inner) / GIB
    if (stored := _stored_bytes(config)) is not None:  # as its files have them, whatever precision is asked for
        full = half = quarter = (2 * ends + stored * inner) / GIB
    work = BASE_GIB + REPLY_BUDGET * (cached_bytes(config, 2) + run_bytes(config, 2)) / GIB
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return Size(
        name=name,
        architecture=config.get_text_config().model_type,
        n_parameters=count,
        float32=full,
        bfloat16=half,
        four_bit=quarter,
        needed_float32=full + (half if stored is None else 0) + work,
        needed_bfloat16=half + work,
        needed_four_bit=quarter + work,
        free_ram=free_bytes(torch.device("cpu")) / GIB,
        free_disk=shutil.disk_usage(tempfile.gettempdir()).free / GIB,
        free_gpu=free_bytes(torch.device("cuda")) / GIB if gpus else None,
        free_gpus=sum(map(free_bytes, gpus)) / GIB if gpus else None,
    )


def _stored_bytes(config: Any) -> float | None:
    """Bytes a weight of a model whose files are quantised already (GPTQ, AWQ, bitsandbytes, FP8), else None."""
    kept = getattr(config, "quantization_config", None)
    if kept is None:
        return None
    found = kept if isinstance(kept, dict) else kept.to_dict()
    bits = found.get("bits") or (4 if found.get("load_in_4bit") or "4" in str(found.get("quant_method")) else 8)
    return float(bits) / 8 + FOUR_BIT - 0.5


def require_fit(name: str, dtype: torch.dtype, device: Device, four_bit: bool = False) -> None:
    """Refuse a model whose weights alone are larger than the memory that is free where they would go.

    Raises:
        UserError: says how much is needed and free, and what to do.
    """
    size = size_of(name)
    whole = {4: size.float32, 2: size.bfloat16}.get(dtype.itemsize, dtype.itemsize * size.n_parameters / GIB)
    needed = size.four_bit if four_bit else whole
    free, where = _free(size, device)
    if needed > free:
        how = "4 bits" if four_bit else str(dtype).removeprefix("torch.")
        raise UserError(
            f"{name!r} does not fit: its weights in {how} take {needed:.1f} GiB, and {free:.1f} GiB of "
            f"{where} are free; load it in fewer bits (--dtype bfloat16, --four-bit)"
            + ("." if is_spread(device) else ", or spread it with --device auto over GPUs, memory and disk.")
        )


def _free(size: Size, device: Device = None) -> tuple[float, str]:
    """GiB that are free where a model would go, and what that memory is called."""
    if is_spread(device):
        return (size.free_gpus or 0) + size.free_ram + size.free_disk, "GPU memory, memory and disk together"
    if device == "cpu" or size.free_gpu is None:
        return size.free_ram, "memory"
    one = torch.device(device) if isinstance(device, str) and device.startswith("cuda:") else None
    return size.free_gpu if one is None else free_bytes(one) / GIB, "GPU memory"


def verdict(size: Size) -> str:
    """One sentence: whether a study of the model fits this machine, and how."""
    free, where = _free(size)
    for precision, needed in (("float32", size.needed_float32), ("bfloat16", size.needed_bfloat16)):
        if needed <= free:
            return f"It fits in {precision}: about {needed:.1f} GiB of {free:.1f} GiB free {where}."
    told = f"It does not fit as it is: in bfloat16 it needs about {size.needed_bfloat16:.1f} GiB, and {free:.1f} GiB "
    told += f"of {where} are free"
    if size.needed_four_bit <= free:
        return f"{told}; with --four-bit it needs about {size.needed_four_bit:.1f}."
    fast, every = (size.free_gpus or 0) + size.free_ram, _free(size, "auto")[0]
    if size.needed_bfloat16 <= fast:
        return f"{told}; --device auto spreads it over {fast:.1f} GiB of GPU memory and memory."
    if size.needed_bfloat16 <= every:
        return f"{told}; --device auto puts what is left on disk, which is slow."
    return f"{told}, with memory and disk {every:.1f}; take a smaller model or a larger machine."
