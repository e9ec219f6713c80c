"""What a run was made from: digests of its input files and of its model's weights, kept in origin.json.

Settings hold names. Behind a name there may be another file tomorrow, and the same file may stand elsewhere.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from suffix_analysis.errors import UserError
from suffix_analysis.files import read_as, write_json

INPUTS = ("harmful", "harmless", "suffixes", "text")
MODEL = ("model", "adapter")
SAMPLE = 256  # values of each weight that are read


def origin(folder: Path) -> dict[str, str]:
    """Digests that a run folder holds, by setting; ``weights`` is the model's."""
    path = folder / "origin.json"
    return read_as(path, dict[str, str]) if path.exists() else {}


def input_digests(settings: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of every input that is a local file, by setting."""
    found = {}
    for name in INPUTS:
        value = settings.get(name)
        if isinstance(value, str) and value != "embedded" and Path(value).is_file():
            with Path(value).open("rb") as handle:
                found[name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found


def remember(folder: Path, digests: dict[str, str]) -> None:
    """Keep digests beside those that are there."""
    write_json(folder / "origin.json", origin(folder) | digests)


def require_same_inputs(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse input files that are others than those that a run began with; what is not there any more is not needed.

    Raises:
        UserError: names the setting and the file.
    """
    known = origin(folder)
    for name, digest in input_digests(settings).items():
        if known.get(name, digest) != digest:
            raise UserError(
                f"{settings[name]} ({name}) is another file than when {folder} was begun (SHA-256 {digest[:12]}…, "
                f"then {known[name][:12]}…); put the old one back, or choose another folder with --out."
            )


@torch.no_grad()
def weights_digest(hf: torch.nn.Module) -> str:
    """A digest of values from every weight, wherever the model comes from and lies.

    Weights that are packed (four bits) or not in memory (offloaded) are left out.
    """
    whole = hashlib.sha256()
    for name, weight in sorted(hf.named_parameters()):
        if weight.is_meta or not weight.is_floating_point():
            continue
        flat = weight.detach().flatten()
        picked = flat[:: max(1, len(flat) // SAMPLE)].float().cpu()
        whole.update(name.encode() + str(tuple(weight.shape)).encode() + picked.numpy().tobytes())
    return whole.hexdigest()


def require_same_weights(folder: Path, name: str, hf: torch.nn.Module) -> None:
    """Refuse a model whose weights are others than those that a run began with; a new run keeps their digest.

    Raises:
        UserError: names the model.
    """
    digest, known = weights_digest(hf), origin(folder).get("weights")
    if known is None:
        remember(folder, {"weights": digest})
    elif known != digest:
        raise UserError(
            f"The weights of {name} are others than when {folder} was begun; load the model that it was begun with, or "
            "choose another folder with --out."
        )
