"""The machine and the versions that a run was made with; what a bug report needs."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from suffix_analysis.errors import first_line

# what else is installed (extras, quantisation, attention kernels) changes results or failures too
PACKAGES = (
    "suffix-analysis", "torch", "transformers", "tokenizers", "transformer-lens", "circuitsvis", "nanogcg", "numpy",
    "scipy", "peft", "accelerate", "safetensors", "gguf", "datasets", "huggingface-hub", "pandas", "pyarrow",
    "pydantic", "altair", "vl-convert-python", "jaxtyping", "beartype", "cyclopts", "ray", "lm-eval", "bitsandbytes",
    "triton", "flash-attn",
)  # fmt: skip


def peak_gib() -> float:
    """The most memory this process has held, in GiB (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def environment() -> dict[str, Any]:
    """Versions and machine, for env.json and for bug reports; holds no paths, names or tokens.

    Where torch cannot be imported, why stands in its place.
    """
    import psutil

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "packages": versions,
        "git": _revision(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        **_computing(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _computing() -> dict[str, Any]:
    """What torch says of GPUs (name and memory of each), threads and precisions."""
    try:
        import torch

        from attacks.precision import bf16_speedup
    except (ImportError, OSError) as error:  # a broken installation, which a bug report may be about
        return {"torch": f"cannot be imported: {first_line(error)}"}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        "cuda": torch.version.cuda or torch.version.hip or "",
        "threads": torch.get_num_threads(),
        "bf16_speedup": round(bf16_speedup(torch.device("cpu")), 2),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _revision() -> str:
    """The checkout's git revision, or empty for an installed package."""
    top = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(top), "rev-parse", "--show-toplevel", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = done.stdout.split("\n")
        # an environment inside another project's checkout must not take that one's revision for ours
        if done.returncode == 0 and Path(found[0]).resolve() == top:
            return found[1].strip()
    return ""
