"""Prepared runs on tiny random models of every architecture, which the tests of replays and of splits share."""

from __future__ import annotations

from typing import Any

from suffix_analysis.causal import Readout
from suffix_analysis.models import Model
from suffix_analysis.replay import Prepared, prepare
from tests import tiny

ARCHITECTURES = (
    "llama", "gemma", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "olmo2", "olmo3", "smollm3",
    "granite", "stablelm", "phi",
)  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {"granite": {"residual_multiplier": 0.4, "embedding_multiplier": 3.0}}
SUFFIX = "x y z ! more"
TOKENS = (40, 41)

Runs = tuple[Model, Prepared, Prepared]


def two_runs(architecture: str) -> Runs:
    """A model with prompts of several lengths, without and with a suffix."""
    own = "olmo2" if architecture == "olmo2" else None  # a line's end behind the user's text merges with its last sign
    model = tiny.model(architecture, format_name=own, **CHANGES.get(architecture, {}))
    tiny.shake(model.hf)
    plain, attacked = (prepare(model, [model.chat(t, suffix) for t in tiny.TEXTS]) for suffix in ("", SUFFIX))
    return model, plain, attacked


def readout(model: Model) -> Readout:
    """A random direction, read before the last block."""
    vector = tiny.unit(model.d_model)
    return Readout(vector / vector.norm(), 2, TOKENS)
