"""The chosen direction on disk: tensors as safetensors, the choice as their metadata; and in a run's summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from suffix_analysis.chat import token_strings
from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.files import write_tensors
from suffix_analysis.models import Model
from suffix_analysis.records import SCHEMA_VERSION


def save_direction(path: Path, direction: Direction) -> None:
    """Write a direction's tensors; the choice travels as metadata."""
    tensors = {
        "vector": direction.vector.contiguous(),
        "means_harmful": direction.means_harmful.contiguous(),
        "means_harmless": direction.means_harmless.contiguous(),
    }
    meta = {
        "position": str(direction.position),
        "layer": str(direction.layer),
        "refusal_tokens": ",".join(map(str, direction.refusal_tokens)),
        "n": ",".join(f"{key}={value}" for key, value in direction.n.items()),
    }
    write_tensors(path, tensors, meta)


def load_direction(path: Path, scores: list[dict[str, Any]]) -> Direction:
    """Read a direction back.

    Raises:
        UserError: missing or damaged.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as handle:
            meta = handle.metadata()
        size, means = tensors["vector"].shape, tensors["means_harmful"].shape
        if len(size) != 1 or len(means) != 2 or means[1] != size[0] or tensors["means_harmless"].shape != means:
            raise ValueError(f"a direction of shape {list(size)} with means of {list(means)}")
        return Direction(
            vector=tensors["vector"],
            position=int(meta["position"]),
            layer=int(meta["layer"]),
            scores=scores,
            means_harmful=tensors["means_harmful"],
            means_harmless=tensors["means_harmless"],
            refusal_tokens=tuple(int(i) for i in meta["refusal_tokens"].split(",")),
            n={key: int(value) for key, value in (pair.split("=") for pair in meta["n"].split(","))},
        )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); delete it and run the direction stage.") from error


def summary_of(model: Model, direction: Direction | None) -> dict[str, Any]:
    """What findings/summary.json holds of the model and of its direction, None where none passes."""
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": model.name,
        "embedded": model.name == "embedded",
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "d_model": model.d_model,
    }
    if direction is None:
        return found
    chat = model.chat("x")
    ids, vector = chat.ids[chat.regions["chat"]], direction.vector
    return found | {
        "direction": {
            "position": direction.position,
            "layer": direction.layer,
            "token": token_strings(model.tokenizer, [int(ids[direction.position])])[0],
            "norm": float(vector.norm()),
            # few very large coordinates can dominate a difference of means
            "top10_share": float(vector.square().topk(min(10, len(vector))).values.sum() / vector.square().sum()),
        },
        "refusal_tokens": [{"id": i, "text": token_strings(model.tokenizer, [i])[0]} for i in direction.refusal_tokens],
    }
