"""Mechanistic interpretability of adversarial suffixes: directions, traces, heads, studies.

Names are loaded on first use, so that ``import suffix_analysis`` and ``--help`` never load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from suffix_analysis import directions
    from suffix_analysis.analysis import analyze
    from suffix_analysis.directions import Direction, DirectionConfig, find_direction
    from suffix_analysis.errors import UserError
    from suffix_analysis.models import Model, load_model
    from suffix_analysis.prompts import Prompt, load_prompts
    from suffix_analysis.records import Findings, Suffix
    from suffix_analysis.traces import Traces, trace

__version__ = "0.1.0"
_HOME = {
    "Direction": "directions",
    "DirectionConfig": "directions",
    "Findings": "records",
    "Model": "models",
    "Prompt": "prompts",
    "Suffix": "records",
    "Traces": "traces",
    "UserError": "errors",
    "analyze": "analysis",
    "find_direction": "directions",
    "load_model": "models",
    "load_prompts": "prompts",
    "trace": "traces",
}
__all__ = [
    "Direction",
    "DirectionConfig",
    "Findings",
    "Model",
    "Prompt",
    "Suffix",
    "Traces",
    "UserError",
    "analyze",
    "directions",
    "find_direction",
    "load_model",
    "load_prompts",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name == "directions":
        return importlib.import_module("suffix_analysis.directions")
    if name in _HOME:
        return getattr(importlib.import_module(f"suffix_analysis.{_HOME[name]}"), name)
    raise AttributeError(f"module 'suffix_analysis' has no attribute {name!r}")
