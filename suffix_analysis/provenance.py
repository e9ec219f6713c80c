"""What a run was made from: digests of its input files (origin.json) and of its model (weights.json).

Settings hold names. Behind a name there may be another file tomorrow, and the same file may stand elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from suffix_analysis.errors import UserError
from suffix_analysis.files import read_as, write_json

if TYPE_CHECKING:
    from suffix_analysis.models import Model

INPUTS = ("harmful", "harmless", "suffixes", "text")
MODEL = ("model", "adapter")
SAMPLE = 256  # values of each weight that are read


def _read(path: Path) -> dict[str, str]:
    return read_as(path, dict[str, str]) if path.exists() else {}


def origin(folder: Path) -> dict[str, str]:
    """Digests of input files that a run folder holds, by setting."""
    return _read(folder / "origin.json")


def knows_model(folder: Path) -> bool:
    """Whether a run folder holds digests of its model."""
    return (folder / "weights.json").exists()


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
    """Keep digests of input files beside those that are there."""
    write_json(folder / "origin.json", origin(folder) | digests)


def same_inputs(folder: Path, settings: dict[str, Any]) -> set[str]:
    """The settings whose input files are those that a run began with; what is not there any more is not needed.

    Raises:
        UserError: one is another file; names the setting and the file.
    """
    known, found = origin(folder), input_digests(settings)
    for name, digest in found.items():
        if known.get(name, digest) != digest:
            raise UserError(
                f"{settings[name]} ({name}) is another file than when {folder} was begun (SHA-256 {digest[:12]}…, "
                f"then {known[name][:12]}…); put the old one back, or choose another folder with --out."
            )
    return {*found} & {*known}


@torch.no_grad()
def model_digests(model: Model) -> dict[str, str]:
    """A digest of values from every weight, by name, and of the tokenizer and its template, wherever they come from.

    Weights that are packed (four bits) or not in memory (offloaded) are left out.
    """
    tokenizer = model.tokenizer.backend_tokenizer.to_str() if model.tokenizer.is_fast else ""
    found = {"the tokenizer": _short(tokenizer.encode()), "the template": _short(str(model.chat("x").text).encode())}
    for name, weight in model.hf.named_parameters():
        if weight.is_meta or not weight.is_floating_point():
            continue
        flat = weight.detach().flatten()
        picked = flat[:: max(1, len(flat) // SAMPLE)].float().cpu()
        found[name] = _short(str(tuple(weight.shape)).encode() + picked.numpy().tobytes())
    return found


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def weights_of(folder: Path) -> dict[str, str]:
    """Digests of its model that a run folder holds; none where it holds no model's."""
    return _read(folder / "weights.json")


def difference(found: Mapping[str, str], known: Mapping[str, str]) -> str | None:
    """What of a model's digests (see `model_digests`) is other than these, the first of it; None where nothing is."""
    return next((name for name in found if known.get(name, found[name]) != found[name]), None)


def require_same_model(folder: Path, model: Model, begun: bool) -> None:
    """Refuse a model that is another than the one that a run began with, as far as both are in memory.

    Args:
        folder: the run's.
        model: as it was loaded.
        begun: whether anything has been made with a model; otherwise this one's digests are kept.

    Raises:
        UserError: names the model, and what of it is another.
    """
    found, known = model_digests(model), weights_of(folder)
    if not begun or not known:
        write_json(folder / "weights.json", found)
        return
    if (other := difference(found, known)) is not None:
        raise UserError(
            f"{model.name} is another model than when {folder} was begun: {other} differs; load the one that it was "
            "begun with, or choose another folder with --out."
        )
