"""Where a model's weights are kept: on one device, spread over several with memory and disk, or in four bits each."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from suffix_analysis.errors import UserError

Device = str | Mapping[str, str | int] | None


def loading_arguments(name: str, dtype: torch.dtype, device: Device, four_bit: bool) -> dict[str, Any]:
    """Keywords for ``from_pretrained`` beside dtype.

    Args:
        name: the model; its size is read from its configuration before any weight is.
        dtype: precision of the weights that are not quantised.
        device: one device, ``"auto"`` (accelerate spreads the model over GPUs, memory and disk), or a device map.
        four_bit: quantise with bitsandbytes.

    Raises:
        UserError: the model does not fit, or bitsandbytes is not there.
    """
    arguments: dict[str, Any] = {}
    if four_bit:
        if find_spec("bitsandbytes") is None:
            raise UserError("4-bit weights need bitsandbytes; run: pip install bitsandbytes")
        from transformers import BitsAndBytesConfig

        # computing in float32 would need dequantised copies four times as large
        compute = torch.bfloat16 if dtype == torch.float32 else dtype
        arguments["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)
    from suffix_analysis.sizes import require_fit

    require_fit(name, dtype, device, four_bit)
    if is_spread(device):
        scratch = tempfile.TemporaryDirectory(prefix="suffix-analysis-offload-")
        _SCRATCH.append(scratch)  # removed when the process ends
        return arguments | {"device_map": device, "offload_folder": scratch.name}
    return arguments | ({"device_map": {"": device or default_device()}} if four_bit else {})


_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []


def is_spread(device: Device) -> bool:
    """Whether accelerate is to place a model's parts, each by itself."""
    return device == "auto" or isinstance(device, Mapping)


def require_device(device: Device) -> None:
    """Refuse a device that is not here.

    Raises:
        UserError: names it, and says what there is.
    """
    if not isinstance(device, str) or device == "auto":
        return
    kind, _, number = device.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not count or (number and not (number.isdigit() and int(number) < count)):
        gpus = torch.cuda.device_count()
        there = "cpu and auto" + ("".join(f", cuda:{i}" for i in range(gpus)) if gpus else "; there is no GPU")
        raise UserError(f"There is no device {device!r} here; there are {there} (--device).")


def checked_name(name: Any, dtype: Any, device: Device) -> str:
    """A model's name as text; precision and device are looked at.

    Raises:
        UserError: one of them is something else, or the device is not here.
    """
    require_device(device)
    if not isinstance(name, (str, os.PathLike)):
        raise UserError(f"The model is {name!r:.60}; give 'embedded', a folder, a GGUF file or a hub id.")
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"dtype is {dtype!r:.60}; give a torch.dtype, e.g. torch.bfloat16.")
    return str(name)


def default_device() -> str:
    """The GPU when there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def in_memory(module: torch.nn.Module) -> Iterator[None]:
    """The weights of a module and all in it, to be read meanwhile: fetched from where accelerate keeps them, and whole
    where they are kept in four bits."""
    from accelerate.utils import align_module_device

    with contextlib.ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
            # the bridge's wrappers hand the weight on; it is the layer's own that is packed
            if getattr(part._parameters.get("weight"), "quant_state", None) is not None:
                stack.enter_context(_dequantised(part))
        yield


@contextlib.contextmanager
def _dequantised(part: torch.nn.Module) -> Iterator[None]:
    """A layer of bitsandbytes with its weight as the matrix that its four bits stand for."""
    packed: Any = part.weight
    # what the layer makes of unit vectors, because bits are packed otherwise on every kind of machine
    units = torch.eye(packed.quant_state.shape[1], device=packed.device, dtype=packed.quant_state.dtype)
    with torch.no_grad():
        whole = part.forward(units)
        whole = whole if part.bias is None else whole - part.bias
    part._parameters["weight"] = torch.nn.Parameter(whole.T.contiguous(), requires_grad=False)
    try:
        yield
    finally:
        part._parameters["weight"] = packed
